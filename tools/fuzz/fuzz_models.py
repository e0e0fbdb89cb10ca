"""Generate random single-step models as Python source, from a seed.

A `Case` is a list of classes whose `__init__` and `forward` are lines of text, so that it can be printed as a script
and shrunk line by line. It grows by trial: a random statement is kept if it runs on example values.
"""

from __future__ import annotations

import dataclasses
import random
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from fuzz_ops import EFFECTS, EXPRESSIONS, HELPERS, IMPORTS, LAYERS, NEURONS, PREAMBLE, SPIKINGJELLY_NEURONS
from torch import Tensor, nn

__all__ = ["Body", "Case", "build", "namespace_of", "random_case"]

_SPIKINGJELLY_IMPORTS = """\
from spikingjelly.activation_based import layer as sj_layer
from spikingjelly.activation_based import neuron as sj_neuron
"""
_MOST_ELEMENTS = 600  # of a value: small models find the same bugs


@dataclass
class Body:
    """One class of a model."""

    name: str
    base: str
    arguments: list[str]
    init: list[str] = field(default_factory=list)
    statements: list[str] = field(default_factory=list)
    result: str = "x"

    def __str__(self) -> str:
        lines = [f"class {self.name}({self.base}):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {line}" for line in self.init]
        lines += ["", f"    def forward(self, {', '.join(self.arguments)}):"]
        lines += [f"        {line}" for statement in self.statements for line in statement.splitlines()]
        return "\n".join([*lines, f"        return {self.result}", ""])


@dataclass
class Case:
    """A model and its inputs; the last of `bodies` is the model.

    Args:
        seed: the seed that it was generated from.
        bodies: the classes.
        shapes: the shape of one step of each input.
        invariant: for each input, whether it is the same at every step.
        T: number of time steps.
    """

    seed: int
    bodies: list[Body]
    shapes: list[tuple[int, ...]]
    invariant: list[bool]
    T: int

    @property
    def root(self) -> Body:
        return self.bodies[-1]

    def source(self) -> str:
        """The classes as Python source."""
        bodies = "\n\n".join(map(str, self.bodies))
        helpers = [
            text
            for name, text in {"(?:Wide)?Spike|LearnedWidth|Homeostatic": PREAMBLE, **HELPERS}.items()
            if re.search(rf"\b(?:{name})\b", bodies)
        ]
        imports = IMPORTS + (_SPIKINGJELLY_IMPORTS if "sj_" in bodies else "")
        return "\n\n".join([imports, *helpers, bodies])

    def copy(self) -> Case:
        bodies = [
            dataclasses.replace(b, arguments=list(b.arguments), init=list(b.init), statements=list(b.statements))
            for b in self.bodies
        ]
        return dataclasses.replace(self, bodies=bodies, shapes=list(self.shapes), invariant=list(self.invariant))


def namespace_of(case: Case, seed_name: str = "fuzzed") -> dict[str, Any]:
    """Run the source; the classes get a module name of their own so that they can be pickled."""
    import sys
    import types

    module = types.ModuleType(f"{seed_name}_{case.seed}")
    module.__dict__["__file__"] = f"{module.__name__}.py"
    sys.modules[module.__name__] = module
    exec(compile(case.source(), f"{module.__name__}.py", "exec"), module.__dict__)
    return module.__dict__


def build(case: Case, namespace: dict[str, Any] | None = None) -> nn.Module:
    """Build the model of a case in float64, with weights drawn from the seed of the case."""
    namespace = namespace_of(case) if namespace is None else namespace
    torch.manual_seed(case.seed)
    model = namespace[case.root.name]().double()
    assert isinstance(model, nn.Module)
    return model


class _Scope:
    """Grow the body of one class by running statements on example values."""

    def __init__(self, r: random.Random, namespace: dict[str, Any], body: Body, values: dict[str, Any]) -> None:
        self.r, self.body = r, body
        self.namespace = namespace
        self.owner = nn.Module()
        self.env = {**values}
        self.names = [name for name, value in values.items() if isinstance(value, Tensor)]
        self.counter = 0
        self.layers: list[tuple[str, torch.Size]] = []

    def value(self, name: str) -> Tensor:
        return self.env[name]

    def pick(self) -> str:
        """Pick a value, preferring recent ones."""
        recent = self.names[-3:]
        return self.r.choice(recent if self.r.random() < 0.65 else self.names)

    def fill(self, template: str, v: str, w: str) -> tuple[str, list[str]]:
        """Fill a template with values, dimensions and numbers; also return the attributes that it needs."""
        r, shape = self.r, tuple(self.value(v).shape)
        rank = len(shape)
        sizes = {"n0": shape[0] if shape else 1, "n1": shape[1] if rank > 1 else 1, "nl": shape[-1] if shape else 1}
        k = r.choice([1, 2, 3, 4])
        # Mostly not the batch dimension, because few statements can follow a reduction over everything.
        dims = [*range(1, rank), *range(1, rank), *range(-rank, rank)] or [0]
        numbers: dict[str, Any] = {
            **sizes,
            "k": k,
            "r": rank,
            "f": round(r.uniform(0.3, 1.1), 3),
            "d": r.choice(dims),
            "e": r.choice(dims),
            "s": list(shape[1:]),
        }
        init: list[str] = []

        def attribute(match: re.Match[str]) -> str:
            parts = [str(numbers.get(p, p)) for p in match[2].split(",") if p]
            value = f"torch.randn({', '.join(parts)})" if parts else "torch.randn(())"
            self.counter += 1
            name = f"p{self.counter}"
            if match[1] == "P":
                init.append(f"self.{name} = nn.Parameter({value})")
            elif match[1] == "B":
                init.append(f'self.register_buffer("{name}", {value})')
            else:
                init.append(f"self.{name} = {value}.double()")
            return f"self.{name}"

        text = re.sub(r"\{([PBC]):([^}]*)\}", attribute, template)
        for key, value in numbers.items():
            text = text.replace("{" + key + "}", str(value))
        self.counter += 1
        return text.replace("{v}", v).replace("{w}", w).replace("{t}", f"v{self.counter}"), init

    def attempt(self, text: str, init: list[str]) -> bool:
        """Run a statement and keep it if its results are finite and not too large."""
        before = dict(self.owner.__dict__["_modules"])
        env = {**self.env}
        try:
            for line in init:
                exec(line, self.namespace, {"self": self.owner})
            self.owner.double()
            exec(text, {**self.namespace, "self": self.owner}, env)
        except Exception:  # a random statement may raise anything; then it is dropped
            self.owner.__dict__["_modules"] = before
            return False
        new = {n: x for n, x in env.items() if n not in self.env and isinstance(x, Tensor)}
        usable = all(x.numel() <= _MOST_ELEMENTS and 0 not in x.shape for x in new.values())
        if not usable or not all(bool(torch.isfinite(x.double()).all()) for x in new.values()):
            return False
        self.env.update({n: x for n, x in env.items() if n not in ("self", "B", "C", "n", "c", "rest", "i", "_", "x_")})
        self.names += [n for n, x in new.items() if x.is_floating_point() and x.dtype == torch.float64]
        self.body.init += init
        self.body.statements.append(text)
        return True

    def step(self, modules: list[str]) -> bool:
        """Try one random statement; return whether it was kept."""
        v, w, kind = self.pick(), self.pick(), self.r.random()
        shared = [layer for layer, shape in self.layers if shape == self.value(v).shape]
        if kind < 0.07 and shared:
            self.counter += 1
            return self.attempt(f"v{self.counter} = {self.r.choice(shared)}({v})", [])
        if kind < 0.60:
            table = NEURONS if kind < 0.2 else LAYERS
            if SPIKINGJELLY_NEURONS and kind > 0.57:
                table = SPIKINGJELLY_NEURONS
            elif modules and 0.2 < kind < 0.28:
                table = modules
            elif 0.28 < kind < 0.34:
                table = EFFECTS
            text, init = self.fill(self.r.choice(table), v, w)
            self.counter += 1
            name = f"self.m{self.counter}"
            if not self.attempt(f"v{self.counter} = {name}({v})", [*init, f"{name} = {text}"]):
                return False
            self.layers.append((name, self.value(v).shape))
            return True
        weights = [weight for weight, _ in EXPRESSIONS]
        template = self.r.choice(self.r.choices(EXPRESSIONS, weights)[0][1])
        text, init = self.fill(template, v, w)
        statement = (
            text
            if template.startswith(("{t}", "if ", "for ", "with ", "assert ", "B, ", "n, "))
            else f"v{self.counter} = {text}"
        )
        return self.attempt(statement, init)

    def grow(self, count: int, modules: list[str]) -> None:
        done = tries = 0
        while done < count and tries < 12 * count:
            done, tries = done + self.step(modules), tries + 1


def _recurrent(r: random.Random, namespace: dict[str, Any], name: str, x: Tensor, modules: list[str]) -> Body:
    """A module with state: registered or not, with any kind of initial value, read before or after it is written."""
    declared = r.random() < 0.75
    body = Body(name, "snnfx.MemoryModule" if declared else "nn.Module", ["x"])
    scope = _Scope(r, namespace, body, {"x": x})
    scope.grow(r.choice([0, 1, 2]), modules)
    shaped = r.choice([n for n in scope.names if scope.value(n).dim() > 0] or ["x"])
    like = scope.value(shaped)
    initial = r.choice(["None", "None", "None", "0.0", "0.3", "tensor"])
    if initial == "tensor":
        initial = f"torch.full({tuple(like.shape)}, 0.2).double()" if r.random() < 0.3 else "torch.tensor(0.2).double()"
    if initial == "None":
        first = r.choice(
            [
                "torch.zeros_like({x})",
                "torch.full_like({x}, 0.3)",
                "{x} * 0",
                "{x}.detach() * 0.5",
                "torch.zeros({x}.shape).double()",
                "{x}.new_zeros({x}.shape)",
                "torch.zeros({x}.shape[0], {n}, dtype={x}.dtype)",
            ]
        )
        text = f"if self.h is None:\n    self.h = {first.format(x=shaped, n=like.shape[-1])}"
    else:
        text = ""
    if declared:
        body.init.append(f'self.register_memory("h", {initial})')
    else:
        body.init.append(f"self.h = {initial}")
    if text:
        body.statements.append(text)
    scope.owner.h = torch.zeros_like(like) + 0.2
    scope.env["self.h"] = scope.owner.h
    # A state that starts as a number gets its shape from the first tensor that it is combined with.
    start = f"h0 = {shaped} + self.h" if initial != "None" or r.random() < 0.6 else "h0 = self.h * 1"
    if not scope.attempt(start, []):
        raise _Misfit
    scope.grow(r.choice([0, 1, 1, 2, 3]), modules)
    same = [n for n in scope.names if scope.value(n).shape == like.shape]
    following = r.choice(same[-3:])
    mix = r.choice(
        ["{h}", "0.5 * self.h + {h}", "self.h * 0.8 + 0.2 * {h}", "{h} - 0.1 * self.h", "{x}", "torch.tanh({h})"]
    )
    previous = r.random() < 0.25
    if previous:
        body.statements.append("before = self.h + 0.0")
    body.statements.append("self.h = " + mix.format(h=following, x=shaped))
    scope.env["self.h"] = scope.value(following) * 0.7
    scope.owner.h = scope.env["self.h"]
    scope.names.append("self.h")
    scope.grow(r.choice([0, 0, 1, 2]), modules)
    body.result = "self.h" if r.random() < 0.4 else r.choice(scope.names[-3:])
    if previous and initial == "None":
        body.result = "before"
    return body


class _Misfit(Exception):
    """The random choices so far cannot be completed to a model."""


def _output_structure(r: random.Random, names: list[str]) -> str:
    """A random pytree of outputs."""
    forms = [
        "{0}",
        "{0}",
        "{0}",
        "{0}",
        "{0}, {1}",
        '{{"a": {0}, "b": {1}}}',
        '{{"a": ({0}, {1}), "b": [{2}]}}',
        "[{0}, ({1},)]",
        "{0}, {0}",
        "{0}, x",
    ]
    last = [names[-1], *(r.choice(names) for _ in range(2))]
    return r.choice(forms).format(*last)


def _input_shapes(r: random.Random) -> list[tuple[int, ...]]:
    batch = r.choice([2, 3, 3, 4])
    shape: tuple[int, ...] = r.choice([(5,), (4,), (6,), (3, 4), (2, 6), (2, 4, 4), (1, 6, 6), (3, 4, 4)])
    shapes = [(batch, *shape)] if r.random() < 0.93 else [shape]
    while r.random() < 0.25 and len(shapes) < 3:
        other = r.choice([shapes[0], shapes[0], (batch, r.choice([3, 4])), (batch, 2, 4), (batch + 1, 4), (4,), ()])
        shapes.append(other)
    return shapes


def random_case(seed: int, size: int = 7) -> Case | None:
    """Generate the case of a seed, or None if the random choices cannot be completed to a model.

    Args:
        seed: any integer.
        size: approximate number of statements.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rng = torch.get_rng_state()
        try:
            torch.manual_seed(seed)
            with torch.enable_grad():
                return _random_case(random.Random(seed), seed, size)
        except _Misfit:
            return None
        finally:
            torch.set_rng_state(rng)


def _random_case(r: random.Random, seed: int, size: int) -> Case:
    empty = Case(seed, [Body("Model", "nn.Module", ["x"])], [(1,)], [False], 1)
    library = (
        IMPORTS + (_SPIKINGJELLY_IMPORTS if SPIKINGJELLY_NEURONS else "") + "\n".join([PREAMBLE, *HELPERS.values()])
    )
    namespace: dict[str, Any] = {}
    exec(library, namespace)
    shapes = _input_shapes(r)
    names = ["x", "y", "z"][: len(shapes)]
    invariant = [False] + [r.random() < 0.3 for _ in shapes[1:]]
    if r.random() < 0.05:
        invariant = [True for _ in shapes]
    values = {n: torch.rand(s, dtype=torch.float64) for n, s in zip(names, shapes, strict=True)}
    bodies: list[Body] = []
    modules: list[str] = []
    root = Body("Model", "nn.Module", names)
    scope = _Scope(r, namespace, root, values)
    for index in range(r.choice([0, 0, 1, 1, 2])):
        scope.grow(r.choice([0, 1, 2]), modules)
        x = scope.value(scope.pick())
        name = f"Part{index}"
        if x.dim() == 0:
            continue
        if r.random() < 0.75:
            body = _recurrent(r, namespace, name, x, modules)
        else:
            body = Body(name, "nn.Module", ["x"])
            inner = _Scope(r, namespace, body, {"x": x})
            inner.grow(r.choice([1, 2, 4]), modules)
            body.result = inner.names[-1]
        exec(str(body), namespace)
        bodies.append(body)
        modules.append(f"{name}()")
        same = [n for n in scope.names if scope.value(n).shape == x.shape]
        scope.attempt(f"w{index} = self.n{index}({r.choice(same)})", [f"self.n{index} = {name}()"])
        scope.layers.append((f"self.n{index}", x.shape))
    scope.grow(r.randint(1, size), modules)
    if len(scope.names) == len(names):
        raise _Misfit
    root.result = _output_structure(r, [n for n in scope.names if n not in names] or names)
    used = "\n".join(map(str, [root, *bodies]))
    kept = [b for b in bodies if re.search(rf"\b{b.name}\(\)", used)]
    return dataclasses.replace(
        empty, bodies=[*kept, root], shapes=shapes, invariant=invariant, T=r.choice([1, 2, 3, 4, 4, 5])
    )


def _pruned(case: Case) -> Iterator[Case]:
    """The case without statements whose names its output does not use."""
    smaller = case.copy()
    for body in reversed(smaller.bodies):
        text, kept = body.result, []
        for statement in reversed(body.statements):
            targets = set(re.findall(r"(?m)^\s*(\w+(?:, \*?\w+)*) [-+*]?= ", statement))
            names = {name.strip(" *") for group in targets for name in group.split(",")}
            if "self.h" in statement or any(re.search(rf"\b{name}\b", text) for name in names):
                kept.append(statement)
                text += "\n" + statement
        body.statements = kept[::-1]
        body.init = [
            line for line in body.init if re.split(r"[ (]", line)[0] in text or "self.h =" in line or '"h"' in line
        ]
    used = "\n".join(map(str, smaller.bodies))
    smaller.bodies = [b for b in smaller.bodies if b is smaller.root or f"{b.name}()" in used]
    if smaller.source() != case.source():
        yield smaller


def smaller_cases(case: Case) -> Iterator[Case]:
    """Cases that lack one statement, attribute, class, input, time step or part of the output; some may not run."""
    yield from _pruned(case)
    for b, body in enumerate(case.bodies):
        for name in re.findall(r"\bv\d+\w?\b|\bw\d\b|\bh0\b|\bself\.h\b", body.result):
            if body.result != name:
                smaller = case.copy()
                smaller.bodies[b].result = name
                yield smaller
        for i in reversed(range(len(body.statements))):
            statement = body.statements[i]
            smaller = case.copy()
            del smaller.bodies[b].statements[i]
            yield smaller
            target = re.match(r"(\w+)\b", statement)
            for operand in dict.fromkeys(re.findall(r"\b[vwh]\d+\w?\b|\b[xyz]\b|\bself\.h\b", statement)):
                if target is not None and operand != target[1]:
                    other = smaller.copy()
                    changed = other.bodies[b]
                    changed.statements = [re.sub(rf"\b{target[1]}\b", operand, s) for s in changed.statements]
                    changed.result = re.sub(rf"\b{target[1]}\b", operand, changed.result)
                    yield other
        for i in reversed(range(len(body.init))):
            smaller = case.copy()
            del smaller.bodies[b].init[i]
            yield smaller
    for b in range(len(case.bodies) - 1):
        smaller = case.copy()
        del smaller.bodies[b]
        yield smaller
    for i in range(1, len(case.shapes)):
        smaller = case.copy()
        del smaller.shapes[i], smaller.invariant[i], smaller.root.arguments[i]
        yield smaller
    for T in range(1, case.T):
        yield dataclasses.replace(case.copy(), T=T)

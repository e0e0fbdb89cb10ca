"""Break the net of a random model on purpose, and decide by stepping in float64 whether the break has an effect.

A break changes the source of the model that is converted, its modules, the inputs of the net, or the results of the
net. `effect_of` compares the model with the broken one without `snnfx.verify` and without a net.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fuzz_checks import Inapplicable, Setting, clone_of, stacked, state_of, step_plain
from fuzz_models import Body, Case
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import snnfx

__all__ = ["BREAKS", "Break", "BrokenNet", "Effect", "effect_of"]

_TOLERANCES = {"float64": (1e-9, 1e-9), "float32": (1e-5, 1e-4)}


@dataclass(frozen=True)
class Break:
    """One way to break a net.

    Args:
        description: the break, in words.
        case: the source of the model that is converted.
        change: changes the modules of the model that is converted.
        dropped: the time step of the inputs that is replaced by the step before it; 0: none.
        lost: the name of a buffer or state that the net does not write.
        stale: the name of a state that the net returns from the step before the last one.
    """

    description: str
    case: Case
    change: Callable[[nn.Module], None] = lambda model: None
    dropped: int = 0
    lost: str = ""
    stale: str = ""


class BrokenNet(nn.Module):
    """A net with wrong inputs or results.

    Args:
        net: the converted net.
        fault: the break.
        setting: how the net is run.
    """

    def __init__(self, net: snnfx.Net, fault: Break, setting: Setting) -> None:
        super().__init__()
        self.net, self.fault, self.setting, self.options = net, fault, setting, net.options

    def __deepcopy__(self, memo: dict[int, Any]) -> BrokenNet:
        return BrokenNet(copy.deepcopy(self.net, memo), self.fault, self.setting).train(self.training)

    @property
    def source(self) -> nn.Module:
        return self.net.source

    @property
    def first_attributes(self) -> Any:
        return self.net.first_attributes

    @property
    def program(self) -> Any:
        return self.net.program

    @property
    def regions(self) -> Any:
        return self.net.regions

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)[0]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        source, lost, stale = self.source, self.fault.lost, self.fault.stale
        before = {name: buffer.detach().clone() for name, buffer in source.named_buffers()}
        args = tuple(without_step(args, self.setting, self.fault.dropped))
        states_before: dict[str, Any] = {}
        if stale and "record" not in kwargs:
            fewer = [x if i else x[:-1] for x, i in zip(args, self.setting.invariant, strict=True)]
            shorter = {**kwargs, "T": self.setting.T - 1} if "T" in kwargs else kwargs
            states_before = copy.deepcopy(self.net).run(*fewer, **shorter)[1]
        outputs, states, *record = self.net.run(*args, **kwargs)
        states = dict(states)
        if stale in states_before:
            states[stale] = states_before[stale]
        if lost in before:
            owner, _, key = lost.rpartition(".")
            source.get_submodule(owner)._buffers[key] = before[lost]
        states.pop(lost, None)
        return (outputs, states, *record)


def without_step(sequences: Sequence[Any], s: Setting, dropped: int) -> Iterator[Any]:
    """The sequences with the step before a dropped one in its place."""
    for x, invariant in zip(sequences, s.invariant, strict=True):
        if invariant or not dropped:
            yield x
        else:
            yield x[[t - 1 if t == dropped else t for t in range(len(x))]]


# -- the kinds of breaks ------------------------------------------------------------------------------------------------


def _scaled_weight(case: Case, model: nn.Module, s: Setting, r: random.Random, factor: float) -> Break:
    names = [name for name, _ in model.named_parameters()]
    if not names:
        raise Inapplicable("the model has no parameters")
    name = r.choice(names)

    def change(wrong: nn.Module) -> None:
        with torch.no_grad():
            wrong.get_parameter(name).mul_(factor)

    return Break(f"`{name}` * {factor}", case, change)


def break_weight(case: Case, model: nn.Module, s: Setting, r: random.Random) -> Break:
    return _scaled_weight(case, model, s, r, 1.5)


def break_weight_slightly(case: Case, model: nn.Module, s: Setting, r: random.Random) -> Break:
    return _scaled_weight(case, model, s, r, 1.001)


def break_order(case: Case, model: nn.Module, s: Setting, r: random.Random) -> Break:
    """Swap a statement that writes the state, or changes a value in place, with the next one."""
    pairs = [
        (b, i)
        for b, body in enumerate(case.bodies)
        for i in range(len(body.statements) - 1)
        if "self.h" in body.statements[i] or "self.h" in body.statements[i + 1] or "_(" in body.statements[i]
    ]
    if not pairs:
        raise Inapplicable("the model has no order to swap")
    b, i = r.choice(pairs)
    wrong = case.copy()
    statements = wrong.bodies[b].statements
    statements[i], statements[i + 1] = statements[i + 1], statements[i]
    return Break(f"`{statements[i + 1]}` after `{statements[i]}`", wrong)


def _with_state(case: Case) -> list[int]:
    found = [b for b, body in enumerate(case.bodies) if any("self.h = " in line for line in body.statements)]
    if not found:
        raise Inapplicable("the model has no state of its own")
    return found


def break_late_state(case: Case, model: nn.Module, s: Setting, r: random.Random) -> Break:
    """Read the state of two steps before."""
    wrong = case.copy()
    body: Body = wrong.bodies[r.choice(_with_state(case))]
    initial = next(i for i, line in enumerate(body.init) if "self.h =" in line or '"h"' in line)
    body.init.insert(initial + 1, body.init[initial].replace('"h"', '"late"').replace("self.h", "self.late"))
    write = next(i for i, line in enumerate(body.statements) if re.match(r"self\.h = ", line))
    head = [line for line in body.statements[:write] if line.startswith("if self.h is None")]
    rest = body.statements[len(head) :]
    late = [line.replace("self.h", "self.late") for line in head]
    last = "self.late = h_before"
    read = [re.sub(r"self\.h\b(?! = )", "self.late", line) for line in rest[: write - len(head) + 1]]
    body.statements = [*head, *late, "h_before = self.h", *read, last, *rest[write - len(head) + 1 :]]
    return Break("the state is that of two steps before", wrong)


def break_first_state(case: Case, model: nn.Module, s: Setting, r: random.Random) -> Break:
    wrong = case.copy()
    body = wrong.bodies[r.choice(_with_state(case))]
    for lines in (body.statements, body.init):
        for i, line in enumerate(lines):
            if line.startswith("if self.h is None"):
                lines[i] = f"{line} + 0.25"
                return Break("the first state is 0.25 larger", wrong)
            match = re.match(r'(self\.register_memory\("h", |self\.h = )(.*?)(\)?)$', line)
            if lines is body.init and match and "None" not in line:
                lines[i] = f"{match[1]}0.25 + {match[2]}{match[3]}"
                return Break("the first state is 0.25 larger", wrong)
    raise Inapplicable("the first state has no value")


def break_layers(case: Case, model: nn.Module, s: Setting, r: random.Random) -> Break:
    """Swap two layers of the same module that have settings or weights of their own."""
    pairs = [
        (parent, a, b)
        for parent, module in model.named_modules()
        for a, first in module.named_children()
        for b, second in module.named_children()
        if a < b and first is not second and repr((first, *first.parameters())) != repr((second, *second.parameters()))
    ]
    if not pairs:
        raise Inapplicable("the model has no two layers to swap")
    parent, a, b = r.choice(pairs)

    def change(wrong: nn.Module) -> None:
        modules = wrong.get_submodule(parent)._modules
        modules[a], modules[b] = modules[b], modules[a]

    return Break(f"`{a}` and `{b}` of `{parent}` are swapped", case, change)


def break_time_step(case: Case, model: nn.Module, s: Setting, r: random.Random) -> Break:
    if s.T < 2 or all(s.invariant):
        raise Inapplicable("the inputs are the same at every step")
    step = r.randrange(1, s.T)
    return Break(f"step {step} is dropped", case, dropped=step)


def break_gradient(case: Case, model: nn.Module, s: Setting, r: random.Random) -> Break:
    """Detach the result of a statement from the autograd graph."""
    places = [
        (b, i, match[1])
        for b, body in enumerate(case.bodies)
        for i, line in enumerate(body.statements)
        if (match := re.match(r"(\w+|self\.h) = [^\n]*$", line))
    ]
    if not places:
        raise Inapplicable("the model has no statement to detach")
    b, i, name = r.choice(places)
    wrong = case.copy()
    wrong.bodies[b].statements.insert(i + 1, f"{name} = {name}.detach()")
    return Break(f"`{name}` is detached", wrong)


def break_backward(case: Case, model: nn.Module, s: Setting, r: random.Random) -> Break:
    """Keep the value of a statement and halve its gradient, as if a custom backward were lost."""
    wrong = break_gradient(case, model, s, r)
    for body in wrong.case.bodies:
        for i, line in enumerate(body.statements):
            if match := re.match(r"(\w+|self\.h) = \1\.detach\(\)$", line):
                name = match[1]
                body.statements[i] = f"{name} = {name}.detach() + ({name} - {name}.detach()) * 0.5"
    return Break(wrong.description.replace("is detached", "has half its gradient"), wrong.case)


def break_constant(case: Case, model: nn.Module, s: Setting, r: random.Random) -> Break:
    """Change a number in a statement."""
    places = [
        (b, i, match.span(), match[0])
        for b, body in enumerate(case.bodies)
        for i, line in enumerate(body.statements)
        for match in re.finditer(r"(?<![\w.])\d+\.\d+(?![\w.])", line)
    ]
    if not places:
        raise Inapplicable("the model has no number")
    b, i, (start, end), number = r.choice(places)
    wrong = case.copy()
    line = wrong.bodies[b].statements[i]
    wrong.bodies[b].statements[i] = f"{line[:start]}{float(number) * 1.25 + 0.125}{line[end:]}"
    return Break(f"another number in `{line}`", wrong)


def break_reads(case: Case, model: nn.Module, s: Setting, r: random.Random) -> Break:
    """Swap the first two values that a statement reads."""
    places = []
    for b, body in enumerate(case.bodies):
        names = {match[1] for line in body.statements if (match := re.match(r"(\w+|self\.h) = ", line))}
        for i, line in enumerate(body.statements):
            reads = [m for m in re.finditer(r"self\.h\b|(?<![\w.])\w+", line) if m[0] in names and m.start()]
            if len(reads) > 1 and reads[0][0] != reads[1][0]:
                places.append((b, i, reads[0], reads[1]))
    if not places:
        raise Inapplicable("no statement reads two values")
    b, i, first, second = r.choice(places)
    wrong = case.copy()
    line = wrong.bodies[b].statements[i]
    swapped = line[: first.start()] + second[0] + line[first.end() : second.start()] + first[0] + line[second.end() :]
    wrong.bodies[b].statements[i] = swapped
    return Break(f"`{swapped}` instead of `{line}`", wrong)


def break_buffer(case: Case, model: nn.Module, s: Setting, r: random.Random) -> Break:
    plain = clone_of(model, model.training)
    before = {name: buffer.clone() for name, buffer in plain.named_buffers()}
    with torch.no_grad():
        step_plain(plain, s, s.sequences())
    changed = [n for n, b in plain.named_buffers() if n not in before or not torch.equal(b, before[n])]
    if not changed:
        raise Inapplicable("the steps change no buffer")
    name = r.choice(changed)
    return Break(f"buffer `{name}` is not written", case, lost=name)


def break_attribute(case: Case, model: nn.Module, s: Setting, r: random.Random) -> Break:
    return Break("a state is not written", case, lost="*")


def break_final_state(case: Case, model: nn.Module, s: Setting, r: random.Random) -> Break:
    if s.T < 2:
        raise Inapplicable("there is one step only")
    return Break("a state is that of the step before", case, stale="*")


BREAKS: dict[str, Callable[[Case, nn.Module, Setting, random.Random], Break]] = {
    "weight": break_weight,
    "weight slightly": break_weight_slightly,
    "order": break_order,
    "late state": break_late_state,
    "first state": break_first_state,
    "final state": break_final_state,
    "layers": break_layers,
    "time step": break_time_step,
    "gradient": break_gradient,
    "backward": break_backward,
    "constant": break_constant,
    "reads": break_reads,
    "buffer": break_buffer,
    "attribute": break_attribute,
}
"""Functions `(case, model, setting, r) -> Break`; they raise `Inapplicable` for a model without such a place."""


def named(fault: Break, net: snnfx.Net, r: random.Random) -> Break:
    """Choose the state of the net that the break loses or leaves behind."""
    if "*" not in (fault.lost, fault.stale):
        return fault
    names = [slot.name for slot in net.program.slots]
    if not names or net.program.first_step is not None:
        raise Inapplicable("the net has no state")
    name = r.choice(names)
    replaced = dataclasses.replace(fault, description=fault.description.replace("a state", f"state `{name}`"))
    return dataclasses.replace(replaced, lost=fault.lost and name, stale=fault.stale and name)


# -- the effect ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effect:
    """The largest difference that a break causes, as a multiple of the difference that `verify` allows.

    Args:
        ratios: the multiple by dtype.
        name: the value that differs most.
    """

    ratios: dict[str, float]
    name: str


def effect_of(fault: Break, model: nn.Module, wrong: nn.Module, s: Setting, training: bool, slots: list[str]) -> Effect:
    """Step the model and the broken one in float64 and compare outputs, gradients, buffers and states.

    Args:
        fault: the break.
        model: the model.
        wrong: the model with the break.
        s: how to run them.
        training: the mode.
        slots: the names of the states that a net returns.
    """
    sequences = [x.float().double() for x in s.sequences()]
    expected = _values(model, s, sequences, training, slots)
    if fault.lost:
        return _effect_of_loss(fault.lost, model, s, sequences, training, expected)
    if fault.stale:
        fewer = dataclasses.replace(s, T=s.T - 1)
        before = _values(model, fewer, [x if i else x[:-1] for x, i in zip(sequences, s.invariant, strict=True)],
                         training, slots)  # fmt: skip
        name = f"state {fault.stale}"
        return _largest({name: before[name]} if name in before else {}, {name: expected.get(name)})
    return _largest(_values(wrong, s, list(without_step(sequences, s, fault.dropped)), training, slots), expected)


def _effect_of_loss(
    name: str, model: nn.Module, s: Setting, sequences: list[Tensor], training: bool, expected: dict[str, Any]
) -> Effect:
    """The effect of losing a buffer: its change; of losing a state: on the outputs of further steps without it."""
    plain, first = clone_of(model, training), clone_of(model, training)
    if name in dict(plain.named_buffers()):
        return _largest({f"buffer {name}": first.get_buffer(name)}, {f"buffer {name}": expected[f"buffer {name}"]})
    owner, _, key = name.rpartition(".")
    with torch.no_grad():
        step_plain(plain, s, sequences)
        other = copy.deepcopy(plain)
        try:
            setattr(other.get_submodule(owner), key, getattr(first.get_submodule(owner), key))
        except AttributeError as error:
            raise Inapplicable(f"state `{name}` is no attribute") from error
        a, b = (stacked(step_plain(m, s, sequences)) for m in (plain, other))
    return _largest(_named_leaves("output", b), _named_leaves("output", a))


def _values(model: nn.Module, s: Setting, sequences: list[Tensor], training: bool, slots: list[str]) -> dict[str, Any]:
    plain = clone_of(model, training)
    given = [x.detach().clone().requires_grad_() for x in sequences]
    outputs = stacked(step_plain(plain, s, given))
    values = _named_leaves("output", outputs)
    total: Any = 0.0
    for name, y in values.items():
        if y.requires_grad:
            weights = torch.randn(
                y.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())), dtype=y.dtype
            )
            total = total + (y * weights).sum()
    wanted = {f"input {i}": x for i, x in enumerate(given)} | dict(plain.named_parameters())
    try:
        found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True) if total else [None] * len(wanted)
    except RuntimeError as error:
        raise Inapplicable(str(error)) from error
    for name, gradient in zip(wanted, found, strict=True):
        values[f"gradient {name}"] = 0.0 if gradient is None else gradient
    values |= {f"buffer {name}": buffer for name, buffer in plain.named_buffers()}
    for name in slots:
        try:
            values[f"state {name}"] = state_of(plain, [name])[name]
        except (AttributeError, KeyError, TypeError):  # a state under another name
            continue
    return {name: torch.as_tensor(x).detach() for name, x in values.items() if isinstance(x, Tensor | float | int)}


def _named_leaves(prefix: str, value: Any) -> dict[str, Any]:
    return {f"{prefix} {i}": leaf for i, leaf in enumerate(pytree.tree_leaves(value))}


def _largest(actual: dict[str, Any], expected: dict[str, Any]) -> Effect:
    gradients = [float(x.abs().max()) for name, x in expected.items() if name.startswith("gradient") and x.numel()]
    ratios, worst = dict.fromkeys(_TOLERANCES, 0.0), ""
    for name, value in expected.items():
        other = actual.get(name)
        if value is None or other is None:
            continue
        if value.shape != other.shape and value.dim() and other.dim():
            return Effect(dict.fromkeys(_TOLERANCES, float("inf")), name)
        if not value.numel():
            continue
        a, b = torch.broadcast_tensors(other.detach().double(), value.detach().double())
        if not (bool(a.isfinite().all()) and bool(b.isfinite().all())):
            raise Inapplicable("the values are not finite")
        difference, scale = float((a - b).abs().max()), float(b.abs().max())
        if name.startswith("gradient"):
            scale = max(scale, 1e-2 * max(gradients))
        found = {dtype: difference / (atol + rtol * scale) for dtype, (atol, rtol) in _TOLERANCES.items()}
        if found["float64"] > ratios["float64"]:
            worst = name
        ratios = {dtype: max(ratio, found[dtype]) for dtype, ratio in ratios.items()}
    return Effect(ratios, worst)

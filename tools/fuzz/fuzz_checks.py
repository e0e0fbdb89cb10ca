"""Checks that a converted net matches its model; the reference is a Python loop that steps the model.

`check_model` runs one check, by name, on a fresh copy of a model. It raises `Refused` if snnfx refuses the model and
`Mismatch` if a result differs; any other exception is a crash. Reproducer scripts contain a copy of this file.
"""

from __future__ import annotations

import collections
import copy
import functools
import pickle
import random
import threading
import unittest.mock
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import snnfx
from snnfx.emit.recompute_segments import RecomputePlan
from snnfx.functional import reset_net
from snnfx.memory import training_planner as planner
from snnfx.memory.checkpoint_option import plan_checkpoint
from snnfx.memory.memory_model import NotPredictable
from snnfx.regions import normed_loop

CHECKS = "train eval fold checkpoint split chunk single batch effects again passes time_dim carry record invariant_off one_step changed replaced threads calls modes".split()
"""Names of the checks. The first three compare outputs, gradients and state; the others are metamorphic relations."""

REGIONS_SEEN: collections.Counter[str] = collections.Counter()
"""Number of regions by kind, which `fuzz.py` prints as coverage."""


class Mismatch(AssertionError):
    """The net and the model differ."""


class Refused(Exception):
    """snnfx refused the model with this code."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Inapplicable(Exception):
    """The check does not apply, e.g. because stepping the model fails as well."""


@dataclass(frozen=True)
class Setting:
    """How to run a model.

    Args:
        shapes: the shape of one step of each input.
        invariant: for each input, whether it is the same at every step.
        T: number of time steps.
        seed: for the inputs.
        examples: whether to convert with example inputs.
        random: whether the model draws random numbers in training.
        lower: whether to generate kernels, which take most of a second each to build.
    """

    shapes: tuple[tuple[int, ...], ...]
    invariant: tuple[bool, ...]
    T: int
    seed: int = 0
    examples: bool = True
    random: bool = False
    lower: bool = False

    def sequences(self, seed: int = 0, larger_batch: bool = False) -> list[Tensor]:
        g = torch.Generator().manual_seed(self.seed * 7 + seed)
        shapes = [(s[0] + 1, *s[1:]) if larger_batch and s else s for s in self.shapes]
        full = [s if i else (self.T, *s) for s, i in zip(shapes, self.invariant, strict=True)]
        return [torch.rand(s, generator=g, dtype=torch.float64) * 2 - 0.4 for s in full]

    def step(self, sequences: Sequence[Tensor], t: int) -> tuple[Tensor, ...]:
        return tuple(x if i else x[t] for x, i in zip(sequences, self.invariant, strict=True))

    def part(self, sequences: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
        return [x if i else x[start:stop] for x, i in zip(sequences, self.invariant, strict=True)]

    @property
    def extra(self) -> dict[str, Any]:
        return {"T": self.T} if all(self.invariant) else {}


def to_net(model: nn.Module, s: Setting, **options: Any) -> Any:
    if s.examples:
        options["example_inputs"] = s.step(s.sequences(), 0)
    options.setdefault("lower", "auto" if s.lower else None)
    if any(s.invariant):
        options.setdefault("time_dim", tuple(None if i else 0 for i in s.invariant))
    try:
        net = snnfx.convert(model, **options)
    except snnfx.errors.CaptureError as error:
        raise Refused(error.code, str(error)) from error
    REGIONS_SEEN.update(region.kind for region in net.regions)
    if net.program.first_step is not None:
        REGIONS_SEEN["first step of its own"] += 1
    return net


_CACHE: weakref.WeakKeyDictionary[nn.Module, dict[Any, Any]] = weakref.WeakKeyDictionary()
"""Cache of the nets and the reference results that the checks of a model share."""


def cache_of(model: nn.Module) -> dict[Any, Any]:
    return _CACHE.setdefault(model, {})


def shared_net(model: nn.Module, s: Setting, training: bool, batch_norm: str = "fold") -> Any:
    """The net of a clone of the model, converted once for all checks, with its buffers reset to the model's."""
    key = ("net", s.examples, batch_norm)
    if key not in cache_of(model):
        cache_of(model)[key] = to_net(clone_of(model, bool(s.seed % 2)), s, batch_norm=batch_norm)
    net = cache_of(model)[key].train(training)
    for name, buffer in net.source.named_buffers():
        buffer.copy_(model.get_buffer(name))
    return net


def with_options(net: Any, **options: Any) -> Any:
    """The same programs with other options, which no pass may depend on."""
    return snnfx.Net(net.source, net.programs, replace(net.options, **options), net.history, net._replan)


def step_plain(model: nn.Module, s: Setting, sequences: Sequence[Tensor]) -> list[Any]:
    try:
        return [model(*s.step(sequences, t)) for t in range(s.T)]
    except Exception as error:  # a random model may raise anything
        raise Inapplicable(f"{type(error).__name__}: {error}") from error


def stacked(steps: list[Any]) -> Any:
    flat = [pytree.tree_flatten(y) for y in steps]
    if any(spec != flat[0][1] for _, spec in flat):
        raise Inapplicable("the structure of the outputs changes over time")
    leaves = list(zip(*(leaves for leaves, _ in flat), strict=True))
    for y in leaves:
        if any(not isinstance(v, Tensor) or v.shape != y[0].shape for v in y):
            raise Inapplicable("the shape of an output changes over time")
    return pytree.tree_unflatten([torch.stack(y) for y in leaves], flat[0][1])


def same(what: str, actual: Any, expected: Any) -> None:
    """Raise `Mismatch` unless two pytrees of tensors and numbers are equal."""
    a, spec_a = pytree.tree_flatten(actual, is_leaf=lambda v: v is None)
    b, spec_b = pytree.tree_flatten(expected, is_leaf=lambda v: v is None)
    if spec_a != spec_b:
        raise Mismatch(f"{what}: structure {spec_a}, expected {spec_b}")
    for index, (x, y) in enumerate(zip(a, b, strict=True)):
        if x is None or y is None:
            if not (x is None or not x.any()) or not (y is None or not y.any()):
                raise Mismatch(
                    f"{what}[{index}]: " + ("None, expected a value" if x is None else "a value, expected None")
                )
            continue
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape != y.shape:
            raise Mismatch(f"{what}[{index}]: shape {list(x.shape)}, expected {list(y.shape)}")
        x, y = torch.as_tensor(x), torch.as_tensor(y)
        if x.dtype != y.dtype and x.dim() and y.dim():
            raise Mismatch(f"{what}[{index}]: {x.dtype}, expected {y.dtype}")
        if x.shape != y.shape:
            y = y.expand(x.shape) if y.dim() == 0 else y
        x, y = x.detach().double(), y.detach().double()
        if not torch.allclose(x, y, rtol=1e-7, atol=1e-8, equal_nan=True):
            raise Mismatch(f"{what}[{index}]: differs by {float((x - y).abs().max()):.3g}")


def gradients(model: nn.Module, outputs: Any, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    wanted = [*inputs, *model.parameters()]
    leaves = [y for y in pytree.tree_leaves(outputs) if isinstance(y, Tensor)]
    g = torch.Generator().manual_seed(5)
    total: Any = sum((y * torch.rand(y.shape, generator=g, dtype=torch.float64)).sum() for y in leaves)
    if not any(y.requires_grad for y in leaves):
        return [None] * len(wanted)
    return list(torch.autograd.grad(total, wanted, allow_unused=True))


def state_of(model: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        value: Any = model
        for part in name.split("."):
            value = value[part] if isinstance(value, dict) else getattr(value, part)
        found[name] = value
    return found


def clone_of(model: nn.Module, training: bool) -> nn.Module:
    model = copy.deepcopy(model).train(training)
    reset_net(model)
    return model


def compare_everything(model: nn.Module, s: Setting, training: bool, **options: Any) -> None:
    """Compare outputs, gradients, buffers and final state with stepping the model."""
    plain = clone_of(model, training)
    given = [x.requires_grad_() for x in s.sequences()]
    expected = stacked(step_plain(plain, s, given))
    try:
        expected_gradients = gradients(plain, expected, given)
    except RuntimeError as error:
        raise Inapplicable(str(error)) from error
    net = shared_net(model, s, training, **options)
    sequences = [x.requires_grad_() for x in s.sequences()]
    outputs, state = net.run(*sequences, **s.extra)
    if s.random and training:
        same("shapes", pytree.tree_map(torch.zeros_like, outputs), pytree.tree_map(torch.zeros_like, expected))
        return
    same("outputs", outputs, expected)
    same("gradients", gradients(net.source, outputs, sequences), expected_gradients)
    same("state", state, state_of(plain, list(state)))
    names = [n for n, _ in plain.named_buffers() if n not in state]
    same("buffers", [net.source.get_buffer(n) for n in names], [plain.get_buffer(n) for n in names])
    net = shared_net(model, s, training, **options)
    same("outputs of a call", net(*s.sequences(), **s.extra), expected)


def check_train(model: nn.Module, s: Setting) -> None:
    compare_everything(model, s, training=True, batch_norm="per_step")


def check_eval(model: nn.Module, s: Setting) -> None:
    compare_everything(model, s, training=False, batch_norm="fold")


def check_fold(model: nn.Module, s: Setting) -> None:
    """Compare with the layer-by-layer oracle, with BatchNorm statistics over T*N."""
    step_plain(clone_of(model, True), s, s.sequences())
    net = shared_net(model, s, True)
    try:
        snnfx.verify(net.source, net, *s.sequences(), **s.extra)
    except snnfx.errors.VerificationError as error:
        if error.code != "SNNFX405":
            raise Mismatch(str(error)) from error


def check_checkpoint(model: nn.Module, s: Setting) -> None:
    """Recomputation in the backward pass changes nothing, for any plan and any tile size."""
    r = random.Random(s.seed)
    training, batch_norm = r.random() < 0.7, r.choice(("fold", "per_step"))
    net = shared_net(model, s, training, batch_norm)
    buffers = [b.clone() for b in net.source.buffers()]

    def run(net: Any) -> list[Any]:
        for buffer, before in zip(net.source.buffers(), buffers, strict=True):
            buffer.copy_(before)
        torch.manual_seed(s.seed)
        given = [x.requires_grad_() for x in s.sequences()]
        outputs, state = net.run(*given, **s.extra)
        found = gradients(net.source, (outputs, list(state.values())), given)
        return [outputs, state, found, [b.clone() for b in net.source.buffers()]]

    try:
        expected = run(with_options(net, checkpoint=None))
    except RuntimeError as error:
        raise Inapplicable(str(error)) from error
    for option in ("selective", "regions", "any"):
        other = with_options(net, checkpoint="regions" if option == "any" else option)
        plan = functools.partial(any_plan, other, r)
        own = other._execution.plans._make_recompute_plan
        with (
            unittest.mock.patch.object(planner, "SLICE", r.choice((2**23, 4096, 256, 1))),
            unittest.mock.patch.object(
                other._execution.plans, "_make_recompute_plan", plan if option == "any" else own
            ),
        ):
            found = run(other)
        what = f"{batch_norm}, checkpoint={option}"
        for name, a, b in zip(("outputs", "state", "gradients", "buffers"), found, expected, strict=True):
            same(f"{name} with {what}", a, b)


def any_plan(net: Any, r: random.Random, T: int, leaves: Sequence[Tensor], state: Any) -> RecomputePlan:
    """A plan with a random level for each tile."""
    try:
        plans = planner.TrainingPlanner(net._executable, T, leaves, state)
    except NotPredictable:
        return plan_checkpoint(net._executable, "regions", T, leaves, state)
    return plans.plan({name: r.choice(plans.levels_of(name)) for name in plans.names})


def reference(model: nn.Module, s: Setting, **more: Any) -> tuple[Any, nn.Module]:
    """The outputs of stepping a copy of the model in evaluation mode, and the copy."""
    key = ("reference", *more)
    if key not in cache_of(model):
        plain = clone_of(model, False)
        with torch.no_grad():
            cache_of(model)[key] = stacked(step_plain(plain, s, s.sequences(**more))), plain
    expected, plain = cache_of(model)[key]
    return expected, plain


def check_split(model: nn.Module, s: Setting) -> None:
    expected, plain = reference(model, s)
    net = shared_net(model, s, False)
    parts, state = [], None
    for start, stop in ((0, 1), (1, max(2, s.T - 1)), (max(2, s.T - 1), s.T)):
        if start < stop <= s.T:
            extra = {"T": stop - start} if s.extra else {}
            y, state = net.run(*s.part(s.sequences(), start, stop), state=state, **extra)
            parts.append(y)
    same("pieces", pytree.tree_map(lambda *y: torch.cat(y), *parts), expected)
    same("state after pieces", state, state_of(plain, list(state or ())))


def check_chunk(model: nn.Module, s: Setting) -> None:
    expected, _ = reference(model, s)
    for chunk in (1, 2):
        with torch.no_grad():
            net = with_options(shared_net(model, s, False), chunk=chunk)
            same(f"chunk={chunk}", net(*s.sequences(), **s.extra), expected)


def check_single(model: nn.Module, s: Setting) -> None:
    expected, _ = reference(model, s)
    fresh = s.seed % 4 == 0
    net = to_net(clone_of(model, False), s, step_mode="s") if fresh else shared_net(model, s, False).convert_to("s")
    same("single steps", stacked([net(*s.step(s.sequences(), t)) for t in range(s.T)]), expected)


def check_batch(model: nn.Module, s: Setting) -> None:
    """A batch larger than the example's gives the right result, or SNNFX312."""
    expected, _ = reference(model, s, larger_batch=True)
    net = shared_net(model, s, False)
    try:
        outputs = net(*s.sequences(larger_batch=True), **s.extra)
    except snnfx.errors.InputError as error:
        if error.code != "SNNFX312":
            raise
        return
    same("larger batch", outputs, expected)


def snapshot(model: nn.Module) -> list[Any]:
    found: list[Any] = [torch.get_rng_state().clone(), torch.is_grad_enabled(), torch.get_default_dtype()]
    for module in model.modules():
        attributes = {k: v for k, v in module.__dict__.items() if k not in ("_buffers", "_parameters", "_modules")}
        found.append([sorted(attributes), list(module._modules), list(module._parameters), module.training])
        tensors = [v for v in pytree.tree_leaves(attributes) if isinstance(v, Tensor)]
        found.append([v.detach().clone() for v in (*tensors, *module.parameters(), *module.buffers())])
        found.append([repr(v) for v in pytree.tree_leaves(attributes) if isinstance(v, bool | int | float | str)])
    return found


def unchanged(what: str, before: list[Any], after: list[Any]) -> None:
    flat_a, spec_a = pytree.tree_flatten(before)
    flat_b, spec_b = pytree.tree_flatten(after)
    equal = spec_a == spec_b and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(flat_a, flat_b, strict=True)
    )
    if not equal:
        raise Mismatch(f"{what} changes the model")


def check_effects(model: nn.Module, s: Setting) -> None:
    reference(model, s)
    shared = clone_of(model, False)
    before = snapshot(shared)
    net = to_net(shared, s)
    unchanged("convert", before, snapshot(shared))
    net(*s.sequences(), **s.extra)
    net.run(*s.sequences(), **s.extra)
    unchanged("a call", before, snapshot(shared))
    same("a second call", net(*s.sequences(), **s.extra), net(*s.sequences(), **s.extra))


def plan_of(net: Any) -> list[Any]:
    return [(r.kind, [n.name for n in r.nodes], r.slots) for r in net.regions]


def check_again(model: nn.Module, s: Setting) -> None:
    expected, _ = reference(model, s)
    net = shared_net(model, s, False)
    other, shared = to_net(clone_of(model, False), s), net.source
    if plan_of(net) != plan_of(other) or snnfx.convert(net) is not net:
        raise Mismatch("a second conversion gives different regions")
    others = [copy.deepcopy(net)]
    try:
        pickle.dumps(shared)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError):
        pass
    else:
        others.append(pickle.loads(pickle.dumps(net)))
    for clone in others:
        if plan_of(clone) != plan_of(net):
            raise Mismatch("a copy has different regions")
        same("a copy", clone(*s.sequences(), **s.extra), expected)


def check_passes(model: nn.Module, s: Setting) -> None:
    """Different legal orders of the passes give the same outputs."""
    from snnfx.capture.capture import capture
    from snnfx.convert import _convert_for_shapes, pipeline
    from snnfx.ir.pass_manager import PassManager

    expected, _ = reference(model, s)
    net = shared_net(model, s, False)
    shared = net.source
    example = s.step(s.sequences(), 0) if s.examples else None
    captured = capture(shared, example, training=False)
    for order in ((0, 0, 1, 1, 2), (0, 2), (0, 1, 0, 1, 2, 2)):
        program = captured.copy()
        passes = [p for p in pipeline(program, net.options) if p.name in ("normalize", "remove_dead_code", "partition")]
        PassManager([passes[i] for i in order]).run(program)
        net = snnfx.Net(shared, {True: program, False: program}, net.options, (), _convert_for_shapes)
        same(f"passes {order}", net.run(*s.sequences(), **s.extra)[0], expected)


def check_time_dim(model: nn.Module, s: Setting) -> None:
    expected, _ = reference(model, s)
    if (
        any(s.invariant)
        or any(not shape for shape in s.shapes)
        or any(y.dim() < 2 for y in pytree.tree_leaves(expected))
    ):
        raise Inapplicable("time cannot be moved to dim 1")
    net = to_net(clone_of(model, False), s, time_dim=1)
    moved = [x.movedim(0, 1) for x in s.sequences()]
    same("time in dim 1", pytree.tree_map(lambda y: y.movedim(1, 0), net(*moved)), expected)


def check_carry(model: nn.Module, s: Setting) -> None:
    expected, _ = reference(model, s)
    if s.T < 2 or s.extra:
        raise Inapplicable("the check needs two or more steps and an input that varies")
    net = with_options(shared_net(model, s, False), carry_state=True)
    for _ in range(2):
        parts = [net(*s.part(s.sequences(), 0, 1)), net(*s.part(s.sequences(), 1, s.T))]
        same("carried state", pytree.tree_map(lambda *y: torch.cat(y), *parts), expected)
        reset_net(net)


def check_record(model: nn.Module, s: Setting) -> None:
    plain = clone_of(model, False)
    net = shared_net(model, s, False)
    names = [slot.name for slot in net.program.slots]
    if not names or net.program.first_step is not None:
        raise Inapplicable("there is no state to record")
    values = []
    for t in range(s.T):
        try:
            plain(*s.step(s.sequences(), t))
        except Exception as error:
            raise Inapplicable(str(error)) from error
        values.append({n: torch.as_tensor(v).clone() for n, v in state_of(plain, names).items()})
    _, _, records = net.run(*s.sequences(), record=tuple(names), **s.extra)
    for name in names:
        same(f"record of {name}", list(records[name].unbind()), [v[name] for v in values])


def check_invariant_off(model: nn.Module, s: Setting) -> None:
    """Passing time-invariant inputs as sequences, without hoisting, gives the same outputs."""
    if not any(s.invariant):
        raise Inapplicable("every input varies over time")
    expected, _ = reference(model, s)
    sequences = [x.expand(s.T, *x.shape) if i else x for x, i in zip(s.sequences(), s.invariant, strict=True)]
    net = to_net(clone_of(model, False), s, time_dim=0)
    same("without hoisting", net(*sequences), expected)


def check_one_step(model: nn.Module, s: Setting) -> None:
    """A net in training on a sequence of one step equals one call of the model, also with BatchNorm folded."""
    if s.random:
        raise Inapplicable("the model draws random numbers")
    s = replace(s, T=1)
    plain = clone_of(model, True)
    expected = stacked(step_plain(plain, s, s.sequences()))
    net = shared_net(model, s, True)
    same("one step", net(*s.sequences(), **s.extra), expected)
    same("buffers after one step", list(net.source.buffers()), list(plain.buffers()))


def check_changed(model: nn.Module, s: Setting) -> None:
    """A net notices settings of the model that changed after conversion."""
    net = to_net(clone_of(model, False), s)
    net(*s.sequences(), **s.extra)
    settings = [m.config for m in net.source.modules() if hasattr(m, "config")]
    if not settings:
        raise Inapplicable("the model has no settings")
    for config in settings:
        config.gain, config.gains[65] = 0.3, -0.2
    plain = clone_of(net.source, False)
    expected = stacked(step_plain(plain, s, s.sequences()))
    same("changed settings", net(*s.sequences(), **s.extra), expected)
    same("a copy after the change", copy.deepcopy(net)(*s.sequences(), **s.extra), expected)


def check_replaced(model: nn.Module, s: Setting) -> None:
    """A net notices layers that were replaced after conversion."""
    net = to_net(clone_of(model, False), s)
    net(*s.sequences(), **s.extra)
    layers = [(m, n) for m in net.source.modules() for n, c in m.named_children() if type(c) is nn.Linear]
    if not layers:
        raise Inapplicable("the model has no linear layer")
    for parent, name in layers:
        old = getattr(parent, name)
        new = nn.Linear(old.in_features, old.out_features, old.bias is not None).to(old.weight)
        setattr(parent, name, new)
    expected = stacked(step_plain(clone_of(net.source, False), s, s.sequences()))
    same("replaced layers", net(*s.sequences(), **s.extra), expected)


def check_threads(model: nn.Module, s: Setting) -> None:
    """Several threads convert and call; other threads see neither proxies nor changed results."""
    expected, _ = reference(model, s)
    errors: list[Exception] = []

    def work(index: int) -> None:
        try:
            net = to_net(clone_of(model, False), s) if index else shared_net(model, s, False)
            for _ in range(2):
                same(f"outputs in thread {index}", net(*s.sequences(), **s.extra), expected)
                if type(torch.rand(2)) is not Tensor:
                    raise Mismatch(f"thread {index} sees a proxy")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def check_calls(model: nn.Module, s: Setting) -> None:
    """Many calls of one net with kernels, between changes of model and inputs, equal a reference at each call.

    From the third call of a kind on, a net binds its calls. The reference steps a copy of the model; where BatchNorm uses
    the statistics of all steps, it is an unbound call of a net without kernels.
    """
    if s.random:
        raise Inapplicable("the model draws random numbers")
    r = random.Random(s.seed % 10**8)  # other numbers for the same model, see `fuzz.py`, keep the changes
    folds = r.random() < 0.7 and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    reference = clone_of(model, True)
    net = to_net(clone_of(model, True), s, lower="auto", batch_norm="fold" if folds else "per_step")
    unbound = to_net(reference, s) if folds else None
    layout, grad, record = "plain", True, ["start"]
    with unittest.mock.patch.dict(normed_loop.LEAST_ELEMENTS, {"row-major": 0, "channels-last": 0}):
        for number in range(8):
            if number:
                record.append(r.choice(CHANGES))
            if record[-1] == "layout":
                layout = r.choice(LAYOUTS)
            elif record[-1] == "steps":
                s = replace(s, T=r.choice((1, 2, 4)))
            elif record[-1] == "no_grad":
                grad = not grad
            elif record[-1] == "copy":
                net = copy.deepcopy(net)
            else:
                seed = r.randrange(2**31)
                for changed in (net.source, reference):
                    change_model(changed, record[-1], random.Random(seed))
            for _ in range(r.choice((1, 4, 4))):
                compare_call(net, reference, unbound, s, (layout, grad), f"{record}, {layout}, T={s.T}")


def check_modes(model: nn.Module, s: Setting) -> None:
    """A net in evaluation mode follows the modes of single layers, whether their results are read or not."""
    r = random.Random(s.seed % 10**8)
    source = clone_of(model, False)
    layers = [name for name, module in source.named_modules() if isinstance(module, NORMS)]
    if not layers:
        raise Inapplicable("the model has no layer with running statistics")
    net = None
    for number in range(3):
        for name in layers:
            source.get_submodule(name).train(r.random() < 0.5)
        plain = clone_of(model, False)
        for name in layers:
            plain.get_submodule(name).load_state_dict(source.get_submodule(name).state_dict())
            plain.get_submodule(name).train(source.get_submodule(name).training)
        expected = stacked(step_plain(plain, s, [x.requires_grad_() for x in s.sequences()]))
        net = to_net(source, s, batch_norm="per_step") if net is None else net
        same(f"outputs of call {number}", net(*s.sequences(), **s.extra), expected)
        for name in layers:
            statistics = (list(m.get_submodule(name).buffers()) for m in (source, plain))
            same(f"buffers of {name} after call {number}", *statistics)


NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)

CHANGES = "mode mode freeze requires_grad layout layout steps no_grad copy settings parameter load hook unhook".split()
LAYOUTS = "plain channels_last every_second batch_first repeated".split()


def change_model(model: nn.Module, change: str, r: random.Random) -> None:
    """Change a model as its user may between two calls."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    layers = [m for m in model.modules() if type(m).__module__.startswith("torch.nn.modules.") and not [*m.children()]]
    parameters = [(m, n, p) for m in model.modules() for n, p in m._parameters.items() if p is not None]
    if change == "mode":
        model.train(r.random() < 0.6)
    elif change == "freeze" and norms:
        r.choice(norms).train(model.training and r.random() < 0.5)
    elif change == "requires_grad" and parameters:
        r.choice(parameters)[2].requires_grad_(r.random() < 0.5)
    elif change == "settings" and norms:
        setattr(r.choice(norms), *r.choice((("eps", 0.3), ("momentum", 0.9), ("momentum", None), ("momentum", 0.0))))
    elif change == "parameter" and parameters:
        owner, name, parameter = r.choice(parameters)
        owner._parameters[name] = nn.Parameter(parameter.detach() * 1.1)
    elif change == "load":
        state = {n: v + 0.1 if v.is_floating_point() else v.clone() for n, v in model.state_dict().items()}
        model.load_state_dict(state, assign=r.random() < 0.5)
    elif change == "hook" and layers:
        r.choice(layers).register_forward_hook(scale_output)
    elif change == "unhook":
        for layer in layers:
            layer._forward_hooks.clear()


def scale_output(module: nn.Module, args: Any, y: Any) -> Any:
    return y * 1.5 if isinstance(y, Tensor) else y


def laid_out(x: Tensor, layout: str) -> Tensor:
    """A sequence with the same values in another memory layout."""
    if layout == "channels_last" and x.dim() == 5:
        return x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])
    if layout == "every_second":
        twice = laid_out(x.repeat_interleave(2, 0), "channels_last")
        return twice[::2]
    if layout == "batch_first" and x.dim() > 1:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "repeated":
        return laid_out(x[:1], "channels_last").expand_as(x)
    return x


def compare_call(net: Any, reference: nn.Module, unbound: Any, s: Setting, how: tuple[str, bool], what: str) -> None:
    """Compare one call, its gradients, computed twice, and the buffers, which the reference keeps."""
    layout, grad = how
    given = [x if i else laid_out(x, layout) for x, i in zip(s.sequences(), s.invariant, strict=True)]
    plain = reference if unbound is not None else copy.deepcopy(reference)
    if layout != "plain":
        step_plain(copy.deepcopy(reference), s, given)  # `view` of a step may need another layout
    with torch.set_grad_enabled(grad):
        inputs = [x.clone(memory_format=torch.contiguous_format).requires_grad_(grad) for x in given]
        expected = stacked(step_plain(plain, s, inputs)) if unbound is None else unbound.run(*inputs, **s.extra)[0]
        wanted = grads_of_call(expected, [*inputs, *parameters_by_name(plain)], twice=False)
        inputs = [x.detach().requires_grad_(grad) for x in given]
        outputs = net(*inputs, **s.extra)
        found = grads_of_call(outputs, [*inputs, *parameters_by_name(net.source)], twice=True)
    REGIONS_SEEN["norms in kernels"] += sum(
        len(getattr(m, "norms_in_kernel", ())) for m in net.region_modules().values()
    )
    same(f"outputs after {what}", outputs, expected)
    same(f"gradients after {what}", found, wanted)
    names = [n for n, _ in plain.named_buffers()]
    same(f"buffers after {what}", [net.source.get_buffer(n) for n in names], [plain.get_buffer(n) for n in names])
    with torch.no_grad():
        for name, buffer in reference.named_buffers():
            if buffer.shape != plain.get_buffer(name).shape:
                raise Inapplicable(f"the buffer {name} changes its shape")
            buffer.copy_(plain.get_buffer(name))


def parameters_by_name(model: nn.Module) -> list[Tensor]:
    return [p for _, p in sorted(model.named_parameters())]


def grads_of_call(outputs: Any, wanted: Sequence[Tensor], twice: bool) -> list[Tensor | None]:
    """The gradients of a weighted sum; with `twice`, two backward passes through one graph must give the same ones."""
    leaves = [y for y in pytree.tree_leaves(outputs) if isinstance(y, Tensor)]
    g = torch.Generator().manual_seed(5)
    total: Any = sum((y * torch.rand(y.shape, generator=g, dtype=torch.float64)).sum() for y in leaves)
    differentiated = [w for w in wanted if w.requires_grad]
    if not isinstance(total, Tensor) or not total.requires_grad or not differentiated:
        return [None] * len(differentiated)
    try:
        found = torch.autograd.grad(total, differentiated, allow_unused=True, retain_graph=True)
    except RuntimeError as error:
        if twice:
            raise
        raise Inapplicable(str(error)) from error
    if twice:
        kept = [None if v is None else v.clone() for v in found]
        same("a second backward pass", list(torch.autograd.grad(total, differentiated, allow_unused=True)), kept)
    return list(found)


def check_model(model: nn.Module, setting: Setting, check: str) -> None:
    """Run one check by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(setting.seed)
        globals()[f"check_{check}"](model, setting)

"""Oracles of the online rules: plain loops over the user's model, in float64.

Nothing of `snnfx` is used here. A model is any single-step module whose neurons keep their state in attributes (or in a
`_memories` dict, as the neuron libraries do); a rule is what happens between its calls. Every function works on a copy
of the model, from the state that the model is in, and leaves the model alone. Rules written out without modules are in
`online_equations.py`.

| oracle | rule | source |
|---|---|---|
| `bptt`, `truncated_bptt` | the state cut never, or every K steps | Williams & Peng 1990 |
| `rtrl` | forward mode: tangents of the state carried along | Williams & Zipser 1989 |
| `ostl` | forward mode in each layer, backward from layer to layer in one step | Bohnstingl et al. 2022 |
| `sltt` | the state cut at every step | Meng et al. 2023, arXiv 2302.14311 |
| `ottt` | the same, with traces of the operands of the weights | Xiao et al. 2022, arXiv 2210.04195 |
| `fptt` | a regulariser towards a running average, updated at each step | Kag & Saligrama 2021; Yin et al. 2023 |
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class TriangleSpike(torch.autograd.Function):
    """Heaviside step whose derivative, in backward and in forward mode, is a triangle of width 2."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return (x >= 0).to(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (1 - x.abs()).clamp(min=0)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return tangent * (1 - x.abs()).clamp(min=0)


def triangle(x: Tensor) -> Tensor:
    """The derivative of `TriangleSpike`, for rules that are written out by hand."""
    return (1 - x.abs()).clamp(min=0)


class PlainLIF(nn.Module):
    """`u[t] = leak * (u[t-1] - threshold * s[t-1]) + x[t]`, `s = H(u - threshold)`; `v` is u after the reset."""

    def __init__(self, leak: float = 0.5, threshold: float = 1.0, detach_reset: bool = True) -> None:
        super().__init__()
        self.leak, self.threshold, self.detach_reset = leak, threshold, detach_reset
        self.v: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        u = self.leak * self.v + x
        spike = TriangleSpike.apply(u - self.threshold)
        self.v = u - self.threshold * (spike.detach() if self.detach_reset else spike)
        return spike


class PlainReadout(nn.Module):
    """A leaky integrator that never fires: `v[t] = leak * v[t-1] + x[t]`, which is its output."""

    def __init__(self, leak: float = 0.5) -> None:
        super().__init__()
        self.leak = leak
        self.v: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.v = self.leak * self.v + x
        return self.v


class RecurrentLIF(nn.Module):
    """The hidden layer of `online_equations.eprop` as a user writes it.

    `cut` detaches what goes from neuron to neuron over time.
    """

    def __init__(self, features: int, hidden: int, leak: float, cut: bool = False) -> None:
        super().__init__()
        self.inp = nn.Linear(features, hidden, bias=False)
        self.rec = nn.Linear(hidden, hidden, bias=False)
        self.leak, self.cut = leak, cut
        self.v: Tensor | float = 0.0
        self.z: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        if self.z is None:
            self.z = torch.zeros_like(x)
        z = self.z.detach() if self.cut else self.z
        self.v = self.leak * self.v + x + self.rec(z) - self.z.detach()
        self.z = TriangleSpike.apply(self.v - 1)
        return self.z


class GivenDropout(nn.Module):
    """Dropout with one mask, given, for all steps of a sequence."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = nn.Buffer(mask)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


@dataclass
class Outcome:
    """What a rule leaves: gradients by parameter name, loss of each step `[T]`, outputs `[T, N, ...]`, the copy."""

    gradients: dict[str, Tensor]
    losses: Tensor
    outputs: Tensor
    model: nn.Module
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters()}


# State of a model, whoever wrote it.


def stores(model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """The dicts in which the modules of a model may hold state, with the name of the module."""
    for name, module in model.named_modules():
        yield name, vars(module)
        if isinstance(vars(module).get("_memories"), dict):
            yield name, vars(module)["_memories"]


def detach_state(model: nn.Module) -> None:
    """Cut the graph between one step and the next."""
    for _, store in stores(model):
        for key, value in store.items():
            if isinstance(value, Tensor):
                store[key] = value.detach()


def find_slots(model: nn.Module, x: Tensor) -> list[tuple[str, str]]:
    """Which values a step changes: (place in `stores`, key), found by watching a copy take a step."""
    clone = copy.deepcopy(model)
    before = [dict(store) for _, store in stores(clone)]
    with torch.no_grad():
        clone(x)
    return [
        (str(i), key)
        for i, (was, (_, store)) in enumerate(zip(before, stores(clone), strict=True))
        for key, value in store.items()
        if isinstance(value, Tensor) and value is not was.get(key)
    ]


def pure_step(model: nn.Module, x: Tensor) -> tuple[Callable[..., tuple[Tensor, list[Tensor]]], list[Tensor]]:
    """A model as `step(parameters, state, x) -> (y, state)` with nothing kept inside, and its state before step 0."""
    clone = copy.deepcopy(model)
    slots = find_slots(clone, x)
    places = [store for _, store in stores(clone)]
    probe = copy.deepcopy(clone)
    with torch.no_grad():
        probe(x)
    after = [[store for _, store in stores(probe)][int(i)][key] for i, key in slots]
    initial = []
    for (i, key), like in zip(slots, after, strict=True):
        value = places[int(i)][key]
        initial.append(value if isinstance(value, Tensor) else torch.full_like(like, value or 0.0))

    def step(parameters: dict[str, Tensor], state: Sequence[Tensor], x: Tensor) -> tuple[Tensor, list[Tensor]]:
        for (i, key), value in zip(slots, state, strict=True):
            places[int(i)][key] = value
        y = torch.func.functional_call(clone, parameters, (x,))
        return y, [places[int(i)][key] for i, key in slots]

    return step, initial


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def _copy(model: nn.Module) -> nn.Module:
    clone = copy.deepcopy(model)
    clone.zero_grad()
    return clone


# Rules on modules.


def bptt(model: nn.Module, x_seq: Tensor, target: Tensor, loss: Loss, scale: float = 1.0) -> Outcome:
    """Back-propagation through time of `scale * sum_t loss(y[t], target[t])`."""
    return truncated_bptt(model, x_seq, target, loss, len(x_seq), scale)


def truncated_bptt(
    model: nn.Module,
    x_seq: Tensor,
    target: Tensor,
    loss: Loss,
    K: int,
    scale: float = 1.0,
    make_optimizer: MakeOptimizer | None = None,
) -> Outcome:
    """The state is cut after every K steps; with an optimizer, the weights are updated there too."""
    model = _copy(model)
    optimizer = make_optimizer(_trainable(model)) if make_optimizer else None
    losses, outputs = [], []
    for start in range(0, len(x_seq), K):
        if optimizer is not None:
            optimizer.zero_grad()
        segment = []
        for t in range(start, min(start + K, len(x_seq))):
            y = model(x_seq[t])
            segment.append(loss(y, target[t]))
            outputs.append(y.detach())
        (scale * sum(segment)).backward()
        losses += [value.detach() for value in segment]
        if optimizer is not None:
            optimizer.step()
        detach_state(model)
    return Outcome(_gradients(model), torch.stack(losses), torch.stack(outputs), model)


def rtrl(model: nn.Module, x_seq: Tensor, target: Tensor, loss: Loss, scale: float = 1.0) -> dict[str, Tensor]:
    """Real-time recurrent learning: d(state)/d(parameters) is carried forward, one tangent for each parameter entry."""
    step, state = pure_step(model, x_seq[0])
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradients = {name: torch.zeros_like(p) for name, p in parameters.items()}
    directions = []
    for name, p in parameters.items():
        for index in range(p.numel()):
            unit = {n: torch.zeros_like(q) for n, q in parameters.items()}
            unit[name].view(-1)[index] = 1.0
            directions.append((name, index, unit))
    tangents = [[torch.zeros_like(v) for v in state] for _ in directions]
    for x, wanted in zip(x_seq, target, strict=True):

        def step_and_loss(
            p: dict[str, Tensor], s: list[Tensor], x: Tensor = x, wanted: Tensor = wanted
        ) -> tuple[Tensor, list[Tensor]]:
            y, s = step(p, s, x)
            return loss(y, wanted), s

        after = state
        for i, (name, index, unit) in enumerate(directions):
            (_, after), (slope, tangents[i]) = torch.func.jvp(step_and_loss, (parameters, state), (unit, tangents[i]))
            gradients[name].view(-1)[index] += scale * slope
        state = [v.detach() for v in after]
    return gradients


class Outputs:
    """What some modules of a model give, call by call; `cut`: everybody else reads it without history."""

    def __init__(self, model: nn.Module, names: Sequence[str], cut: bool) -> None:
        self.values: list[Tensor] = []

        def remember(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            self.values.append(output)
            return output.detach() if cut else output

        for name in names:
            model.get_submodule(name).register_forward_hook(remember)


def ostl(
    model: nn.Module, neurons: Sequence[str], x_seq: Tensor, target: Tensor, loss: Loss, scale: float = 1.0
) -> dict[str, Tensor]:
    """Exact in each layer, spatial between layers.

    A layer ends with one of the modules named in `neurons`. What arrives at their outputs, and at that of the model, is
    taken by back-propagation with the state cut at every step; d(outputs)/d(parameters) through time, with nothing
    going from layer to layer, by forward mode, one tangent for each parameter entry.
    """
    spatial = _copy(model)
    seen = Outputs(spatial, neurons, cut=False)
    signals: list[list[Tensor]] = []
    for x, wanted in zip(x_seq, target, strict=True):
        seen.values.clear()
        y = spatial(x)
        values = [*seen.values, y]
        found = torch.autograd.grad(loss(y, wanted), values, allow_unused=True)
        signals.append([torch.zeros_like(v) if g is None else g for v, g in zip(values, found, strict=True)])
        detach_state(spatial)

    own = _copy(model)
    cut = Outputs(own, neurons, cut=True)
    step, initial = pure_step(own, x_seq[0])
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradients = {name: torch.zeros_like(p) for name, p in parameters.items()}

    def step_and_values(p: dict[str, Tensor], s: list[Tensor], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        cut.values.clear()
        y, s = step(p, s, x)
        return [*cut.values, y], s

    for name, p in parameters.items():
        for index in range(p.numel()):
            unit = {n: torch.zeros_like(q) for n, q in parameters.items()}
            unit[name].view(-1)[index] = 1.0
            state, tangents = initial, [torch.zeros_like(v) for v in initial]
            for x, signal in zip(x_seq, signals, strict=True):
                (_, state), (changes, tangents) = torch.func.jvp(
                    lambda p, s, x=x: step_and_values(p, s, x), (parameters, state), (unit, tangents)
                )
                total = sum((g * change).sum() for g, change in zip(signal, changes, strict=True))
                gradients[name].view(-1)[index] += scale * total
    return gradients


def sltt(
    model: nn.Module,
    x_seq: Tensor,
    target: Tensor,
    loss: Loss,
    scale: float = 1.0,
    steps: Sequence[int] | None = None,
) -> Outcome:
    """Spatial gradients only; with `steps` (SLTT-K) only of those steps, the others run without a graph."""
    model = _copy(model)
    chosen = set(range(len(x_seq)) if steps is None else steps)
    losses, outputs = [], []
    for t, x in enumerate(x_seq):
        with torch.set_grad_enabled(t in chosen):
            y = model(x)
            value = loss(y, target[t])
        if t in chosen:
            (scale * value).backward()
        detach_state(model)
        losses.append(value.detach())
        outputs.append(y.detach())
    return Outcome(_gradients(model), torch.stack(losses), torch.stack(outputs), model)


class OperandTraces:
    """Follows some weight modules: the trace of what each call was given, and the gradient of what it gave."""

    def __init__(self, model: nn.Module, leaks: dict[str, float]) -> None:
        self.leaks = leaks
        self.modules = {name: model.get_submodule(name) for name in leaks}
        self.traces: dict[tuple[str, int], Tensor] = {}
        self.calls: list[tuple[str, Tensor, Tensor]] = []
        for name, module in self.modules.items():
            module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[..., None]:
        def remember(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            if output.requires_grad:
                output.retain_grad()
            self.calls.append((name, inputs[0].detach(), output))

        return remember

    def advance(self) -> None:
        """Take what the step gave into the traces."""
        count: dict[str, int] = {}
        for name, operand, _ in self.calls:
            key = (name, count.setdefault(name, 0))
            count[name] += 1
            self.traces[key] = self.leaks[name] * self.traces[key] + operand if key in self.traces else operand

    def replace_gradients(self) -> None:
        """Give the followed weights the gradient of this step on the traces, instead of that on the operands."""
        gradients = {name: torch.zeros_like(module.weight) for name, module in self.modules.items()}
        count: dict[str, int] = {}
        for name, _, output in self.calls:
            key = (name, count.setdefault(name, 0))
            count[name] += 1
            if output.grad is None:
                continue
            module = self.modules[name]
            with torch.enable_grad():
                on_trace = type(module).forward(module, self.traces[key])
                gradients[name] += torch.autograd.grad(on_trace, module.weight, output.grad)[0]
        for name, module in self.modules.items():
            if module.weight.requires_grad:
                module.weight.grad = gradients[name]


def ottt(
    model: nn.Module,
    x_seq: Tensor,
    target: Tensor,
    loss: Loss,
    leaks: dict[str, float],
    scale: float = 1.0,
    make_optimizer: MakeOptimizer | None = None,
) -> Outcome:
    """Spatial gradients, where the modules named in `leaks` see the trace `a[t] = leak * a[t-1] + operand[t]`.

    Without an optimizer the gradients of all steps are summed (OTTT-A); with one, each step is followed by an update
    (OTTT-O). Biases and modules that are not named see no trace.
    """
    model = _copy(model)
    optimizer = make_optimizer(_trainable(model)) if make_optimizer else None
    traces = OperandTraces(model, leaks)
    total = _gradients(model)
    losses, outputs = [], []
    for x, wanted in zip(x_seq, target, strict=True):
        model.zero_grad()
        y = model(x)
        value = loss(y, wanted)
        traces.advance()
        (scale * value).backward()
        traces.replace_gradients()
        traces.calls.clear()
        for name, gradient in _gradients(model).items():
            total[name] += gradient
        if optimizer is not None:
            optimizer.step()
        detach_state(model)
        losses.append(value.detach())
        outputs.append(y.detach())
    return Outcome(total, torch.stack(losses), torch.stack(outputs), model)


def fptt(
    model: nn.Module,
    x_seq: Tensor,
    target: Tensor,
    loss: Loss,
    alpha: float,
    make_optimizer: MakeOptimizer,
    variant: str,
    averages: Sequence[Tensor] | None = None,
    multipliers: Sequence[Tensor] | None = None,
    inner_steps: int = 1,
) -> Outcome:
    """Forward propagation through time; the running averages and the multipliers are in `extra`.

    `reference`: mean regulariser, the gradient for the average taken one step of state too late, none in the last step.
    `paper`: sums, the gradient at the state that the step started from. `authors`: no second forward.
    """
    model = _copy(model)
    weights = _trainable(model)
    optimizer = make_optimizer(weights)
    average = [w.detach().clone() for w in weights] if averages is None else [a.clone() for a in averages]
    last = [torch.zeros_like(w) for w in weights] if multipliers is None else [m.clone() for m in multipliers]
    losses, outputs = [], []
    for t, (x, wanted) in enumerate(zip(x_seq, target, strict=True)):
        start = copy.deepcopy(model)
        for _ in range(inner_steps):
            _set_state(model, start)
            y = model(x)
            value = loss(y, wanted)
            optimizer.zero_grad()
            pull = torch.zeros_like(value)
            for w, a, g in zip(weights, average, last, strict=True):
                if variant == "authors":
                    pull = pull - (w * g).sum() + alpha / 2 * ((w - a) ** 2).sum()
                else:
                    square = (w - a - g / (2 * alpha)) ** 2
                    pull = pull + alpha / 2 * (square.mean() if variant == "reference" else square.sum())
            (value + pull).backward()
            optimizer.step()
            detach_state(model)
        losses.append(value.detach())
        outputs.append(y.detach())
        with torch.no_grad():
            if variant == "authors":
                last = [g - alpha * (w - a) for w, a, g in zip(weights, average, last, strict=True)]
            elif variant == "paper" or t < len(x_seq) - 1:
                last = _gradient_again(model, start if variant == "paper" else model, x, wanted, loss)
            else:
                break
            average = [(a + w) / 2 - g / (2 * alpha) for w, a, g in zip(weights, average, last, strict=True)]
    extra = {"averages": average, "multipliers": last}
    return Outcome(_gradients(model), torch.stack(losses), torch.stack(outputs), model, extra)


def _set_state(model: nn.Module, source: nn.Module) -> None:
    for (_, store), (_, wanted) in zip(stores(model), stores(source), strict=True):
        for key, value in wanted.items():
            if value is None or isinstance(value, Tensor | float):
                store[key] = value


def _gradient_again(model: nn.Module, state: nn.Module, x: Tensor, wanted: Tensor, loss: Loss) -> list[Tensor]:
    """The loss gradient of the model's weights as they are now, with a step from the state of another copy."""
    clone = copy.deepcopy(model)
    _set_state(clone, state)
    with torch.enable_grad():
        value = loss(clone(x), wanted)
        gradients = torch.autograd.grad(value, _trainable(clone), allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(_trainable(clone), gradients, strict=True)]


def mse(y: Tensor, target: Tensor) -> Tensor:
    """Half the squared error, summed over features and averaged over the batch."""
    return 0.5 * ((y - target) ** 2).sum() / len(y)

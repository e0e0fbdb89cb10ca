"""Fit the equation of a neuron to what it does, whatever code computes it.

A unit is a part of one recorded step: element-wise calls with or without states, between layers. The fit runs it on
random inputs and looks for the potential: the first value that alone decides whether the unit fires. It then solves

    p[t] = a * p[t-1] + sum_j b_j * u_j[t] + c       while the unit is silent
    fires where p[t] > threshold
    p[t] = a * reset + sum_j b_j * u_j[t] + c        after a spike

for each element, and compares the unit with this equation on other random inputs. A unit that does not fire has its
output as potential. All runs are in float64; the threshold is found among the numbers of the unit's own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from snnfx.deploy.nir_step import BATCH, AtenStep, run_nodes

__all__ = ["FittedNeuron", "NotFitted", "Unit", "fit_neuron"]

TOLERANCE = 1e-8
"""Largest relative deviation from the equation."""

_STEPS = 32
_SCALES = (0.1, 1.0, 10.0, 100.0)


_Drive = Callable[[list[Tensor], list[Tensor], list[Tensor]], None]
"""Changes the inputs of a step, given the potentials and outputs of the steps before."""


class NotFitted(Exception):
    """The unit does not follow the equation; the message is the reason."""


@dataclass(frozen=True)
class Unit:
    """A part of a recorded step.

    Args:
        nodes: its calls, in order.
        slots: the placeholders of its states.
        inputs: the nodes outside of it that it reads.
        output: the node that is read from outside.
    """

    nodes: tuple[Node, ...]
    slots: tuple[Node, ...]
    inputs: tuple[Node, ...]
    output: Node


@dataclass(frozen=True)
class FittedNeuron:
    """The equation of a unit; each number is a tensor with the shape of the unit's output without the batch.

    Args:
        leak: `a`; 0 for a unit without states.
        gains: `b_j`, for each input of the unit.
        offset: `c`.
        initial: the potential before the first step.
        threshold: the largest potential at which it is silent; None: it does not fire, its output is the potential.
        reset: the potential after a spike; None: it does not fire, or has no states.
    """

    leak: Tensor
    gains: tuple[Tensor, ...]
    offset: Tensor
    initial: Tensor
    threshold: Tensor | None = None
    reset: Tensor | None = None


def fit_neuron(unit: Unit, step: AtenStep) -> FittedNeuron:
    """Fit the equation; raises NotFitted."""
    return _Fit(unit, step).result()


@dataclass
class _Runs:
    """Time series of a unit, `[T, N, *]` each: inputs, potential and output."""

    inputs: list[Tensor]
    potential: Tensor
    output: Tensor


class _Fit:
    def __init__(self, unit: Unit, step: AtenStep) -> None:
        self.unit, self.step = unit, step
        self.random = torch.Generator().manual_seed(0)
        self.shape = tuple(step.values[unit.output].shape)
        if not self.shape or self.shape[0] != BATCH:
            raise NotFitted("its output has no batch dimension in front.")
        self.constants = dict(step.constants)
        self.potential, self.sign = unit.output, 1.0

    def result(self) -> FittedNeuron:
        if not self._fires():
            return self._leaky()
        self.potential = self._potential_node()
        threshold = self._threshold(torch.float64)
        own = self.step.values[self.unit.output].dtype
        own = self._potential_dtype() if own == torch.bool else own
        written = threshold if own not in (torch.float32,) else self._threshold(own)
        leak, gains, offset, runs = self._linear(threshold)
        reset = self._reset(leak, gains, offset, threshold)
        initial = self._initial(leak, gains, offset, runs)
        neuron = FittedNeuron(leak, gains, offset, initial, threshold, reset)
        self._verify(neuron)
        return FittedNeuron(leak, gains, offset, initial, written.double(), reset)

    def _leaky(self) -> FittedNeuron:
        leak, gains, offset, runs = self._linear(None)
        neuron = FittedNeuron(leak, gains, offset, self._initial(leak, gains, offset, runs))
        self._verify(neuron)
        return neuron

    # -- runs ---------------------------------------------------------------------------------------------------------

    def _values(self, dtype: torch.dtype = torch.float64) -> dict[Node, Tensor]:
        return {n: v.detach().to(dtype) if v.is_floating_point() else v for n, v in self.constants.items()}

    def _run(self, inputs: Sequence[Tensor], drive: _Drive | None = None) -> _Runs:
        """Run the unit from its initial state; `drive` changes the inputs from step to step."""
        constants = self._values()
        state = {n: _wide(self.step.initial[n]) for n in self.unit.slots}
        potentials: list[Tensor] = []
        outputs: list[Tensor] = []
        for t in range(inputs[0].shape[0] if inputs else _STEPS):
            values: dict[Node, Tensor] = {**constants, **state}
            now = [x[t] for x in inputs]
            if drive is not None:
                drive(now, potentials, outputs)
            values |= dict(zip(self.unit.inputs, now, strict=True))
            run_nodes(self.unit.nodes, values, torch.float64)
            state = {n: _wide(values[self.step.following[n]]) for n in self.unit.slots}
            potentials.append(self.sign * _wide(values[self.potential]))
            outputs.append(_wide(values[self.unit.output]))
        return _Runs(list(inputs), torch.stack(potentials), torch.stack(outputs))

    def _noise(self, steps: int = _STEPS, scale: float = 1.0) -> list[Tensor]:
        shapes = [self.step.values[node].shape for node in self.unit.inputs]
        return [torch.randn(steps, *s, generator=self.random, dtype=torch.float64) * scale for s in shapes]

    def _fires(self) -> bool:
        runs = [self._run(self._noise(scale=scale)) for scale in _SCALES]
        outputs = torch.cat([r.output for r in runs])
        if not bool(((outputs == 0) | (outputs == 1)).all()):
            return False
        if bool((outputs == outputs[0]).all()):
            raise NotFitted("its output is the same for all inputs that were tried.")
        return True

    # -- potential and threshold --------------------------------------------------------------------------------------

    def _potential_node(self) -> Node:
        """The first value that alone decides whether the unit fires."""
        observed = self._observed_values()
        candidates = [n for n in (*self.unit.inputs, *self.unit.nodes) if n in observed]
        for node in candidates:
            if self._decides(node, observed[node]):
                return node
        raise NotFitted(
            "no single value decides whether it fires, as with an adaptive threshold."
            if len(self.unit.slots) > 1
            else "no single value decides whether it fires."
        )

    def _decides(self, node: Node, observed: Tensor) -> bool:
        """Whether the output is a function of a value, whatever the states and inputs are."""
        outputs = []
        for trial in range(max(8, 512 // observed.numel())):
            # Values of other elements and samples: they come from other states and inputs.
            order = torch.randperm(observed.numel(), generator=self.random)
            tried = observed.flatten()[order].reshape(observed.shape)
            noise = torch.randn(observed.shape, generator=self.random, dtype=torch.float64)
            tried = tried * (1.0 if trial == 0 else 3.0 * noise)
            one, other = (self._output_for(node, tried, 2 * trial + i) for i in range(2))
            if not torch.equal(one, other):
                return False
            outputs.append(one)
        return not bool((torch.stack(outputs) == outputs[0].flatten()[0]).all())

    def _observed_values(self) -> dict[Node, Tensor]:
        """A value of each candidate, over several steps and scales, in one tensor of the unit's shape."""
        kept: dict[Node, list[Tensor]] = {}
        for scale in _SCALES:
            state = {n: _wide(self.step.initial[n]) for n in self.unit.slots}
            inputs = self._noise(4, scale)
            for t in range(4):
                values: dict[Node, Tensor] = {**self._values(), **state}
                values |= {node: x[t] for node, x in zip(self.unit.inputs, inputs, strict=True)}
                run_nodes(self.unit.nodes, values, torch.float64)
                for node in (*self.unit.inputs, *self.unit.nodes):
                    value = values[node]
                    if tuple(value.shape) == self.shape and value.is_floating_point():
                        kept.setdefault(node, []).append(value)
                state = {n: _wide(values[self.step.following[n]]) for n in self.unit.slots}
        result = {}
        for node, seen in kept.items():
            all_seen = torch.stack(seen)
            if bool(((all_seen == 0) | (all_seen == 1)).all()):
                continue
            pick = torch.randint(len(seen), self.shape, generator=self.random)
            result[node] = all_seen.gather(0, pick[None])[0]
        return result

    def _output_for(self, node: Node, value: Tensor, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """The output of one step with random states and inputs, and with `value` in place of a node."""
        random = torch.Generator().manual_seed(seed)
        values: dict[Node, Tensor] = dict(self._values(dtype))
        for n in (*self.unit.slots, *self.unit.inputs):
            shape = self.step.values[n].shape
            values[n] = torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) * (1.0 + seed % 8)
        values[node] = value.to(dtype)
        run_nodes(self.unit.nodes, values, dtype)
        return values[self.unit.output].double()

    def _potential_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.step.values[self.potential].dtype
        return dtype

    def _threshold(self, dtype: torch.dtype) -> Tensor:
        """The largest potential at which each element is silent, by bisection over the numbers of a dtype."""
        largest = torch.full(self.shape, 1e30, dtype=dtype)
        high, low = (self._output_for(self.potential, self.sign * s * largest, 0, dtype) for s in (1, -1))
        if bool((low == 1).all()) and bool((high == 0).all()):
            self.sign = -self.sign
        elif not (bool((low == 0).all()) and bool((high == 1).all())):
            raise NotFitted("it does not fire at all potentials above a threshold.")
        silent, fires = _ordered(-largest), _ordered(largest)
        while bool((fires > silent + 1).any()):
            # Not `silent + (fires - silent) // 2`: the difference is out of range.
            middle = silent // 2 + fires // 2 + (silent % 2 + fires % 2) // 2
            spike = self._output_for(self.potential, self.sign * _from_ordered(middle, dtype), 0, dtype) == 1
            fires, silent = torch.where(spike, middle, fires), torch.where(spike, silent, middle)
        return _same_in_batch(_from_ordered(silent, dtype))

    # -- equation -----------------------------------------------------------------------------------------------------

    def _linear(self, threshold: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...], Tensor, list[_Runs]]:
        """Leak, gains and offset from the steps after silent ones."""
        runs = [self._run(self._noise(scale=scale)) for scale in _SCALES]
        rows, targets, kept = [], [], []
        has_state = bool(self.unit.slots)
        for run in runs:
            before, now = run.potential[:-1], run.potential[1:]
            columns = [before if has_state else torch.zeros_like(before), *[self._like(x[1:]) for x in run.inputs]]
            rows.append(torch.stack([*columns, torch.ones_like(now)], dim=-1))
            targets.append(now)
            spiked = torch.zeros_like(now, dtype=torch.bool) if threshold is None else run.output[:-1] == 1
            kept.append(~spiked)
        x, y, weight = torch.cat(rows), torch.cat(targets), torch.cat(kept).double()
        if not bool((weight.sum((0, 1)) > 4 + len(self.unit.inputs)).all()):
            raise NotFitted("it fires for almost all inputs that were tried.")
        solution = _least_squares(x, y, weight)
        error = ((x * solution).sum(-1) - y).abs() * weight
        if not bool((error <= TOLERANCE * (1.0 + y.abs())).all()):
            raise NotFitted(self._why_not_linear())
        leak, *gains, offset = [_tidy(v) for v in solution.unbind(-1)]
        if not any(bool(g.any()) for g in gains):
            raise NotFitted("its inputs do not change it.")
        return leak, tuple(gains), offset, runs

    def _why_not_linear(self) -> str:
        if len(self.unit.slots) > 1:
            names = [name for name, node in self.step.slots.items() if node in self.unit.slots]
            return f"its states {', '.join(names)} depend on each other, but NIR's neurons have one potential."
        kind = "last value and its inputs" if self.unit.slots else "inputs"
        return f"its potential is not a linear function of its {kind}."

    def _like(self, x: Tensor) -> Tensor:
        """An input series in the shape of the output, for inputs that broadcast."""
        return x.expand(x.shape[0], *self.shape) if x.shape[1:] != self.shape else x

    def _driven(self, leak: Tensor, gains: Sequence[Tensor], offset: Tensor, threshold: Tensor) -> _Runs:
        """A run whose inputs put the potential on both sides of the threshold."""
        inputs = self._noise(2 * _STEPS)
        wide = [i for i, x in enumerate(inputs) if x.shape[1:] == self.shape and bool((gains[i] != 0).all())]
        if not wide:
            return self._run([x * 3.0 for x in inputs])
        driven = wide[0]
        distance = torch.maximum((threshold - offset).abs(), threshold.abs()).clamp(min=1e-3)

        def drive(now: list[Tensor], potentials: list[Tensor], outputs: list[Tensor]) -> None:
            noise = torch.randn(self.shape, generator=self.random, dtype=torch.float64)
            others = sum((g * x for i, (g, x) in enumerate(zip(gains, now, strict=True)) if i != driven), offset)
            before = potentials[-1] * (1.0 - outputs[-1]) if potentials else torch.zeros(self.shape)
            now[driven] = (threshold + 0.7 * distance * noise - others - leak * before) / gains[driven]
            inputs[driven][len(potentials)] = now[driven]

        return self._run(inputs, drive)

    def _reset(self, leak: Tensor, gains: Sequence[Tensor], offset: Tensor, threshold: Tensor) -> Tensor | None:
        if not self.unit.slots:
            return None
        runs = [self._driven(leak, gains, offset, threshold) for _ in range(3)]
        rests = torch.cat([self._without_inputs(r, gains, offset)[1:] for r in runs])
        spiked = torch.cat([r.output[:-1] for r in runs]) == 1
        before = torch.cat([r.potential[:-1] for r in runs])
        if not bool(spiked.any(0).any(0).all()):
            raise NotFitted("some of its elements never fired on the inputs that were tried.")
        count = spiked.sum((0, 1))
        mean = (rests * spiked).sum((0, 1)) / count
        scale = 1.0 + before.abs().amax((0, 1)) + threshold.abs()
        if bool((((rests - mean).abs() * spiked) <= TOLERANCE * 10 * scale).all()):
            reset = torch.where(leak == 0, torch.zeros_like(mean), mean / torch.where(leak == 0, 1.0, leak))
            return _tidy(reset)
        jump = rests - leak * before
        mean = (jump * spiked).sum((0, 1)) / count
        if bool((((jump - mean).abs() * spiked) <= TOLERANCE * 10 * scale).all()):
            if bool((mean.abs() <= TOLERANCE * 10 * scale).all()):
                raise NotFitted("a spike does not reset its potential, but NIR's neurons set the potential to v_reset.")
            raise NotFitted(
                "a spike subtracts from its potential (soft reset), but NIR's neurons set the potential to v_reset."
            )
        raise NotFitted("the step after a spike does not start from one reset potential, or drops its input.")

    def _without_inputs(self, run: _Runs, gains: Sequence[Tensor], offset: Tensor) -> Tensor:
        inputs = sum((g * self._like(x) for g, x in zip(gains, run.inputs, strict=True)), 0.0)
        return run.potential - inputs - offset

    def _initial(self, leak: Tensor, gains: Sequence[Tensor], offset: Tensor, runs: Sequence[_Runs]) -> Tensor:
        rest = self._without_inputs(runs[0], gains, offset)[0, 0]
        return _tidy(torch.where(leak == 0, torch.zeros_like(rest), rest / torch.where(leak == 0, 1.0, leak)))

    def _verify(self, neuron: FittedNeuron) -> None:
        """Compare the unit with its equation on other random inputs."""
        trials = [self._run(self._noise(scale=scale)) for scale in _SCALES]
        if neuron.threshold is not None:
            trials += [self._driven(neuron.leak, neuron.gains, neuron.offset, neuron.threshold) for _ in range(3)]
        for run in trials:
            inputs = run.inputs
            potential = neuron.initial.expand(self.shape)
            for t in range(inputs[0].shape[0]):
                drive = sum((g * self._like(x)[t] for g, x in zip(neuron.gains, inputs, strict=True)), neuron.offset)
                potential = neuron.leak * potential + drive
                if neuron.threshold is None:
                    scale = 1.0 + run.output[t].abs()
                    wrong = (potential - run.output[t]).abs() > 100 * TOLERANCE * scale
                else:
                    spike = potential > neuron.threshold
                    scale = 1.0 + neuron.threshold.abs()
                    wrong = (spike.double() != run.output[t]) & (
                        (potential - neuron.threshold).abs() > 100 * TOLERANCE * scale
                    )
                    # The unit's own spike, so that a potential at the threshold does not change later steps.
                    if neuron.reset is not None:
                        potential = torch.where(run.output[t] == 1, neuron.reset, potential)
                if bool(wrong.any()):
                    raise NotFitted("it differs from the equation of NIR's neurons on random inputs.")


def _wide(x: Tensor) -> Tensor:
    return x.detach().double()


def _least_squares(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Solve `x @ s = y` for each element; `x` is `[T, N, *, K]`, all others `[T, N, *]`; `s` is `[*, K]`."""
    scale = (x.abs() * weight[..., None]).amax((0, 1)).clamp(min=1e-30)
    x = x / scale
    gram = torch.einsum("tn...i,tn...j,tn...->...ij", x, x, weight)
    # A column of zeros, such as the potential of a unit without states, gets the coefficient 0.
    gram = gram + torch.diag_embed((gram.diagonal(dim1=-2, dim2=-1) == 0).double())
    solution = torch.zeros_like(scale)
    for _ in range(3):
        residual = y - (x * solution).sum(-1)
        right = torch.einsum("tn...i,tn...,tn...->...i", x, residual, weight)
        solution = solution + torch.linalg.solve_ex(gram, right[..., None])[0][..., 0]
    return solution / scale


def _same_in_batch(x: Tensor) -> Tensor:
    if not torch.equal(x[0], x[1]):
        raise NotFitted("its samples differ from each other.")
    return x[0]


def _tidy(x: Tensor) -> Tensor:
    """Without the noise of the fit: one value where all are equal, and zeros where it is tiny."""
    x = torch.where(x.abs() < 1e-11, torch.zeros_like(x), x)
    if x.numel() and float(x.max() - x.min()) <= 1e-11 * (1.0 + float(x.abs().max())):
        x = torch.full_like(x, float(f"{float(x.median()):.12g}"))
    return x


def _ordered(x: Tensor) -> Tensor:
    """Integers in the order of floating-point numbers."""
    bits = x.view(torch.int32).long() if x.dtype == torch.float32 else x.view(torch.int64)
    negative = -(bits & 0x7FFFFFFF) if x.dtype == torch.float32 else -(bits & 0x7FFFFFFFFFFFFFFF)
    return torch.where(x < 0, negative, bits)


def _from_ordered(order: Tensor, dtype: torch.dtype) -> Tensor:
    bits = order.abs()
    magnitude = bits.int().view(dtype) if dtype == torch.float32 else bits.view(dtype)
    return torch.where(order < 0, -magnitude, magnitude)

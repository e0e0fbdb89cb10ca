"""`snnfx.verify`: compare a net with its model run step by step."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.errors import InputError, VerificationError
from snnfx.inspect.verify.comparison import Comparison, Tolerance, VerificationReport, compare, is_same, named_leaves
from snnfx.inspect.verify.divergence import Divergence, first_divergence, recorded_neurons
from snnfx.inspect.verify.float64_copies import copies_in_float64, to_float64
from snnfx.inspect.verify.oracle import folded_forward, step_forward
from snnfx.inspect.verify.program_lookup import (
    called_in,
    is_within,
    region_of_module,
    region_of_output,
    reset_discovered_state,
    value_at,
)
from snnfx.inspect.verify.sequence_inputs import SequenceInputs
from snnfx.inspect.verify.whole_call import verify_whole_call
from snnfx.inspect.verify.without_dropout import without_dropout
from snnfx.ops.sequence_functions import reduce_over_time
from snnfx.sandbox.isolation import isolated, rng_state
from snnfx.sandbox.torch_internals import BatchNormBase, pytree
from snnfx.state.carry import CarriedArgument, SlotName, flatten_state, output_at, outputs_without, paths_of
from snnfx.state.registry import named_stateful, reset_net

__all__ = ["VerificationReport", "verify"]


def verify(
    model: nn.Module,
    net: Any,
    *x_seq: Any,
    T: int | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    double: bool = False,
    gradients: bool = True,
    **kwargs: Any,
) -> VerificationReport:
    """Compare a net with its model: outputs, final state, buffers and gradients.

    The reference is a Python loop that calls the model once per time step. In training with `batch_norm="fold"`, each
    BatchNorm in a folded region takes its statistics over all time steps (`snnfx.inspect.verify.oracle`). For a net
    converted with `takes="sequence"`, the reference is the model's own call. Net and
    reference run in the net's mode, from the reset state, with dropout disabled and the same RNG state. State, buffers,
    gradients, flags and random number generators are restored afterwards.

    Args:
        model: the single-step model that was passed to `snnfx.convert`.
        net: the net that `snnfx.convert` returned.
        *x_seq: positional arguments of the net, e.g. one tensor `[T, N, *]`.
        T: number of time steps; required if none of the inputs has a time dimension. Default: None.
        atol: largest allowed absolute difference. Default by dtype: 1e-9 for float64, 1e-5 for float32.
        rtol: largest allowed difference relative to the largest magnitude in the tensor. Default by dtype: 1e-9 for
            float64, 1e-4 for float32.
        double: True to compare copies in float64. In float32, rounding can flip a spike if a potential is at the
            threshold. Default: False.
        gradients: True to compare the gradients of a random linear functional of the outputs, with respect to each
            floating-point input and each parameter that requires a gradient. Default: True.
        **kwargs: keyword arguments of the net.

    Returns:
        A `VerificationReport` with the largest differences; `str(report)` is a summary.

    Raises:
        VerificationError: outputs (SNNFX401), states (SNNFX402), gradients (SNNFX403) or buffers (SNNFX404) differ.
            The message names the first difference, its time step and region, and the first neuron that differs.
            SNNFX405: `batch_norm="fold"` is undefined for this model.
        InputError: SNNFX301, 303, 304, 306, 307, 310: the arguments do not match the net or each other.

    Example:
        >>> import torch, snnfx
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), snnfx.neuron.LIFNode())
        >>> report = snnfx.verify(model, snnfx.convert(model), torch.rand(8, 2, 3))
        >>> print(str(report).splitlines()[0])
        OK: the net matches the reference over T = 8 steps (the model run step by step; training, float32)
    """
    if not isinstance(model, nn.Module) or not (isinstance(net, nn.Module) and hasattr(net, "run")):
        raise InputError(
            "SNNFX304",
            "verify needs a model and its converted net",
            why=f"it was called with a {type(model).__name__} and a {type(net).__name__}.",
            hint="Call verify(model, net, x_seq).",
        )
    options: Any = net.options
    if getattr(options, "takes", "step") == "sequence":
        with isolated(model, net), torch.inference_mode(False), torch.set_grad_enabled(gradients):
            if double:
                model, net = copies_in_float64(model, net)
                x_seq, kwargs = pytree.tree_map_only(Tensor, to_float64, (x_seq, kwargs))
            return verify_whole_call(model, net, x_seq, kwargs, Tolerance(atol, rtol), gradients)
    first: dict[str, Any] = {}
    if getattr(getattr(net, "program", None), "carried", None):
        x_seq, kwargs, first = net.split_carried(x_seq, kwargs)  # type: ignore[operator]
    inputs = SequenceInputs.of(x_seq, kwargs, options.time_dim, T)
    with isolated(model, net), torch.inference_mode(False), torch.set_grad_enabled(gradients):
        if double:
            model, net = copies_in_float64(model, net)
            inputs = inputs.with_leaves(to_float64)
            first = pytree.tree_map_only(Tensor, to_float64, first)
        return _Verification(model, net, inputs, Tolerance(atol, rtol), gradients, first).report()


@dataclass
class _CheckedRun:
    """Results of the net or of the reference: `outputs` `[T, *]` by name, other fields by qualified name."""

    outputs: dict[str, Any]
    states: dict[str, Any]
    buffers: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    drew_random_numbers: bool


class _Verification:
    """One comparison of a model and its net."""

    def __init__(
        self,
        model: nn.Module,
        net: Any,
        inputs: SequenceInputs,
        tolerance: Tolerance,
        gradients: bool,
        first: dict[str, Any],
    ) -> None:
        self.model, self.net, self.inputs, self.tolerance, self.gradients = model, net, inputs, tolerance, gradients
        self.first = first
        self.carry = paths_of(getattr(net.options, "carry", None))
        self.arguments: list[CarriedArgument] = getattr(getattr(net, "program", None), "carried", None) or [
            CarriedArgument(name, path, SlotName(name)) for name, path in self.carry.items()
        ]
        self.plan = self._planned()
        kinds = {region.kind for region in self.plan.regions}
        once, per_step = called_in(self.plan, {"once"}), called_in(self.plan, kinds - {"once", "fold"})
        folded = {
            name
            for name, module in model.named_modules()
            if isinstance(module, BatchNormBase) and module.training and not is_within(name, per_step)
        }
        self.folded = folded if net.options.batch_norm == "fold" else set()
        self.once = {name for name in self.folded if is_within(name, once)}
        self.reduce: str | None = getattr(net.options, "reduce", None)
        self.initial: dict[str, Any] = {}
        self.output_names: list[str] = []
        self.notes: list[str] = []

    def _planned(self) -> Any:
        """The net planned for these inputs: for other ranks or batch sizes, the net is planned again."""
        planned_for = getattr(self.net, "planned_for", None)
        if planned_for is None:
            return self.net
        args, kwargs = self.inputs.whole()
        return planned_for(*args, **kwargs, **self._first_arguments())

    @property
    def semantics(self) -> str:
        return "BatchNorm statistics over T*N" if self.folded else "the model run step by step"

    @property
    def dtype(self) -> str:
        dtypes = {str(p.dtype).removeprefix("torch.") for p in self.model.parameters() if p.is_floating_point()}
        return ", ".join(sorted(dtypes))

    def report(self) -> VerificationReport:
        """Run the net and the reference, compare them, and return the report or raise."""
        actual = self._run_net()
        expected = self._run_model(actual.outputs.keys(), actual.states.keys())
        self.output_names = list(actual.outputs)
        random_ops = actual.drew_random_numbers or expected.drew_random_numbers
        results = [
            self._compare_outputs(actual.outputs, expected.outputs),
            # A model that reads the gradient mode may compute something else without gradients.
            []
            if self._reads_gradient_mode
            else self._compare_outputs(self._call_net(), expected.outputs, " of a call without gradients"),
            self._compare_states(actual.states, expected.states),
            self._compare_buffers(actual.buffers, expected.buffers),
            self._compare_gradients(actual.gradients, expected.gradients),
        ]
        for comparisons in results:
            failed = [c for c in comparisons if c.failed]
            if failed:
                raise self._error(min(failed, key=lambda c: c.step or 0), random_ops)
        if random_ops:
            self.notes.append("the model draws random numbers; net and reference drew the same ones")
        for name, y in expected.outputs.items():
            if isinstance(y, Tensor) and not y.any():
                self.notes.append(
                    f"warning: `{name}` is zero at every step, so this check is weak; "
                    "use an input that makes neurons spike"
                )
        return VerificationReport(
            T=self.inputs.steps,
            training=self.net.training,
            dtype=self.dtype,
            semantics=self.semantics,
            comparisons=tuple(c for comparisons in results for c in comparisons),
            notes=tuple(self.notes),
        )

    @contextmanager
    def _isolated(self) -> Iterator[None]:
        persistent = getattr(self.net, "persistent_state", None)
        restore_functions = persistent.snapshot() if persistent is not None else []  # parameters included
        with isolated(self.model, self.net), without_dropout(self.model, self.net):
            try:
                yield
            finally:
                for restore in restore_functions:
                    restore()

    def _run_net(self) -> _CheckedRun:
        with self._isolated():
            before = rng_state()
            inputs = self.inputs.fresh()
            args, kwargs = inputs.whole()
            y_seq, states = self.net.run(*args, **self._first_state(), **kwargs)
            outputs = self._outputs_of_net(y_seq)
            states = {name.lstrip("."): value for name, value in states.items()}
            return self._result(self.net, inputs, outputs, states, rng_state() != before)

    def _result(
        self,
        module: nn.Module,
        inputs: SequenceInputs,
        outputs: dict[str, Any],
        states: dict[str, Any],
        is_random: bool,
    ) -> _CheckedRun:
        gradients = self._gradients(outputs, inputs, module)
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        # Copies: a state may be a buffer, which is restored afterwards.
        outputs, states = pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), (outputs, states))
        return _CheckedRun(outputs, states, buffers, gradients, is_random)

    @property
    def _reads_gradient_mode(self) -> bool:
        program = getattr(self.net, "program", None)
        return program is not None and "torch.is_grad_enabled" in program.guards.modes

    def _call_net(self) -> dict[str, Any]:
        """The outputs of a plain call of the net without gradients, for which nets may take another path."""
        with self._isolated(), torch.no_grad():
            getattr(self.net, "reset_carried_state", lambda: None)()
            args, kwargs = self.inputs.fresh().whole()
            y_seq = self.net(*args, **kwargs, **self._first_arguments())
            if hasattr(self.net, "program"):
                y_seq = outputs_without(y_seq, list(self.carry.values()))
            return self._outputs_of_net(y_seq)

    def _first_arguments(self) -> dict[str, Any]:
        """The initial values of carried arguments, in new containers."""
        return pytree.tree_map_only(Tensor, Tensor.detach, self.first)  # type: ignore[no-any-return]

    def _first_state(self) -> dict[str, Any]:
        """The initial values of carried arguments as the argument `state` of `net.run`."""
        state: dict[str, Any] = {}
        for argument in self.arguments:
            if self.first.get(argument.name) is not None:
                state |= flatten_state(argument, self._first_arguments()[argument.name])
        return {"state": state} if state else {}

    def _outputs_of_net(self, y_seq: Any) -> dict[str, Any]:
        outputs, dim = named_leaves(y_seq, "output"), self.inputs.output_dim
        for name, leaf in outputs.items():
            if isinstance(leaf, Tensor) and self.reduce is not None:
                outputs[name] = leaf.unsqueeze(0)
            elif isinstance(leaf, Tensor):
                if not -leaf.ndim <= dim < leaf.ndim or leaf.shape[dim] != self.inputs.steps:
                    why = f"its shape is {list(leaf.shape)}, and dimension {dim} should be T = {self.inputs.steps}."
                    raise VerificationError("SNNFX401", f"`{name}` of the net has no time dimension", why=why)
                outputs[name] = leaf.movedim(dim, 0)
        return outputs

    def _run_model(self, output_names: Set[str], state_names: Set[str]) -> _CheckedRun:
        with self._isolated():
            before = rng_state()
            inputs = self.inputs.fresh()
            outputs_of_steps = self._step_model(inputs)
            outputs = self._outputs_of_model(outputs_of_steps, output_names)
            states = self._states_of_model(outputs_of_steps[-1], state_names)
            return self._result(self.model, inputs, outputs, states, rng_state() != before)

    def _step_model(self, inputs: SequenceInputs) -> list[Any]:
        """The model's return value at each step, from the reset state."""
        if self.model.training != self.net.training:
            # The net shares the model's layers but not its containers, which must follow the net's mode as well.
            shared = set(self.net.modules())
            for module in self.model.modules():
                if module not in shared:
                    module.training = self.net.training
        reset_net(self.model)
        reset_discovered_state(self.model, self.plan)
        self.initial = _states(self.model)
        pairs = [inputs.of_step(t) for t in range(inputs.steps)]
        pairs[0] = pairs[0][0], {**pairs[0][1], **self._first_arguments()}
        steps, keywords, entry = [args for args, _ in pairs], [kwargs for _, kwargs in pairs], self.net.options.entry
        if not self.folded:
            return step_forward(self.model, steps, entry, kwargs=keywords, carry=self.carry)
        return folded_forward(
            self.model,
            steps,
            lambda name, module: name in self.folded,
            entry,
            kwargs=keywords,
            carry=self.carry,
            is_once=lambda name, module: name in self.once,
        )

    def _states_of_model(self, last_outputs: Any, names: Set[str]) -> dict[str, Any]:
        """The states after the last step: registered, carried, and attributes that capture inferred to be state."""
        states = _states(self.model)
        for argument in self.arguments:
            states |= flatten_state(argument, output_at(last_outputs, argument.path))
        for name in names - states.keys():
            for value in value_at(self.model, name):
                states[name] = value
        return states

    def _outputs_of_model(self, outputs_of_steps: list[Any], names: Set[str]) -> dict[str, Any]:
        steps = [named_leaves(y, "output") for y in outputs_of_steps]
        if self.carry and names != steps[0].keys():
            # A net may leave carried values out of its outputs; a single output is then not in a tuple.
            paths = list(self.carry.values())
            steps = [named_leaves(outputs_without(y, paths), "output") for y in outputs_of_steps]
        if any(step.keys() != steps[0].keys() for step in steps):
            raise VerificationError(
                "SNNFX401",
                "the outputs of the model cannot be stacked over time",
                why="their nesting changes between time steps.",
                hint="Return outputs with the same nesting at every step.",
            )
        over_time = {name: _over_time(name, [step[name] for step in steps]) for name in steps[0]}
        if self.reduce is None:
            return over_time
        how = self.reduce
        return {n: reduce_over_time(y, how).unsqueeze(0) if isinstance(y, Tensor) else y for n, y in over_time.items()}

    def _gradients(
        self, outputs: Mapping[str, Any], inputs: SequenceInputs, module: nn.Module
    ) -> dict[str, Tensor | None]:
        """Gradients of a random linear functional of the outputs, the same for net and reference."""
        parts = []
        for name, y in outputs.items():
            if isinstance(y, Tensor) and y.requires_grad:
                # Seeded by the name, so that the weights do not depend on the other outputs with gradients.
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                weights = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
                parts.append(torch.real(y * weights).sum())
        variables: dict[str, Tensor] = {
            f"parameter `{name}`": p for name, p in module.named_parameters() if p.requires_grad
        }
        leaves = zip(inputs.names, inputs.leaves, strict=True)
        variables |= {f"`{name}`": x for name, x in leaves if isinstance(x, Tensor) and x.requires_grad}
        if not self.gradients or not variables:
            return {}
        if not parts:
            return dict.fromkeys(variables)
        gradients = torch.autograd.grad(parts, list(variables.values()), allow_unused=True)
        return dict(zip(variables, gradients, strict=True))

    def _compare_outputs(self, actual: dict[str, Any], expected: dict[str, Any], how: str = "") -> list[Comparison]:
        if actual.keys() != expected.keys():
            names, reference_names = ", ".join(actual) or "none", ", ".join(expected) or "none"
            why = f"the net returns {names}{how}, the reference {reference_names}."
            raise VerificationError("SNNFX401", "the outputs of net and reference are nested differently", why=why)
        pairs = [(name, actual[name], value) for name, value in expected.items()]
        return [
            compare("output", f"`{name}`{how}", a, b, self.tolerance, timed=isinstance(a, Tensor))
            for name, a, b in pairs
        ]

    def _compare_states(self, actual: dict[str, Any], expected: dict[str, Any]) -> list[Comparison]:
        comparisons = []
        overwritten: frozenset[str] = getattr(getattr(self.net, "program", None), "overwritten", frozenset())
        for name, value in expected.items():
            if name in overwritten:
                continue  # the model keeps a copy of a state that is passed to it
            if name in actual:
                leaves, reference_leaves = named_leaves(actual[name]), named_leaves(value)
                for path in leaves | reference_leaves:
                    pair = leaves.get(path), reference_leaves.get(path)
                    comparisons.append(compare("state", f"state `{name}{path}`", *pair, self.tolerance))
            elif not is_same(value, self.initial.get(name)):
                missing = "the net does not return this state"
                comparisons.append(Comparison("state", f"state `{name}`", failed=True, detail=missing))
        unknown = [f"`{name}`" for name in actual if name not in expected]
        if unknown:
            self.notes.append(f"state not compared, because the model has no such attribute: {', '.join(unknown)}")
        return comparisons

    def _compare_buffers(self, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> list[Comparison]:
        comparisons, before = [], dict(self.model.named_buffers())
        states = self.initial.keys()
        for name, value in expected.items():
            if name in states:
                continue  # compared as a state; the net does not write it
            if name in actual:
                comparisons.append(compare("buffer", f"buffer `{name}`", actual[name], value, self.tolerance))
            elif not is_same(value, before[name]):
                detail = "the net does not have this buffer"
                comparisons.append(Comparison("buffer", f"buffer `{name}`", failed=True, detail=detail))
        return comparisons

    def _compare_gradients(
        self, actual: dict[str, Tensor | None], expected: dict[str, Tensor | None]
    ) -> list[Comparison]:
        sizes = [float(g.abs().max()) for g in expected.values() if g is not None and g.numel()]
        # A gradient that is zero up to rounding (a bias before a BatchNorm) needs a scale from the other gradients.
        floor = 1e-2 * max(sizes, default=0.0)
        dims = {f"`{name}`": dim for name, dim in zip(self.inputs.names, self.inputs.dims, strict=True)}
        comparisons = []
        for name, reference in expected.items():
            value, dim = actual.get(name), dims.get(name)
            present = [g for g in (value, reference) if g is not None]
            if not present:
                continue
            zero = torch.zeros_like(present[0])
            a, b = (zero if value is None else value), (zero if reference is None else reference)
            if dim is not None:
                a, b = a.movedim(dim, 0), b.movedim(dim, 0)
            timed = dim is not None
            result = compare("gradient", f"gradient of {name}", a, b, self.tolerance, timed=timed, floor=floor)
            if result.failed and value is None:
                detail = f"the net gives no gradient, the reference one of magnitude {float(b.abs().max()):.3g}"
                result = replace(result, detail=detail)
            comparisons.append(result)
        return comparisons

    def _error(self, comparison: Comparison, random_ops: bool) -> VerificationError:
        why = comparison.detail + "."
        hint = "Print snnfx.explain(net) to see how the regions were formed."
        if self.dtype != "float64":
            hint = f"Rule out rounding first: verify(..., double=True). {hint}"
        divergence = None
        if random_ops:
            why += " The model draws random numbers outside of dropout, so net and reference cannot be compared."
            hint = "Verify in evaluation mode, or without the random operations."
        elif comparison.kind in ("output", "state"):
            divergence = self._first_differing_neuron()
        if divergence is not None:
            why += f" The first neuron that differs is {divergence.in_words}."
        if divergence is not None and divergence.is_rounding:
            hint = "This is rounding at the threshold. Compare in float64: verify(..., double=True)."
        code = {"output": "SNNFX401", "state": "SNNFX402", "gradient": "SNNFX403", "buffer": "SNNFX404"}
        quoted = comparison.name.split("`")[1]
        if divergence is not None:
            where = region_of_module(self.plan, divergence.name)
        elif comparison.kind == "output":
            where = region_of_output(self.plan, self.output_names.index(quoted))
        else:
            where = region_of_module(self.plan, quoted.rpartition(".")[0])
        what = f"{comparison.name} differs from the reference, {self.semantics}"
        if self.folded:
            what = f"{comparison.name} differs from the reference with {self.semantics}"
        return VerificationError(code[comparison.kind], what, where=where, why=why, hint=hint)

    def _first_differing_neuron(self) -> Divergence | None:
        with self._isolated(), torch.no_grad(), recorded_neurons(self.model) as traces:
            self._step_model(self.inputs.fresh())
        # Only neurons called once per step; the reference for folded BatchNorm runs the model twice.
        runs = 2 if self.folded and not self.carry else 1
        T = self.inputs.steps
        traces = {name: trace for name, trace in traces.items() if len(trace.outputs) == runs * T}
        for trace in traces.values():
            trace.outputs, trace.potentials = trace.outputs[-T:], trace.potentials[-T:]
        if not traces:
            return None
        with self._isolated(), torch.no_grad():
            args, kwargs = self.inputs.fresh().whole()
            names = [*traces, *(f"{name}.{trace.slot}" for name, trace in traces.items() if trace.slot)]
            try:
                _, _, record = self.net.run(*args, **self._first_state(), **kwargs, record=tuple(names))
            except InputError:
                return None
        return first_divergence(traces, record, self.tolerance, by_time=not self.folded)


def _over_time(name: str, values: list[Any]) -> Any:
    """Stack the values of one output over time: tensors `[T, *]`; other values once if they are constant."""
    if all(isinstance(value, Tensor) for value in values):
        if any(value.shape != values[0].shape or value.dtype != values[0].dtype for value in values):
            raise VerificationError(
                "SNNFX401",
                f"`{name}` of the model cannot be stacked over time",
                why="its shape or dtype changes between time steps.",
                hint="Return a tensor of the same shape and dtype at every step.",
            )
        return torch.stack(values)
    return values[0] if all(is_same(value, values[0]) for value in values) else values


def _states(model: nn.Module) -> dict[str, Any]:
    """All states of a model by qualified name, e.g. "lif1.v"."""
    return {
        f"{name}.{slot}" if name else slot: value
        for name, module, adapter in named_stateful(model)
        for slot, value in zip(adapter.names(module), adapter.read(module), strict=True)
    }

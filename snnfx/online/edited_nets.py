"""The nets that a learning rule runs: the model with the rule's graph edits, cached on the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from snnfx.analysis.dependence import is_random
from snnfx.convert import apply_edits, convert
from snnfx.errors import InputError, warn_once
from snnfx.ir.facts import VALUE
from snnfx.ir.graph_pass import Pass
from snnfx.ir.module_effects import keeps_statistics
from snnfx.ir.options import time_dims_of_leaves
from snnfx.ir.program import StepProgram
from snnfx.online.learning_rules import Rule
from snnfx.online.step_replay import ReplayContext
from snnfx.ops.online_functions import draw_dropout_mask
from snnfx.passes.cut_layers import CutLayers
from snnfx.passes.cut_spatial_edges import CutSpatialEdges
from snnfx.passes.cut_temporal_edges import CutTemporalEdges
from snnfx.passes.hold_dropout import HoldDropout
from snnfx.passes.read_states_as_inputs import ReadStatesAsInputs
from snnfx.passes.tap_layers import TapLayers
from snnfx.passes.trace_operands import TraceOperands
from snnfx.runtime.net import Net
from snnfx.runtime.whole_sequences import refuse_whole_sequences
from snnfx.sandbox.torch_internals import pytree
from snnfx.state.carry import outputs_without

__all__ = ["EditedNets", "edited_nets_of", "edits_of", "signature_of"]

_CACHE = "_snnfx_online_nets"


def edits_of(rule: Rule) -> list[Pass]:
    """The graph edits of a rule, in the order in which they run."""
    edits: list[Pass] = []
    if rule.dropout == "sequence":
        edits.append(HoldDropout())
    if rule.signal == "readout":
        edits.append(CutSpatialEdges())
    if rule.temporal == "cut":
        edits.append(CutTemporalEdges(slots=rule.cut))
    if rule.operand == "trace":
        edits.append(TraceOperands(leak=rule.trace_leak, inputs=rule.trace_inputs, biases=rule.trace_bias))
    return edits


class EditedNets:
    """The forms of a model that a rule runs, each built at its first use.

    `sequence` runs a sequence and `step` a single time step. `from_states` runs steps whose states are given, all at
    once. `separate_layers` and `tapped_layers` are the two nets of OSTL, see `snnfx.passes.cut_layers`.

    Args:
        base: the converted model.
        rule: the learning rule, which determines the edits.
        batch_norm: "per_step" or "fold".

    Raises:
        InputError: SNNFX616 if the net reduces its outputs over time.
    """

    def __init__(self, base: Net, rule: Rule, batch_norm: str) -> None:
        refuse_whole_sequences(base.program, "online training")
        if base.options.reduce is not None:
            raise InputError(
                "SNNFX616",
                f"cannot train a net with reduce={base.options.reduce!r} online",
                why="an online rule evaluates a loss at every time step, and this net returns no output per step.",
                hint="Convert the model without reduce=.",
            )
        self.base, self.batch_norm = base, batch_norm
        self.edits = edits_of(rule)
        self.sequence = self._edited("m")
        self._step: Net | None = None
        self._from_states: Net | None = None
        self._layers: tuple[Net, Net] | None = None
        self._properties: tuple[StepProgram, _StepProperties] | None = None

    def _edited(self, step_mode: str, *more_edits: Pass) -> Net:
        return apply_edits(
            self.base,
            [*self.edits, *more_edits],
            step_mode=step_mode,
            # The base net binds the arguments and moves time to dim 0.
            time_dim=0 if more_edits else self._time_dim_zero(),
            batch_norm=self.batch_norm,
            carry_state=False,
            chunk=None,
            checkpoint=None,
        )

    def _time_dim_zero(self) -> Any:
        """The option `time_dim` of the base net, with 0 for every input that has a time dimension."""
        option, program = self.base.options.time_dim, self.base.program
        if option is None or isinstance(option, int):
            return None if option is None else 0
        dims = [None if dim is None else 0 for dim in time_dims_of_leaves(option, program)]
        args, kwargs = pytree.tree_unflatten(dims, program.input_spec)
        return (*args, *kwargs.values())

    @property
    def step(self) -> Net:
        """The net for a single time step."""
        if self._step is None:
            self._step = self._edited("s")
        return self._step

    @property
    def from_states(self) -> Net:
        """The net whose slots are inputs: it runs any set of steps at once, given the states before them."""
        if self._from_states is None:
            self._from_states = self._edited("m", ReadStatesAsInputs())
        return self._from_states

    @property
    def separate_layers(self) -> Net:
        """The net without gradients between layers, which also returns the layer outputs."""
        return self._layer_nets()[0]

    @property
    def tapped_layers(self) -> Net:
        """The net without gradients through time, which takes an input to add to each layer output."""
        return self._layer_nets()[1]

    def _layer_nets(self) -> tuple[Net, Net]:
        if self._layers is None:
            self._layers = self._edited("m", CutLayers()), self._edited("m", TapLayers(), CutTemporalEdges())
        for net in self._layers:
            net.__dict__["training"] = self.sequence.training
        return self._layers

    @property
    def has_uniform_steps(self) -> bool:
        """Whether all steps compute the same function of input and state, without random numbers."""
        return self._step_properties().is_uniform

    def replay_context(self) -> ReplayContext:
        """A snapshot of the buffers and the RNG state, to run the following steps again later."""
        properties = self._step_properties()
        return ReplayContext(
            properties.modules_with_statistics, properties.is_random, self.sequence.persistent_state.snapshot
        )

    def _step_properties(self) -> _StepProperties:
        program = self.sequence.program
        if self._properties is None or self._properties[0] is not program:
            self._properties = (program, _step_properties_of(program))
        return self._properties[1]

    def run_recording(
        self, leaves: list[Tensor], carried: dict[str, Any], state: dict[str, Any] | None, T: int, record: Sequence[str]
    ) -> tuple[Any, dict[str, Any], dict[str, Tensor]]:
        """Run `T` steps and record some slots after each of them, `[T, *]`."""
        program, tensors = self.sequence.program, iter(leaves)
        values = [next(tensors) if leaf.placeholder else leaf.constant for leaf in program.input_leaves]
        args, kwargs = pytree.tree_unflatten(values, program.input_spec)
        result = self.sequence.run(*args, **kwargs, **carried, state=state, record=record, T=T)
        return result if record else (*result, {})

    def run_from_states(self, leaves: list[Tensor], states: list[Tensor], T: int) -> Any:
        """Run `T` steps, given the states before them `[T, *]` in the order of the slots."""
        self.from_states.__dict__["training"] = self.sequence.training
        outputs, _ = self.from_states.run_bound(self._with_extra_inputs(leaves, states, T), {}, None, T)
        return outputs_without(outputs, [c.path for c in self.sequence.program.carried])

    def run_separate_layers(
        self, leaves: list[Tensor], carried: dict[str, Any], state: dict[str, Any] | None, T: int
    ) -> tuple[Any, list[Tensor], dict[str, Any]]:
        """Run `T` steps without gradients between layers.

        Returns:
            The outputs, the layer outputs, and the final state.
        """
        inputs = self._with_extra_inputs(leaves, [], T)
        (outputs, layer_outputs), after = self.separate_layers.run_bound(inputs, carried, state, T)
        return outputs, layer_outputs, after

    def run_tapped_layers(
        self, leaves: list[Tensor], taps: list[Tensor], carried: dict[str, Any], state: dict[str, Any] | None, T: int
    ) -> Any:
        """Run `T` steps without gradients through time, adding the taps `[T, *]` to the layer outputs."""
        return self.tapped_layers.run_bound(self._with_extra_inputs(leaves, taps, T), carried, state, T)[0]

    def _with_extra_inputs(self, leaves: list[Tensor], extra: list[Tensor], T: int) -> list[Tensor]:
        """Expand all inputs over time, and insert extra ones after the positional arguments."""
        pairs = zip(leaves, self.base.varying_inputs, strict=True)
        sequences = [x if varies else x.expand(T, *x.shape) for x, varies in pairs]
        count = self.base.positional_inputs
        return [*sequences[:count], *extra, *sequences[count:]]

    @property
    def step_elements(self) -> int:
        """Elements of the largest state of one step of the example inputs; 0 without example inputs."""
        values = [VALUE.of(node) for node in self.sequence.program.slot_nodes()]
        return max((v.numel() for v in values if isinstance(v, Tensor)), default=0)

    def set_mode(self, training: bool) -> None:
        """Set training or evaluation mode, without changing the modules that the nets share with the model."""
        for net in (self.sequence, self._step, self._from_states):
            if net is not None:
                net.__dict__["training"] = training


@dataclass(frozen=True)
class _StepProperties:
    """Properties of a step that matter when it runs a second time.

    Args:
        is_random: whether it draws random numbers, at each step or once per sequence.
        is_uniform: whether all steps compute the same function of input and state, without random numbers.
        modules_with_statistics: the modules whose buffers change in training.
    """

    is_random: bool
    is_uniform: bool
    modules_with_statistics: tuple[nn.Module, ...]


def _step_properties_of(program: StepProgram) -> _StepProperties:
    calls = [
        n for p in (program, program.first_step) if p is not None for n in p.graph.nodes if n.op.startswith("call")
    ]
    random_calls = [n for n in calls if is_random(program, n)]
    draws_each_step = any(n.target is not draw_dropout_mask for n in random_calls)
    may_differ = program.first_step is not None or bool(program.opaque)
    modules = {module: None for n in calls if keeps_statistics(program, n) and (module := program.module_of(n))}
    opaque = dict.fromkeys(program.source.get_submodule(name) for name in program.opaque)
    return _StepProperties(
        is_random=bool(random_calls or opaque),
        is_uniform=not (draws_each_step or may_differ),
        modules_with_statistics=tuple(modules | opaque),
    )


class _NetCache(dict[Any, Any]):
    """Cache of nets on a model; a copied or unpickled model starts with an empty one."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _NetCache:
        return _NetCache()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _NetCache, ()


def edited_nets_of(model: nn.Module, rule: Rule, batch_norm: str, example_inputs: Any) -> EditedNets:
    """Build the nets of a rule, or return the cached ones if the modules of the model are still the same.

    Args:
        model: a net, or a single-step model.
        rule: the learning rule. Rules with the same edits share their nets.
        batch_norm: "per_step" or "fold".
        example_inputs: the arguments of one step, for a model that is not converted.
    """
    cache: _NetCache = model.__dict__.setdefault(_CACHE, _NetCache())
    signature = () if isinstance(model, Net) else signature_of(example_inputs)
    modules = tuple(map(id, getattr(model, "source", model).modules()))
    key = (tuple(edits_of(rule)), batch_norm, signature)
    if key not in cache or cache[key][0] != modules:
        if isinstance(model, Net) and (model.options.memory_budget is not None or model.options.checkpoint != "auto"):
            ignored = "online training ignores checkpoint= and memory_budget= of the net"
            warn_once("SNNFX508", f"{ignored}. Bound its memory with chunk= of the Trainer.")
        base = (
            model
            if isinstance(model, Net)
            else convert(model, example_inputs=example_inputs, chunk=None, checkpoint=None)
        )
        cache[key] = (modules, EditedNets(base.convert_to("m"), rule, batch_norm))
    return cache[key][1]  # type: ignore[no-any-return]


def signature_of(example_inputs: Any) -> tuple[Any, ...]:
    """Shape, dtype and device of the arguments of a step: a model is captured once for each signature."""
    leaves = pytree.tree_leaves(example_inputs)
    return tuple((tuple(x.shape), x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves)

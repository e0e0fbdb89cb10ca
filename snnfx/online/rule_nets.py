"""The nets that a rule runs: those of a model, with the rule's edits; made once for a model and kept with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from snnfx.analysis.dependence import is_random
from snnfx.convert import apply_edits, convert
from snnfx.errors import InputError, warn_once
from snnfx.ir.graph_pass import Pass
from snnfx.ir.module_effects import keeps_statistics
from snnfx.ir.options import time_dims_of_leaves
from snnfx.ir.program import StepProgram
from snnfx.online.learning_rules import Rule
from snnfx.online.repeated_steps import RepeatContext
from snnfx.ops.online_functions import draw_dropout_mask
from snnfx.passes.cut_layers import CutLayers
from snnfx.passes.cut_spatial_edges import CutSpatialEdges
from snnfx.passes.cut_temporal_edges import CutTemporalEdges
from snnfx.passes.hold_dropout import HoldDropout
from snnfx.passes.read_states_as_inputs import ReadStatesAsInputs
from snnfx.passes.tap_layers import TapLayers
from snnfx.passes.trace_operands import TraceOperands
from snnfx.runtime.net import Net
from snnfx.sandbox.torch_internals import pytree
from snnfx.state.carry import outputs_without

__all__ = ["RuleNets", "edits_of", "nets_for", "shapes_of"]

_CACHE = "_snnfx_online_nets"


def edits_of(rule: Rule) -> list[Pass]:
    """The graph edits of a rule, in order."""
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


class RuleNets:
    """The forms in which a rule runs a model, each made when it is first needed.

    `sequence` takes sequences, `step` one step, `known` steps whose states are known; `own` and `between` are the two
    forms of layers.

    Args:
        base: the model, converted.
        rule: says what to edit.
        batch_norm: "per_step" or "fold".
    """

    def __init__(self, base: Net, rule: Rule, batch_norm: str) -> None:
        if base.options.reduce is not None:
            raise InputError(
                "SNNFX616",
                f"a net with reduce={base.options.reduce!r} has no output at each step",
                why="an online rule takes a loss at every step.",
                hint="Convert without reduce=.",
            )
        self.base, self.batch_norm = base, batch_norm
        self.edits = edits_of(rule)
        self.sequence = self._edited("m")
        self._step: Net | None = None
        self._known: Net | None = None
        self._layers: tuple[Net, Net] | None = None
        self._found: tuple[StepProgram, _Findings] | None = None

    def _edited(self, step_mode: str, *more: Pass) -> Net:
        return apply_edits(
            self.base,
            [*self.edits, *more],
            step_mode=step_mode,
            # Time is in front where these nets run; the base binds the arguments.
            time_dim=0 if more else self._time_in_front(),
            batch_norm=self.batch_norm,
            carry_state=False,
            chunk=None,
            checkpoint=None,
        )

    def _time_in_front(self) -> Any:
        """The option `time_dim` of the base, with 0 for every sequence."""
        option, program = self.base.options.time_dim, self.base.program
        if option is None or isinstance(option, int):
            return None if option is None else 0
        dims = [None if dim is None else 0 for dim in time_dims_of_leaves(option, program)]
        args, kwargs = pytree.tree_unflatten(dims, program.input_spec)
        return (*args, *kwargs.values())

    @property
    def step(self) -> Net:
        """The form that takes one step."""
        if self._step is None:
            self._step = self._edited("s")
        return self._step

    @property
    def has_known_form(self) -> bool:
        """Whether a step whose state is known is the same whenever it is run."""
        return self._findings().is_repeatable

    def moment(self) -> RepeatContext:
        """What the next steps meet, to run them again later."""
        return RepeatContext(self._findings().counting, self._findings().draws)

    def _findings(self) -> _Findings:
        program = self.sequence.program
        if self._found is None or self._found[0] is not program:
            self._found = (program, _findings_of(program))
        return self._found[1]

    @property
    def known(self) -> Net:
        """The form that takes steps whose states are known, all at once: the slots are inputs, and all have time."""
        if self._known is None:
            self._known = self._edited("m", ReadStatesAsInputs())
        return self._known

    def run_recording(
        self, leaves: list[Tensor], given: dict[str, Any], state: dict[str, Any] | None, T: int, record: Sequence[str]
    ) -> tuple[Any, dict[str, Any], dict[str, Tensor]]:
        """Some steps of the sequence, and the values of some slots after each of them, `[T, *]`."""
        program, tensors = self.sequence.program, iter(leaves)
        values = [next(tensors) if leaf.placeholder else leaf.constant for leaf in program.input_leaves]
        args, kwargs = pytree.tree_unflatten(values, program.input_spec)
        found = self.sequence.run(*args, **kwargs, **given, state=state, record=record, T=T)
        return found if record else (*found, {})

    @property
    def layers(self) -> tuple[Net, Net]:
        """The forms that return what leaves each layer, and that add something to it: `snnfx.passes.cut_layers`."""
        if self._layers is None:
            self._layers = self._edited("m", CutLayers()), self._edited("m", TapLayers(), CutTemporalEdges())
        for net in self._layers:
            net.__dict__["training"] = self.sequence.training
        return self._layers

    def run_known(self, leaves: list[Tensor], states: list[Tensor], T: int) -> Any:
        """Some steps, from the states before them `[T, *]`, in the order of the slots."""
        self.known.__dict__["training"] = self.sequence.training
        outputs, _ = self.known.run_bound(self._with_more(leaves, states, T), {}, None, T)
        return outputs_without(outputs, [c.path for c in self.sequence.program.carried])

    def run_layers(
        self, leaves: list[Tensor], given: dict[str, Any], state: dict[str, Any] | None, T: int
    ) -> tuple[Any, list[Tensor], dict[str, Any]]:
        """Some steps without a gradient between layers: `(outputs, what leaves the layers, final state)`."""
        (outputs, values), after = self.layers[0].run_bound(self._with_more(leaves, [], T), given, state, T)
        return outputs, values, after

    def run_between_layers(
        self, leaves: list[Tensor], taps: list[Tensor], given: dict[str, Any], state: dict[str, Any] | None, T: int
    ) -> Any:
        """Some steps without a gradient through time; the taps, `[T, *]`, are added to what leaves the layers."""
        return self.layers[1].run_bound(self._with_more(leaves, taps, T), given, state, T)[0]

    def _with_more(self, leaves: list[Tensor], more: list[Tensor], T: int) -> list[Tensor]:
        """The inputs, all with time, and further ones behind those that are positional arguments."""
        pairs = zip(leaves, self.base.varying_inputs, strict=True)
        sequences = [x if varies else x.expand(T, *x.shape) for x, varies in pairs]
        count = self.base.positional_inputs
        return [*sequences[:count], *more, *sequences[count:]]

    @property
    def step_elements(self) -> int:
        """Elements of the largest state of one step in the example; 0 where the net was converted without one."""
        values = [node.meta.get("val") for node in self.sequence.program.slot_nodes()]
        return max((v.numel() for v in values if isinstance(v, Tensor)), default=0)

    def set_mode(self, training: bool) -> None:
        """Training or evaluation, as the model is now."""
        for net in (self.sequence, self._step, self._known):
            if net is not None:
                net.__dict__["training"] = training


@dataclass(frozen=True)
class _Findings:
    """What matters of a step that is run again.

    Args:
        draws: whether it draws random numbers, at each step or once for a sequence.
        is_repeatable: whether it is the same for every step, apart from its state, and draws nothing at each.
        counting: the modules whose buffers change when they are run in training.
    """

    draws: bool
    is_repeatable: bool
    counting: tuple[nn.Module, ...]


def _findings_of(program: StepProgram) -> _Findings:
    calls = [
        n for p in (program, program.first_step) if p is not None for n in p.graph.nodes if n.op.startswith("call")
    ]
    drawing = [n for n in calls if is_random(program, n)]
    each_step = any(n.target is not draw_dropout_mask for n in drawing)
    unlike = program.first_step is not None or bool(program.opaque)
    modules = {module: None for n in calls if keeps_statistics(program, n) and (module := program.module_of(n))}
    opaque = dict.fromkeys(program.source.get_submodule(name) for name in program.opaque)
    return _Findings(bool(drawing or opaque), not (each_step or unlike), tuple(modules | opaque))


class _NetCache(dict[Any, Any]):
    """Nets kept with a model: a copy or a pickle of the model starts without them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _NetCache:
        return _NetCache()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _NetCache, ()


def nets_for(model: nn.Module, rule: Rule, batch_norm: str, example_inputs: Any) -> RuleNets:
    """The nets of a rule for a model, made the first time and again when the model was rebuilt.

    Args:
        model: a net, or a single-step model.
        rule: only its edits count.
        batch_norm: "per_step" or "fold".
        example_inputs: the arguments of one step, for a model that is not converted.
    """
    kept: _NetCache = model.__dict__.setdefault(_CACHE, _NetCache())
    shapes = () if isinstance(model, Net) else shapes_of(example_inputs)
    modules = tuple(map(id, getattr(model, "source", model).modules()))
    key = (tuple(edits_of(rule)), batch_norm, shapes)
    if key not in kept or kept[key][0] != modules:
        if isinstance(model, Net) and (model.options.memory_budget is not None or model.options.checkpoint != "auto"):
            told = "checkpoint= and memory_budget= of the net are not looked at by an online rule"
            warn_once("SNNFX508", f"{told}: chunk= of the Trainer bounds its memory.")
        base = (
            model
            if isinstance(model, Net)
            else convert(model, example_inputs=example_inputs, chunk=None, checkpoint=None)
        )
        kept[key] = (modules, RuleNets(base.convert_to("m"), rule, batch_norm))
    return kept[key][1]  # type: ignore[no-any-return]


def shapes_of(example_inputs: Any) -> tuple[Any, ...]:
    """What a model is captured with: shapes, types and devices of the arguments of a step."""
    leaves = pytree.tree_leaves(example_inputs)
    return tuple((tuple(x.shape), x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves)

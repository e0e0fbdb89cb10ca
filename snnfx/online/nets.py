"""The nets that a rule runs: those of a model, with the rule's edits; made once for a model and kept with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from snnfx.convert import convert, edited
from snnfx.errors import InputError
from snnfx.net import Net
from snnfx.online.rules import Rule
from snnfx.passes.base import Pass
from snnfx.passes.detach import CutTemporalEdges
from snnfx.passes.hold_dropout import HoldDropout
from snnfx.passes.known_states import ReadStatesAsInputs
from snnfx.passes.signal import CutSpatialEdges
from snnfx.passes.trace import TraceOperands

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

    def _edited(self, step_mode: str, *more: Pass) -> Net:
        time_dim = self.base.options.time_dim
        return edited(
            self.base,
            [*self.edits, *more],
            step_mode=step_mode,
            # Time is in front where these nets run; the base binds the arguments.
            time_dim=0 if isinstance(time_dim, int) else time_dim,
            batch_norm=self.batch_norm,
            carry_state=False,
            chunk=None,
            checkpoint=None,
        )

    @property
    def step(self) -> Net:
        """The form that takes one step."""
        if self._step is None:
            self._step = self._edited("s")
        return self._step

    @property
    def known(self) -> Net:
        """The form that takes steps whose states are known, all at once: the slots are inputs."""
        if self._known is None:
            self._known = self._edited("m", ReadStatesAsInputs())
        return self._known

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


class _Kept(dict[Any, Any]):
    """Nets kept with a model: a copy or a pickle of the model starts without them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Kept:
        return _Kept()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _Kept, ()


def nets_for(model: nn.Module, rule: Rule, batch_norm: str, example_inputs: Any) -> RuleNets:
    """The nets of a rule for a model, made the first time and again when the model was rebuilt.

    Args:
        model: a net, or a single-step model.
        rule: only its edits count.
        batch_norm: "per_step" or "fold".
        example_inputs: the arguments of one step, for a model that is not converted.
    """
    kept: _Kept = model.__dict__.setdefault(_CACHE, _Kept())
    shapes = () if isinstance(model, Net) else shapes_of(example_inputs)
    modules = tuple(map(id, getattr(model, "source", model).modules()))
    key = (tuple(edits_of(rule)), batch_norm, shapes)
    if key not in kept or kept[key][0] != modules:
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

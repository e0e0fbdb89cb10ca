"""Match the separate first step of a program with its later steps, so that only the loops run the first step apart.

With `batch_norm="fold"`, a BatchNorm in training takes its statistics over all time steps. A first step that runs
apart as a whole would take statistics of its own. Where every operation outside the loops is the same in the first step
and in the later steps, these operations run once for all time steps, and each loop runs the first step in a graph of
its own. A value that a loop returns may be computed by other operations at the first step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node, map_arg

from snnfx.analysis.foldable_loops import folds_when_cut, is_trace_loop
from snnfx.analysis.statistics_over_time import takes_batch_statistics
from snnfx.ir.facts import INPUT, MODULE, SLOT, WHERE
from snnfx.ir.module_effects import has_effects
from snnfx.ir.printing import describe_node, location_of
from snnfx.ir.program import Region, StepProgram
from snnfx.ops.step_functions import expect_size
from snnfx.state.step_calls import call_opaque, call_stateful

__all__ = ["FirstStepMatch", "FirstStepOfLoop", "match_first_step"]


@dataclass
class FirstStepOfLoop:
    """The first step of one loop.

    Args:
        nodes: the nodes of the first step that the loop computes, in program order.
        attributes: the `get_attr` nodes of the first step that it reads.
        counterparts: value of the later steps -> value of the first step, for the values that the loop returns.
        next_states: slot -> its value after the first step.
        reads: node of the first step that the loop reads -> the value of all time steps that contains it.
    """

    nodes: list[Node] = field(default_factory=list)
    attributes: list[Node] = field(default_factory=list)
    counterparts: dict[Node, Node] = field(default_factory=dict)
    next_states: dict[str, Any] = field(default_factory=dict)
    reads: dict[Node, Node] = field(default_factory=dict)


@dataclass
class FirstStepMatch:
    """The result of `match_first_step`.

    Args:
        loops: name of a loop region whose first step runs other operations than the later steps -> its first step.
        norms: the norms that take statistics over all time steps.
        refusal: why the first step runs apart as a whole, as a clause; "" if only the loops run it apart.
    """

    loops: dict[str, FirstStepOfLoop]
    norms: list[Node]
    refusal: str = ""


def _norms_of_both_steps(program: StepProgram) -> list[Node]:
    """The norms that take statistics over all time steps and that a separate first step calls as well."""
    first = program.first_step
    if first is None or not program.training:
        return []
    called = {_norm_key(node) for node in first.graph.nodes if takes_batch_statistics(first, node)}
    folded = (node for region in program.regions if region.kind == "fold" for node in region.nodes)
    return [node for node in folded if takes_batch_statistics(program, node) and _norm_key(node) in called]


def match_first_step(program: StepProgram) -> FirstStepMatch | None:
    """Match the first step of a partitioned program with its later steps.

    Returns:
        None unless the program has a separate first step and norms that take statistics over all time steps.
    """
    norms = _norms_of_both_steps(program)
    if not norms:
        return None
    try:
        return FirstStepMatch(_Matcher(program).loops(), norms)
    except _Differs as difference:
        return FirstStepMatch({}, norms, str(difference))


class _Differs(Exception):
    """The steps differ outside the loops."""


def _norm_key(node: Node) -> Any:
    """The module that a node calls, or its function."""
    owner = node.args[0] if node.target in (call_opaque, call_stateful) else None
    return owner.target if isinstance(owner, Node) else node.target


class _Matcher:
    """Finds the value of the first step for each value outside the loops, in program order."""

    def __init__(self, program: StepProgram) -> None:
        assert program.first_step is not None
        self.program, self.first = program, program.first_step
        self.loop_of = {n: r for r in program.regions if r.kind == "loop" and r.slots for n in r.nodes}
        self.position = {region.name: index for index, region in enumerate(program.regions)}
        self.region_of = {n: region for region in program.regions for n in region.nodes}
        self.counterparts: dict[Node, Node] = {}
        self.initial_of = dict(zip((s.name for s in program.slots), program.initial_values, strict=True))
        self.first_initial_of = dict(zip((s.name for s in self.first.slots), self.first.initial_values, strict=True))
        self.inside: set[Node] = set()
        """The nodes of the loop that is compared with the first step."""
        self.loop_slots = {slot for region in program.regions for slot in region.slots}

    def loops(self) -> dict[str, FirstStepOfLoop]:
        """The first step of each loop in which it runs other operations than the later steps.

        Raises:
            _Differs: the steps differ outside the loops.
        """
        if self.program.persistent_slots:
            raise _Differs(f"`{self.program.persistent_slots[0].name}` lives on from call to call")
        for region in self.program.regions:
            if is_trace_loop(region) or folds_when_cut(self.program, region):
                raise _Differs(f"the state of {region.name} is detached")
        for node in self.program.input_nodes():
            self._match(node, self._input_like(node))
        matched = self._match_outside()
        if not self._match(self.program.outputs, self.first.outputs):
            raise _Differs("the outputs are other values")
        self._match_states_outside()
        found = {r.name: self._first_step_of(r) for r in self.program.regions if r.kind == "loop" and r.slots}
        self._refuse_lost_effects(matched, found.values())
        loops = (region for region in self.program.regions if region.name in found)
        return {region.name: found[region.name] for region in loops if not self._is_same(region, found[region.name])}

    def _input_like(self, node: Node) -> Node | None:
        return next((n for n in self.first.input_nodes() if INPUT.of(n) == INPUT.of(node)), None)

    def _match_outside(self) -> set[Node]:
        """Match all operations outside the loops; returns their counterparts."""
        free: dict[Any, list[Node]] = {}
        for node in self.first.graph.nodes:
            if node.op.startswith("call"):
                free.setdefault((node.op, node.target), []).append(node)
        used: set[Node] = set()
        for node in self.program.graph.nodes:
            if not node.op.startswith("call") or node in self.loop_of or node not in self.region_of:
                continue
            candidates = [n for n in free.get((node.op, node.target), ()) if n not in used]
            candidates.sort(key=lambda n: (WHERE.of(n), MODULE.of(n)) != (WHERE.of(node), MODULE.of(node)))
            found = self.counterparts.get(node) or next((n for n in candidates if self._match(node, n)), None)
            if found is None:
                place = f" ({location_of(node)})" if location_of(node) else ""
                raise _Differs(f"`{describe_node(node)}`{place} has other operands or does not run at the first step")
            used.add(found)
        return used

    def _match(self, later: Any, first: Any) -> bool:
        """Whether two values are the same operation on values that match; if not, no match is added."""
        before = dict(self.counterparts)
        if self._same(later, first):
            return True
        self.counterparts = before
        return False

    def _same(self, later: Any, first: Any) -> bool:
        if isinstance(later, Node):
            return isinstance(first, Node) and self._same_node(later, first)
        if type(later) is not type(first):
            return False
        if isinstance(later, slice):
            return self._same((later.start, later.stop, later.step), (first.start, first.stop, first.step))
        if isinstance(later, tuple | list):
            return len(later) == len(first) and all(map(self._same, later, first))
        if isinstance(later, dict):
            return later.keys() == first.keys() and all(self._same(later[k], first[k]) for k in later)
        return bool(later == first) or (later != later and first != first)

    def _same_node(self, later: Node, first: Node) -> bool:
        if later in self.counterparts:
            return self.counterparts[later] is first
        if later.op == "get_attr":
            return first.op == "get_attr" and self.program.resolve(str(later.target)) is self.first.resolve(
                str(first.target)
            )
        if later not in self.inside and (later in self.loop_of or SLOT.of(later) in self.loop_slots):
            # A slot outside its loop has the shape of the later steps.
            same = later.op != "placeholder" and not SLOT.is_known(first)
        elif later.op == "placeholder":
            same = self._same_placeholder(later, first)
        else:
            same = (later.op, later.target) == (first.op, first.target)
            same = same and self._same(tuple(later.args), tuple(first.args)) and self._same(later.kwargs, first.kwargs)
        if same:
            self.counterparts[later] = first
        return same

    def _same_placeholder(self, later: Node, first: Node) -> bool:
        if first.op != "placeholder" or (SLOT.of(later), INPUT.of(later)) != (SLOT.of(first), INPUT.of(first)):
            return False
        if not SLOT.is_known(later):
            return True
        initial = self.initial_of[SLOT.of(later)]
        return initial is not None and self._same(initial, self.first_initial_of[SLOT.of(later)])

    def _match_states_outside(self) -> None:
        """Match the next values of the slots that no loop carries."""
        following = dict(zip((s.name for s in self.first.slots), self.first.next_states, strict=True))
        for slot, value in zip(self.program.slots, self.program.next_states, strict=True):
            if slot.name not in self.loop_slots and not self._match(value, following[slot.name]):
                raise _Differs(f"the next value of `{slot.name}` is another one")

    def _first_step_of(self, region: Region) -> FirstStepOfLoop:
        """The part of the first step that a loop computes."""
        following = dict(zip((s.name for s in self.first.slots), self.first.next_states, strict=True))
        step = FirstStepOfLoop(next_states={slot: following[slot] for slot in region.slots})
        step.counterparts = {n: self.counterparts[n] for n in region.nodes if n in self.counterparts}
        available = self._available_to(region)
        computed: set[Node] = set()
        pending = [*step.counterparts.values(), *_nodes_in(list(step.next_states.values()))]
        while pending:
            node = pending.pop()
            if node in computed or node in step.reads or node in step.attributes:
                continue
            if node.op == "get_attr":
                step.attributes.append(node)
            elif node in available:
                step.reads[node] = available[node]
            elif SLOT.is_known(node):
                computed.add(node)
                pending += _nodes_in(self.first_initial_of[SLOT.of(node)])
            elif node.op == "placeholder":
                raise _Differs(f"{region.name} reads `{node.name}` at the first step alone")
            else:
                computed.add(node)
                pending += node.all_input_nodes
        step.nodes = [n for n in self.first.graph.nodes if n in computed]
        return step

    def _is_same(self, region: Region, step: FirstStepOfLoop) -> bool:
        """Whether the first step of a loop is a later step, from initial values that the program knows."""
        following = dict(zip((s.name for s in self.program.slots), self.program.next_states, strict=True))
        before, self.inside = self.counterparts, set(region.nodes)
        self.counterparts = {n: first for n, first in before.items() if n not in self.inside}
        pairs = [*step.counterparts.items(), *((following[s], first) for s, first in step.next_states.items())]
        same = all(self._same(later, first) for later, first in pairs)
        self.counterparts, self.inside = before, set()
        return same

    def _available_to(self, region: Region) -> dict[Node, Node]:
        """The values of the first step that a loop may read -> the values of all time steps that contain them."""
        read = {operand for node in region.nodes for operand in node.all_input_nodes}
        available: dict[Node, Node] = {}
        for later, first in sorted(self.counterparts.items(), key=lambda pair: pair[0] not in read):
            source = self.region_of.get(later)
            is_input = later.op == "placeholder" and not SLOT.is_known(later)
            is_earlier = source is not None and self.position[source.name] < self.position[region.name]
            if is_input or is_earlier:
                available.setdefault(first, later)
        return available

    def _refuse_lost_effects(self, matched: set[Node], loops: Iterable[FirstStepOfLoop]) -> None:
        computed = [node for loop in loops for node in loop.nodes]
        for node in self.first.graph.nodes:
            if not (node.target is expect_size or has_effects(self.first, node)):
                continue
            times = computed.count(node) + (node in matched)
            if times != 1:
                raise _Differs(f"`{describe_node(node)}` of the first step belongs to {times or 'no'} regions")


def _nodes_in(value: Any) -> Iterator[Node]:
    found: list[Node] = []
    map_arg(value, found.append)
    yield from found

"""Re-roll the iterations of a loop into one step program, and call it from the graph of the whole call."""

from __future__ import annotations

import itertools
import linecache
import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node, map_arg

from snnfx.ir.edits import add_placeholder
from snnfx.ir.facts import ELEMENT, ITERATIONS, MODULE, SLOT, STRUCTURAL, VALUE, WHERE
from snnfx.ir.guards import Guards
from snnfx.ir.nodes import is_module_call, is_structural, without_detach
from snnfx.ir.printing import describe_node, operation_name
from snnfx.ir.program import InputLeaf, Slot, StepProgram
from snnfx.ops.elements import hold, write_elements
from snnfx.ops.run_loop import run_loop
from snnfx.ops.step_functions import set_part
from snnfx.sandbox.torch_internals import pytree
from snnfx.sequence.alignment import Alignment
from snnfx.sequence.element_reads import common_index
from snnfx.sequence.loop_runs import LoopRun
from snnfx.sequence.roles import Carried, Differs, Outside, Own, Varying, has_type_of, map_roles
from snnfx.sequence.step_inputs import FILLS, StepInputs
from snnfx.state.registry import adapter_of

__all__ = ["RolledLoop", "reroll"]


@dataclass
class RolledLoop:
    """A loop as a step program.

    Args:
        program: one iteration; its inputs are sequences and values that are the same in each iteration.
        varying: for each input, whether it is a sequence.
        location: the user's file and line of the loop.
        target: the get_attr target of the loop in the graph of the call.
    """

    program: StepProgram
    varying: list[bool]
    location: str
    target: str


def reroll(program: StepProgram, run: LoopRun, alignment: Alignment, name: str, any_length: bool = False) -> RolledLoop:
    """Replace the iterations of a loop in the graph of a call by one call of `run_loop`.

    Args:
        program: the program of the whole call, which is changed.
        run: the loop.
        alignment: its common step.
        name: the get_attr target of the loop.
        any_length: whether the number of iterations follows from the inputs.

    Raises:
        Differs: a value of an iteration is used in a way that a step cannot return; nothing is changed.
    """
    return _Reroll(program, run, alignment, name, any_length).rolled()


@dataclass(frozen=True)
class _Write:
    """Writes of the elements `start`, `start + step`, ... of one dimension of a tensor, one in each iteration.

    Args:
        tensor: the tensor before the loop.
        dim, start, step: the elements.
        position: the position of the written value.
    """

    tensor: Node
    dim: int
    start: int
    step: int
    position: int


class _Reroll:
    def __init__(self, program: StepProgram, run: LoopRun, alignment: Alignment, name: str, any_length: bool) -> None:
        self.program, self.run, self.alignment, self.name = program, run, alignment, name
        self.inside = {node for body in alignment.bodies for node in body}
        self.position_of = {
            alignment.value(i, p): (i, p)
            for i in range(alignment.count)
            for p in range(len(alignment.template))
            if isinstance(alignment.value(i, p), Node)
        }
        self.graph = fx.Graph()
        self.anchor = alignment.bodies[0][0]
        self.inputs = StepInputs(program, self.graph, self.anchor, any_length)
        self.nodes: list[Node] = []
        """The nodes of the step, by position."""
        self.slots: dict[int, Node] = {}
        """The placeholder of each carried position."""
        self.slot_names: dict[int, str] = {}
        self.state_of: dict[int, Node] = {}
        """The slot of the whole call that a carried position threads."""
        self.first_nodes: dict[Node, Node] = {}
        self.writes = self._writes_of_elements()
        self._numbers_are_accepted: bool | None = None

    def rolled(self) -> RolledLoop:
        self._check_uses()
        with self.program.graph.inserting_before(self.anchor):
            self._add_slots()
            self._check_initial_values()
            self._add_nodes()
            initial = [self._initial_value(p) for p in self.slots]
        outputs = self._outputs()
        nexts = [self.nodes[p] for p in self.slots]
        self.graph.output((tuple(self.nodes[p] for p in outputs), tuple(nexts), tuple(initial)))
        step = self._step_program(len(outputs))
        self._replace(outputs)
        return RolledLoop(step, list(self.inputs.varying), self.run.location, self.name)

    def _writes_of_elements(self) -> dict[int, _Write]:
        """The positions that write one element of a tensor from outside the loop: `out[t] = y`."""
        found: dict[int, _Write] = {}
        for position, node in enumerate(self.alignment.template):
            args, _ = self.alignment.arguments[position]
            if node.target is not set_part or args[0] != Carried(position) or not isinstance(args[2], Own):
                continue
            readers = [n for n in node.users if n in self.inside]
            start = self.alignment.initial.get(position)
            if len(readers) != 1 or not isinstance(start, Node) or start in self.inside or start.op == "placeholder":
                continue
            nodes = [self.alignment.value(i, position) for i in range(self.alignment.count)]
            index = common_index(start, [n.args[1] for n in nodes]) if isinstance(VALUE.of(start), Tensor) else None
            if index is not None and index[2] != 0:
                found[position] = _Write(start, *index, args[2].position)
        return found

    # -- the step ---------------------------------------------------------------------------------------------------

    def _add_slots(self) -> None:
        threads = {node: slot.name for node, slot in zip(self.program.slot_nodes(), self.program.slots, strict=True)}
        taken: set[str] = set()
        for position in self._carried_positions():
            start = self.alignment.initial[position]
            sample = self.alignment.template[position]
            name = threads.get(start) if isinstance(start, Node) else None
            if name is not None:
                self.state_of[position] = start
            else:
                name = self._slot_name(sample)
            names = itertools.chain((name,), (f"{name}_{i}" for i in itertools.count(1)))
            unique = next(n for n in names if n not in taken)
            taken.add(unique)
            placeholder = add_placeholder(self.graph, unique.replace(".", "_"))
            placeholder.meta = {"slot": unique, "number": False}
            if VALUE.is_known(sample):
                VALUE.set(placeholder, VALUE.of(sample))
            self.slots[position], self.slot_names[position] = placeholder, unique

    def _slot_name(self, node: Node) -> str:
        """The name of a carried value that the model's code keeps in a variable."""
        call = node
        while is_structural(call) and isinstance(call.args[0], Node):
            call = call.args[0]
        if call is not node and is_module_call(call):
            module = self.program.module_of(call)
            adapter = adapter_of(module) if module is not None else None
            index = node.args[1]
            owner = call.args[0].target  # type: ignore[union-attr]
            is_state = isinstance(node.args[0], Node) and node.args[0].args == (call, 1)
            if is_state and adapter is not None and module is not None and isinstance(index, int):
                names = adapter.names(module)
                return f"{owner}.{names[index] if index < len(names) else f'state{index}'}"
        where, owner = WHERE.of(node), MODULE.of(node)
        assigned = _ASSIGNMENT.match(linecache.getline(*where)) if where else None
        name = assigned.group(1).removeprefix("self.") if assigned else "state"
        return f"{owner}.{name}" if owner else name

    def _carried_positions(self) -> list[int]:
        found: dict[int, None] = {}

        def note(role: Any) -> None:
            if isinstance(role, Carried):
                found[role.position] = None

        for arguments in self.alignment.arguments:
            map_roles(arguments, note)
        return [p for p in found if p not in self.writes]

    def _add_nodes(self) -> None:
        # All reads first: a size of the input then comes from an element.
        reads = [self._element_read(position) for position in range(len(self.alignment.template))]
        for position, node in enumerate(self.alignment.template):
            read = reads[position]
            if position in self.writes:
                self.nodes.append(self.nodes[self.writes[position].position])
                continue
            if read is not None:
                self.nodes.append(read)
                continue
            if node.target is hold:
                self.nodes.append(self._value(self.alignment.arguments[position][0][0], node))
                continue
            fill = self._varying_fill(position)
            args, kwargs = map_roles(
                self.alignment.arguments[position],
                lambda role, node=node, fill=fill: 0 if role is fill else self._value(role, node),  # type: ignore[misc]
            )
            new = self._like(node, node.op, node.target, args, kwargs)
            if fill is not None:
                number = self.inputs.numbers(fill.values, node)
                new = self._like(node, "call_function", operator.add, (new, number), {})
            self.nodes.append(new)

    def _like(self, node: Node, op: str, target: Any, args: Any, kwargs: Any) -> Node:
        """A new node in the step, with the facts of a node of the call."""
        new = self.graph.create_node(op, target, args, kwargs)
        new.meta = {k: v for k, v in node.meta.items() if k != "iterations"}
        return new

    def _varying_fill(self, position: int) -> Varying | None:
        """The numbers with which a node fills a tensor, if they differ between iterations: `torch.full_like(u, t)`.

        The step adds the number to zeros, which an element of a tensor of numbers can be.
        """
        node, (args, _) = self.alignment.template[position], self.alignment.arguments[position]
        value = VALUE.of(node)
        if operation_name(node) not in FILLS or not args:
            return None
        fill, is_tensor = args[-1], isinstance(value, Tensor) and value.dim() > 0
        if not is_tensor or not isinstance(fill, Varying) or isinstance(fill.values[0], Node):
            return None
        is_exact = value.is_floating_point() or all(isinstance(v, int) for v in fill.values)
        return fill if is_exact and value.dtype != torch.bool else None

    def _element_read(self, position: int) -> Node | None:
        """The input that replaces a node that reads one element of a value from outside the loop."""
        args, kwargs = self.alignment.arguments[position]
        if not args or not isinstance(args[0], Outside) or kwargs or self._varying_fill(position) is not None:
            return None
        if not any(_contains_varying_numbers(a) for a in args[1:]):
            return None
        nodes = [self.alignment.value(i, position) for i in range(self.alignment.count)]
        if not all(isinstance(n, Node) for n in nodes):
            return None
        return self.inputs.sequence(nodes, self.alignment.template[position])

    def _value(self, role: Any, reader: Node) -> Any:
        if isinstance(role, Own):
            return self.nodes[role.position]
        if isinstance(role, Carried):
            return self.slots[role.position]
        if isinstance(role, Outside):
            return self.inputs.outside(role.node, reader)
        if isinstance(role.values[0], Node):
            return self.inputs.sequence(list(role.values), reader)
        return self.inputs.numbers(role.values, reader)

    # -- initial values ---------------------------------------------------------------------------------------------

    def _initial_value(self, position: int) -> Any:
        start = self.alignment.initial[position]
        if position in self.state_of:
            slot = next(i for i, n in enumerate(self.program.slot_nodes()) if n is start)
            if self.program.slots[slot].persistent:
                return self.inputs.outside(start, start)
            start = self.program.initial_values[slot]
        if start is None:
            return None
        following = self.alignment.template[position]
        number = _number_of_filled_tensor(start, following) if isinstance(start, Node) else start
        if number is None:
            return self._first(start)
        if self._accepts_numbers():
            return number
        filled = self._filled(number, following)
        if filled is None:
            return self._first(start) if isinstance(start, Node) else number
        return filled

    def _filled(self, number: float, like: Node) -> Node | None:
        """A number as a tensor of the type of a state; None if no input of a step has this type."""
        inputs = [p for p, varies in zip(self.inputs.placeholders, self.inputs.varying, strict=True) if varies]
        same = next((p for p in inputs if has_type_of(p, like)), None)
        if same is None:
            return None
        filled = self.graph.call_function(torch.full_like, (same, number))
        filled.meta = {k: v for k, v in like.meta.items() if k in ("val", "where", "module")}
        return filled

    def _accepts_numbers(self) -> bool:
        """Whether the step runs if its states are numbers: arithmetic combines them with tensors first."""
        if self._numbers_are_accepted is None:
            numbers = dict.fromkeys(self.slots.values(), False)
            self._numbers_are_accepted = all(self._accepts(node, numbers) for node in self.graph.nodes)
            self._numbers_are_accepted &= not any(self.nodes[p] in numbers for p in self.slots)
        return self._numbers_are_accepted

    def _accepts(self, node: Node, numbers: dict[Node, bool]) -> bool:
        """Whether a node computes with numbers as it does with tensors.

        Args:
            node: the node; if its result is a number, it is added to `numbers`.
            numbers: the nodes that are numbers, and whether each is a bool.
        """
        read = [n for n in node.all_input_nodes if n in numbers]
        if not read:
            return True
        if is_module_call(node):
            states: list[Node] = []
            map_arg((node.args[1],), states.append)
            return set(read) <= set(states) & set(self.slots.values())
        if len(read) < len(node.all_input_nodes):
            return node.target in _WITH_TENSORS
        # Python divides by 0 with an error, and adds and inverts bools as integers.
        if any(numbers[n] for n in read) or node.target not in _OF_NUMBERS | _COMPARISONS:
            return False
        numbers[node] = node.target in _COMPARISONS
        return True

    def _first(self, node: Node) -> Node:
        """A value of the first iteration, or from outside the loop, in the step graph."""
        place = self.position_of.get(node)
        if place is not None and place[0] == 0:
            return self.nodes[place[1]]
        if node not in self.inside:
            return self.inputs.outside(node, node)
        if node not in self.first_nodes:
            args, kwargs = map_arg((node.args, node.kwargs), self._first)
            new = self.graph.create_node(node.op, node.target, args, kwargs)
            new.meta = {k: v for k, v in node.meta.items() if k != "iterations"}
            self.first_nodes[node] = new
        return self.first_nodes[node]

    # -- the graph of the call --------------------------------------------------------------------------------------

    def _uses(self) -> Iterable[tuple[Node, Node]]:
        """`(value of an iteration, node outside the loop that reads it)`."""
        for body in self.alignment.bodies:
            for node in body:
                for user in node.users:
                    if user not in self.inside:
                        yield node, user

    def _check_uses(self) -> None:
        outputs, nexts, _ = self.program.results
        read: list[Node] = []
        map_arg((outputs, nexts), read.append)
        for node, user in self._uses():
            if node not in self.position_of and (user.op != "output" or node in read):
                raise Differs(f"only the first iteration runs `{describe_node(node)}`", node)

    def _check_initial_values(self) -> None:
        """Refuse a loop that computes the initial value of a state that it does not carry."""
        carried = self.state_of.values()
        for slot, initial in zip(self.program.slot_nodes(), self.program.initial_values, strict=True):
            if isinstance(initial, Node) and initial in self.inside and slot not in carried:
                raise Differs(f"only the first iteration runs `{describe_node(initial)}`", initial)

    def _outputs(self) -> list[int]:
        """The positions whose value of each iteration the graph of the call reads."""
        found: dict[int, None] = {}
        for node, _ in self._uses():
            place = self.position_of.get(node)
            if place is None:
                continue
            iteration, position = place
            if position in self.writes:
                if iteration != self.alignment.count - 1:
                    raise Differs("code behind the loop reads a tensor before its last element is written", node)
                found[self.writes[position].position] = None
                continue
            if position not in self.slots or iteration != self.alignment.count - 1:
                found[position] = None
        return sorted(found)

    def _step_program(self, outputs: int) -> StepProgram:
        _sort_placeholders(self.graph)
        program = self.program
        leaves = [InputLeaf(p.name, p.name) for p in self.inputs.placeholders]
        step = StepProgram(
            graph=self.graph,
            source=program.source,
            constants=program.constants,
            input_leaves=leaves,
            input_spec=pytree.tree_structure(((0,) * len(leaves), {})),
            output_spec=pytree.tree_structure((0,) * outputs),
            slots=[Slot(self.slot_names[p], self.slots[p].name) for p in self.slots],
            training=program.training,
            opaque=dict(program.opaque),
            setting_reads=list(program.setting_reads),
            guards=Guards(),
            stage="captured",
        )
        used = {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}
        step.constants = {name: value for name, value in program.constants.items() if name in used}
        return step

    def _replace(self, outputs: list[int]) -> None:
        graph, count = self.program.graph, self.alignment.count
        results = {p: i for i, p in enumerate(outputs)}
        finals = {p: i for i, p in enumerate(self.slots)}
        with graph.inserting_before(self.anchor):
            loop = graph.get_attr(self.name)
            state = {self.slot_names[p]: node for p, node in self.state_of.items() if not self._is_persistent(node)}
            call = graph.call_function(run_loop, (loop, count, tuple(self.inputs.values), state))
            call.meta = {"where": self.run.source.where, "module": "", "loop": self.name}
            values = graph.call_function(operator.getitem, (call, 0))
            states = graph.call_function(operator.getitem, (call, 1))
            for node in (values, states):
                node.meta = {"structural": True, "module": ""}
            sequences: dict[int, Node] = {}
            for position in outputs:
                sample = self.alignment.template[position]
                sequences[position] = self._result(values, results[position], sample)
                example = VALUE.of(sample)
                if isinstance(example, Tensor):
                    VALUE.set(sequences[position], example.new_empty((count, *example.shape)))
            replacements: dict[Node, Node] = {}
            for node, _ in list(self._uses()):
                place = self.position_of.get(node)
                if place is None or node in replacements:
                    continue
                iteration, position = place
                write = self.writes.get(position)
                if write is not None:
                    values_of_write = sequences[write.position]
                    arguments = (write.tensor, write.dim, write.start, write.step, values_of_write)
                    new = graph.call_function(write_elements, arguments)
                    new.meta = {k: v for k, v in node.meta.items() if k != "iterations"}
                elif position not in sequences or (position in finals and self._continues(node, iteration)):
                    new = self._result(states, finals[position], node)
                else:
                    new = graph.call_function(operator.getitem, (sequences[position], iteration))
                    new.meta = {k: v for k, v in node.meta.items() if k != "iterations"}
                    ELEMENT.set(new, iteration)
                replacements[node] = new
        initials = list(self.program.initial_values)
        threaded = {n for n in self.state_of.values() if not self._is_persistent(n)}
        for i, slot in enumerate(self.program.slot_nodes()):
            if slot in threaded:
                initials[i] = None
        self.program.set_output(self.program.outputs, self.program.next_states, initials)
        for node, new in replacements.items():
            node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in self.inside)
        for body in reversed(self.alignment.bodies):
            for node in reversed(body):
                graph.erase_node(node)

    def _continues(self, node: Node, iteration: int) -> bool:
        """Whether an iteration that runs apart reads a state of the last iteration; there may be none before it."""
        users = [user for user in node.users if user not in self.inside]
        return iteration == self.alignment.count - 1 and any(ITERATIONS.of(user) for user in users)

    def _is_persistent(self, node: Node) -> bool:
        return any(
            s.persistent for n, s in zip(self.program.slot_nodes(), self.program.slots, strict=True) if n is node
        )

    def _result(self, results: Node, index: int, sample: Node) -> Node:
        node = self.program.graph.call_function(operator.getitem, (results, index))
        node.meta = {k: v for k, v in sample.meta.items() if k in ("val", "where", "module")}
        STRUCTURAL.set(node, True)
        return node


_COMPARISONS = frozenset({operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne})
_OF_NUMBERS = frozenset({operator.add, operator.sub, operator.mul, operator.neg, operator.pos})
"""Functions with the same result for numbers as for tensors that are filled with them."""

_WITH_TENSORS = _OF_NUMBERS | _COMPARISONS | {operator.truediv, operator.floordiv, operator.mod, operator.pow}
"""Functions that take a number in place of one of their tensors."""

_ASSIGNMENT = re.compile(r"\s*((?:self\.)?\w+)\s*[-+*/]?=[^=]")
"""A line that assigns one variable."""


def _contains_varying_numbers(tree: Any) -> bool:
    found: list[Varying] = []
    map_roles(tree, lambda role: found.append(role) if isinstance(role, Varying) else None)
    return any(not isinstance(role.values[0], Node) for role in found)


def _number_of_filled_tensor(node: Node, following: Node) -> float | None:
    """The number of a tensor of equal numbers that has the shape of the next value of its slot.

    A number stands for a tensor of the shape of the next value, so the step does not depend on the code that makes the
    tensor.
    """
    node = without_detach(node)
    value, after = VALUE.of(node), VALUE.of(following)
    if node.op not in ("call_function", "call_method") or not (isinstance(value, Tensor) and isinstance(after, Tensor)):
        return None
    if value.shape != after.shape or value.dtype != after.dtype or not value.is_floating_point():
        return None
    if node.kwargs.get("requires_grad"):
        return None
    name = operation_name(node)
    if name in ("zeros", "zeros_like", "new_zeros"):
        return 0.0
    return 1.0 if name in ("ones", "ones_like", "new_ones") else None


def _sort_placeholders(graph: fx.Graph) -> None:
    """Move the placeholders in front of all other nodes, inputs before slots."""
    nodes = [n for n in graph.nodes if n.op == "placeholder"]
    inputs, slots = ([n for n in nodes if (SLOT.is_known(n)) is is_slot] for is_slot in (False, True))
    for node in reversed([*inputs, *slots]):
        first = next(iter(graph.nodes))
        if node is not first:
            first.prepend(node)

"""Detect a forward that loops over time itself: snnfx converts ONE time step.

A loop over time is recorded unrolled. Three properties distinguish it from loops that belong to a step, over layers,
heads, groups of channels or a fixed point:

- its iterations read the elements 0, 1, ..., size - 1 of one dimension of the step's input: `x[t]`, `x[:, t]`,
  `x.select(0, t)`, `for x_t in x`, `x.unbind()`, `x.split(1)`;
- all iterations run the same operations on the same modules and parameters;
- each iteration reads a value of the previous one (a membrane potential, the state of a neuron). A sum, a product or a
  concatenation of the results is not such a value.

A loop over a static input reads no elements. It is recognised by a neuron that one call site calls on the same value
three times or more: only its state differs.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.fx import Node

from snnfx.errors import CaptureError
from snnfx.ir.facts import INPUT, SHAPE_LIKE, VALUE, WHERE
from snnfx.ir.nodes import IN_PLACE_OPERATORS, is_in_place, is_module_call, is_size, is_structural
from snnfx.ir.printing import describe_node, operation_name
from snnfx.ops.operator_lookup import traits_of
from snnfx.ops.step_functions import FunctionHolder, expect_size
from snnfx.sandbox.user_code import format_location
from snnfx.state.step_calls import initial_value, opaque_initial_value

__all__ = ["TimeLoop", "find_time_loop"]

HINT = (
    'Convert the whole call with takes="sequence" and example_inputs=(x_seq,), or move the loop body to a method, '
    'e.g. `step(self, x)`, and convert with entry="step".'
)


@dataclass(frozen=True)
class TimeLoop:
    """A loop over time in one forward.

    Args:
        is_certain: whether all properties hold; otherwise it may be a loop that belongs to the step.
        what: the loop, as a clause.
        where: its file and line.
        why: the evidence, as a clause.
    """

    is_certain: bool
    what: str
    where: str
    why: str

    def error(self) -> CaptureError:
        """The error for a certain loop."""
        why = f"{self.why}, so this is a loop over time, but snnfx converts ONE time step."
        return CaptureError("SNNFX203", self.what, where=self.where, why=why, hint=HINT)

    def warning(self) -> str:
        """The warning for an uncertain loop."""
        return (
            f"{self.what} ({self.where}): {self.why}. snnfx converts ONE time step, and this loop runs at each of "
            'them. If it is a loop over time, convert with takes="sequence", or move its body to a method and convert '
            'with entry="step", or pass example_inputs of ONE step.'
        )


def find_time_loop(
    graph: fx.Graph, constants: Mapping[str, Any], call_sites: Mapping[Node, Hashable]
) -> TimeLoop | None:
    """Find a loop over time in a recorded step; a certain one if there are several.

    Args:
        graph: the recorded step; the output node may be missing.
        constants: the objects of `get_attr` nodes that the model does not register.
        call_sites: the call site in the user's code of each call of a stateful module.
    """
    reads = _reads_of_elements(graph)
    loops = list(_static_loops(graph, constants, call_sites))
    if reads:
        dependences = _Dependences(graph)
        expressions = _Expressions(graph, reads, constants)
        for elements in _elements_by_source(reads):
            loop = _SequenceLoop(graph, elements, dependences, expressions).found()
            loops += [loop] if loop is not None else []
    return max(loops, key=lambda loop: loop.is_certain, default=None)


# -- reads of elements ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Read:
    """A node that reads element `index` of dimension `dim` of `source`."""

    source: Node
    dim: int
    index: int


def _reads_of_elements(graph: fx.Graph) -> dict[Node, _Read]:
    """The nodes that read one element of one dimension of a tensor that depends on an input of the step."""
    reads: dict[Node, _Read] = {}
    of_inputs: set[Node] = set()
    for node in graph.nodes:
        if (node.op == "placeholder" and INPUT.is_known(node)) or any(n in of_inputs for n in node.all_input_nodes):
            of_inputs.add(node)
            read = _read_of(node)
            if read is not None and read.source in of_inputs:
                reads[node] = read
    return reads


def _read_of(node: Node) -> _Read | None:
    if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], Node):
        return None
    source, name = node.args[0], operation_name(node)
    if node.target is operator.getitem:
        if is_structural(node) or SHAPE_LIKE.of(source):
            return None
        parts = _parts_of(source)
        if parts is not None:
            return _read(*parts, node.args[1])
        value = VALUE.of(source)
        return None if value is not None and not isinstance(value, Tensor) else _read_by_index(source, node.args[1])
    if name in ("select", "narrow"):
        given = [*node.args[1:], *node.kwargs.values()]
        if len(given) == (2 if name == "select" else 3) and (name == "select" or given[2] == 1):
            return _read(source, given[0], given[1])
    return None


def _parts_of(node: Node) -> tuple[Node, Any] | None:
    """`(x, dim)` of a node that returns the elements of one dimension: `x.unbind()`, `x.split(1)`, `x.chunk(T)`."""
    if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], Node):
        return None
    name, source = operation_name(node), node.args[0]
    arguments = list(node.args[1:])
    if name == "unbind":
        return source, arguments[0] if arguments else node.kwargs.get("dim", 0)
    if name not in ("split", "chunk", "tensor_split"):
        return None
    dim = arguments[1] if len(arguments) > 1 else node.kwargs.get("dim", 0)
    value = VALUE.of(node)
    if isinstance(value, tuple | list):
        is_single = isinstance(dim, int) and all(isinstance(v, Tensor) and v.shape[dim] == 1 for v in value)
    else:
        sizes = ("split_size", "split_size_or_sections")
        is_single = name == "split" and 1 in (arguments[:1] or [node.kwargs.get(size) for size in sizes])
    return (source, dim) if is_single else None


def _read_by_index(source: Node, index: Any) -> _Read | None:
    """The read of `x[t]`, `x[:, t]`, `x[..., t]` or `x[t : t + 1]`."""
    entries = list(index) if isinstance(index, tuple) else [index]
    chosen = [(i, e) for i, e in enumerate(entries) if e is not Ellipsis and e != slice(None)]
    if len(chosen) != 1:
        return None
    position, entry = chosen[0]
    if isinstance(entry, slice):
        if not isinstance(entry.start, int) or entry.stop != entry.start + 1 or entry.step not in (None, 1):
            return None
        entry = entry.start
    if Ellipsis in entries[:position]:
        position -= len(entries)
    return _read(source, position, entry)


def _read(source: Node, dim: Any, index: Any) -> _Read | None:
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in (dim, index)):
        return None
    value = VALUE.of(source)
    if isinstance(value, Tensor) and value.dim() > 0 and -value.dim() <= dim < value.dim():
        dim %= value.dim()
        index = index % value.shape[dim] if value.shape[dim] else index
    return _Read(source, dim, index) if index >= 0 else None


@dataclass(frozen=True)
class _Elements:
    """The reads of the elements 0 to n - 1 of one dimension.

    Args:
        source, dim: the tensor and the dimension.
        iterations: the iteration of each node that reads an element, in the order of the loop.
        count: n.
        size: the size of the dimension; None: unknown.
    """

    source: Node
    dim: int
    iterations: dict[Node, int]
    count: int
    size: int | None


def _elements_by_source(reads: Mapping[Node, _Read]) -> Iterable[_Elements]:
    by_source: dict[tuple[Node, int], dict[Node, int]] = {}
    for node, read in reads.items():
        by_source.setdefault((read.source, read.dim), {})[node] = read.index
    for (source, dim), iterations in by_source.items():
        order = list(dict.fromkeys(iterations.values()))
        if (
            len(order) >= 2
            and sorted(order) == list(range(len(order)))
            and order in (sorted(order), sorted(order)[::-1])
        ):
            iterations = {node: order.index(index) for node, index in iterations.items()}
            value = VALUE.of(source)
            size = value.shape[dim] if isinstance(value, Tensor) else None
            yield _Elements(source, dim, iterations, len(order), size)


# -- what the iterations compute --------------------------------------------------------------------------------------


class _Dependences:
    """The nodes that each node depends on directly, through memory that in-place operations change as well."""

    def __init__(self, graph: fx.Graph) -> None:
        self.of: dict[Node, list[Node]] = {}
        self.consumers: dict[Node, list[Node]] = {}
        storages: dict[Node, Node] = {}
        latest_write: dict[Node, Node] = {}
        for node in graph.nodes:
            inputs = node.all_input_nodes
            writes = [latest_write.get(storages.get(n, n)) for n in inputs]
            self.of[node] = list(dict.fromkeys([*inputs, *(w for w in writes if w is not None)]))
            for dependence in self.of[node]:
                self.consumers.setdefault(dependence, []).append(node)
            if node.args and isinstance(node.args[0], Node):
                storage = storages.get(node.args[0], node.args[0])
                if is_in_place(node):
                    latest_write[storage] = node
                if is_in_place(node) or traits_of(node).view:
                    storages[node] = storage


class _Expressions:
    """Numbers for values: equal for nodes that compute the same from the inputs, any element and the states.

    The elements of one dimension count as one value, and the states of a called module do not count.
    """

    def __init__(
        self, graph: fx.Graph, reads: Mapping[Node, _Read], constants: Mapping[str, Any], calls: Iterable[Node] = ()
    ) -> None:
        self.of: dict[Node, int] = {}
        self.from_parameters: set[Node] = set()
        """Nodes that depend on parameters or buffers, but neither on inputs nor on states."""
        numbers: dict[Hashable, int] = {}
        as_leaves = set(calls)
        for node in graph.nodes:
            key = self._key(node, reads.get(node), constants, node in as_leaves)
            self.of[node] = numbers.setdefault(key, len(numbers))
            inputs = node.all_input_nodes
            if node.op == "get_attr" or (inputs and all(n in self.from_parameters for n in inputs)):
                self.from_parameters.add(node)

    def _key(self, node: Node, read: _Read | None, constants: Mapping[str, Any], is_leaf: bool) -> Hashable:
        if read is not None:
            return "element", self.of[read.source], read.dim
        if node.op == "placeholder":
            return node
        if node.op == "get_attr":
            return "get_attr", _constant_key(str(node.target), constants)
        operation = _operation(node)
        if is_module_call(node):
            arguments = (node.args[0], *(() if is_leaf else node.args[2:]))
            return operation, self._frozen(arguments), () if is_leaf else self._frozen(node.kwargs)
        return operation, self._frozen(node.args), self._frozen(node.kwargs)

    def _frozen(self, value: Any) -> Hashable:
        if isinstance(value, Node):
            return "node", self.of[value]
        if isinstance(value, tuple | list):
            return tuple([self._frozen(v) for v in value])
        if isinstance(value, dict):
            return tuple([(k, self._frozen(v)) for k, v in value.items()])
        if isinstance(value, slice):
            return "slice", self._frozen((value.start, value.stop, value.step))
        return repr(value)


def _constant_key(target: str, constants: Mapping[str, Any]) -> Hashable:
    """The object of a `get_attr` node; tensors that the forward creates count as equal if their shapes are."""
    value = constants.get(target, target)
    if isinstance(value, FunctionHolder):
        return value.function
    return ("tensor", tuple(value.shape), value.dtype) if isinstance(value, Tensor) else target


def _operation(node: Node) -> Hashable:
    """The operation of a node; a method, an operator and its in-place form are one operation."""
    if node.op == "call_module":
        return "module", str(node.target)
    if node.op in ("placeholder", "output"):
        return node.op
    target: Any = node.target
    function = IN_PLACE_OPERATORS.get(target, target) if not isinstance(target, str) else target
    name = function if isinstance(function, str) else getattr(function, "__name__", str(function))
    return name.strip("_")


class _SequenceLoop:
    """The loop whose iteration t reads element t of one dimension."""

    def __init__(
        self, graph: fx.Graph, elements: _Elements, dependences: _Dependences, expressions: _Expressions
    ) -> None:
        self.graph, self.elements = graph, elements
        self.dependences, self.expressions = dependences, expressions
        self.iteration: dict[Node, int] = {}
        """The iteration of each node that depends on an element: the last element that it depends on."""
        self.bodies: list[list[Node]] = [[] for _ in range(elements.count)]
        for node in graph.nodes:
            read = elements.iterations.get(node)
            found = [self.iteration[n] for n in dependences.of[node] if n in self.iteration]
            if read is not None or found:
                self.iteration[node] = max([*found, *([read] if read is not None else [])])
                if read is None and not _is_ignored(node):
                    self.bodies[self.iteration[node]].append(node)

    def found(self) -> TimeLoop | None:
        """The loop, if its iterations form a recurrence."""
        elements, last = self.elements, self.elements.count - 1
        carried = [self._carried(t) for t in range(last)]
        if not all(carried):
            return None
        # The first iteration may start differently, and the nodes after the loop depend on the last one.
        middle = [self._signature(body) for body in self.bodies[1:last]]
        before_last = self.bodies[last - 1]
        same = _common_prefix(*(self._signature(b, lenient=last == 1) for b in (before_last, self.bodies[last])))
        of_body = set(self.bodies[last][:same])
        is_same = all(signature == middle[0] for signature in middle) and any(w in of_body for _, w in carried[-1])
        recurrences = [
            [(u, w) for u, w in edges if not self._is_reduction(u, w) and (t < last - 1 or not is_same or w in of_body)]
            for t, edges in enumerate(carried)
        ]
        if last > 1:
            recurrences = recurrences[1:]
        if not all(recurrences):
            return None
        # Prefix sums are no recurrence of a neuron, but neither do they only accumulate.
        accumulates = all(_accumulates(u, w) for edges in recurrences for u, w in edges)
        neuron = all(any(_is_state_of(u, w) for u, w in edges) for edges in carried)
        verdict = self._verdict(is_same, neuron)
        verdict = verdict and not accumulates
        if verdict is None:
            return None
        value, reader = recurrences[-1][0]
        where = format_location(WHERE.of(min(elements.iterations, key=lambda n: elements.iterations[n])))
        place = format_location(WHERE.of(reader))
        operations = "run the same operations" if is_same else "call the same neuron"
        return TimeLoop(
            verdict,
            f"the forward reads the elements 0 to {last} of `{elements.source.name}` along dimension {elements.dim}",
            where,
            f"all iterations {operations}, and `{describe_node(reader)}` ({place}) reads `{value.name}` of the "
            "previous iteration",
        )

    def _verdict(self, is_same: bool, neuron: bool) -> bool | None:
        """Whether a recurrence is certainly (True) or possibly (False) a loop over time; None: it is not."""
        elements = self.elements
        is_whole = None if elements.size is None else elements.count == elements.size
        own = _is_input(elements.source)
        is_leading = elements.dim in (0, 1)
        if is_same and own and is_leading and is_whole:
            return True
        like_input = elements.size in _leading_sizes(self.graph)
        if neuron:
            at_least_three = elements.count >= 3
            if is_same and at_least_three and is_whole is not False and (own or elements.dim == 0 or like_input):
                return True
            return False if is_same or at_least_three else None
        if not is_same or is_whole is False:
            return None
        if own and (is_leading or elements.count >= 3):
            return False
        return False if is_leading and like_input and elements.count >= 3 else None

    def _carried(self, t: int) -> list[tuple[Node, Node]]:
        """The pairs `(value of iteration t, node of iteration t + 1 that reads it)`, without the elements."""
        return [
            (value, reader)
            for reader in self.bodies[t + 1]
            for value in self.dependences.of[reader]
            if self.iteration.get(value) == t and value not in self.elements.iterations
        ]

    def _is_reduction(self, value: Node, reader: Node) -> bool:
        """Whether a value only accumulates results: `total = total + y`, `out[t] = y`."""
        consumers = self.dependences.consumers.get(value, ())
        return _accumulates(value, reader) and all(n is reader or n.op == "output" for n in consumers)

    def _signature(self, body: Sequence[Node], lenient: bool = False) -> list[Hashable]:
        """The operations of an iteration with the modules and other values that they use.

        Args:
            body: the nodes of the iteration.
            lenient: ignore values other than parameters: the first iteration reads the initial states.
        """
        numbers, from_parameters = self.expressions.of, self.expressions.from_parameters
        return [
            (
                _operation(node),
                tuple(
                    numbers[n]
                    for n in node.all_input_nodes
                    if n not in self.iteration and (not lenient or n in from_parameters)
                ),
            )
            for node in body
        ]


def _static_loops(
    graph: fx.Graph, constants: Mapping[str, Any], call_sites: Mapping[Node, Hashable]
) -> Iterable[TimeLoop]:
    """Loops over a static input: one call site calls a neuron on the same value three times or more."""
    by_site: dict[Hashable, list[Node]] = {}
    for node in graph.nodes:
        if node in call_sites and is_module_call(node):
            by_site.setdefault((str(node.args[0].target), call_sites[node]), []).append(node)
    repeated = [calls for calls in by_site.values() if len(calls) >= 3]
    if not repeated:
        return
    equal = _Expressions(graph, {}, constants)
    # An iteration that reads its own outputs again: without the expression of these outputs.
    without_outputs = _Expressions(graph, {}, constants, calls=[call for calls in repeated for call in calls])
    for calls in repeated:
        for expressions, is_certain in ((equal, True), (without_outputs, False)):
            if not is_certain and not any(_reads_input(call, set(call_sites)) for call in calls[1:]):
                continue
            groups: dict[Hashable, list[Node]] = {}
            for call in calls:
                groups.setdefault(tuple([expressions.of[n] for n in _inputs_of_call(call)]), []).append(call)
            same = max(groups.values(), key=len)
            if len(same) >= 3 and (is_certain or _reads_input(same[0], set(call_sites))):
                name = describe_node(same[0])
                again = "" if is_certain else ", together with its own outputs"
                yield TimeLoop(
                    is_certain,
                    f"one line of the forward calls `{name}` {len(calls)} times",
                    format_location(WHERE.of(same[0])),
                    f"each call reads the same value{again} and the state after the previous call",
                )
                break


def _inputs_of_call(call: Node) -> list[Node]:
    """The nodes that a call of a stateful module reads beside its module and its states."""
    nodes: list[Node] = []
    fx.map_arg((call.args[2:], call.kwargs), nodes.append)
    return nodes


def _reads_input(call: Node, calls: set[Node]) -> bool:
    """Whether a call reads an input of the step other than through a call of a stateful module."""
    pending, seen = _inputs_of_call(call), set()
    while pending:
        node = pending.pop()
        if node in seen or node in calls:
            continue
        seen.add(node)
        if node.op == "placeholder" and INPUT.is_known(node):
            return True
        pending += node.all_input_nodes
    return False


def _is_ignored(node: Node) -> bool:
    """Whether a node is left out of comparisons: initial values and checks of sizes."""
    return node.op == "output" or node.target in (initial_value, opaque_initial_value, expect_size)


def _accumulates(value: Node, reader: Node) -> bool:
    """Whether the operation of a node continues the sum, product or concatenation of another node."""
    return traits_of(value).accumulates and _operation(value) == _operation(reader)


def _is_state_of(value: Node, call: Node) -> bool:
    """Whether a value is passed to a call of a stateful module as its state."""
    if not is_module_call(call):
        return False
    states: list[Node] = []
    fx.map_arg((call.args[1],), states.append)
    return value in states


def _is_input(node: Node) -> bool:
    """Whether a tensor is an input of the step, possibly permuted, cast or scaled."""
    while node.op != "placeholder":
        inputs = [n for n in node.all_input_nodes if not is_size(n)]
        if len(inputs) != 1 or _operation(node) not in _OF_SAME_ELEMENTS:
            return False
        node = inputs[0]
    return INPUT.is_known(node)


def _leading_sizes(graph: fx.Graph) -> set[int]:
    """The sizes of the first two dimensions of the inputs, where known."""
    values = [VALUE.of(n) for n in graph.nodes if n.op == "placeholder" and INPUT.is_known(n)]
    return {size for value in values if isinstance(value, Tensor) for size in value.shape[:2]}


def _common_prefix(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """The number of leading elements that are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


_OF_SAME_ELEMENTS = frozenset(
    "transpose permute movedim moveaxis swapaxes swapdims t getattr contiguous float double half bfloat16 to type "
    "type_as clone detach unsqueeze squeeze mul div truediv sub requires_grad gt ge bool".split()
)
"""Operations whose result has the elements of an input, in another layout, dtype or unit."""

"""Observe the products and spikes of a call, step by step, on the values that its regions computed.

The call runs once more with a graph that returns the operands of all products (linear layers, convolutions, matrix
products) and the outputs of all loops. Each product runs again on these values, time step by time step, under a
`ProductCounter`; each binary output is a layer of spiking neurons. A value is freed after its last reader.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from snnfx.emit.emitted_graphs import REGIONS
from snnfx.emit.multi_step import emit_multi_step
from snnfx.errors import InputError
from snnfx.inspect.profile.product_counts import ProductCounter
from snnfx.inspect.profile.profiled_call import ProfiledCall
from snnfx.inspect.profile.spike_counts import RecordedUnits, SpikeCounts
from snnfx.ir.facts import BATCH_DIM, MODULE, RETURNED_BY, STEP_NODE, SUNK, VARYING
from snnfx.ir.nodes import is_module_call, is_size, is_structural
from snnfx.ir.printing import describe_node
from snnfx.ir.program import Region, StepProgram
from snnfx.ops.run_loop import run_loop
from snnfx.runtime.recordings import recorded_node

__all__ = ["ObservedCall", "ObservedProduct", "observe"]

_PRODUCTS = frozenset(
    "linear bilinear matmul mm bmm mv dot inner outer addmm addbmm baddbmm addmv einsum tensordot chain_matmul "
    "multi_dot conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d scaled_dot_product_attention "
    "multi_head_attention_forward".split()
)
_CONTAINER = f"{REGIONS}.profile"


@dataclass
class ObservedProduct:
    """One operation with products.

    Args:
        name: qualified name of the layer, or the operation and its module.
        kind: type of the layer, or name of the operation.
        region: the region that runs it.
        counts: the operations of the call.
    """

    name: str
    kind: str
    region: str
    counts: ProductCounter = field(default_factory=ProductCounter)


@dataclass
class ObservedCall:
    """Everything that one call showed.

    Args:
        products: by node of the step graph, in execution order.
        spikes: the outputs of neurons, by node.
        uncounted: operations whose products could not be counted, with the reason.
        notes: parts of the call that were not observed.
        recorded: the values over time of the names to record.
    """

    products: dict[Node, ObservedProduct] = field(default_factory=dict)
    spikes: dict[Node, SpikeCounts] = field(default_factory=dict)
    uncounted: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    recorded: dict[str, RecordedUnits] = field(default_factory=dict)


def observe(call: ProfiledCall, record: Sequence[str] = ()) -> ObservedCall:
    """Run a call and observe its products and spikes.

    Args:
        call: the call.
        record: qualified names of modules and slots whose values over time are kept for some units.

    Raises:
        InputError: SNNFX311, a name is unknown.
    """
    seen = ObservedCall(recorded={name: RecordedUnits(name) for name in record})
    _observe(call, seen, "")
    for name, units in seen.recorded.items():
        if not units.values:
            # Raises unless the value has no batch dimension, which leaves the recording empty.
            recorded_node(call.net.program, name)
    return seen


def _observe(call: ProfiledCall, seen: ObservedCall, region: str) -> None:
    """Observe a net, or the loop that is a region of a net."""
    if call.is_whole_sequence:
        _observe_sequence(call, seen)
    else:
        _observe_steps(call, seen, region)


def _observe_sequence(call: ProfiledCall, seen: ObservedCall) -> None:
    """Observe a model that runs over time itself: its products as they run, its loops as calls of their own."""
    program = call.net.program

    def run(node: Node, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.target is run_loop:
            handle, steps, inputs, state = args
            given = {name: value for name, value in state.items() if value is not None}
            inner = ProfiledCall(handle.net, list(inputs), {}, steps, given or None)
            _observe(inner, seen, call.part_of(node))
        if not _has_products(program, node):
            return function(*args, **kwargs)
        product = seen.products.setdefault(node, _product(program, node, call.part_of(node)))
        with product.counts:
            return function(*args, **kwargs)

    call.run(run)


def _observe_steps(call: ProfiledCall, seen: ObservedCall, region: str) -> None:
    program = call.net.program
    observer = _StepObserver(call, seen, region)
    record = [node for node in observer.recorded if node.op != "placeholder"]
    executable = call.net._executable
    emitted = emit_multi_step(
        program, _CONTAINER, executable.graphs.target_name, record, reduce=call.net.options.reduce
    )
    output = emitted.graph.output_node()
    results: Any = output.args[0]
    outputs, state, _ = results
    # The recorded values are read as they appear, and freed.
    output.args = ((outputs, state, ()),)
    regions = {f"{_CONTAINER}.{name}": module for name, module in emitted.regions.items()}
    if (call.net.training, "first") in executable.graphs.emitted:
        seen.notes.append("The first step runs a graph of its own; rates and operations leave it out.")
    call.run(observer, emitted.graph, regions, observer.start)
    for node in observer.unread:
        seen.uncounted[seen.products.pop(node).name] = "the values that it reads are not kept over time"


class _StepObserver:
    """Reads the values of a step graph over time while an emitted graph runs."""

    def __init__(self, call: ProfiledCall, seen: ObservedCall, region: str) -> None:
        self.program, self.seen = call.net.program, seen
        program = self.program
        self.region_of = {n: region or r.name for r in program.regions for n in r.nodes}
        self.following = dict(zip(program.slot_nodes(), program.next_states, strict=True))
        self.initial = dict(zip(program.slot_nodes(), program.initial_values, strict=True))
        self.slot_of = dict(zip(program.slot_nodes(), (s.name for s in program.slots), strict=True))
        self.readers: dict[tuple[str, Node], tuple[Node, ...]] = {}
        for node in program.graph.nodes:
            if node in self.region_of and _has_products(program, node):
                self._add_product(node)
        outputs = _outputs_of_loops(program)
        for node in outputs:
            self.seen.spikes.setdefault(node, SpikeCounts(_name_of(node), self.region_of[node]))
            self.readers["spikes", node] = (node,)
        for name in seen.recorded:
            value = next((n for n in outputs if _name_of(n) == name), None) or _recorded_value(program, name)
            if value is not None:
                self.readers[f"record {name}", value] = (value,)
        self.recorded = list(dict.fromkeys(n for needs in self.readers.values() for n in needs))
        self.starting_state: Mapping[str, Any] = {}
        self._values: dict[Node, Any] = {}
        self._left: Counter[Node] = Counter()
        self._pending: list[tuple[str, Node]] = []

    def _add_product(self, node: Node) -> None:
        needs, sunk = self._needs(node)
        if sunk:
            self.seen.uncounted[describe_node(node)] = "its input is a value reduced over time"
            return
        self.seen.products.setdefault(node, _product(self.program, node, self.region_of[node]))
        self.readers["product", node] = needs

    def _needs(self, node: Node) -> tuple[tuple[Node, ...], bool]:
        """The nodes with the values that a product reads, and whether one has no value per time step."""
        needs: dict[Node, None] = {}
        stack, visited = list(node.all_input_nodes), set()
        sunk = False
        while stack:
            operand = stack.pop()
            if operand.op == "get_attr" or operand in visited:
                continue
            visited.add(operand)
            if operand in self.following:
                following = self.following[operand]
                if isinstance(following, Node):
                    stack.append(following)
                if isinstance(self.initial[operand], Node):
                    stack.append(self.initial[operand])
            elif operand.op == "placeholder":
                needs[operand] = None
            elif is_size(operand) or operand not in self.region_of or isinstance(BATCH_DIM.of(operand), tuple):
                stack.extend(operand.all_input_nodes)
            else:
                sunk = sunk or bool(SUNK.of(operand))
                needs[operand] = None
        return tuple(needs), sunk

    def start(self, leaves: list[Tensor], state: Mapping[str, Any] | None) -> None:
        """Begin a chunk of these inputs, from this state."""
        self.starting_state = state or {}
        self._values, self._pending = {}, list(self.readers)
        self._left = Counter(n for needs in self.readers.values() for n in needs)
        for node, value in zip(self.program.input_nodes(), leaves, strict=True):
            self._values[node] = value
        self._read()

    def __call__(self, node: Node, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        value = function(*args, **kwargs)
        name = STEP_NODE.of(node)
        own = self.program.nodes_by_name.get(name)
        if own is not None and own in self._left:
            self._values[own] = value
            self._read()
        return value

    @property
    def unread(self) -> list[Node]:
        """The products whose operands did not appear."""
        return [node for what, node in self._pending if what == "product"]

    def _read(self) -> None:
        for reader in list(self._pending):
            (what, node), needs = reader, self.readers[reader]
            if all(n in self._values for n in needs):
                self._pending.remove(reader)
                if what == "product":
                    self._count(node, needs)
                elif what == "spikes":
                    self.seen.spikes[node].add(self._values[node])
                else:
                    self.seen.recorded[what.removeprefix("record ")].add(self._values[node])
                for n in needs:
                    self._left[n] -= 1
                    if not self._left[n]:
                        del self._values[n]

    def _count(self, node: Node, needs: tuple[Node, ...]) -> None:
        product = self.seen.products[node]
        varies = VARYING.of(node)
        if not varies and product.counts.products:
            return
        steps = max((self._values[n].shape[0] for n in needs if VARYING.of(n)), default=1)
        for t in range(steps if varies else 1):
            known: dict[Node, Any] = {}
            args = map_arg((node.args, node.kwargs), functools.partial(self._value, t=t, known=known))
            with product.counts:
                _execute(self.program, node, *args)

    def _value(self, node: Node, t: int, known: dict[Node, Any]) -> Any:
        """The value of a node at step t of the chunk."""
        if node not in known:
            known[node] = self._compute(node, t, known)
        return known[node]

    def _compute(self, node: Node, t: int, known: dict[Node, Any]) -> Any:
        if node.op == "get_attr":
            return self.program.resolve(str(node.target))
        if node in self.following:
            return self._slot(node, t, known)
        if node in self._values:
            value = self._values[node]
            return value[t] if isinstance(value, Tensor) and self._has_time(node) else value
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: self._value(n, t, known))
        return _execute(self.program, node, args, kwargs)

    def _has_time(self, node: Node) -> bool:
        return bool(VARYING.of(node))

    def _slot(self, node: Node, t: int, known: dict[Node, Any]) -> Any:
        following = self.following[node]
        if t > 0:
            return self._value(following, t - 1, {}) if isinstance(following, Node) else following
        initial = self.starting_state.get(self.slot_of[node], self.initial[node])
        if isinstance(initial, Node):
            initial = self._value(initial, t, known)
        if not isinstance(initial, int | float) or not isinstance(following, Node):
            return initial  # a tensor, or None, from which the module starts at its reset state
        return torch.full_like(self._value(following, t, {}), initial)


def _recorded_value(program: StepProgram, name: str) -> Node | None:
    """The node of a name to record; None if the program has none, or the value is not a tensor over time."""
    try:
        node = recorded_node(program, name)
    except InputError:  # another loop of the net may have the name
        return None
    is_tensor = isinstance(node, Node) and node.op not in ("placeholder", "get_attr") and not SUNK.of(node)
    return node if is_tensor else None


def _product(program: StepProgram, node: Node, region: str) -> ObservedProduct:
    module = program.module_of(node)
    kind = type(module).__name__ if module is not None else str(getattr(node.target, "__name__", node.target))
    return ObservedProduct(describe_node(node), kind, region)


def _has_products(program: StepProgram, node: Node) -> bool:
    """Whether a node may compute products: a module with weights of two dimensions or more, or a known function."""
    module = program.module_of(node)
    if module is not None:
        if is_module_call(node) and getattr(node.target, "__name__", "").endswith("initial_value"):
            return False
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            return False
        return any(p.dim() >= 2 for p in module.parameters())
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return str(name).strip("_").removeprefix("r") in _PRODUCTS or str(name).strip("_") in _PRODUCTS


def _outputs_of_loops(program: StepProgram) -> list[Node]:
    """The outputs of neurons, which are spikes if they are binary.

    They are the first outputs of stateful modules, the outputs of modules that own a slot, and, for loops without such
    modules, all values that leave the loop.
    """
    states = {n for n in program.next_states if isinstance(n, Node)}
    owners = {slot.name.rpartition(".")[0] for slot in program.slots} - {""}
    outputs = []
    for region in program.regions:
        if region.kind != "loop":
            continue
        values = [n for n in region.nodes if n.op != "placeholder" and not isinstance(BATCH_DIM.of(n), tuple)]
        own = [n for n in values if _is_output_of_neuron(n, owners)]
        outside = [n for n in values if n not in states and _is_read_outside(n, region, program)]
        outputs += own or outside
    return outputs


def _is_output_of_neuron(node: Node, owners: set[str]) -> bool:
    if is_structural(node) and is_module_call(node.args[0]):  # type: ignore[arg-type]
        return bool(node.args[1] == 0)
    return not owners.isdisjoint(RETURNED_BY.of(node) or ())


def _is_read_outside(node: Node, region: Region, program: StepProgram) -> bool:
    return node in program.outputs or any(n not in region.nodes and n.op != "output" for n in node.users)


def _name_of(node: Node) -> str:
    names = RETURNED_BY.of(node) or ()
    return next(filter(None, names), "") or MODULE.of(node) or describe_node(node)


def _execute(program: StepProgram, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if node.op == "call_module":
        return program.resolve(str(node.target)).forward(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]

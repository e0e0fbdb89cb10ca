"""`snnfx.draw`: pictures of a model's step graph and of the regions of a converted net.

A picture is made from a step program alone. Chains of operations become the rows of one table, state slots small nodes
with a dashed edge to the next time step; what only computes sizes or initial values is left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from snnfx.capture import capture
from snnfx.dot import STYLES, Box, Cluster, Drawing, Edge, Picture, Pill, Row, check_file, write_dot
from snnfx.errors import CaptureError
from snnfx.layer_summary import summarize_node
from snnfx.net import Net
from snnfx.passes.base import Pass, PassManager
from snnfx.passes.chunk import plan_chunks
from snnfx.passes.dce import RemoveDeadCode
from snnfx.passes.dependence import analyse_dependence, is_size
from snnfx.passes.normalize import Normalize
from snnfx.passes.partition import Partition
from snnfx.program import StepProgram, describe_node, is_module_call, is_structural, place_of
from snnfx.tracer import expect_size

__all__ = ["draw"]

_CARRIED = "t→t+1"


def draw(
    model: nn.Module, file: str | os.PathLike[str] | None = None, *, example_inputs: Any = None, entry: str = "forward"
) -> Drawing:
    """Draw the step graph of a model, or the regions of a converted net. The model or net is not changed.

    Args:
        model: a single-step model, drawn as one time step by containers; or what `snnfx.convert` returned, drawn by
            regions: what is computed once, folded, mapped and looped.
        file: where to write the picture: .svg, .png, .pdf, or .dot for the text, which needs no graphviz.
        example_inputs: what ONE call of the model takes (a tensor, a tuple or a dict): then shapes are drawn. A net
            that was converted with example inputs has shapes already.
        entry: the method of a model that is one step.

    Returns:
        The picture: shows in notebooks; `str()` or `.source` is the DOT text, `.save(file)` writes it.

    Raises:
        ToolError: `file` has another suffix (SNNFX603), or graphviz is missing (SNNFX601); before any work.
        CaptureError: the model cannot be captured (codes 2xx).

    Example:
        >>> import torch, snnfx
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), snnfx.neuron.LIFNode())
        >>> net = snnfx.convert(model, example_inputs=torch.rand(4, 3))
        >>> "[T, N, 2] float32" in str(snnfx.draw(net))
        True
    """
    path = None if file is None else check_file(file)
    picture = _picture_of_net(model, example_inputs) if isinstance(model, Net) else _picture_of_model(model, example_inputs, entry)
    drawing = Drawing(write_dot(picture))
    if path is not None:
        drawing.save(path)
    return drawing


# -- what is drawn ------------------------------------------------------------------------------------------------


def _picture_of_model(model: nn.Module, example_inputs: Any, entry: str) -> Picture:
    program = _captured(model, example_inputs, entry, model.training)
    batch_known = True
    try:
        # Where the batch dimension is, is found out on the way to the regions.
        PassManager([Partition()]).run(program)
    except CaptureError:
        batch_known = False
    return _picture_of_step(program, model.training, batch_known)


def _picture_of_step(program: StepProgram, training: bool, batch_known: bool = True) -> Picture:
    painter = _Painter(program, _recorded_values(program), _module_places(program))
    painter.batch_known = batch_known
    members = _module_clusters(painter)
    stateful = any(box.style == "stateful" for box in painter.boxes)
    legend = [*(["stateful"] if stateful else []), *(["carried"] if program.slots else [])]
    return Picture(
        type(program.source).__name__,
        f"one time step, {_mode(training)}",
        [*painter.inputs({}), *members, *painter.outputs()],
        painter.edges(),
        legend,
    )


def _picture_of_net(net: Net, example_inputs: Any) -> Picture:
    program = net.program
    if net.options.step_mode == "s":
        return _picture_of_step(program, net.training)
    values = _recorded_values(program)
    if example_inputs is not None:
        values = _values_for(program, example_inputs, net.options.entry) or values
    places = {node: region.name for region in program.regions for node in region.nodes}
    painter = _Painter(program, values, places)
    painter.kinds = {region.name: region.kind for region in program.regions}
    members: list[Box | Pill | Cluster] = []
    for region in program.regions:
        refusals = [(node, refusal) for node, refusal in region.refusals() if node in painter.place and node.op != "placeholder"]
        codes = {refusal.code for _, refusal in refusals}
        shared = codes.pop() if len(codes) == 1 else ""
        reasons = [f"{describe_node(node)}: {refusal.code} {refusal.reason}" for node, refusal in refusals]
        cluster = Cluster(region.name, region.kind, region.name, note=shared)
        cluster.tooltip = "\n".join([f"{region.name}: {STYLES[region.kind].meaning}", *reasons])
        cluster.members = painter.members(region.name, show_codes=not shared)
        members.append(cluster)
    members += painter.members("")
    members = _chunk_frame(net, values, members)
    kinds = {region.kind for region in program.regions}
    regions = f"{len(program.regions)} region{'s' * (len(program.regions) != 1)}"
    subtitle = f"T time steps in {regions}, {_mode(net.training)}"
    if program.first_step is not None:
        subtitle += ", the first step is run by a graph of its own"
    dims = dict(zip(program.input_nodes(), net._tensor_dims(), strict=True))
    return Picture(
        type(net.source).__name__,
        subtitle,
        [*painter.inputs(dims), *members, *painter.outputs()],
        painter.edges(),
        [kind for kind in ("once", "fold", "map", "loop") if kind in kinds] + ["carried"] * bool(program.slots),
    )


def _mode(training: bool) -> str:
    return "training mode" if training else "evaluation mode"


def _captured(model: nn.Module, example_inputs: Any, entry: str, training: bool) -> StepProgram:
    program = capture(model, example_inputs, entry, training)
    passes: list[Pass] = [RemoveDeadCode(), Normalize(), RemoveDeadCode()]
    PassManager(passes).run(program)
    return program


def _recorded_values(program: StepProgram) -> dict[str, Any]:
    return {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}


def _values_for(program: StepProgram, example_inputs: Any, entry: str) -> dict[str, Any]:
    """The values of one step for other examples; {} when the model does something else for these."""
    other = _captured(program.source, example_inputs, entry, program.training)

    def form(program: StepProgram) -> list[tuple[str, str, str]]:
        return [(node.name, node.op, str(node.target)) for node in program.graph.nodes]

    return _recorded_values(other) if form(other) == form(program) else {}


def _chunk_frame(net: Net, values: Mapping[str, Any], members: list[Box | Pill | Cluster]) -> list[Box | Pill | Cluster]:
    """What is inside the inputs and outputs, in a frame that says how many time steps are run at once."""
    chunk = net.options.chunk
    if chunk is None:
        return members
    frame = Cluster("chunk", "chunk", "chunk: auto", members, "in inference", "as many time steps as fit a memory budget")
    if isinstance(chunk, int):
        frame.title, frame.tooltip = _chunk_title(chunk), "as asked for"
        return [frame]
    program = net.program
    recorded = [values.get(node.name) for node in program.input_nodes()]
    if net.training or not all(isinstance(value, Tensor) for value in recorded):
        return [frame]
    held = next((t for t in (*net.source.parameters(), *net.source.buffers())), torch.empty(0))
    steps = [torch.empty(1, dtype=v.dtype, device=held.device).expand(v.shape) for v in recorded if isinstance(v, Tensor)]
    try:
        plan = plan_chunks(program, steps, chunk)
    except RuntimeError:
        # A module that is run as it is may look at values, of which there are none here.
        return [frame]
    if plan.length is not None:
        batch = next((f", N = {s.shape[0]}" for s in steps if s.dim()), "")
        frame.title, frame.note, frame.tooltip = _chunk_title(plan.length), f"in inference{batch}", plan.reason
    return [frame]


def _chunk_title(length: int) -> str:
    return f"chunk: {length} step{'s' * (length != 1)} at once"


# -- placing nodes ------------------------------------------------------------------------------------------------


class _Painter:
    """Turns the nodes of a program into boxes, pills and edges.

    Args:
        program: the program.
        values: the value of one step, by node name, as far as it is known.
        places: the container or region that each drawn node is in.
    """

    def __init__(self, program: StepProgram, values: Mapping[str, Any], places: Mapping[Node, str]) -> None:
        self.program, self.values = program, values
        self.kinds: dict[str, str] = {}
        self.batch_known = True
        dependence = analyse_dependence(program)
        self.sequential = dependence.sequential
        self.drawn = [n for n in program.graph.nodes if _is_drawn(n) and n not in dependence.initial_only]
        self.place = {node: places.get(node, "") for node in self.drawn}
        self.slots = dict(zip(program.slot_nodes(), program.next_states, strict=True))
        self.batch = self._batch_size()
        known = set(self.drawn)
        self.readers: dict[Node, list[Node]] = {}
        for node in self.drawn:
            for operand in self._operands(node):
                self.readers.setdefault(operand, []).append(node)
        self.depth: dict[Node, int] = {}
        for node in self.drawn:
            self.depth[node] = 1 + max((self.depth.get(o, 0) for o in self._operands(node)), default=0)
        for slot in self.slots:
            near = [*self.readers.get(slot, []), self._source(self.slots[slot])]
            self.place[slot] = next((self.place[n] for n in near if n in known), "")
        self.parameters = {
            (operand, self.place[node]): f"p{i}"
            for i, (operand, node) in enumerate((o, n) for n in self.drawn for o in self._operands(n) if o.op == "get_attr")
        }
        self.id: dict[Node, str] = {}
        self.boxes = self._stack()

    # -- the graph as it is drawn

    def _source(self, value: Any) -> Node | None:
        """The drawn node, slot, input or parameter that a value comes from; None for sizes and constants."""
        while isinstance(value, Node) and is_structural(value):
            value = value.args[0]
        if not isinstance(value, Node) or is_size(value) or value.target is expect_size:
            return None
        if value.op == "get_attr" and not isinstance(self.program.resolve(str(value.target)), Tensor):
            return None
        return value

    def _operands(self, node: Node) -> list[Node]:
        sources = (self._source(operand) for operand in node.all_input_nodes)
        return list(dict.fromkeys(s for s in sources if s is not None))

    def _batch_size(self) -> int | None:
        """N of the examples."""
        for node in self.program.input_nodes():
            value = self.values.get(node.name)
            if isinstance(value, Tensor) and value.dim() > 0:
                return value.shape[0]
        return None

    def _stack(self) -> list[Box]:
        """Chains of nodes that nothing leaves or enters become one box each."""
        self.ends = {self._source(value) for value in self.program.outputs}
        ends = self.ends | {self._source(value) for value in self.program.next_states}
        chains: dict[Node, list[Node]] = {}
        for node in self.drawn:
            operands = [o for o in self._operands(node) if o.op != "get_attr"]
            above = operands[0] if len(operands) == 1 else None
            joins = (
                above in chains
                and above not in ends
                and self.readers[above] == [node]
                and self.place[above] == self.place[node]
                and not self._is_stateful(above)
                and not self._is_stateful(node)
            )
            chain = chains[above] if joins and above is not None else []
            chain.append(node)
            chains[node] = chain
        self.chains = list({id(chain): chain for chain in chains.values()}.values())
        boxes = []
        for index, chain in enumerate(self.chains):
            for row, node in enumerate(chain):
                self.id[node] = f"b{index}" if row == 0 or node is chain[-1] else f"b{index}:r{row}"
            boxes.append(Box(f"b{index}", []))
            if self._is_stateful(chain[0]):
                boxes[-1].style = "stateful"
        for index, slot in enumerate(self.slots):
            self.id[slot] = f"s{index}"
        for index, node in enumerate(self.program.input_nodes()):
            self.id[node] = f"x{index}"
        return boxes

    def _is_stateful(self, node: Node) -> bool:
        return is_module_call(node)

    # -- nodes

    def members(self, place: str, show_codes: bool = False) -> list[Box | Pill | Cluster]:
        """What is drawn at one place: parameters, slots, boxes."""
        found: list[Box | Pill | Cluster] = []
        for (node, where), identifier in self.parameters.items():
            if where == place:
                found.append(Pill(identifier, "parameter", str(node.target), self.shape(node), f"parameter {node.target}"))
        beside: dict[Node, list[Box | Pill | Cluster]] = {}
        for slot, following in self.slots.items():
            if self.place[slot] == place:
                # A slot that one operation reads and writes stands next to it.
                readers, writer = self.readers.get(slot, []), self._source(following)
                single = len(readers) == 1 and readers[0] is writer
                (beside.setdefault(readers[0], []) if single else found).append(self._slot(slot))
        for chain, box in zip(self.chains, self.boxes, strict=True):
            if self.place[chain[0]] != place:
                continue
            box.rows = self._rows(chain, show_codes)
            if place in self.kinds:
                box.style = "layer"
            if chain[0] in beside:
                found.append(Cluster(f"row_{box.id}", "row", "", [*beside[chain[0]], box]))
            else:
                found.append(box)
        return found

    def _rows(self, chain: list[Node], show_codes: bool) -> list[Row]:
        rows = []
        before = next((self._sizes(o) for o in chain[0].all_input_nodes if o.op != "get_attr"), (None, ""))
        usual = next((self._sizes(node)[1] for node in self.program.input_nodes()), "")
        for node in chain:
            title, detail = summarize_node(self.program, node)
            name = describe_node(node) if node.op == "call_module" or is_module_call(node) else ""
            refusal = node.meta.get("refusal") if self.kinds else None
            lines = [line for line in (f"{describe_node(node)}: {title} {detail}".rstrip(), place_of(node)) if line]
            if refusal is not None:
                lines.append(f"{refusal.code} {refusal.reason}. {refusal.hint}".rstrip())
            code = refusal.code if refusal is not None and show_codes else ""
            sizes = self._sizes(node)
            shape = "" if sizes == before or self._shape_is_outside(node) else self.shape(node)
            shape = shape.removesuffix(f" {usual}")
            rows.append(Row(title, detail, name, shape, code, "\n".join(lines)))
            before = sizes
        return rows

    def _shape_is_outside(self, node: Node) -> bool:
        """Whether the shape of a value stands at an edge or at an output."""
        outside = any(self.place[reader] != self.place[node] for reader in self.readers.get(node, []))
        return (outside and bool(self.kinds)) or node in self.ends

    def _slot(self, slot: Node) -> Pill:
        name = str(slot.meta["slot"])
        index = list(self.slots).index(slot)
        initial = self.program.initial_values[index]
        start = f"starts at {initial!r}" if not isinstance(initial, Node) else f"starts at {describe_node(initial)} of the first step"
        tooltip = f"state {name} {self.shape(slot)}\n{start}"
        return Pill(self.id[slot], "slot", name.rpartition(".")[2], tooltip=tooltip)

    def inputs(self, time_dims: Mapping[Node, int | None]) -> list[Pill]:
        """The inputs; `time_dims` says where T is in each, and nothing for one step."""
        pills = []
        for node in self.program.input_nodes():
            sizes, dtype = self._sizes(node)
            shape = ""
            if sizes is not None:
                if time_dims.get(node) is not None:
                    dim = time_dims[node]
                    sizes.insert(dim if dim >= 0 else len(sizes) + 1 + dim, "T")
                shape = f"[{', '.join(sizes)}] {dtype}"
            if node in time_dims and time_dims[node] is None:
                shape += " at every step"
            name = next(leaf.name for leaf in self.program.input_leaves if leaf.placeholder == node.name)
            pills.append(Pill(self.id[node], "input", name, shape.strip(), f"input {name}"))
        return pills

    def outputs(self) -> list[Pill]:
        """One node for each output, named by its place in what a step returns."""
        pills = []
        for index, (name, value) in enumerate(zip(self._output_names(), self.program.outputs, strict=True)):
            shape = self.shape(value, "time" if self.kinds else "step") if isinstance(value, Node) else repr(value)
            pills.append(Pill(f"y{index}", "output", name, shape, f"output {name}"))
        return pills

    def _output_names(self) -> list[str]:
        numbered = pytree.tree_unflatten(list(self.program.outputs), self.program.output_spec)
        paths, _ = pytree.tree_flatten_with_path(numbered)
        return ["y" + pytree.keystr(path) for path, _ in paths]

    # -- shapes

    def shape(self, node: Any, context: str | None = None) -> str:
        """Shape and dtype of a value, with N and T as symbols, as it is at its place ("time": between places)."""
        sizes, dtype = self._sizes(node)
        if sizes is None:
            return ""
        context = context or self.kinds.get(self.place.get(node, ""), "step")
        if node.meta.get("varying", True):
            if context == "fold":
                sizes = [size.replace("N", "T·N") for size in sizes]
            elif context == "time":
                sizes = ["T", *sizes]
        return f"[{', '.join(sizes)}] {dtype}"

    def _sizes(self, node: Node) -> tuple[list[str] | None, str]:
        if is_module_call(node):
            # (output, next states): the output is what is meant.
            node = next((user for user in node.users if is_structural(user) and user.args[1] == 0), node)
        value = self.values.get(node.name)
        if value is None and node.op == "get_attr":
            value = self.program.resolve(str(node.target))
        if not isinstance(value, Tensor):
            return None, ""
        sizes = [str(size) for size in value.shape]
        dim = node.meta.get("batch_dim") if self.batch_known else None
        if isinstance(dim, int) and self.batch and dim < len(sizes) and value.shape[dim] % self.batch == 0:
            times = value.shape[dim] // self.batch
            sizes[dim] = "N" if times == 1 else f"{times}·N"
        return sizes, str(value.dtype).removeprefix("torch.")

    # -- edges

    def edges(self) -> list[Edge]:
        """Data, then what is handed to the next step."""
        found: dict[tuple[str, str], Edge] = {}
        for node in self.drawn:
            for operand in node.all_input_nodes:
                self._add_edge(found, operand, node)
        for index, value in enumerate(self.program.outputs):
            source = self._source(value)
            if source is not None and source in self.id:
                found[self.id[source], f"y{index}"] = Edge(self.id[source], f"y{index}", main=True)
        return [*found.values(), *self._carried_edges()]

    def _add_edge(self, found: dict[tuple[str, str], Edge], operand: Node, node: Node) -> None:
        source = self._source(operand)
        if source is None:
            return
        tail = self.parameters[source, self.place[node]] if source.op == "get_attr" else self.id[source]
        head = self.id[node]
        if tail.partition(":")[0] == head.partition(":")[0]:
            return
        crosses = source in self.place and self.place[source] != self.place[node]
        label = self.shape(operand, "time") if crosses and self.kinds else ""
        longest = max(self._operands(node), key=lambda o: self.depth.get(o, -1))
        found.setdefault((tail, head), Edge(tail, head, label, main=source is longest))

    def _carried_edges(self) -> Iterable[Edge]:
        for slot, following in self.slots.items():
            source = self._source(following)
            head = self.id[slot]
            tail = head if source is None else self.id.get(source, head)
            yield Edge(tail, head, _CARRIED, carried=True, upwards=slot in self.sequential)


def _is_drawn(node: Node) -> bool:
    return node.op.startswith("call") and not is_structural(node) and not is_size(node) and node.target is not expect_size


# -- containers ---------------------------------------------------------------------------------------------------


def _module_places(program: StepProgram) -> dict[Node, str]:
    """The container that each node is in, by qualified name."""
    places = {}
    for node in program.graph.nodes:
        module = str(node.target) if node.op == "call_module" else str(node.meta.get("module") or "")
        calls = node.op == "call_module" or is_module_call(node)
        places[node] = module.rpartition(".")[0] if calls else module
    return places


def _module_clusters(painter: _Painter) -> list[Box | Pill | Cluster]:
    """The boxes of a model in frames that are nested as its modules are."""
    places = dict.fromkeys(painter.place.values())
    children: dict[str, list[str]] = {}
    for place in places:
        while place:
            parent = place.rpartition(".")[0]
            siblings = children.setdefault(parent, [])
            if place not in siblings:
                siblings.append(place)
            place = parent
    resolve: Callable[[str], Any] = painter.program.resolve

    def inside(place: str, depth: int) -> list[Box | Pill | Cluster]:
        members = painter.members(place)
        for child in children.get(place, []):
            below = inside(child, depth + 1)
            if len(below) > 1:
                style = "inner container" if depth % 2 else "container"
                for box in (box for member in below for box in _boxes_of(member)):
                    box.rows = [replace(row, name=row.name.removeprefix(f"{child}.")) for row in box.rows]
                cluster = Cluster(f"c{len(numbers)}", style, child, below, note=type(resolve(child)).__name__)
                numbers.append(child)
                members.append(cluster)
            else:
                members += below
        return members

    numbers: list[str] = []
    return inside("", 0)


def _boxes_of(member: Box | Pill | Cluster) -> list[Box]:
    """The boxes at the level of a member itself, not in a frame."""
    if isinstance(member, Cluster):
        return [box for box in member.members if isinstance(box, Box)] if member.style == "row" else []
    return [member] if isinstance(member, Box) else []

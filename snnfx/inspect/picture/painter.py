"""Turn the nodes of a step program into boxes, pills and arrows.

A chain of operations becomes the rows of one box. A state slot becomes a pill, with a dashed arrow to the next time
step. Nodes that only compute sizes or initial values are not drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.fx import Node

from snnfx.inspect.picture.densities import Densities
from snnfx.inspect.picture.dot import Box, Cluster, Edge, LabelRow, Member, Pill
from snnfx.inspect.picture.drawn_operations import DrawnOperations
from snnfx.inspect.picture.layer_summary import summarize_node
from snnfx.inspect.picture.repeated_blocks import join_numbers
from snnfx.ir.facts import BATCH_DIM, REFUSAL, SLOT, SUNK, VARYING
from snnfx.ir.nodes import is_module_call, is_structural
from snnfx.ir.printing import describe_node, location_of
from snnfx.sandbox.pytree_paths import flatten_with_path
from snnfx.sandbox.torch_internals import pytree
from snnfx.state.step_calls import initial_value

__all__ = ["Painter"]

_CARRIED = "t→t+1"


class Painter:
    """Turns the drawn operations of a program into boxes, pills and edges.

    Args:
        drawn: the drawn operations.
        values: known values of one step, by node name.
        frames: the frame that each drawn node is in; "" is the outermost.
        kinds: kind of each frame of a region.
        densities: what a profile measured.

    Attributes:
        reduce: the reduction over time of the outputs, as in `snnfx.convert`.
        batch_known: whether the program says where the batch dimension of each value is.
    """

    def __init__(
        self,
        drawn: DrawnOperations,
        values: Mapping[str, Any],
        frames: Mapping[Node, str],
        kinds: Mapping[str, str] | None = None,
        densities: Densities | None = None,
    ) -> None:
        self.drawn, self.program, self.values, self.kinds = drawn, drawn.program, values, dict(kinds or {})
        self.densities = densities
        self.reduce: str | None = None
        self.batch_known = True
        self.nodes, self.slots = drawn.nodes, drawn.slots
        self.frame_of = {node: frames.get(node, "") for node in self.nodes}
        self.batch = self._batch_size()
        known = set(self.nodes)
        self.readers: dict[Node, list[Node]] = {}
        for node in self.nodes:
            for operand in drawn.operands(node):
                self.readers.setdefault(operand, []).append(node)
        self.depth: dict[Node, int] = {}
        for node in self.nodes:
            self.depth[node] = 1 + max((self.depth.get(o, 0) for o in drawn.operands(node)), default=0)
        for slot in self.slots:
            # A slot that only delays a value belongs to none of the regions.
            near = [] if self.kinds else [*self.readers.get(slot, []), drawn.source(self.slots[slot])]
            self.frame_of[slot] = next((self.frame_of[n] for n in near if n in known), frames.get(slot, ""))
        self.constants: dict[tuple[Any, str], str] = {}
        for node in self.nodes:
            for operand in drawn.operands(node):
                if operand.op == "get_attr" and node not in drawn.closed:
                    self.constants.setdefault((operand, self.frame_of[node]), f"p{len(self.constants)}")
        for slot, following in self.slots.items():
            if not self._is_computed(following):
                self.constants.setdefault((following, self.frame_of[slot]), f"p{len(self.constants)}")
        for value in self.program.outputs:
            if isinstance(value, Node) and not self._is_computed(value):
                self.constants.setdefault((value, ""), f"p{len(self.constants)}")
        self.id: dict[Node, str] = {}
        self.row: dict[Node, str] = {}
        self.boxes = self._stack()

    def _is_computed(self, value: Any) -> bool:
        """Whether a value comes from a drawn node, a slot or an input, and not from a parameter or a constant."""
        source = self.drawn.source(value)
        return source is not None and source.op != "get_attr"

    def _batch_size(self) -> int | None:
        """The batch size N of the example inputs."""
        for node in self.program.input_nodes():
            value = self.values.get(node.name)
            if isinstance(value, Tensor) and value.dim() > 0:
                return value.shape[0]
        return None

    def _stack(self) -> list[Box]:
        """Put each chain of nodes without branches into one box."""
        self.ends = {self.drawn.source(value) for value in self.program.outputs}
        ends = self.ends | {self.drawn.source(value) for value in self.program.next_states}
        chains: dict[Node, list[Node]] = {}
        of_module: dict[str, list[Node]] = {}
        for node in self.nodes:
            if node in self.drawn.closed:
                chains[node] = of_module.setdefault(self.drawn.closed[node], [])
                chains[node].append(node)
                continue
            operands = [o for o in self.drawn.operands(node) if o.op != "get_attr"]
            above = operands[0] if len(operands) == 1 else None
            joins = (
                above in chains
                and above not in self.drawn.closed
                and above not in ends
                and self.readers[above] == [node]
                and self.frame_of[above] == self.frame_of[node]
                and not is_module_call(above)
                and not is_module_call(node)
            )
            chain = chains[above] if joins and above is not None else []
            chain.append(node)
            chains[node] = chain
        self.chains = list({id(chain): chain for chain in chains.values()}.values())
        boxes = []
        for index, chain in enumerate(self.chains):
            is_closed = chain[0] in self.drawn.closed
            for row, node in enumerate(chain):
                self.id[node] = f"b{index}"
                self.row[node] = f"b{index}:r{row}" if row and not is_closed else f"b{index}"
            boxes.append(Box(f"b{index}", []))
            if is_closed:
                boxes[-1].style = "inner container"
                self._close_slots(f"b{index}", chain)
            elif is_module_call(chain[0]):
                boxes[-1].style = "stateful"
        for index, slot in enumerate(self.slots):
            self.id.setdefault(slot, f"s{index}")
        for index, node in enumerate(self.program.input_nodes()):
            self.id[node] = f"x{index}"
        return boxes

    def _close_slots(self, identifier: str, chain: list[Node]) -> None:
        """Put the slots that only this box reads and writes into the box."""
        inside = set(chain)
        for slot, following in self.slots.items():
            if inside.issuperset([*self.readers.get(slot, []), self.drawn.source(following) or chain[0]]):
                self.id[slot] = identifier

    def members(self, frame: str, show_codes: bool = False) -> list[Member]:
        """The parameters, slots and boxes of one frame."""
        members: list[Member] = []
        for (value, where), identifier in self.constants.items():
            if where == frame:
                known = isinstance(value, Node)
                name = str(value.target) if known else repr(value)
                shape = self.shape(value) if known else ""
                members.append(
                    Pill(identifier, "parameter", name, shape, f"{'parameter' if known else 'constant'} {name}")
                )
        slots_of_node: dict[Node, list[Member]] = {}
        for slot, following in self.slots.items():
            if self.frame_of[slot] == frame and self.id[slot].startswith("s"):
                # A slot that a single operation reads and writes is drawn next to that operation.
                readers, writer = self.readers.get(slot, []), self.drawn.source(following)
                single = len(readers) == 1 and readers[0] is writer
                (slots_of_node.setdefault(readers[0], []) if single else members).append(self._slot(slot))
        for chain, box in zip(self.chains, self.boxes, strict=True):
            if self.frame_of[chain[0]] != frame:
                continue
            if chain[0] in self.drawn.closed:
                box.rows = [self._closed_row(chain)]
                members.append(box)
                continue
            box.rows = self._rows(chain, show_codes)
            if frame in self.kinds:
                box.style = "layer"
            if chain[0] in slots_of_node:
                members.append(Cluster(f"row_{box.id}", "row", "", [*slots_of_node[chain[0]], box]))
            else:
                members.append(box)
        return members

    def _rows(self, chain: list[Node], show_codes: bool) -> list[LabelRow]:
        rows = []
        before = next((self._sizes(o) for o in chain[0].all_input_nodes if o.op != "get_attr"), (None, ""))
        usual = next((self._sizes(node)[1] for node in self.program.input_nodes()), "")
        for node in chain:
            twins = self.drawn.twins[node]
            summaries = [summarize_node(self.program, twin) for twin in twins]
            title, detail = summaries[0][0], join_numbers([text for _, text in summaries])
            name = describe_node(node) if node.op == "call_module" or is_module_call(node) else ""
            refusal = REFUSAL.of(node) if self.kinds else None
            lines = [line for line in (f"{describe_node(node)}: {title} {detail}".rstrip(), location_of(node)) if line]
            if len(twins) > 1:
                lines.append(f"drawn once for {', '.join(dict.fromkeys(map(describe_node, twins)))}")
            if refusal is not None:
                lines.append(f"{refusal.code} {refusal.reason}. {refusal.hint}".rstrip())
            code = refusal.code if refusal is not None and show_codes else ""
            density = self.densities.of(twins) if self.densities is not None else None
            if density is not None:
                lines.append(density.meaning)
            sizes = self._sizes(node)
            shape = "" if sizes == before or self._shape_is_outside(node) else self.shape(node)
            shape = shape.removesuffix(f" {usual}")
            rows.append(LabelRow(title, detail, name, shape, code, "\n".join(lines), density))
            before = sizes
        return rows

    def _closed_row(self, chain: list[Node]) -> LabelRow:
        """The only row of a closed module."""
        module = self.drawn.closed[chain[0]]
        repetition = next((r for r in self.drawn.repetitions.get(chain[0], []) if module in r.modules), None)
        modules = repetition.modules if repetition is not None else (module,)
        kinds = list(dict.fromkeys(type(self.program.resolve(name)).__name__ for name in modules))
        title = f"{len(modules)} × " * (len(modules) > 1) + " / ".join(kinds)
        operations = f"{len(chain)} operations{' each' * (len(modules) > 1)}"
        name = module if len(modules) == 1 else f"{module} … {modules[-1]}"
        lines = [
            f"{', '.join(modules)}: {' / '.join(kinds)}",
            *dict.fromkeys(map(location_of, chain)),
            "a larger depth= opens it",
        ]
        density = None
        if self.densities is not None:
            density = self.densities.of_neurons([twin for node in chain for twin in self.drawn.twins[node]])
        return LabelRow(title, operations, name, "", "", "\n".join(filter(None, lines)), density)

    def _shape_is_outside(self, node: Node) -> bool:
        """Whether the shape of a value is written at an edge or at an output."""
        outside = any(self.frame_of[reader] != self.frame_of[node] for reader in self.readers.get(node, []))
        return (outside and bool(self.kinds)) or node in self.ends

    def _slot(self, slot: Node) -> Pill:
        name = str(SLOT.of(slot))
        initial = self.program.initial_values[list(self.slots).index(slot)]
        if not isinstance(initial, Node):
            start = repr(initial)
        elif initial.target is initial_value:
            start = "the reset value"
        else:
            start = f"{describe_node(initial)}, computed at the first step"
        tooltip = f"state {name} {self.shape(slot)}".rstrip() + f"\ninitial value: {start}"
        return Pill(self.id[slot], "slot", name.rpartition(".")[2], tooltip=tooltip)

    def inputs(self, time_dims: Mapping[Node, int | None]) -> list[Pill]:
        """One pill for each input; `time_dims` maps inputs to their time dimension, and is empty for a single step."""
        pills = []
        for node in self.program.input_nodes():
            shape = self._shape_outside(node, time_dims.get(node))
            if node in time_dims and time_dims[node] is None:
                shape += " at every step"
            name = next(leaf.name for leaf in self.program.input_leaves if leaf.placeholder == node.name)
            pills.append(Pill(self.id[node], "input", name, shape.strip(), f"input {name}"))
        return pills

    def outputs(self, time_dim: int | None = None) -> list[Pill]:
        """One pill for each output, named by its path in the step's return value; None: without a time dimension."""
        pills = []
        for index, (name, value) in enumerate(zip(self._output_names(), self.program.outputs, strict=True)):
            shape = self._shape_outside(value, time_dim) if isinstance(value, Node) else repr(value)
            if self.reduce is not None:
                shape = f"{shape} {self.reduce} over T".strip()
            pills.append(Pill(f"y{index}", "output", name, shape, f"output {name}"))
        return pills

    def _output_names(self) -> list[str]:
        numbered = pytree.tree_unflatten(list(self.program.outputs), self.program.output_spec)
        paths, _ = flatten_with_path(numbered)
        return ["y" + pytree.keystr(path) for path, _ in paths]

    def shape(self, node: Any, context: str | None = None) -> str:
        """Shape and dtype of a value with symbols N and T, as seen in its frame ("time": as seen between frames)."""
        sizes, dtype = self._joined_sizes(node)
        if sizes is None:
            return ""
        context = context or self.kinds.get(self.frame_of.get(node, ""), "step")
        if VARYING.of(node):
            if context == "fold":
                sizes = [size.replace("N", "T·N") for size in sizes]
            elif context == "time":
                sizes = ["T", *sizes]
        return f"[{', '.join(sizes)}] {dtype}"

    def _shape_outside(self, node: Node, time_dim: int | None) -> str:
        """Shape and dtype as seen by the caller of the net."""
        sizes, dtype = self._sizes(node)
        if sizes is None:
            return ""
        if time_dim is not None:
            sizes.insert(time_dim if time_dim >= 0 else len(sizes) + 1 + time_dim, "T")
        return f"[{', '.join(sizes)}] {dtype}"

    def _joined_sizes(self, node: Node) -> tuple[list[str] | None, str]:
        """The sizes of a value, with both ends of a size that differs between the blocks for which it stands."""
        if is_structural(node) and node.args[1] == 0:
            node = next(iter(node.all_input_nodes))
        sizes, dtype = self._sizes(node)
        others = [self._sizes(twin)[0] for twin in self.drawn.twins.get(node, [])]
        if sizes is None or not all(other is not None and len(other) == len(sizes) for other in others):
            return sizes, dtype
        columns = zip(sizes, *[other for other in others if other is not None], strict=True)
        return [join_numbers(list(column[1:])) if column[1:] else column[0] for column in columns], dtype

    def _sizes(self, node: Node) -> tuple[list[str] | None, str]:
        if is_module_call(node):
            # A module call returns (output, next states): draw the output.
            node = next((user for user in node.users if is_structural(user) and user.args[1] == 0), node)
        value = self.values.get(node.name)
        if value is None and node.op == "get_attr":
            value = self.program.resolve(str(node.target))
        if not isinstance(value, Tensor):
            return None, ""
        sizes = [str(size) for size in value.shape]
        dim = BATCH_DIM.of(node) if self.batch_known else None
        if isinstance(dim, int) and self.batch and dim < len(sizes) and value.shape[dim] % self.batch == 0:
            times = value.shape[dim] // self.batch
            sizes[dim] = "N" if times == 1 else f"{times}·N"
        return sizes, str(value.dtype).removeprefix("torch.")

    def edges(self) -> list[Edge]:
        """The data edges, then the edges of carried state."""
        edges: dict[tuple[str, str], Edge] = {}
        for node in self.nodes:
            for operand in node.all_input_nodes:
                self._add_edge(edges, operand, node)
        for index, value in enumerate(self.program.outputs):
            tail = self._tail(value, "")
            if tail:
                edges[tail, f"y{index}"] = Edge(tail, f"y{index}", main=True)
        return [*edges.values(), *self._carried_edges()]

    def _add_edge(self, edges: dict[tuple[str, str], Edge], operand: Node, node: Node) -> None:
        source = self.drawn.source(operand)
        if source is None:
            return
        if self.id.get(source) == self.id[node]:
            return
        if source.op == "get_attr" and node in self.drawn.closed:
            return
        tail = self.constants[source, self.frame_of[node]] if source.op == "get_attr" else self.id[source]
        head = self.row[node]
        crosses = source in self.frame_of and self.frame_of[source] != self.frame_of[node]
        label = self.shape(operand, "time") if crosses and self.kinds else ""
        if SUNK.of(node) and not SUNK.of(source) and source.meta.get("varying") and self.kinds:
            # The outputs are reduced over time here: later nodes run once.
            how = "last" if self.reduce == "last" else "mean"
            label = f"{self.shape(operand, 'step')} {how} over T".strip()
        longest = max(self.drawn.operands(node), key=lambda o: self.depth.get(o, -1))
        edges.setdefault((tail, head), Edge(tail, head, label, main=source is longest))

    def _carried_edges(self) -> Iterable[Edge]:
        for slot, following in self.slots.items():
            if self.id[slot].startswith("b"):
                continue
            tail = self._tail(following, self.frame_of[slot])
            yield Edge(tail, self.id[slot], _CARRIED, carried=True, upwards=slot in self.drawn.sequential)

    def _tail(self, value: Any, frame: str) -> str:
        """The id at which an arrow from a value starts; constants have one id in each frame; "" if not drawn."""
        source = self.drawn.source(value)
        if source is not None and source.op != "get_attr":
            return self.id[source]
        return self.constants.get((value, frame), "")

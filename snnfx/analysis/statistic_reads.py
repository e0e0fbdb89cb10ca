"""Order the reads of statistics and the calls that update them.

A layer such as BatchNorm updates its running statistics in place. A step that reads them gets another value in front of
the call than behind it. `read_updated_statistics` makes each read a node with an operand that says which call precedes
it; `update_chains` lists reads and calls in program order, for analyses that must keep this order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node, map_arg

from snnfx.errors import CaptureError
from snnfx.ir.facts import VALUE, WHERE
from snnfx.ir.module_effects import has_in_place_flag, updated_buffers
from snnfx.ir.nodes import is_in_place, is_size
from snnfx.ir.printing import location_of
from snnfx.ir.program import SELF_TARGET, StepProgram
from snnfx.ops.statistics import read_statistic
from snnfx.sandbox.torch_internals import pytree
from snnfx.state.step_calls import call_opaque

__all__ = ["is_statistic_read", "read_updated_statistics", "statistic_of", "update_chains"]

SharesMemory = Callable[[StepProgram, Node, Node], bool]
"""`(program, node, operand) -> bool`: whether the value of `node` may be a view of `operand`, or `operand` itself."""


def is_statistic_read(node: Node) -> bool:
    """Whether the node reads a statistic that a call of the step updates."""
    return node.target is read_statistic


def statistic_of(node: Node) -> str:
    """The qualified name of the statistic that a read returns."""
    module, name = node.args[0], node.args[1]
    owner = str(module.target) if isinstance(module, Node) else ""
    return str(name) if owner == SELF_TARGET else f"{owner}.{name}"


def update_chains(program: StepProgram, nodes: Iterable[Node] | None = None) -> list[list[Node]]:
    """For each updated buffer with several calls and reads among the nodes (default: all), these in program order."""
    chains: dict[int, list[Node]] = {}
    for node in program.graph.nodes if nodes is None else nodes:
        if is_statistic_read(node):
            chains.setdefault(id(program.resolve(statistic_of(node))), []).append(node)
        else:
            for buffer in updated_buffers(program, node):
                chains.setdefault(id(buffer), []).append(node)
    several = {tuple(chain): chain for chain in chains.values() if len(chain) > 1}
    return list(several.values())


def read_updated_statistics(program: StepProgram, may_share_memory: SharesMemory) -> int:
    """Replace each operand that is an updated buffer, or a view of one, by a read at the position of its user.

    Returns:
        The number of reads.

    Raises:
        CaptureError: SNNFX214, a state shares the memory of the buffer.
    """
    nodes = list(program.graph.nodes)
    calls: dict[int, list[Node]] = {}
    for node in nodes:
        for buffer in updated_buffers(program, node):
            calls.setdefault(id(buffer), []).append(node)
    if not calls:
        return 0
    position = {node: index for index, node in enumerate(nodes)}
    count = 0
    for node in nodes:
        if node.op == "get_attr":
            buffer = program.resolve(str(node.target))
            if isinstance(buffer, Tensor) and id(buffer) in calls:
                reads = _Reads(program, node, calls[id(buffer)], position, may_share_memory)
                reads.replace()
                count += len(reads.versions)
    return count


class _Reads:
    """The reads of one buffer: a version for each number of preceding calls."""

    def __init__(
        self,
        program: StepProgram,
        attribute: Node,
        calls: list[Node],
        position: dict[Node, int],
        may_share_memory: SharesMemory,
    ) -> None:
        self.program, self.attribute, self.calls, self.position = program, attribute, calls, position
        self.may_share_memory = may_share_memory
        self.versions: dict[int, Node] = {}
        self.copies: dict[tuple[Node, int], Node] = {}
        self.values: dict[Node, Any] = {attribute: program.resolve(str(attribute.target))}
        """The buffer and its views."""
        self.places: dict[Node, float] = dict(position)
        """Positions of nodes, the inserted ones between their predecessor and its successor."""

    def replace(self) -> None:
        aliases = self._aliases()
        for alias in aliases:
            for user in list(alias.users):
                if user in aliases or user not in self.position or self._changes(user, alias) or is_size(user):
                    continue
                if user.op == "output":
                    self._refuse_shared_state(alias)
                version = self._version_at(user)
                user.replace_input_with(alias, self._copy_of(alias, version, user))
        for alias in reversed(aliases):
            if not alias.users:
                self.program.graph.erase_node(alias)

    def _aliases(self) -> list[Node]:
        """The buffer and its views, in program order."""
        aliases = [self.attribute]
        for alias in aliases:
            for user in sorted(alias.users, key=lambda n: self.position.get(n, 0)):
                if user in aliases or user not in self.position or self._changes(user, alias):
                    continue
                if self.may_share_memory(self.program, user, alias) and self._shares_storage(user, alias):
                    aliases.append(user)
        return aliases

    def _shares_storage(self, user: Node, alias: Node) -> bool:
        """Whether a user returns a view of the buffer, found by running it; True if it cannot run without inputs."""
        if alias not in self.values:
            return True

        def load(node: Node) -> Any:
            return self.values[node] if node in self.values else VALUE.of(node)

        target: Any = user.target
        try:
            args, kwargs = map_arg((user.args, user.kwargs), load)
            with torch.no_grad():
                value = (
                    getattr(args[0], target)(*args[1:], **kwargs)
                    if user.op == "call_method"
                    else target(*args, **kwargs)
                )
        except (KeyError, TypeError, RuntimeError, NotImplementedError):
            return True  # an operand is known at a call only
        self.values[user] = value
        storage = self.values[self.attribute].untyped_storage()._cdata
        return any(v.untyped_storage()._cdata == storage for v in pytree.tree_leaves(value) if isinstance(v, Tensor))

    def _changes(self, user: Node, alias: Node) -> bool:
        """Whether a user updates the buffer, as a call of the layer or in place."""
        if user in self.calls:
            return True
        in_place = is_in_place(user) or has_in_place_flag(self.program, user)
        return in_place and bool(user.args) and user.args[0] is alias

    def _version_at(self, user: Node) -> int:
        return sum(self.position[call] < self.position[user] for call in self.calls)

    def _copy_of(self, alias: Node, version: int, user: Node) -> Node:
        """The value of an alias after this number of calls."""
        if alias is self.attribute:
            return self._read(version, user)
        if (alias, version) not in self.copies:
            operand = alias.args[0]
            assert isinstance(operand, Node)
            before = self._copy_of(operand, version, user)
            place = max(self.places[alias], self.places[before])
            predecessor = alias if place == self.places[alias] else before
            with self.program.graph.inserting_after(predecessor):
                copy = self.program.graph.node_copy(alias, lambda n: before if n is operand else n)
            copy.meta = dict(alias.meta)
            self.places[copy] = place
            self.copies[alias, version] = copy
        return self.copies[alias, version]

    def _read(self, version: int, user: Node) -> Node:
        if version not in self.versions:
            graph, after = self.program.graph, self.calls[version - 1] if version else None
            owner, _, name = str(self.attribute.target).rpartition(".")
            predecessor = self.attribute if after is None else after
            if self.places[predecessor] < self.places[self.attribute]:
                predecessor = self.attribute
            with graph.inserting_after(predecessor):
                module = graph.get_attr(owner or SELF_TARGET)
            with graph.inserting_after(module):
                arguments = (module, name) if after is None else (module, name, after)
                read = graph.call_function(read_statistic, arguments)
            read.meta = {k: v for k, v in self.attribute.meta.items() if k in ("val", "module")}
            WHERE.set(read, WHERE.of(user) or WHERE.of(self.attribute))
            self.places[read] = self.places[predecessor]
            self.versions[version] = read
        return self.versions[version]

    def _refuse_shared_state(self, alias: Node) -> None:
        states = pytree.tree_leaves((self.program.next_states, self.program.initial_values))
        if any(value is alias for value in states):
            part = next((str(c.args[0].target) for c in self.calls if c.target is call_opaque), None)  # type: ignore[union-attr]
            if part is not None:
                name = str(self.attribute.target).removeprefix("snnfx_start.")
                raise CaptureError(
                    "SNNFX214",
                    f"the step changes the buffer `{name}`, and `{part}` has this buffer too",
                    where=location_of(alias),
                    why=f"`{part}` cannot be traced, so it runs as a whole and would read the buffer at another time.",
                    hint=f"Change it in the forward of `{part}` instead, or pass its value to `{part}` as an argument.",
                )
            raise CaptureError(
                "SNNFX214",
                f"a state shares the memory of `{self.attribute.target}`, which the step changes in place",
                where=location_of(alias),
                why="the state would change with each update.",
                hint=f"Store a copy: `{self.attribute.target}.clone()`.",
            )

"""Find consecutive blocks of a graph that repeat, so that a picture draws one of them with a count.

Blocks repeat if their operations are the same up to numbers (widths, strides, constants) and are connected in the same
way: inside the block, to the previous block, and to values that all blocks read. Names of modules do not matter. A
block is a run of members of one module: operations, or modules with everything inside. Two blocks whose values another
part of the graph reads are never joined, except that any value of the last block may be read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from torch.fx import Node

__all__ = ["BlockGraph", "Repetition", "find_repetitions", "join_numbers", "without_numbers"]

_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_LEAST_HIDDEN = 4
"""A repetition hides at least this many operations."""
_LEAST_COUNT = 3
"""The least number of blocks that are not whole modules."""
_LONGEST = 64
"""The most members of one block."""


@dataclass(frozen=True)
class BlockGraph:
    """The drawn operations of a program.

    Args:
        nodes: the operations in program order.
        modules: operation -> the qualified names of the modules that it is in, the outermost first.
        operands: operation -> the operations, slots, inputs and parameters that it reads.
        next_of_slot: slot -> the operation that computes its next value.
        form: operation -> a value that is equal for operations that look the same and run in the same way.
        ends: the outputs of the program.
    """

    nodes: Sequence[Node]
    modules: Mapping[Node, tuple[str, ...]]
    operands: Mapping[Node, Sequence[Node]]
    next_of_slot: Mapping[Node, Node | None]
    form: Mapping[Node, Hashable]
    ends: frozenset[Node]


@dataclass(frozen=True, eq=False)
class Repetition:
    """Blocks of the same structure, one behind the other.

    Args:
        copies: the operations of each block, in the same order.
        modules: the module of each block; empty if a block is not a whole module.
        outer: the repetition whose first block contains these blocks.
        module: the module that all blocks are members of.
    """

    copies: tuple[tuple[Node, ...], ...]
    modules: tuple[str, ...]
    outer: Repetition | None
    module: str

    @property
    def count(self) -> int:
        return len(self.copies)


@dataclass(frozen=True)
class _Member:
    """A member of a module: one operation, or a module inside it with its operations."""

    module: str
    nodes: tuple[Node, ...]


@dataclass
class _Search:
    graph: BlockGraph
    depth: int | None
    found: list[Repetition] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.readers: dict[Node, list[Node]] = {}
        for node in self.graph.nodes:
            for operand in self.graph.operands[node]:
                self.readers.setdefault(operand, []).append(node)
        self.slots_of: dict[Node, list[Node]] = {}
        for slot, following in self.graph.next_of_slot.items():
            if following is not None:
                self.slots_of.setdefault(following, []).append(slot)

    def search(self, level: int, nodes: Sequence[Node], outer: Repetition | None) -> None:
        """Find the repetitions among the members of the module at a level of nesting, and inside those members."""
        self._search_members(level, self._members(level, nodes), outer)

    def _search_members(self, level: int, members: list[_Member], outer: Repetition | None) -> None:
        best = self._best(level, members)
        if best is None:
            for member in members:
                if member.module and not self._is_closed(level):
                    self.search(level + 1, member.nodes, outer)
            return
        start, period, count = best
        blocks = [members[start + i * period : start + (i + 1) * period] for i in range(count)]
        copies = tuple(tuple(node for member in block for node in member.nodes) for block in blocks)
        modules = tuple(block[0].module for block in blocks) if period == 1 and blocks[0][0].module else ()
        inside = self.graph.modules[copies[0][0]][level - 1] if level else ""
        repetition = Repetition(copies, modules, outer, inside)
        self.found.append(repetition)
        self._search_members(level, members[:start], outer)
        if period > 1:
            self._search_members(level, blocks[0], repetition)
        elif modules and not self._is_closed(level):
            self.search(level + 1, copies[0], repetition)
        self._search_members(level, members[start + period * count :], outer)

    def _members(self, level: int, nodes: Sequence[Node]) -> list[_Member]:
        members: list[_Member] = []
        for node in nodes:
            modules = self.graph.modules[node]
            module = modules[level] if level < len(modules) else ""
            if members and module and members[-1].module == module:
                members[-1] = _Member(module, (*members[-1].nodes, node))
            else:
                members.append(_Member(module, (node,)))
        return members

    def _is_closed(self, level: int) -> bool:
        return self.depth is not None and level >= self.depth

    def _best(self, level: int, members: list[_Member]) -> tuple[int, int, int] | None:
        """Start, length and number of the blocks that hide the most operations."""
        best, most = None, _LEAST_HIDDEN - 1
        forms = [tuple(self.graph.form[node] for node in member.nodes) for member in members]
        for period in range(1, min(len(members) // 2, _LONGEST) + 1):
            for start in range(len(members) - 2 * period + 1):
                count = self._repeats(level, members, forms, start, period)
                hidden = (count - 1) * sum(len(member.nodes) for member in members[start : start + period])
                if hidden > most:
                    best, most = (start, period, count), hidden
        return best

    def _repeats(self, level: int, members: list[_Member], forms: Sequence[Hashable], start: int, period: int) -> int:
        """The number of blocks of the same structure from `start` on."""
        first = members[start : start + period]
        least = 2 if period == 1 and first[0].module else _LEAST_COUNT
        if self.depth is not None and not (self._is_closed(level) and all(member.module for member in first)):
            return 1
        copies = [tuple(node for member in first for node in member.nodes)]
        end = start + period
        while end + period <= len(members) and forms[start : start + period] == forms[end : end + period]:
            copies.append(tuple(node for member in members[end : end + period] for node in member.nodes))
            if not self._follows(copies):
                copies.pop()
                break
            end += period
        private = next((i for i, copy in enumerate(copies) if self._is_read_elsewhere(copies, i, copy)), len(copies))
        count = min(len(copies), private + 1)
        return count if count >= least else 1

    def _follows(self, copies: list[tuple[Node, ...]]) -> bool:
        """Whether the last block is connected like the one before it."""
        before, last = copies[-2], copies[-1]
        at_before = {node: i for i, node in enumerate(before)}
        at_last = {node: i for i, node in enumerate(last)}
        further = {node: i for i, node in enumerate(copies[-3])} if len(copies) > 2 else None
        entries: dict[int, Node] = {}
        for a, b in zip(before, last, strict=True):
            of_a, of_b = self.graph.operands[a], self.graph.operands[b]
            if len(of_a) != len(of_b):
                return False
            for x, y in zip(of_a, of_b, strict=True):
                if y in at_last:
                    same = at_before.get(x) == at_last[y]
                elif y in at_before:
                    index = at_before[y]
                    if further is not None:
                        same = further.get(x) == index
                    else:
                        same = x not in at_before and x.op != "get_attr" and entries.setdefault(index, x) is x
                elif y in self.graph.next_of_slot and x in self.graph.next_of_slot:
                    next_x, next_y = self.graph.next_of_slot[x], self.graph.next_of_slot[y]
                    same = next_y in at_last and next_x in at_before and at_before[next_x] == at_last[next_y]
                else:
                    same = x is y or (x.op == "get_attr" and y.op == "get_attr")
                if not same:
                    return False
        return True

    def _is_read_elsewhere(self, copies: list[tuple[Node, ...]], index: int, copy: tuple[Node, ...]) -> bool:
        """Whether anything but this block and the next one reads a value of a block."""
        inside = set(copy) | set(copies[index + 1] if index + 1 < len(copies) else ())
        for node in copy:
            readers = self.readers.get(node, [])
            slot_readers = [r for slot in self.slots_of.get(node, []) for r in self.readers.get(slot, [])]
            if node in self.graph.ends or not inside.issuperset(readers) or not set(copy).issuperset(slot_readers):
                return True
        return False


def find_repetitions(graph: BlockGraph, depth: int | None = None) -> list[Repetition]:
    """The repetitions of a graph, each one before the repetitions inside its first block.

    Args:
        graph: the drawn operations.
        depth: the number of levels of modules that are open; only closed modules are joined then.
    """
    search = _Search(graph, depth)
    search.search(0, graph.nodes, None)
    return search.found


def without_numbers(text: str) -> str:
    """The text with each number replaced by `#`."""
    return _NUMBER.sub("#", text)


def join_numbers(texts: Sequence[str], write: Callable[[str, str], str] = "{}…{}".format) -> str:
    """One text for texts that differ in their numbers: `16→32`, `64→128` give `16…64→32…128`."""
    first, last = texts[0], texts[-1]
    if len(set(texts)) == 1 or len(set(map(without_numbers, texts))) > 1:
        return first
    columns = list(zip(*map(_NUMBER.findall, texts), strict=True))
    ends = zip(_NUMBER.findall(first), _NUMBER.findall(last), columns, strict=True)
    numbers = iter([a if len(set(column)) == 1 else write(a, b) for a, b, column in ends])
    return _NUMBER.sub(lambda match: next(numbers), first)

"""The uses of counters, and of lists that grow, in the code of a loop or of a function that it calls."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Protocol

from snnfx.capture.iteration_tracking import FunctionKey, Kinds
from snnfx.sequence.loop_lengths import LoopLengths
from snnfx.sequence.source_trees import nodes_of

__all__ = ["Calls", "CounterUses", "counted_names"]


_MUTATIONS = frozenset("append appendleft insert extend pop popleft popitem remove rotate".split())
_FUNCTIONS_OF_NUMBERS = frozenset("exp log log2 log10 sqrt pow sin cos tanh float print range append tensor".split())
"""Functions whose results grow with their argument, so that the first iterations show their effect."""
_READS = frozenset("select narrow index_select".split())
_NUMBERS_OF_TENSORS = frozenset("shape ndim dtype device size dim numel item tolist stride len int float bool".split())
"""Attributes, methods and functions of tensors that are Python values."""
_METHODS = _READS | {"append", "masked_fill", "new_full"}
_ARITHMETIC = ast.Add | ast.Sub | ast.Mult | ast.Div | ast.Pow


class Calls(Protocol):
    """The functions of the user that the iterations call."""

    def functions_at(self, call: ast.Call, filename: str) -> list[FunctionKey]:
        """The functions that a call runs."""

    def returns_tensor(self, function: FunctionKey) -> bool:
        """Whether a function surely returns a tensor."""

    def is_harmless_in(self, function: FunctionKey, call: ast.Call, argument: ast.AST) -> bool:
        """Whether a counter may be an argument of a call: the function shows its effect in the first iterations."""


class CounterUses:
    """The uses of counters, and of lists that grow, in some code.

    Args:
        bodies: the code.
        kinds: the kinds of the values of its variables, where known.
        targets: the loop variables and what they iterate over.
        tests: the conditions of a comprehension, among the code.
        of_attributes: whether only attributes outlive a run of the code.
        lengths: the expressions of the number of iterations; None for a function that the iterations call.
        calls: the functions that the iterations call.
        filename: the file of the code.
        counters: parameters that are counters.
        makes_tensors: whether the code is the element of a comprehension, and a tensor.
    """

    def __init__(
        self,
        bodies: list[ast.AST],
        kinds: Kinds,
        targets: Iterable[tuple[ast.AST, ast.AST]],
        tests: Sequence[ast.AST],
        of_attributes: bool = False,
        lengths: LoopLengths | None = None,
        *,
        calls: Calls,
        filename: str,
        counters: Set[str] = frozenset(),
        makes_tensors: bool = False,
    ) -> None:
        self.bodies, self.kinds, self.of_attributes, self.lengths = bodies, kinds, of_attributes, lengths
        self.calls, self.filename, self.makes_tensors = calls, filename, makes_tensors
        self.parents = {child: node for node in nodes_of(bodies) for child in ast.iter_child_nodes(node)}
        self.tests = set(tests)
        self.loop_variables = {name for target, iterated in targets for name in counted_names(target, iterated)}
        self.loop_variables |= counters
        self.lists = {
            ast.unparse(node.func.value)
            for node in nodes_of(bodies)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _MUTATIONS
        }
        self.lists |= set(self._rebuilt_lists())
        self.lists = {key for key in self.lists if self._outlives(key)}
        self.counters = self._find_counters()

    def _outlives(self, key: str) -> bool:
        return not self.of_attributes or "." in key

    def _rebuilt_lists(self) -> Iterator[str]:
        """The lists that the code replaces by others with their elements: `hist = hist[1:] + [s]`."""
        for node in nodes_of(self.bodies):
            if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.BinOp | ast.List | ast.Tuple):
                continue
            for key in map(ast.unparse, node.targets):
                is_list = isinstance(node.value, ast.List) or "tensors" in self.kinds.get(key, set())
                if is_list and any(self._key(n) == key for n in ast.walk(node.value)):
                    yield key

    def _has_long_delay(self) -> bool:
        """Whether variables pass a value on for three iterations or more: `s3 = s2; s2 = s1; s1 = s`."""
        copies: dict[str, str] = {}
        for node in nodes_of(self.bodies):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    pairs = [(target, node.value)]
                    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                        pairs = list(zip(target.elts, node.value.elts, strict=False))
                    copies |= {self._key(a): self._key(b) for a, b in pairs if self._key(a) and self._key(b)}
        for start in copies:
            chain, key = [start], copies[start]
            while key not in chain and key in copies:
                chain, key = [*chain, key], copies[key]
            if len(chain) >= 3:
                return True
        return False

    def _find_counters(self) -> set[str]:
        found = set(self.loop_variables)
        for node in nodes_of(self.bodies):
            if isinstance(node, ast.AugAssign):
                key, is_step = ast.unparse(node.target), _is_number(node.value)
                # `self.v *= 0.9` changes a tensor, most likely.
                is_step &= isinstance(node.target, ast.Name) or isinstance(node.op, ast.Add | ast.Sub)
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp) and len(node.targets) == 1:
                key, is_step = ast.unparse(node.targets[0]), _is_number(node.value.right)
                is_step &= isinstance(node.value.op, ast.Add | ast.Sub) and ast.unparse(node.value.left) == key
            else:
                continue
            if is_step and self._is_number(key) and self._outlives(key):
                found.add(key)
        while True:  # variables computed from counters
            more = set()
            for node in nodes_of(self.bodies):
                if isinstance(node, ast.Assign | ast.AugAssign) and self._computes_number(node.value, found):
                    more |= {key for key in map(ast.unparse, _targets(node)) if self._is_number(key)}
            if more <= found:
                return found
            found |= more

    def _computes_number(self, value: ast.AST, counters: set[str]) -> bool:
        """Whether an expression reads counters, but not only as indices."""
        if isinstance(value, ast.Subscript):
            return False
        if self._key(value) in counters:
            return True
        if isinstance(value, ast.BinOp) and (self.computes_tensor(value.left) or self.computes_tensor(value.right)):
            return False
        if isinstance(value, ast.IfExp):  # the test is a use of its own
            return any(self._computes_number(branch, counters) for branch in (value.body, value.orelse))
        return any(self._computes_number(child, counters) for child in ast.iter_child_nodes(value))

    def _is_number(self, key: str) -> bool:
        """Whether a variable may count; it may start as a number, as in `mem = 0`, and become a tensor."""
        return not self.kinds.get(key, set()) & {"tensor", "tensors"}

    @staticmethod
    def _key(node: ast.AST) -> str:
        return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute | ast.Subscript) else ""

    def depend_on_count(self) -> bool:
        """Whether a use may have another effect in later iterations."""
        if self._has_long_delay():
            return True
        for node in nodes_of(self.bodies):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "next":
                return True
            key = self._key(node)
            if not key or not isinstance(getattr(node, "ctx", None), ast.Load):
                continue
            if key in self.counters and not self._is_harmless(node):
                return True
            if key in self.lists and not self._shows_list(node):
                return True
        return False

    # -- counters -----------------------------------------------------------------------------------------------------

    def _is_harmless(self, node: ast.AST) -> bool:
        """Whether the first iterations show the effect of this use of a counter."""
        if self._is_visible_test(node):
            return True
        current: ast.AST = node
        while True:
            parent = self.parents.get(current)
            if parent is None:
                return self.makes_tensors and current not in self.tests
            if isinstance(parent, ast.Expr | ast.JoinedStr):
                return isinstance(parent, ast.Expr)
            if isinstance(parent, ast.BinOp) and isinstance(parent.op, _ARITHMETIC):
                if self.computes_tensor(parent.right if parent.left is current else parent.left):
                    return True
                current = parent
            elif (
                (isinstance(parent, ast.UnaryOp) and isinstance(parent.op, ast.USub | ast.UAdd))
                or isinstance(parent, ast.keyword)
                or (isinstance(parent, ast.Slice | ast.Tuple) and self._subscript_of(parent) is not None)
            ):
                current = parent
            elif isinstance(parent, ast.Subscript):
                return current is parent.slice and self._is_read_of_tensors(parent, node)
            elif isinstance(parent, ast.Call):
                if self._is_element_read(parent):
                    return True
                if not self._is_of_numbers(parent):
                    functions = self.calls.functions_at(parent, self.filename)
                    if not functions or not all(self.calls.is_harmless_in(f, parent, current) for f in functions):
                        return False
                    if all(map(self.calls.returns_tensor, functions)):
                        return True
                if isinstance(parent.func, ast.Name) and parent.func.id in ("print", "range"):
                    return True
                current = parent
            elif isinstance(parent, ast.Return):
                # Its caller tests the call like the argument, but does not know counters that the function keeps.
                return self.lengths is None and not any("." in key for key in self.counters)
            elif isinstance(parent, ast.Assign | ast.AugAssign):
                # What is computed from a counter is one itself, or a tensor.
                return all(isinstance(t, ast.Name | ast.Attribute) or self._is_tensor(t) for t in _targets(parent))
            else:
                return False

    def _is_visible_test(self, node: ast.AST) -> bool:
        """Whether a counter is compared with the number of one of the first iterations, or of the last."""
        parent = self.parents.get(node)
        if not isinstance(node, ast.Name) or node.id not in self.loop_variables:
            return False
        if self.lengths is not None and self.lengths.is_test_of_end(node, self.parents):
            return True
        if isinstance(parent, ast.Compare) and len(parent.comparators) == 1:
            other = parent.comparators[0] if parent.left is node else parent.left
            return isinstance(other, ast.Constant) and other.value in (0, 1, 2)
        return self._is_test(node)

    def _is_test(self, node: ast.AST) -> bool:
        """Whether the truth of a value is tested: `if t`, `not outputs`."""
        parent = self.parents.get(node)
        if node in self.tests or isinstance(parent, ast.BoolOp):
            return True
        if isinstance(parent, ast.UnaryOp):
            return isinstance(parent.op, ast.Not)
        return isinstance(parent, ast.If | ast.IfExp) and parent.test is node

    def _subscript_of(self, node: ast.AST) -> ast.Subscript | None:
        while isinstance(node, ast.Slice | ast.Tuple):
            parent = self.parents.get(node)
            if isinstance(parent, ast.Subscript) and parent.slice is node:
                return parent
            if parent is None:
                return None
            node = parent
        return None

    def _is_read_of_tensors(self, subscript: ast.Subscript, counter: ast.AST) -> bool:
        """Whether an indexed object is a tensor, or a list of tensors that the loop itself fills."""
        key = self._key(subscript.value)
        if key in self.lists:
            return self._is_near(subscript.slice)
        return self._is_tensor(subscript.value, ("tensor", "tensors"))

    def _is_tensor(self, node: ast.AST, kinds: tuple[str, ...] = ("tensor",)) -> bool:
        while isinstance(node, ast.Subscript):
            node = node.value
        if isinstance(node, ast.Call):
            return True  # its result is new in each iteration
        return isinstance(node, ast.Name) and bool(self.kinds.get(node.id)) and self.kinds[node.id] <= set(kinds)

    def computes_tensor(self, node: ast.AST) -> bool:
        """Whether an expression computes with a variable that is a tensor."""
        if isinstance(node, ast.Name):
            return self._is_tensor(node)
        if isinstance(node, ast.Subscript):
            return self._is_tensor(node, ("tensor", "tensors"))
        if isinstance(node, ast.Attribute):
            return node.attr not in _NUMBERS_OF_TENSORS and self.computes_tensor(node.value)
        if isinstance(node, ast.Call):
            if getattr(node.func, "attr", getattr(node.func, "id", "")) in _NUMBERS_OF_TENSORS:
                return False
            return any(map(self.computes_tensor, (node.func, *node.args)))
        return isinstance(node, ast.BinOp | ast.UnaryOp) and any(map(self.computes_tensor, ast.iter_child_nodes(node)))

    @staticmethod
    def _is_near(index: ast.AST) -> bool:
        """Whether an index names the current iteration or one of the two before it: `t`, `t - 1`."""
        if isinstance(index, ast.BinOp):
            offset = index.right
            near = isinstance(offset, ast.Constant) and isinstance(offset.value, int) and abs(offset.value) <= 2
            return near and isinstance(index.op, ast.Add | ast.Sub) and isinstance(index.left, ast.Name | ast.Attribute)
        return isinstance(index, ast.Name | ast.Attribute)

    def _is_element_read(self, call: ast.Call) -> bool:
        """Whether a call reads an element of a tensor: `x.select(0, t)`."""
        function = call.func
        return isinstance(function, ast.Attribute) and function.attr in _READS and self.computes_tensor(function.value)

    def _is_of_numbers(self, call: ast.Call) -> bool:
        """Whether a function computes with numbers and tensors only."""
        function = call.func
        if isinstance(function, ast.Name):
            return function.id in _FUNCTIONS_OF_NUMBERS or (
                function.id == "int" and isinstance(call.args[0], ast.Name | ast.Attribute)
            )
        if not isinstance(function, ast.Attribute):
            return False
        if isinstance(function.value, ast.Name) and function.value.id in ("torch", "F"):
            return function.attr not in ("floor", "ceil", "round", "clamp", "bitwise_and", "remainder", "fmod")
        of_library = isinstance(function.value, ast.Name) and function.value.id in ("math", "np", "numpy")
        return function.attr in (
            _FUNCTIONS_OF_NUMBERS if of_library else _READS | {"append", "masked_fill", "new_full"}
        )

    # -- lists --------------------------------------------------------------------------------------------------------

    def _shows_list(self, node: ast.AST) -> bool:
        """Whether the first iterations show the effect of this use of a list that grows."""
        parent = self.parents.get(node)
        if isinstance(parent, ast.Attribute):
            call = self.parents.get(parent)
            return isinstance(call, ast.Call) and parent.attr in ("append", "extend") and self._is_statement(call)
        if isinstance(parent, ast.Subscript) and parent.value is node:
            index = parent.slice
            if isinstance(index, ast.UnaryOp) and isinstance(index.op, ast.USub):
                return isinstance(index.operand, ast.Constant) and index.operand.value in (1, 2)
            return self._is_near(index)
        if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id == "len":
            compared = self.parents.get(parent)
            if isinstance(compared, ast.Compare) and len(compared.comparators) == 1:
                other = compared.comparators[0]
                return isinstance(other, ast.Constant) and other.value in (0, 1)
            return self._is_test(parent)
        return self._is_test(node)

    def _is_statement(self, node: ast.AST) -> bool:
        return isinstance(self.parents.get(node), ast.Expr)


def counted_names(target: ast.AST, iterated: ast.AST) -> set[str]:
    """The loop variables that count: those of `range(...)` and `enumerate(...)`."""
    if isinstance(iterated, ast.Call):
        name = iterated.func.id if isinstance(iterated.func, ast.Name) else getattr(iterated.func, "attr", "")
        if name in ("range", "arange", "count", "trange"):
            return {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
        if name in ("tqdm", "reversed", "list") and iterated.args:
            return counted_names(target, iterated.args[0])
        if isinstance(target, ast.Tuple) and name == "enumerate" and target.elts and iterated.args:
            inner = counted_names(target.elts[1], iterated.args[0]) if len(target.elts) > 1 else set()
            return inner | {n.id for n in ast.walk(target.elts[0]) if isinstance(n, ast.Name)}
        if isinstance(target, ast.Tuple) and name == "zip" and len(target.elts) == len(iterated.args):
            parts = [counted_names(t, i) for t, i in zip(target.elts, iterated.args, strict=True)]
            return set().union(*parts)
    return set()


def _targets(node: ast.Assign | ast.AugAssign) -> Iterator[ast.AST]:
    """The variables and elements that an assignment sets."""
    stack: list[ast.AST] = list(node.targets) if isinstance(node, ast.Assign) else [node.target]
    while stack:
        target = stack.pop()
        if isinstance(target, ast.Tuple | ast.List):
            stack += target.elts
        else:
            yield target.value if isinstance(target, ast.Starred) else target


def _is_number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float)

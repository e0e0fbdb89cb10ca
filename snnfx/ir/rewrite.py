"""The base class of passes that replace each match of a pattern in the step graph.

The pattern is a Python function of its operands, traced with torch.fx. Matching starts from the node that computes the
result of the pattern and compares operands recursively. The same operation written as a function, a method or an
activation module without parameters is one operation, and its arguments are compared by name, with their defaults. The
operands of `add` and `mul` match in both orders.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx, nn
from torch.fx import Node

from snnfx.errors import PassError
from snnfx.ir.call_arguments import arguments_of_call, arguments_of_module, operation_key
from snnfx.ir.facts import MODULE, RETURNED_BY, WHERE
from snnfx.ir.graph_pass import Pass, location_of_pass
from snnfx.ir.printing import describe_node, location_of, operation_name
from snnfx.ir.program import StepProgram

__all__ = ["Match", "Rewrite", "call"]


def call(module_class: type[nn.Module], *operands: Any) -> Any:
    """In a pattern, a call of a module of a class: `call(nn.Linear, x)`."""
    proxy = next((operand for operand in operands if isinstance(operand, fx.Proxy)), None)
    if proxy is None:
        raise TypeError("`call` describes a call in a pattern, and needs an operand of the pattern")
    called = proxy.tracer.create_proxy("call_function", call, operands, {})
    called.node.meta[_CLASS] = module_class
    return called


_CLASS = "module_class"


@dataclass
class Match:
    """One match of a pattern.

    Attributes:
        program: the program.
        root: the node that computes the result of the pattern.
        operands: the operands of the pattern, by the name of the parameter.
        nodes: the matched nodes, the root first.
        modules: the modules that matched nodes call, in the order of `nodes`.
    """

    program: StepProgram
    root: Node
    operands: dict[str, Any] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)

    @property
    def graph(self) -> fx.Graph:
        """The graph; new nodes go in front of the root."""
        return self.program.graph

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that matched nodes call, in the order of `nodes`."""
        return [module for node in self.nodes if (module := self.program.module_of(node)) is not None]

    def __getitem__(self, operand: str) -> Any:
        return self.operands[operand]


@dataclass(frozen=True)
class Rewrite(Pass):
    """A pass that replaces each match of `pattern` by the result of `rewrite`.

    If nothing was replaced, the note in `net.history` gives the nearest miss with its reason.

    Example:
        >>> import torch, snnfx
        >>> from dataclasses import dataclass
        >>> from snnfx.passes import Rewrite
        >>> @dataclass(frozen=True)
        ... class ReluToClamp(Rewrite):
        ...     name = "relu_to_clamp"
        ...     upper: float = 1.0
        ...
        ...     def pattern(self, x):
        ...         return torch.relu(x)
        ...
        ...     def rewrite(self, match):
        ...         return match.graph.call_function(torch.clamp, (match["x"], 0.0, self.upper))
        >>> net = snnfx.convert(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()), passes=[ReluToClamp()])
        >>> [record.note for record in net.history if "relu_to_clamp" in record.description]
        ['replaced 1 of 1 matches']
    """

    requires: ClassVar[str | tuple[str, ...]] = "normalized"

    def pattern(self, *operands: Any) -> Any:
        """The pattern: a function of named operands."""
        raise NotImplementedError

    def check(self, match: Match) -> str:
        """The reason why a match must stay, as a clause; "" to replace it."""
        return ""

    def rewrite(self, match: Match) -> Any:
        """Add the replacement with `match.graph`, and return the node that computes it."""
        raise NotImplementedError

    def apply(self, program: StepProgram) -> str:
        matcher = _Matcher(program, _traced(self))
        replaced, refused = 0, list[str]()
        for root in list(program.graph.nodes):
            if root not in program.graph.nodes or not root.op.startswith("call"):
                continue
            reasons = []
            for match in matcher.matches(root):
                reason = self.check(match)
                if not reason:
                    self._replace(program, match)
                    replaced += 1
                    break
                reasons.append(reason)
            else:
                refused += [f"{_described(root)}: {reasons[0]}"] if reasons else []
        found = replaced + len(refused)
        note = f"replaced {replaced} of {found} matches"
        if not found and not matcher.nearest_miss:
            note = f"{note}; the step has no {_pattern_name(matcher.root)}"
        if refused:
            return f"{note}; refused {'; '.join(refused[:3])}"
        return f"{note}; nearest miss: {matcher.nearest_miss}" if not found and matcher.nearest_miss else note

    def _replace(self, program: StepProgram, match: Match) -> None:
        graph, root = program.graph, match.root
        present = set(graph.nodes)
        with graph.inserting_before(root):
            new = self.rewrite(match)
        if not isinstance(new, Node):
            raise PassError(
                "SNNFX704",
                f"`rewrite` of the pass `{self.name}` returned no node",
                where=location_of_pass(self),
                why=f"it returned {new!r}.",
                hint="Return the node that replaces the result of the pattern.",
            )
        for node in graph.nodes:
            if node not in present:
                for fact in (WHERE, MODULE):
                    node.meta.setdefault(fact.key, fact.of(root))
        if new is root:
            return
        if RETURNED_BY.is_known(root) and new not in present:
            RETURNED_BY.set(new, RETURNED_BY.of(root))
        root.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        for node in match.nodes:
            if not node.users and node is not new:
                graph.erase_node(node)


def _traced(rewrite: Rewrite) -> fx.Graph:
    """The graph of a pattern."""
    names = list(inspect.signature(rewrite.pattern).parameters)
    tracer = fx.Tracer()
    tracer.root = nn.Module()
    graph = tracer.graph = fx.Graph(tracer_cls=fx.Tracer)
    proxies = [tracer.create_proxy("placeholder", name, (), {}) for name in names]
    result = rewrite.pattern(*proxies)
    if not isinstance(result, fx.Proxy) or result.node.op == "placeholder":
        raise PassError(
            "SNNFX702",
            f"the pass `{rewrite.name}` is not well defined",
            where=location_of_pass(rewrite),
            why="its pattern computes nothing, or returns several values.",
            hint="Return the result of one operation from `pattern`.",
        )
    graph.output(result.node)
    return graph


class _Matcher:
    """Matches nodes of a program against the graph of a pattern, and keeps the nearest miss."""

    def __init__(self, program: StepProgram, pattern: fx.Graph) -> None:
        self.program = program
        self.root: Node = pattern.output_node().args[0]  # type: ignore[assignment]
        self.nearest_miss, self._most = "", 0

    def matches(self, root: Node) -> Iterator[Match]:
        """Yield the matches whose result is `root`, in the orders of commutative operands."""
        for order in itertools.product(*[(False, True)] * _commutative_count(self.root)):
            bound: dict[Node, Any] = {}
            reason = self._bind(self.root, root, bound, iter(order)) or self._readers(root, bound)
            if not reason:
                operands = {str(p.target): value for p, value in bound.items() if p.op == "placeholder"}
                nodes = list(dict.fromkeys(v for p, v in bound.items() if p.op != "placeholder"))
                yield Match(self.program, root, operands, nodes)
                continue
            matched = sum(p.op != "placeholder" for p in bound)
            if matched > self._most:
                self._most, self.nearest_miss = matched, f"{_described(root)}: {reason}"

    def _bind(self, pattern: Any, value: Any, bound: dict[Node, Any], orders: Iterator[bool]) -> str:
        """Bind the nodes of the pattern to nodes of the program; the reason if that fails."""
        if not isinstance(pattern, Node):
            return self._bind_value(pattern, value, bound, orders)
        if pattern in bound:
            same = bound[pattern] is value
            return "" if same else f"it reads {value} and {bound[pattern]}, but the pattern reads one value twice"
        if pattern.op == "placeholder":
            bound[pattern] = value
            return ""
        if not isinstance(value, Node) or not value.op.startswith("call"):
            return f"it reads {value}, but the pattern has {_pattern_name(pattern)}"
        if _is_call(pattern):
            module = self.program.module_of(value)
            if value.op != "call_module" or not isinstance(module, pattern.meta[_CLASS]):
                return f"`{value.name}` is not a call of {_pattern_name(pattern)}"
            bound[pattern] = value
            return self._bind(tuple(pattern.args), tuple(value.args), bound, orders)
        module = self.program.resolve(str(value.target)) if value.op == "call_module" else None
        key = operation_key(value, module)
        if key != operation_key(pattern):
            return f"`{value.name}` is {_called(value, module)}, but the pattern has {operation_name(pattern)}"
        bound[pattern] = value
        expected = arguments_of_call(key, pattern.args, pattern.kwargs)
        if module is None:
            found = arguments_of_call(key, value.args, value.kwargs)
        else:
            found = arguments_of_module(module, value.args, value.kwargs)
        if expected is None or found is None:
            return self._bind(tuple(pattern.args), tuple(value.args), bound, orders) or self._bind(
                dict(pattern.kwargs), dict(value.kwargs), bound, orders
            )
        if key in _COMMUTATIVE and next(orders) and expected.get("alpha", 1) == 1:
            found = {**found, "input": found["other"], "other": found["input"]}
        return self._bind(expected, found, bound, orders)

    def _bind_value(self, pattern: Any, value: Any, bound: dict[Node, Any], orders: Iterator[bool]) -> str:
        if isinstance(pattern, tuple | list) and isinstance(value, tuple | list):
            if len(pattern) != len(value):
                return f"it has {len(value)} arguments, but the pattern has {len(pattern)}"
            return next((r for p, v in zip(pattern, value, strict=True) if (r := self._bind(p, v, bound, orders))), "")
        if isinstance(pattern, dict) and isinstance(value, dict):
            if pattern.keys() != value.keys():
                return f"it has the arguments {sorted(value)}, but the pattern has {sorted(pattern)}"
            for key in pattern:
                reason = self._bind(pattern[key], value[key], bound, orders)
                if reason:
                    return reason.replace("it has the argument ", f"it has {key}=")
            return ""
        is_equal = type(pattern) is type(value) and not isinstance(value, Node) and bool(pattern == value)
        return "" if is_equal else f"it has the argument {value}, but the pattern has {pattern}"

    def _readers(self, root: Node, bound: dict[Node, Any]) -> str:
        """The reason if a node outside the match reads a value inside it."""
        nodes = {value for pattern, value in bound.items() if pattern.op != "placeholder"}
        for node in nodes - {root}:
            outside = [user for user in node.users if user not in nodes]
            if outside:
                reader = "an output or a state" if outside[0].op == "output" else f"`{outside[0].name}`"
                return f"{reader} reads `{node.name}` too"
        return ""


_COMMUTATIVE = ("add", "mul")


def _commutative_count(root: Node) -> int:
    found, stack = set(), [root]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return min(4, sum(operation_key(n) in _COMMUTATIVE for n in found if n.op != "placeholder"))


def _is_call(pattern: Node) -> bool:
    return pattern.op == "call_function" and pattern.target is call


def _pattern_name(pattern: Node) -> str:
    if _is_call(pattern):
        return str(pattern.meta[_CLASS].__name__)
    return operation_name(pattern)


def _called(node: Node, module: nn.Module | None) -> str:
    return operation_name(node) if module is None else type(module).__name__


def _described(node: Node) -> str:
    where = location_of(node)
    return f"`{describe_node(node)}`" + (f" ({where})" if where else "")

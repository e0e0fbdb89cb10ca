"""Find loops whose later iterations may run other code than the first ones, which a capture of a few cannot see.

`if t == 100: ...` runs the same code in the first iterations, `gains[t // 10]` reads the same gain, and `delayed[0]`
of a list with ten elements is still its first one. Numbers and lists of Python leave no trace in the graph. The source
code of the loop, and of the functions that it calls, shows how they are used: a use is harmless if the first iterations
show its effect.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping

from snnfx.capture.iteration_tracking import CalledFunction, FunctionKey, Kinds, LoopSource
from snnfx.sequence.counter_uses import CounterUses, counted_names
from snnfx.sequence.loop_lengths import LoopLengths
from snnfx.sequence.source_trees import Function, Loop, definition_of, loop_at, nodes_of, parameter_of, parsed

__all__ = ["may_branch_on_count"]

_JOINS = frozenset("stack cat concat concatenate hstack vstack".split())


def may_branch_on_count(source: LoopSource) -> bool:
    """Whether other iterations of a loop than the first ones and the last may run other code; True if unknown."""
    tree = parsed(source.filename)
    loop = loop_at(tree, source) if tree is not None else None
    if tree is None or loop is None:
        return True
    kinds = source.values.kinds
    if isinstance(loop, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
        bodies: list[ast.AST] = [test for g in loop.generators for test in g.ifs]
        bodies += [loop.elt] if not isinstance(loop, ast.DictComp) else [loop.key, loop.value]
        targets = [(g.target, g.iter) for g in loop.generators]
        tests = [test for g in loop.generators for test in g.ifs]
    else:
        bodies, tests = list(loop.body), []
        targets = [(loop.target, loop.iter)] if isinstance(loop, ast.For) else []
    calls = _Calls(source.values.called)
    return (
        any(_reads_other_values(target, iterated, bodies, kinds) for target, iterated in targets)
        or CounterUses(
            bodies,
            kinds,
            targets,
            tests,
            lengths=LoopLengths(tree, loop, bodies, targets),
            calls=calls,
            filename=source.filename,
            makes_tensors=_is_joined(tree, loop),
        ).depend_on_count()
        or any(calls.depends_on_count(function, frozenset()) for function in source.values.called)
    )


def _is_joined(tree: ast.Module, loop: Loop) -> bool:
    """Whether a comprehension is the argument of a function that joins tensors: `torch.stack([f(t) for t in ...])`."""
    calls = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and n.args[:1] == [loop])
    return any(getattr(call.func, "attr", getattr(call.func, "id", "")) in _JOINS for call in calls)


class _Calls:
    """The functions of the user that the iterations call.

    Args:
        called: the functions by name.
    """

    def __init__(self, called: Mapping[FunctionKey, CalledFunction]) -> None:
        self.called = called
        self._open: set[tuple[FunctionKey, frozenset[str]]] = set()

    def depends_on_count(self, function: FunctionKey, counters: frozenset[str]) -> bool:
        """Whether a function keeps a counter or a list, or takes counters as arguments, and uses them to decide."""
        definition = definition_of(function)
        if definition is None:
            return bool(counters)  # without counters as where the loop itself calls a function of a library
        if (function, counters) in self._open:  # a recursion
            return False
        self._open.add((function, counters))
        try:
            uses = self._uses_in(function, definition, counters)
            return uses.depend_on_count()
        finally:
            self._open.discard((function, counters))

    def _uses_in(self, function: FunctionKey, definition: Function, counters: frozenset[str]) -> CounterUses:
        kinds = self.called[function].kinds
        body: list[ast.AST] = list(definition.body)
        return CounterUses(body, kinds, (), (), of_attributes=True, calls=self, filename=function[0], counters=counters)

    def functions_at(self, call: ast.Call, filename: str) -> list[FunctionKey]:
        """The functions that a call runs."""
        name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
        lines = range(call.lineno, (call.end_lineno or call.lineno) + 1)
        at_site = [f for f, c in self.called.items() if any(s[0] == filename and s[1] in lines for s in c.sites)]
        # The call of a module runs its `forward`.
        return [f for f in at_site if f[1] == name] or [f for f in at_site if f[1] in ("forward", "__call__")]

    def returns_tensor(self, function: FunctionKey) -> bool:
        """Whether a function surely returns a tensor."""
        definition = definition_of(function)
        if definition is None:
            return False
        uses = self._uses_in(function, definition, frozenset())
        returns = [n for n in ast.walk(definition) if isinstance(n, ast.Return)]
        return bool(returns) and all(n.value is not None and uses.computes_tensor(n.value) for n in returns)

    def is_harmless_in(self, function: FunctionKey, call: ast.Call, argument: ast.AST) -> bool:
        """Whether a counter may be an argument of a call: the function shows its effect in the first iterations."""
        definition = definition_of(function)
        parameter = None if definition is None else parameter_of(function, definition, call, argument)
        return parameter is not None and not self.depends_on_count(function, frozenset({parameter}))


def _reads_other_values(target: ast.AST, iterated: ast.AST, bodies: list[ast.AST], kinds: Kinds) -> bool:
    """Whether the loop iterates over numbers other than those of its iterations: `for gain, x in zip(gains, xs)`."""
    counters = counted_names(target, iterated)
    names = {n.id for n in ast.walk(target) if isinstance(n, ast.Name)} - counters
    others = {name for name in names if kinds.get(name, set()) & {"number", "other"}}
    return bool(others) and any(isinstance(n, ast.Name) and n.id in others for n in nodes_of(bodies))

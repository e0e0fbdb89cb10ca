"""Batch rules of the loops of a whole call, where the time dimension is the batch (`snnfx.sequence`)."""

from __future__ import annotations

from typing import Any

from snnfx.analysis.batch.call_site import CallSite, constant_int
from snnfx.analysis.batch.facts import UNKNOWN, Fact, Rank, SizeFact, UniformTuple, Value, leaves
from snnfx.analysis.batch.shape_rules import move_batch

__all__ = ["concatenate", "loop", "read", "stack", "write"]


def loop(site: CallSite) -> Value:
    """`run_loop` over all time steps: sequences have time first; other operands do not vary in time."""
    steps, operands = site["steps"], list(leaves(site["inputs"]))
    symbol = steps.symbol if isinstance(steps, SizeFact) else None
    batched = [o for o in operands if isinstance(o, Fact) and o.batched]
    if symbol is None or any(o.dim != 0 or o.size != symbol for o in batched) or not batched:
        site.refuse("SNNFX103", "the loop does not run once for each time step")
        return UNKNOWN
    if any(not isinstance(o, Fact) or (o.varying and not o.batched) for o in operands):
        site.refuse("SNNFX105", "the loop reads a value that depends on several time steps")
        return UNKNOWN
    # Ranks are those of the example values.
    return UniformTuple(Fact(Rank(1, site.node.name), 0, symbol)), UniformTuple(UNKNOWN)


def read(site: CallSite) -> Value:
    """`read_elements` of all time steps, in order: time becomes the first dimension."""
    fact, dim, count = site["x"], constant_int(site["dim"]), site["count"]
    if not isinstance(fact, Fact):
        return UNKNOWN
    if fact.dim is None:
        return move_batch(fact, None)
    in_order = (constant_int(site["start"]), constant_int(site["step"])) == (0, 1)
    is_whole = isinstance(count, SizeFact) and count.symbol == fact.size
    if dim is None or dim != fact.dim or not in_order or not is_whole:
        site.refuse("SNNFX103", "the loop reads other elements than the one of its time step")
        return UNKNOWN
    return move_batch(fact, 0)


def stack(site: CallSite) -> Value:
    """`stack_elements` of the values of all time steps."""
    part = _only_sequence(site)
    dim = constant_int(site["dim"])
    if part is None or dim is None or part.rank.known is None:
        return UNKNOWN
    return move_batch(part, dim % part.rank.known)


def concatenate(site: CallSite) -> Value:
    """`concatenate_elements` of the values of all time steps: time in front of their own dimension."""
    part = _only_sequence(site)
    dim = constant_int(site["dim"])
    if part is None or dim is None or part.rank.known is None:
        return UNKNOWN
    return Fact(part.rank - 1, dim % (part.rank.known - 1), site.fresh)


def write(site: CallSite) -> Value:
    """`write_elements` of all time steps, in order."""
    values, dim = site["values"], constant_int(site["dim"])
    in_order = (constant_int(site["start"]), constant_int(site["step"])) == (0, 1)
    target = site["x"]
    if not isinstance(values, Fact) or values.dim != 0 or dim is None or not in_order or not isinstance(target, Fact):
        site.refuse("SNNFX103", "the loop writes other elements than the one of its time step")
        return UNKNOWN
    if target.dim != dim or target.size != values.size:
        site.refuse("SNNFX103", "the loop writes some elements of a tensor only")
        return UNKNOWN
    return target


def _only_sequence(site: CallSite) -> Fact | None:
    parts: Any = site["parts"]
    flags: Any = site["is_sequence"]
    if len(parts) == 1 and list(flags) == [True] and isinstance(parts[0], Fact) and parts[0].dim == 0:
        return parts[0]
    site.refuse("SNNFX103", "the call joins time steps with other values")
    return None

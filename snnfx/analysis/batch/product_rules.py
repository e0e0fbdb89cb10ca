"""Batch rules of products: linear layers, matmul, einsum, attention."""

from __future__ import annotations

from dataclasses import dataclass

from snnfx.analysis.batch.call_site import CallSite, broadcast, common_fact, require_trailing, without_batch
from snnfx.analysis.batch.elementwise_rules import Trailing
from snnfx.analysis.batch.facts import UNKNOWN, Fact, Rank, Value, leaves

__all__ = ["MatMul", "attention", "bilinear", "einsum", "linear"]


def linear(site: CallSite) -> Value:
    """`linear` on the last dimension, with a two-dimensional weight."""
    weight, bias = site["weight"], site["bias"]
    if isinstance(weight, Fact) and weight.rank.known != 2:
        site.refuse("SNNFX101", f"the weight of {site.text} may not have two dimensions")
        return UNKNOWN
    if isinstance(bias, Fact) and bias.rank.known not in (0, 1):
        site.refuse("SNNFX104", f"the bias of {site.text} may have a fixed size in the batch dimension")
    return Trailing(1)(site)


def bilinear(site: CallSite) -> Value:
    """`bilinear` on the last dimension of two tensors."""
    bias = site["bias"]
    if isinstance(bias, Fact) and bias.rank.known not in (0, 1):
        site.refuse("SNNFX104", f"the bias of {site.text} may have a fixed size in the batch dimension")
    return Trailing(1, ("input1", "input2"))(site)


@dataclass(frozen=True)
class MatMul:
    """Matrix product over the last two dimensions, broadcast over the others; also with vectors.

    Args:
        a, b: names of the factors.
        bias: name of the tensor added to the product.
    """

    a: str
    b: str
    bias: str = ""

    def __call__(self, site: CallSite) -> Value:
        a, b = site[self.a], site[self.b]
        if not isinstance(a, Fact) or not isinstance(b, Fact):
            return UNKNOWN
        result = _matmul(site, a, b)
        return broadcast(site, [result, site[self.bias]]) if self.bias else result


def _matmul(site: CallSite, a: Fact, b: Fact) -> Value:
    if (a.varying and not a.batched) or (b.varying and not b.batched):
        site.refuse("SNNFX105", f"an operand of {site.text} varies in time but has no batch dimension")
    if a.batched and b.batched:
        return _merge_matrices(site, a, b)
    if a.batched:
        return _times_constant(site, a, b)
    return _constant_times(site, a, b) if b.batched else _constant_product(a, b)


def _merge_matrices(site: CallSite, a: Fact, b: Fact) -> Value:
    if not (_has_matrices(site, a) and _has_matrices(site, b)):
        return UNKNOWN
    return broadcast(site, [a, b])


def _has_matrices(site: CallSite, fact: Fact) -> bool:
    """Whether the batch is in front of the last two dimensions, so that the product does not sum over it."""
    assert fact.dim is not None
    if fact.rank.known is not None and fact.rank.known < fact.dim + 3:
        hint = "Move the batch to dim 0, as for torch.bmm."
        site.refuse_mixing(fact, "multiplies matrices that include", hint)
        return False
    return require_trailing(site, fact, 2)


def _times_constant(site: CallSite, a: Fact, b: Fact) -> Value:
    assert a.dim is not None
    if b.rank.known in (1, 2):
        if not require_trailing(site, a, 1):
            return UNKNOWN
        return Fact(a.rank - 1 if b.rank.known == 1 else a.rank, a.dim, a.size)
    if not _has_matrices(site, a):
        return UNKNOWN
    return broadcast(site, [a, b])


def _constant_times(site: CallSite, a: Fact, b: Fact) -> Value:
    assert b.dim is not None
    if a.rank.known == 2 and b.rank.known is not None and b.rank.known >= 2 and b.dim == b.rank.known - 1:
        return b  # the batch is the column dimension
    if not _has_matrices(site, b):
        return UNKNOWN
    if a.rank.known == 1:
        return Fact(b.rank - 1, b.dim, b.size)
    return broadcast(site, [b, a])


def _constant_product(a: Fact, b: Fact) -> Value:
    if a.rank.known is None or b.rank.known is None:
        return UNKNOWN
    vectors = (a.rank.known == 1) + (b.rank.known == 1)
    return Fact(Rank(max(a.rank.known, b.rank.known, 2) - vectors), varying=a.varying or b.varying)


def einsum(site: CallSite) -> Value:
    """`einsum`: one letter must be the batch in every batched operand and in the result."""
    equation, operands = site["equation"], list(leaves(site["operands"]))
    if not isinstance(equation, str) or not all(isinstance(operand, Fact) for operand in operands):
        site.refuse("SNNFX101", f"{site.text} is not of the form einsum(equation, *tensors)")
        return UNKNOWN
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(operands):
        site.refuse("SNNFX101", f"{site.text} has a different number of operands than its equation")
        return UNKNOWN
    letters = [_spell(site, term, operand) for term, operand in zip(terms, operands, strict=True)]
    if any(word is None for word in letters):
        return UNKNOWN
    words = [word for word in letters if word is not None]
    dots = sorted({letter for word in words for letter in word if letter[0] == "."}, reverse=True)
    if arrow:
        head, ellipsis, tail = right.partition("...")
        result = [*head, *(dots if ellipsis else []), *tail]
    else:
        flat = [letter for word in words for letter in word if letter[0] != "."]
        result = [*dots, *sorted(letter for letter in set(flat) if flat.count(letter) == 1)]
    return _follow_letter(site, operands, words, result)


def _spell(site: CallSite, term: str, operand: Fact) -> list[str] | None:
    """One name for each dimension; an ellipsis gives ".1", ".2", ... from the right."""
    head, ellipsis, tail = term.partition("...")
    if not ellipsis:
        return list(term)
    if operand.rank.known is None:
        site.refuse_rank("has an ellipsis, whose length depends on the rank")
        return None
    hidden = operand.rank.known - len(head) - len(tail)
    return [*head, *(f".{i}" for i in range(hidden, 0, -1)), *tail]


def _follow_letter(site: CallSite, operands: list[Fact], words: list[list[str]], result: list[str]) -> Value:
    batched = [(fact, word) for fact, word in zip(operands, words, strict=True) if fact.batched]
    rank = Rank(len(result))
    if not batched:
        return Fact(rank, varying=any(fact.varying for fact in operands))
    fact, word = batched[0]
    assert fact.dim is not None
    if any(other.dim is None or other.dim >= len(w) for other, w in batched):
        site.refuse("SNNFX101", f"the equation of {site.text} has too few letters for its operands")
        return UNKNOWN
    letter = word[fact.dim]
    for other, w in batched:
        if w[other.dim] != letter or w.count(letter) != 1 or other.size != fact.size:  # type: ignore[index]
            site.refuse("SNNFX105", f"the operands of {site.text} have different batch dimensions")
            return without_batch(rank)
    for operand, w in zip(operands, words, strict=True):
        if not operand.batched and (operand.varying or letter in w):
            code = "SNNFX105" if operand.varying else "SNNFX104"
            site.refuse(
                code,
                f"an operand of {site.text} has no batch dimension, but uses the letter of the batch or varies in time",
            )
    if letter not in result:
        site.refuse_mixing(fact, "sums over")
        return without_batch(rank)
    return Fact(rank, result.index(letter), fact.size)


def attention(site: CallSite) -> Value:
    """`scaled_dot_product_attention` over the last two dimensions, positions and features."""
    fact = common_fact(site, [site["query"], site["key"], site["value"]], equal_ranks=False)
    if fact is None or not require_trailing(site, fact, 2):
        return UNKNOWN
    mask = site["attn_mask"]
    if isinstance(mask, Fact):
        broadcast(site, [fact, mask])
    elif mask is not None:
        site.refuse("SNNFX105", f"the batch dimension of the mask of {site.text} is unknown")
    return fact

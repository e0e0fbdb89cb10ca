"""How each kind of operation carries the batch: the rules that the rows of the table name.

A rule takes a `Site`, gives the fact of the result, and refuses the site where folding would be wrong. Arguments that a
row does not list as operands have been checked before: they are the same at each step and have no batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from snnfx.passes.batch_facts import BOTTOM, OTHER, UNKNOWN, Bottom, Fact, Rank, SizeFact, Unknown, Value, leaves
from snnfx.passes.batch_site import Site, aligned, broadcast, is_batch_sized, lost, number, reserve
from snnfx.state import adapter_of

__all__ = ["Along", "Leading", "MatMul", "Trailing", "attention", "autograd_function", "batch_norm", "bilinear", "cell"]
__all__ += ["einsum", "elementwise", "embedding", "encoder", "expect_size", "extremum", "initial_state", "instance_norm"]
__all__ += ["linear", "median", "multihead_attention", "normalized_dimensions", "one_hot", "opaque", "pad", "pairwise"]
__all__ += ["prelu", "recurrent", "same", "scatter", "softmax", "stateful", "where"]

def elementwise(site: Site) -> Value:
    """Every element on its own, operands broadcast; without tensors it is arithmetic on sizes."""
    operands = [*leaves(site.arguments)]
    if any(isinstance(operand, Fact | Unknown | Bottom) for operand in operands):
        return broadcast(site, operands)
    return _arithmetic(site, operands) if getattr(site.node.target, "__module__", "") == "_operator" else UNKNOWN


def _arithmetic(site: Site, operands: list[Any]) -> Value:
    if site.name == "add" and all(isinstance(operand, tuple | list) for operand in site["operands"]):
        return tuple(entry for operand in site["operands"] for entry in operand)
    batch_sized = [operand for operand in operands if is_batch_sized(operand)]
    if batch_sized:
        scaled = _scaled(site, batch_sized, operands)
        if scaled is None:
            site.refuse(
                "SNNFX110",
                f"{site.text} computes with the size of the batch; only multiples of it are sizes of a batch",
                "Compute sizes from the feature dimensions.",
            )
            return UNKNOWN
        return scaled
    values = [number(operand) for operand in operands]
    if callable(site.node.target) and None not in values:
        result = site.node.target(*values)
        return SizeFact(value=result if isinstance(result, int) else None)
    return SizeFact()


def _scaled(site: Site, batch_sized: list[Any], operands: list[Any]) -> SizeFact | None:
    """The batch size times or divided by a number: still T times as large when T steps are folded."""
    if len(batch_sized) != 1 or len(operands) != 2 or not isinstance(batch_sized[0], SizeFact):
        return None
    symbol = batch_sized[0].symbol
    assert symbol is not None
    factor, _, base = symbol.rpartition("*")
    if site.name == "mul":
        other = operands[0] if operands[1] is batch_sized[0] else operands[1]
        constant = number(other)
        if constant is None:
            return SizeFact(site.fresh)
        if constant < 1:
            return None
        constant *= int(factor or 1)
        return SizeFact(symbol if constant == 1 else f"{constant}*{base}")
    divisor = number(operands[1])
    if site.name == "floor_divide" and divisor and int(factor or 1) % divisor == 0 and operands[0] is batch_sized[0]:
        quotient = int(factor or 1) // divisor
        return SizeFact(base if quotient == 1 else f"{quotient}*{base}")
    return None


def where(site: Site) -> Value:
    """`where(condition, a, b)`; with the condition alone it lists positions, and their number is not known."""
    if len(site["operands"]) < 3 and not site["options"]:
        site.refuse("SNNFX101", f"{site.text} has a result whose shape depends on values")
        return UNKNOWN
    return elementwise(site)


def same(site: Site) -> Value:
    """The shape of the first argument; the others do not matter (`type_as`, `rand_like`, dropout)."""
    value = site["input"]
    return value if isinstance(value, Fact) else UNKNOWN


@dataclass(frozen=True)
class Trailing:
    """Works on the last `count` dimensions; all dimensions before them are independent.

    Args:
        count: a number, or a function of the site.
        operands: tensors that share the batch; broadcast against each other.
        grows: by how many dimensions the result is larger.
        pair: name of a flag that makes the result a pair of tensors.
    """

    count: int | Callable[[Site], int | None]
    operands: tuple[str, ...] = ("input",)
    grows: int = 0
    pair: str = ""

    def __call__(self, site: Site) -> Value:
        fact = broadcast(site, [site[name] for name in self.operands])
        if not isinstance(fact, Fact):
            return fact
        count = self.count if isinstance(self.count, int) else self.count(site)
        if count is None:
            site.refuse("SNNFX101", f"how many dimensions {site.text} works on is not a constant number")
            return UNKNOWN
        result = Fact(fact.rank + self.grows, fact.dim, fact.size, varying=fact.varying)
        if not reserve(site, fact, count):
            result = lost(result.rank)
        return (result, result) if self.pair and site[self.pair] not in (None, False) else result


@dataclass(frozen=True)
class Leading:
    """Takes samples along dimension 0 and treats each on its own: convolutions, normalisation of a sample.

    Args:
        least: least rank with a batch; what has fewer dimensions is taken for one unbatched sample by torch.
        to: rank of the result, if it is another one.
    """

    least: int
    to: int | None = None

    def __call__(self, site: Site) -> Value:
        fact = site["input"]
        if not isinstance(fact, Fact):
            return UNKNOWN
        rank = fact.rank if self.to is None else Rank(self.to)
        if fact.dim is None:
            return Fact(rank, varying=fact.varying)
        if fact.dim != 0:
            site.refuse_mixing(fact, "works across", "Move the batch to the front.")
            return lost(rank)
        if not site.require(fact.rank, self.least, "needs a batch"):
            return lost(rank)
        return Fact(rank, 0, fact.size)


@dataclass(frozen=True)
class Along:
    """Works along the dimensions named in an argument; all others are independent.

    Args:
        dim: name of that argument.
        drops: whether the dimensions disappear: True, False, or the name of the `keepdim` argument.
        outputs: number of tensors in the result.
        operands: tensors that share the batch; broadcast against each other.
        aligned: they must have the same shape instead.
        grows: by how many dimensions the result is larger (appended at the end).
    """

    dim: str = "dim"
    drops: bool | str = False
    outputs: int = 1
    operands: tuple[str, ...] = ("input",)
    aligned: bool = False
    grows: int = 0

    def __call__(self, site: Site) -> Value:
        values = [site[name] for name in self.operands if site[name] is not None]
        fact = aligned(site, values, "it") if self.aligned else broadcast(site, values)
        if not isinstance(fact, Fact):
            return BOTTOM if fact is BOTTOM else UNKNOWN
        dims = site[self.dim]
        if isinstance(dims, bool):  # x.std(False): the flag of another overload
            site.refuse("SNNFX101", f"the overload of {site.text} is not in the table")
            return UNKNOWN
        if dims is None or dims == () or dims == []:
            return self._pack(self._whole(site, fact))
        axes = site.axes(fact, dims)
        if axes is None:
            return UNKNOWN
        return self._pack(self._result(site, fact, axes))

    def _whole(self, site: Site, fact: Fact) -> Fact:
        if fact.batched:
            site.refuse_mixing(fact, "works along all dimensions, also along", "Name the feature dimensions in `dim`.")
        if self.drops is False:
            return Fact(fact.rank, fact.dim, fact.size, varying=fact.varying)
        keeps = isinstance(self.drops, str) and bool(site[self.drops])
        return lost(fact.rank if keeps else Rank(0))

    def _result(self, site: Site, fact: Fact, axes: list[int]) -> Fact:
        keeps = self.drops is False or (isinstance(self.drops, str) and site[self.drops] not in (None, False))
        rank = fact.rank + self.grows
        if not keeps:
            rank = rank - len(axes)
        if fact.dim is not None and fact.dim in axes:
            site.refuse_mixing(fact, "works along", "Use a feature dimension, e.g. dim=1, if that was not meant.")
            if self.drops is not False:
                ones = (*(None for _ in range(fact.dim)), 1) if keeps else ()
                return Fact(rank, varying=True, known=ones)
        if fact.dim is None:
            return Fact(rank, varying=fact.varying)
        before = 0 if keeps else sum(0 <= axis < fact.dim for axis in axes)
        return Fact(rank, fact.dim - before, fact.size)

    def _pack(self, fact: Fact) -> Value:
        return (fact,) * self.outputs if self.outputs > 1 else fact


def softmax(site: Site) -> Value:
    """Along `dim`; without it torch takes dim 0 for ranks 0, 1 and 3, and dim 1 for others."""
    fact = site["input"]
    if site["dim"] is None and isinstance(fact, Fact):
        rank = fact.rank.known
        if rank is None:
            site.refuse_rank("chooses its dimension by the number of dimensions")
            return fact
        site.arguments["dim"] = 0 if rank in (0, 1, 3) else 1
    return Along()(site)


def extremum(site: Site) -> Value:
    """`max` and `min`: of two tensors, along a dimension (with positions), or of everything."""
    other = site["dim"] if site["dim"] is not None else site["other"]
    if isinstance(other, Fact):
        return broadcast(site, [site["input"], other])
    return Along(drops="keepdim", outputs=1 if other is None else 2)(site)


def median(site: Site) -> Value:
    """`median`: along a dimension (with positions) or of everything."""
    return Along(drops="keepdim", outputs=1 if site["dim"] is None else 2)(site)


def pairwise(site: Site) -> Value:
    """Distances along the last dimension of two tensors."""
    fact = Trailing(1, operands=("x1", "x2"))(site)
    if not isinstance(fact, Fact) or site["keepdim"] not in (None, False):
        return fact
    return Fact(fact.rank - 1, fact.dim, fact.size, varying=fact.varying)


def scatter(site: Site) -> Value:
    """`scatter(input, dim, index, src)`: all along one dimension; `src` may be a number."""
    operands = ("input", "index", "src") if isinstance(site["src"], Fact) else ("input", "index")
    return Along(operands=operands, aligned=True)(site)


def linear(site: Site) -> Value:
    """The last dimension is replaced; the weight has two dimensions."""
    weight, bias = site["weight"], site["bias"]
    if isinstance(weight, Fact) and weight.rank.known != 2:
        site.refuse("SNNFX101", f"the weight of {site.text} is not known to have two dimensions")
        return UNKNOWN
    if isinstance(bias, Fact) and bias.rank.known not in (0, 1):
        site.refuse("SNNFX104", f"the bias of {site.text} may have a fixed size where the batch is")
    return Trailing(1)(site)


def bilinear(site: Site) -> Value:
    """The last dimension of two tensors is replaced."""
    bias = site["bias"]
    if isinstance(bias, Fact) and bias.rank.known not in (0, 1):
        site.refuse("SNNFX104", f"the bias of {site.text} may have a fixed size where the batch is")
    return Trailing(1, ("input1", "input2"))(site)


def normalized_dimensions(site: Site) -> int | None:
    """How many dimensions `layer_norm` normalises."""
    shape = site["normalized_shape"]
    return 1 if number(shape) is not None else len(list(leaves(shape)))


def embedding(site: Site) -> Value:
    """Each index becomes a vector."""
    if site["max_norm"] is not None:
        site.refuse("SNNFX101", f"{site.text} with max_norm changes its weight")
    return Trailing(0, grows=1)(site)


def one_hot(site: Site) -> Value:
    """Each index becomes a vector, whose length has to be given."""
    if number(site["num_classes"]) in (None, -1):
        hint = "Pass num_classes."
        site.refuse("SNNFX103", f"{site.text} takes the number of classes from the largest index in the batch", hint)
    return Trailing(0, grows=1)(site)


def prelu(site: Site) -> Value:
    """Elementwise with one weight; otherwise the weights belong to dimension 1."""
    weight = site["weight"]
    if isinstance(weight, Fact) and (weight.rank.known == 0 or weight.known == (1,)):
        return same(site)
    return Leading(2)(site)


def pad(site: Site) -> Value:
    """Pads the last dimensions, two numbers each."""
    amounts = list(leaves(site["pad"]))
    count = 1 if len(amounts) == 1 else len(amounts) // 2
    return Trailing(count)(site)


@dataclass(frozen=True)
class MatMul:
    """The last two dimensions are a matrix, those before are broadcast; also with vectors.

    Args:
        a, b: names of the factors.
        bias: name of a tensor that is added.
    """

    a: str
    b: str
    bias: str = ""

    def __call__(self, site: Site) -> Value:
        a, b = site[self.a], site[self.b]
        if not isinstance(a, Fact) or not isinstance(b, Fact):
            return UNKNOWN
        result = _matmul(site, a, b)
        return broadcast(site, [result, site[self.bias]]) if self.bias else result


def _matmul(site: Site, a: Fact, b: Fact) -> Value:
    if (a.varying and not a.batched) or (b.varying and not b.batched):
        site.refuse("SNNFX105", f"an operand of {site.text} varies in time but has no batch dimension")
    if a.batched and b.batched:
        return _merge_matrices(site, a, b)
    if a.batched:
        return _times_constant(site, a, b)
    return _constant_times(site, a, b) if b.batched else _constant_product(a, b)


def _merge_matrices(site: Site, a: Fact, b: Fact) -> Value:
    if not (_has_matrices(site, a) and _has_matrices(site, b)):
        return UNKNOWN
    return broadcast(site, [a, b])


def _has_matrices(site: Site, fact: Fact) -> bool:
    """Whether the batch is in front of the matrices, so that the product does not sum over it."""
    assert fact.dim is not None
    if fact.rank.known is not None and fact.rank.known < fact.dim + 3:
        site.refuse_mixing(fact, "multiplies matrices one of whose dimensions is", "Put the batch in front, see torch.bmm.")
        return False
    return reserve(site, fact, 2)


def _times_constant(site: Site, a: Fact, b: Fact) -> Value:
    assert a.dim is not None
    if b.rank.known in (1, 2):
        if not reserve(site, a, 1):
            return UNKNOWN
        return Fact(a.rank - 1 if b.rank.known == 1 else a.rank, a.dim, a.size)
    if not _has_matrices(site, a):
        return UNKNOWN
    return broadcast(site, [a, b])


def _constant_times(site: Site, a: Fact, b: Fact) -> Value:
    assert b.dim is not None
    if a.rank.known == 2 and b.rank.known is not None and b.rank.known >= 2 and b.dim == b.rank.known - 1:
        return b  # the batch is the columns
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


def einsum(site: Site) -> Value:
    """One letter has to be the batch in every operand that has one, and stay in the result."""
    equation, operands = site["equation"], list(leaves(site["operands"]))
    if not isinstance(equation, str) or not all(isinstance(operand, Fact) for operand in operands):
        site.refuse("SNNFX101", f"{site.text} is not of the form einsum('...', tensors)")
        return UNKNOWN
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(operands):
        site.refuse("SNNFX101", f"{site.text} has another number of operands than its equation")
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


def _spell(site: Site, term: str, operand: Fact) -> list[str] | None:
    """One name for each dimension; those behind an ellipsis are called ".1", ".2", ... from the right."""
    head, ellipsis, tail = term.partition("...")
    if not ellipsis:
        return list(term)
    if operand.rank.known is None:
        site.refuse_rank("has an ellipsis, whose length depends on the number of dimensions")
        return None
    hidden = operand.rank.known - len(head) - len(tail)
    return [*head, *(f".{i}" for i in range(hidden, 0, -1)), *tail]


def _follow_letter(site: Site, operands: list[Fact], words: list[list[str]], result: list[str]) -> Value:
    batched = [(fact, word) for fact, word in zip(operands, words, strict=True) if fact.batched]
    rank = Rank(len(result))
    if not batched:
        return Fact(rank, varying=any(fact.varying for fact in operands))
    fact, word = batched[0]
    assert fact.dim is not None
    if any(other.dim is None or other.dim >= len(w) for other, w in batched):
        site.refuse("SNNFX101", f"the equation of {site.text} does not fit its operands")
        return UNKNOWN
    letter = word[fact.dim]
    for other, w in batched:
        if w[other.dim] != letter or w.count(letter) != 1 or other.size != fact.size:  # type: ignore[index]
            site.refuse("SNNFX105", f"the operands of {site.text} do not share the batch")
            return lost(rank)
    for operand, w in zip(operands, words, strict=True):
        if not operand.batched and (operand.varying or letter in w):
            code = "SNNFX105" if operand.varying else "SNNFX104"
            site.refuse(code, f"an operand of {site.text} has no batch, but the letter of the batch or varies in time")
    if letter not in result:
        site.refuse_mixing(fact, "sums over")
        return lost(rank)
    return Fact(rank, result.index(letter), fact.size)


def attention(site: Site) -> Value:
    """`scaled_dot_product_attention`: the last two dimensions are positions and features."""
    fact = aligned(site, [site["query"], site["key"], site["value"]], "attention")
    if fact is None or not reserve(site, fact, 2):
        return UNKNOWN
    mask = site["attn_mask"]
    if isinstance(mask, Fact):
        broadcast(site, [fact, mask])
    elif mask is not None:
        site.refuse("SNNFX105", f"the mask of {site.text} is not known")
    return fact


def multihead_attention(site: Site) -> Value:
    """`nn.MultiheadAttention`: three dimensions, the batch first or second."""
    module = site.module
    assert isinstance(module, nn.MultiheadAttention)
    query = site["query"]
    fact = aligned(site, [query, site["key"], site["value"]], "attention")
    if fact is None:
        return (UNKNOWN, UNKNOWN)
    fact = _sequence(site, fact, module.batch_first)
    _check_masks(site, fact, site["attn_mask"], site["key_padding_mask"])
    if site["need_weights"] is False:
        return (fact, OTHER)
    heads = 0 if site["average_attn_weights"] is not False else 1
    weights = Fact(Rank(3 + heads), 0, fact.size) if fact.batched else lost(Rank(3 + heads))
    return (fact, weights)


def _sequence(site: Site, fact: Fact, batch_first: bool) -> Fact:
    """Check that a sequence module gets three dimensions with the batch where it expects it."""
    if fact.dim is None:
        return fact
    if not site.require(fact.rank, 3, "needs a batch, positions and features,"):
        return lost(fact.rank)
    if fact.dim != (0 if batch_first else 1):
        expected = "first" if batch_first else "second"
        hint = f"Transpose its input, or build it with batch_first={not batch_first}."
        site.refuse_mixing(fact, f"takes the batch as its {expected} dimension and works along", hint)
    return fact


def _check_masks(site: Site, fact: Fact, shared: Any, padding: Any) -> None:
    for mask in (shared, padding):
        if mask is not None and not isinstance(mask, Fact):
            site.refuse("SNNFX105", f"a mask of {site.text} is not known")
    if isinstance(shared, Fact) and (shared.batched or shared.varying or shared.rank.known != 2):
        site.refuse("SNNFX105", f"the attention mask of {site.text} is not one [L, S] matrix for all samples and steps")
    if isinstance(padding, Fact) and (padding.dim, padding.size) != (0, fact.size):
        site.refuse("SNNFX105", f"the padding mask of {site.text} does not have the batch first")


_PARTS_OF_AN_ENCODER = (
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.MultiheadAttention,
    nn.modules.linear.NonDynamicallyQuantizableLinear,
    nn.Linear,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.Dropout,
    nn.ModuleList,
    nn.ReLU,
    nn.GELU,
)


def encoder(site: Site) -> Value:
    """`nn.TransformerEncoderLayer` and a stack of them, built of torch's own parts."""
    module = site.module
    assert module is not None
    fact = site["src"]
    if not isinstance(fact, Fact):
        return UNKNOWN
    layers = [part for part in module.modules() if isinstance(part, nn.TransformerEncoderLayer)]
    foreign = [part for part in module.modules() if type(part) not in _PARTS_OF_AN_ENCODER]
    activations = {getattr(layer.activation, "__name__", type(layer.activation).__name__) for layer in layers}
    if foreign or not activations <= {"relu", "gelu", "ReLU", "GELU"}:
        what = type(foreign[0]).__name__ if foreign else "an activation of its own"
        site.refuse("SNNFX101", f"{site.text} contains {what}, which the table does not vouch for there")
    orders = {layer.self_attn.batch_first for layer in layers}
    if len(orders) != 1:
        site.refuse("SNNFX101", f"the layers of {site.text} do not agree on batch_first")
        return UNKNOWN
    fact = _sequence(site, fact, orders.pop())
    padding = site["src_key_padding_mask"]
    if padding is not None and isinstance(module, nn.TransformerEncoder):
        site.refuse("SNNFX103", f"{site.text} may cut its result to the longest sample of the batch")
    _check_masks(site, fact, site["src_mask"] if site["src_mask"] is not None else site["mask"], padding)
    return fact


def batch_norm(site: Site) -> Value:
    """Statistics of the batch in training: what folding means for them is declared by `batch_norm=`."""
    module = site.module
    in_training = site.training if module is not None else site["training"] not in (None, False)
    # A module that is frozen now may be thawed later: in a training program only its mode counts.
    if site["running_mean"] is None and site["running_var"] is None and not in_training:
        site.refuse(
            "SNNFX106",
            f"{site.text} has no running statistics, so it uses those of one step even in evaluation",
            "Use track_running_stats=True.",
        )
    elif in_training and site.batch_norm == "per_step":
        site.refuse(
            "SNNFX106",
            f'{site.text} uses the statistics of one step at a time (batch_norm="per_step")',
            'batch_norm="fold" takes them over all steps at once.',
        )
    ranks = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}
    return Leading(next((rank for cls, rank in ranks.items() if isinstance(module, cls)), 2))(site)


def instance_norm(site: Site) -> Value:
    """Normalises each sample; with running statistics, those are updated like BatchNorm's."""
    module = site.module
    tracks = site["running_mean"] is not None
    in_training = site.training if module is not None else site["use_input_stats"] not in (None, False)
    if tracks and in_training and site.batch_norm == "per_step":
        site.refuse("SNNFX106", f'{site.text} updates running statistics at each step (batch_norm="per_step")')
    ranks = {nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}
    return Leading(next((rank for cls, rank in ranks.items() if isinstance(module, cls)), 3))(site)


def cell(site: Site) -> Value:
    """`nn.RNNCell`, `nn.GRUCell`, `nn.LSTMCell`: `[N, C]` and explicit states `[N, H]`."""
    fact = site["input"]
    states = [state for state in leaves(site["hx"]) if state is not None]
    if not isinstance(fact, Fact):
        return UNKNOWN
    merged = aligned(site, [fact, *states], "a cell") if states else fact
    if merged is None:
        return UNKNOWN
    result = Leading(2)(site)
    return (result, result) if isinstance(site.module, nn.LSTMCell) else result


def recurrent(site: Site) -> Value:
    """`nn.RNN`, `nn.GRU`, `nn.LSTM` run over a sequence of their own within one step."""
    module = site.module
    assert isinstance(module, nn.RNNBase)
    site.refuse(
        "SNNFX109",
        f"{site.text} runs over a sequence within one step",
        "If that sequence is time itself, use the cell (e.g. nn.GRUCell) and pass its state.",
    )
    fact = site["input"]
    if not isinstance(fact, Fact) or fact.rank.known != 3 or fact.dim != (0 if module.batch_first else 1):
        return UNKNOWN
    hidden = Fact(Rank(3), 1, fact.size)
    return (fact, (hidden, hidden) if isinstance(module, nn.LSTM) else hidden)


def stateful(site: Site) -> Value:
    """`call_stateful(module, slots, *inputs)` of a neuron: outputs and next values are shaped like the first input."""
    module, slots = site.module, site["state"]
    adapter = adapter_of(module) if module is not None else None
    count = len(slots) if isinstance(slots, tuple | list) else 0
    if module is None or adapter is None or not adapter.elementwise(module):
        site.refuse("SNNFX101", f"{site.text} is not known to be elementwise")
        return (UNKNOWN, (UNKNOWN,) * count)
    broadcast(site, [*leaves(slots), *leaves(site["inputs"])])
    first = next(iter(leaves(site["inputs"])), UNKNOWN)
    if not isinstance(first, Fact):
        first = BOTTOM if first is BOTTOM else UNKNOWN
    return (first, (first,) * count)


def initial_state(site: Site) -> Value:
    """`initial_value(module, index, *inputs)` of a neuron: a number or a tensor shaped like the first input."""
    result = stateful(site)
    assert isinstance(result, tuple)
    return result[0]  # type: ignore[no-any-return]


def opaque(site: Site) -> Value:
    """A module that could not be traced."""
    site.refuse("SNNFX108", f"{site.text} could not be traced")
    return UNKNOWN


def autograd_function(site: Site) -> Value:
    """A torch.autograd.Function: elementwise if it says so (`snnfx_elementwise = True`), or known to be a surrogate."""
    function = getattr(site.module, "function", None)
    module = getattr(function, "__module__", "")
    known = module.startswith(("spikingjelly.activation_based.surrogate", "snnfx.surrogate"))
    if not (getattr(function, "snnfx_elementwise", False) or known):
        name = getattr(function, "__name__", "the function")
        site.refuse(
            "SNNFX101",
            f"the autograd.Function {name} is not known to be elementwise",
            "Declare it: `snnfx_elementwise = True` in the class.",
        )
        return UNKNOWN
    return broadcast(site, leaves(site["operands"]))


def expect_size(site: Site) -> Value:
    """A size that the model's Python code used as a number."""
    if is_batch_sized(site["size"]):
        site.refuse("SNNFX110", "the model's Python code used the size of the batch as a number")
    return SizeFact(value=number(site["expected"]))

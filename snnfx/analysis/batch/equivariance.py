"""Batch equivariance: prove which nodes of a step graph may be folded.

A stateless node may be folded if one run on all time steps, with T folded into the batch (`[T, N, ...]` as
`[T*N, ...]`), gives the results of T separate runs: `f(cat_t x_t) == cat_t f(x_t)` along the batch dimension of each
value. The proof is an abstract interpretation (Cousot & Cousot 1977) of the graph over facts about shapes
(`snnfx.analysis.batch.facts`) with one rule for each known operation (`snnfx.analysis.batch.rule_table`). An operation
without a rule is refused. State slots start undetermined ("bottom"); the time loop is iterated to a fixpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, fx, nn
from torch.fx import Node
from torch.fx.node import map_aggregate

from snnfx.analysis.batch.call_site import CallSite, constant_int, is_batch_sized
from snnfx.analysis.batch.facts import (
    NON_TENSOR,
    UNDETERMINED,
    UNKNOWN,
    Fact,
    NonTensor,
    Rank,
    ShapeFact,
    SizeFact,
    UniformTuple,
    Value,
    join,
    leaves,
    model_input,
)
from snnfx.analysis.batch.indexing_rules import getitem
from snnfx.analysis.batch.rule_lookup import RuleMatch, constant_fact, find_rule
from snnfx.analysis.batch.rule_table import ELEMENTWISE_RULES
from snnfx.analysis.batch.shape_rules import flatten, squeeze, unflatten, unsqueeze, view
from snnfx.analysis.statistic_reads import is_statistic_read, statistic_of
from snnfx.errors import Refusal
from snnfx.ir.facts import VALUE

__all__ = ["BatchAnalysis", "Fact", "Rank", "ShapeFact", "SizeFact", "Value", "infer_batch", "model_input"]


@dataclass(frozen=True)
class BatchAnalysis:
    """The result of `infer_batch`.

    Args:
        facts: node -> fact of its value, or a tuple of facts for a tuple.
        refusals: node -> why it may not be folded; all other nodes may be.
        requirements: input name -> least rank of one step for which the result holds.
    """

    facts: dict[Node, Value] = field(default_factory=dict)
    refusals: dict[Node, Refusal] = field(default_factory=dict)
    requirements: dict[str, int] = field(default_factory=dict)


def infer_batch(
    graph: fx.Graph,
    resolve: Callable[[str], object],
    inputs: Mapping[Node, Fact | NonTensor],
    *,
    carried: Mapping[Node, object],
    varying: Set[Node],
    training: bool,
    batch_norm: Literal["fold", "per_step"],
    initial: Mapping[Node, object] | None = None,
    training_of: Callable[[nn.Module], bool] | None = None,
    unit: tuple[str, int] | None = None,
) -> BatchAnalysis:
    """Infer the batch dimension of every value, and which nodes may not be folded.

    Args:
        graph: the graph of one step, without in-place operations. Where nodes have `meta["val"]`, ranks are taken from
            the example, and the result holds for inputs of these ranks (its requirements).
        resolve: returns the object named by a get_attr or call_module target.
        inputs: the fact of each input placeholder, see `model_input`.
        carried: slot placeholder -> the node (or constant) of its next value.
        varying: nodes whose value may differ between time steps, including random nodes; all others are invariant.
        training: the mode of the graph.
        batch_norm: semantics of BatchNorm in training, see `snnfx.convert`.
        initial: slot placeholder -> its value before the first step. A number or a 0-dimensional tensor is expanded to
            the shape of the next value. Default: read from the output node of the graph, if it has the form
            `(outputs, next_states, initial_values)`.
        training_of: whether a called layer is in training; default: the mode of the graph.
        unit: `(symbol, size)` of the batch in the example. Sizes that are equal multiples of it in the example then
            count as equal. This holds where the operations that join two such sizes fail for others, as those of a
            model's own call do.

    Returns:
        Facts, refusals and requirements.
    """
    walk = _BatchPropagation(graph, resolve, dict(inputs), varying, training, batch_norm, training_of, unit)
    before = _initial_values(graph, carried) if initial is None else initial
    slots: dict[Node, Value] = dict.fromkeys(carried, UNDETERMINED)
    settled: set[Node] = set()  # slots whose value depends on themselves only
    while True:
        analysis = walk.run(slots)
        following = {slot: _next_fact(walk, slot, value, before.get(slot)) for slot, value in carried.items()}
        joined = {slot: join(fact, following[slot]) for slot, fact in slots.items()}
        if joined == slots:
            open_slots = [slot for slot, fact in slots.items() if UNDETERMINED in leaves(fact) and slot not in settled]
            if not open_slots:
                return analysis
            settled.update(open_slots)
            joined.update(dict.fromkeys(open_slots, UNKNOWN))
        slots = joined


def _initial_values(graph: fx.Graph, carried: Mapping[Node, object]) -> Mapping[Node, object]:
    output = graph.output_node().args[0] if graph.nodes else None
    values = output[2] if isinstance(output, tuple) and len(output) == 3 else None
    if isinstance(values, tuple) and len(values) == len(carried):
        return dict(zip(carried, values, strict=True))
    return {}


def _next_fact(walk: _BatchPropagation, slot: Node, following: object, initial: object) -> Value:
    after = walk.facts.get(following, UNKNOWN) if isinstance(following, Node) else UNKNOWN
    if not isinstance(initial, Node):
        return after  # a number is expanded to the shape of the next value
    first = walk.facts.get(initial, UNKNOWN)
    if isinstance(first, SizeFact) or (isinstance(first, Fact) and first.rank == Rank(0)):
        return after
    return join(first, after)


_KEEPS_ONES = ELEMENTWISE_RULES | {unsqueeze, squeeze, flatten, unflatten, view, getitem}
"""Rules that say whether the dimensions in front of the batch have the literal size 1."""


_KEEPS_FRONT = frozenset(
    "linear layer_norm rms_norm avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d softmax "
    "log_softmax sum mean amax amin norm normalize dropout contiguous clone detach float double half bfloat16 to "
    "type_as zeros_like ones_like matmul scaled_dot_product_attention transpose swapaxes swapdims adjoint permute "
    "relu cumsum select".split()
)
"""Operations that keep the dimensions in front of the batch if they keep its position."""


def _keeps_front(site: CallSite, found: RuleMatch, result: Fact) -> bool:
    """Whether the dimensions of the result in front of the batch have the literal size 1, as those of the operands."""
    if found.name not in _KEEPS_FRONT or result.dim is None:
        return False
    operands = [fact for fact in leaves(list(site.arguments.values())) if isinstance(fact, Fact)]
    if any(fact.batched and not (fact.has_ones_in_front and fact.dim == result.dim) for fact in operands):
        return False
    # A constant could have larger dimensions there.
    behind = (result.rank - result.dim).known
    constants = [fact.rank.known for fact in operands if not fact.batched]
    if behind is None or any(rank is None or rank > behind for rank in constants):
        return False
    axes = {
        "transpose": (site["dim0"], site["dim1"]),
        "swapaxes": (site["dim0"], site["dim1"]),
        "swapdims": (site["dim0"], site["dim1"]),
    }.get(found.name, ())
    if found.name == "permute":
        return [constant_int(dim) for dim in leaves(site["dims"])][: result.dim] == list(range(result.dim))
    return all((place := site.axis(result, axis)) is not None and place > result.dim for axis in axes)


class _BatchPropagation:
    """One abstract interpretation of the graph, given facts of the slots."""

    def __init__(
        self,
        graph: fx.Graph,
        resolve: Callable[[str], object],
        inputs: dict[Node, Fact | NonTensor],
        varying: Set[Node],
        training: bool,
        batch_norm: str,
        training_of: Callable[[nn.Module], bool] | None,
        unit: tuple[str, int] | None = None,
    ) -> None:
        self.training_of, self.unit = training_of, unit
        self.graph, self.resolve, self.inputs, self.varying = graph, resolve, inputs, varying
        self.training, self.batch_norm = training, batch_norm
        self.found = {node: find_rule(node, resolve) for node in graph.nodes if node.op.startswith("call")}
        self.bases = {fact.rank.base for fact in inputs.values() if isinstance(fact, Fact) and fact.rank.base}
        self.facts: dict[Node, Value] = {}

    def run(self, slots: Mapping[Node, Value]) -> BatchAnalysis:
        """The facts of all nodes, assuming the given facts of the slots."""
        self.facts = {}
        self.refusals: dict[Node, Refusal] = {}
        self.examples: dict[str, int] = {}
        self.multiples: dict[str, tuple[str, object]] = {}
        self.changing: set[Node] = set()  # varying nodes whose value, not only size, may differ between steps
        self.requirements = {
            fact.rank.base or node.name: 1 if fact.rank.known is None else fact.rank.known
            for node, fact in self.inputs.items()
            if isinstance(fact, Fact)
        }
        for node in self.graph.nodes:
            if node.op != "output":
                fact = self._checked(node, self._fact(node, slots))
                self.facts[node] = self._new_batch(node) if fact is UNKNOWN and node in self.refusals else fact
        return BatchAnalysis(self.facts, self.refusals, self.requirements)

    def _new_batch(self, node: Node) -> Value:
        """The fact of a refused node, whose shape is known from the example only.

        The node is not folded, so any dimension of its result may serve as the batch of the next fold: dim 0 is chosen,
        with a size symbol unrelated to other batches.
        """
        value = VALUE.of(node)
        if not isinstance(value, Tensor) or value.dim() == 0:
            return UNKNOWN
        return Fact(Rank(value.dim()), 0, f"size of {node.name}")

    def _fact(self, node: Node, slots: Mapping[Node, Value]) -> Value:
        if node.op == "placeholder":
            if node in self.varying:
                self.changing.add(node)
            # A slot may start from an invariant tensor, and only its first steps change it.
            return self._marked(node, slots[node]) if node in slots else self.inputs.get(node, UNKNOWN)
        if node.op == "get_attr":
            value = self.resolve(str(node.target))
            return constant_fact(value) if isinstance(value, Tensor) else NON_TENSOR
        if is_statistic_read(node):
            if node in self.varying:
                self.changing.add(node)
            return self._marked(node, constant_fact(self.resolve(statistic_of(node))))  # type: ignore[arg-type]
        return self._call(node)

    def _call(self, node: Node) -> Value:
        found = self.found[node]
        operands = [self.facts[operand] for operand in node.all_input_nodes]
        flat = list(leaves(operands))
        if node in self.varying and self._depends_on_time(node, found):
            self.changing.add(node)
        is_invariant = node not in self.changing and not any(
            fact is UNKNOWN or is_batch_sized(fact) or (isinstance(fact, Fact) and (fact.batched or fact.varying))
            for fact in flat
        )
        if found is None:
            if is_invariant and node not in self.varying:
                return self._constant_result(node)
            self.refusals[node] = _no_row(node, flat)
            return UNKNOWN
        site = self._site(node, found)
        fact = self._evaluate(site, found)
        if found.row.rule not in _KEEPS_ONES and isinstance(fact, Fact) and fact.batched:
            fact = fact.with_ones_in_front() if _keeps_front(site, found, fact) else replace(fact, known=())
        if fact is UNDETERMINED:
            return UNDETERMINED
        self._judge_without_batch(site, found, flat, fact)
        for name, least in site.requirements.items():
            self.requirements[name] = max(least, self.requirements.get(name, 0))
        is_update = node.op == "call_module" and node in self.varying  # updates its layer at each step
        if site.refusal is not None and (is_update or not is_invariant):
            self.refusals[node] = site.refusal
        if is_invariant:
            return self._marked(node, self._constant_result(node) if fact is UNKNOWN else fact)
        return self._marked(node, fact)

    def _depends_on_time(self, node: Node, found: RuleMatch | None) -> bool:
        if found is not None and (found.draws or found.row.shape_only):
            return found.draws
        return any(self._may_differ(operand) for operand in node.all_input_nodes)

    def _may_differ(self, operand: Node) -> bool:
        """Whether the value of an operand may differ between steps (sizes may not)."""
        fact = self.facts[operand]
        return operand in self.changing and any(
            not isinstance(leaf, SizeFact | ShapeFact) and leaf is not NON_TENSOR for leaf in leaves([fact])
        )

    def _site(self, node: Node, found: RuleMatch) -> CallSite:
        def load(argument: Any) -> Any:
            return self.facts[argument] if isinstance(argument, Node) else argument

        arguments = {name: map_aggregate(value, load) for name, value in found.arguments.items()}
        training = self.training
        if found.module is not None and self.training_of is not None:
            training = self.training_of(found.module)
        return CallSite(
            node, found.name, arguments, found.module, training, self.batch_norm, self.bases, multiples=self.multiples
        )

    def _evaluate(self, site: CallSite, found: RuleMatch) -> Value:
        operands = found.row.operands.split()
        sized = found.row.sizes.split()
        neutral = found.row.rule in ELEMENTWISE_RULES
        if not neutral and any(leaf is UNDETERMINED for leaf in leaves(site.arguments)):
            return UNDETERMINED
        for name, value in site.arguments.items():
            if name not in operands:
                _check_invariant(site, value, may_be_sized=name in sized)
        fact = found.row.rule(site)
        if fact is UNKNOWN and site.refusal is None:
            site.refuse("SNNFX105", f"the batch dimension of an operand of {site.text} is unknown")
        return fact

    def _judge_without_batch(self, site: CallSite, found: RuleMatch, operands: list[Any], fact: Value) -> None:
        """Refuse values that vary in time and have no batch: a folded region cannot take or return them."""
        if found.name == "getitem" and isinstance(site["input"], tuple):
            return  # an element belongs to the region of its tuple
        tensors = [operand for operand in operands if isinstance(operand, Fact)]
        if found.draws and isinstance(fact, Fact) and not fact.batched and site.node in self.varying:
            site.refuse(
                "SNNFX105",
                f"{site.text} draws random numbers without a batch dimension; folding would share them between steps",
                "Draw them in the shape of a batched value, e.g. torch.rand_like(x).",
            )
        if tensors and not any(tensor.batched for tensor in tensors) and site.node in self.changing:
            site.refuse("SNNFX102", f"the operands of {site.text} vary in time but have no batch dimension")
        if UNKNOWN in operands or any(tensor.varying and not tensor.batched for tensor in tensors):
            site.refuse("SNNFX105", f"an operand of {site.text} varies in time and has no known batch dimension")

    def _marked(self, node: Node, fact: Value) -> Value:
        """Set `varying` in facts without a batch."""
        if isinstance(fact, Fact):
            return fact if fact.batched else replace(fact, varying=node in self.changing)
        if isinstance(fact, tuple):
            marked = [self._marked(node, element) for element in fact]
            return UniformTuple(marked[0]) if isinstance(fact, UniformTuple) else tuple(marked)
        return fact

    def _constant_result(self, node: Node) -> Value:
        """The fact of a value computed from parameters and constants only, by any operation."""
        value = VALUE.of(node)
        if isinstance(value, Tensor):
            return constant_fact(value)
        if isinstance(value, tuple | list):
            return tuple(constant_fact(v) if isinstance(v, Tensor) else NON_TENSOR for v in value)
        return Fact(Rank(0, node.name)) if value is None else NON_TENSOR

    def _checked(self, node: Node, fact: Value) -> Value:
        """The fact refined by the example value; a contradiction is a refusal."""
        value = VALUE.of(node)
        if isinstance(value, tuple | list) and type(fact) is tuple and len(value) == len(fact):
            return tuple(self._checked_one(node, f, v) for f, v in zip(fact, value, strict=True))
        return self._checked_one(node, fact, value)

    def _checked_one(self, node: Node, fact: Value, value: Any) -> Value:
        if not isinstance(value, Tensor) or not isinstance(fact, Fact):
            return fact
        rank = fact.rank if fact.rank.base in self.bases else Rank(value.dim())
        fact = self._in_units(fact, value)
        agrees = rank.known is None or fact.rank.known in (None, rank.known)
        if agrees and fact.dim is not None and fact.size is not None and rank.known is not None:
            agrees = fact.dim < value.dim()
            agrees = agrees and self.examples.setdefault(fact.size, value.shape[fact.dim]) == value.shape[fact.dim]
        if not agrees:
            reason = f"its shape in the example, {list(value.shape)}, contradicts the batch rule ({fact})"
            self.refusals.setdefault(node, Refusal("SNNFX101", reason))
            return UNKNOWN
        return replace(fact, rank=rank)

    def _in_units(self, fact: Fact, value: Tensor) -> Fact:
        """The fact with its size as a multiple of the unit."""
        if self.unit is None or fact.dim is None or fact.dim >= value.dim():
            return fact
        symbol, size = self.unit
        multiple, rest = divmod(value.shape[fact.dim], size)
        return fact if rest else replace(fact, size=symbol if multiple == 1 else f"{multiple}*{symbol}")


def _check_invariant(site: CallSite, value: Any, may_be_sized: bool) -> None:
    """Refuse an argument that the rule assumes to be constant, if it may vary."""
    for leaf in leaves(value):
        if leaf is UNKNOWN or (isinstance(leaf, Fact) and (leaf.batched or leaf.varying)):
            site.refuse("SNNFX105", f"an argument of {site.text} may vary in time, but must be constant")
        elif is_batch_sized(leaf) and not may_be_sized:
            site.refuse(
                "SNNFX110",
                f"{site.text} depends on the batch size",
                "Use sizes of feature dimensions.",
            )


def _no_row(node: Node, operands: list[Any]) -> Refusal:
    name = str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if any(is_batch_sized(operand) for operand in operands):
        return Refusal("SNNFX110", f"no batch rule covers `{name}`, and it depends on the batch size")
    what = "the module" if node.op == "call_module" else "the operation"
    return Refusal("SNNFX101", f"no batch rule covers {what} `{name}` with these arguments")

"""Facts about nodes of a step graph: typed keys of `node.meta`, and the rules that clear them.

Each fact names the stage that establishes it. A program that returns to an earlier stage loses the facts of all later
stages (`clear_facts`). A fact about a value is inferred again when the node or an operand changes
(`snnfx.ir.value_inference`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch.fx import Node

from snnfx.errors import Refusal

__all__ = [
    "ADDED_BY_RULE",
    "BATCH_DIM",
    "BATCH_SIZES",
    "CHANNELS_LAST",
    "ELEMENT",
    "ELEMENTWISE_RESULTS",
    "EVENTS",
    "FACTS",
    "FOLDS_DIM_0",
    "INPUT",
    "IN_WEIGHTS",
    "IS_PRODUCT",
    "ITERATIONS",
    "KIND",
    "LOOP_EVENTS",
    "MODULE",
    "NUMBER",
    "ORIGIN",
    "REFUSAL",
    "REGION",
    "REGION_NAME",
    "RETURNED_BY",
    "SHAPE_LIKE",
    "SITE",
    "SLOT",
    "SPIKES",
    "STEP_NODE",
    "STEP_REFUSAL",
    "STRUCTURAL",
    "SUNK",
    "TRACE",
    "VALUE",
    "VARYING",
    "WHERE",
    "WITHOUT_GRADIENT",
    "Fact",
    "clear_facts",
    "copy_facts",
]

T = TypeVar("T")

FACTS: dict[str, Fact[Any]] = {}
"""All facts, by their key in `node.meta`."""


@dataclass(frozen=True)
class Fact(Generic[T]):
    """A typed key of `node.meta`.

    Args:
        key: the key.
        since: the stage that establishes the fact, or "emitted" for nodes of emitted graphs.
        types: the types of its values; () for any.
        default: the value for a node without the fact.
    """

    key: str
    since: str
    types: tuple[type, ...]
    default: T

    def __post_init__(self) -> None:
        FACTS[self.key] = self

    def of(self, node: Node) -> T:
        """The fact of a node, or its default."""
        return node.meta.get(self.key, self.default)  # type: ignore[no-any-return]

    def is_known(self, node: Node) -> bool:
        """Whether the fact is set."""
        return self.key in node.meta

    def set(self, node: Node, value: T) -> None:
        """Set the fact of a node."""
        node.meta[self.key] = value

    def clear(self, node: Node) -> None:
        """Remove the fact of a node, if it is set."""
        node.meta.pop(self.key, None)

    def has_legal_type(self, value: Any) -> bool:
        """Whether a value has one of the types of the fact."""
        return not self.types or isinstance(value, self.types)


_NONE = type(None)

VALUE: Fact[Any] = Fact("val", "captured", (), None)
"""The value at one step of the example inputs, on the meta device."""
WHERE: Fact[tuple[str, int] | None] = Fact("where", "captured", (tuple, _NONE), None)
"""The file and line of the user's code."""
MODULE: Fact[str] = Fact("module", "captured", (str,), "")
"""The qualified name of the module whose code computes the node."""
SLOT: Fact[str] = Fact("slot", "captured", (str,), "")
"""The state slot that a placeholder reads."""
INPUT: Fact[str | int | None] = Fact("input", "captured", (str, int), None)
"""The name or index of the input that a placeholder reads."""
SHAPE_LIKE: Fact[bool] = Fact("shape_like", "captured", (bool,), False)
"""Whether the value is a size, or computed from sizes alone."""
NUMBER: Fact[bool] = Fact("number", "captured", (bool,), False)
"""Whether the value of a slot is a Python number."""
STRUCTURAL: Fact[bool] = Fact("structural", "captured", (bool,), False)
"""Whether capture inserted the node to take an element of a tuple."""
RETURNED_BY: Fact[Any] = Fact("returned_by", "captured", (list, tuple), ())
"""The qualified names of the modules that return the value."""
WITHOUT_GRADIENT: Fact[bool] = Fact("without_gradient", "captured", (bool,), False)
"""Whether an in-place operation runs without autograd."""
ADDED_BY_RULE: Fact[bool] = Fact("added_by_rule", "captured", (bool,), False)
"""Whether an online rule added the slot."""
TRACE: Fact[str] = Fact("trace", "captured", (str,), "")
"""The eligibility trace of the operand of a weight, or why it has none, in words."""
ITERATIONS: Fact[Any] = Fact("iterations", "captured", (tuple,), ())
"""The iterations of the user's loops that recorded the node."""
ELEMENT: Fact[int] = Fact("element", "captured", (int,), 0)
"""The iteration whose value the node takes from the sequence of a derived step."""
SUNK: Fact[bool] = Fact("sunk", "partitioned", (bool,), False)
"""Whether the node runs on operands that are reduced over time."""
VARYING: Fact[bool] = Fact("varying", "partitioned", (bool,), True)
"""Whether the value differs between time steps."""
BATCH_DIM: Fact[Any] = Fact("batch_dim", "partitioned", (int, tuple, _NONE), None)
"""The batch dimension of the value, None without one, or a tuple of these for a tuple."""
BATCH_SIZES: Fact[frozenset[str]] = Fact("batch_sizes", "partitioned", (frozenset,), frozenset())
"""The symbols of the batch sizes of the value."""
REFUSAL: Fact[Refusal | None] = Fact("refusal", "partitioned", (Refusal, _NONE), None)
"""The reason why the node is not folded."""
STEP_REFUSAL: Fact[bool] = Fact("step_refusal", "partitioned", (bool,), False)
"""Whether the steps of the node cannot be folded even with known states."""
ELEMENTWISE_RESULTS: Fact[int | None] = Fact("elementwise_results", "partitioned", (int, _NONE), None)
"""The number of results of an element-wise autograd.Function, 0 for a result that is no tuple."""
FOLDS_DIM_0: Fact[bool] = Fact("folds_dim_0", "partitioned", (bool,), False)
"""Whether a BatchNorm takes statistics over time although the batch dimension is unknown."""
KIND: Fact[str] = Fact("kind", "partitioned", (str,), "")
"""The kind of the region that contains the node."""
REGION: Fact[str] = Fact("region", "partitioned", (str,), "")
"""The name of the region that contains the node."""
CHANNELS_LAST: Fact[bool] = Fact("channels_last", "planned", (bool,), False)
"""Whether the value may be in channels-last format."""
IN_WEIGHTS: Fact[bool] = Fact("in_weights", "planned", (bool,), False)
"""Whether a BatchNorm is folded into the weights of the layer before it."""
EVENTS: Fact[bool] = Fact("events", "planned", (bool,), False)
"""Whether a layer may visit only its non-zero inputs."""
SPIKES: Fact[str] = Fact("spikes", "planned", (str,), "")
"""The operands of a product of matrices that come from spikes: "first", "second" or "both"."""
SITE: Fact[int | None] = Fact("site", "planned", (int, _NONE), None)
"""The number of a product of matrices among those of this process, for how its latest call ran."""
LOOP_EVENTS: Fact[bool] = Fact("loop_events", "planned", (bool,), False)
"""Whether products that a node of a loop computes may visit only their non-zero operands."""
STEP_NODE: Fact[str] = Fact("step_node", "emitted", (str,), "")
"""The node of the step graph that a node of an emitted graph computes."""
REGION_NAME: Fact[str] = Fact("region_name", "emitted", (str,), "")
"""The region that a call of an emitted graph runs."""
IS_PRODUCT: Fact[bool] = Fact("is_product", "emitted", (bool,), False)
"""Whether a tile computes a product (convolution, linear layer, attention)."""

ORIGIN: tuple[Fact[Any], ...] = (VALUE, WHERE, MODULE)
"""The facts that a node inherits from the node that it replaces or copies."""

_ORDER = ("captured", "normalized", "partitioned", "planned", "emitted")


def copy_facts(source: Node, node: Node, facts: Iterable[Fact[Any]] = ORIGIN) -> None:
    """Give a new node some facts of another node, and no others."""
    node.meta = {fact.key: source.meta[fact.key] for fact in facts if fact.key in source.meta}


def clear_facts(nodes: Iterable[Node], since: str) -> None:
    """Remove the facts that the stage `since` and later stages establish."""
    gone = [key for key, fact in FACTS.items() if _ORDER.index(fact.since) >= _ORDER.index(since)]
    for node in nodes:
        for key in gone:
            node.meta.pop(key, None)

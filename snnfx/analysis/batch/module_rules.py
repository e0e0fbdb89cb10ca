"""Batch rules of attention, BatchNorm, recurrent modules, neurons and autograd functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from snnfx.analysis.batch.call_site import CallSite, broadcast, common_fact, constant_int, is_batch_sized, without_batch
from snnfx.analysis.batch.elementwise_rules import BatchFirst
from snnfx.analysis.batch.facts import NON_TENSOR, UNDETERMINED, UNKNOWN, Fact, Rank, SizeFact, Value, leaves
from snnfx.ir.facts import ELEMENTWISE_RESULTS
from snnfx.state.registry import adapter_of

__all__ = [
    "OnTrace",
    "autograd_function",
    "batch_norm",
    "cell",
    "encoder",
    "expect_size",
    "initial_state",
    "instance_norm",
    "multihead_attention",
    "opaque",
    "recurrent",
    "sample_ones",
    "stateful",
]


def multihead_attention(site: CallSite) -> Value:
    """`nn.MultiheadAttention`: three dimensions, the batch in dim 0 or 1."""
    module = site.module
    assert isinstance(module, nn.MultiheadAttention)
    query = site["query"]
    fact = common_fact(site, [query, site["key"], site["value"]])
    if fact is None:
        return (UNKNOWN, UNKNOWN)
    fact = _sequence(site, fact, module.batch_first)
    _check_masks(site, fact, site["attn_mask"], site["key_padding_mask"])
    if site["need_weights"] is False:
        return (fact, NON_TENSOR)
    heads = 0 if site["average_attn_weights"] is not False else 1
    if not fact.batched or site.refusal is not None:
        return (fact, UNKNOWN)
    return (fact, Fact(Rank(3 + heads), 0, fact.size))


def _sequence(site: CallSite, fact: Fact, batch_first: bool) -> Fact:
    """Check that a sequence module gets three dimensions with the batch in the expected one."""
    if fact.dim is None:
        return fact
    if not site.require(fact.rank, 3, "takes batch, positions and features"):
        return without_batch(fact.rank)
    if fact.dim != (0 if batch_first else 1):
        expected = "first" if batch_first else "second"
        hint = f"Transpose its input, or build it with batch_first={not batch_first}."
        site.refuse_mixing(fact, f"expects the batch as its {expected} dimension and mixes elements along", hint)
    return fact


def _check_masks(site: CallSite, fact: Fact, shared: Any, padding: Any) -> None:
    for mask in (shared, padding):
        if mask is not None and not isinstance(mask, Fact):
            site.refuse("SNNFX105", f"the batch dimension of a mask of {site.text} is unknown")
    if isinstance(shared, Fact) and (shared.batched or shared.varying or shared.rank.known != 2):
        site.refuse("SNNFX105", f"the attention mask of {site.text} is not one constant [L, S] matrix")
    if isinstance(padding, Fact) and (padding.dim, padding.size) != (0, fact.size):
        site.refuse("SNNFX105", f"the padding mask of {site.text} does not have the batch in dim 0")


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


def encoder(site: CallSite) -> Value:
    """`nn.TransformerEncoderLayer` and `nn.TransformerEncoder`, if built from modules of torch only."""
    module = site.module
    assert module is not None
    fact = site["src"]
    if not isinstance(fact, Fact):
        return UNKNOWN
    layers = [part for part in module.modules() if isinstance(part, nn.TransformerEncoderLayer)]
    foreign = [part for part in module.modules() if type(part) not in _PARTS_OF_AN_ENCODER]
    activations = {getattr(layer.activation, "__name__", type(layer.activation).__name__) for layer in layers}
    if foreign or not activations <= {"relu", "gelu", "ReLU", "GELU"}:
        what = type(foreign[0]).__name__ if foreign else "a custom activation"
        site.refuse("SNNFX101", f"{site.text} contains {what}, which no batch rule covers there")
    orders = {layer.self_attn.batch_first for layer in layers}
    if len(orders) != 1:
        site.refuse("SNNFX101", f"the layers of {site.text} have different values of batch_first")
        return UNKNOWN
    fact = _sequence(site, fact, orders.pop())
    padding = site["src_key_padding_mask"]
    if padding is not None and isinstance(module, nn.TransformerEncoder):
        site.refuse("SNNFX103", f"{site.text} may truncate its result to the longest sample in the batch")
    _check_masks(site, fact, site["src_mask"] if site["src_mask"] is not None else site["mask"], padding)
    return fact


def batch_norm(site: CallSite) -> Value:
    """BatchNorm; in training, `batch_norm=` declares whether its statistics may be folded."""
    module = site.module
    in_training = site.training if module is not None else site["training"] not in (None, False)
    if site["running_mean"] is None and site["running_var"] is None and not in_training:
        site.refuse(
            "SNNFX106",
            f"{site.text} has no running statistics, so it uses the statistics of each step even in evaluation",
            "Use track_running_stats=True.",
        )
    elif in_training and (module is None or not site.training):
        site.refuse(
            "SNNFX106",
            f"{site.text} uses the statistics of each step; only BatchNorm modules may be folded in training",
        )
    elif in_training and site.batch_norm == "per_step":
        site.refuse(
            "SNNFX106",
            f'{site.text} uses the statistics of each step (batch_norm="per_step")',
            'Use batch_norm="fold" to take the statistics over all steps.',
        )
    ranks = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}
    return BatchFirst(next((rank for cls, rank in ranks.items() if isinstance(module, cls)), 2))(site)


def instance_norm(site: CallSite) -> Value:
    """InstanceNorm; its running statistics, if any, are updated at each step, because its outputs are the same then."""
    module = site.module
    tracks = site["running_mean"] is not None
    in_training = site.training if module is not None else site["use_input_stats"] not in (None, False)
    if tracks and in_training:
        site.refuse("SNNFX106", f"{site.text} updates its running statistics at each step")
    ranks = {nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}
    return BatchFirst(next((rank for cls, rank in ranks.items() if isinstance(module, cls)), 3))(site)


def cell(site: CallSite) -> Value:
    """`nn.RNNCell`, `nn.GRUCell`, `nn.LSTMCell`: input `[N, C]`, explicit states `[N, H]`."""
    fact = site["input"]
    states = [state for state in leaves(site["hx"]) if state is not None]
    if not isinstance(fact, Fact):
        return UNKNOWN
    merged = common_fact(site, [fact, *states]) if states else fact
    if merged is None:
        return UNKNOWN
    result = BatchFirst(2)(site)
    return (result, result) if isinstance(site.module, nn.LSTMCell) else result


def recurrent(site: CallSite) -> Value:
    """`nn.RNN`, `nn.GRU`, `nn.LSTM`: refused, they run over a sequence within one step."""
    module = site.module
    assert isinstance(module, nn.RNNBase)
    site.refuse(
        "SNNFX109",
        f"{site.text} runs over a sequence within one step",
        "If that sequence is time, use the cell (e.g. nn.GRUCell) and pass its state.",
    )
    fact = site["input"]
    if not isinstance(fact, Fact) or fact.rank.known != 3 or fact.dim != (0 if module.batch_first else 1):
        return UNKNOWN
    hidden = Fact(Rank(3), 1, fact.size)
    return (fact, (hidden, hidden) if isinstance(module, nn.LSTM) else hidden)


def stateful(site: CallSite) -> Value:
    """`call_stateful(module, slots, *inputs)`: outputs and next states have the shape of the first input."""
    module, slots = site.module, site["state"]
    adapter = adapter_of(module) if module is not None else None
    count = len(slots) if isinstance(slots, tuple | list) else 0
    if module is not None and adapter is not None and hasattr(adapter, "keeps_batch") and adapter.keeps_batch(module):
        first = next(iter(leaves(site["inputs"])), UNKNOWN)
        if not adapter.elementwise(module) and isinstance(first, Fact) and first.dim == 0:
            # Recurrent neurons mix features, but not samples: the batch is dim 0 of all inputs and states.
            if any(fact is UNKNOWN or (isinstance(fact, Fact) and fact.dim != 0) for fact in leaves(slots)):
                site.refuse("SNNFX105", f"the batch dimension of a state of {site.text} is unknown")
            return (first, (first,) * count)
    if module is None or adapter is None or not adapter.elementwise(module):
        site.refuse("SNNFX101", f"{site.text} is not known to be element-wise")
        return (UNKNOWN, (UNKNOWN,) * count)
    broadcast(site, [*leaves(slots), *leaves(site["inputs"])])
    first = next(iter(leaves(site["inputs"])), UNKNOWN)
    if not isinstance(first, Fact):
        first = UNDETERMINED if first is UNDETERMINED else UNKNOWN
    return (first, (first,) * count)


def initial_state(site: CallSite) -> Value:
    """`initial_value(module, index, *inputs)`: a number, or a tensor of the shape of the first input."""
    result = stateful(site)
    assert isinstance(result, tuple)
    return result[0]  # type: ignore[no-any-return]


def opaque(site: CallSite) -> Value:
    """An opaque module: capture could not trace it."""
    site.refuse("SNNFX108", f"{site.text} could not be traced")
    return UNKNOWN


def autograd_function(site: CallSite) -> Value:
    """`torch.autograd.Function`: element-wise if proven, declared, or a known surrogate."""
    function = getattr(site.module, "function", None)
    module = getattr(function, "__module__", "")
    known = module.startswith(("spikingjelly.activation_based.surrogate", "snnfx.surrogate"))
    proven = ELEMENTWISE_RESULTS.of(site.node)
    if proven is not None:
        result = broadcast(site, leaves(site["operands"]))
        return (result,) * proven if proven else result
    if not (getattr(function, "snnfx_elementwise", False) or known):
        name = getattr(function, "__name__", "the function")
        site.refuse(
            "SNNFX101",
            f"the autograd.Function {name} is not known to be element-wise",
            "If it is, set `snnfx_elementwise = True` in the class.",
        )
        if function is None or not _keeps_shape(function, site["operands"]):
            return UNKNOWN
        # The node is not folded, but its users may be: the result has the shape of the operand.
    return broadcast(site, leaves(site["operands"]))


def _keeps_shape(function: type[torch.autograd.Function], operands: Any) -> bool:
    """Whether a Function of one tensor keeps its shape, tried on two unrelated shapes."""
    tensors = [i for i, operand in enumerate(operands) if isinstance(operand, Fact)]
    if len(tensors) != 1 or UNKNOWN in operands:
        return False
    for shape in ((3, 5), (7, 2)):
        arguments = list(operands)
        arguments[tensors[0]] = torch.zeros(shape)
        try:
            with torch.no_grad():
                result = function.apply(*arguments)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            return False
        if not isinstance(result, torch.Tensor) or result.shape != shape:
            return False
    return True


@dataclass(frozen=True)
class OnTrace:
    """A weight op with an eligibility trace: the rule of the op, on its operand.

    Args:
        rule: the rule of the op.
    """

    rule: Callable[[CallSite], Value]

    def __call__(self, site: CallSite) -> Value:
        operand = site["operand"]
        for trace in leaves(site["traces"]):
            if not isinstance(operand, Fact) or not isinstance(trace, Fact) or trace.dim is None:
                site.refuse("SNNFX105", f"the batch dimension of a trace of {site.text} is unknown")
            elif (trace.dim, trace.size) != (operand.dim, operand.size):
                site.refuse("SNNFX105", f"a trace of {site.text} has its batch in another dimension than the operand")
        return self.rule(site)


def sample_ones(site: CallSite) -> Value:
    """`ones_per_sample`: one number for each sample, `[N]`."""
    operand = site["input"]
    if not isinstance(operand, Fact) or operand.dim != 0:
        site.refuse("SNNFX105", f"the operand of {site.text} does not have its batch in dim 0")
        return UNKNOWN
    return Fact(Rank(1), 0, operand.size)


def expect_size(site: CallSite) -> Value:
    """`expect_size`: a size that the Python code of the model used as a number."""
    if is_batch_sized(site["size"]):
        site.refuse("SNNFX110", "the Python code of the model used the batch size as a number")
    return SizeFact(value=constant_int(site["expected"]))

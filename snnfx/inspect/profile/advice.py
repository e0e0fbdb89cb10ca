"""Advice of a profile: options that may make this call faster or smaller, each with the measured reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from torch import nn

from snnfx.inspect.memory_phases import PhaseMemory
from snnfx.inspect.profile.profiled_call import ProfiledCall
from snnfx.inspect.profile_data import Advice, FiringRate, LayerOperations, RegionTime
from snnfx.memory.budget import bytes_as_text
from snnfx.regions.region_modules import LoopRegion

__all__ = ["advise"]

_LARGE_SHARE = 0.1
"""Share of the time of a call from which a region is worth advice."""
_SPARSE = 0.1
"""Density of spikes below which kernels that skip zeros may pay off."""
_LARGE_MEMORY = 64 * 2**20


def advise(
    call: ProfiledCall,
    regions: Sequence[RegionTime],
    rates: Sequence[FiringRate],
    operations: Sequence[LayerOperations],
    memory: PhaseMemory,
    train: bool,
) -> tuple[Advice, ...]:
    """The advice for a measured call, by expected effect."""
    total = sum(row.forward + row.backward for row in regions) or 1.0
    shares = {row.region: (row.forward + row.backward) / total for row in regions}
    return (
        *_constant_inputs(call),
        *_loops(call, shares),
        *_maps(call, shares),
        *_overhead(regions, shares),
        *_memory(call, memory, train),
        *_layout(call),
        *_events(call, operations, shares),
        *_neurons(rates),
    )


def _constant_inputs(call: ProfiledCall) -> Iterator[Advice]:
    if call.T < 2 or call.net.options.takes != "step":
        return
    for varies, x, node in zip(call.net.varying_inputs, call.leaves, call.net.program.input_nodes(), strict=True):
        if varies and x.numel() and bool((x == x[:1]).all()):
            yield Advice(
                "time_dim=None",
                f"Input `{node.name}` is the same at all {call.T} time steps. Pass it without a time dimension: layers "
                "before the first neuron then run once instead of once per step.",
            )


def _loops(call: ProfiledCall, shares: dict[str, float]) -> Iterator[Advice]:
    modules = call.net.region_modules() if not call.is_whole_sequence else {}
    for region in call.net.regions:
        module, share = modules.get(region.name), shares.get(region.name, 0.0)
        if share < _LARGE_SHARE or not isinstance(module, LoopRegion):
            continue
        if call.net.options.lower is None:
            yield Advice(
                'lower="auto"',
                f"{region.name} takes {share:.0%} of the time step by step in PyTorch. A generated kernel runs all "
                "its time steps in one call.",
                region.name,
            )
        elif module.kernels is None or module.kernels.in_use is None:
            reason = region.lowering_refusal or (module.kernels.refusal if module.kernels is not None else "")
            why = f" No kernel, because {reason}." if reason else ""
            yield Advice(
                "snnfx.explain(net)",
                f"{region.name} takes {share:.0%} of the time and runs step by step.{why}",
                region.name,
            )


def _maps(call: ProfiledCall, shares: dict[str, float]) -> Iterator[Advice]:
    for region in call.net.regions:
        share = shares.get(region.name, 0.0)
        refusals = [refusal for _, refusal in region.refusals() if refusal.hint]
        if region.kind == "map" and share >= _LARGE_SHARE and refusals:
            why = f"{region.name} takes {share:.0%} of the time, mapped over T instead of folded."
            yield Advice(refusals[0].code, f"{why} {refusals[0].hint}", region.name)


def _overhead(regions: Sequence[RegionTime], shares: dict[str, float]) -> Iterator[Advice]:
    total = sum(row.forward for row in regions)
    if regions and total / len(regions) < 0.05:
        yield Advice(
            "larger batch",
            f"A region takes {total / len(regions) * 1e3:.0f} µs on average, close to the cost of calling it from "
            "Python. A larger batch, more time steps per call or torch.compile(net) use the machine better.",
        )
    elif shares.get("", 0.0) >= 0.3:
        yield Advice(
            "torch.compile(net)",
            f"{shares['']:.0%} of the time passes between regions, in copies and changes of shape.",
        )


def _memory(call: ProfiledCall, memory: PhaseMemory, train: bool) -> Iterator[Advice]:
    options = call.net.options
    if memory.peak < _LARGE_MEMORY:
        return
    peak = bytes_as_text(memory.peak)
    if train and options.memory_budget is None and options.checkpoint in ("auto", None):
        kept = sum(row.kept for row in memory.regions)
        if kept * 2 > memory.peak:
            yield Advice(
                'memory_budget="..."',
                f"{bytes_as_text(kept)} of the peak of {peak} are saved for backward. A budget below {peak} makes the "
                "backward pass recompute the cheapest part of them; SNNFX318 names the least possible budget.",
                memory.region,
            )
    elif not train and options.chunk is None and call.T > 1:
        yield Advice(
            'chunk="auto"',
            f"All {call.T} time steps run at once, with a peak of {peak}. Chunks of fewer steps use less memory, and "
            "their tensors may fit the cache.",
            memory.region,
        )


def _layout(call: ProfiledCall) -> Iterator[Advice]:
    convolves = any(isinstance(m, nn.Conv2d | nn.Conv3d) for m in call.net.source.modules())
    if convolves and call.net.options.memory_format is None:
        yield Advice(
            'memory_format="auto"',
            "The net has convolutions, and memory_format=None keeps their memory format. With auto, snnfx chooses the "
            "format of images between convolutions.",
        )


def _events(call: ProfiledCall, operations: Sequence[LayerOperations], shares: dict[str, float]) -> Iterator[Advice]:
    """Advice for nets of a version with kernels that skip zeros (option `events`)."""
    options = call.net.options
    if "events" not in {field.name for field in dataclasses.fields(options)} or getattr(options, "events"):  # noqa: B009
        return
    for row in operations:
        if row.spikes == 1.0 and row.density < _SPARSE and shares.get(row.region, 0.0) >= _LARGE_SHARE:
            yield Advice(
                'events="auto"',
                f"{row.layer} multiplies inputs of which {row.density:.1%} are spikes, in a region with "
                f"{shares[row.region]:.0%} of the time. Kernels by events skip the zeros.",
                row.region,
            )


def _neurons(rates: Sequence[FiringRate]) -> Iterator[Advice]:
    dead = [row.layer for row in rates if row.rate == 0.0]
    if dead:
        yield Advice(
            "input scale or threshold",
            f"Without a spike in this call: {_listed(dead)}. Layers behind a layer without spikes get zeros only.",
        )
    silent = [row for row in rates if row.rate and len(row.silent) * 2 >= len(row.channels) > 1]
    if silent:
        names = [f"{row.layer} ({len(row.silent)} of {len(row.channels)})" for row in silent]
        yield Advice(
            "input scale or threshold",
            f"At least half of the channels are silent in {_listed(names)}. Check more inputs before you remove any.",
        )
    saturated = [row for row in rates if len(row.saturated) * 2 >= len(row.channels)]
    if saturated:
        names = [f"{row.layer} ({len(row.saturated)} of {len(row.channels)})" for row in saturated]
        yield Advice(
            "input scale or threshold",
            f"At least half of the channels fire at almost every step in {_listed(names)}.",
        )


def _listed(names: Sequence[str], most: int = 6) -> str:
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])

"""`snnfx.profile`: measure where the time, the spikes, the operations and the memory of a call go."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from snnfx.errors import InputError, ToolError
from snnfx.inspect.computing_nodes import computing_nodes
from snnfx.inspect.memory_phases import PhaseMemory
from snnfx.inspect.memory_report import report_memory
from snnfx.inspect.picture.draw import draw
from snnfx.inspect.profile.advice import advise
from snnfx.inspect.profile.observed_step import ObservedCall, observe
from snnfx.inspect.profile.profile_report import ProfileReport
from snnfx.inspect.profile.profiled_call import ProfiledCall
from snnfx.inspect.profile.region_times import measure_regions, median_times
from snnfx.inspect.profile_data import (
    EnergyModel,
    FiringRate,
    LayerOperations,
    Recording,
    RegionTime,
)
from snnfx.inspect.region_execution import how_region_ran
from snnfx.ir.printing import describe_node
from snnfx.ops.run_loop import run_loop
from snnfx.runtime.net import Net
from snnfx.sandbox.isolation import in_mode, isolated
from snnfx.sandbox.torch_internals import pytree

__all__ = ["profile"]

_SATURATED = 0.95
_WARM_UP = 2
_EVERY_LEVEL = 1000
"""More levels of modules than a model has: the picture of a page has a frame for each region."""


def profile(
    net: nn.Module,
    *inputs: Any,
    train: bool = False,
    T: int | None = None,
    record: Sequence[str] = (),
    repeats: int = 5,
    mac_pj: float = 4.6,
    ac_pj: float = 0.9,
    **kwargs: Any,
) -> ProfileReport:
    """Measure time, spikes, operations and memory of one call of a net.

    The call runs several times, whole and region by region. The net and its model are not changed: buffers, states,
    gradients, mode and RNG state are restored.

    Args:
        net: a net of `snnfx.convert` in step mode "m".
        *inputs: the inputs of a call, `[T, N, *]` for each input with a time dimension.
        train: False measures inference in evaluation mode without gradients; True measures a training step: forward in
            training mode, and backward from a gradient of ones.
        T: the number of time steps; required if no input has a time dimension.
        record: qualified names of modules or slots whose values the report shows over time, for sample 0 and up to 64
            units; the slots of a named module are recorded as well, e.g. "lif1" also records "lif1.v".
        repeats: number of measured calls; times are their median.
        mac_pj, ac_pj: energy of one MAC and of one AC in picojoules (see Source).
        **kwargs: inputs by name.

    Returns:
        The report. `print` it, or write it with `.save("profile.html")` (also .md and .json). `.to_dict()` gives its
        data: times in milliseconds, memory in bytes, energy in joules, rates in spikes per neuron and time step.
        Operations are those of the forward pass of the whole call: all time steps, the whole batch. A product with an
        operand of only 0 and 1 counts in accumulates (ACs), all others in MACs; additions of biases and operations of
        neurons and BatchNorm are not counted.

    Raises:
        InputError: SNNFX309, `net` is not in step mode "m", or `repeats` is less than 1; SNNFX311, a name in
            `record` is unknown; otherwise as for `net.run`.

    Example:
        >>> import torch, snnfx
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), snnfx.neuron.LIFNode(), torch.nn.Linear(4, 2))
        >>> report = snnfx.profile(snnfx.convert(model), torch.rand(8, 2, 3))
        >>> [(row.layer, row.dense_macs) for row in report.operations]
        [('0', 192), ('2', 128)]

    Source: M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, for 45 nm CMOS and
    float32: 3.7 pJ for a multiplication and 0.9 pJ for an addition. Memory traffic is not part of the estimate.
    """
    net = _checked(net, repeats)
    names = (record,) if isinstance(record, str) else tuple(record)
    energy = EnergyModel(mac_pj, ac_pj)
    if energy != EnergyModel():
        energy = EnergyModel(mac_pj, ac_pj, "energies given by the caller")
    with isolated(net.source), in_mode(net, train):
        with torch.set_grad_enabled(train):
            planned = net.planned_for(*inputs, T=T, **kwargs)
            _, leaves, given, steps = planned._bind_call(inputs, kwargs, T)
            if steps is None:  # a model that runs over time itself
                steps = leaves[0].shape[0] if leaves and leaves[0].dim() else 1
            call = ProfiledCall(planned, leaves, given, steps)
            forward, backward = _whole_call(call, train, repeats)
            times = measure_regions(call, train, _WARM_UP, repeats)
        with torch.no_grad():
            seen = observe(call, _names_to_record(call, names))
        memory = _memory(call, train)
        regions = _region_rows(call, times)
        rates, operations = _rates(seen), _operations(seen)
        advice = advise(call, regions, rates, operations, memory, train)
        batch = max(
            (x.shape[1 if v else 0] for x, v in zip(leaves, net.varying_inputs, strict=True) if x.dim() > v), default=0
        )
        report = ProfileReport(
            model=type(net.source).__name__,
            train=train,
            T=steps,
            batch=batch,
            inputs=tuple(tuple(x.shape) for x in leaves),
            environment=_environment(leaves),
            forward=forward,
            backward=backward,
            repeats=repeats,
            regions=regions,
            rates=rates,
            operations=operations,
            uncounted=seen.uncounted,
            energy_model=energy,
            memory=memory,
            advice=advice,
            recordings=_recordings(seen),
            notes=(*dict.fromkeys(seen.notes), *_notes(call, train)),
        )
        picture, no_picture = _picture(call.net, report)
    return dataclasses.replace(report, picture=picture, notes=(*report.notes, *no_picture))


def _checked(net: nn.Module, repeats: int) -> Net:
    if not isinstance(net, Net) or (net.options.step_mode != "m" and not net.loops):
        raise InputError(
            "SNNFX309",
            f"cannot profile a {type(net).__name__}",
            why='profile measures the regions of a net in step_mode="m".',
            hint="Convert the model first: snnfx.profile(snnfx.convert(model), x_seq).",
        )
    if repeats < 1:
        raise InputError("SNNFX309", f"repeats={repeats} is too small", hint="Pass at least 1.")
    return net


def _whole_call(call: ProfiledCall, train: bool, repeats: int) -> tuple[float, float]:
    """Milliseconds of the forward and backward pass as a user runs them."""
    net, device = call.net, call.leaves[0].device if call.leaves else torch.device("cpu")
    wanted = [x for x in (*net.source.parameters(), *call.leaves) if x.requires_grad]

    def backward(result: Any) -> None:
        outputs = [y for y in pytree.tree_leaves(result) if isinstance(y, Tensor) and y.requires_grad]
        if outputs and wanted and train:
            torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs], allow_unused=True)

    forward_time, backward_time = median_times(_runner(call), backward, device, _WARM_UP, repeats)
    return forward_time * 1e3, backward_time * 1e3 if train else 0.0


def _runner(call: ProfiledCall) -> Any:
    steps = call.T if call.net.options.step_mode == "m" else None
    return lambda: call.net.run_bound(call.leaves, call.given, None, steps)[0]


def _memory(call: ProfiledCall, train: bool) -> PhaseMemory:
    pairs = zip(call.leaves, call.net.varying_inputs, strict=True)
    report = report_memory(call.net, [x[0] if v else x for x, v in pairs], call.T)
    return report.training if train else report.inference


def _picture(net: Net, report: ProfileReport) -> tuple[str, list[str]]:
    """The net as SVG with each of its regions, or "" and a note with the reason."""
    try:
        return draw(net, depth=_EVERY_LEVEL, profile=report).pipe("svg").decode(), []
    except ToolError as error:
        return "", [f"No picture of the net: {error}"]


def _environment(leaves: Sequence[Tensor]) -> str:
    device = leaves[0].device if leaves else torch.device("cpu")
    if device.type == "cuda":
        return f"PyTorch {torch.__version__}, {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"PyTorch {torch.__version__}, {device.type.upper()}, {threads} thread{'s' * (threads != 1)}"


def _region_rows(call: ProfiledCall, times: dict[str, tuple[float, float]]) -> tuple[RegionTime, ...]:
    rows: list[RegionTime] = []
    left = dict(times)

    def add(name: str, kind: str, runs_as: str, contents: Sequence[str]) -> None:
        forward, backward = left.pop(name, (0.0, 0.0))
        rows.append(RegionTime(name, kind, runs_as, tuple(contents), forward * 1e3, backward * 1e3))

    if call.is_whole_sequence:
        parts: dict[str, list[Node]] = {}
        for node in call.net.program.graph.nodes:
            parts.setdefault(call.part_of(node), []).append(node)
        for name, nodes in parts.items():
            if name:
                kind = name.partition("_")[0]
                add(name, kind, _runs_of_loop(call, nodes[0]) if kind == "loop" else "", _contents(call, nodes))
    else:
        modules = call.net.region_modules()
        for region in call.net.regions:
            if region.name in left:
                contents = dict.fromkeys(_with_type(call.net, node) for node in computing_nodes(region))
                add(
                    region.name,
                    region.kind,
                    how_region_ran(call.net.program, region, modules.get(region.name)),
                    list(contents),
                )
    rest = [sum(pair[i] for pair in left.values()) for i in (0, 1)]
    rows.append(RegionTime("", "", "", (), rest[0] * 1e3, rest[1] * 1e3))
    return tuple(rows)


def _with_type(net: Net, node: Node) -> str:
    module = net.program.module_of(node)
    return describe_node(node) if module is None else f"{describe_node(node)} ({type(module).__name__})"


def _contents(call: ProfiledCall, nodes: Sequence[Node]) -> list[str]:
    """The layers of a part of a model that runs over time itself, or its operations if it has none."""
    net = call.net
    if nodes[0].target is run_loop:
        return [net.program.resolve(str(nodes[0].args[0].target)).location.strip("`")]  # type: ignore[union-attr]
    layers = [_with_type(net, node) for node in nodes if net.program.module_of(node) is not None]
    return list(dict.fromkeys(layers or [describe_node(node) for node in nodes]))


def _runs_of_loop(call: ProfiledCall, node: Node) -> str:
    """How the loops of the step of a re-rolled loop ran."""
    inner = call.net.program.resolve(str(node.args[0].target)).net  # type: ignore[union-attr]
    modules = inner.region_modules()
    ways = {how_region_ran(inner.program, r, modules.get(r.name)) for r in inner.regions if r.kind == "loop"}
    return ", ".join(sorted(ways))


def _rates(seen: ObservedCall) -> tuple[FiringRate, ...]:
    rows: dict[str, FiringRate] = {}
    for counts in seen.spikes.values():
        if not counts.binary or counts.per_channel is None or not counts.per_step:
            continue
        size, channels = counts.values_per_step, len(counts.per_channel)
        steps = len(counts.per_step)
        rates = (counts.per_channel.double() * channels / (size * steps)).tolist()
        batch = counts.shape[0] or 1
        name, number = counts.name, 2
        while name in rows:
            name, number = f"{counts.name} (call {number})", number + 1
        rows[name] = FiringRate(
            name,
            counts.region,
            size // batch,
            sum(counts.per_step) / (size * steps) if size else 0.0,
            tuple(rates),
            tuple(count / size for count in counts.per_step),
            tuple(i for i, rate in enumerate(rates) if rate == 0.0),
            tuple(i for i, rate in enumerate(rates) if rate >= _SATURATED),
        )
    return tuple(rows.values())


def _operations(seen: ObservedCall) -> tuple[LayerOperations, ...]:
    rows = []
    for product in seen.products.values():
        counts = product.counts
        if counts.products:
            density = counts.nonzero / counts.elements if counts.elements else 0.0
            share = counts.spike_products / counts.products
            rows.append(
                LayerOperations(
                    product.name,
                    product.kind,
                    product.region,
                    counts.dense_macs,
                    counts.macs,
                    counts.acs,
                    density,
                    share,
                )
            )
    return tuple(rows)


def _names_to_record(call: ProfiledCall, names: Sequence[str]) -> list[str]:
    """The names, each followed by the slots of the module."""
    nets = [call.net, *call.net.loops]
    slots = dict.fromkeys(slot.name for net in nets for slot in net.program.slots)
    return list(
        dict.fromkeys(s for name in names for s in (name, *(slot for slot in slots if slot.rpartition(".")[0] == name)))
    )


def _recordings(seen: ObservedCall) -> tuple[Recording, ...]:
    return tuple(
        Recording(units.name, units.binary, units.units, tuple(map(tuple, torch.cat(units.values).tolist())))
        for units in seen.recorded.values()
        if units.values
    )


def _notes(call: ProfiledCall, train: bool) -> list[str]:
    notes = []
    chunks = sum(1 for _ in call.chunks())
    if chunks > 1:
        notes.append(f"The call runs in {chunks} chunks over time; the time of a region is the sum over chunks.")
    options = call.net.options
    if train and (options.checkpoint not in ("auto", None) or options.memory_budget is not None):
        notes.append("The times of regions are without recomputation; the time of the whole call includes it.")
    return notes

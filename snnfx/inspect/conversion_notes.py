"""Sentences of an `explain` report about state, BatchNorm, random numbers, kernels and modes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch.fx import Node, map_arg

from snnfx.analysis.batch_norm_folding import layer_of_norm, unfolded_batch_norms
from snnfx.analysis.dependence import is_random
from snnfx.analysis.first_step_match import match_first_step
from snnfx.analysis.lowerable_loops import mixing_node
from snnfx.analysis.statistic_reads import is_statistic_read, statistic_of
from snnfx.inspect.computing_nodes import NodeKey, is_computing, nodes_by_key
from snnfx.inspect.expected_lowering import expected_lowering
from snnfx.inspect.source_expressions import expression
from snnfx.ir.facts import IN_WEIGHTS, KIND, NUMBER, SLOT, SUNK, TRACE
from snnfx.ir.printing import describe_node, location_of
from snnfx.ir.program import Region, StepProgram
from snnfx.lowering.elementwise.back_end_choice import reason_without_back_end
from snnfx.lowering.elementwise.lowered_step import LoweredStep
from snnfx.lowering.mixed.mixed_step import MixedStep
from snnfx.ops.step_functions import expect_size
from snnfx.regions.region_modules import LoopRegion, MapRegion
from snnfx.runtime.compiled_call import reason_against_operator
from snnfx.runtime.net import Net
from snnfx.sandbox.torch_internals import BatchNormBase, DropoutBase

__all__ = [
    "batch_norm_semantics",
    "carried_arguments",
    "compiled_form",
    "eligibility_traces",
    "first_step_differs",
    "fixed_sizes",
    "folded_batch_norms",
    "kernels_of_loops",
    "mode_differences",
    "random_nodes",
    "reduced_outputs",
    "statistic_reads",
    "vmap_fallbacks",
]

_STEPPED_WITH_KERNELS = "Stepped with element-wise kernels and a derived backward pass"
_KERNEL_WITH_PRODUCTS = "One kernel for all time steps, products included"
_SEVERAL_KERNELS = "Several kernels in one loop over all time steps"
_PAST = {"fold": "folded", "map": "mapped", "loop": "looped", "once": "computed once"}


def first_step_differs(program: StepProgram) -> str:
    """How the first step differs from the later ones; "" if it does not."""
    if program.first_step is None:
        return ""
    first, later = nodes_by_key(program.first_step), nodes_by_key(program)
    match = match_first_step(program)
    graph = f"graph of {_and(match.loops)}" if match is not None and match.loops else "graph"
    text = f"The first step differs from the later steps and runs in a separate {graph} (SNNFX212)."
    only_first, only_later = _missing(first, later), _missing(later, first)
    if only_first:
        text += f" Only in the first step: {_and(only_first)}."
    if only_later:
        text += f" Only in later steps: {_and(only_later)}."
    return text


def carried_arguments(program: StepProgram) -> Iterator[str]:
    """Arguments that carry an output of the previous step."""
    how = "inferred from the signature" if program.inferred_carry else "carry="
    for argument in program.carried:
        path = "".join(f"[{key!r}]" for key in argument.path)
        start = " The caller must pass its initial value." if argument.required else ""
        yield f"Argument `{argument.name}` is output{path} of the previous step ({how}).{start}"


def fixed_sizes(program: StepProgram) -> Iterator[str]:
    """Sizes that the model's Python code used as numbers, for which alone the net is valid."""
    seen: set[str] = set()
    for node in program.graph.nodes:
        if node.target is expect_size:
            size, expected, location = node.args
            note = (
                f"`{expression(program, size)}` must be {expected} in every call: the model's Python code used this "
                f"size as a number during capture{f' ({location})' if location else ''}."
            )
            if note not in seen:
                seen.add(note)
                yield note


def batch_norm_semantics(net: Net) -> Iterator[str]:
    """The statistics that BatchNorm layers use in training, by kind of their region in the training program."""
    program = net.programs[True]
    names: dict[str, list[str]] = {}
    match = match_first_step(program)
    apart = match.norms if match is not None and match.refusal and net.options.step_mode == "m" else []
    for region in program.regions:
        for node in region.nodes:
            if node in apart:
                continue
            if node.op == "call_module" and isinstance(program.resolve(str(node.target)), BatchNormBase):
                names.setdefault(region.kind, []).append(f"`{node.target}`")
    if "fold" in names:
        yield (
            f'BatchNorm in {_and(names["fold"])}: training uses statistics over all T*N samples (batch_norm="fold"), '
            'as is usual for multi-step SNNs; batch_norm="per_step" uses the statistics of each time step, as the '
            "stepped model does. Evaluation mode is the same for both."
        )
    if match is not None and apart:
        norms = _and(f"`{describe_node(node)}`" for node in apart)
        yield (
            f"BatchNorm in {norms}: training uses the statistics of the first step for the first step, and those of "
            f"all later steps for the later steps (SNNFX224: {match.refusal})."
        )
    stepped: dict[str, list[str]] = {}
    for name, reason in unfolded_batch_norms(program).items():
        stepped.setdefault("" if net.options.batch_norm == "per_step" else reason, []).append(f"`{name}`")
    for reason, layers in stepped.items():
        because = f" (SNNFX112: {reason})" if reason else ""
        semantics = "training uses the statistics of each time step, as the stepped model does"
        yield f"BatchNorm in {_and(layers)}: {semantics}{because}."
    if "once" in names:
        yield f"BatchNorm in {_and(names['once'])}: computed once, with the statistics of the N samples."


def statistic_reads(net: Net) -> Iterator[str]:
    """Statistics that the step reads and a layer updates in training: the values that the reads get."""
    program = net.programs[True]
    for region in program.regions:
        for node in filter(is_statistic_read, region.nodes):
            layer = next((describe_node(n) for n in node.all_input_nodes if n.op != "get_attr"), None)
            if region.kind == "once":
                update = "its one update for the whole sequence"
                value = f"the value after {update}" if layer else f"the value before {update}"
                value += ", the same at every time step"
            else:
                value = "the value of each time step, as the stepped model does"
            place = f"behind `{layer}`" if layer else "in front of the call that updates it"
            yield f"`{statistic_of(node)}`, read {place}{_at(node)}: training gives {value}."


def folded_batch_norms(net: Net) -> Iterator[str]:
    """BatchNorm layers folded into the weights of the layer before, and the condition."""
    marked = [node for node in net.programs[False].graph.nodes if IN_WEIGHTS.of(node)]
    pairs = [f"{describe_node(norm)} into {describe_node(layer_of_norm(norm))}" for norm in marked]
    if pairs:
        yield (
            f"BatchNorm folded into weights: {_and(pairs)}. Applies in evaluation mode without gradients on a CPU, to "
            "layers with fewer weights than outputs."
        )


def reduced_outputs(net: Net) -> Iterator[str]:
    """The reduction of the outputs over time, and the nodes that run once on the reduced value."""
    reduce = net.options.reduce
    if reduce is None:
        return
    value = "value at the last step" if reduce == "last" else f"{reduce} over time"
    sunk = [describe_node(node) for node in net.program.graph.nodes if SUNK.of(node) and is_computing(node)]
    runs = f"; {_and(sunk)} run{'s' if len(sunk) == 1 else ''} once, on the reduced value" if sunk else ""
    yield f'The net returns the {value} of each output (reduce="{reduce}"){runs}.'


def random_nodes(program: StepProgram) -> Iterator[str]:
    """Nodes that draw random numbers at each time step."""
    nodes = [node for region in program.regions for node in region.nodes if is_random(program, node)]
    dropouts = [describe_node(node) for node in nodes if isinstance(program.module_of(node), DropoutBase)]
    others = [f"{describe_node(node)}{_at(node)}" for node in nodes if describe_node(node) not in dropouts]
    if dropouts:
        yield f"Dropout in {_and(dropouts)}: training draws a new mask at each time step, as the stepped model does."
    if others:
        yield f"New random numbers at each time step: {_and(others)}."


def eligibility_traces(program: StepProgram) -> Iterator[str]:
    """Weights of an online rule: the leak of the trace, or the reason why a weight has no trace."""
    for node in program.graph.nodes:
        if TRACE.is_known(node):
            yield TRACE.of(node)


def mode_differences(net: Net) -> Iterator[str]:
    """Nodes that the training program and the evaluation program treat differently."""
    training, evaluation = net.programs[True], net.programs[False]
    if training is evaluation:
        return
    in_training, in_evaluation = nodes_by_key(training), nodes_by_key(evaluation)
    absorbed = {n for region in evaluation.regions for n in region.nodes if n.name in region.absorbed}
    changed: dict[tuple[str, str], list[str]] = {}
    for key, node in in_training.items():
        other = in_evaluation.get(key)
        # A node absorbed into a kernel counts as folded here; `kernels_of_loops` lists it.
        other_kind = "fold" if other in absorbed else KIND.of(other) if other is not None else ""
        kinds = (KIND.of(node), other_kind)
        if all(kinds) and kinds[0] != kinds[1]:
            changed.setdefault(kinds, []).append(describe_node(node))
    for (kind, other_kind), names in changed.items():
        yield f"{_and(names)}: {_PAST[kind]} in training, {_PAST[other_kind]} in evaluation mode."
    for mode, here, there in (("training", in_training, in_evaluation), ("evaluation", in_evaluation, in_training)):
        missing = _missing(here, there)
        if missing:
            yield f"Only in {mode} mode: {_and(missing)}."
    other_arguments = [
        f"{describe_node(node)}{_at(node)}"
        for key, node in in_training.items()
        if key in in_evaluation and _constants(node) != _constants(in_evaluation[key])
    ]
    if other_arguments:
        yield f"Arguments differ between training and evaluation mode: {_and(other_arguments)}."


def _missing(here: dict[NodeKey, Node], there: dict[NodeKey, Node]) -> list[str]:
    return [f"{describe_node(node)}{_at(node)}" for key, node in here.items() if key not in there]


def _constants(node: Node) -> str:
    """The constant arguments of a node."""
    return str(map_arg((node.args, node.kwargs), lambda n: None))


def vmap_fallbacks(net: Net) -> Iterator[str]:
    """Map regions that torch.vmap refused at run time."""
    nets = [net, *net._nets_for_shapes.values()]
    for region in (region for n in nets for region in n.snnfx_regions.modules()):  # type: ignore[union-attr]
        if isinstance(region, MapRegion) and region.refused_by_vmap:
            reason = region.refused_by_vmap.rstrip(".")
            yield f"torch.vmap refused {region.label}: {reason}. Its time steps run one by one (SNNFX504)."


def kernels_of_loops(net: Net) -> Iterator[str]:
    """How each loop runs: as one kernel, or stepped with the reason; after a training step, also the saved tensors."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for region in net.regions:
        if region.kind == "loop" and region.lowering_refusal is not None:
            alike.setdefault(_how_it_runs(net, region), []).append(region.name)
    for (how, details, saves), names in alike.items():
        each = " for each" if len(names) > 1 and saves else ""
        yield f"{how}: {_and(names, len(names))}{details}{saves}{each}."
    for mode in dict.fromkeys((net.training, False)):
        program = net.programs[mode]
        absorbed = [f"{_and(_absorbed(program, r))} into {r.name}" for r in program.regions if r.absorbed]
        if absorbed:
            when = "Absorbed into kernels" if mode == net.training else "Absorbed into kernels in evaluation mode"
            yield f"{when}: {'; '.join(absorbed)}."
    yield from norms_in_kernels(net)


def norms_in_kernels(net: Net) -> Iterator[str]:
    """The BatchNorms that kernels of loops computed in the latest training call."""
    names = {id(module): name for name, module in net.source.named_modules()}
    found = []
    for name, module in net.region_modules().items():
        norms = [names[id(norm)] for norm in getattr(module, "norms_in_kernel", ()) if id(norm) in names]
        if norms:
            found.append(f"{_and([f'`{norm}`' for norm in norms])} by {name}")
    if found:
        yield f"Normalised by the kernel of the loop, by the statistics of the call: {'; '.join(found)}."


def _how_it_runs(net: Net, region: Region) -> tuple[str, str, str]:
    """How a loop runs, a clause with the reason, and a clause with the tensors saved for backward."""
    if _counts_only(net.program, region):
        return "Counted by Python, without tensors", "", ""
    module = net.region_modules().get(region.name)
    kernels = getattr(module, "kernels", None)
    in_use = kernels.in_use if kernels is not None else None
    refusal = region.lowering_refusal or (kernels.reason_for_steps if kernels is not None else "")
    if not refusal and in_use is None:
        refusal = reason_without_back_end(next((p.device for p in net.parameters()), torch.device("cpu")))
    expected = None
    if not refusal and in_use is None and isinstance(module, LoopRegion):
        expected = expected_lowering(net, module, region.slots)
        refusal = expected if isinstance(expected, str) else ""
    if refusal:
        return "Stepped by PyTorch", f", because {refusal}", ""
    if isinstance(expected, LoweredStep):
        return "One kernel for all time steps", ", compiled at the first call", ""
    if isinstance(expected, MixedStep):
        how, because = _how_mixed(expected)
        return how, f"{because}{';' if because else ','} compiled at the first call", ""
    if in_use is None:
        mixing = mixing_node(net.program, region)
        if mixing is None:
            return "Expected to be one kernel for all time steps", ", compiled at the first call", ""
        why = f"`{describe_node(mixing)}` is not element-wise; compiled at the first call"
        return _STEPPED_WITH_KERNELS, f", because {why}", ""
    if isinstance(in_use, MixedStep):
        how, because = _how_mixed(in_use)
        density = in_use.density
        visited = "" if density is None else f"; {density:.1%} of the inputs of its products were not zero"
        return how, because, f"{visited}{in_use.saves}"
    return "One kernel for all time steps", "", in_use.saves


def _how_mixed(step: MixedStep) -> tuple[str, str]:
    """How a loop with products runs, and a clause with the reason why it is not one kernel."""
    reason = step.reason_for_python
    if reason:
        return _STEPPED_WITH_KERNELS, f", because {reason}"
    return (_KERNEL_WITH_PRODUCTS, "") if step.has_products else (_SEVERAL_KERNELS, f", because {step.reason}")


def _counts_only(program: StepProgram, region: Region) -> bool:
    """Whether all states of a loop are Python numbers that the model's code keeps in attributes."""
    nodes = [node for node in program.slot_nodes() if SLOT.of(node) in region.slots]
    return bool(nodes) and all(NUMBER.of(node) for node in nodes)


def _absorbed(program: StepProgram, region: Region) -> list[str]:
    return [f"`{describe_node(node)}`" for node in region.nodes if node.name in region.absorbed]


def _and(names: Iterable[str], most: int = 6) -> str:
    different = list(dict.fromkeys(names))
    if len(different) > most:
        different = [*different[:most], f"{len(different) - most} more"]
    return different[0] if len(different) == 1 else f"{', '.join(different[:-1])} and {different[-1]}"


def _at(node: Node) -> str:
    return f" ({location_of(node)})" if location_of(node) else ""


def compiled_form(net: Net) -> str:
    """How torch.compile runs calls of the net, as a sentence without the period."""
    reason = reason_against_operator(net._executable)
    if not reason:
        return "The compiled net is one operator, which runs the net's own kernels"
    return f"The compiler sees each operation of the net, and one operator for each loop, because {reason}"

"""`snnfx.save`: write a net with its parameters, options, state and plan to one file."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from snnfx.convert import REPLANS
from snnfx.errors import SaveError
from snnfx.ir.facts import VALUE
from snnfx.ir.program import StepProgram
from snnfx.runtime.net import Net
from snnfx.sandbox.torch_internals import pytree
from snnfx.saving.model_description import describe_model
from snnfx.saving.plain_values import Encoder, MalformedFile, NotStorable
from snnfx.saving.program_records import ProgramReader, ProgramWriter, options_record
from snnfx.saving.saved_file import PREFIX, is_storable, stored, write_file
from snnfx.state.carry import SlotName

__all__ = ["save", "sources_of"]

_BUFFER = f"{PREFIX}buffer."
"""The prefix of buffers that the state_dict lacks."""


def save(net: Net, path: str | os.PathLike[str]) -> Path:
    """Write a net to a file that `snnfx.load` reads, without pickle.

    The file has the parameters and buffers of the model, the state that the net carries across calls, the mode
    (training or evaluation) of each module, the options of the conversion and, for most models, the plan. It is a
    safetensors file: other programs can read the parameters by their names in `net.state_dict()`.

    The state that the model itself keeps between calls (the potentials of a stepped model) is not saved.

    Args:
        net: a net of `snnfx.convert`.
        path: the file.

    Returns:
        `path`.

    Raises:
        SaveError: SNNFX803, the package safetensors is missing; SNNFX824, the net has a part that a file cannot
            contain.
        ExportError: SNNFX802, the file cannot be written.

    Example:
        >>> import tempfile, torch, snnfx
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), snnfx.neuron.LIFNode())
        >>> net = snnfx.convert(model, example_inputs=torch.rand(4, 3))
        >>> path = snnfx.save(net, tempfile.mkdtemp() + "/net.safetensors")
        >>> other = torch.nn.Sequential(torch.nn.Linear(3, 2), snnfx.neuron.LIFNode())
        >>> loaded = snnfx.load(path, other)
        >>> x_seq = torch.rand(6, 4, 3)
        >>> torch.equal(loaded(x_seq), net(x_seq))
        True
    """
    path = Path(path)
    kind = _kind(net)
    tensors, tied = _tensors_of_model(net.source)
    encoder = Encoder()
    try:
        options = options_record(net.options)
        carried = None if net.carried_state is None else encoder.encode({**net.carried_state})
        example = encoder.encode(_example(net)) if net.programs[True].input_ranks or kind != "steps" else None
    except NotStorable as error:
        raise _refused(str(error)) from error
    tensors |= {f"{PREFIX}state.{name}": stored(value) for name, value in encoder.tensors.items()}
    record: dict[str, Any] = {
        "kind": kind,
        "options": options,
        "inferred_carry": net.programs[True].inferred_carry,
        "training": {name: module.training for name, module in net.source.named_modules()},
        "tied": tied,
        "state": carried,
        "example": example,
    }
    plan, constants = _plan(net)
    tensors |= {f"{PREFIX}{name}": stored(value) for name, value in constants.items()}
    unstorable = [name for name, value in tensors.items() if not is_storable(value)]
    if unstorable:
        raise _refused(f"the tensor `{unstorable[0]}` has a layout or dtype without a form in safetensors")
    write_file(path, tensors, record | {"plan": plan})
    return path


def sources_of(net: Net) -> list[Any]:
    """`Guards.sources` of the programs of both modes, once if both share them."""
    found = [net.programs[True].guards.sources, net.programs[False].guards.sources]
    return found if found[0] != found[1] else found[:1]


def _kind(net: Any) -> str:
    """The name of the function that converts the model again."""
    if not isinstance(net, Net):
        raise _refused(f"a {type(net).__name__} is not a net", "Pass a net of snnfx.convert(model).")
    if net._executable.graphs.is_replaced:
        raise _refused("its graph was replaced by hand", "Write the change as a pass, or into the model.")
    kind = next((name for name, function in REPLANS.items() if function is net._replan), None)
    if kind is None:
        raise _refused("an online rule has edited it", "Save the net that the rule was applied to.")
    return kind


def _tensors_of_model(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a model by name, and for each further name of a tensor the first one."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    known: dict[Any, str] = {}
    state = model.state_dict(keep_vars=True)
    named = {f"{_BUFFER}{n}": b for n, b in model.named_buffers(remove_duplicate=False) if n not in state}
    for name, value in (state | named).items():
        if not isinstance(value, Tensor):
            raise _refused(
                f"`{name}` of the state_dict is a {type(value).__name__}, not a tensor",
                "Save it on its own, and remove it from the state_dict with a hook.",
            )
        if value.is_meta:
            raise _refused(
                f"`{name.removeprefix(_BUFFER)}` has no values, because it is on the meta device",
                "Give it values first, e.g. by model.to_empty(device='cpu') and model.load_state_dict(values).",
            )
        if not is_storable(value):
            raise _refused(
                f"`{name.removeprefix(_BUFFER)}` is a tensor with a layout or dtype without a form in safetensors",
                "Register it as a dense real tensor, and make its other form in the forward, e.g. by mask.to_sparse().",
            )
        if name in known.values() or id(value) in known:
            tied[name] = known[id(value)]
            continue
        known[id(value)] = name
        tensors[name] = stored(value)
    return tensors, tied


def _example(net: Net) -> tuple[Any, Any]:
    """The arguments of one step, or of one call of a model that runs over time itself, as meta tensors."""
    program = net.programs[True]
    values = {node.name: VALUE.of(node) for node in program.graph.nodes if node.op == "placeholder"}
    steps = [values[leaf.placeholder] for leaf in program.input_leaves if leaf.placeholder is not None]
    args, kwargs = net._executable._arguments[True].arguments_of(steps)
    placeholders = {slot.name: slot.placeholder for slot in program.slots}
    of_slot = partial(pytree.tree_map_only, SlotName, lambda slot: values[placeholders[slot.name]])
    return args, {**kwargs, **{c.name: of_slot(c.structure) for c in program.carried if c.required}}


def _plan(net: Net) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The plan as a record, or the reason why the file has none; and its constants."""
    try:
        if net.options.passes:
            raise NotStorable("passes of the user made it")
        sources = sources_of(net)
        _refuse_stale_guards(net.programs[True])
        _refuse_stale_guards(net.programs[False])
        description = describe_model(net.source, sources)
        writer = ProgramWriter(net, description.functions, description.locations)
        programs = writer.programs(net)
        # A plan that cannot be read back is none.
        reader = ProgramReader(
            net.source, description.functions, description.locations, writer.tensors, description.guards
        )
        reader.programs(programs)
    except (NotStorable, MalformedFile) as error:
        return {"refusal": str(error)}, {}
    captures = [[[*vars(s).values()] for s in group] for group in sources]
    return {"programs": programs, "description": description.digests, "captures": captures}, writer.tensors


def _refuse_stale_guards(program: StepProgram) -> None:
    guards = program.guards
    if guards.stale or (guards.tree is not None and guards.tree.change()):
        raise NotStorable("the model has changed since its conversion")
    changed = next((g.name for g in guards.reads if not g.holds(program.source)), None)
    if changed is not None:
        raise NotStorable(f"`{changed}` has changed since the conversion")


def _refused(
    why: str, hint: str = "Save net.state_dict(), and convert the model again where it is loaded."
) -> SaveError:
    return SaveError("SNNFX824", "the net cannot be saved", why=f"{why}.", hint=hint)

"""`snnfx.load`: restore a saved net on a model, with its plan if the model's code is the same."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.convert import REPLANS, convert_again
from snnfx.errors import SaveError, warn
from snnfx.ir.graph_pass import Pass, check_passes
from snnfx.ir.guards import GuardSources
from snnfx.ir.history import PassRecord
from snnfx.ir.program import StepProgram
from snnfx.runtime.net import Net
from snnfx.sandbox.snapshot import StateSnapshot
from snnfx.sandbox.torch_internals import pytree
from snnfx.saving.model_description import describe_model, difference
from snnfx.saving.plain_values import Decoder, MalformedFile, NotStorable, entry, flag, listed, text
from snnfx.saving.program_records import ProgramReader, read_options
from snnfx.saving.saved_file import PREFIX, malformed, read_file

__all__ = ["load"]

_MOST_BYTES_OF_EXAMPLE = 2**32


def load(path: str | os.PathLike[str], model: nn.Module, *, passes: Sequence[Pass] = ()) -> Net:
    """Restore a net that `snnfx.save` wrote.

    The model gets the saved parameters, buffers and modes in place, so that an optimizer goes on. If its code, modules
    and settings are those of the saved model, in the same versions of snnfx and torch, the net gets the saved plan.
    Otherwise the model is converted again with the saved options, and a warning gives the reason (SNNFX822).

    A file contains no code, and reading it imports and calls nothing that it names. A plan calls functions of tensors
    only; still, load files of people whom you trust with the numbers that your net computes.

    Args:
        path: the file.
        model: a model of the saved architecture, e.g. newly constructed.
        passes: the passes of the conversion, if it had any; the file has their names.

    Returns:
        The net, whose `source` is `model`.

    Raises:
        SaveError: SNNFX820, the file is truncated, changed, or not a file of `snnfx.save`; SNNFX821, its parameters do
            not match the model; SNNFX823, `passes` are not those of the conversion; SNNFX803, the package safetensors
            is missing. The model is then unchanged.
        CaptureError: the model is converted again, and cannot be captured. The model is then unchanged, too.

    Example:
        See `snnfx.save`.
    """
    path = Path(path)
    tensors, record = read_file(path)
    try:
        start = time.perf_counter()
        kind = entry(record, "kind")
        if kind not in REPLANS:
            raise MalformedFile("its kind is unknown")
        options = read_options(entry(record, "options"))
        names = [text(name) for name in listed(entry(entry(record, "options"), "passes"))]
        restored = _Restored(model, tensors, record, bool(names))
        example = _example(entry(record, "example"), model)
        inferred = flag(entry(record, "inferred_carry"))
        options = replace(options, passes=_checked_passes(names, passes))
        programs, reason = _saved_programs(model, entry(record, "plan"), tensors)
    except _WRONG_CONTENTS as error:
        raise malformed(path, error) from error
    if programs is None:
        warn("SNNFX822", f"the plan in {path.name} is not used, and the model is converted again: {reason}.")
        with _unchanged_on_error(model):
            restored.restore()
            net = convert_again(kind, model, options, example, inferred)
            if names:  # a pass may have added or replaced parameters
                restored.check()
                restored.restore()
            restored.check_slots(path, net.program)
    else:
        restored.check_slots(path, programs[True])
        restored.restore()
        milliseconds = (time.perf_counter() - start) * 1e3
        note = f"{len(programs[True].graph.nodes)} nodes in {len(programs[True].regions)} regions"
        history = [PassRecord(f"load{{{path.name}}}", milliseconds, note, str(programs[True]))]
        net = Net(model, programs, options, history, REPLANS[kind])
    if restored.state is not None:
        net.carried_state = restored.state
    return net


@contextmanager
def _unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Restore the parameters, buffers, attributes and modes of a model if the context raises."""
    snapshot = StateSnapshot.of(model, rng=False)
    values = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        snapshot.restore()
        with torch.no_grad():
            for parameter, value in values:
                parameter.copy_(value)
        raise


_WRONG_CONTENTS = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, OverflowError)
"""The errors of code that reads a record of another form."""


class _Restored:
    """The saved parameters, buffers, modes and carried state for a model; checked before anything changes.

    Raises:
        SaveError: SNNFX821, they do not match the model.
        MalformedFile: the file has another form.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor], record: Any, with_passes: bool) -> None:
        self.model = model
        tied = entry(record, "tied")
        own = {name: value for name, value in tensors.items() if not name.startswith(PREFIX)}
        prefix = f"{PREFIX}buffer."
        self._buffers = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
        for name, first in {**tied}.items():
            if first not in tensors:
                raise MalformedFile("a tensor of the model is missing")
            if name.startswith(prefix):
                self._buffers[name.removeprefix(prefix)] = tensors[first]
            else:
                own[text(name)] = tensors[first]
        self._own = own
        self._training = {text(name): flag(value) for name, value in {**entry(record, "training")}.items()}
        if not with_passes:  # they may add parameters in the conversion
            self.check()
        device = next((p.device for p in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        decoder = Decoder(tensors={n.removeprefix(f"{PREFIX}state."): v for n, v in tensors.items()})
        state = decoder.decode(entry(record, "state"))
        if state is not None and (not isinstance(state, dict) or not all(isinstance(n, str) for n in state)):
            raise MalformedFile("its state has another form")
        self.state = pytree.tree_map_only(Tensor, lambda x: x.to(device), state)

    def check(self) -> None:
        """Compare the names, shapes and dtypes with those of the model."""
        known: dict[str, Any] = dict(self.model.state_dict())
        buffers = {n: b for n, b in self.model.named_buffers(remove_duplicate=False) if n not in known}
        for saved, present in ((self._own, known), (self._buffers, buffers)):
            for name in sorted(saved.keys() ^ present.keys()):
                where = "the model has no" if name in saved else "the file has no"
                raise _other_model(None, f"{where} `{name}`")
            for name, value in saved.items():
                now = present[name]
                if _form(now) != _form(value):
                    found = f"{list(now.shape)} {now.dtype}" if isinstance(now, Tensor) else type(now).__name__
                    wanted = f"{list(value.shape)} {value.dtype}"
                    text_of = f"`{name}` is {found}, in the file {wanted}".replace("torch.", "")
                    raise _other_model(None, text_of)

    def check_slots(self, path: Path, program: StepProgram) -> None:
        """Compare the names of the carried state with the slots of the program."""
        unknown = (self.state or {}).keys() - {slot.name for slot in program.slots}
        if unknown:
            raise _other_model(path, f"it has no state `{min(unknown)}`")

    def restore(self) -> None:
        """Copy the values into the model, except where a pass has yet to replace a tensor by one of another form."""
        present = self.model.state_dict(keep_vars=True)
        same = {n: v for n, v in self._own.items() if n in present and _form(present[n]) == _form(v)}
        self.model.load_state_dict(same, strict=False)
        buffers = dict(self.model.named_buffers(remove_duplicate=False))
        with torch.no_grad():
            for name, value in self._buffers.items():
                if name in buffers and _form(buffers[name]) == _form(value):
                    buffers[name].copy_(value)
        for name, module in self.model.named_modules():
            module.training = self._training.get(name, module.training)


def _form(value: Any) -> Any:
    return (value.shape, value.dtype) if isinstance(value, Tensor) else None


def _other_model(path: Path | None, why: str) -> SaveError:
    what = "the file does not match the model" if path is None else f"{path.name} does not match the model"
    return SaveError("SNNFX821", what, why=f"{why}.", hint="Construct the model as it was when the net was saved.")


def _checked_passes(names: list[str], passes: Sequence[Pass]) -> tuple[Pass, ...]:
    given = tuple(check_passes(passes, in_convert=True))
    if [*map(str, given)] != names:
        shown = ", ".join(names) or "none"
        raise SaveError(
            "SNNFX823",
            "passes= does not match the saved conversion",
            why=f"it had the passes: {shown}.",
            hint="Pass the same passes, in this order." if names else "Load without passes=.",
        )
    return given


def _saved_programs(
    model: nn.Module, plan: Any, tensors: Mapping[str, Tensor]
) -> tuple[dict[bool, StepProgram] | None, str]:
    """`(programs, "")`, or `(None, the reason why the plan is not used)`."""
    if "refusal" in plan:
        return None, f"the file has no plan, because {text(plan['refusal'])}"
    sources = [tuple(_sources(s) for s in listed(group)) for group in listed(entry(plan, "captures"))]
    if not 1 <= len(sources) <= 2 or not all(sources):
        raise MalformedFile("its captures have another form")
    try:
        description = describe_model(model, sources)
    except NotStorable as error:
        return None, str(error)
    reason = difference(entry(plan, "description"), description.digests)
    if reason:
        return None, reason
    constants = {name.removeprefix(PREFIX): value for name, value in tensors.items()}
    device = next((p.device for p in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    constants = {name: value.to(device) for name, value in constants.items() if name.startswith("constant.")}
    reader = ProgramReader(model, description.functions, description.locations, constants, description.guards)
    return reader.programs(entry(plan, "programs")), ""


def _sources(record: Any) -> GuardSources:
    entry_name, traced, opaque, reads, state, flags, variables, refusal = listed(record, 8)
    read, slots, set_first = (
        tuple((text(a), text(b)) for a, b in map(_pair, listed(part))) for part in (reads, state, variables)
    )
    return GuardSources(
        text(entry_name),
        tuple(map(text, listed(traced))),
        tuple(map(text, listed(opaque))),
        read,
        slots,
        tuple((text(a), flag(b)) for a, b in map(_pair, listed(flags))),
        set_first,
        text(refusal),
    )


def _pair(value: Any) -> list[Any]:
    return listed(value, 2)


def _example(record: Any, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of one step (or call) with the saved shapes; None if the conversion had no example inputs."""
    if record is None:
        return None
    args, kwargs = Decoder().decode(record)
    leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise MalformedFile("its example inputs have another form")
    if sum(x.numel() * x.element_size() for x in leaves) > _MOST_BYTES_OF_EXAMPLE:
        raise MalformedFile("its example inputs are implausibly large")
    device = next((p.device for p in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    return pytree.tree_map_only(Tensor, lambda x: torch.zeros_like(x, device=device), (args, kwargs))  # type: ignore[no-any-return]

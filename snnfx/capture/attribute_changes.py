"""What one step changes in the attributes of a model's modules: state, or something that no graph can hand on."""

from __future__ import annotations

from collections.abc import Container, Iterator, Set
from typing import Any

from torch import Tensor, nn

from snnfx.capture.attribute_slots import (
    AttributeSlot,
    changed_elements,
    is_number,
    is_state_change,
    recorded,
    versions,
)
from snnfx.capture.proxy import StepProxy
from snnfx.capture.read_tracking_list import ReadTrackingList
from snnfx.errors import CaptureError
from snnfx.sandbox.contents_snapshot import MISSING, Change, ClassContentsSnapshot, ContentsSnapshot, attributes_of
from snnfx.sandbox.torch_internals import FakeTensor, pytree
from snnfx.sandbox.user_code import location_of_forward

__all__ = ["AttributeChanges", "refuse_change"]

_ELSEWHERE = ("object", "set", "array", "random")
"""What holds values where no slot can be."""


class AttributeChanges:
    """The attributes of all modules of a model before a step; compares them with what they are after it.

    Attributes:
        set_before_read: those that changed, and that the step set before it read them: neither state nor settings.
    """

    def __init__(self, model: nn.Module, entry: str) -> None:
        self.model, self.entry = model, entry
        self.set_before_read: set[tuple[nn.Module, str]] = set()
        self._classes = ClassContentsSnapshot(model)
        self._before = {m: (ContentsSnapshot(_attributes(m)), dict(m._buffers), versions(m)) for m in model.modules()}

    def attributes(
        self, traced: Set[nn.Module], slots: Container[tuple[nn.Module, str]], reads: dict[tuple[nn.Module, str], Any]
    ) -> Iterator[AttributeSlot]:
        """The attributes that are state.

        Args:
            traced: the modules whose forward was recorded.
            slots: attributes that are slots already.
            reads: what the model's code found when it first read an attribute.

        Raises:
            CaptureError: the step changes something that cannot become a slot.
        """
        for change in self._classes.changes():
            refuse_change("", self.model, change, self.entry)
        for name, module in self.model.named_modules():
            contents, buffers, _ = self._before[module]
            prefix = f"{name}." if name else ""
            for key, value in module._buffers.items():
                if value is not buffers.get(key) and (module, key) not in slots and not isinstance(value, FakeTensor):
                    self._refuse_buffer(prefix + key, module)
            now = _attributes(module)
            for key in (*contents.values, *(key for key in now if key not in contents.values)):
                if (module, key) in slots:
                    continue
                changes = list(contents.changes(key, now.get(key, MISSING)))
                if not changes:
                    continue
                if module in traced:
                    yield from self._state(prefix, module, key, changes, now.get(key, MISSING), reads)
                for change in changes if module not in traced else ():
                    if type(change.new) is StepProxy or is_number(change.new) or isinstance(change.new, str):
                        refuse_change(prefix, module, change, self.entry)

    def _state(
        self,
        prefix: str,
        module: nn.Module,
        key: str,
        changes: list[Change],
        value: Any,
        reads: dict[tuple[nn.Module, str], Any],
    ) -> Iterator[AttributeSlot]:
        contents = self._before[module][0]
        old = contents.values.get(key, getattr(type(module), key, None))
        if is_state_change(old, value):
            yield AttributeSlot(
                prefix + key, module, key, old, recorded(value), value, start=contents.values.get(key, MISSING)
            )
            return
        elements: list[AttributeSlot] = []
        if isinstance(value, tuple | list | dict) or type(value).__name__ == "deque":
            elements = list(changed_elements(prefix + key, module, key, contents.copy_of_original(old), value))
            for attribute in elements:
                attribute.start = contents.copy_of_original(contents.values.get(key, MISSING))
        for change in changes:
            if change.kind == "" and not elements and not _was_read(reads, module, key, change.old):
                self.set_before_read.add((module, key))
                continue
            if change.kind in _ELSEWHERE or not (elements and _is_of_slots(change)):
                refuse_change(prefix, module, change, self.entry)
        yield from elements

    def refuse_tensors_in_place(self, traced: Set[nn.Module]) -> None:
        """Refuse a step that changed a tensor of the model while it was recorded."""
        for name, module in self.model.named_modules():
            for key, (tensor, version) in self._before[module][2].items():
                if module in traced and tensor._version != version:
                    raise CaptureError(
                        "SNNFX206",
                        f"the tensor `{name + '.' if name else ''}{key}` is changed in place",
                        where=type(module).__name__,
                        why="a step may only change state by assigning it, so that it can be handed from step to step.",
                        hint="Write `self.x = self.x + ...`, or register it as a memory of a snnfx.MemoryModule.",
                    )

    def _refuse_buffer(self, name: str, module: nn.Module) -> None:
        raise CaptureError(
            "SNNFX206",
            f"a step changes the buffer `{name}`",
            where=location_of_forward(module, self.entry),
            why="a buffer lives on from one sequence to the next, while a net starts each call from the reset state.",
            hint=f'A state is registered by self.register_memory("{name.rpartition(".")[2]}", initial) of a '
            "snnfx.MemoryModule; a statistic is computed outside of it, of what net.run(x_seq, record=...) gives.",
        )


def _attributes(module: nn.Module) -> dict[str, Any]:
    found = attributes_of(module)
    return {key: v.plain() if isinstance(v, ReadTrackingList) else v for key, v in found.items()}


def _was_read(reads: dict[tuple[nn.Module, str], Any], module: nn.Module, key: str, old: Any) -> bool:
    if old is MISSING:  # then a class may have a value for all its instances
        old = getattr(type(module), key, MISSING)
    return (module, key) in reads and reads[module, key] is old


def _is_of_slots(change: Change) -> bool:
    """Whether a difference inside a container is made of what can be in slots."""
    if change.new is MISSING:
        return True  # it got shorter; what is left of it is looked at when the structure is compared
    old = None if change.old is MISSING else change.old
    leaves = pytree.tree_leaves(change.new)
    if len(leaves) == 1 and leaves[0] is change.new:
        return is_state_change(old, change.new)
    return any(is_state_change(None, leaf) for leaf in leaves)


def refuse_change(prefix: str, module: nn.Module, change: Change, entry: str = "forward") -> None:
    """Raise the error of a change that a net could not make."""
    name = prefix + ".".join(str(key) for key in change.path)
    where = location_of_forward(module, entry) if not prefix else location_of_forward(module)
    if change.kind == "random":
        raise CaptureError(
            "SNNFX215",
            f"a step draws random numbers from `{name}`",
            where=where,
            why="they would be the same in every call of the net.",
            hint="Draw them with torch.rand, torch.randn, torch.rand_like or torch.bernoulli of a recorded value.",
        )
    attribute = str(change.path[-1] if change.kind in ("", "object", "dict") else change.path[0]).rpartition(".")[2]
    raise CaptureError(
        "SNNFX218",
        f"a step changes `{name}`",
        where=where,
        why=f"it is {_in_words(change.old)} before and {_in_words(change.new)} after, and a net hands on only tensors "
        "and numbers that are in attributes of modules, or in lists, tuples, dicts and deques there.",
        hint=f"Derive {type(module).__name__} from snnfx.MemoryModule, with self.register_memory("
        f'"{attribute}", initial) for a tensor, a number or None, and read and write self.{attribute} in the step.',
    )


def _in_words(value: Any) -> str:
    if value is MISSING:
        return "not there"
    if isinstance(value, StepProxy | Tensor):
        return "a tensor"
    text = repr(value)
    is_short = len(text) <= 40 and " at 0x" not in text and "Proxy(" not in text
    return text if is_short else f"a {type(value).__name__}"

"""Find the module attributes that one step changes: discovered state, or changes to refuse."""

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
)
from snnfx.capture.input_output_checks import refusal_of_nested_tensor
from snnfx.capture.proxy import StepProxy
from snnfx.capture.read_tracking_list import ReadTrackingList
from snnfx.errors import CaptureError
from snnfx.sandbox.contents_snapshot import MISSING, Change, ClassContentsSnapshot, ContentsSnapshot, attributes_of
from snnfx.sandbox.plain_numbers import is_numpy_scalar
from snnfx.sandbox.torch_internals import pytree
from snnfx.sandbox.user_code import location_of_forward

__all__ = ["AttributeChanges", "refuse_change"]

_KINDS_WITHOUT_SLOTS = ("object", "set", "array", "random", "function")
"""Kinds of containers whose elements cannot be slots."""


class AttributeChanges:
    """Compares the attributes of all modules before and after a step; construct it before the step.

    Attributes:
        set_before_read: attributes that the step sets before it reads them, so they are neither state nor settings.
    """

    def __init__(self, model: nn.Module, entry: str) -> None:
        self.model, self.entry = model, entry
        self.set_before_read: set[tuple[nn.Module, str]] = set()
        self._classes = ClassContentsSnapshot(model)
        self._before = {m: ContentsSnapshot(_attributes(m), functions=True) for m in model.modules()}

    def attributes(
        self, traced: Set[nn.Module], slots: Container[tuple[nn.Module, str]], reads: dict[tuple[nn.Module, str], Any]
    ) -> Iterator[AttributeSlot]:
        """Yield the attributes that are state.

        Args:
            traced: the modules whose forward is traced.
            slots: attributes that already are slots, or that store registered states.
            reads: the value of each attribute when the model's code first read it.

        Raises:
            CaptureError: the step changes a value that cannot become a slot.
        """
        for change in self._classes.changes():
            refuse_change("", self.model, change, self.entry)
        for name, module in self.model.named_modules():
            contents = self._before[module]
            prefix = f"{name}." if name else ""
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
        contents = self._before[module]
        old = contents.values.get(key, getattr(type(module), key, None))
        if isinstance(value, Tensor) and not isinstance(value, StepProxy) and value.is_nested:
            raise refusal_of_nested_tensor(prefix + key, location_of_forward(module))
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
            if change.kind in _KINDS_WITHOUT_SLOTS or not (elements and _is_slot_change(change)):
                refuse_change(prefix, module, change, self.entry)
        yield from elements


def _attributes(module: nn.Module) -> dict[str, Any]:
    attributes = attributes_of(module)
    return {key: v.plain() if isinstance(v, ReadTrackingList) else v for key, v in attributes.items()}


def _was_read(reads: dict[tuple[nn.Module, str], Any], module: nn.Module, key: str, old: Any) -> bool:
    if old is MISSING:  # the class may define the value for all instances
        old = getattr(type(module), key, MISSING)
    return (module, key) in reads and reads[module, key] is old


def _is_slot_change(change: Change) -> bool:
    """Whether slots can represent a difference inside a container."""
    if change.new is MISSING:
        return True  # the container became shorter; the comparison of structures handles that
    old = None if change.old is MISSING else change.old
    leaves = pytree.tree_leaves(change.new)
    if len(leaves) == 1 and leaves[0] is change.new:
        return is_state_change(old, change.new)
    return any(is_state_change(None, leaf) for leaf in leaves)


def refuse_change(prefix: str, module: nn.Module, change: Change, entry: str = "forward") -> None:
    """Raise the error for a change that a net cannot represent."""
    name = prefix + ".".join(str(key) for key in change.path)
    where = location_of_forward(module, entry) if not prefix else location_of_forward(module)
    if change.kind == "random":
        raise CaptureError(
            "SNNFX215",
            f"a step draws random numbers from `{name}`",
            where=where,
            why="the graph does not record them, so every call of the net would use the same numbers.",
            hint="Draw them with torch.rand, torch.randn, torch.rand_like or torch.bernoulli of a recorded value.",
        )
    if is_numpy_scalar(change.new):
        raise CaptureError(
            "SNNFX218",
            f"a step changes `{name}`",
            where=where,
            why=f"it is a {type(change.new).__name__} of NumPy, which rounds otherwise than a Python float.",
            hint="Store a Python number: self.a = float(value).",
        )
    attribute = str(change.path[-1] if change.kind in ("", "object", "dict") else change.path[0]).rpartition(".")[2]
    is_memory = change.new is MISSING or change.new is None or isinstance(change.new, StepProxy | Tensor)
    if not attribute.isidentifier() or (len(change.path) > 2 and not is_memory and not is_number(change.new)):
        whole = type(vars(module).get(str(change.path[0]))).__name__
        raise CaptureError(
            "SNNFX218",
            f"a step changes `{prefix}{change.path[0]}`, a {whole}",
            where=where,
            why=f"the change is in `{name}`, and a net carries only tensors and numbers across steps.",
            hint="Change it outside the step: return the values that it needs and update it after the call of the net.",
        )
    in_place_of = " in place of the class attribute" if hasattr(type(module), attribute) else ""
    raise CaptureError(
        "SNNFX218",
        f"a step changes `{name}`",
        where=where,
        why=f"it is {_describe(change.old)} before and {_describe(change.new)} after, but a net carries only tensors "
        "and numbers across steps, in module attributes or in lists, tuples, dicts and deques there.",
        hint=f"Derive {type(module).__name__} from snnfx.MemoryModule, with self.register_memory("
        f'"{attribute}", initial){in_place_of} for a tensor, a number or None, and read and write self.{attribute} in '
        "the step.",
    )


def _describe(value: Any) -> str:
    if value is MISSING:
        return "missing"
    if isinstance(value, StepProxy | Tensor):
        return "a tensor"
    text = repr(value)
    is_short = len(text) <= 40 and " at 0x" not in text and "Proxy(" not in text
    return text if is_short else f"a {type(value).__name__}"

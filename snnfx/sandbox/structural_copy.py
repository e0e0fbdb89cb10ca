"""Structural copies: modules, containers and plain objects are copied; tensors and everything else are shared.

`copy.deepcopy` fails on locks, iterators, files and state with an autograd graph, and copies tensors. A structural copy
takes none of them apart: code that runs on it computes with the tensors of the original, and assigns to copies only.
"""

from __future__ import annotations

import copy
import enum
import functools
import random
import sys
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Generator, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["StructuralCopy"]

_SHARED_TYPES = (
    bool, int, float, complex, str, bytes, type(None), enum.Enum, Tensor, type, types.BuiltinFunctionType,
    types.ModuleType, torch.dtype, torch.device, torch.Generator,
)  # fmt: skip


class StructuralCopy:
    """A structural copy of objects; objects that refer to each other keep doing so.

    Args:
        class_of_copy: the class of the copy of a module, given the class of the module; default: the same class.
        tensor: the tensor in the copy, given a tensor of the original; default: the same tensor.
        objects: whether to copy plain objects, arrays and random generators; otherwise they are shared.
    """

    def __init__(
        self,
        class_of_copy: Callable[[type], type] = lambda cls: cls,
        tensor: Callable[[Tensor], Tensor] | None = None,
        objects: bool = True,
    ) -> None:
        self.class_of_copy, self.tensor, self.objects = class_of_copy, tensor, objects
        self._copiers = dict(_COPIERS)
        self._slots: dict[type, list[Any]] = {}
        self._copies: dict[int, Any] = {}
        self._originals: dict[int, Any] = {}
        self._references: list[Any] = []
        """Keeps the objects alive whose identities are keys."""
        self._functions: list[types.FunctionType] = []

    def of(self, value: Any) -> Any:
        """The copy of a value: the same copy for the same value; a value that cannot be copied is returned itself."""
        result = self._of(value)
        while self._functions:
            self._link_cells(self._functions.pop())
        return result

    def original_of(self, value: Any) -> Any:
        """The original of a copied object; any other value itself."""
        return self._originals.get(id(value), value)

    def copy_of(self, value: Any) -> Any:
        """The copy of an object that was copied; any other value itself."""
        return self._copies.get(id(value), value)

    def pairs(self) -> Iterable[tuple[nn.Module, nn.Module]]:
        """Each copied module: `(original, copy)`."""
        for copied, original in zip(self._references[1::2], self._references[::2], strict=True):
            if isinstance(original, nn.Module):
                yield original, copied

    def _of(self, value: Any) -> Any:
        """Copy a value with a stack of its own: a chain of objects may be longer than Python's recursion limit."""
        result = self._at_once(value)
        if result is not _PENDING:
            return result
        unfinished = [self._copiers[type(value)](self, value)]
        result = None
        while unfinished:
            try:
                element = unfinished[-1].send(result)
            except StopIteration as finished:
                result = finished.value
                unfinished.pop()
            else:
                unfinished.append(self._copiers[type(element)](self, element))
                result = None
        return result

    def _at_once(self, value: Any) -> Any:
        """The copy of a value that refers to no other values or was copied before; `_PENDING` for any other value."""
        kind = type(value)
        copier = self._copiers.get(kind)
        if copier is None:
            copier = _copier_of(kind)
            if copier in (_object, _deep) and not self.objects:
                copier = _share
            self._copiers[kind] = copier
        if copier is _share:
            return value
        if copier is _tensor:
            return value if self.tensor is None else _tensor(self, value)
        known = self._copies.get(id(value))
        if known is not None:
            return known
        if kind in (dict, OrderedDict) and not value:  # most attributes of a module
            return self._remember(value, kind())
        return _deep(self, value) if copier is _deep else _PENDING

    def _remember(self, value: Any, copied: Any) -> Any:
        self._copies[id(value)], self._originals[id(copied)] = copied, value
        self._references += (value, copied)
        return copied

    def _link_cells(self, function: types.FunctionType) -> None:
        """Let a copied function refer to copies; its cells may lead back to objects that were not copied before."""
        originals = self.original_of(function).__closure__ or ()
        for cell, original in zip(function.__closure__ or (), originals, strict=True):
            if _is_filled(original):
                value = original.cell_contents
                cell.cell_contents = self._of(value) if self._is_copied_for_function(value) else value

    def _is_copied_for_function(self, value: Any) -> bool:
        """Whether a value that a function refers to is copied: objects that only the function reaches are shared."""
        return self._copies.get(id(value)) is not None or _leads_to_module(value, 0)


def _leads_to_module(value: Any, depth: int) -> bool:
    """Whether a value is a module or refers to one directly: a bound method, a function or a container."""
    if isinstance(value, nn.Module):
        return True
    if depth == 3:
        return False
    if isinstance(value, types.MethodType):
        return _leads_to_module(value.__self__, depth + 1)
    if isinstance(value, types.FunctionType):
        cells = [c.cell_contents for c in value.__closure__ or () if _is_filled(c)]
        return any(_leads_to_module(cell, depth + 1) for cell in (*cells, *(value.__defaults__ or ())))
    if isinstance(value, functools.partial):
        parts = (value.func, *value.args, *value.keywords.values())
        return any(_leads_to_module(part, depth + 1) for part in parts)
    if isinstance(value, dict):
        return any(_leads_to_module(element, depth + 1) for element in value.values())
    return isinstance(value, list | tuple) and any(_leads_to_module(element, depth + 1) for element in value)


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - an empty cell raises
    except ValueError:
        return False
    return True


_Copier = Callable[[StructuralCopy, Any], Any]
_Steps = Generator[Any, Any, Any]
"""A copier of a value that refers to others: it yields each of them, receives the copy and returns its own."""

_PENDING = object()


def _share(copies: StructuralCopy, value: Any) -> Any:
    return value


def _tensor(copies: StructuralCopy, value: Tensor) -> Tensor:
    known = copies._copies.get(id(value))
    if known is None:
        assert copies.tensor is not None
        known = copies.tensor(value)
        if known is not value:
            copies._remember(value, known)
    return known


def _module(copies: StructuralCopy, value: nn.Module) -> _Steps:
    copied = copies._remember(value, object.__new__(copies.class_of_copy(type(value))))
    attributes = copied.__dict__
    for name, element in value.__dict__.items():
        element_copy = copies._at_once(element)
        attributes[name] = (yield element) if element_copy is _PENDING else element_copy
    yield from _copy_slots(copies, value, copied)
    return copied


def _object(copies: StructuralCopy, value: Any) -> _Steps:
    base: Any = types.SimpleNamespace if isinstance(value, types.SimpleNamespace) else object
    copied = copies._remember(value, base.__new__(type(value)))
    yield from _copy_attributes(copies, getattr(value, "__dict__", {}), copied)
    yield from _copy_slots(copies, value, copied)
    return copied


def _copy_attributes(copies: StructuralCopy, attributes: dict[str, Any], copied: Any) -> _Steps:
    for name, element in attributes.items():
        element_copy = copies._at_once(element)
        copied.__dict__[name] = (yield element) if element_copy is _PENDING else element_copy


_HEAP_TYPE = 1 << 9
"""`Py_TPFLAGS_HEAPTYPE`: Python code defines the class."""


def _copy_slots(copies: StructuralCopy, value: Any, copied: Any) -> _Steps:
    cls = type(value)
    if cls not in copies._slots:
        members = [m for base in cls.__mro__ if base.__flags__ & _HEAP_TYPE for m in vars(base).values()]
        copies._slots[cls] = [member for member in members if type(member) is types.MemberDescriptorType]
    for slot in copies._slots[cls]:
        try:
            element = slot.__get__(value)
        except AttributeError:  # an empty slot
            continue
        element_copy = copies._at_once(element)
        slot.__set__(copied, (yield element) if element_copy is _PENDING else element_copy)


def _copy_elements(copies: StructuralCopy, elements: Iterable[Any]) -> Generator[Any, Any, list[Any]]:
    result = []
    for element in elements:
        element_copy = copies._at_once(element)
        result.append((yield element) if element_copy is _PENDING else element_copy)
    return result


def _attributes_of_container(copies: StructuralCopy, value: Any, copied: Any) -> _Steps:
    """Copy the attributes of an instance of a subclass of list, dict, ..."""
    yield from _copy_attributes(copies, getattr(value, "__dict__", {}), copied)
    return copied


def _list(copies: StructuralCopy, value: list[Any]) -> _Steps:
    copied = copies._remember(value, list.__new__(type(value)))
    list.extend(copied, (yield from _copy_elements(copies, list.__iter__(value))))
    return (yield from _attributes_of_container(copies, value, copied))


def _tuple(copies: StructuralCopy, value: tuple[Any, ...]) -> _Steps:
    elements = yield from _copy_elements(copies, value)
    if all(a is b for a, b in zip(elements, value, strict=True)):
        return value
    return copies._remember(value, tuple.__new__(type(value), elements))


def _dict(copies: StructuralCopy, value: dict[Any, Any]) -> _Steps:
    base: Any = OrderedDict if isinstance(value, OrderedDict) else dict
    copied = copies._remember(value, base.__new__(type(value)))
    if isinstance(value, defaultdict):
        (copied.default_factory,) = yield from _copy_elements(copies, (value.default_factory,))
    for key, element in base.items(value):
        key_copy = copies._at_once(key)
        key_copy = (yield key) if key_copy is _PENDING else key_copy
        element_copy = copies._at_once(element)
        base.__setitem__(copied, key_copy, (yield element) if element_copy is _PENDING else element_copy)
    return (yield from _attributes_of_container(copies, value, copied))


def _set(copies: StructuralCopy, value: set[Any]) -> _Steps:
    copied = copies._remember(value, set.__new__(type(value)))
    set.update(copied, (yield from _copy_elements(copies, set.__iter__(value))))
    return (yield from _attributes_of_container(copies, value, copied))


def _deque(copies: StructuralCopy, value: deque[Any]) -> _Steps:
    copied = copies._remember(value, deque.__new__(type(value)))
    deque.__init__(copied, (yield from _copy_elements(copies, value)), value.maxlen)
    return (yield from _attributes_of_container(copies, value, copied))


def _method(copies: StructuralCopy, value: types.MethodType) -> _Steps:
    owner, function = yield from _copy_elements(copies, (value.__self__, value.__func__))
    if owner is value.__self__ and function is value.__func__:
        return value
    return copies._remember(value, types.MethodType(function, owner))


def _function(copies: StructuralCopy, value: types.FunctionType) -> _Steps:
    if not _leads_to_module(value, 0):
        return value
    cells = tuple(types.CellType() for _ in value.__closure__ or ())
    copied = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, cells)
    copies._remember(value, copied)
    defaults: list[Any] = []
    for default in value.__defaults__ or ():
        is_copied = copies._is_copied_for_function(default)
        defaults += (yield from _copy_elements(copies, (default,))) if is_copied else (default,)
    copied.__defaults__ = tuple(defaults) if value.__defaults__ else None
    copied.__kwdefaults__ = value.__kwdefaults__
    copied.__dict__.update(value.__dict__)
    copied.__qualname__, copied.__module__, copied.__doc__ = value.__qualname__, value.__module__, value.__doc__
    copies._functions.append(copied)
    return copied


def _partial(copies: StructuralCopy, value: functools.partial[Any]) -> _Steps:
    parts = (value.func, *value.args, *value.keywords.values())
    copied = yield from _copy_elements(copies, parts)
    if all(a is b for a, b in zip(copied, parts, strict=True)):
        return value
    function, *arguments = copied
    args, keywords = arguments[: len(value.args)], arguments[len(value.args) :]
    result = functools.partial(function, *args, **dict(zip(value.keywords, keywords, strict=True)))
    return copies._remember(value, result)


def _deep(copies: StructuralCopy, value: Any) -> Any:
    """Arrays and random generators: their state is copied too."""
    return copies._remember(value, copy.deepcopy(value))


_COPIERS: dict[type, _Copier] = {
    list: _list, dict: _dict, OrderedDict: _dict, defaultdict: _dict, set: _set, deque: _deque, tuple: _tuple,
    types.MethodType: _method, types.FunctionType: _function, functools.partial: _partial,
}  # fmt: skip
"""How an instance of each class is copied; all other classes: `_copier_of`."""


def _copier_of(cls: type) -> _Copier:
    if issubclass(cls, Tensor):
        return _tensor
    if issubclass(cls, nn.Module):
        return _module
    if issubclass(cls, _SHARED_TYPES) or hasattr(cls, "__del__"):
        return _share  # a finalizer must not run a second time, for a copy: it may close a file or a connection
    for base, copier in ((OrderedDict, _dict), (dict, _dict), (list, _list), (set, _set), (deque, _deque)):
        if issubclass(cls, base):
            # A class with its own constructor in C may have contents that are not visible here.
            return copier if _is_made_by(base, cls) else _share
    if issubclass(cls, tuple):
        return _tuple if _is_made_by(tuple, cls) else _share
    numpy = sys.modules.get("numpy")
    generators = () if numpy is None else (numpy.ndarray, numpy.random.Generator, numpy.random.RandomState)
    if issubclass(cls, (random.Random, *generators)):
        return _deep
    argparse = sys.modules.get("argparse")
    if issubclass(cls, types.SimpleNamespace) or (argparse is not None and issubclass(cls, argparse.Namespace)):
        return _object
    package = cls.__module__.partition(".")[0]
    # Loggers, locks and files are not part of a model, and they reference unrelated objects.
    if package == "torch" or (package in sys.stdlib_module_names and package != "__main__"):
        return _share
    return _object if _is_made_by(object, cls) else _share


def _is_made_by(base: Any, cls: type) -> bool:
    """Whether `base.__new__` makes instances of `cls`, so that Python code defines all their attributes."""
    try:
        base.__new__(cls)
    except TypeError:
        return False
    return True

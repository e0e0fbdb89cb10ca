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
from collections.abc import Callable, Iterable
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

    def pairs(self) -> Iterable[tuple[nn.Module, nn.Module]]:
        """Each copied module: `(original, copy)`."""
        for copied, original in zip(self._references[1::2], self._references[::2], strict=True):
            if isinstance(original, nn.Module):
                yield original, copied

    def _of(self, value: Any) -> Any:
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
        return known if known is not None else copier(self, value)

    def _remember(self, value: Any, copied: Any) -> Any:
        self._copies[id(value)], self._originals[id(copied)] = copied, value
        self._references += (value, copied)
        return copied

    def _link_cells(self, function: types.FunctionType) -> None:
        """Let a copied function refer to copies; its cells may lead back to objects that were not copied before."""
        for cell, original in zip(function.__closure__ or (), self.original_of(function).__closure__, strict=True):
            if _is_filled(original):
                cell.cell_contents = self._of_cell(original.cell_contents)

    def _of_cell(self, value: Any) -> Any:
        """The copy of a value that a function refers to: objects that only the function reaches are shared."""
        known = self._copies.get(id(value))
        if known is not None:
            return known
        return self._of(value) if _leads_to_module(value, 0) else value


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


def _module(copies: StructuralCopy, value: nn.Module) -> nn.Module:
    copied = copies._remember(value, object.__new__(copies.class_of_copy(type(value))))
    attributes = copied.__dict__
    for name, element in value.__dict__.items():
        attributes[name] = copies._of(element)
    _copy_slots(copies, value, copied)
    return copied  # type: ignore[no-any-return]


def _object(copies: StructuralCopy, value: Any) -> Any:
    base: Any = types.SimpleNamespace if isinstance(value, types.SimpleNamespace) else object
    copied = copies._remember(value, base.__new__(type(value)))
    attributes = getattr(value, "__dict__", None)
    if attributes is not None:
        of_copy = copied.__dict__
        for name, element in attributes.items():
            of_copy[name] = copies._of(element)
    _copy_slots(copies, value, copied)
    return copied


_HEAP_TYPE = 1 << 9
"""`Py_TPFLAGS_HEAPTYPE`: Python code defines the class."""


def _copy_slots(copies: StructuralCopy, value: Any, copied: Any) -> None:
    cls = type(value)
    if cls not in copies._slots:
        members = [m for base in cls.__mro__ if base.__flags__ & _HEAP_TYPE for m in vars(base).values()]
        copies._slots[cls] = [member for member in members if type(member) is types.MemberDescriptorType]
    for slot in copies._slots[cls]:
        try:
            element = slot.__get__(value)
        except AttributeError:  # an empty slot
            continue
        slot.__set__(copied, copies._of(element))


def _attributes_of_container(copies: StructuralCopy, value: Any, copied: Any) -> Any:
    """Copy the attributes of an instance of a subclass of list, dict, ..."""
    for name, element in getattr(value, "__dict__", {}).items():
        copied.__dict__[name] = copies._of(element)
    return copied


def _list(copies: StructuralCopy, value: list[Any]) -> Any:
    copied = copies._remember(value, list.__new__(type(value)))
    list.extend(copied, [copies._of(element) for element in list.__iter__(value)])
    return _attributes_of_container(copies, value, copied)


def _tuple(copies: StructuralCopy, value: tuple[Any, ...]) -> Any:
    elements = [copies._of(element) for element in value]
    if all(a is b for a, b in zip(elements, value, strict=True)):
        return value
    return copies._remember(value, tuple.__new__(type(value), elements))


def _dict(copies: StructuralCopy, value: dict[Any, Any]) -> Any:
    base: Any = OrderedDict if isinstance(value, OrderedDict) else dict
    if not value and type(value) is base:
        return copies._remember(value, base())
    copied = copies._remember(value, base.__new__(type(value)))
    if isinstance(value, defaultdict):
        copied.default_factory = copies._of(value.default_factory)
    for key, element in base.items(value):
        base.__setitem__(copied, copies._of(key), copies._of(element))
    return _attributes_of_container(copies, value, copied)


def _set(copies: StructuralCopy, value: set[Any]) -> Any:
    copied = copies._remember(value, set.__new__(type(value)))
    set.update(copied, [copies._of(element) for element in set.__iter__(value)])
    return _attributes_of_container(copies, value, copied)


def _deque(copies: StructuralCopy, value: deque[Any]) -> Any:
    copied = copies._remember(value, deque.__new__(type(value)))
    deque.__init__(copied, [copies._of(element) for element in value], value.maxlen)
    return _attributes_of_container(copies, value, copied)


def _method(copies: StructuralCopy, value: types.MethodType) -> Any:
    owner = copies._of(value.__self__)
    function = copies._of(value.__func__)
    if owner is value.__self__ and function is value.__func__:
        return value
    return copies._remember(value, types.MethodType(function, owner))


def _function(copies: StructuralCopy, value: types.FunctionType) -> Any:
    if not _leads_to_module(value, 0):
        return value
    cells = tuple(types.CellType() for _ in value.__closure__ or ())
    copied = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, cells)
    copies._remember(value, copied)
    copied.__defaults__ = tuple(map(copies._of_cell, value.__defaults__)) if value.__defaults__ else None
    copied.__kwdefaults__ = value.__kwdefaults__
    copied.__dict__.update(value.__dict__)
    copied.__qualname__, copied.__module__, copied.__doc__ = value.__qualname__, value.__module__, value.__doc__
    copies._functions.append(copied)
    return copied


def _partial(copies: StructuralCopy, value: functools.partial[Any]) -> Any:
    function, args = copies._of(value.func), tuple(map(copies._of, value.args))
    keywords = {key: copies._of(element) for key, element in value.keywords.items()}
    parts = ((function, value.func), *zip(args, value.args, strict=True))
    if all(a is b for a, b in parts) and all(keywords[key] is value.keywords[key] for key in keywords):
        return value
    return copies._remember(value, functools.partial(function, *args, **keywords))


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

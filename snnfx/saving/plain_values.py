"""Values of step graphs as JSON, and back.

Numbers, texts, None and lists stand for themselves; any other value is a dict with one entry, `{kind: contents}`.
Decoding makes only the values listed here: it imports, calls and evaluates nothing that the file names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from snnfx.errors import Refusal
from snnfx.saving.known_functions import function_named, name_of_function
from snnfx.state.carry import SlotName

__all__ = ["Decoder", "Encoder", "MalformedFile", "NotStorable"]


class NotStorable(Exception):
    """A value that a file cannot contain, or that this model does not have; the text says why, as a clause."""


class MalformedFile(ValueError):
    """The contents of a file are not those that `snnfx.save` writes; the text says why, as a clause."""


_TYPES: dict[str, type] = {t.__name__: t for t in (bool, int, float, complex, str, list, tuple, dict, type(None))}
_TORCH: dict[type, str] = {torch.dtype: "dtype", torch.layout: "layout", torch.memory_format: "memory_format"}
_MOST_DIGITS = 2**63


@dataclass
class Encoder:
    """Encodes values, and collects the tensors among them.

    Args:
        modules: the modules of the model, with their names.
        locate: the location of an object of the model, which is stored in place of the object.
        constants: the constants of the program, with their names.
        tensors: the tensors found so far, by name in the file.
    """

    modules: Mapping[nn.Module, str] = field(default_factory=dict)
    locate: Callable[[Any], int | None] = lambda value: None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[int, str] = field(default_factory=dict)

    def encode(self, value: Any) -> Any:
        """A value as JSON.

        Raises:
            NotStorable: the value has no JSON form.
        """
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind is int:
            if abs(value) >= _MOST_DIGITS:
                raise NotStorable(f"the number {value:.3g} does not fit 64 bits")
            return value
        if kind is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if kind is complex:
            return {"complex": [self.encode(value.real), self.encode(value.imag)]}
        if value is Ellipsis:
            return {"ellipsis": None}
        if isinstance(value, Node):
            return {"node": value.name}
        if kind in _TORCH:
            return {_TORCH[kind]: str(value).removeprefix("torch.")}
        if kind is torch.device:
            return {"device": str(value)}
        if kind is Refusal:
            return {"refusal": [value.code, value.reason, value.hint]}
        if kind is SlotName:
            return {"slot": value.name}
        if kind is slice:
            return {"slice": [self.encode(v) for v in (value.start, value.stop, value.step)]}
        if kind is range:
            return {"range": [value.start, value.stop, value.step]}
        if isinstance(value, nn.Module) and id(value) in self.constants:
            return {"constant": self.constants[id(value)]}
        if isinstance(value, nn.Module) and value in self.modules:
            return {"module": self.modules[value]}
        if isinstance(value, Tensor):
            return self._encode_tensor(value)
        return self._encode_container(value, kind)

    def _encode_container(self, value: Any, kind: type) -> Any:
        if kind is torch.Size:
            return {"size": [self.encode(v) for v in value]}
        if kind is tuple:
            return {"tuple": [self.encode(v) for v in value]}
        if kind is list or kind.__name__ == "immutable_list":
            return [self.encode(v) for v in value]
        if kind is dict or kind.__name__ == "immutable_dict":
            return {"dict": [[self.encode(k), self.encode(v)] for k, v in value.items()]}
        if kind in (set, frozenset):
            return {kind.__name__: sorted((self.encode(v) for v in value), key=repr)}
        if isinstance(value, type) and _TYPES.get(value.__name__) is value:
            return {"type": value.__name__}
        name = name_of_function(value) if callable(value) else None
        if name is not None:
            return {"function": name}
        raise NotStorable(f"a file cannot contain a {kind.__module__}.{kind.__qualname__}")

    def _encode_tensor(self, value: Tensor) -> Any:
        if value.layout is not torch.strided or value.is_nested or value.is_quantized:
            raise NotStorable(f"a file cannot contain a tensor of layout {value.layout}")
        if value.is_meta:
            return {"meta": [list(value.shape), list(value.stride()), str(value.dtype).removeprefix("torch.")]}
        location = self.locate(value)
        if location is not None:
            return {"location": location}
        name = f"constant.{len(self.tensors)}"
        self.tensors[name] = value.detach()
        return {"tensor": name}


@dataclass
class Decoder:
    """Decodes the values of a file.

    Args:
        nodes: the nodes decoded so far, by name.
        modules: the modules of the model, by name.
        located: the objects of the model that the file may refer to.
        tensors: the tensors of the file, by name.
        constants: the constants of the program, by name.
    """

    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    located: list[Any] = field(default_factory=list)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)

    def decode(self, value: Any) -> Any:
        """The value of a JSON text.

        Raises:
            MalformedFile: the encoder does not write this.
        """
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, int):
            return integer(value)
        if isinstance(value, float):
            if not math.isfinite(value):
                raise MalformedFile("a number is not finite")
            return value
        if isinstance(value, list):
            return [self.decode(v) for v in value]
        if not isinstance(value, dict) or len(value) != 1:
            raise MalformedFile("a value has no kind")
        ((kind, contents),) = value.items()
        method = _DECODERS.get(kind)
        if method is None:
            raise MalformedFile(f"the kind of value {kind[:40]!r} is unknown")
        return method(self, contents)

    def elements(self, contents: Any, count: int | None = None) -> list[Any]:
        """The decoded elements of a list."""
        return [self.decode(v) for v in listed(contents, count)]

    def _dict(self, contents: Any) -> dict[Any, Any]:
        pairs = [self.elements(pair, 2) for pair in listed(contents)]
        if not all(isinstance(key, str | int | float | bool | None) for key, _ in pairs):
            raise MalformedFile("a key is not a plain value")
        return dict(pairs)

    def _hashable(self, contents: Any) -> Iterable[Any]:
        values = self.elements(contents)
        if not all(isinstance(v, str | int | float | bool | None | tuple | torch.dtype) for v in values):
            raise MalformedFile("an element of a set is not a plain value")
        return values

    def _complex(self, contents: Any) -> complex:
        real, imaginary = self.elements(contents, 2)
        if not (isinstance(real, float) and isinstance(imaginary, float)):
            raise MalformedFile("a complex number has no parts")
        return complex(real, imaginary)

    def _float(self, contents: Any) -> float:
        if contents not in ("inf", "-inf", "nan"):
            raise MalformedFile("a number is unknown")
        return float(contents)

    def _node(self, contents: Any) -> Node:
        if text(contents) not in self.nodes:
            raise MalformedFile(f"a node reads {contents[:40]!r}, which does not precede it")
        return self.nodes[contents]

    def _module(self, contents: Any) -> nn.Module:
        if text(contents) not in self.modules:
            raise MalformedFile(f"the model has no module {contents[:40]!r}")
        return self.modules[contents]

    def _constant(self, contents: Any) -> Any:
        if text(contents) not in self.constants:
            raise MalformedFile(f"the constant {contents[:40]!r} is missing")
        return self.constants[contents]

    def _meta(self, contents: Any) -> Tensor:
        shape, stride, dtype = listed(contents, 3)
        shape, stride = [size(v) for v in listed(shape)], [size(v) for v in listed(stride)]
        if len(shape) != len(stride) or math.prod(shape) >= 2**48:
            raise MalformedFile(f"no tensor has the shape {shape[:8]}")
        return torch.empty_strided(shape, stride, dtype=dtype_named(dtype), device="meta")

    def _tensor(self, contents: Any) -> Tensor:
        if text(contents) not in self.tensors:
            raise MalformedFile(f"the tensor {contents[:40]!r} is missing")
        return self.tensors[contents]

    def _location(self, contents: Any) -> Any:
        index = size(contents)
        if index >= len(self.located):
            raise MalformedFile("an object of the model is missing")
        return self.located[index]

    def _slice(self, contents: Any) -> slice:
        return slice(*self.elements(contents, 3))

    def _range(self, contents: Any) -> range:
        return range(*(integer(v) for v in listed(contents, 3)))

    def _device(self, contents: Any) -> torch.device:
        try:
            return torch.device(text(contents))
        except RuntimeError as error:
            raise MalformedFile("a device is unknown") from error

    def _function(self, contents: Any) -> Any:
        function = function_named(text(contents))
        if function is None:
            raise MalformedFile(f"the function {contents[:80]!r} is not one that a saved graph may call")
        return function

    def _type(self, contents: Any) -> type:
        if text(contents) not in _TYPES:
            raise MalformedFile(f"the type {contents[:40]!r} is unknown")
        return _TYPES[contents]


def _torch_value(kind: type) -> Callable[[Decoder, Any], Any]:
    def decode(self: Decoder, contents: Any) -> Any:
        value = vars(torch).get(text(contents))
        if not isinstance(value, kind):
            raise MalformedFile(f"{contents[:40]!r} is not a {kind.__name__}")
        return value

    return decode


_DECODERS: dict[str, Callable[[Decoder, Any], Any]] = {
    "float": Decoder._float,
    "complex": Decoder._complex,
    "ellipsis": lambda self, contents: Ellipsis,
    "node": Decoder._node,
    "module": Decoder._module,
    "meta": Decoder._meta,
    "constant": Decoder._constant,
    "tensor": Decoder._tensor,
    "location": Decoder._location,
    "device": Decoder._device,
    "refusal": lambda self, contents: Refusal(*map(text, listed(contents, 3))),
    "slot": lambda self, contents: SlotName(text(contents)),
    "slice": Decoder._slice,
    "range": Decoder._range,
    "size": lambda self, contents: torch.Size([size(v) for v in listed(contents)]),
    "tuple": lambda self, contents: tuple(self.elements(contents)),
    "dict": Decoder._dict,
    "set": lambda self, contents: set(self._hashable(contents)),
    "frozenset": lambda self, contents: frozenset(self._hashable(contents)),
    "type": Decoder._type,
    "function": Decoder._function,
} | {name: _torch_value(kind) for kind, name in _TORCH.items()}


def listed(value: Any, count: int | None = None) -> list[Any]:
    """A list of the file, with this number of elements."""
    if not isinstance(value, list) or (count is not None and len(value) != count):
        raise MalformedFile("a list has another form")
    return value


def text(value: Any) -> str:
    """A text of the file: one line of printable characters."""
    if not isinstance(value, str) or not value.isprintable():
        raise MalformedFile("a text has another form")
    return value


def flag(value: Any) -> bool:
    """A bool of the file."""
    if not isinstance(value, bool):
        raise MalformedFile("a flag has another form")
    return value


def integer(value: Any) -> int:
    """An integer of 64 bits of the file."""
    if type(value) is not int or abs(value) >= _MOST_DIGITS:
        raise MalformedFile("an integer has another form")
    return value


def size(value: Any) -> int:
    """An integer of the file that is not negative."""
    if integer(value) < 0:
        raise MalformedFile("a size is negative")
    return int(value)


def entry(value: Any, key: str) -> Any:
    """An entry of a dict of the file."""
    if not isinstance(value, dict) or key not in value:
        raise MalformedFile(f"the entry {key!r} is missing")
    return value[key]


def dtype_named(name: Any) -> torch.dtype:
    """The dtype of this name."""
    value = vars(torch).get(text(name))
    if not isinstance(value, torch.dtype):
        raise MalformedFile("a dtype is unknown")
    return value

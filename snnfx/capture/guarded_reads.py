"""From the reads of a capture to its guards.

The reads of module attributes are recorded during the traces. The reads of globals and closure variables come from the
code of the functions that a step can reach. Attributes of plain objects are guarded if such code names them.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import enum
import functools
import importlib.util
import io
import sys
import types
import weakref
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Set
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.capture.code_reads import CodeReads, is_library_code, is_library_file, reads_of
from snnfx.capture.inline_modules import is_traced_inline
from snnfx.ir.guards import (
    ABSENT,
    MODES,
    CellRoot,
    FunctionRoot,
    Guard,
    Guards,
    GuardSources,
    ModuleRoot,
    ModuleTree,
    NamespaceRoot,
    Step,
    contents_of,
    text_of,
    version_of,
)
from snnfx.sandbox.contents_snapshot import slot_names
from snnfx.sandbox.torch_internals import python_of_script

__all__ = ["ReachableCode", "guards_of", "is_foreign", "is_foreign_name", "recollected_guards", "values_read_by"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, range, slice)
_FUNCTIONS = (FunctionType, types.BuiltinFunctionType, types.MethodType, staticmethod, classmethod)
_CONTAINERS = (list, tuple, dict, set, frozenset, deque)
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)
_MODULE_INTERNALS = frozenset(vars(nn.Module())) - {"training"}
_CREATION = frozenset(
    "__init__ __new__ __post_init__ __init_subclass__ __repr__ __str__ __reduce__ __reduce_ex__ __getstate__ "
    "__setstate__ __deepcopy__ __copy__ __del__ __setattr__ __delattr__ __class__ __hash__".split()
)
"""Methods that no step calls on an object that exists already."""
_MAX_DEPTH = 6
_MOST_GUARDS = 5000
_MOST_VALUES_OF_TENSOR = 4096
"""Larger tensors are compared by version, which misses changes through `.data`."""


class ReachableCode:
    """The Python functions that a step can reach from the modules of a model, and the names in their code.

    Args:
        modules: the modules, by qualified name.
        entry: name of the method that computes one step.
    """

    def __init__(self, modules: dict[str, nn.Module], entry: str) -> None:
        self.modules = modules
        self.functions: dict[FunctionType, CodeReads] = {}
        self.names: set[str] = {entry, "forward", "step", "initial_state"}
        self.tested: set[str] = set()
        self.reads_by_name = False
        self._classes: dict[type, None] = {}
        for module in modules.values():
            self.add_class(type(module))

    def add(self, value: Any) -> None:
        """Add a function, the functions that a decorator or `partial` wraps, or the methods of an autograd.Function."""
        if isinstance(value, property):
            for accessor in (value.fget, value.fset):
                self.add(accessor)
        elif isinstance(value, functools.partial | functools.partialmethod):
            for part in (value.func, *value.args, *value.keywords.values()):
                self.add(part)
        elif isinstance(value, functools.cached_property):
            self.add(value.func)
        elif isinstance(value, types.MethodType | staticmethod | classmethod):
            self.add(value.__func__)
        elif isinstance(value, type) and issubclass(value, torch.autograd.Function):
            for cls in value.__mro__:
                for member in vars(cls).values() if cls is not torch.autograd.Function else ():
                    if isinstance(member, staticmethod | classmethod | FunctionType):
                        self.add(member)
        elif isinstance(value, torch.jit.ScriptFunction):
            self.add(python_of_script(value))
        elif isinstance(value, FunctionType) and value not in self.functions:
            if is_library_code(value):  # such as torch.no_grad() around a function of the user
                self.functions[value] = _NOTHING
                for cell in value.__closure__ or ():
                    inner = contents_of(cell)
                    if isinstance(inner, FunctionType):
                        self.add(inner)
                return
            reads = self.functions[value] = reads_of(value.__code__)
            self.reads_by_name = self.reads_by_name or reads.reads_by_name
            self.names |= reads.attributes
            self.tested |= reads.tested

    def add_class(self, cls: type) -> None:
        """Add the methods of a class whose names the code reads."""
        self._classes[cls] = None

    def close(self) -> None:
        """Add everything that is reachable from the code found so far."""
        size = -1
        while size != (size := len(self.functions) + len(self.names) + len(self._classes)):
            for cls in [base for known in self._classes for base in known.__mro__]:
                if not is_foreign(cls):
                    for name, member in [*vars(cls).items()]:
                        is_implicit = name.startswith("__") and name not in _CREATION
                        if (name in self.names or is_implicit) and not isinstance(member, type):
                            self.add(member)
            for module in self.modules.values():
                for name in self.names & vars(module).keys():
                    self.add(vars(module)[name])
            for function in [*self.functions]:
                for value, chain, *_ in variables_of(function, self.functions[function]):
                    self._follow(value, chain)

    def modes(self) -> set[str]:
        """The names of the modes of torch that the code reads."""
        found: set[str] = set()
        for function, reads in self.functions.items():
            for value, chain, *_ in variables_of(function, reads):
                for name in chain:
                    value = getattr(value, name, None) if isinstance(value, types.ModuleType) else None
                found |= {name for name, read in MODES.items() if value is read}
        return found

    def namespaces_with(self, name: str) -> list[dict[str, Any]]:
        """The global variables of the functions whose code reads a global or builtin variable."""
        found = [f.__globals__ for f, reads in self.functions.items() if any(c[0] == name for c in reads.global_names)]
        return [*{id(namespace): namespace for namespace in found}.values()]

    def _follow(self, value: Any, chain: tuple[str, ...]) -> None:
        for name in chain:
            if not isinstance(value, types.ModuleType | type):
                break
            self.add(value)
            value = getattr(value, name, None)
        self.add(value)


_NOTHING = CodeReads(frozenset(), frozenset(), frozenset(), False, frozenset(), frozenset(), frozenset())


def variables_of(
    function: FunctionType, reads: CodeReads
) -> Iterator[tuple[Any, tuple[str, ...], NamespaceRoot | CellRoot, Step]]:
    """Yield `(value, attributes read from it, root, step)` of the globals and closure variables of a function."""
    namespace = function.__globals__
    for name, *rest in sorted(reads.global_names):
        if name in namespace:
            yield namespace[name], tuple(rest), NamespaceRoot(namespace), ("key", name)
    free = function.__code__.co_freevars
    for name, *rest in sorted(reads.closure_names):
        if name != "__class__":
            root = CellRoot(function, free.index(name))
            yield contents_of(root.cell), tuple(rest), root, ("cell", name)
    for name, level, imported in sorted(reads.imports):
        package = str(function.__globals__.get("__package__") or "")
        absolute = importlib.util.resolve_name("." * level + name, package) if level and package else name
        module = sys.modules.get(absolute)
        if module is not None and not is_foreign_name(absolute):
            for attribute in sorted((set(imported) or reads.attributes) & vars(module).keys()):
                yield vars(module)[attribute], (), NamespaceRoot(vars(module)), ("key", attribute)


def values_read_by(function: FunctionType) -> Iterator[Any]:
    """The globals and closure variables that a function reads, and the attributes that it reads from modules."""
    for value, chain, *_ in variables_of(function, reads_of(function.__code__)):
        yield value
        for name in chain:
            if not isinstance(value, types.ModuleType | type):
                break
            value = getattr(value, name, None)
            yield value


def guards_of(
    model: nn.Module,
    entry: str,
    traced: Iterable[str],
    opaque: Iterable[str],
    reads: Iterable[tuple[nn.Module, str]],
    state: Set[tuple[nn.Module, str]],
    consumed: Iterable[Tensor],
    growing: Iterable[Any],
    flags: dict[nn.Module, bool],
    variables: Iterable[tuple[str, str]],
) -> Guards:
    """The guards of a capture.

    Args:
        model: the model, with its attributes as before the capture.
        entry: name of the method that computes one step.
        traced: qualified names of the modules whose forward was traced.
        opaque: qualified names of modules that were not traced; a net calls them, so their code reads current values.
        reads: the module attributes that the model's code read.
        state: the module attributes that are slots, or set before they are read.
        consumed: tensors outside the graph whose values the traces used.
        growing: containers outside the model that the traces appended to.
        flags: `training` of each module in the traces.
        variables: Python module and name of the global variables that are set before they are read.
    """
    paths = {m: n for n, m in model.named_modules()}
    consumed, growing = list(consumed), list(growing)
    sources = GuardSources(
        entry,
        tuple(traced),
        tuple(opaque),
        tuple((paths[m], name) for m, name in reads if m in paths),
        tuple(sorted((paths[m], name) for m, name in state if m in paths)),
        tuple((paths[m], flag) for m, flag in flags.items() if m in paths),
        tuple(sorted(variables)),
        "the step appends to a container outside the model" if growing else "",
    )
    known = [(m, name) for m, name in reads if m in paths and (m, name) not in state]
    guards, _ = _collected(model, sources, known, consumed, growing, flags)
    if any(guard.test in ("tensor", "version") for guard in guards.reads):
        sources = replace(sources, refusal="the step uses values of tensors outside the graph")
    guards.sources = (sources,)
    return guards


def recollected_guards(model: nn.Module, sources: tuple[GuardSources, ...]) -> tuple[Guards, list[FunctionType]]:
    """Collect the guards of earlier captures again, of this model as it is now.

    Args:
        model: the model.
        sources: `Guards.sources` of the program; every name must exist in the model.

    Returns:
        `(guards, the functions that a step can reach)`.
    """
    modules = dict(model.named_modules())
    found, functions = Guards(), dict[FunctionType, None]()
    for number, of_capture in enumerate(sources):
        reads = [(modules[n], name) for n, name in of_capture.reads if (n, name) not in of_capture.state]
        flags = {modules[n]: flag for n, flag in of_capture.flags}
        guards, code = _collected(model, of_capture, reads, [], [], flags)
        guards.sources = (of_capture,)
        found = found.union(guards) if number else guards
        functions |= dict.fromkeys(code.functions)
    return found, list(functions)


def _collected(
    model: nn.Module,
    sources: GuardSources,
    known: list[tuple[nn.Module, str]],
    consumed: Iterable[Tensor],
    growing: Iterable[Any],
    flags: dict[nn.Module, bool],
) -> tuple[Guards, ReachableCode]:
    """Collect guards until the values that are guarded add no further code."""
    prefixes = tuple(f"{name}." if name else "" for name in sources.opaque)
    modules = {n: m for n, m in model.named_modules() if not (prefixes and f"{n}.".startswith(prefixes))}
    code = ReachableCode(modules, sources.entry)
    paths = {m: n for n, m in model.named_modules()}
    traced = [m for m in map(dict(model.named_modules()).get, sources.traced) if m is not None]
    while True:
        code.close()
        containers = {id(c) for c in growing}
        collector = _Collector(code, paths, {id(t) for t in consumed}, containers, flags, {*sources.variables})
        size = len(code.functions), len(code.names), code.reads_by_name
        collector.collect(known, traced, sources.entry)
        code.close()
        if size == (len(code.functions), len(code.names), code.reads_by_name):
            return Guards(collector.guards, ModuleTree(model, sources.traced), collector.modes), code


class _Collector:
    """Makes the guards for a fixed set of code."""

    def __init__(
        self,
        code: ReachableCode,
        paths: dict[nn.Module, str],
        consumed: set[int],
        growing: set[int],
        flags: dict[nn.Module, bool],
        set_first: set[tuple[str, str]],
    ) -> None:
        self.code, self.paths, self.consumed, self.growing, self.flags = code, paths, consumed, growing, flags
        self.set_first = set_first
        self.guards: list[Guard] = []
        self.modes: dict[str, Any] = {}
        tensors = [t for m in paths for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        self.tied = {key for key, count in Counter(map(id, tensors)).items() if count > 1}
        self._visited: set[int] = set()
        self._known: set[tuple[Any, ...]] = set()

    def collect(self, reads: list[tuple[nn.Module, str]], traced: list[nn.Module], entry: str) -> None:
        for cls, module in {type(m): m for m in reversed(traced)}.items():
            if not is_foreign(cls):
                for name in dict.fromkeys(("forward", entry)):
                    if isinstance(getattr(cls, name, None), FunctionType):
                        self._add(ModuleRoot(self.paths[module]), (("class", name),), "same", getattr(cls, name))
        for module in traced:
            if "forward" in vars(module):
                self._value(vars(module)["forward"], ModuleRoot(self.paths[module]), (("instance", "forward"),))
        for module, name in reads:
            if name not in _MODULE_INTERNALS and not name.startswith("__"):
                self._attribute(module, name)
        for function, names in [*self.code.functions.items()]:
            for value, chain, root, step in variables_of(function, names):
                if value is not ABSENT:
                    self._variable(value, chain, root, (step,))
            for index, default in enumerate(function.__defaults__ or ()):
                if not isinstance(default, _PLAIN) and not is_library_code(function):
                    self._value(default, FunctionRoot(function), (("attribute", "__defaults__"), ("item", index)))
            for name, default in (function.__kwdefaults__ or {}).items():
                if not isinstance(default, _PLAIN) and not is_library_code(function):
                    self._value(default, FunctionRoot(function), (("attribute", "__kwdefaults__"), ("key", name)))

    def _add(self, root: Any, path: tuple[Step, ...], test: str, expected: Any, value: Any = ABSENT) -> None:
        if (root, path, test) not in self._known:
            self._known.add((root, path, test))
            shown = text_of(expected if value is ABSENT else value)
            self.guards.append(Guard(root, path, test, expected, shown))

    def _attribute(self, module: nn.Module, name: str) -> None:
        """Guard an attribute that the model's code read from a module."""
        root, own, cls = ModuleRoot(self.paths[module]), vars(module), type(module)
        if name in own:
            value = self.flags[module] if name == "training" else own[name]
            self._value(value, root, (("instance", name),))
            return
        for registry in ("_parameters", "_buffers"):
            if name in own[registry]:
                # The graph reads a registered tensor when it runs.
                # If it has several names, the graph uses the first.
                tensor = own[registry][name]
                test = "value" if tensor is None else "same" if id(tensor) in self.tied else "some"
                self._add(
                    root, (("instance", registry), ("key", name)), test, tensor if test == "same" else None, tensor
                )
                return
        if name in own["_modules"]:
            return  # in the tree
        value = next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), ABSENT)
        if isinstance(value, FunctionType) and is_library_code(value):
            return
        self._add(root, (("instance", name),), "same", ABSENT)
        if value is ABSENT:
            self._add(root, (("instance", "_buffers"), ("key", name)), "same", ABSENT)
            self._add(root, (("instance", "_parameters"), ("key", name)), "same", ABSENT)
            self._add(root, (("class", name),), "same", ABSENT)
            return
        self.code.add(value)
        found = getattr(cls, name, ABSENT)
        if isinstance(value, staticmethod | classmethod) or isinstance(found, types.MethodType):
            return  # a new object at every read
        if hasattr(type(value), "__get__"):
            self._add(root, (("class", name),), "same", found)
        else:
            self._value(value, root, (("class", name),))

    def _variable(self, value: Any, chain: tuple[str, ...], root: Any, path: tuple[Step, ...]) -> None:
        """Guard a global or closure variable, and the attributes that code reads from it."""
        if isinstance(root, NamespaceRoot) and len(path) == 1 and (root.name, path[0][1]) in self.set_first:
            return
        if isinstance(value, types.ModuleType):
            if is_foreign_name(value.__name__):
                for name in chain:
                    value = getattr(value, name, None)
                self._mode(value)
                return
            self._add(root, path, "same", value)
            if chain and chain[0] in vars(value):
                self._variable(vars(value)[chain[0]], chain[1:], NamespaceRoot(vars(value)), (("key", chain[0]),))
            return
        if isinstance(value, type):
            if is_foreign(value):
                return
            self._add(root, path, "same", value)
            self.code.add(value)
            if chain and ("", chain[0]) not in self.set_first:
                found = next((vars(base)[chain[0]] for base in value.__mro__ if chain[0] in vars(base)), ABSENT)
                if found is not ABSENT and not hasattr(type(found), "__get__"):
                    self._variable(found, chain[1:], root, (*path, ("attribute", chain[0])))
                else:
                    self.code.add(found)
            return
        self._mode(value)
        self._value(value, root, path)

    def _mode(self, value: Any) -> None:
        for name, read in MODES.items():
            if value is read:
                self.modes[name] = read()

    def _value(self, value: Any, root: Any, path: tuple[Step, ...], depth: int = 0) -> None:
        """Guard a value, and the values inside it."""
        if isinstance(value, _PLAIN) or _is_numpy_scalar(value):
            self._add(root, path, "value", value)
        elif isinstance(value, Tensor):
            self._add(root, path, "same", value)
            if id(value) in self.consumed:
                self._consumed_tensor(value, root, path)
        elif _is_array(value):
            self._add(root, path, "array", value.copy(), value)
        elif isinstance(value, enum.Enum):
            self._add(root, path, "same", value)
        elif isinstance(value, (*_FUNCTIONS, functools.partial, type, property)):
            self._add(root, path, "same", value)
            self.code.add(value)
            if isinstance(value, FunctionType) and not is_library_code(value) and id(value) not in self._visited:
                self._visited.add(id(value))
                for name, element in vars(value).items():
                    self._value(element, root, (*path, ("attribute", name)), depth + 1)
        elif id(value) in self.growing:
            self._add(root, path, "same", value)
        elif isinstance(value, nn.Module) and is_traced_inline(value):
            self._add(root, path, "same", value)
            for name, element in vars(value).items():
                if name not in _MODULE_INTERNALS:
                    self._value(element, root, (*path, ("instance", name)), depth + 1)
        elif isinstance(value, _CONTAINERS) and _has_only_plain_elements(value):
            self._add(
                root, path, "contents", value if isinstance(value, tuple | frozenset) else copy.copy(value), value
            )
        elif id(value) in self._visited or depth == _MAX_DEPTH or len(self.guards) > _MOST_GUARDS:
            self._add(root, path, "same", value)
        elif isinstance(value, _CONTAINERS):
            self._visited.add(id(value))
            self._container(value, root, path, depth)
        elif _is_object(value):
            self._visited.add(id(value))
            self._object(value, root, path, depth)
        else:
            self._add(root, path, "same", value)

    def _consumed_tensor(self, value: Tensor, root: Any, path: tuple[Step, ...]) -> None:
        is_dense = value.layout is torch.strided and not value.is_quantized and value.device.type == "cpu"
        if is_dense and value.numel() <= _MOST_VALUES_OF_TENSOR:
            self._add(root, path, "tensor", value.detach().clone(), value)
        elif is_dense or value.layout is torch.strided:
            self._add(root, path, "version", version_of(value), value)

    def _container(self, value: Any, root: Any, path: tuple[Step, ...], depth: int) -> None:
        """Guard the elements of a container that has tensors, objects or other containers inside."""
        if isinstance(value, dict) and any(isinstance(key, weakref.ref) for key in value):
            self._add(root, path, "same", value)  # a registry of callbacks
            return
        if isinstance(value, dict):
            self._add(root, path, "keys", (type(value), [*value]), value)
            for key, element in value.items():
                self._value(element, root, (*path, ("key", key)), depth + 1)
            return
        self._add(root, path, "length", (type(value), len(value)), value)
        for index, element in enumerate(value):
            self._value(element, root, (*path, ("item", index)), depth + 1)

    def _object(self, value: Any, root: Any, path: tuple[Step, ...], depth: int) -> None:
        cls = type(value)
        self._add(root, path, "type", cls, value)
        self.code.add_class(cls)
        has_lookup = any("__getattr__" in vars(c) or "__getattribute__" in vars(c) for c in cls.__mro__[:-1])
        reads_all = has_lookup or self.code.reads_by_name or dataclasses.is_dataclass(value)
        own = getattr(value, "__dict__", {})
        if self.code.reads_by_name and isinstance(own, dict):  # such as by hasattr
            self._add(root, (*path, ("attribute", "__dict__")), "keys", (dict, [*own]))
        for name in (
            sorted(self.code.tested - own.keys()) if isinstance(own, dict) and hasattr(value, "__dict__") else ()
        ):
            self._add(root, (*path, ("instance", name)), "same", ABSENT)
        slots = [name for name in slot_names(cls) if hasattr(value, name)]
        for name in (*own, *slots):
            if ("", name) in self.set_first:
                continue
            if reads_all or name in self.code.names:
                element = own[name] if name in own else getattr(value, name)
                self._value(element, root, (*path, ("attribute", name)), depth + 1)
        for base in cls.__mro__:
            if is_foreign(base):
                continue
            for name, element in vars(base).items():
                if name.startswith("__") or name in own or not (reads_all or name in self.code.names):
                    continue
                if isinstance(element, (*_PLAIN, *_CONTAINERS, Tensor)):
                    self._value(element, root, (*path, ("attribute", name)), depth + 1)
                elif isinstance(element, FunctionType | property) and name in self.code.names:
                    self._add(root, (*path, ("class", name)), "same", getattr(cls, name))
                    if isinstance(element, FunctionType) and isinstance(own, dict) and hasattr(value, "__dict__"):
                        self._add(root, (*path, ("instance", name)), "same", ABSENT)


def _has_only_plain_elements(value: Any) -> bool:
    elements = value.values() if isinstance(value, dict) else value
    return isinstance(value, set | frozenset) or all(isinstance(e, _PLAIN) for e in elements)


def _is_object(value: Any) -> bool:
    """Whether the attributes of an object are values of the user."""
    if isinstance(value, nn.Module | types.ModuleType | io.IOBase):
        return False
    cls = type(value)
    return isinstance(value, _NAMESPACES) or (
        not is_foreign(cls) and (hasattr(value, "__dict__") or bool(slot_names(cls)))
    )


def is_foreign(cls: type) -> bool:
    """Whether a class belongs to torch, NumPy or the standard library."""
    return is_foreign_name(cls.__module__)


def is_foreign_name(module: str) -> bool:
    package = module.partition(".")[0]
    if package in ("torch", "numpy", "snnfx", "builtins"):
        return True
    if package not in sys.stdlib_module_names or package == "__main__":
        return False
    # A file of the user may have the name of a module of the standard library.
    found = sys.modules.get(package)
    filename = getattr(found, "__file__", None)
    return filename is None or is_library_file(filename)


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray) and value.dtype != object


def _is_numpy_scalar(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.generic)

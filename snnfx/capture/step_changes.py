"""Tensors of the model that a step changes: buffers, parameters and tensors in plain attributes.

Such a tensor is a slot in every trace: the model's code reads a proxy from the attribute, and the value after the step
is the next value of the slot. Buffers and parameters are persistent slots, which live on from call to call; a tensor in
a plain attribute starts each call from its value at capture. A trace that finds a change without a slot raises
`NewChange`, and the capture starts again with a slot for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.fx import Node
from torch.nn import functional

from snnfx.capture.input_output_checks import refusal_of_nested_tensor
from snnfx.capture.proxy import StepProxy, data_refusal
from snnfx.capture.tracer import StepTracer
from snnfx.errors import CaptureError
from snnfx.ir.facts import VALUE, WHERE
from snnfx.ir.nodes import is_in_place, object_of
from snnfx.ir.program import START_PREFIX, InitialAttribute
from snnfx.ops.step_functions import read_parameter
from snnfx.ops.written_arguments import written_tensors
from snnfx.sandbox.contents_snapshot import ContentsSnapshot, attributes_of
from snnfx.sandbox.torch_internals import FakeTensor, NormBase, TorchDispatchMode
from snnfx.sandbox.user_code import format_location, location_of_forward, user_location
from snnfx.state.leaf_modules import is_leaf

__all__ = ["ChangedTensor", "NewChange", "StepChanges", "modules_with"]

How = Literal["assigned", "in_place"]


@dataclass(eq=False)
class ChangedTensor:
    """A tensor of the model that a step changes.

    Args:
        name: name of the slot, the qualified name of the tensor.
        module, attribute: the module that stores it, and its name there.
        kind: "buffer", "parameter", or "attribute" for a plain attribute.
        how: whether the step assigns a new tensor or changes the tensor in place.
        tensor: the tensor at capture.
        holders: every place of the model that stores the tensor: registries of modules, with the name there.
    """

    name: str
    module: nn.Module
    attribute: str
    kind: Literal["buffer", "parameter", "attribute"]
    how: How
    tensor: Tensor
    holders: list[tuple[nn.Module, dict[str, Any], str]]

    @property
    def registry(self) -> dict[str, Any]:
        """The dict that stores the tensor."""
        return _registries(self.module)[self.kind]

    @property
    def persistent(self) -> Literal["", "assigned", "in_place"]:
        """How a call writes the final value back; "" for a plain attribute, which it does not write."""
        return "" if self.kind == "attribute" else self.how

    def initial_attribute(self, path: str) -> InitialAttribute:
        """The value at capture, for a plain attribute of the module called `path`."""
        return InitialAttribute(path, self.attribute, self.tensor.detach().clone())


class NewChange(BaseException):
    """Raised in a trace that finds a change without a slot; derived from BaseException to pass the model's code."""


class StepChanges:
    """Finds the tensors that the steps of a model change, over all traces of a capture.

    Args:
        model: the model.
        entry: name of the method that computes one step.

    Attributes:
        found: the changed tensors so far, by the name of their slots.
    """

    def __init__(self, model: nn.Module, entry: str) -> None:
        self.model, self.entry = model, entry
        self.found: dict[str, ChangedTensor] = {}

    def keys(self) -> set[tuple[nn.Module, str]]:
        """The modules and attributes that store the changed tensors."""
        own = {(c.module, c.attribute) for c in self.found.values()}
        return own | {(m, key) for c in self.found.values() if c.how == "in_place" for m, _, key in c.holders}

    def keep_shapes(self, following: Mapping[str, Any]) -> bool:
        """Whether a step leaves the shapes of the changed tensors; its results by the names of the slots."""
        values = {name: VALUE.of(following[name]) for name in self.found}
        return all(isinstance(v, Tensor) and v.shape == self.found[n].tensor.shape for n, v in values.items())

    # -- before a step --------------------------------------------------------------------------------------------

    def start(self, tracer: StepTracer, shapes: dict[str, Any]) -> None:
        """Add the slots to a trace and let the model's attributes return them."""
        slots = []
        for change in self.found.values():
            value = shapes.get(change.name)
            if value is None and tracer.values.mode is not None:
                value = tracer.values.mode.from_tensor(change.tensor.detach(), static_shapes=True)
            slots.append(tracer.add_slot(change.name, *(() if value is None else (value,))))
        for change, slot in zip(self.found.values(), slots, strict=True):
            if change.kind == "attribute":
                tracer.slot_initials[change.name] = tracer.proxy(tracer.constant(change.tensor))
            else:
                start = tracer.create_proxy("get_attr", START_PREFIX + change.name, (), {})
                tracer.slot_initials[change.name] = start
            read: Any = slot
            if change.kind == "parameter":
                parameter = tracer.create_proxy("get_attr", change.name, (), {})
                read = tracer.create_proxy("call_function", read_parameter, (parameter, slot), {})
            change.registry[change.attribute] = read
            if change.how == "in_place":
                for _, registry, key in change.holders:
                    registry[key] = read
                tracer.changed_tensors[id(change.tensor)] = read.node
            self._reads[change.name] = read.node
        tracer.opened = modules_with(self.model, self.found.values())

    @contextlib.contextmanager
    def watched(
        self,
        tracer: StepTracer,
        blocked: tuple[str, ...],
        owned: Set[tuple[nn.Module, str]],
    ) -> Iterator[None]:
        """Detect the changes of one trace.

        Args:
            tracer: the tracer of the step.
            blocked: prefixes of the names in modules that the net calls as a whole.
            owned: attributes in which adapters store the states of their modules.

        Raises:
            NewChange: the step changes a tensor without a slot; `found` now contains it.
            CaptureError: SNNFX206, the step changes a tensor in a way that a net cannot follow.
        """
        self.blocked, self.owned = blocked, owned
        self._reads: dict[str, Node] = {}
        self._before = before = _Contents(self.model, self.owned)
        tracer.writes = _InPlaceWrites(self, tracer, before)
        yield

    # -- after a step ---------------------------------------------------------------------------------------------

    def finish(self, tracer: StepTracer) -> None:
        """Set the next value of each slot to the value in the module.

        Raises:
            NewChange: the step changes a tensor without a slot, or in another way than before.
            CaptureError: SNNFX206, the step changes a tensor in a way that a net cannot follow.
        """
        self._check(tracer, self._before)
        for change in self.found.values():
            value = change.registry.get(change.attribute)
            if not isinstance(value, StepProxy | Tensor):
                raise _refusal(
                    f"a step sets `{change.name}` to {type(value).__name__}",
                    location_of_forward(change.module),
                    "a net carries a buffer or parameter from step to step as a tensor.",
                    "Assign a tensor.",
                )
            tracer.slot_values[change.name] = value

    # -- changes --------------------------------------------------------------------------------------------------

    def _check(self, tracer: StepTracer, before: _Contents) -> None:
        """Compare the model with its contents before the step."""
        before.refuse_replaced_data()
        count = len(self.found), sum(c.how == "assigned" for c in self.found.values())
        keys = self.keys() | self.owned
        for name, module in self.model.named_modules():
            for key in {**before.buffers[module], **module._buffers}:
                old, new = before.buffers[module].get(key), module._buffers.get(key)
                if (
                    new is not old
                    and (module, key) not in keys
                    and (type(new) is StepProxy or not isinstance(new, FakeTensor))
                ):
                    self._add_buffer(f"{name}.{key}" if name else key, module, key, old, new)
            for key in {**before.parameters[module], **module._parameters}:
                if module._parameters.get(key) is not before.parameters[module].get(key) and (module, key) not in keys:
                    raise _refusal(
                        f"a step replaces the parameter `{name + '.' if name else ''}{key}`",
                        location_of_forward(module),
                        "a net and its optimizer use one parameter for all steps.",
                        "Change its value: with torch.no_grad(): self.w.copy_(value).",
                    )
        for change in self.found.values():
            value = change.registry.get(change.attribute)
            is_same = type(value) is StepProxy and object_of(value.node) is self._reads.get(change.name)
            if change.how == "in_place" and change.name in self._reads and not is_same:
                change.how = "assigned"
        for node in tracer.graph.nodes:
            self._refuse_statistics(node)
            root = object_of(node) if is_in_place(node) else node
            if root is not node and root.op == "get_attr":
                target = str(root.target)
                tensor = before.named.get(target) if target not in tracer.constants else tracer.constants[target]
                if isinstance(tensor, Tensor) and before.owner_of(tensor) is tensor:
                    self._add_in_place(before, tensor, format_location(WHERE.of(node)))
        if count != (len(self.found), sum(c.how == "assigned" for c in self.found.values())):
            raise NewChange

    def _add_buffer(self, name: str, module: nn.Module, key: str, old: Any, new: Any) -> None:
        where = location_of_forward(module, self.entry)
        if old is None or new is None:
            raise _refusal(
                f"a step {'creates' if old is None else 'removes'} the buffer `{name}`",
                where,
                "a net carries a buffer from call to call, which needs a tensor before and after every step.",
                f'Register it with its initial tensor: self.register_buffer("{key}", torch.zeros(...)). If each '
                f"sequence starts anew, use a plain attribute instead: self.{key} = None.",
            )
        self._refuse_holder(name, name.rpartition(".")[0], module, where)
        if type(new) is StepProxy:
            root = object_of(new.node)
            if root is not new.node and root.op == "get_attr":
                return  # changed in place: found in the graph
        self._add(ChangedTensor(name, module, key, "buffer", "assigned", old, []))

    def _add_in_place(self, before: _Contents, tensor: Tensor, where: str) -> None:
        """Add a slot for a tensor that a step changes in place."""
        known = next((c for c in self.found.values() if c.tensor is tensor), None)
        if known is not None:
            return
        holders = [
            (name, module, kind, registry, key)
            for name, module in self.model.named_modules()
            for kind, registry in _registries(module).items()
            for key, value in before.entries(module, kind).items()
            if value is tensor
        ]
        name, module, kind, _, key = min(holders, key=lambda h: ("parameter", "buffer", "attribute").index(h[2]))
        qualified = f"{name}.{key}" if name else key
        for other in before.sharing_memory_with(tensor):
            raise _refusal(
                f"a step changes `{qualified}` in place, which shares memory with `{other}`",
                where,
                "the net would change only one of the two.",
                "Make one of them a copy: self.a = self.b.clone().",
            )
        for path, holder, *_ in holders:
            self._refuse_holder(qualified, path, holder, where)
        shared = [(holder, registry, attribute) for _, holder, _, registry, attribute in holders]
        self._add(ChangedTensor(qualified, module, key, kind, "in_place", tensor, shared))

    def _refuse_holder(self, tensor: str, path: str, holder: nn.Module, where: str) -> None:
        """Refuse a change of a tensor of a module that the net calls as a whole."""
        if isinstance(holder, NormBase) and is_leaf(holder):
            why = "the net calls this layer, which changes its statistics itself, as a whole."
            hint = "Register a buffer of your own, and normalise with torch.nn.functional.batch_norm(x, None, None)."
        elif f"{path}.".startswith(self.blocked):
            why = "the net calls this module as a whole, with its own tensors."
            hint = "Change the tensor in the forward of this module."
        else:
            return
        raise _refusal(f"a step changes `{tensor}` of `{path or 'the model'}`", where, why, hint)

    def _refuse_statistics(self, node: Node) -> None:
        """Refuse torch.nn.functional.batch_norm on statistics that the step changes itself as well."""
        if node.op != "call_function" or node.target not in (functional.batch_norm, functional.instance_norm):
            return
        reads = {read: name for name, read in self._reads.items()}
        for operand in (*node.args[1:3], node.kwargs.get("running_mean"), node.kwargs.get("running_var")):
            name = reads.get(object_of(operand)) if isinstance(operand, Node) else None
            if name is not None and _updates_statistics(node):
                raise _refusal(
                    f"a step changes `{name}`, which `{node.name}` updates as well",
                    format_location(WHERE.of(node)),
                    "an update inside an operation of torch leaves no node that a net could carry.",
                    "Pass None for running_mean and running_var in training, and update the statistics in the step.",
                )

    def _add(self, change: ChangedTensor) -> None:
        if change.tensor.is_nested:
            raise refusal_of_nested_tensor(change.name, location_of_forward(change.module))
        self.found.setdefault(change.name, change)

    def add_written(self, before: _Contents, tensor: Tensor) -> None:
        """Add a slot for a tensor of the model that the step's code is about to change.

        Raises:
            NewChange: always, unless the change is refused.
        """
        where = format_location(user_location())
        attribute = before.attribute_of(tensor)
        owner = before.owner_of(tensor)
        if attribute is None or any(c.tensor is owner for c in self.found.values()):
            raise _refusal(
                f"a step changes a tensor in `{before.name_of(tensor)}` in place",
                where,
                "it is in a container, and a net follows only changes of the attributes of modules.",
                "Store the tensor in an attribute of a module, or assign a new tensor to the element.",
            )
        assert owner is not None
        self._add_in_place(before, owner, where)
        raise NewChange


class _Contents:
    """The tensors of a model before a step."""

    def __init__(self, model: nn.Module, owned: Set[tuple[nn.Module, str]]) -> None:
        self.buffers: dict[nn.Module, dict[str, Any]] = {m: dict(m._buffers) for m in model.modules()}
        self.parameters: dict[nn.Module, dict[str, Any]] = {m: dict(m._parameters) for m in model.modules()}
        self._attributes: dict[nn.Module, dict[str, Any]] = {}
        self._tensors: list[tuple[str, Tensor, bool]] = []
        for name, module in model.named_modules():
            prefix = f"{name}." if name else ""
            plain = {k: v for k, v in attributes_of(module).items() if (module, k) not in owned}
            self._attributes[module] = plain
            own: dict[str, Any] = {**self.parameters[module], **self.buffers[module]}
            named = [(prefix + key, value, True) for key, value in own.items() if value is not None]
            for key, value in plain.items():
                if isinstance(value, Tensor):
                    named.append((prefix + key, value, True))
                else:
                    named += [(prefix + key, t, False) for t in ContentsSnapshot({key: value}).tensors]
            self._tensors += [(n, t, own) for n, t, own in named if not isinstance(t, fx.Proxy)]
        self.named = {n: t for n, t, is_attribute in self._tensors if is_attribute}
        """The tensors in attributes of modules, by qualified name."""
        self._places = [(n, t, _place(t)) for n, t, _ in self._tensors]
        self._by_storage: dict[int, list[tuple[str, Tensor, bool]]] = {}
        for entry in self._tensors:
            address = _storage(entry[1])
            if address:
                self._by_storage.setdefault(address, []).append(entry)

    def entries(self, module: nn.Module, kind: str) -> dict[str, Any]:
        """The parameters, buffers or plain attributes of a module before the step."""
        kinds: dict[str, dict[nn.Module, dict[str, Any]]] = {
            "parameter": self.parameters,
            "buffer": self.buffers,
            "attribute": self._attributes,
        }
        return kinds[kind][module]

    def refuse_replaced_data(self) -> None:
        """Refuse a step that assigned `.data` of a tensor."""
        for name, tensor, place in self._places:
            if _place(tensor) != place:
                raise data_refusal(f"`{name}`")

    def _known(self, tensor: Tensor) -> list[tuple[str, Tensor, bool]]:
        return self._by_storage.get(_storage(tensor), [])

    def is_of_model(self, tensor: Tensor) -> bool:
        """Whether the memory of a tensor belongs to the model."""
        return bool(self._known(tensor))

    def name_of(self, tensor: Tensor) -> str:
        """The name of the tensor of the model with this memory."""
        return self._known(tensor)[0][0]

    def owner_of(self, tensor: Tensor) -> Tensor | None:
        """The tensor in an attribute of a module with this memory; the tensor itself if an attribute stores it."""
        stored = [t for _, t, is_attribute in self._known(tensor) if is_attribute]
        return tensor if any(t is tensor for t in stored) else next(iter(stored), None)

    def attribute_of(self, tensor: Tensor) -> str | None:
        """The name of the attribute that stores a tensor with this memory; None for one in a container."""
        return next((name for name, _, is_attribute in self._known(tensor) if is_attribute), None)

    def sharing_memory_with(self, tensor: Tensor) -> Iterator[str]:
        """The names of other tensors with the memory of a tensor."""
        for name, other, _ in self._known(tensor):
            if other is not tensor:
                yield name


class _InPlaceWrites(TorchDispatchMode):
    """Detects operations that write to tensors of the model while the step's code runs."""

    def __init__(self, changes: StepChanges, tracer: StepTracer, before: _Contents) -> None:
        super().__init__()
        self.changes, self.tracer, self.before = changes, tracer, before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.tracer.is_evaluating:
            for tensor in written_tensors(func, args, kwargs or {}):
                if self.before.is_of_model(tensor):
                    self.changes.add_written(self.before, tensor)
        return func(*args, **(kwargs or {}))


def modules_with(model: nn.Module, changes: Iterable[ChangedTensor]) -> set[nn.Module]:
    """The modules that store a changed tensor, and the modules around them."""
    holders = {m for c in changes for m in (c.module, *(holder for holder, _, _ in c.holders))}
    return {module for module in model.modules() if not holders.isdisjoint(module.modules())} if holders else set()


def _refusal(what: str, where: str, why: str, hint: str) -> CaptureError:
    return CaptureError("SNNFX206", what, where=where, why=why, hint=hint)


def _updates_statistics(node: Node) -> bool:
    name, default = ("use_input_stats", True) if node.target is functional.instance_norm else ("training", False)
    return bool(node.kwargs.get(name, node.args[5] if len(node.args) > 5 else default))


def _registries(module: nn.Module) -> dict[Any, dict[str, Any]]:
    return {"parameter": module._parameters, "buffer": module._buffers, "attribute": module.__dict__}


def _storage(tensor: Tensor) -> int:
    has_memory = tensor.layout == torch.strided and not tensor.is_meta and not isinstance(tensor, FakeTensor)
    return tensor.untyped_storage().data_ptr() if has_memory else 0


def _place(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.layout != torch.strided or tensor.is_nested:
        return ()
    return _storage(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()

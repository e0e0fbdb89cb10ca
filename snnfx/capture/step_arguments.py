"""The arguments of one step: what is given, what is known of it, and which of it is state."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from snnfx.capture.attribute_slots import is_number, recorded
from snnfx.capture.input_output_checks import refuse_inputs
from snnfx.capture.proxy import StepProxy
from snnfx.capture.tracer import ArgumentLeaf
from snnfx.errors import CaptureError, InputError
from snnfx.ir.program import InputLeaf
from snnfx.sandbox.torch_internals import FakeTensorMode, pytree
from snnfx.sandbox.user_code import location_of_forward
from snnfx.state.carry import CarriedArgument, OutputPath, SlotName, output_at, split_arguments

__all__ = ["CarriedLeaf", "as_call", "carried_arguments", "carried_output", "step_arguments"]


@dataclass
class CarriedLeaf:
    """An argument that is carried, while it is captured.

    `structure` is found by the trace that starts from None; or it is that of an example, if `required`, whose values
    are in `examples` by slot.
    """

    name: str
    path: OutputPath
    required: bool = False
    structure: Any = None
    examples: dict[str, Any] = field(default_factory=dict)
    numbers: set[str] = field(default_factory=set)

    def argument(self) -> CarriedArgument:
        return CarriedArgument(self.name, self.path, self.structure, self.required)

    def take(self, value: Any, slot_values: dict[str, Any]) -> None:
        """Note down the next value of the argument: its structure, and the value of each slot."""
        flat, spec = pytree.tree_flatten_with_path(pytree.tree_map(_spread, value))
        structure: list[Any] = []
        for path, leaf in flat:
            if isinstance(leaf, StepProxy | Tensor) or (is_number(leaf) and not isinstance(leaf, bool)):
                structure.append(SlotName(".".join([self.name, *map(_key_of, path)])))
                slot_values[structure[-1].name] = leaf
                if not isinstance(leaf, StepProxy | Tensor):
                    self.numbers.add(structure[-1].name)
            else:
                structure.append(leaf)
        after = pytree.tree_unflatten(structure, spec)
        if self.required and self.structure is not None and after != self.structure:
            raise InputError(
                "SNNFX308",
                f"the example of the state `{self.name}` is nested in another way than what one step returns",
                hint="Give it as one step returns it.",
            )
        self.structure = after


def _spread(value: Any) -> Any:
    """A recorded value that is known to be a tuple, as a tuple of recorded values."""
    known = recorded(value)
    if isinstance(known, tuple | list):
        elements = [_spread(value[index]) for index in range(len(known))]
        return type(known)(*elements) if hasattr(known, "_fields") else type(known)(elements)
    return value


def _key_of(key: Any) -> str:
    """What one entry of a pytree path is called."""
    return str(getattr(key, "idx", getattr(key, "key", getattr(key, "name", None))))


def carried_arguments(
    model: nn.Module,
    entry: str,
    example_inputs: Any,
    carry: Mapping[str, OutputPath],
    fake_mode: FakeTensorMode | None,
) -> list[CarriedLeaf]:
    """The arguments to be carried, with the structure of those for which there is an example and no default."""
    if not carry:
        return []
    parameters = {p.name: p for p in list(inspect.signature(getattr(type(model), entry)).parameters.values())[1:]}
    args, kwargs = as_call(example_inputs)
    _, _, examples = split_arguments(list(parameters.values()), list(carry), args, kwargs)
    found = []
    for name, path in carry.items():
        if name not in parameters:
            raise InputError(
                "SNNFX309",
                f"carry: {type(model).__name__}.{entry} has no argument `{name}`",
                hint=f"Its arguments are {', '.join(parameters)}.",
            )
        carried = CarriedLeaf(name, path)
        if examples.get(name) is not None and parameters[name].default is not None:
            carried.required = True
            carried.take(examples[name], carried.examples)
            carried.examples = {
                slot: fake_mode.from_tensor(value.detach(), static_shapes=True)
                for slot, value in carried.examples.items()
                if isinstance(value, Tensor) and fake_mode is not None
            }
        found.append(carried)
    return found


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`example_inputs` as `(args, kwargs)`."""
    if example_inputs is None:
        return (), {}
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    if not isinstance(example_inputs, Tensor | tuple | list):
        raise InputError(
            "SNNFX305",
            f"example_inputs is a {type(example_inputs).__name__}",
            hint="Give what ONE call takes: a tensor, a tuple of arguments, or a dict of keyword arguments.",
        )
    return ((example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)), {}


def step_arguments(
    model: nn.Module, entry: str, example_inputs: Any, fake_mode: FakeTensorMode | None, carried: tuple[str, ...] = ()
) -> tuple[Any, list[InputLeaf], pytree.TreeSpec]:
    """`((args, kwargs) with ArgumentLeaf in place of tensors, leaves, spec)`, without the carried arguments."""
    signature = inspect.signature(getattr(type(model), entry))
    parameters = list(signature.parameters.values())[1:]
    if example_inputs is None:
        names = []
        for p in parameters:
            if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) or p.name in carried:
                continue
            if p.default is p.empty:
                behind = any(q.name in carried for q in parameters[: parameters.index(p)])
                names.append((p.name, behind or p.kind is p.KEYWORD_ONLY))
        if not names:
            raise CaptureError(
                "SNNFX211",
                f"{type(model).__name__}.{entry} has no required arguments",
                where=location_of_forward(model, entry),
                why=f"its signature is {entry}{signature}.",
                hint="Pass example_inputs=(x, ...) with what one step takes.",
            )
        given: tuple[tuple[Any, ...], dict[str, Any]] = (
            tuple(_UnknownInput(n) for n, keyword in names if not keyword),
            {n: _UnknownInput(n) for n, keyword in names if keyword},
        )
    else:
        given = split_arguments(parameters, carried, *as_call(example_inputs))[:2]
    try:
        bound = signature.bind(model, *given[0], **given[1], **dict.fromkeys(carried))
    except TypeError as error:
        raise InputError(
            "SNNFX307",
            f"example_inputs does not fit {type(model).__name__}.{entry}{signature}",
            why=f"{error}.",
            hint="It has to be what ONE call takes: a tensor, a tuple of arguments, or a dict of keyword arguments.",
        ) from error
    del bound
    flat, spec = pytree.tree_flatten_with_path(given)
    names_in_order = [p.name for p in parameters]
    others = [(_leaf_name(path, names_in_order), v) for path, v in flat if not isinstance(v, Tensor | _UnknownInput)]
    refuse_inputs(others, location_of_forward(model, entry))
    leaves: list[InputLeaf] = []
    arguments: list[Any] = []
    for path, value in flat:
        name = _leaf_name(path, names_in_order)
        if isinstance(value, Tensor | _UnknownInput):
            fake: tuple[Any, ...] = ()
            if isinstance(value, Tensor):
                assert fake_mode is not None
                fake = (fake_mode.from_tensor(value.detach(), static_shapes=True),)
            arguments.append(ArgumentLeaf(name, len(leaves), *fake))
            leaves.append(InputLeaf(name, name.replace(".", "_")))
        else:
            arguments.append(value)
            leaves.append(InputLeaf(name, None, value))
    if not any(leaf.placeholder for leaf in leaves):
        raise InputError("SNNFX305", "example_inputs holds no tensor", hint="Pass what one call of the model takes.")
    return pytree.tree_unflatten(arguments, spec), leaves, spec


class _UnknownInput:
    """An argument of which only the name is known."""

    def __init__(self, name: str) -> None:
        self.name = name


def _leaf_name(path: tuple[Any, ...], parameters: list[str]) -> str:
    """`x`, or `x.0.key` for nested arguments."""
    keys: list[Any] = [getattr(k, "idx", getattr(k, "key", getattr(k, "name", None))) for k in path]
    if keys[0] == 0:
        position = int(keys[1])
        first = parameters[position] if position < len(parameters) else f"arg{position}"
        # *args all share one parameter name
        if (
            parameters
            and position >= len(parameters) - 1
            and position > 0
            and first == parameters[-1]
            and len(parameters) <= position
        ):
            first = f"{first}{position}"
    else:
        first = str(keys[1])
    return ".".join([first, *(str(k) for k in keys[2:])])


def carried_output(model: nn.Module, outputs: Any, carried: CarriedLeaf) -> Any:
    try:
        return output_at(outputs, carried.path)
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            "SNNFX309",
            f"carry: the outputs of a step of {type(model).__name__} have nothing at {carried.path}",
            why=f"`{carried.name}` should be carried from there.",
            hint="Give the index of the next state in what the step returns.",
        ) from error

"""The arguments of one step: inputs, their example values, and carried state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from snnfx.capture.attribute_slots import is_number, recorded
from snnfx.capture.input_output_checks import refuse_inputs
from snnfx.capture.proxy import StepProxy
from snnfx.capture.tracer import ArgumentLeaf
from snnfx.errors import CaptureError, InputError
from snnfx.ir.program import InputLeaf
from snnfx.sandbox.dense_inputs import not_a_dense_tensor
from snnfx.sandbox.pytree_paths import flatten_with_path
from snnfx.sandbox.torch_internals import FakeTensorMode, pytree
from snnfx.sandbox.user_code import location_of_forward, step_signature
from snnfx.state.carry import CarriedArgument, OutputPath, SlotName, output_at, split_arguments

__all__ = ["CarriedLeaf", "as_call", "carried_arguments", "carried_output", "step_arguments"]


@dataclass
class CarriedLeaf:
    """A carried argument during capture.

    The cold trace, which starts from None, determines `structure`. If the argument is `required`, its example does, and
    `examples` has the example value of each slot.
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
        """Record the next value of the argument: its structure, and the value of each slot."""
        flat, spec = flatten_with_path(pytree.tree_map(_unpack, value))
        structure: list[Any] = []
        for path, leaf in flat:
            if isinstance(leaf, StepProxy | Tensor) or (is_number(leaf) and not isinstance(leaf, bool)):
                structure.append(SlotName(".".join([self.name, *map(_key_of, path)])))
                slot_values[structure[-1].name] = leaf
                if not isinstance(leaf, StepProxy | Tensor):
                    self.numbers.add(structure[-1].name)
            else:
                structure.append(leaf)
        next_structure = pytree.tree_unflatten(structure, spec)
        if self.required and self.structure is not None and next_structure != self.structure:
            raise InputError(
                "SNNFX308",
                f"the example for the state `{self.name}` and the state that one step returns differ in structure",
                hint="Pass an example with the structure that one step returns.",
            )
        self.structure = next_structure


def _unpack(value: Any) -> Any:
    """Unpack a recorded value that is known to be a tuple into a tuple of recorded values."""
    example = recorded(value)
    if isinstance(example, tuple | list):
        elements = [_unpack(value[index]) for index in range(len(example))]
        return type(example)(*elements) if hasattr(example, "_fields") else type(example)(elements)
    return value


def _key_of(key: Any) -> str:
    """The name of one entry of a pytree path."""
    return str(getattr(key, "idx", getattr(key, "key", getattr(key, "name", None))))


def carried_arguments(
    model: nn.Module,
    entry: str,
    example_inputs: Any,
    carry: Mapping[str, OutputPath],
    fake_mode: FakeTensorMode | None,
) -> list[CarriedLeaf]:
    """The carried arguments; those with an example and without a default have their structure."""
    if not carry:
        return []
    parameters = dict(step_signature(model, entry).parameters)
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
            hint="Pass the inputs of ONE call: a tensor, a tuple of arguments, or a dict of keyword arguments.",
        )
    if isinstance(example_inputs, PackedSequence):
        raise not_a_dense_tensor("example_inputs", example_inputs)
    return ((example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)), {}


def step_arguments(
    model: nn.Module, entry: str, example_inputs: Any, fake_mode: FakeTensorMode | None, carried: tuple[str, ...] = ()
) -> tuple[Any, list[InputLeaf], pytree.TreeSpec]:
    """The arguments of one step without the carried ones.

    Returns:
        `((args, kwargs) with an ArgumentLeaf for each tensor, leaves, spec)`.
    """
    signature = step_signature(model, entry)
    parameters = list(signature.parameters.values())
    if example_inputs is None:
        names = []
        for p in parameters:
            if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) or p.name in carried:
                continue
            if p.default is p.empty:
                follows_carried = any(q.name in carried for q in parameters[: parameters.index(p)])
                names.append((p.name, follows_carried or p.kind is p.KEYWORD_ONLY))
        if not names:
            raise CaptureError(
                "SNNFX211",
                f"{type(model).__name__}.{entry} has no required arguments",
                where=location_of_forward(model, entry),
                why=f"its signature is {entry}{signature}.",
                hint="Pass example_inputs=(x, ...) with the inputs of one step.",
            )
        call: tuple[tuple[Any, ...], dict[str, Any]] = (
            tuple(_UnknownInput(n) for n, keyword in names if not keyword),
            {n: _UnknownInput(n) for n, keyword in names if keyword},
        )
    else:
        call = split_arguments(parameters, carried, *as_call(example_inputs))[:2]
    try:
        signature.bind(*call[0], **call[1], **dict.fromkeys(carried))
    except TypeError as error:
        raise InputError(
            "SNNFX307",
            f"example_inputs does not match {type(model).__name__}.{entry}{signature}",
            why=f"{error}.",
            hint="Pass the inputs of ONE call: a tensor, a tuple of arguments, or a dict of keyword arguments.",
        ) from error
    flat, spec = flatten_with_path(call)
    for path, value in flat:
        if isinstance(value, PackedSequence) or (isinstance(value, Tensor) and value.is_nested):
            raise not_a_dense_tensor(_leaf_name(path, [p.name for p in parameters]), value)
    names_in_order = [p.name for p in parameters]
    constants = [(_leaf_name(path, names_in_order), v) for path, v in flat if not isinstance(v, Tensor | _UnknownInput)]
    refuse_inputs(constants, location_of_forward(model, entry))
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
        raise InputError(
            "SNNFX305", "example_inputs contains no tensor", hint="Pass the inputs of one call of the model."
        )
    return pytree.tree_unflatten(arguments, spec), leaves, spec


class _UnknownInput:
    """An argument without an example value."""

    def __init__(self, name: str) -> None:
        self.name = name


def _leaf_name(path: tuple[Any, ...], parameters: list[str]) -> str:
    """The name of an input leaf: `x`, or `x.0.key` for nested arguments."""
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
    """Select the next value of a carried argument from the outputs of a step."""
    try:
        return output_at(outputs, carried.path)
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            "SNNFX309",
            f"carry: the outputs of a step of {type(model).__name__} have no element at {carried.path}",
            why=f"carry= names it as the next value of `{carried.name}`.",
            hint="Pass the index of the next state in the outputs of the step.",
        ) from error

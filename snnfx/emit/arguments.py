"""Bind the arguments of a call to the inputs of the captured step, and move time to dimension 0."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from snnfx.emit.bounded_cache import BoundedCache
from snnfx.emit.state_shapes import shapes_of_state
from snnfx.errors import InputError
from snnfx.ir.facts import VALUE
from snnfx.ir.options import ConvertOptions
from snnfx.ir.program import StepProgram
from snnfx.ops.sequence_functions import move_time
from snnfx.sandbox.dense_inputs import not_a_dense_tensor
from snnfx.sandbox.torch_internals import pytree
from snnfx.sandbox.user_code import step_signature
from snnfx.state.carry import flatten_state, split_arguments

__all__ = ["Arguments", "PlannedInput", "signature_of"]

MOST_STATE_SHAPES = 64
"""The most input shapes for which the shapes of the state are cached."""


class Arguments:
    """The arguments and the state of calls in one mode.

    Args:
        program: the step program of the mode.
        time_dims: the time dimension of each leaf of the arguments; None for a leaf that is the same at every step.
        options: the options of the conversion.
    """

    def __init__(self, program: StepProgram, time_dims: Sequence[int | None], options: ConvertOptions) -> None:
        self.program, self.options = program, options
        self.time_dims = list(time_dims)
        pairs = list(zip(self.time_dims, program.input_leaves, strict=True))
        self.tensor_dims = [dim for dim, leaf in pairs if leaf.placeholder is not None]
        """The time dimension of each tensor input; None: the input has none."""
        self.varying = [dim is not None for dim in self.tensor_dims]
        self._tensor_names = [leaf.name for leaf in program.input_leaves if leaf.placeholder is not None]
        self.planned = [PlannedInput.of(program, leaf.placeholder, dim) for dim, leaf in pairs if leaf.placeholder]
        count = len(program.input_leaves)
        positional = pytree.tree_structure(((0,) * count, {})) == program.input_spec
        self.is_plain = positional and all(leaf.placeholder is not None for leaf in program.input_leaves)
        self._state_shapes: BoundedCache[dict[str, tuple[int, ...]]] = BoundedCache(MOST_STATE_SHAPES)
        self.output_time_dim = options.time_dim if isinstance(options.time_dim, int) else 0
        signature = step_signature(program.source, options.entry) if program.carried else None
        self._parameters = list(signature.parameters.values()) if signature is not None else []

    @property
    def is_time_first(self) -> bool:
        """Whether a call takes only tensors, and time is first in some of them and in the outputs."""
        return self.is_plain and any(self.varying) and self.output_time_dim == 0 and not any(self.tensor_dims)

    def split_carried(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
        """Split the arguments of a call into `(args, kwargs, carried arguments by name)`."""
        if not self.program.carried:
            return args, kwargs, {}
        return split_arguments(self._parameters, [c.name for c in self.program.carried], args, kwargs)

    @property
    def positional_inputs(self) -> int:
        """The number of tensors of a call that belong to positional arguments."""
        args, _ = pytree.tree_unflatten(list(range(len(self.program.input_leaves))), self.program.input_spec)
        return sum(self.program.input_leaves[i].placeholder is not None for i in pytree.tree_leaves(args))

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors for the placeholders of the step.

        Raises:
            InputError: the arguments are not nested as at capture (SNNFX307), or an input is not a tensor (SNNFX305).
        """
        is_plain = self.is_plain and not kwargs and len(args) == len(self.tensor_dims)
        if is_plain and all(isinstance(x, Tensor) and not x.is_nested for x in args):
            return list(args)
        flat, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.program.input_spec:
            flat = self._bind_by_name(args, kwargs)
        tensors: list[Tensor] = []
        for leaf, value in zip(self.program.input_leaves, flat, strict=True):
            if leaf.placeholder is None:
                if value is not leaf.constant and value != leaf.constant:
                    raise InputError(
                        "SNNFX307",
                        f"the argument `{leaf.name}` is {value!r}, but the step was captured with {leaf.constant!r}",
                        why="arguments that are not tensors are fixed at conversion.",
                        hint="Convert again with this value in example_inputs.",
                    )
            elif not isinstance(value, Tensor) or value.is_nested:
                raise not_a_dense_tensor(leaf.name, value)
            else:
                tensors.append(value)
        return tensors

    def _bind_by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Bind arguments passed by keyword that were captured by position, or the other way round."""
        program = self.program
        expected = pytree.tree_unflatten(list(range(len(program.input_leaves))), program.input_spec)
        names = [leaf.name for leaf in program.input_leaves]
        is_flat = len(expected[0]) + len(expected[1]) == len(names)
        by_name = {**dict(zip([n for n in names if n not in kwargs], args, strict=False)), **kwargs}
        if is_flat and len(args) + len(kwargs) == len(names) and set(by_name) == set(names):
            return [by_name[name] for name in names]
        nested_args, nested_kwargs = pytree.tree_unflatten(names, program.input_spec)
        shown = [*map(str, nested_args), *(f"{name}={value}" for name, value in nested_kwargs.items())]
        structure = ", ".join(shown).replace("'", "")
        raise InputError(
            "SNNFX307",
            "the arguments do not match the captured step",
            why=f"the step takes ({structure}).",
            hint="Pass the inputs of one step, each with a time dimension, or convert with other example_inputs.",
        )

    def time_first(self, leaves: Sequence[Tensor], T: int | None) -> tuple[list[Tensor], int]:
        """Move time to dimension 0 of each sequence: `(tensors, T)`.

        Raises:
            InputError: SNNFX301, 303, 306, 309 or 310, the inputs do not have one common number of time steps.
        """
        moved: list[Tensor] = []
        if T is not None and (isinstance(T, bool) or not isinstance(T, int | torch.SymInt)):
            raise InputError("SNNFX309", f"T={T!r} is not a number of time steps", hint="Pass an int above 0.")
        for name, dim, x in zip(self._tensor_names, self.tensor_dims, leaves, strict=True):
            if dim is None:
                moved.append(x)
                continue
            if x.dim() == 0 or not -x.dim() <= dim < x.dim():
                raise InputError(
                    "SNNFX306",
                    f"the input `{name}` has shape {list(x.shape)}",
                    why=f"it has no dimension {dim}, its time_dim.",
                    hint="Pass a sequence, [T, N, ...].",
                )
            moved.append(x if dim == 0 else x.movedim(dim, 0))
            length = moved[-1].shape[0]
            if T is None:
                T = length
            elif length != T:
                raise InputError("SNNFX303", f"the input `{name}` has {length} time steps, others have {T}")
        if T is None:
            raise InputError(
                "SNNFX310", "no input has a time dimension", hint="Pass the number of time steps: net(x, T=8)."
            )
        if T < 1:
            raise InputError("SNNFX301", "the sequence has no time steps")
        return moved, T

    def check_time_first(self, T: Any, sequences: Sequence[Any], call: str) -> None:
        """Check that each tensor input is a sequence of T time steps, time first.

        Args:
            T: the number of time steps.
            sequences: one sequence for each tensor input.
            call: the method of the net to name in errors, for example "recompute_plan".

        Raises:
            InputError: SNNFX301, 303, 305, 306, 307 or 309.
        """
        names = ", ".join(self._tensor_names)
        hint = f"Call net.{call}(T, {names}): the number of time steps, then the inputs of a call, time first."
        if isinstance(T, bool) or not isinstance(T, int):
            raise InputError("SNNFX309", f"T is a {type(T).__name__}, not an int", hint=hint)
        if T < 1:
            raise InputError("SNNFX301", f"the sequence has T={T} time steps", hint="Pass at least one time step.")
        if len(sequences) != len(self.tensor_dims):
            what = f"net.{call} got {len(sequences)} inputs"
            raise InputError("SNNFX307", what, why=f"the net takes ({names}).", hint=hint)
        for name, varies, x in zip(self._tensor_names, self.varying, sequences, strict=True):
            if not isinstance(x, Tensor) or x.is_nested:
                raise not_a_dense_tensor(name, x)
            if varies and x.dim() == 0:
                raise InputError("SNNFX306", f"the input `{name}` has shape []", hint=hint)
            if varies and x.shape[0] != T:
                raise InputError("SNNFX303", f"the input `{name}` has {x.shape[0]} time steps, T is {T}", hint=hint)

    def time_back(self, y: Any) -> Any:
        """An output with time moved from dimension 0 to the time dimension of the caller."""
        if self.output_time_dim == 0 or self.options.reduce is not None:
            return y
        return move_time(y, self.output_time_dim)

    def at_step(self, leaves: Sequence[Tensor], step: int) -> list[Tensor]:
        """The inputs of one time step, from inputs with time first."""
        return [x[step] if v else x for x, v in zip(leaves, self.varying, strict=True)]

    def from_step(self, leaves: Sequence[Tensor], step: int) -> list[Tensor]:
        """The inputs from a time step to the last, from inputs with time first."""
        return [x[step:] if v else x for x, v in zip(leaves, self.varying, strict=True)]

    def arguments_of(self, leaves: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inverse of `bind`: `(args, kwargs)` of the model, from one tensor for each placeholder."""
        tensors = iter(leaves)
        values = [next(tensors) if leaf.placeholder else leaf.constant for leaf in self.program.input_leaves]
        return pytree.tree_unflatten(values, self.program.input_spec)  # type: ignore[no-any-return]

    def batch_sizes(self, leaves: Sequence[Tensor]) -> dict[str, int]:
        """The batch size of each tensor input, by name: the size of the first dimension of one step."""
        pairs = zip(self._tensor_names, self.at_step(leaves, 0), strict=True)
        return {name: x.shape[0] for name, x in pairs if x.dim() > 0}

    def covered(self, leaves: Sequence[Tensor]) -> bool:
        """Whether the plan covers inputs (time first) of these ranks and batch sizes."""
        batch_size: Any = None
        for planned, x in zip(self.planned, leaves, strict=True):
            rank = x.dim()
            if rank < planned.least_rank or (planned.rank is not None and rank != planned.rank):
                return False
            if planned.batch_dim is not None:
                size = x.shape[planned.batch_dim]
                if batch_size is not None and size != batch_size:
                    return False
                batch_size = size
        return True

    def check_ranks(self, leaves: Sequence[Tensor], *, time_first: bool = True) -> None:
        """Check that the inputs have the ranks of the example inputs of `snnfx.convert`.

        Args:
            leaves: one tensor for each placeholder.
            time_first: the inputs are sequences with time first; otherwise they are the inputs of one step.

        Raises:
            InputError: SNNFX325, an input has another rank than in `example_inputs`.
        """
        for name, planned, varies, x in zip(self._tensor_names, self.planned, self.varying, leaves, strict=True):
            time = ["T"] if varies and time_first else []
            example = planned.example_shape
            if example is None or x.dim() == len(time) + len(example):
                continue
            steps = "for each time step" if varies else "and no time dimension"
            raise InputError(
                "SNNFX325",
                f"the input `{name}` has shape {list(x.shape)}",
                why=f"the model was converted with example_inputs, where it has {len(example)} dimensions {steps}, "
                f"like [{', '.join([*time, *map(str, example)])}].",
                hint=f"Pass `{name}` with {len(time) + len(example)} dimensions, or convert the model again with "
                "example_inputs like one step of this input.",
            )

    def plan_key(self, leaves: Sequence[Tensor]) -> tuple[Any, ...]:
        """The rank of each input (time first), and which of the batch dimensions are equal; never T."""
        ranks = tuple([x.dim() for x in leaves])
        times = [1 if varies else 0 for varies in self.varying]
        sizes = [x.shape[time] if x.dim() > time else None for x, time in zip(leaves, times, strict=True)]
        if len({size for size in sizes if size is not None}) < 2:
            return ranks, None
        # A batch of 1 broadcasts, so that it differs in kind from other unequal batches.
        return ranks, tuple([size if size is None or size == 1 else -1 - sizes.index(size) for size in sizes])

    # -- state ----------------------------------------------------------------------------------------------------

    def check_state(self, state: dict[str, Any] | None) -> None:
        """Raise InputError (SNNFX308) if the slots of a state are not the slots of the program."""
        if state is None:
            return
        expected = {slot.name for slot in self.program.slots}
        # A persistent slot starts from the model if the state has no value for it.
        required = {slot.name for slot in self.program.slots if not slot.persistent}
        if set(state) - expected or (required - set(state) and not self.program.carried):
            missing, unknown = sorted(required - set(state)), sorted(set(state) - expected)
            raise InputError(
                "SNNFX308",
                "the state does not have the slots of the net",
                why=f"missing {missing}, unknown {unknown}.",
                hint="Pass the state that net.run returned, or None for the reset state.",
            )

    def check_shapes(self, state: Mapping[str, Any], steps: Sequence[Tensor]) -> None:
        """Raise InputError (SNNFX308) if a state does not broadcast to the shape of the next state.

        Args:
            state: the state by slot.
            steps: the inputs of one step.
        """
        if torch.compiler.is_compiling():
            return
        key = tuple((tuple(x.shape), x.dtype) for x in steps)
        shapes = self._state_shapes.get_or_make(key, partial(shapes_of_state, self.program, steps))
        for name, shape in shapes.items():
            value = state.get(name)
            if isinstance(value, Tensor) and not _broadcasts(tuple(value.shape), shape):
                raise InputError(
                    "SNNFX308",
                    f"the state `{name}` has shape {list(value.shape)}, but a step on these inputs needs {list(shape)}",
                    why="it belongs to another batch or another model.",
                    hint="Pass the state that net.run returned for these samples, or None for the reset state.",
                )

    def first_state(self, state: dict[str, Any] | None, given: dict[str, Any]) -> dict[str, Any] | None:
        """The state before the first step, with the carried arguments that the caller passed."""
        for argument in self.program.carried:
            value = given.get(argument.name)
            if value is not None:
                state = {**(state or {}), **flatten_state(argument, value)}
            elif argument.required and not set(argument.slot_names()) <= set(state or {}):
                raise InputError(
                    "SNNFX308",
                    f"the initial value of `{argument.name}` is missing",
                    why="the argument has no default, and example_inputs contained it.",
                    hint=f"Pass it as an argument: net(x_seq, {argument.name}=...).",
                )
        first_step_is_separate = self.options.step_mode == "s" or self.program.first_step is not None
        missing = {slot.name for slot in self.program.slots if not slot.persistent} - set(state or {})
        if state is not None and missing and first_step_is_separate:
            raise InputError(
                "SNNFX308",
                f"the state is incomplete, {', '.join(sorted(missing))} is missing",
                why="the net runs the first step separately, which needs the value of every slot or of none.",
                hint="Pass the complete state that net.run returned, or None for the reset state.",
            )
        return state


@dataclass(frozen=True)
class PlannedInput:
    """The ranks and the batch dimension of a tensor input that the plan covers, time included.

    Args:
        least_rank: the least number of dimensions.
        rank: the number of dimensions; None: any number from `least_rank` on.
        batch_dim: the batch dimension that the inputs share; None: the input has no batch.
        example_shape: the shape of one step in `example_inputs`; None without.
    """

    least_rank: int
    rank: int | None
    batch_dim: int | None
    example_shape: tuple[int, ...] | None = None

    @staticmethod
    def of(program: StepProgram, placeholder: str, time_dim: int | None) -> PlannedInput:
        time = 0 if time_dim is None else 1
        rank = program.input_ranks.get(placeholder)
        example = VALUE.of(program.nodes_by_name[placeholder]) if rank is not None else None
        return PlannedInput(
            program.requirements.get(placeholder, 0) + time,
            None if rank is None else rank + time,
            time if placeholder in program.batched_inputs else None,
            None if example is None else tuple(example.shape),
        )


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether a tensor of a shape broadcasts to shape `to`."""
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(size in (1, expected) for size, expected in pairs)


def signature_of(program: StepProgram | None) -> inspect.Signature:
    """The signature of a net's `forward`: the arguments of the captured step, by name, and `T`."""
    self_parameter = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    T = inspect.Parameter("T", inspect.Parameter.KEYWORD_ONLY, default=None)
    if program is None:
        return inspect.Signature([self_parameter, T])
    leaves = program.input_leaves
    numbered = pytree.tree_unflatten(list(range(len(leaves))), program.input_spec)
    arguments = [*numbered[0], *numbered[1].values()]
    names = [leaves[min(pytree.tree_leaves(a), default=0)].name.partition(".")[0] for a in arguments]
    if len(set(names)) != len(names) or not all(n.isidentifier() and n not in ("self", "T") for n in names):
        args = inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)
        return inspect.Signature([self_parameter, args, T, inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)])
    positional = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
    positional += [
        inspect.Parameter(c.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for c in program.carried
    ]
    return inspect.Signature([self_parameter, *positional, T])

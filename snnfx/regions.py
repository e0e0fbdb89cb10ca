"""What a converted net runs for a region: graphs of one step that take their modules and parameters as arguments.

A region has no parameters of its own, so the keys of the net's state_dict stay those of the model. Called directly it
computes one step (or, folded, a large batch). For whole sequences it offers `multi_step` or `map_steps`, which
`snnfx.functional` uses: eagerly a Python loop or torch.vmap, under torch.compile one opaque operator, so that the
compiled program does not depend on T.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from snnfx.errors import InputError, PassError, warn_once
from snnfx.step_batch_norm import normalize_steps
from snnfx.tensor_layout import stack_in_layout, unbind_in_layout

if TYPE_CHECKING:
    from snnfx.kernels.region import RegionKernels

__all__ = [
    "LoopRegion",
    "MapRegion",
    "RegionGraph",
    "batch_norm_per_step",
    "buffers_of",
    "call_module",
    "call_once",
    "delay_one_step",
    "hold_over_time",
    "in_shape_of",
    "pick_state",
    "reduce_over_time",
    "region_of_handle",
    "repeat_for_samples",
    "repeat_over_time",
    "tensors_of",
    "time_steps",
    "times_steps",
]

_handles: weakref.WeakValueDictionary[str, SequenceRegion] = weakref.WeakValueDictionary()
_counter = itertools.count()


class RegionGraph(fx.GraphModule):
    """The graph of one step of a region; placeholders are its constants, its step inputs and, in loops, its state."""

    def without_dead_code(self) -> RegionGraph:
        """The same graph without the nodes that no result needs; nothing in a region graph has side effects."""
        needed = {self.graph.output_node()}
        for node in reversed(self.graph.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
            elif node.op != "placeholder":
                self.graph.erase_node(node)
        self.recompile()
        return self


class SequenceRegion(nn.Module):
    """A region that runs over a whole sequence and can be named by a handle, so that an operator can find it."""

    def __init__(self, label: str, step: RegionGraph) -> None:
        super().__init__()
        self.label = label
        self.step = step
        self.handle = f"{label}#{next(_counter)}"
        self.resolve: Callable[[str], Any] | None = None
        self.constant_targets: list[str | None] = []
        self.output_count = 0
        self.slot_count = 0
        _handles[self.handle] = self

    def bind(self, resolve: Callable[[str], Any], constant_targets: Sequence[str | None], output_count: int) -> None:
        """Say where the modules among the constants are found when only their tensors are at hand."""
        self.__dict__["resolve"] = resolve
        self.constant_targets = list(constant_targets)
        self.output_count = output_count

    def runs_as_operator(self, constants: Sequence[Any]) -> bool:
        """Under torch.compile, unless a module in it changes its buffers: then the loop is unrolled."""
        return torch.compiler.is_compiling() and not any(
            isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training
            for c in constants
            if isinstance(c, nn.Module)
            for m in c.modules()
        )


class LoopRegion(SequenceRegion):
    """A strongly connected component, stepped over time.

    Args:
        label: qualified name for messages.
        step: `(*constants, *inputs, state) -> (outputs, state)`.
        first: `(*constants, *inputs) -> (outputs, state)`: the step from the reset state, None if there is no state.
    """

    def __init__(self, label: str, step: RegionGraph, first: RegionGraph | None) -> None:
        super().__init__(label, step)
        self.first = first
        self.kernels: RegionKernels | None = None

    def forward(self, *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """One step: `(*constants, *inputs, state)`, where state None means the reset state."""
        *rest, state = arguments
        if state is None and self.first is not None:
            return self.first(*rest)  # type: ignore[no-any-return]
        return self.step.forward(*rest, state)  # type: ignore[no-any-return]

    def multi_step(
        self, x_seq: tuple[Tensor, ...], state: tuple[Any, ...] | None, constants: tuple[Any, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """All steps of a sequence: `(outputs [T, *], final state)`."""
        if self.runs_as_operator(constants):
            from snnfx.region_op import run_loop_as_operator

            return run_loop_as_operator(self, x_seq, state, constants)
        done = None if self.kernels is None else self.kernels.run(x_seq, state, constants)
        if done is not None:
            return done
        outputs: list[tuple[Tensor, ...]] = []
        step = self.step.forward  # not step(...): module calls and their wrappers cost more than a small step
        for x in zip(*(unbind_in_layout(x) for x in x_seq), strict=True):
            y, state = self(*constants, *x, None) if state is None else step(*constants, *x, state)
            outputs.append(y)
        return tuple(stack_steps(y, x_seq[0].device) for y in zip(*outputs, strict=True)), state  # type: ignore[return-value]


class MapRegion(SequenceRegion):
    """Parallel in time but not foldable: the step graph under torch.vmap over T.

    Where vmap has no rule for an operation, the steps are run one after the other instead, with one warning.
    """

    def __init__(self, label: str, step: RegionGraph) -> None:
        super().__init__(label, step)
        self.refused_by_vmap = ""

    def forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        """One step: `(*constants, *inputs)`."""
        return self.step(*arguments)  # type: ignore[no-any-return]

    def map_steps(self, x_seq: tuple[Tensor, ...], constants: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """All steps of a sequence at once: outputs `[T, *]`."""
        if self.runs_as_operator(constants):
            from snnfx.region_op import run_map_as_operator

            return run_map_as_operator(self, x_seq, constants)
        return self.map_eagerly(x_seq, constants)

    def map_eagerly(self, x_seq: Sequence[Tensor], constants: Sequence[Any]) -> tuple[Tensor, ...]:
        """torch.vmap, or the steps one by one once vmap has refused."""
        if self.refused_by_vmap:
            return self._one_by_one(x_seq, constants)
        buffers = buffers_of(constants)
        try:
            return torch.vmap(lambda *x: self.step(*constants, *x), randomness="different")(*x_seq)  # type: ignore[no-any-return]
        except (RuntimeError, NotImplementedError) as error:
            for buffer, value in buffers:
                # BatchNorm counts its batch before vmap finds that it has no rule. Past the version counter: an
                # earlier call may have saved the buffer for its backward pass.
                if not torch.equal(buffer, value):
                    buffer.data.copy_(value)
            result = self._one_by_one(x_seq, constants)  # raises if the model itself is at fault
            self.refused_by_vmap = str(error).splitlines()[0]
            warn_once(
                "SNNFX504",
                f"torch.vmap refused the region {self.label} ({self.refused_by_vmap}); its steps run one by one.",
                key=self.handle,
            )
            return result

    def _one_by_one(self, x_seq: Sequence[Tensor], constants: Sequence[Any]) -> tuple[Tensor, ...]:
        steps = [self.step(*constants, *x) for x in zip(*(x.unbind(0) for x in x_seq), strict=True)]
        return tuple(torch.stack(y) for y in zip(*steps, strict=True))


def buffers_of(constants: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
    """The buffers that a step may change, with copies of their values."""
    modules = [m for c in constants if isinstance(c, nn.Module) for m in c.modules() if m.training]
    return [(buffer, buffer.clone()) for m in modules for buffer in m.buffers(recurse=False)]


def tensors_of(constants: Sequence[Any]) -> list[Tensor]:
    """The tensors of a region's constants: parameters and buffers of modules, in their order, and tensors."""
    found: list[Tensor] = []
    for constant in constants:
        if isinstance(constant, nn.Module):
            found.extend(constant.parameters())
            found.extend(constant.buffers())
        elif isinstance(constant, Tensor):
            found.append(constant)
    return found


def region_of_handle(handle: str) -> SequenceRegion:
    """The living region behind a handle.

    Raises:
        PassError: SNNFX503, its net was deleted, or the program was loaded into another process.
    """
    region = _handles.get(handle)
    if region is None:
        raise PassError(
            "SNNFX503",
            f"the region `{handle}` no longer exists",
            why="a compiled or exported program refers to the regions of a living net of the same process.",
            hint="Keep the net alive, or convert and compile again.",
        )
    return region


def stack_steps(steps: Sequence[Any], device: torch.device) -> Tensor:
    """One value at each of T steps as a sequence `[T, *]`.

    State may start as a number, or as a tensor that stands for one of the shape of the later steps; a count stays a
    number at all steps.
    """
    last = steps[-1]
    if not isinstance(last, Tensor):
        if not isinstance(last, bool | int | float | complex):
            raise InputError(
                "SNNFX313",
                f"a module that is stepped as it is returns a {type(last).__name__} at each step",
                why="its outputs are not known to be several.",
                hint="Pass example_inputs, so that it can be traced; or return tensors from the module.",
            )
        # In float64, which as a 0-dimensional value of a step does not change the dtype of what it meets.
        dtype = torch.float64 if any(isinstance(value, float) for value in steps) else None
        return torch.tensor(steps, dtype=dtype, device=device)
    if all(isinstance(value, Tensor) and value.shape == last.shape for value in steps):
        return stack_in_layout(steps)
    return torch.stack(
        [torch.as_tensor(value, dtype=last.dtype, device=last.device).expand_as(last) for value in steps]
    )


def in_shape_of(value: Any, following: Any, slot: str = "", has_batch: bool = False) -> Any:
    """The first value of a slot in the shape of its next value, for which a number or a smaller tensor stands.

    Args:
        value: a number or a tensor.
        following: the value after a step.
        slot: for the message.
        has_batch: the first value has the batch in dim 0: a value of more dimensions is no repetition of it.

    Raises:
        InputError: SNNFX313, the state changes its shape.
    """
    if not isinstance(following, Tensor):
        return value
    if not isinstance(value, Tensor):
        return torch.full_like(following, value)
    sizes = zip(reversed(value.shape), reversed(following.shape), strict=False)
    fits = value.dim() <= following.dim() and all(size in (1, other) for size, other in sizes)
    if not fits or (has_batch and 0 < value.dim() < following.dim()):
        raise InputError(
            "SNNFX313",
            f"the state `{slot}` changes its shape: {list(value.shape)} before the first step, "
            f"{list(following.shape)} after it",
            why="a sequence has values of one shape.",
            hint="Create the state in the shape that it keeps, e.g. torch.zeros_like of what is assigned to it.",
        )
    return value if value.shape == following.shape else value.expand_as(following)


def pick_state(state: dict[str, Any] | None, names: tuple[str, ...]) -> tuple[Any, ...] | None:
    """The values of one region's slots out of the state of the net; None means the reset state."""
    if state is None or not any(name in state for name in names):
        return None
    missing = [name for name in names if name not in state]
    if missing:
        raise InputError(
            "SNNFX308",
            f"the first value of {', '.join(missing)} is missing",
            why=f"it is computed together with {', '.join(name for name in names if name in state)}, which is given.",
            hint="Give all of the state or nothing.",
        )
    return tuple(state[name] for name in names)


def call_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module that is an argument of a region (torch.compile does not follow `operator.call`)."""
    return module(*args, **kwargs)


def call_once(region: Callable[..., Any], constants: tuple[Any, ...]) -> Any:
    """Run a region whose value does not change with time."""
    return region(*constants)


def time_steps(x_seq: Tensor) -> Tensor:
    """The numbers of the time steps of a sequence `[T, *]`: a tensor `[T]`."""
    return torch.arange(x_seq.shape[0], device=x_seq.device)


def reduce_over_time(y_seq: Any, how: str) -> Any:
    """The mean, sum or last step of a sequence `[T, *]`."""
    if not isinstance(y_seq, Tensor):
        return y_seq
    if how == "last":
        return y_seq[-1]
    return y_seq.sum(0) if how == "sum" else y_seq.mean(0)


def times_steps(value: Any, time: Tensor) -> Any:
    """T times a value."""
    return value * time.shape[0]


def repeat_for_samples(value: Tensor, like: Tensor, batch_dim: int) -> Tensor:
    """A value that all samples share, `[*]`, as one for each sample of another, `[N, *]` (a view)."""
    return value.unsqueeze(0).expand(like.shape[batch_dim], *value.shape)


def repeat_over_time(value: Any, time: Tensor) -> Any:
    """A value that is the same at every step as a sequence `[T, *]` (a view, nothing is copied)."""
    if not isinstance(value, Tensor):
        return value
    return value.unsqueeze(0).expand(time.shape[0], *value.shape)


def delay_one_step(
    following: Any,
    state: tuple[Any, ...] | None,
    initial: Any,
    time: Tensor,
    slot: str = "",
    has_batch: bool = False,
) -> Tensor:
    """The sequence of a slot that only hands a value to the next step: `[initial, following[0], ..., [T-2]]`.

    Args:
        following: the next value at each step, `[T, *]`; a number where it is always the same.
        state: a tuple of the value before the first step; None: `initial`.
        initial: a number, or a tensor that can be expanded to `[*]`.
        time: `[T]`.
        slot, has_batch: as for `in_shape_of`.

    Raises:
        InputError: SNNFX313, the state changes its shape.
    """
    first = initial if state is None else state[0]
    if first is None:
        first = 0  # nothing reads more of such a slot than its shape: it is on no cycle, and no value was found for it
    if not isinstance(following, Tensor):
        like = first if isinstance(first, Tensor) else stack_steps((first, following), time.device)[0]
        following = torch.full_like(like, following).expand(time.shape[0], *like.shape)
    first = in_shape_of(first, following[0], slot, has_batch and state is None)
    return torch.cat((first.to(following.dtype).unsqueeze(0), following[:-1]))


def hold_over_time(state: tuple[Any, ...] | None, initial: Any, time: Tensor) -> Tensor:
    """The sequence of a slot that is never written: its first value at every step, `[T, *]` (a view).

    Args:
        state: a tuple of the value before the first step; None: `initial`.
        initial: a tensor `[*]`.
        time: `[T]`.
    """
    value: Tensor = initial if state is None else state[0]
    return value.unsqueeze(0).expand(time.shape[0], *value.shape)


def batch_norm_per_step(x_seq: Tensor, module: nn.modules.batchnorm._BatchNorm) -> Tensor:
    """BatchNorm over `[T, N, C, *]` as T calls one after the other do it, computed for all steps at once.

    Statistics are those of one step; the running statistics after it are those after T updates, in closed form:
    with momentum m, `r_T = (1-m)^T r_0 + sum_t m (1-m)^(T-1-t) stat_t` (Ioffe & Szegedy 2015 for one update).

    Args:
        x_seq: `[T, N, C, *]`.
        module: a BatchNorm module; in evaluation mode it is folded.
    """
    T = x_seq.shape[0]
    if module._forward_hooks or module._forward_pre_hooks:
        return torch.stack([module(x) for x in x_seq.unbind(0)])
    if not module.training and module.running_mean is not None:
        return module(x_seq.flatten(0, 1)).unflatten(0, (T, x_seq.shape[1]))  # type: ignore[no-any-return]
    module._check_input_dim(x_seq[0])
    count = x_seq[0].numel() // x_seq.shape[2]
    if module.training and count <= 1:
        return torch.stack([module(x) for x in x_seq.unbind(0)])  # torch's own error
    if not torch.compiler.is_compiling() and not isinstance(module, nn.SyncBatchNorm):
        return normalize_steps(x_seq, module)
    dims = [1, *range(3, x_seq.dim())]
    variance, mean = torch.var_mean(x_seq, dims, correction=0, keepdim=True)
    y = (x_seq - mean) * torch.rsqrt(variance + module.eps)
    if module.weight is not None:
        shape = (-1, *(1,) * (x_seq.dim() - 3))
        y = y * module.weight.view(shape) + module.bias.view(shape)
    if module.training and module.track_running_stats and module.running_mean is not None:
        with torch.no_grad():
            _update_running_statistics(module, mean.view(T, -1), variance.view(T, -1) * (count / (count - 1)))
    return y.to(x_seq.dtype)


def _update_running_statistics(module: nn.modules.batchnorm._BatchNorm, mean: Tensor, variance: Tensor) -> None:
    T = mean.shape[0]
    assert module.num_batches_tracked is not None
    if module.momentum is None:
        seen = module.num_batches_tracked.to(mean.dtype)
        keep = seen / (seen + T)
        weights = (torch.ones(T, dtype=mean.dtype, device=mean.device) / (seen + T)).unsqueeze(1)
    else:
        age = torch.arange(T - 1, -1, -1, dtype=mean.dtype, device=mean.device)
        keep = torch.tensor(1.0 - module.momentum, dtype=mean.dtype, device=mean.device) ** T
        weights = (module.momentum * (1.0 - module.momentum) ** age).unsqueeze(1)
    for running, statistic in ((module.running_mean, mean), (module.running_var, variance)):
        assert running is not None
        running.copy_(keep * running + (weights * statistic).sum(0))
    module.num_batches_tracked.add_(T)

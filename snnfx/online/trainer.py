"""`Trainer`: run a learning rule on sequences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.allocator import is_tuned
from snnfx.errors import InputError
from snnfx.online.call_checks import check_optimizer, check_steps, number_of_steps
from snnfx.online.inputs import (
    batch_of_steps,
    call_arguments,
    first_step,
    output_time_dim,
    steps_of_target,
    target_with_time_first,
    without_history,
)
from snnfx.online.learning_rules import Rule
from snnfx.online.losses import Loss
from snnfx.online.random_steps import run_random_steps
from snnfx.online.rule_nets import RuleNets, nets_for, shapes_of
from snnfx.online.sequence_run import SequenceRun
from snnfx.online.traversal import run_chunks, run_steps
from snnfx.online.updates import Updates
from snnfx.runtime.net import Net
from snnfx.sandbox.torch_internals import pytree, without_compile_wrapper

__all__ = ["StepResult", "Trainer"]


@dataclass(frozen=True)
class StepResult:
    """What one call of `Trainer.step` did.

    Args:
        loss: the sum of the steps' losses, each times the loss scale, without regularisers; detached.
        updates: how many optimizer steps were taken.
        state: the state after the last step, detached; pass it to the next call to go on with the sequence.
        outputs: `y_seq` as the model returns it for a sequence, `[T, N, *]`, detached; None unless asked for.
        metrics: the value of each metric.
        grad_norm: the norm of the gradients before clipping at the last update; None without clipping.
    """

    loss: Tensor
    updates: int
    state: dict[str, Any]
    outputs: Any = None
    metrics: dict[str, Any] = field(default_factory=dict)
    grad_norm: Tensor | None = None


class Trainer:
    """Train a model with a learning rule, one batch of sequences at a time.

    Args:
        model: a converted net, any single-step model that `snnfx.convert` accepts, or a DistributedDataParallel of one.
            What torch.compile made of one is taken as it was before: a rule runs graphs of its own.
        rule: a `snnfx.online.Rule`.
        optimizer: over parameters of the model. Schedulers work on it as usual: call them between calls of `step`.
        loss: `loss(y_t, target_t)`, the scalar loss of one time step; a pure function. It is evaluated for all steps
            of a chunk at once (torch.vmap) where that gives the same values and gradients, which is checked once.
        chunk: how many time steps are run at once; bounds the memory. The numbers do not depend on it (but see
            `batch_norm`). Where gradients go through time (BPTT, long TBPTT, OSTL, e-prop's readout), each chunk
            is run twice, and one state is kept for each. None: see `chunk_length`.
        loss_scale: overrides that of the rule: "mean": divide each step's loss by T; "sum": do not; or a number.
        clip_grad_norm: largest norm of the gradients at an update, over the optimizer's parameters together.
        amp_dtype: run the forward pass under torch.autocast with this type (torch.bfloat16 or torch.float16; the
            latter with a gradient scaler).
        metrics: `{name: f(y_seq, target)}`, evaluated after the sequence on the detached outputs and the target as it
            was given.
        target_dim: where T is in the target; None: the same target at every step; "output": where it is in the model's
            outputs (0, unless a net was converted with another `time_dim`).
        batch_norm: "per_step": statistics of one step at a time, as an online rule sees them; "fold": over all steps
            of a chunk, as `snnfx.convert` does.
        accumulate: take an update every so many calls of `step` (rules that update at the end of a sequence only). The
            gradients of the calls are averaged.
        process_group: average gradients over the processes of this group before each update; "world": over all. Taken
            from a DistributedDataParallel model.
        progress: called after each chunk with `(steps done, T, loss so far)`.
        example_inputs: for a model that is not converted yet, as for `snnfx.convert`; default: the first step of the
            first sequence.

    BatchNorm: see `batch_norm`. Dropout: see `Rule.dropout`. State: each call of `step` starts from the reset state
    (or the one given) and leaves nothing behind in the model. `zero_grad`: the gradients of the optimizer's
    parameters are set to None before the first backward pass that belongs to an update, and stay after the update, so
    they can be looked at.

    Raises:
        InputError: before anything is changed: SNNFX612 (the optimizer's parameters are not the model's), SNNFX614 (a
            number of steps out of range), SNNFX615 (the leak of a trace is not one number), SNNFX616 (the rule does not
            apply to the model), SNNFX309.

    Example:
        >>> import torch, snnfx
        >>> from snnfx.online import SLTT, Trainer
        >>> net = snnfx.convert(torch.nn.Sequential(torch.nn.Linear(3, 2), snnfx.neuron.LIFNode()))
        >>> trainer = Trainer(net, SLTT, torch.optim.Adam(net.parameters()), torch.nn.functional.cross_entropy,
        ...                   target_dim=None)
        >>> trainer.step(torch.rand(6, 4, 3), torch.tensor([0, 1, 1, 0])).updates
        1
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Rule,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        *,
        chunk: int | None = None,
        loss_scale: str | float | None = None,
        clip_grad_norm: float | None = None,
        amp_dtype: torch.dtype | None = None,
        metrics: Mapping[str, Callable[[Any, Any], Any]] | None = None,
        target_dim: int | str | None = "output",
        batch_norm: str = "per_step",
        accumulate: int = 1,
        process_group: Any = None,
        progress: Callable[[int, int, Tensor], None] | None = None,
        example_inputs: Any = None,
    ) -> None:
        if not isinstance(rule, Rule):
            hint = "Choose one of snnfx.online, e.g. OTTT_A, or make a Rule."
            raise InputError("SNNFX309", f"the rule is a {type(rule).__name__}", hint=hint)
        if batch_norm not in ("per_step", "fold"):
            raise InputError("SNNFX309", f"batch_norm={batch_norm!r}", hint="Choose 'per_step' or 'fold'.")
        if not callable(loss):
            raise InputError("SNNFX309", f"the loss is a {type(loss).__name__}, not a function")
        if chunk is not None:
            number_of_steps("chunk", chunk)
        if target_dim not in ("output", None) and (isinstance(target_dim, bool) or not isinstance(target_dim, int)):
            raise InputError("SNNFX309", f"target_dim={target_dim!r}", hint="Give the place of T, None, or 'output'.")
        model, process_group = unwrapped(model, process_group)
        self.model, self.rule, self.optimizer, self.loss = model, rule, optimizer, loss
        self.chunk, self.target_dim, self.batch_norm, self.progress = chunk, target_dim, batch_norm, progress
        self.loss_scale = checked_scale(rule.loss_scale if loss_scale is None else loss_scale)
        self.metrics = dict(metrics or {})
        check_optimizer(model, optimizer)
        self.updates = Updates(optimizer, accumulate, clip_grad_norm, amp_dtype, process_group)
        if rule.updates_within_sequence and accumulate != 1:
            raise InputError(
                "SNNFX616",
                f"the rule {rule.name} cannot accumulate over {accumulate} calls",
                why="it updates the weights within a sequence.",
                hint="Use accumulate=1, or the rule with update='end'.",
            )
        if rule.extra is not None and amp_dtype is torch.float16:
            hint = "Use torch.bfloat16, which needs no scaling of gradients."
            raise InputError("SNNFX616", f"the rule {rule.name} does not work with float16", hint=hint)
        self._example = example_inputs
        self._nets: tuple[Any, RuleNets] | None = None
        self.averages: list[Tensor] | None = None
        """The running averages of FPTT, one for each parameter of the optimizer; made at the first call."""
        if isinstance(model, Net) or example_inputs is not None:
            self.nets(example_inputs)

    def nets(self, example_inputs: Any = None) -> RuleNets:
        """The forms of the model in which the rule runs it; `nets().sequence` is the edited net, to look at."""
        example = self._example if self._example is not None else example_inputs
        shapes = () if isinstance(self.model, Net) else shapes_of(example)
        if self._nets is None or self._nets[0] != shapes:
            self._nets = (shapes, nets_for(self.model, self.rule, self.batch_norm, example))
        return self._nets[1]

    def chunk_length(self, T: int, step_elements: int = 0) -> int:
        """How many time steps are run at once for a sequence of T.

        The given `chunk`; without one, as many steps as have 2**22 elements in the largest state (16 MB in float32:
        freed blocks of twice that go back to the system, see `snnfx.tune_allocator`, after which it is twice as many),
        in chunks of one length. BPTT and TBPTT take all steps, or all K, at once unless `chunk` says otherwise.

        Args:
            T: length of the sequence.
            step_elements: elements of the largest state of one step, where it is known.
        """
        most = self.rule.temporal if isinstance(self.rule.temporal, int) else T
        if self.chunk is not None:
            return min(self.chunk, most)
        if self.rule.temporal not in ("cut", "layer"):
            return most
        elements = _ELEMENTS_OF_A_CHUNK * (2 if is_tuned() else 1)
        most = max(1, elements // step_elements if step_elements else _STEPS_OF_A_CHUNK)
        return math.ceil(T / math.ceil(T / most))

    def step(
        self,
        x_seq: Any,
        target: Any,
        *,
        state: dict[str, Any] | None = None,
        T: int | None = None,
        return_outputs: bool = False,
    ) -> StepResult:
        """Train on one batch of sequences. Gradients go to parameters only, not into the history of what is given.

        Args:
            x_seq: `[T, N, *]`, a tuple of the model's inputs, or a dict of keyword arguments.
            target: `[T, N, *]` (see `target_dim`), or nested; what the loss takes, with time.
            state: the state before the first step, as `StepResult.state`; None: the reset state.
            T: the number of time steps where no input carries time (`time_dim=None`); None: as many as the target has.
            return_outputs: whether the result holds the outputs of all steps.

        Raises:
            InputError: before the first update: SNNFX610 (lengths differ), SNNFX611 (the loss is not a scalar),
                SNNFX614 (`random_steps` above T), and those of `Net.run`.
        """
        with torch.inference_mode(False), torch.enable_grad():
            x_seq, target, state = without_history((x_seq, target, state))
            return self._step(x_seq, target, state, T, return_outputs)

    def _step(
        self, x_seq: Any, target: Any, state: dict[str, Any] | None, T: int | None, return_outputs: bool
    ) -> StepResult:
        args, kwargs = call_arguments(x_seq)
        nets = self.nets(None if isinstance(self.model, Net) else first_step(args, kwargs))
        output_dim = output_time_dim(nets.base)
        target_dim = output_dim if isinstance(self.target_dim, str) else self.target_dim
        if T is None and not any(nets.base.varying_inputs):
            T = steps_of_target(target, target_dim)
        leaves, given, T = nets.base.bound(args, kwargs, T)
        check_steps(self.rule, T)
        as_given, target = target, target_with_time_first(target, target_dim, T, batch_of_steps(nets.base, leaves))
        nets.set_mode(self.model.training)
        run = SequenceRun(
            rule=self.rule,
            nets=nets,
            leaves=leaves,
            varying=nets.base.varying_inputs,
            given=given,
            T=T,
            target=target,
            target_has_time=target_dim is not None,
            state=state,
            loss=self.loss,
            scale=1.0 / T if self.loss_scale == "mean" else 1.0 if self.loss_scale == "sum" else float(self.loss_scale),
            updates=self.updates,
            keep_outputs=return_outputs or bool(self.metrics),
            progress=self.progress,
        )
        if self.rule.extra is not None:
            self.averages = self.updates.snapshot() if self.averages is None else self.averages
            run_steps(run, self.averages)
        elif self.rule.update in ("step", 1):
            run_steps(run, None)
        elif self.rule.random_steps is not None:
            run_random_steps(run, self.chunk_length(T, nets.step_elements))
        else:
            run_chunks(run, self.chunk_length(T, nets.step_elements))
        outputs = pytree.tree_map_only(Tensor, lambda y: y.movedim(0, output_dim), run.outputs())
        metrics = {name: metric(outputs, as_given) for name, metric in self.metrics.items()}
        return StepResult(
            loss=run.total,
            updates=run.update_count,
            state=run.state or {},
            outputs=outputs if return_outputs else None,
            metrics=metrics,
            grad_norm=self.updates.grad_norm,
        )


_ELEMENTS_OF_A_CHUNK = 2**22
_STEPS_OF_A_CHUNK = 64


def unwrapped(model: nn.Module, process_group: Any) -> tuple[nn.Module, Any]:
    """The model in what is wrapped around it, and the processes over which gradients are averaged.

    Raises:
        InputError: SNNFX309, it is spread over devices in this process.
    """
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            process_group = process_group if process_group is not None else model.process_group
            model = model.module
        elif isinstance(model, nn.DataParallel):
            hint = "Train the model itself, or use DistributedDataParallel with a process for each device."
            raise InputError("SNNFX309", "the model is a DataParallel", hint=hint)
        elif (inner := without_compile_wrapper(model)) is not None:
            model = inner
        else:
            return model, process_group


def checked_scale(value: Any) -> str | float:
    """A loss scale: "mean", "sum" or a number.

    Raises:
        InputError: SNNFX309.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if value not in ("mean", "sum") and not is_number:
        raise InputError("SNNFX309", f"loss_scale={value!r}", hint="Choose 'mean', 'sum' or a number.")
    return value  # type: ignore[no-any-return]

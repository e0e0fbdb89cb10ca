"""`Trainer`: train a model on sequences with a learning rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.allocator import is_tuned
from snnfx.errors import InputError
from snnfx.ir.facts import TRACE
from snnfx.online.call_checks import check_optimizer, check_random_steps, checked_step_count
from snnfx.online.edited_nets import EditedNets, edited_nets_of, signature_of
from snnfx.online.fptt import FPTTUpdater
from snnfx.online.inputs import (
    args_and_kwargs,
    batch_size_of,
    detached_inputs,
    example_of_one_step,
    output_time_dim,
    target_length,
    time_first_target,
)
from snnfx.online.learning_rules import FPTTTerm, Rule
from snnfx.online.losses import Loss
from snnfx.online.random_steps import train_at_random_steps
from snnfx.online.trainer_state import load_trainer_state, trainer_state
from snnfx.online.training_call import TrainingCall
from snnfx.online.update_schedules import train_in_chunks, train_step_by_step
from snnfx.online.updates import Updates
from snnfx.runtime.net import Net
from snnfx.sandbox.torch_internals import pytree, without_compile_wrapper

__all__ = ["StepResult", "Trainer"]


@dataclass(frozen=True)
class StepResult:
    """The result of one call of `Trainer.step`.

    Args:
        loss: the sum of the losses of all steps, each times the loss scale, without regularisers; detached.
        updates: number of optimizer steps.
        state: the state after the last step, detached; pass it to the next call to continue the sequence.
        outputs: the outputs of all steps, `[T, N, *]`, as the model returns them for a sequence; detached. None unless
            requested with `return_outputs=True`.
        metrics: the value of each metric.
        grad_norm: total norm of the gradients at the last update, before clipping; None without clipping.
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
        model: a converted net, any single-step model that `snnfx.convert` accepts, or a DistributedDataParallel wrapper
            of one. A torch.compile wrapper is ignored, since a rule runs its own graphs.
        rule: a `snnfx.online.Rule`.
        optimizer: over parameters of the model. Learning-rate schedulers work as usual: step them between calls.
        loss: the scalar loss of one time step, `loss(y_t, target_t)`; a pure function. It is evaluated for all steps of
            a chunk at once (torch.vmap) if that gives the same values and gradients, which is checked once.
        chunk: number of time steps that run at once; bounds the memory. It does not change the results (except for
            `batch_norm="fold"`). If gradients flow through time beyond a chunk (BPTT, long TBPTT, OSTL, e-prop's
            readout), each chunk runs twice, and one state per chunk is saved. None: see `chunk_length`.
        loss_scale: overrides the loss scale of the rule. "mean": divide the loss of each step by T; "sum": do not
            scale it; a number: multiply by it.
        clip_grad_norm: largest total norm of the gradients of the optimizer's parameters at an update.
        amp_dtype: run the forward pass under torch.autocast with this dtype (torch.bfloat16 or torch.float16; float16
            uses a gradient scaler).
        metrics: `{name: f(y_seq, target)}`, evaluated after the sequence on the detached outputs and the target as
            passed to `step`.
        target_dim: the time dimension of the target; None: the target is the same at every step; "output": the time
            dimension of the model's outputs (0, unless the net was converted with another `time_dim`).
        batch_norm: "per_step": BatchNorm statistics of one step at a time, as an online rule sees them; "fold": over
            all steps of a chunk, as in `snnfx.convert`.
        accumulate: number of calls of `step` per update, whose gradients are averaged. Only for rules that update at
            the end of a sequence.
        process_group: average gradients over the processes of this group before each update; "world": over all
            processes. Defaults to the group of a DistributedDataParallel model.
        progress: called after each chunk with `(steps done, T, loss so far)`.
        example_inputs: as for `snnfx.convert`, for a model that is not converted yet; default: the first step of the
            first sequence.

    State: each call of `step` starts from the reset state, or from the given one, and stores nothing in the model.
    FPTT's running averages and multipliers stay in the trainer from call to call: `state_dict` and `load_state_dict`
    save and restore them, `reset` forgets them.
    Gradients: set to None before the first backward pass of an update, and available after the update.
    Dropout: see `Rule.dropout`.

    Raises:
        InputError: before anything changes: SNNFX612 (the optimizer has parameters that are not in the model), SNNFX614
            (a number of steps is out of range), SNNFX615 (the leak of a trace depends on the potential or the input,
            or is ambiguous), SNNFX620 (the leaks of neurons do not match the output channels of a weight), SNNFX616
            (the rule does not apply to the model), SNNFX309 (another argument is invalid).

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
            what = f"the rule is a {type(rule).__name__}, not a snnfx.online.Rule"
            raise InputError("SNNFX309", what, hint="Choose one from snnfx.online, e.g. OTTT_A, or build a Rule.")
        if batch_norm not in ("per_step", "fold"):
            raise InputError("SNNFX309", f"invalid batch_norm={batch_norm!r}", hint="Choose 'per_step' or 'fold'.")
        if not callable(loss):
            hint = "Pass a function loss(y_t, target_t), e.g. torch.nn.functional.mse_loss."
            raise InputError("SNNFX309", f"the loss is a {type(loss).__name__}, not a function", hint=hint)
        if chunk is not None:
            checked_step_count("chunk", chunk)
        if target_dim not in ("output", None) and (isinstance(target_dim, bool) or not isinstance(target_dim, int)):
            hint = "Pass the time dimension of the target (an int), None, or 'output'."
            raise InputError("SNNFX309", f"invalid target_dim={target_dim!r}", hint=hint)
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
                f"the rule {rule.name} cannot accumulate gradients over {accumulate} calls",
                why="it updates the weights within each sequence.",
                hint="Use accumulate=1, or a rule with update='end', e.g. OTTT_A.",
            )
        if rule.extra is not None and amp_dtype is torch.float16:
            why = "its regulariser does not support scaled gradients."
            hint = "Use amp_dtype=torch.bfloat16, which needs no gradient scaling."
            raise InputError("SNNFX616", f"the rule {rule.name} does not support float16", why=why, hint=hint)
        self._example = example_inputs
        self._nets: tuple[Any, EditedNets] | None = None
        self.averages: list[Tensor] | None = None
        """FPTT's running averages, one for each parameter of the optimizer; created at the first call."""
        self.multipliers: dict[int, Tensor] = {}
        """The multipliers of FPTT's authors' form, by the index of the parameter in the optimizer."""
        if isinstance(model, Net) or example_inputs is not None:
            self.nets(example_inputs)

    def __repr__(self) -> str:
        """The rule and the optimizer; from the first call on also the trace of each weight, or why it has none."""
        text = f"{type(self).__name__}(rule={self.rule.name}, optimizer={type(self.optimizer).__name__})"
        program = None if self._nets is None else self._nets[1].sequence.program
        traces = [] if program is None else [TRACE.of(node) for node in program.graph.nodes if TRACE.is_known(node)]
        return "\n".join((text, *(f"  {trace}" for trace in traces)))

    def nets(self, example_inputs: Any = None) -> EditedNets:
        """The nets that the rule runs; inspect `nets().sequence` to see the edited graph."""
        example = self._example if self._example is not None else example_inputs
        signature = () if isinstance(self.model, Net) else signature_of(example)
        if self._nets is None or self._nets[0] != signature:
            self._nets = (signature, edited_nets_of(self.model, self.rule, self.batch_norm, example))
        return self._nets[1]

    def chunk_length(self, T: int, step_elements: int = 0) -> int:
        """The number of time steps that run at once for a sequence of T steps.

        By default, BPTT runs all T steps at once, and truncated BPTT its K steps. Other rules use chunks of equal
        length whose largest state has at most 2**22 elements (16 MB in float32), or 2**23 after
        `snnfx.tune_allocator()`: by default, malloc returns freed blocks of twice that size to the system.

        Args:
            T: length of the sequence.
            step_elements: elements of the largest state of one step; 0 if unknown.
        """
        most = self.rule.temporal if isinstance(self.rule.temporal, int) else T
        if self.chunk is not None:
            return min(self.chunk, most)
        if self.rule.temporal not in ("cut", "layer"):
            return most
        elements = _CHUNK_ELEMENTS * (2 if is_tuned() else 1)
        most = max(1, elements // step_elements if step_elements else _DEFAULT_CHUNK)
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
        """Train on one batch of sequences.

        Gradients flow to the parameters only: inputs, target and state are detached.

        Args:
            x_seq: `[T, N, *]`, a tuple of the model's inputs, or a dict of keyword arguments.
            target: `[T, N, *]` (see `target_dim`), or a pytree: the target of the loss at every step.
            state: the state before the first step, from `StepResult.state`; None: the reset state.
            T: number of time steps if no input has a time dimension (`time_dim=None`); default: the target's.
            return_outputs: whether to return the outputs of all steps.

        Raises:
            InputError: before the first update: SNNFX610 (input and target differ in length), SNNFX611 (the loss is
                not a scalar), SNNFX614 (`random_steps` exceeds T), and the errors of `Net.run`.
        """
        with torch.inference_mode(False), torch.enable_grad():
            x_seq, target, state = detached_inputs((x_seq, target, state))
            return self._step(x_seq, target, state, T, return_outputs)

    def _step(
        self, x_seq: Any, target: Any, state: dict[str, Any] | None, T: int | None, return_outputs: bool
    ) -> StepResult:
        args, kwargs = args_and_kwargs(x_seq)
        nets = self.nets(None if isinstance(self.model, Net) else example_of_one_step(args, kwargs))
        output_dim = output_time_dim(nets.base)
        target_dim = output_dim if isinstance(self.target_dim, str) else self.target_dim
        if T is None and not any(nets.base.varying_inputs):
            T = target_length(target, target_dim)
        leaves, initial_arguments, T = nets.base.bound(args, kwargs, T)
        check_random_steps(self.rule, T)
        time_first = time_first_target(target, target_dim, T, batch_size_of(nets.base, leaves))
        nets.set_mode(self.model.training)
        call = TrainingCall(
            rule=self.rule,
            nets=nets,
            leaves=leaves,
            input_has_time=nets.base.varying_inputs,
            initial_arguments=initial_arguments,
            T=T,
            target=time_first,
            target_has_time=target_dim is not None,
            state=state,
            loss=self.loss,
            scale=1.0 / T if self.loss_scale == "mean" else 1.0 if self.loss_scale == "sum" else float(self.loss_scale),
            updates=self.updates,
            keep_outputs=return_outputs or bool(self.metrics),
            progress=self.progress,
        )
        if self.rule.extra is not None:
            train_step_by_step(call, self._fptt_updater(self.rule.extra))
        elif self.rule.update in ("step", 1):
            train_step_by_step(call)
        elif self.rule.random_steps is not None:
            train_at_random_steps(call, self.chunk_length(T, nets.step_elements))
        else:
            train_in_chunks(call, self.chunk_length(T, nets.step_elements))
        outputs = pytree.tree_map_only(Tensor, lambda y: y.movedim(0, output_dim), call.outputs())
        metrics = {name: metric(outputs, target) for name, metric in self.metrics.items()}
        return StepResult(
            loss=call.total_loss,
            updates=call.update_count,
            state=call.state or {},
            outputs=outputs if return_outputs else None,
            metrics=metrics,
            grad_norm=self.updates.grad_norm,
        )

    def _fptt_updater(self, term: FPTTTerm) -> FPTTUpdater:
        """FPTT's updates of one sequence, from the running averages and multipliers of the previous one."""
        if self.averages is None:
            self.averages = []
        # A parameter that was added to the optimizer since then starts its average now.
        self.averages += [p.detach().clone() for p in self.updates.parameters[len(self.averages) :]]
        if not term.keep_multipliers:
            self.multipliers = {}
        return FPTTUpdater(term, self.updates, self.averages, self.multipliers)

    def reset(self) -> None:
        """Start anew: forget FPTT's running averages and multipliers, and the calls that `accumulate` counts.

        The weights and the state of the optimizer do not change.
        """
        self.averages, self.multipliers = None, {}
        self.updates.reset()

    def state_dict(self) -> dict[str, Any]:
        """The state of the trainer for a checkpoint: training resumes exactly after `load_state_dict`.

        Save the state of the model and of the optimizer as well. `torch.load` reads it with `weights_only=True`.

        Returns:
            Copies of FPTT's running averages and multipliers, in the order of the optimizer's parameters (None if a
            parameter has none yet), and the state of accumulation and gradient scaling.
        """
        return trainer_state(self.updates, self.averages, self.multipliers)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state from `state_dict`, in the dtype and on the device of each parameter.

        Raises:
            InputError: SNNFX622, before anything changes, if the state belongs to another optimizer's parameters.
        """
        self.averages, self.multipliers = load_trainer_state(self.updates, state_dict)


_CHUNK_ELEMENTS = 2**22
_DEFAULT_CHUNK = 64


def unwrapped(model: nn.Module, process_group: Any) -> tuple[nn.Module, Any]:
    """Strip the wrappers of DistributedDataParallel and torch.compile from a model.

    Returns:
        The model, and the process group over which to average gradients.

    Raises:
        InputError: SNNFX309 if the model is a DataParallel.
    """
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            process_group = process_group if process_group is not None else model.process_group
            model = model.module
        elif isinstance(model, nn.DataParallel):
            why = "it replicates the model within one process at every call."
            hint = "Pass the model itself, or use DistributedDataParallel with one process per device."
            raise InputError("SNNFX309", "cannot train a DataParallel model online", why=why, hint=hint)
        elif (inner := without_compile_wrapper(model)) is not None:
            model = inner
        else:
            return model, process_group


def checked_scale(value: Any) -> str | float:
    """Check that a loss scale is "mean", "sum" or a finite number, and return it.

    Raises:
        InputError: SNNFX309 if it is not.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if value not in ("mean", "sum") and not is_number:
        raise InputError("SNNFX309", f"invalid loss_scale={value!r}", hint="Choose 'mean', 'sum' or a number.")
    return value  # type: ignore[no-any-return]

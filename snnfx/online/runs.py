"""How a rule goes through a sequence: in chunks, in single steps, or with gradients at random steps only.

In chunks, the gradients of all steps of a chunk come from one folded forward and backward pass. Where the weights
change at every step, the form of the net that takes one step is run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from snnfx.errors import InputError
from snnfx.net import Net
from snnfx.online.fptt import FPTTSequence
from snnfx.online.gradients import Updates
from snnfx.online.losses import Loss, losses_of_steps, scalar
from snnfx.online.nets import RuleNets
from snnfx.online.rules import Rule
from snnfx.online.threads import is_small, one_thread
from snnfx.passes.dependence import is_random

__all__ = ["Run", "run_chunks", "run_random_steps", "run_steps"]

State = dict[str, Any] | None


@dataclass
class Run:
    """One sequence: what comes in, and what has come of it so far.

    Args:
        rule: the rule.
        nets: the model in the forms that the rule needs.
        leaves: the tensors of the inputs, time first.
        varying: of each, whether it has time.
        given: carried arguments of the first step.
        T: number of time steps.
        target: with time in front, or without time.
        target_has_time: which of the two.
        state: the state so far, detached.
        loss: of one step.
        scale: what each step's loss is multiplied with.
        updates: does the updates.
        keep_outputs: whether outputs are wanted afterwards.
        progress: called with `(steps done, T, loss so far)`.
    """

    rule: Rule
    nets: RuleNets
    leaves: list[Tensor]
    varying: list[bool]
    given: dict[str, Any]
    T: int
    target: Any
    target_has_time: bool
    state: State
    loss: Loss
    scale: float
    updates: Updates
    keep_outputs: bool = False
    progress: Callable[[int, int, Tensor], None] | None = None
    update_count: int = 0
    parts: list[Any] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.leaves[0].device if self.leaves else torch.device("cpu")

    @property
    def total(self) -> Tensor:
        """The loss so far, scaled; detached."""
        return torch.cat(self.losses).sum() * self.scale

    def inputs(self, start: int, stop: int) -> list[Tensor]:
        """The inputs of some steps."""
        return [x[start:stop] if v else x for x, v in zip(self.leaves, self.varying, strict=True)]

    def inputs_at(self, t: int) -> list[Tensor]:
        """The inputs of one step."""
        return [x[t] if v else x for x, v in zip(self.leaves, self.varying, strict=True)]

    def targets(self, index: Any) -> Any:
        """The targets of a slice of the steps, or of one."""
        if not self.target_has_time:
            return self.target
        if isinstance(self.target, Tensor):
            return self.target[index]
        return pytree.tree_map_only(Tensor, lambda v: v[index], self.target)

    def carried(self, t: int) -> dict[str, Any]:
        """The carried arguments of the step t; later ones are in the state."""
        return self.given if t == 0 else {}

    def finish_steps(self, state: State, losses: Tensor, outputs: Any, done: int) -> None:
        """Note down what some steps gave."""
        self.state = (
            None if state is None else {k: v.detach() if isinstance(v, Tensor) else v for k, v in state.items()}
        )
        self.losses.append(losses.detach().reshape(-1))
        if self.keep_outputs:
            self.parts.append(detached(outputs))
        if self.progress is not None:
            self.progress(done, self.T, self.total)

    def outputs(self) -> Any:
        """The outputs of all steps, `[T, N, *]`; None if they were not kept."""
        if not self.parts:
            return None
        leaves, specs = zip(*(pytree.tree_flatten(part) for part in self.parts), strict=True)
        joined = [
            torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in zip(*leaves, strict=True)
        ]
        return pytree.tree_unflatten(joined, specs[0])


def detached(tree: Any) -> Any:
    """The same values without their history."""
    if isinstance(tree, Tensor):
        return tree.detach()
    return pytree.tree_map_only(Tensor, Tensor.detach, tree)


def with_gradient(loss: Tensor) -> Tensor:
    """A loss that a backward pass can start from.

    Raises:
        InputError: SNNFX611.
    """
    if not loss.requires_grad:
        raise InputError(
            "SNNFX611",
            "the loss does not depend on a parameter that requires a gradient",
            why="no backward pass can start from it.",
            hint="Compute it from the outputs, without detach() or item(), and train at least one parameter they use.",
        )
    return loss


def run_chunks(run: Run, chunk: int) -> None:
    """Gradients of a chunk of steps at a time, from one folded pass; updates at the end, or every K steps."""
    every = run.rule.update if isinstance(run.rule.update, int) else run.T
    cut = run.rule.temporal if isinstance(run.rule.temporal, int) else run.T
    net, start = run.nets.sequence, 0
    run.updates.begin_call()
    while start < run.T:
        stop = min(start + chunk, run.T, (start // every + 1) * every, (start // cut + 1) * cut)
        if every != run.T and start % every == 0 and start > 0:
            run.updates.zero()
        with run.updates.autocast(run.device):
            y_seq, state = net.run_bound(run.inputs(start, stop), run.carried(start), run.state, stop - start)
            targets = run.targets(slice(start, stop))
            losses = losses_of_steps(run.loss, y_seq, targets, run.target_has_time, stop - start)
            loss = with_gradient(losses.sum() * run.scale)
        run.updates.backward(loss)
        run.finish_steps(state, losses, y_seq, stop)
        del y_seq, state, losses, loss
        if stop % every == 0 and stop < run.T:
            run.updates.apply()
            run.update_count += 1
        start = stop
    run.update_count += run.updates.end_call()


def run_steps(run: Run, averages: list[Tensor] | None) -> None:
    """An update at every step.

    Args:
        run: the sequence.
        averages: the running averages of FPTT, whose elements are replaced; None for rules without.
    """
    net, extra = run.nets.step, None
    if run.rule.extra is not None:
        assert averages is not None
        extra = FPTTSequence(run.rule.extra, run.updates, averages)
    with one_thread() if is_small(run.updates.parameters, run.nets.step_elements) else contextlib.nullcontext():
        for t in range(run.T):
            _run_step(run, net, t, extra)


def _run_step(run: Run, net: Net, t: int, extra: FPTTSequence | None) -> None:
    """A step, and the update after it."""
    x, target, before = run.inputs_at(t), run.targets(t), run.state

    def step_and_loss(state: State) -> tuple[Any, State, Tensor, Tensor]:
        with run.updates.autocast(run.device):
            y, after = net.run_bound(x, run.carried(t), state, None)
            value = scalar(run.loss(y, target))
            return y, after, value, with_gradient(value * run.scale)

    y, after, value, loss = step_and_loss(before)
    run.finish_steps(after, value, _with_time(y) if run.keep_outputs else None, t + 1)
    if extra is None:
        run.updates.zero()
        run.updates.backward(loss)
        run.updates.apply()
    else:
        extra.update(loss, t == run.T - 1, before, run.state, step_and_loss)
    run.update_count += 1


def _with_time(y: Any) -> Any:
    return y.unsqueeze(0) if isinstance(y, Tensor) else pytree.tree_map_only(Tensor, lambda v: v.unsqueeze(0), y)


def run_random_steps(run: Run, chunk: int) -> None:
    """Gradients at some steps, drawn at random; the others are run without.

    The steps between are run without gradients, which gives the states before the chosen ones; those are then evaluated
    all at once, from their states. Where that is not the same (numbers are drawn at each step), one at a time.
    """
    assert run.rule.random_steps is not None
    chosen = sorted(torch.randperm(run.T)[: run.rule.random_steps].tolist())
    run.updates.begin_call()
    if _may_be_taken_together(run):
        _run_known_states(run, chosen, chunk)
    else:
        _run_one_by_one(run, chosen, chunk)
    run.update_count += run.updates.end_call()


def _may_be_taken_together(run: Run) -> bool:
    program = run.nets.sequence.program
    options = run.nets.base.options
    return (
        program.first_step is None
        and not program.carried
        and not program.opaque
        and isinstance(options.time_dim, int)
        and all(run.varying)
        and run.nets.sequence.covers(run.inputs(0, 1))
        and not any(is_random(program, node) for node in program.graph.nodes if node.target is not None and _runs(node))
    )


def _runs(node: Any) -> bool:
    return node.op.startswith("call") and getattr(node.target, "__name__", "") != "draw_dropout_mask"


def _run_without_gradients(run: Run, start: int, stop: int, chunk: int, state: State) -> State:
    net = run.nets.sequence
    while start < stop:
        end = min(start + chunk, stop)
        with torch.no_grad(), run.updates.autocast(run.device):
            y_seq, state = net.run_bound(run.inputs(start, end), run.carried(start), state, end - start)
            losses = losses_of_steps(run.loss, y_seq, run.targets(slice(start, end)), run.target_has_time, end - start)
        run.finish_steps(state, losses, y_seq, end)
        start = end
    return state


def _run_one_by_one(run: Run, chosen: Sequence[int], chunk: int) -> None:
    start = 0
    for t in [*chosen, run.T]:
        run.state = _run_without_gradients(run, start, t, chunk, run.state)
        if t == run.T:
            return
        with run.updates.autocast(run.device):
            y_seq, state = run.nets.sequence.run_bound(run.inputs(t, t + 1), run.carried(t), run.state, 1)
            losses = losses_of_steps(run.loss, y_seq, run.targets(slice(t, t + 1)), run.target_has_time, 1)
            loss = with_gradient(losses.sum() * run.scale)
        run.updates.backward(loss)
        run.finish_steps(state, losses, y_seq, t + 1)
        start = t + 1


def _run_known_states(run: Run, chosen: Sequence[int], chunk: int) -> None:
    """States of the chosen steps first, then all of them in one pass (in as many as the chunk demands)."""
    waiting: list[tuple[int, dict[str, Any]]] = []
    start = 0
    for t in [*chosen, run.T]:
        if t == 0:
            # The reset state is not at hand: this step is run as it is.
            with run.updates.autocast(run.device):
                y_seq, state = run.nets.sequence.run_bound(run.inputs(0, 1), run.given, run.state, 1)
                losses = losses_of_steps(run.loss, y_seq, run.targets(slice(0, 1)), run.target_has_time, 1)
                loss = with_gradient(losses.sum() * run.scale)
            run.updates.backward(loss)
            run.finish_steps(state, losses, y_seq, 1)
            start = 1
            continue
        run.state = _run_without_gradients(run, start, t, chunk, run.state)
        if t < run.T:
            assert run.state is not None
            waiting.append((t, run.state))
        if waiting and (t == run.T or len(waiting) == chunk):
            _backward_from_states(run, waiting)
            waiting = []
        start = t


def _backward_from_states(run: Run, waiting: Sequence[tuple[int, dict[str, Any]]]) -> None:
    net = run.nets.known
    net.__dict__["training"] = run.nets.sequence.training
    index = torch.tensor([t for t, _ in waiting], device=run.device)
    states = [
        torch.stack([torch.as_tensor(state[slot.name]) for _, state in waiting])
        for slot in run.nets.sequence.program.slots
    ]
    inputs = [x.index_select(0, index) for x in run.leaves]
    positional = net.positional_inputs - len(states)
    leaves = [*inputs[:positional], *states, *inputs[positional:]]
    with _statistics_kept(run.nets.base), run.updates.autocast(run.device):
        y_seq, _ = net.run_bound(leaves, {}, None, len(waiting))
        losses = losses_of_steps(run.loss, y_seq, run.targets(index), run.target_has_time, len(waiting))
        loss = with_gradient(losses.sum() * run.scale)
    run.updates.backward(loss)


class _statistics_kept:
    """Running statistics stay as they are: these steps have been counted already."""

    def __init__(self, model: nn.Module) -> None:
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.training]
        self.kept = [(b, b.clone()) for m in norms for b in m.buffers(recurse=False)]

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc_info: object) -> None:
        for buffer, value in self.kept:
            # Past the version counter: the graph of the backward pass may hold the buffer.
            buffer.data.copy_(value)

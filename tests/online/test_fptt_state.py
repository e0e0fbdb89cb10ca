"""FPTT's running averages and multipliers from sequence to sequence, and in checkpoints of a trainer."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snnfx.errors import InputError
from snnfx.online import FPTT, OTTT_A, Trainer, fptt_online_training, fptt_online_training_init_w_ra
from support.online_models import close, dense_net, sequences, sgd
from support.online_oracles import Outcome, fptt, mse
from support.online_training import batch_norm_net, same

VARIANTS = ["reference", "paper", "authors"]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": sgd,
    "momentum": lambda weights: torch.optim.SGD(weights, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": lambda weights: torch.optim.Adam(weights, lr=0.01),
}


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def sequences_by_oracle(model: nn.Module, batches: list[tuple[Tensor, Tensor]], keep: bool) -> list[Outcome]:
    """The authors' form over several sequences; each starts from the reset state of the neurons."""
    outcomes: list[Outcome] = []
    model, averages, multipliers = copy.deepcopy(model), None, None
    for x_seq, target in batches:
        outcomes.append(fptt(model, x_seq, target, mse, 0.5, sgd, "authors", averages, multipliers))
        averages = outcomes[-1].extra["averages"]
        multipliers = outcomes[-1].extra["multipliers"] if keep else None
        model.load_state_dict(outcomes[-1].parameters, strict=False)
    return outcomes


@pytest.mark.parametrize("keep", [True, False])
def test_the_authors_multipliers_are_kept_from_sequence_to_sequence_or_restarted(keep: bool) -> None:
    model = dense_net((0.5, 0.7, 0.6))
    batches = [sequences(3, 5) for _ in range(3)]
    expected = sequences_by_oracle(model, batches, keep)
    rule = FPTT(0.5, "authors") if keep else FPTT(0.5, "authors", keep_multipliers=False)
    trainer = Trainer(model, rule, sgd(list(model.parameters())), mse)
    for (x_seq, target), outcome in zip(batches, expected, strict=True):
        trainer.step(x_seq, target)
        same(parameters_of(model), outcome.parameters, 1e-12)
        assert trainer.averages is not None
        for i, (average, multiplier) in enumerate(
            zip(outcome.extra["averages"], outcome.extra["multipliers"], strict=True)
        ):
            close(trainer.averages[i], average)
            close(trainer.multipliers[i], multiplier)


def test_keeping_the_multipliers_changes_the_second_sequence_only() -> None:
    model = dense_net()
    batches = [sequences(4, 5) for _ in range(2)]
    kept, restarted = (sequences_by_oracle(model, batches, keep) for keep in (True, False))
    same(kept[0].parameters, restarted[0].parameters)
    assert any((kept[1].parameters[n] - restarted[1].parameters[n]).abs().max() > 1e-4 for n in kept[1].parameters)


def test_the_function_restarts_the_multipliers_at_each_call() -> None:
    model = dense_net()
    batches = [sequences(4, 5) for _ in range(2)]
    expected = sequences_by_oracle(model, batches, keep=False)
    optimizer = sgd(list(model.parameters()))
    w_ra = fptt_online_training_init_w_ra(optimizer)
    for (x_seq, target), outcome in zip(batches, expected, strict=True):
        model[1].v = model[3].v = 0.0
        fptt_online_training(model, optimizer, x_seq, target, mse, 0.5, w_ra, variant="authors")
        same(parameters_of(model), outcome.parameters, 1e-12)


def saved_and_loaded(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("make", [dense_net, batch_norm_net], ids=["dense", "BatchNorm"])
def test_a_checkpoint_resumes_exactly(make: Callable[[], nn.Module], variant: Any, optimizer: str) -> None:
    model = make()
    shape, out = ((5,), 4) if make is dense_net else ((1, 8, 8), 3)
    batches = [sequences(out, *shape) for _ in range(4)]

    def trainer_of(model: nn.Module) -> Trainer:
        return Trainer(model, FPTT(0.5, variant), OPTIMIZERS[optimizer](list(model.parameters())), mse)

    resumed, trainer = trainer_of(copy.deepcopy(model)), trainer_of(model)
    for batch in batches[:2]:
        trainer.step(*batch)
    checkpoint = saved_and_loaded([trainer.state_dict(), trainer.optimizer.state_dict(), model.state_dict()])
    for batch in batches[2:]:
        trainer.step(*batch)
    resumed.load_state_dict(checkpoint[0])
    resumed.optimizer.load_state_dict(checkpoint[1])
    resumed.model.load_state_dict(checkpoint[2])
    for batch in batches[2:]:
        resumed.step(*batch)
    for name, value in model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_a_saved_state_does_not_change_with_further_training() -> None:
    model = dense_net()
    trainer = Trainer(model, FPTT(0.5, "authors"), sgd(list(model.parameters())), mse)
    trainer.step(*sequences(4, 5))
    state = trainer.state_dict()
    before = [value.clone() for name in ("averages", "multipliers") for value in state[name]]
    trainer.step(*sequences(4, 5))
    trainer.load_state_dict(state)
    trainer.step(*sequences(4, 5))
    after = [value for name in ("averages", "multipliers") for value in state[name]]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_checkpoint_within_an_accumulation_resumes_exactly() -> None:
    model = dense_net()
    batches = [sequences(4, 5) for _ in range(3)]

    def trainer_of(model: nn.Module) -> Trainer:
        return Trainer(model, OTTT_A, sgd(list(model.parameters())), mse, accumulate=3)

    resumed, trainer = trainer_of(copy.deepcopy(model)), trainer_of(model)
    for batch in batches[:2]:
        trainer.step(*batch)
    resumed.load_state_dict(saved_and_loaded(trainer.state_dict()))
    assert trainer.step(*batches[2]).updates == resumed.step(*batches[2]).updates == 1
    same(parameters_of(resumed.model), parameters_of(model), 0.0)


def test_a_frozen_parameter_has_no_multiplier() -> None:
    model = dense_net()
    model[2].weight.requires_grad_(False)
    trainer = Trainer(model, FPTT(0.5, "authors"), sgd(list(model.parameters())), mse)
    trainer.step(*sequences(4, 5))
    state = trainer.state_dict()
    assert [value is None for value in state["multipliers"]] == [False, False, True, False]
    trainer.load_state_dict(saved_and_loaded(state))
    trainer.step(*sequences(4, 5))


def test_reset_forgets_averages_and_multipliers() -> None:
    model = dense_net()
    batch = sequences(4, 5)
    trainer = Trainer(model, FPTT(0.5, "authors"), sgd(list(model.parameters())), mse)
    trainer.step(*sequences(4, 5))
    trainer.reset()
    expected = fptt(model, *batch, mse, 0.5, sgd, "authors")
    trainer.step(*batch)
    same(parameters_of(model), expected.parameters, 1e-12)


def test_a_parameter_added_to_the_optimizer_starts_its_own_average() -> None:
    model = dense_net()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    trainer = Trainer(model, FPTT(0.5, "authors"), optimizer, mse)
    trainer.step(*sequences(4, 5))
    optimizer.add_param_group({"params": list(model[0].parameters())})
    before = model[0].weight.detach().clone()
    trainer.step(*sequences(4, 5))
    assert trainer.averages is not None and len(trainer.averages) == 4
    assert not torch.equal(before, model[0].weight)


@pytest.mark.parametrize("wrong", ["optimizer", "shapes", "count", "accumulate"])
def test_a_state_of_another_trainer_is_refused_before_anything_changes(wrong: str) -> None:
    model = dense_net()
    trainer = Trainer(model, FPTT(0.5, "authors"), sgd(list(model.parameters())), mse)
    trainer.step(*sequences(4, 5))
    before = trainer.state_dict()
    state: Any = trainer.state_dict()
    if wrong == "optimizer":
        state = trainer.optimizer.state_dict()
    elif wrong == "shapes":
        state["averages"].reverse()
    elif wrong == "count":
        state["multipliers"].pop()
    else:
        state["updates"]["calls"] = 1
    with pytest.raises(InputError, match="SNNFX622"):
        trainer.load_state_dict(state)
    after = trainer.state_dict()
    for name in ("averages", "multipliers"):
        assert all(torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True))


def test_keep_multipliers_must_be_a_bool() -> None:
    with pytest.raises(InputError, match="SNNFX309"):
        FPTT(0.5, "authors", keep_multipliers="no")  # type: ignore[arg-type]

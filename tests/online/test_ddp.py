"""Two processes with half a batch each train as one process with the whole batch (gloo, on the CPU)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snnfx.online import FPTT, OTTT_A, OTTT_O, Rule, Trainer
from support.online_models import dense_net, sgd
from support.two_processes import gloo_group, run_in_two_processes

T, N = 5, 6
RULES: dict[str, Rule] = {"OTTT-A": OTTT_A, "OTTT-O": OTTT_O, "FPTT": FPTT(0.5, "authors")}
HOW = {"OTTT-A": ("process group", "DistributedDataParallel"), "OTTT-O": ("process group",), "FPTT": ("process group",)}
CASES = [(rule, how) for rule, ways in HOW.items() for how in ways]

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch has no torch.distributed"),
    pytest.mark.xdist_group("online_ddp"),
]


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x_seq = (torch.rand(T, N, 5, generator=generator, dtype=torch.float64) < 0.5).double()
    return x_seq, torch.rand(T, N, 4, generator=generator, dtype=torch.float64)


def build() -> nn.Sequential:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    return dense_net()


def train(rule: str, how: str, x_seq: Tensor, target: Tensor) -> list[Tensor]:
    """The parameters after two calls. The loss is a mean over the batch, so that halves compare with the whole."""
    model = build()
    given = nn.parallel.DistributedDataParallel(model) if how == "DistributedDataParallel" else model
    group = "world" if how == "process group" else None
    trainer = Trainer(given, RULES[rule], sgd(list(model.parameters())), F.mse_loss, process_group=group)
    for _ in range(2):
        trainer.step(x_seq, target)
    return [p.detach() for p in model.parameters()]


def train_in_process(rank: int, port: int) -> list[list[Any]]:
    with gloo_group(rank, port):
        half = [s[:, rank * N // 2 : (rank + 1) * N // 2] for s in batch()]
        return [[p.tolist() for p in train(rule, how, *half)] for rule, how in CASES]


@pytest.fixture(scope="module")
def trained_by_two() -> list[list[list[Any]]]:
    """The parameters by rank and case."""
    return run_in_two_processes(train_in_process)


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(case) for case in CASES])
def test_two_processes_train_as_one(trained_by_two: list[list[list[Any]]], case: int) -> None:
    expected = train(CASES[case][0], "alone", *batch())
    assert all(not torch.equal(a, b) for a, b in zip(build().parameters(), expected, strict=True))
    for of_rank in trained_by_two:
        found = [torch.tensor(p) for p in of_rank[case]]
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)

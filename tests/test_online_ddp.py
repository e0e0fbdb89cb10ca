"""Two processes with half a batch each train as one process with the whole batch (gloo, on the CPU)."""

from __future__ import annotations

import multiprocessing
import socket
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from test_online_oracles import dense_net, sgd
from torch import Tensor, nn
from torch.nn import functional as F

from snnfx.online import FPTT, OTTT_A, OTTT_O, SLTT, Rule, Trainer

T, N = 5, 6
RULES: dict[str, Rule] = {"SLTT": SLTT, "OTTT-A": OTTT_A, "OTTT-O": OTTT_O, "FPTT authors": FPTT(0.5, "authors")}

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch has no torch.distributed"),
    pytest.mark.xdist_group("online_ddp"),
]


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x_seq = (torch.rand(T, N, 5, generator=generator) < 0.5).double()
    return x_seq, torch.rand(T, N, 4, generator=generator, dtype=torch.float64)


def build() -> nn.Sequential:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    return dense_net()


def train_all(x_seq: Tensor, target: Tensor, wrap: bool, **options: Any) -> dict[str, list[Tensor]]:
    """The parameters after two calls, for each rule. The mean over the batch makes halves comparable with the whole."""
    found = {}
    for name, rule in RULES.items():
        model = build()
        given = nn.parallel.DistributedDataParallel(model) if wrap else model
        trainer = Trainer(given, rule, sgd(list(model.parameters())), F.mse_loss, **options)
        for _ in range(2):
            trainer.step(x_seq, target)
        found[name] = [p.detach().clone() for p in model.parameters()]
    return found


def train_in_process(rank: int, port: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        x_seq, target = (s[:, rank * N // 2 : (rank + 1) * N // 2] for s in batch())
        by_group = train_all(x_seq, target, wrap=False, process_group="world")
        wrapped = train_all(x_seq, target, wrap=True)
        return [{n: [p.tolist() for p in ps] for n, ps in found.items()} for found in (by_group, wrapped)]
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def trained_by_two() -> list[list[dict[str, Any]]]:
    """By rank: parameters trained with `process_group="world"`, and with a DistributedDataParallel model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        return [future.result(timeout=120) for future in [pool.submit(train_in_process, r, port) for r in range(2)]]


@pytest.mark.parametrize("how", [0, 1], ids=["process group", "DistributedDataParallel"])
@pytest.mark.parametrize("rule", RULES)
def test_two_processes_train_as_one(trained_by_two: list[list[dict[str, Any]]], rule: str, how: int) -> None:
    start = [p.detach().clone() for p in build().parameters()]
    expected = train_all(*batch(), wrap=False)[rule]
    assert all(not torch.equal(a, b) for a, b in zip(start, expected, strict=True))
    for rank in range(2):
        found = [torch.tensor(p) for p in trained_by_two[rank][how][rule]]
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)

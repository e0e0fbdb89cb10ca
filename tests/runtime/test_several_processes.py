"""Two processes with half a batch each have the gradients of one process (gloo, on the CPU): tools/docs/how_to."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import snnfx
from support.two_processes import gloo_group, run_in_two_processes

T, N = 5, 6
PAGE = Path(__file__).parents[2] / "tools" / "docs" / "how_to" / "several_devices.md"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "DistributedDataParallel": ("wrap_ddp", {}),
    "DistributedDataParallel, recomputation": ("wrap_ddp", {"checkpoint": "regions"}),
    "DistributedDataParallel, budget": ("wrap_ddp", {"memory_budget": "64KiB"}),
    "FSDP2": ("wrap_fsdp", {}),
}
COMPILED = "DistributedDataParallel, compiled"

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch has no torch.distributed"),
    pytest.mark.xdist_group("several_processes"),
]


def functions_of_the_page() -> dict[str, Callable[..., Any]]:
    names: dict[str, Any] = {"__name__": "page"}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x_seq = 4 * torch.rand(T, N, 20, generator=generator, dtype=torch.float64)
    return x_seq, torch.randint(10, (N,), generator=generator)


def gradients_of(net: nn.Module, x_seq: Tensor, labels: Tensor) -> list[Tensor]:
    """The gradients that one call of the page's `train` leaves, gathered from all processes."""
    functions_of_the_page()["train"](net, torch.optim.SGD(net.parameters(), lr=0.0), x_seq, labels)
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]


def train_in_process(rank: int, port: int) -> list[list[Any]]:
    with gloo_group(rank, port):
        x_seq, labels = batch()
        mine = slice(rank * N // 2, (rank + 1) * N // 2)
        page, found = functions_of_the_page(), []
        for wrap, options in CASES.values():
            net = page[wrap](page["build"]().double(), x_seq[0, mine], **options)
            found.append([g.tolist() for g in gradients_of(net, x_seq[:, mine], labels[mine])])
        net = page["wrap_ddp"](page["build"]().double(), x_seq[0, mine])
        compiled = cast(nn.Module, torch.compile(net, backend="aot_eager"))
        found.append([g.tolist() for g in gradients_of(compiled, x_seq[:, mine], labels[mine])])
        found.append([b.tolist() for b in statistics_of(page["wrap_ddp"], x_seq[:, mine])])
        return found


def statistics_of(wrap: Callable[..., nn.Module], x_seq: Tensor) -> list[Tensor]:
    """The buffers of a BatchNorm after one call."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 8), nn.BatchNorm1d(8), snnfx.neuron.LIFNode()).double()
    wrap(model, x_seq[0])(x_seq)
    return list(model.buffers())


@pytest.fixture(scope="module")
def gradients_of_two() -> list[list[list[Any]]]:
    """The gradients by rank and case."""
    return run_in_two_processes(train_in_process)


@pytest.mark.parametrize("case", range(len(CASES) + 1), ids=[*CASES, COMPILED])
def test_two_processes_have_the_gradients_of_one(gradients_of_two: list[list[list[Any]]], case: int) -> None:
    model = functions_of_the_page()["build"]().double()
    expected = gradients_of(snnfx.convert(model), *batch())
    assert all(g.abs().max() > 0 for g in expected)
    for of_rank in gradients_of_two:
        found = [torch.tensor(g, dtype=torch.float64) for g in of_rank[case]]
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_batch_norms_have_the_statistics_of_their_process(gradients_of_two: list[list[list[Any]]]) -> None:
    x_seq, _ = batch()
    for rank, of_rank in enumerate(gradients_of_two):
        expected = statistics_of(
            lambda model, example: snnfx.convert(model, example_inputs=example),
            x_seq[:, rank * N // 2 : (rank + 1) * N // 2],
        )
        for buffer, value in zip(of_rank[-1], expected, strict=True):
            torch.testing.assert_close(torch.tensor(buffer, dtype=value.dtype), value, atol=1e-12, rtol=0)

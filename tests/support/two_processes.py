"""Run a function in two processes that form a gloo process group."""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

__all__ = ["gloo_group", "run_in_two_processes"]


@contextlib.contextmanager
def gloo_group(rank: int, port: int) -> Iterator[None]:
    """Make this process, with one thread, a member of a group of two."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def run_in_two_processes(function: Callable[[int, int], Any]) -> list[Any]:
    """The results of `function(rank, port)` of both processes; it can be pickled."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        return [future.result(timeout=120) for future in [pool.submit(function, r, port) for r in range(2)]]

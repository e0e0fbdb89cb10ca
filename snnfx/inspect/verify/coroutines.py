"""Coroutines for ordinary functions: each runs in its own thread, and only one runs at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch

from snnfx.sandbox.torch_internals import function_mode_stack

__all__ = ["Coroutine", "inherited_settings"]


class _Cancelled(BaseException):
    """Unwinds a cancelled coroutine. Not an Exception, so that handlers in the user's code do not catch it."""


class Coroutine(threading.Thread):
    """A function in its own thread, which runs only while its owner waits in `resume`.

    Args:
        work: the function; it may call `pause` on this object.
        settings: returns the context manager to run it in, see `inherited_settings`.

    Attributes:
        done: True after the function returned or was cancelled.
        result: the return value.
    """

    def __init__(self, work: Callable[[], Any], settings: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__(name="snnfx-coroutine", daemon=True)
        self.work, self.settings = work, settings
        self.go, self.stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.done = self.cancelled = False
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        self.go.acquire()
        try:
            if not self.cancelled:
                with self.settings():
                    self.result = self.work()
        except _Cancelled:
            pass
        except BaseException as error:  # raised by the waiting thread in `resume`
            self.error = error
        finally:
            self.done = True
            self.stopped.release()

    def pause(self) -> None:
        """Suspend the function, which calls this itself, until the owner calls `resume`."""
        if not self.cancelled:
            self.stopped.release()
            self.go.acquire()
        if self.cancelled:
            raise _Cancelled

    def resume(self) -> None:
        """Run the function to its next pause or to its end, and re-raise its exception."""
        if self.ident is None:
            self.start()
        self.go.release()
        self.stopped.acquire()
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        """End the function at its current pause, and wait for its thread."""
        self.cancelled = True
        if self.ident is not None:
            self.go.release()
            self.join()


def inherited_settings() -> Callable[[], ExitStack]:
    """Record settings that a new thread does not inherit: gradient mode, modes, autocast, the CUDA stream."""
    gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    modes = function_mode_stack()
    casts = [(d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
    cache = torch.is_autocast_cache_enabled()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def enter() -> ExitStack:
        stack = ExitStack()
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.set_grad_enabled(gradients))
        for mode in modes:
            stack.enter_context(mode)
        for device, dtype in casts:
            stack.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=cache))
        if stream is not None:
            stack.enter_context(torch.cuda.stream(stream))
        return stack

    return enter

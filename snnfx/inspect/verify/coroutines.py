"""Coroutines for code that knows nothing of them: functions in threads, of which one runs at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch

from snnfx.sandbox.torch_internals import function_mode_stack

__all__ = ["Coroutine", "inherited_settings"]


class _Cancelled(BaseException):
    """Unwinds a coroutine that is no longer wanted. Not an Exception, so that no handler of the user's takes it."""


class Coroutine(threading.Thread):
    """A function in a thread of its own that runs only while its owner waits for it in `resume`.

    Args:
        work: the function; it may call `pause` on this object.
        settings: gives the context to run it in, see `inherited_settings`.

    Attributes:
        done: the function has returned, or was cancelled.
        result: what it returned.
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
        except BaseException as error:  # handed to the thread that waits, which raises it
            self.error = error
        finally:
            self.done = True
            self.stopped.release()

    def pause(self) -> None:
        """Called by the function itself: let its owner go on, and wait to be resumed."""
        if not self.cancelled:
            self.stopped.release()
            self.go.acquire()
        if self.cancelled:
            raise _Cancelled

    def resume(self) -> None:
        """Run the function to its next pause or to its end, and raise what it raised."""
        if self.ident is None:
            self.start()
        self.go.release()
        self.stopped.acquire()
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        """End the function, wherever it is, and wait for that."""
        self.cancelled = True
        if self.ident is not None:
            self.go.release()
            self.join()


def inherited_settings() -> Callable[[], ExitStack]:
    """What a new thread does not take over from its parent: gradient mode, modes, autocast, the CUDA stream."""
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

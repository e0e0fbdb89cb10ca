"""The fastest of several functions for a key: measured once, stored, fixed where choices are pinned."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from snnfx.errors import SnnfxWarning
from snnfx.lowering.choices import remembered
from snnfx.lowering.choices.fastest import Choice, Fastest
from snnfx.lowering.elementwise import kernel_cache


class Clock:
    """A clock that only the timed functions advance."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, 0

    def __call__(self) -> float:
        return self.now

    def taking(self, *seconds: float) -> Callable[[], None]:
        """A function whose calls take these times; the last one repeats."""
        times = list(seconds)

        def function() -> None:
            self.calls += 1
            self.now += times.pop(0) if len(times) > 1 else times[0]

        return function


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("SNNFX_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("SNNFX_MEASURE", raising=False)
    monkeypatch.setattr(kernel_cache, "_temporary_directory", [])
    yield tmp_path


@pytest.fixture
def clock() -> Clock:
    return Clock()


def fastest(clock: Clock) -> Fastest:
    return Fastest("tested", ("a", "b"), clock)


def choose(chooser: Fastest, a: Callable[[], None], b: Callable[[], None], key: str = "key") -> Choice:
    return chooser.choose((key,), "a", lambda: {"a": a, "b": b})


def test_the_fastest_function_is_chosen(clock: Clock) -> None:
    assert choose(fastest(clock), clock.taking(2e-3), clock.taking(1e-3)) == Choice("b", "measured")
    assert choose(fastest(clock), clock.taking(1e-3), clock.taking(2e-3), "other") == Choice("a", "measured")


def test_a_small_gain_is_not_worth_a_change(clock: Clock) -> None:
    assert choose(fastest(clock), clock.taking(1.05e-3), clock.taking(1e-3)) == Choice("a", "measured")


def test_the_first_call_of_each_function_does_not_count(clock: Clock) -> None:
    assert choose(fastest(clock), clock.taking(2e-3), clock.taking(5.0, 1e-3)).name == "b"


def test_a_measurement_of_slow_functions_is_short(clock: Clock) -> None:
    choose(fastest(clock), clock.taking(20e-3), clock.taking(20e-3))
    assert clock.calls == 8  # two measurements, two rounds each


def test_interrupted_rounds_do_not_decide(clock: Clock) -> None:
    a, b = clock.taking(4e-3), clock.taking(1e-3, 9e-3, 9e-3, 1e-3)
    assert choose(fastest(clock), a, b) == Choice("b", "measured")


def test_a_key_is_measured_once(clock: Clock) -> None:
    chooser = fastest(clock)
    choose(chooser, clock.taking(2e-3), clock.taking(1e-3))
    calls = clock.calls
    assert choose(chooser, clock.taking(1e-3), clock.taking(2e-3)).name == "b"
    assert clock.calls == calls


def test_another_number_of_threads_is_another_key(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    chooser = fastest(clock)
    choose(chooser, clock.taking(2e-3), clock.taking(1e-3))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert choose(chooser, clock.taking(1e-3), clock.taking(2e-3)).name == "a"


def test_of_two_measurements_that_differ_a_third_decides(clock: Clock, folder: Path) -> None:
    slow_at_first = clock.taking(*[3e-3] * 5, 1e-3)  # the first measurement ends after its rounds
    assert choose(fastest(clock), clock.taking(2e-3), slow_at_first) == Choice("b", "measured")
    assert list(folder.iterdir())


def test_three_measurements_that_differ_leave_the_fixed_choice_and_are_not_stored(clock: Clock, folder: Path) -> None:
    chooser = Fastest("tested", ("a", "b", "c"), clock)
    names = iter("abc")
    chooser.measure = lambda fixed, functions: next(names)  # type: ignore[method-assign]
    found = chooser.choose(("key",), "a", dict)
    assert found == Choice("a", "fixed after three measurements that differ")
    assert not list(folder.iterdir())


def test_another_process_reads_the_choice_from_disk(clock: Clock) -> None:
    choose(fastest(clock), clock.taking(2e-3), clock.taking(1e-3))
    calls = clock.calls
    assert choose(fastest(clock), clock.taking(1e-3), clock.taking(2e-3)) == Choice("b", "measured")
    assert clock.calls == calls


@pytest.mark.parametrize("content", ["", "{", "[]", '{"no": "key"}', '{"(\'key\', THREADS)": "c"}', '{"k": 1}', "\xff"])
def test_a_file_that_is_truncated_or_foreign_is_measured_anew(clock: Clock, folder: Path, content: str) -> None:
    choose(fastest(clock), clock.taking(2e-3), clock.taking(1e-3))
    (path,) = folder.glob("tested_*.json")
    path.write_text(content.replace("THREADS", str(torch.get_num_threads())), encoding="latin-1")
    assert choose(fastest(clock), clock.taking(1e-3), clock.taking(2e-3)) == Choice("a", "measured")
    assert set(json.loads(path.read_text()).values()) >= {"a"}


def test_a_folder_that_cannot_be_written_keeps_the_choice_in_this_process(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SNNFX_CACHE_DIR", "/proc/snnfx")
    chooser = fastest(clock)
    with pytest.warns(SnnfxWarning, match="SNNFX510"):
        choose(chooser, clock.taking(2e-3), clock.taking(1e-3))
    assert choose(chooser, clock.taking(1e-3), clock.taking(2e-3)).name == "b"


def test_two_full_folders_end_no_call(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(content: bytes, path: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remembered, "write_atomically", full)
    with pytest.warns(SnnfxWarning, match="SNNFX510.*measured choices cannot be stored.*No space left"):
        assert choose(fastest(clock), clock.taking(2e-3), clock.taking(1e-3)) == Choice("b", "measured")


def test_deterministic_algorithms_fix_the_choice(clock: Clock) -> None:
    chooser = fastest(clock)
    choose(chooser, clock.taking(2e-3), clock.taking(1e-3))
    torch.use_deterministic_algorithms(True)
    try:
        choice = choose(chooser, clock.taking(2e-3), clock.taking(1e-3))
    finally:
        torch.use_deterministic_algorithms(False)
    assert choice == Choice("a", "fixed by torch.use_deterministic_algorithms(True)", is_final=False)
    assert choose(chooser, clock.taking(2e-3), clock.taking(1e-3)).name == "b"


def test_an_environment_variable_pins_the_choice(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNNFX_MEASURE", "0")
    choice = choose(fastest(clock), clock.taking(2e-3), clock.taking(1e-3))
    assert choice == Choice("a", "fixed by SNNFX_MEASURE=0", is_final=False)
    assert clock.calls == 0


def profiled() -> torch.profiler.profile:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


@pytest.mark.parametrize(
    "context",
    [
        lambda: FlopCounterMode(display=False),
        profiled,
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
        lambda: torch.device("cpu"),
        torch.autograd.detect_anomaly,
        torch.autograd.forward_ad.dual_level,
    ],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_nothing_is_measured_while_something_watches(clock: Clock, context: Callable[[], object]) -> None:
    chooser = fastest(clock)
    with context():  # type: ignore[attr-defined]
        choice = choose(chooser, clock.taking(2e-3), clock.taking(1e-3))
    assert (choice.name, choice.is_final, clock.calls) == ("a", False, 0)
    assert choose(chooser, clock.taking(2e-3), clock.taking(1e-3)) == Choice("b", "measured")


def test_nothing_is_measured_in_a_backward_pass(clock: Clock) -> None:
    chooser, choices = fastest(clock), []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: choices.append(choose(chooser, clock.taking(2e-3), clock.taking(1e-3))))
    x.sum().backward()
    assert [(choice.name, choice.is_final) for choice in choices] == [("a", False)]


def test_two_threads_measure_a_key_once(clock: Clock) -> None:
    chooser, made, barrier = fastest(clock), [], threading.Barrier(2)
    choices: list[Choice] = []

    def functions() -> dict[str, Callable[[], None]]:
        made.append(threading.get_ident())
        return {"a": clock.taking(2e-3), "b": clock.taking(1e-3)}

    def work() -> None:
        barrier.wait()
        choices.append(chooser.choose(("key",), "a", functions))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [choice.name for choice in choices] == ["b", "b"]
    assert len(made) == 2 and len(set(made)) == 1  # both measurements in one thread


def test_the_margin_decides_between_functions_that_take_about_the_same_time(clock: Clock) -> None:
    names = ("fixed", "other")
    for margin, expected in ((0.9, "fixed"), (1.0, "other")):
        found = Fastest(f"margin_{margin}", names, clock, margin)
        ways = {"fixed": clock.taking(1e-3), "other": clock.taking(0.95e-3)}
        assert found.measure("fixed", ways) == expected


def test_functions_that_draw_random_numbers_are_not_timed(clock: Clock) -> None:
    slow = clock.taking(2e-3)

    def draws() -> None:
        slow()
        torch.rand(3)

    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    chooser = fastest(clock)
    choice = choose(chooser, draws, clock.taking(1e-3))
    torch.testing.assert_close(torch.rand(2), expected)  # the caller draws the numbers that it would draw without
    assert choice.name == "a"
    assert clock.calls == 2

"""Fuzz snnfx: convert random single-step models and compare them with a Python loop over time, in float64.

    python tools/fuzz --n 10000 --seed 0 --jobs 2 --out build/fuzz

Prints the outcomes by kind and, for each failure, writes a script that reproduces it with a model as small as possible.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import multiprocessing
import random
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

_TOOLS = Path(__file__).parent
for _folder in (str(_TOOLS.parents[1]), str(_TOOLS)):
    if _folder not in sys.path:
        sys.path.insert(0, _folder)

import fuzz_checks  # noqa: E402
from fuzz_checks import CHECKS, Inapplicable, Mismatch, Refused, Setting, check_model  # noqa: E402
from fuzz_models import Case, build, namespace_of, random_case, smaller_cases  # noqa: E402
from fuzz_verify import verdicts  # noqa: E402

from snnfx._progress import progress  # noqa: E402
from snnfx.errors import CaptureError, InputError  # noqa: E402

__all__ = ["Outcome", "fuzz_one", "main", "reproducer", "run_check", "shrink"]

KERNEL_INTERVAL = 25
"""One in this many models runs with generated kernels."""

VERIFY = "verify"
"""Name of the check of `snnfx.verify`, which takes seconds for a model and runs only if it is asked for."""

_RANDOM = re.compile(r"Dropout\w*\(0\.3\)|0\.3, self\.training")


@dataclass(frozen=True)
class Outcome:
    """The outcome of one check of one model.

    Args:
        kind: "ok", "skipped", "refused", "mismatch", "rounding" or "crash".
        check: the name of the check.
        detail: error code or exception type; outcomes with the same detail count as the same failure.
        text: the message or traceback.
    """

    kind: str
    check: str
    detail: str = ""
    text: str = ""

    @property
    def failed(self) -> bool:
        return self.kind in ("mismatch", "crash")

    def is_same_failure(self, other: Outcome) -> bool:
        return (self.kind, self.check, self.detail) == (other.kind, other.check, other.detail)


@dataclass
class Result:
    """The outcomes of the checks of one seed."""

    seed: int
    outcomes: list[Outcome] = field(default_factory=list)
    regions: Counter[str] = field(default_factory=Counter)
    script: str = ""
    seconds: float = 0.0


def setting_of(case: Case, examples: bool) -> Setting:
    """The setting in which the checks run a case."""
    is_random = bool(_RANDOM.search(case.source()))
    lower = case.seed % KERNEL_INTERVAL == 0
    return Setting(tuple(case.shapes), tuple(case.invariant), case.T, case.seed, examples, is_random, lower)


def run_check(case: Case, check: str, examples: bool, model: nn.Module | None = None) -> Outcome:
    """Run one check of a case; checks of the same `model` share its converted nets."""
    try:
        model = build(case) if model is None else model
    except Exception as error:  # shrinking may produce code that does not run
        return Outcome("skipped", check, type(error).__name__, str(error))
    try:
        check_model(model, setting_of(case, examples), check)
    except Refused as refusal:
        return Outcome("refused", check, refusal.code, str(refusal))
    except CaptureError as refusal:  # the state appears only when the net runs
        return Outcome("refused", check, f"{refusal.code} at the call", str(refusal))
    except InputError as refusal:  # the shape of the state is known only when the net runs
        if refusal.code != "SNNFX313" or "changes its shape" not in str(refusal):
            return Outcome("crash", check, _location(refusal), traceback.format_exc())
        return Outcome("refused", check, f"{refusal.code} at the call", str(refusal))
    except Inapplicable as reason:
        return Outcome("skipped", check, "inapplicable", str(reason))
    except Mismatch as difference:
        text = str(difference)
        return Outcome("mismatch", check, re.split(r"[\[:(]", text)[0], text)
    except Exception as error:
        return Outcome("crash", check, _location(error), traceback.format_exc())
    return Outcome("ok", check)


def _location(error: Exception) -> str:
    """The type of an error and the innermost frame of snnfx in its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    frames = [f for f in frames if "/snnfx/" in f.filename or "/passes/" in f.filename]  # type: ignore[assignment]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else ""
    return f"{type(error).__name__} {getattr(error, 'code', '')} {where}"


def fuzz_one(seed: int, extra_checks: int = 2, shrink_seconds: float = 20.0, only: str = "") -> Result:
    """Build the model of a seed, run the checks, and shrink the first failure."""
    start = time.perf_counter()
    result = Result(seed)
    case = random_case(seed)
    if case is None:
        result.outcomes.append(Outcome("skipped", "generate"))
        return result
    r = random.Random(seed)
    if only == VERIFY:
        return _fuzz_verify(case, r.random() < 0.8, start)
    namespace = namespace_of(case)
    checks = [*CHECKS[:3], *r.sample(CHECKS[3:], extra_checks)]
    before = fuzz_checks.REGIONS_SEEN.copy()
    examples = r.random() < 0.6
    model = build(case, namespace)
    for check in [only] if only else checks:
        outcome = run_check(case, check, examples, model)
        examples = examples or outcome.detail.startswith("SNNFX202")  # then the other checks can run
        if outcome.failed:
            on_fresh_model = run_check(case, check, examples)
            is_mismatch = outcome.kind == "mismatch" and on_fresh_model.failed
            if is_mismatch and not _fails_with_other_numbers(case, outcome, examples):
                outcome = Outcome("rounding", check, outcome.detail, outcome.text)
            elif shrink_seconds:
                case = shrink(case, outcome, examples, shrink_seconds)
            result.script = reproducer(case, outcome, examples)
        result.outcomes.append(outcome)
        if result.script or (check == "train" and outcome.kind == "skipped"):
            break
    result.regions = fuzz_checks.REGIONS_SEEN - before
    sys.modules.pop(str(namespace["__name__"]), None)
    result.seconds = time.perf_counter() - start
    return result


def _fuzz_verify(case: Case, examples: bool, start: float) -> Result:
    """Verify the nets of a case, right and broken ones; the script contains the model of the first failure."""
    result = Result(case.seed)
    for v in verdicts(case, setting_of(case, examples)):
        check = f"{v.check} ({v.detail})" if v.kind == "ok" else v.check
        result.outcomes.append(Outcome(v.kind, check, v.detail, v.text))
        if result.outcomes[-1].failed:
            heading = "".join(f"# {line}\n" for line in f"seed {case.seed}: {check}: {v.text}".splitlines())
            result.script = f"{heading}\n{case.source()}"
            break
    result.seconds = time.perf_counter() - start
    return result


def _fails_with_other_numbers(case: Case, outcome: Outcome, examples: bool) -> bool:
    """Whether the check also fails with other random numbers, so that rounding at a threshold is not the cause."""
    others = (dataclasses.replace(case.copy(), seed=case.seed + shift) for shift in (10**8, 2 * 10**8, 3 * 10**8))
    return any(run_check(other, outcome.check, examples).failed for other in others)


def shrink(case: Case, outcome: Outcome, examples: bool, seconds: float) -> Case:
    """Remove parts of a case while it still fails in the same way."""
    deadline = time.perf_counter() + seconds
    changed = True
    while changed and time.perf_counter() < deadline:
        changed = False
        for smaller in smaller_cases(case):
            if time.perf_counter() > deadline:
                break
            if run_check(smaller, outcome.check, examples).is_same_failure(outcome):
                case, changed = smaller, True
                break
    return case


def reproducer(case: Case, outcome: Outcome, examples: bool) -> str:
    """A script that reproduces a failure and needs only snnfx."""
    setting = setting_of(case, examples)
    main = f"""
if __name__ == "__main__":
    torch.manual_seed({case.seed})
    check_model(Model().double(), {setting!r}, "{outcome.check}")
    print("no difference")
"""
    heading = "".join(f"# {line}\n" for line in f"seed {case.seed}: {outcome.text}".splitlines()[:1])
    checks = (_TOOLS / "fuzz_checks.py").read_text()
    future = "from __future__ import annotations\n"
    return f"{future}\n{heading}\n{case.source()}\n\n{checks.replace(future, '')}\n{main}"


def _prepare_worker() -> None:
    import torch._dynamo  # takes seconds to import, so do it before the fork

    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")


def _results(arguments: argparse.Namespace) -> Iterator[Result]:
    seeds = range(arguments.seed, arguments.seed + arguments.n)
    work = functools.partial(
        fuzz_one, extra_checks=arguments.extra, only=arguments.check, shrink_seconds=arguments.shrink
    )
    _prepare_worker()
    if arguments.jobs == 1:
        yield from map(work, seeds)
        return
    # Forked workers share the imported modules; forking is safe because torch has not started threads yet.
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    with context.Pool(arguments.jobs, _prepare_worker, maxtasksperchild=1000) as pool:
        yield from pool.imap_unordered(work, seeds, chunksize=10)


class Tally:
    """Counts of the outcomes of all models."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.start = time.perf_counter()
        self.models: Counter[str] = Counter()
        self.checks: Counter[str] = Counter()
        self.refusals: dict[str, Counter[str]] = {}
        self.regions: Counter[str] = Counter()
        self.failures: dict[tuple[str, str, str], list[int]] = {}

    def add(self, result: Result) -> None:
        kinds = [o.kind for o in result.outcomes]
        order = ("crash", "mismatch", "rounding", "refused", "ok", "skipped")
        self.models[next(kind for kind in order if kind in kinds)] += 1
        self.regions.update(result.regions)
        for outcome in result.outcomes:
            self.checks[f"{outcome.check} {outcome.kind}"] += 1
            if outcome.kind == "refused":
                why = re.sub(r"`[^`]*`|\d+", "*", outcome.text.partition(": ")[2].splitlines()[0])[:90]
                self.refusals.setdefault(outcome.detail, Counter())[why] += 1
        if result.script:
            last = result.outcomes[-1]
            print(
                f"{last.kind} in {last.check}, seed {result.seed}: {last.text.strip().splitlines()[-1][:200]}",
                file=sys.stderr,
                flush=True,
            )
            self.failures.setdefault((last.kind, last.check, last.detail), []).append(result.seed)
            self._write(result, last)

    def _write(self, result: Result, outcome: Outcome) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{outcome.kind}_{outcome.check.replace(' ', '_')}_{result.seed}.py"
        (self.folder / name).write_text(result.script)
        with (self.folder / "failures.txt").open("a") as log:
            log.write(f"== {name}\n{outcome.text}\n\n")

    def __str__(self) -> str:
        seconds = time.perf_counter() - self.start
        count = sum(self.models.values())
        lines = [f"{count} models in {seconds:.0f} s: {count / seconds:.1f} per second"]
        for what, counts in (("models", self.models), ("checks", self.checks), ("regions", self.regions)):
            lines.append(f"{what}: {_listed(counts)}")
        for code, reasons in sorted(self.refusals.items()):
            lines.append(f"refused with {code}: {sum(reasons.values())} checks")
            lines += [f"    {n:5} {why}" for why, n in reasons.most_common(8)]
        for (kind, check, detail), seeds in sorted(self.failures.items()):
            lines.append(f"{kind} in {check} ({detail}): {len(seeds)}, seeds {seeds[:6]}")
        return "\n".join(lines)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1000, help="number of models (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="first seed (default: 0)")
    parser.add_argument("--seconds", type=float, default=0.0, help="stop after so many seconds (default: no limit)")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes (default: 1)")
    parser.add_argument(
        "--extra", type=int, default=2, help="random checks per model, besides train, eval and fold (default: 2)"
    )
    names = ", ".join((*CHECKS, VERIFY))
    parser.add_argument(
        "--check", default="", choices=["", *CHECKS, VERIFY], metavar="CHECK", help=f"run only this check: {names}"
    )
    parser.add_argument(
        "--shrink", type=float, default=20.0, help="seconds to spend on shrinking a failing model (default: 20)"
    )
    parser.add_argument("--out", type=Path, default=None, help="folder for the scripts that reproduce failures")
    arguments = parser.parse_args(argv)
    tally = Tally(arguments.out)
    shown = time.perf_counter()
    with progress("fuzz", arguments.n, "models") as bar:
        for result in _results(arguments):
            bar.clear()
            tally.add(result)
            if arguments.seconds and time.perf_counter() - tally.start > arguments.seconds:
                break
            if time.perf_counter() - shown > 30:
                shown = time.perf_counter()
                print(f"... {_listed(tally.models)}", file=sys.stderr, flush=True)
            bar.advance()
    print(tally)
    return 1 if tally.models["crash"] + tally.models["mismatch"] else 0


if __name__ == "__main__":
    sys.exit(main())

"""Check and time the Triton kernels on a card, in less than five minutes.

    bash tools/gpu.sh [--minutes 4.7] [--seconds 0.5] [--json tools/results]
    bash tools/gpu.sh --interpret          tiny sizes in Triton's interpreter, on the CPU: its times mean nothing

Runs the tests of the kernels, then layers of LIF neurons beside SpikingJelly's kernels and device copies, then two
networks in training and inference: eager, compiled, channels-last, and from a CUDA graph where N is small. The results
are printed, and written to gpu_<date>_<card>.json. SpikingJelly 2 chooses its kernels itself;
SJ_LIF_CUDA_IMPLEMENTATION=triton asks for those in Triton.

Exit status: 0 if all rows are complete, 1 if a test or a row failed or the time was over, 2 without a card or Triton.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "tools" / "results"
TEST_SECONDS = 120.0
"""The longest time for the tests of the kernels."""
VERSIONS = ("torch", "triton", "spikingjelly", "cupy")


class OutOfTime(BaseException):
    """The time of the run is over; not an Exception, so that no handler of a row takes it."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/gpu.sh", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--interpret", action="store_true", help="tiny sizes in Triton's interpreter, on the CPU")
    parser.add_argument("--minutes", type=float, default=4.7, help="end of the run; rows left are named (default: 4.7)")
    parser.add_argument("--seconds", type=float, default=0.5, help="minimum time per comparison (default: 0.5)")
    parser.add_argument("--json", type=Path, help=f"folder for the results ({RESULTS}; with --interpret: none)")
    arguments = parser.parse_args()
    # Triton reads the variable when it is imported, which torch may do.
    if arguments.interpret:
        os.environ.update(TRITON_INTERPRET="1", SNNFX_KERNELS="triton")
    else:
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ.pop("SNNFX_KERNELS", None)
    missing = what_is_missing(arguments.interpret)
    if missing:
        print(f"error: {missing}", file=sys.stderr)
        return 2
    report: dict[str, Any] = {"machine": machine(arguments.interpret)}
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()), flush=True)
    signal.signal(signal.SIGALRM, _stop)
    # Again every second: Python drops an exception that is raised in a callback or a finalizer.
    signal.setitimer(signal.ITIMER_REAL, 60 * arguments.minutes, 1.0)
    begin = time.perf_counter()
    try:
        run(report, arguments.interpret, 0.0 if arguments.interpret else arguments.seconds)
    except OutOfTime:
        signal.setitimer(signal.ITIMER_REAL, 0)
        report["stopped"] = f"after {arguments.minutes:g} minutes"
        print(
            f"stopped after {arguments.minutes:g} minutes; not measured: {', '.join(report.get('left', ['all']))}",
            flush=True,
        )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    report["seconds"] = round(time.perf_counter() - begin, 1)
    folder = arguments.json or (None if arguments.interpret else RESULTS)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / file_name(report["machine"])
        path.write_text(json.dumps(report, indent=2) + "\n")
        print(f"\nwritten: {path}")
    return int(has_failed(report))


def what_is_missing(interpreted: bool) -> str | None:
    """One line about what the run needs and this machine lacks."""
    for package, hint in (
        ("torch", "install PyTorch"),
        ("triton", "PyTorch's builds for NVIDIA cards bring it; for the interpreter: pip install triton"),
        ("pytest", 'pip install ".[test]"'),
        ("hypothesis", 'pip install ".[test]"'),
        *((("numpy", "Triton's interpreter computes with it: pip install numpy"),) if interpreted else ()),
    ):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed; {hint}"
    if interpreted:
        return None
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build, or run with --interpret"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA card; run it on a machine with a card, or with --interpret"
    return None


def machine(interpreted: bool) -> dict[str, Any]:
    """Date, card and versions."""
    import torch

    found: dict[str, Any] = {"date": datetime.date.today().isoformat()}
    if interpreted:
        found["card"] = "interpreter"
    else:
        properties = torch.cuda.get_device_properties(0)
        found["card"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["memory in GiB"] = round(properties.total_memory / 2**30, 1)
        found["cuda"] = torch.version.cuda
        found["float32 products"] = torch.get_float32_matmul_precision()
    found["python"] = platform.python_version()
    for name in VERSIONS:
        if importlib.util.find_spec(name) is not None:
            found[name] = getattr(sys.modules.get(name), "__version__", None) or _version(name)
    return found


def run(report: dict[str, Any], interpreted: bool, seconds: float) -> None:
    """Fill the report section by section; "left" names the rows that still have to run."""
    import gpu_cases

    target = gpu_cases.Target(interpreted, seconds)
    layers, nets = gpu_cases.card_layers(interpreted), gpu_cases.card_networks(interpreted)
    report["left"] = ["tests", *map(str, layers), *(str(case) for case, _ in nets)]
    report["layers"], report["networks"] = [], []
    if not gpu_cases.has_spikingjelly():
        report["note"] = "SpikingJelly is not installed: no rows of its kernels, and no SEW-ResNet-18"
        print(report["note"])
    report["tests"] = gpu_cases.run_kernel_tests(interpreted, TEST_SECONDS)
    show_tests(report["tests"])
    report["left"].pop(0)
    for heading, section, show, rows in (
        ("LIF layers", "layers", show_layer, [(gpu_cases.measure_layer, (case, target)) for case in layers]),
        ("networks", "networks", show_network, [(gpu_cases.measure_network, (*net, target)) for net in nets]),
    ):
        print(f"\n{heading}: ms" + (" (of the interpreter: they mean nothing)" if interpreted else ""), flush=True)
        for measure, values in rows:
            row = _measured(measure, values)
            report[section].append(row)
            report["left"].pop(0)
            show(row)
            for name, reason in row["failed"].items():
                print(f"    FAILED  {name}: {reason}", flush=True)


def _measured(measure: Callable[..., dict[str, Any]], values: tuple[Any, ...]) -> dict[str, Any]:
    """A row; if it cannot be measured at all, with the reason."""
    try:
        return measure(*values)
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        return {"case": values[0].__dict__, "failed": {"the row": f"{type(error).__name__}: {reason}"}}


def show_tests(tests: dict[str, Any]) -> None:
    print(f"\nkernels: {tests['passed']} tests passed, {len(tests['failed'])} failed, {tests['skipped']} skipped")
    for name in tests["failed"]:
        print(f"    FAILED  {name}")


def show_layer(row: dict[str, Any]) -> None:
    case = row["case"]
    for kind in ("forward", "training"):
        for clock, times in row.get(kind, {}).items():
            print(f"  T={case['T']:<3} {case['dtype']:<8} {kind:<9} {clock:<7} {_line(times, 'copies')}", flush=True)


def show_network(row: dict[str, Any]) -> None:
    case = row["case"]
    for kind in ("inference", "training"):
        if kind in row:
            label = f"{case['network']} T={case['T']} N={case['N']}"
            print(f"  {label:<29} {kind:<10} {_line(row[kind], 'floor')}", flush=True)


def _line(times: dict[str, float], bound: str) -> str:
    """Times, each with its ratio to the bound."""
    limit = times.get(bound)
    return "  ".join(
        f"{name} {value:.3f}" + (f" ({value / limit:.2f})" if limit and name != bound else "")
        for name, value in times.items()
    )


def has_failed(report: dict[str, Any]) -> bool:
    rows = [*report.get("layers", ()), *report.get("networks", ())]
    return bool("stopped" in report or report["tests"]["failed"] or any(row["failed"] for row in rows))


def file_name(machine: dict[str, Any]) -> str:
    card = re.sub(r"[^a-z0-9]+", "_", machine["card"].lower()).strip("_")
    return f"gpu_{machine['date']}_{card}.json"


def _version(name: str) -> str:
    distributions = importlib.metadata.packages_distributions().get(name, [name])
    return importlib.metadata.version(distributions[0])


def _stop(number: int, frame: FrameType | None) -> None:
    raise OutOfTime


if __name__ == "__main__":
    sys.exit(main())

"""Benchmark snnfx against other libraries and against lower bounds of the running time.

    python tools/bench [layers] [networks] [events] [compiling] [--quick] [--json tools/results]
    python tools/bench --check 3     lists the rows that are more than 3 % slower than the figures in tools/results

Each case runs in a fresh process, in which the implementations alternate; the results are ratios of their medians. All
of them use the same threads and the same malloc settings: the default ones, and settings that keep freed blocks in the
process, as `snnfx.tune_allocator()` does.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import comparison
import compiling
import events
import layers
import networks
import torch
from timing import MALLOC, fresh_process

from snnfx._progress import progress

RESULTS = Path(__file__).resolve().parent.parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/bench", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "what", nargs="*", help="suites: layers, networks, events, compiling (default: layers and networks)"
    )
    parser.add_argument("--quick", action="store_true", help="run only a few cases")
    parser.add_argument("--seconds", type=float, default=1.5, help="minimum time per comparison (default: 1.5)")
    parser.add_argument("--malloc", choices=[*MALLOC, "both"], default="both", help="malloc settings (default: both)")
    parser.add_argument(
        "--compile", action="store_true", help="also measure SpikingJelly under torch.compile (takes minutes)"
    )
    parser.add_argument("--json", type=Path, help=f"folder for the results, e.g. {RESULTS}")
    parser.add_argument("--svg", type=Path, help="file for a chart of the results")
    parser.add_argument(
        "--check",
        type=float,
        nargs="?",
        const=3.0,
        metavar="PERCENT",
        help="compare the ratios with the figures in --figures; exit status 1 if a row is slower by more (default: 3)",
    )
    parser.add_argument("--figures", type=Path, default=RESULTS, help=f"folder of the earlier figures ({RESULTS})")
    arguments = parser.parse_args()
    unknown = set(arguments.what) - {*SUITES}
    if unknown:
        parser.error(f"unknown suite: {', '.join(sorted(unknown))} (choose from {', '.join(SUITES)})")
    suites = arguments.what or ["layers", "networks"]
    # Read before --json writes to the same folder.
    figures = {name: comparison.committed(arguments.figures, name) for name in suites}
    if arguments.check is not None:
        for name in suites:
            if figures[name] is None:
                parser.error(f"--check: {arguments.figures} has no figures of the suite {name}")
    mallocs = list(MALLOC) if arguments.malloc == "both" else [arguments.malloc]
    machine = _machine()
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    results: dict[str, Any] = {}
    for name in suites:
        module, show = SUITES[name]
        cases = module.QUICK if arguments.quick else module.CASES
        if arguments.compile and name == "layers":
            cases = (*cases, layers.LayerCase("LIF", 16, 256 * layers.K, compiled=True))
        results[name] = []
        for malloc in mallocs if name != "compiling" else mallocs[:1]:
            _headline(name, malloc)
            with progress(f"bench {name}", len(cases), "cases", delay=0.0) as bar:
                for case in cases:
                    with fresh_process(malloc) as call:
                        result = {"malloc": malloc, **call(module.measure, case, arguments.seconds)}
                    results[name].append(result)
                    bar.clear()
                    show(result)
                    bar.advance()
        if arguments.json:
            arguments.json.mkdir(parents=True, exist_ok=True)
            path = arguments.json / f"{name}_cpu.json"
            path.write_text(json.dumps({"machine": machine, "cases": results[name]}, indent=2) + "\n")
    if arguments.svg:
        import plots

        plots.draw(results, arguments.svg)
    if arguments.check is None:
        return 0
    return _check(results, figures, machine, arguments.check)


def _check(results: dict[str, Any], figures: dict[str, Any], machine: dict[str, Any], percent: float) -> int:
    """Print the rows that became slower; 1 if there are any."""
    worse = False
    for name, now in results.items():
        earlier, before = figures[name]
        print(f"\n{name}, compared with the figures of {earlier['date']}")
        other = [key for key in ("torch", "threads", "cores", "cpu") if earlier.get(key) != machine[key]]
        if other:
            differences = ", ".join(f"{key} {earlier.get(key)}, now {machine[key]}" for key in other)
            print(f"  the committed figures are of another machine: {differences}")
        text, is_slower = comparison.report(comparison.changes(before, now), percent)
        print(text)
        worse |= is_slower
    return int(worse)


def _machine() -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "spikingjelly", "snntorch", "norse")}
    return {
        "date": datetime.date.today().isoformat(),
        **versions,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def _headline(name: str, malloc: str) -> None:
    print(f"\n{name}, {malloc} malloc settings")
    if name == "compiling":
        print(f"  {'network':<18}{'library':<14}{'T':>16}{'first step':>14}{'graphs':>8}")
    elif name == "layers":
        columns = f"{'peer':<13}{'forward':>22}{'training':>24}{'kernel / copy':>19}"
        print(f"  {'neuron':<18}{'T':>5}{'neurons':>9}   {columns}")
    else:
        rate = f"{'rate':>6}" if name == "events" else ""
        print(f"  {'network':<18}{'T':>5}{'N':>5}{rate}{'inference':>35}{'training':>41}{'/ lower bound':>16}")


def _show_layer(result: dict[str, Any]) -> None:
    case, forward, training = result["case"], result["forward"], result["training"]
    peers = [name for name in forward if name not in ("snnfx", "kernels alone", "one pass")]
    for peer in peers:
        columns = (
            f"{times['snnfx']:8.2f} ms {times[peer] / times['snnfx']:6.1f}x faster" for times in (forward, training)
        )
        limits = " ".join(
            f"{times['kernels alone'] / times[limit]:8.2f}"
            for times, limit in ((forward, "one pass"), (training, "three passes"))
        )
        neurons = f"{case['elements'] >> 10}k"
        print(
            f"  {case['neuron']:<18}{case['T']:>5}{neurons:>9}   {peer:<13}" + " ".join(columns) + f"   {limits}",
            flush=True,
        )


def _show_network(result: dict[str, Any]) -> None:
    case = result["case"]
    rate = f"{case['rate']:>6.0%}" if "rate" in case else ""
    line = f"  {case['network']:<18}{case['T']:>5}{case['N']:>5}{rate}"
    for kind in ("inference", "training"):
        times = result[kind]
        peer = f"{times['SpikingJelly'] / times['snnfx']:5.1f}x vs SJ" if "SpikingJelly" in times else " " * 12
        line += f"   {times['snnfx']:8.1f} ms {times['stepped'] / times['snnfx']:6.1f}x vs step {peer}"
    limits = " ".join(f"{result[kind]['snnfx'] / result[kind]['floor']:6.2f}" for kind in ("inference", "training"))
    print(f"{line}   {limits}", flush=True)


def _show_events(result: dict[str, Any]) -> None:
    _show_network(result)
    layers = result["layers"].items()
    ways = [f"{name} {'by events' if d['by_events'] else 'dense'} at {d['density']:.0%}" for name, d in layers]
    print(f"{'':<20}layers in inference: {', '.join(ways) or 'dense'}", flush=True)


def _show_compiling(result: dict[str, Any]) -> None:
    case = result["case"]
    if "seconds" not in result:
        ratios = ", ".join(
            f"{kind} {times['snnfx']:.2f} ms, {times['net'] / times['snnfx']:.2f} of the speed of the net "
            f"(compiler {times['compiler']:.2f} ms)"
            for kind in ("inference", "training")
            for times in [result[kind]]
        )
        print(f"  {case['network']:<18}T={case['T']} N={case['N']}: {ratios}", flush=True)
        return
    T = str(case["T"] or ", ".join(map(str, compiling.LENGTHS)))
    print(
        f"  {case['network']:<18}{case['side']:<14}{T:>16}{result['seconds']:>12.1f} s{result['graphs']:>8}", flush=True
    )


SUITES: dict[str, tuple[Any, Callable[[dict[str, Any]], None]]] = {
    "layers": (layers, _show_layer),
    "networks": (networks, _show_network),
    "events": (events, _show_events),
    "compiling": (compiling, _show_compiling),
}

if __name__ == "__main__":
    sys.exit(main())

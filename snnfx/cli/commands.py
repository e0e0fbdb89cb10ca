"""Commands `python -m snnfx explain|draw|verify|profile|export pkg.module:factory`.

Exit codes: 0 for success, 1 if `verify` found a difference, 2 if the model cannot be loaded or converted or an option
is illegal.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import snnfx
from snnfx.cli.model_factory import load_model
from snnfx.convert import convert
from snnfx.deploy.export import export_request, write_export
from snnfx.errors import InputError, SnnfxError, VerificationError, describe_code
from snnfx.inspect.document import WIDTH
from snnfx.inspect.explain import explain
from snnfx.inspect.picture.draw import draw
from snnfx.inspect.profile.profile import profile
from snnfx.inspect.profile.profile_report import check_report_file
from snnfx.inspect.verify.verify import verify
from snnfx.ir.options import ConvertKeywords
from snnfx.memory.budget import read_memory_budget
from snnfx.runtime.net import Net

__all__ = ["main"]

_EXAMPLES = """\
examples:
  python -m snnfx explain models.csnn:build --input 2,1,28,28
  python -m snnfx explain models/csnn.py:CSNN --markdown
  python -m snnfx explain models.csnn:build --input 32,1,28,28 --T 64 --memory-budget 2GiB --plot memory.svg
  python -m snnfx explain --code SNNFX103
  python -m snnfx draw models.csnn:build --input 2,1,28,28 --out net.svg
  python -m snnfx verify models.csnn:build --input 2,1,28,28 --T 8 --double
  python -m snnfx verify models.spikformer:build --takes sequence --input 4,2,3,32,32
  python -m snnfx profile models.csnn:build --input 2,1,28,28 --T 8 --train --out profile.html
  python -m snnfx export models.csnn:build --input 2,1,28,28 --T 8 --out net.onnx
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        argv: the arguments after ``python -m snnfx``. Default: the arguments of the process.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)  # type: ignore[no-any-return]
    except VerificationError as error:
        print(error, file=sys.stderr)
        return 1
    except SnnfxError as error:
        print(error, file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m snnfx",
        description="Explain, draw, verify, profile or export the conversion of a single-step model.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"snnfx {snnfx.__version__} (torch {torch.__version__})")
    commands = parser.add_subparsers(required=True, metavar="{explain,draw,verify,profile,export}")

    command = _command(commands, "explain", _explain, "report which nodes are folded, mapped or looped, and why")
    command.add_argument("--code", metavar="SNNFX103", help="print the meaning of a code; needs no model")
    command.add_argument("--T", type=int, metavar="STEPS", help="also predict the memory of a call on STEPS time steps")
    command.add_argument("--plot", metavar="FILE.svg", help="draw the memory during the call to a file; needs --T")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print Markdown")
    form.add_argument("--json", action="store_true", help="print JSON")

    command = _command(commands, "draw", _draw, "draw the converted net")
    command.add_argument("--out", default="net.svg", metavar="FILE", help=".svg, .png, .pdf or .dot (default: net.svg)")
    command.add_argument(
        "--depth", type=int, metavar="LEVELS", help="draw modules below this level as boxes (default: none of them)"
    )

    command = _command(commands, "verify", _verify, "compare the net with the model run step by step, on random inputs")
    command.add_argument("--T", type=int, default=8, metavar="STEPS", help="number of time steps (default: 8)")
    command.add_argument("--double", action="store_true", help="compare in float64")

    command = _command(commands, "profile", _profile, "measure time, spikes and operations of a call, on random inputs")
    command.add_argument("--T", type=int, default=8, metavar="STEPS", help="number of time steps (default: 8)")
    command.add_argument("--train", action="store_true", help="measure a training step: forward and backward")
    command.add_argument("--record", action="append", default=[], metavar="lif1", help="show a layer over time; repeat")
    command.add_argument("--repeats", type=int, default=5, metavar="CALLS", help="measured calls (default: 5)")
    command.add_argument("--out", metavar="FILE", help="also write .html, .md or .json")

    command = _command(commands, "export", _export, "write the net to a file that runs without snnfx")
    command.add_argument("--out", required=True, metavar="FILE", help=".onnx, .pt2 or .nir")
    command.add_argument("--T", type=int, default=8, metavar="STEPS", help="number of time steps (default: 8)")
    command.add_argument("--state", action="store_true", help="take and return the states, by slot name")
    command.add_argument("--step", action="store_true", help="compute one time step, with its states")
    command.add_argument(
        "--dynamic", default="T,N", metavar="T,N", help="axes of any size (default: T,N); none: sizes of the inputs"
    )
    command.add_argument("--package", choices=("aot",), help="aot: compile a .pt2 package with AOTInductor")
    command.add_argument(
        "--dt", type=float, metavar="SECONDS", help="for .nir: the time step of the time constants (default: 1e-4)"
    )
    command.add_argument("--no-check", action="store_true", help="do not run the written file")
    return parser


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.set_defaults(run=run)
    command.add_argument(
        "model",
        nargs="?" if name == "explain" else None,
        metavar="pkg.module:factory",
        help="a model, or a function or class that returns one without arguments; for a file: path/to/file.py:factory",
    )
    command.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="2,1,28,28",
        help="shape of ONE time step of an input, with the batch dimension (with --takes sequence: of a whole call), "
        "and optionally a dtype: 2,3:int64; repeat the option for each input",
    )
    command.add_argument(
        "--takes",
        default="step",
        metavar="step|sequence",
        help="input of one call of the model: one time step (default), or a sequence, for a model that runs over time "
        "itself",
    )
    command.add_argument("--entry", default="forward", help="method that computes one step (default: forward)")
    command.add_argument(
        "--batch-norm",
        metavar="fold|per_step",
        help="BatchNorm statistics in training; fold: over T*N samples (default for steps); per_step: of each time "
        "step (default for sequences: those of the model)",
    )
    command.add_argument(
        "--time-dim",
        default="0",
        metavar="0,none",
        help="time dimension of all inputs, or of each one (default: 0; last: --time-dim=-1); "
        "none: an input is the same at every step",
    )
    command.add_argument(
        "--chunk",
        default="auto",
        metavar="16|auto|none",
        help="time steps in a chunk in inference; auto: as many as fit (default); none: all",
    )
    command.add_argument(
        "--checkpoint",
        default="auto",
        metavar="16|selective|regions|auto|none",
        help="recomputation in the backward pass; a number k: save the state every k steps, recompute the rest; "
        "selective: recompute everything except convolutions, linear layers and attention; "
        "regions: recompute everything; auto: as little as the memory budget allows (default); none: nothing",
    )
    command.add_argument(
        "--memory-budget",
        metavar="512MiB|2GB|0.5|none",
        help="memory that a call may allocate, with a unit (M and MiB: 2**20 bytes, MB: 10**6; K, G and T likewise, in "
        "upper or lower case), or as a fraction of the free memory (default: none)",
    )
    command.add_argument("--reduce", metavar="mean|sum|last", help="reduce the outputs over time")
    command.add_argument(
        "--carry",
        action="append",
        metavar="mem=1",
        help="an argument and the index of the output of the previous step that it receives (nested: state=1.0); "
        "repeat the option for each argument; none: no argument is carried (default: inferred)",
    )
    modes = ("training", "evaluation")
    command.add_argument(
        "--mode", choices=modes, help="mode of the model (default: its current mode; for verify: both)"
    )
    return command


def _explain(arguments: argparse.Namespace) -> int:
    if arguments.code is not None:
        for line in describe_code(arguments.code).splitlines():
            print(line if line.startswith(" ") else textwrap.fill(line, WIDTH))
        return 0
    if arguments.model is None:
        raise InputError(
            "SNNFX309", "explain needs a model or a code", hint="Pass pkg.module:factory or --code SNNFX103."
        )
    options = _options(arguments)
    if arguments.plot is not None and arguments.T is None:
        raise InputError(
            "SNNFX309",
            f"--plot {arguments.plot} needs --T",
            why="memory depends on the number of time steps.",
            hint="Pass the number of time steps, e.g. --T 16.",
        )
    report = explain(_model(arguments), T=arguments.T, **options)
    if arguments.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print(report.to_markdown() if arguments.markdown else report)
    if arguments.plot is not None and report.memory is not None:
        report.memory.save(arguments.plot)
    return 0 if report.error is None else 2


def _draw(arguments: argparse.Namespace) -> int:
    options = _options(arguments)
    draw(convert(_model(arguments), **options), arguments.out, depth=arguments.depth)
    print(Path(arguments.out))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    options = _options(arguments)
    _require_sequence(arguments, "verify")
    model = _model(arguments)
    net: Net = convert(model, **options)
    modes = (True, False) if arguments.mode is None else (arguments.mode == "training",)
    for training in modes:
        net.train(training)
        sequences, T = _sequences(arguments, options["time_dim"])
        print(verify(model, net, *sequences, T=T, double=arguments.double))
    return 0


def _profile(arguments: argparse.Namespace) -> int:
    options = _options(arguments)
    _require_sequence(arguments, "profile")
    if arguments.out is not None:
        check_report_file(arguments.out)
    net: Net = convert(_model(arguments), **options)
    sequences, T = _sequences(arguments, options["time_dim"])
    report = profile(
        net, *sequences, T=T, train=arguments.train, record=tuple(arguments.record), repeats=arguments.repeats
    )
    print(report)
    if arguments.out is not None:
        print(f"\n{report.save(arguments.out)}")
    return 0


def _require_sequence(arguments: argparse.Namespace, command: str) -> None:
    if not arguments.input:
        raise InputError(
            "SNNFX309", f"{command} needs --input", hint="Pass the shape of one time step, e.g. --input 2,1,28,28."
        )
    if arguments.T < 1:
        raise InputError("SNNFX301", f"--T {arguments.T} is too small", hint="Pass at least one time step.")


def _export(arguments: argparse.Namespace) -> int:
    options = _options(arguments)
    _require_sequence(arguments, "export")
    dynamic = () if arguments.dynamic.lower() == "none" else tuple(arguments.dynamic.split(","))
    net: Net = convert(_model(arguments), **options)
    if arguments.mode is None:
        net.eval()
    if arguments.step:
        sequences, T = [_random(text) for text in arguments.input], None
    else:
        sequences, T = _sequences(arguments, options["time_dim"])
    request = export_request(
        state=arguments.state, step=arguments.step, dynamic=dynamic, package=arguments.package, T=T
    )
    started = time.perf_counter()

    def show(stage: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {stage}", file=sys.stderr, flush=True)

    written = write_export(
        net,
        arguments.out,
        tuple(sequences),
        request,
        package=arguments.package,
        check=not arguments.no_check,
        dt=arguments.dt,
        announce=show,
    )
    show("done")
    rows = [("", "name", "shape or size", "dtype"), *written.rows()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _sequences(arguments: argparse.Namespace, time_dim: Any) -> tuple[list[Tensor], int | None]:
    """A random sequence for each input; and T if none of the inputs has a time dimension."""
    if arguments.takes == "sequence":
        return [_random(text) for text in arguments.input], None
    dims = time_dim if isinstance(time_dim, tuple) else (time_dim,) * len(arguments.input)
    pairs = zip(arguments.input, dims, strict=True)  # convert has refused another number
    sequences = [_random(text) if d is None else _random(text, arguments.T).movedim(0, d) for text, d in pairs]
    return sequences, arguments.T if all(d is None for d in dims) else None


def _model(arguments: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    model = load_model(arguments.model)
    return model if arguments.mode is None else model.train(arguments.mode == "training")


def _options(arguments: argparse.Namespace) -> ConvertKeywords:
    inputs = tuple(_random(text) for text in arguments.input)
    return {
        "example_inputs": inputs or None,
        "entry": arguments.entry,
        "batch_norm": arguments.batch_norm,
        "takes": arguments.takes,
        "time_dim": _time_dim(arguments.time_dim),
        "chunk": arguments.chunk if arguments.chunk == "auto" else _number("--chunk", arguments.chunk),
        "checkpoint": _checkpoint(arguments.checkpoint),
        "memory_budget": _memory_budget(arguments.memory_budget),
        "reduce": arguments.reduce,
        "carry": _carry(arguments.carry),
    }


def _time_dim(text: str) -> Any:
    """Parse `0`, `none`, or one of them for each input: `0,none`."""
    dims = tuple(_number("--time-dim", part) for part in text.split(","))
    return dims if len(dims) > 1 else dims[0]


def _number(option: str, text: str) -> int | None:
    """Parse an int, or `none` as None."""
    if text.lower() == "none":
        return None
    try:
        return int(text)
    except ValueError as error:
        raise InputError("SNNFX309", f"{option} {text} is not a number", hint="Pass an integer or none.") from error


def _checkpoint(text: str) -> int | str | None:
    if text.lower() == "none":
        return None
    return int(text) if text.removeprefix("-").isdecimal() else text


def _memory_budget(text: str | None) -> int | float | None:
    return None if text is None or text.lower() == "none" else read_memory_budget(text)


def _carry(texts: list[str] | None) -> dict[str, tuple[int | str, ...]] | None:
    """Parse `["mem1=1", "state=1.v"]` as a dict of paths, and `["none"]` as an empty one."""
    if texts is None or [text.lower() for text in texts] == ["none"]:
        return None if texts is None else {}
    pairs = [text.partition("=") for text in texts]
    if not all(name and path for name, _, path in pairs):
        raise InputError(
            "SNNFX309",
            f"--carry {' '.join(texts)} names no output",
            hint="Pass an argument and an output, e.g. --carry mem=1.",
        )
    return {
        name: tuple(int(key) if key.lstrip("-").isdigit() else key for key in path.split("."))
        for name, _, path in pairs
    }


def _random(text: str, *time: int) -> Tensor:
    """A random tensor for `2,1,28,28` or `2,3:int64`: uniform in [0, 1), or 0 and 1 for integers."""
    sizes, _, name = text.partition(":")
    dtype = getattr(torch, name or "float32", None)
    try:
        shape = [int(size) for size in sizes.split(",")]
    except ValueError:
        shape = []
    if not shape or min(shape) < 0 or not isinstance(dtype, torch.dtype):
        raise InputError(
            "SNNFX309",
            f"--input {text}",
            why="this is not a shape." if isinstance(dtype, torch.dtype) else f"`{name}` is not a dtype of torch.",
            hint="Pass sizes separated by commas, and optionally a dtype: 2,1,28,28 or 2,3:int64.",
        )
    shape = [*time, *shape]
    if dtype.is_floating_point or dtype.is_complex:
        return torch.rand(shape).to(dtype)
    return torch.randint(0, 2, shape).to(dtype)

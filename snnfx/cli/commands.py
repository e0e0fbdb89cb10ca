"""`python -m snnfx explain|draw|verify pkg.module:factory`: look at the conversion of a model from the command line.

The exit code is 0 when all is well, 1 when `verify` found a difference, and 2 when the model cannot be loaded or
converted, or an option does not fit.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import snnfx
from snnfx.cli.model_factory import load_model
from snnfx.convert import convert
from snnfx.errors import InputError, SnnfxError, VerificationError, describe_code
from snnfx.inspect.document import WIDTH
from snnfx.inspect.explain import explain
from snnfx.inspect.picture.draw import draw
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
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        argv: the arguments after ``python -m snnfx``; None: those of the process.
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
        description="Look at the conversion of a single-step model.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"snnfx {snnfx.__version__} (torch {torch.__version__})")
    commands = parser.add_subparsers(required=True, metavar="{explain,draw,verify}")

    command = _command(commands, "explain", _explain, "tell what is folded, mapped or looped, and why")
    command.add_argument("--code", metavar="SNNFX103", help="print what a code means, instead")
    command.add_argument(
        "--T", type=int, metavar="STEPS", help="also predict the memory of a call on so many time steps"
    )
    command.add_argument("--plot", metavar="FILE.svg", help="draw the memory over the execution; needs --T")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="as Markdown")
    form.add_argument("--json", action="store_true", help="as JSON")

    command = _command(commands, "draw", _draw, "draw the converted net")
    command.add_argument("--out", default="net.svg", metavar="FILE", help=".svg, .png, .pdf or .dot (default: net.svg)")

    command = _command(commands, "verify", _verify, "compare the net with the stepped model, on random inputs")
    command.add_argument("--T", type=int, default=8, metavar="STEPS", help="time steps (default: 8)")
    command.add_argument("--double", action="store_true", help="compare in float64")
    return parser


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.set_defaults(run=run)
    command.add_argument(
        "model",
        nargs="?" if name == "explain" else None,
        metavar="pkg.module:factory",
        help="a function or class that makes the model, or a model; in a file: path/to/file.py:factory",
    )
    command.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="2,1,28,28",
        help="shape of ONE step of an input, with its batch; once for each input; a dtype may follow: 2,3:int64",
    )
    command.add_argument("--entry", default="forward", help="the method that is one step (default: forward)")
    command.add_argument("--batch-norm", default="fold", metavar="fold|per_step", help="statistics in training")
    command.add_argument(
        "--time-dim",
        default="0",
        metavar="0,none",
        help="where T is in each input, or in all (default: 0; last: --time-dim=-1); none: the same at every step",
    )
    command.add_argument("--chunk", default="auto", metavar="16|auto|none", help="time steps at once in inference")
    command.add_argument(
        "--checkpoint",
        default="auto",
        metavar="16|selective|regions|auto|none",
        help="what training computes again in backward: a number: the state is kept every so many steps; selective: "
        "all but products; regions: everything; auto: as little as the budget allows (default); none: nothing",
    )
    command.add_argument(
        "--memory-budget",
        metavar="512MiB|2GB|0.5|none",
        help="bytes of a call, or the part of what is free (default: none); in any case, M and MiB are 2**20 bytes, "
        "MB is 10**6; K, G and T likewise",
    )
    command.add_argument("--reduce", metavar="mean|sum|last", help="return that over time instead of sequences")
    command.add_argument(
        "--carry",
        action="append",
        metavar="mem=1",
        help="an argument that is an output of the step before, and which (in a nest: state=1.0); once for each; "
        "none: nothing is carried (default: inferred)",
    )
    modes = ("training", "evaluation")
    command.add_argument("--mode", choices=modes, help="default: as the model is made; verify: both")
    return command


def _explain(arguments: argparse.Namespace) -> int:
    if arguments.code is not None:
        for line in describe_code(arguments.code).splitlines():
            print(line if line.startswith(" ") else textwrap.fill(line, WIDTH))
        return 0
    if arguments.model is None:
        raise InputError("SNNFX309", "explain needs a model", hint="Give pkg.module:factory, or --code SNNFX103.")
    options = _options(arguments)
    if arguments.plot is not None and arguments.T is None:
        raise InputError("SNNFX309", f"--plot {arguments.plot}", hint="Give the number of time steps as well: --T 16.")
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
    draw(convert(_model(arguments), **options), arguments.out)
    print(Path(arguments.out))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    options = _options(arguments)
    if not arguments.input:
        raise InputError("SNNFX309", "verify needs an input", hint="Give the shape of a step, e.g. --input 2,1,28,28.")
    if arguments.T < 1:
        raise InputError("SNNFX301", f"--T {arguments.T}", hint="Give at least one time step.")
    model = _model(arguments)
    net: Net = convert(model, **options)
    modes = (True, False) if arguments.mode is None else (arguments.mode == "training",)
    for training in modes:
        net.train(training)
        sequences, T = _sequences(arguments, options["time_dim"])
        print(verify(model, net, *sequences, T=T, double=arguments.double))
    return 0


def _sequences(arguments: argparse.Namespace, time_dim: Any) -> tuple[list[Tensor], int | None]:
    """A random sequence for each input, with T where it belongs; and T where no input has it."""
    dims = time_dim if isinstance(time_dim, tuple) else (time_dim,) * len(arguments.input)
    if len(dims) != len(arguments.input):
        raise InputError(
            "SNNFX309", f"--time-dim {arguments.time_dim}", why=f"there are {len(arguments.input)} inputs."
        )
    pairs = zip(arguments.input, dims, strict=True)
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
        "time_dim": _time_dim(arguments.time_dim),
        "chunk": arguments.chunk if arguments.chunk == "auto" else _number("--chunk", arguments.chunk),
        "checkpoint": _checkpoint(arguments.checkpoint),
        "memory_budget": _memory_budget(arguments.memory_budget),
        "reduce": arguments.reduce,
        "carry": _carry(arguments.carry),
    }


def _time_dim(text: str) -> Any:
    """`0`, `none`, or one of them for each input: `0,none`."""
    dims = tuple(_number("--time-dim", part) for part in text.split(","))
    return dims if len(dims) > 1 else dims[0]


def _number(option: str, text: str) -> int | None:
    """An int, or None for `none`."""
    if text.lower() == "none":
        return None
    try:
        return int(text)
    except ValueError as error:
        raise InputError("SNNFX309", f"{option} {text}", hint="Give a number, or none.") from error


def _checkpoint(text: str) -> int | str | None:
    if text.lower() == "none":
        return None
    return int(text) if text.removeprefix("-").isdecimal() else text


def _memory_budget(text: str | None) -> int | float | None:
    return None if text is None or text.lower() == "none" else read_memory_budget(text)


def _carry(given: list[str] | None) -> dict[str, tuple[int | str, ...]] | None:
    """`["mem1=1", "state=1.v"]` as a dict of paths; `["none"]` is the empty one."""
    if given is None or [text.lower() for text in given] == ["none"]:
        return None if given is None else {}
    pairs = [text.partition("=") for text in given]
    if not all(name and path for name, _, path in pairs):
        raise InputError(
            "SNNFX309", f"--carry {' '.join(given)}", hint="Name an argument and an output: --carry mem=1."
        )
    return {
        name: tuple(int(key) if key.lstrip("-").isdigit() else key for key in path.split("."))
        for name, _, path in pairs
    }


def _random(text: str, *time: int) -> Tensor:
    """A random tensor for `2,1,28,28` or `2,3:int64`: uniform in [0, 1), 0 or 1 for integers."""
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
            why="it is no shape." if isinstance(dtype, torch.dtype) else f"torch has no dtype `{name}`.",
            hint="Give sizes with commas, and a dtype if it is not float32: 2,1,28,28 or 2,3:int64.",
        )
    shape = [*time, *shape]
    if dtype.is_floating_point or dtype.is_complex:
        return torch.rand(shape).to(dtype)
    return torch.randint(0, 2, shape).to(dtype)

"""The base class of passes: one transformation of a step program."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from snnfx.errors import PassError
from snnfx.ir.program import STAGES, StepProgram
from snnfx.sandbox.user_code import format_location

__all__ = ["CHANGES", "MODEL_CHANGES", "Pass", "check_passes", "check_picklable", "location_of_pass", "stages_of"]

MODEL_CHANGES = ("parameters", "buffers", "training", "modules", "attributes")
"""The parts of the caller's model that a pass may change."""
CHANGES = ("graph", "slots", "inputs", "outputs", "regions", *MODEL_CHANGES)
"""The parts that a pass may change: five of the program, and five of the caller's model."""


@dataclass(frozen=True)
class Pass:
    """One transformation of a step program, a frozen dataclass whose fields are its options.

    A subclass sets the class variables below and implements `apply`. `snnfx.convert(model, passes=[...])` runs it on
    the step of both modes, on a first step that differs, and again whenever the net is planned again.

    Attributes:
        name: shown in `net.history` and in errors.
        requires: the stage that the program must have ("captured", "normalized", "partitioned" or "planned"), or a
            tuple of stages. `convert` runs the pass at the end of this stage.
        ensures: the stage that the pass reaches; None: the same stage.
        may_change: the parts of the program and of the model that it may change, from `CHANGES`. Facts of nodes and
            `program.constants` may always be added. An undeclared change is put back and raises SNNFX701.

    Example:
        >>> import torch, snnfx
        >>> from dataclasses import dataclass
        >>> from snnfx.passes import Pass
        >>> @dataclass(frozen=True)
        ... class CountCalls(Pass):
        ...     name = "count_calls"
        ...     requires = "normalized"
        ...     may_change = ()
        ...
        ...     def apply(self, program):
        ...         return f"{sum(node.op.startswith('call') for node in program.graph.nodes)} calls"
        >>> net = snnfx.convert(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()), passes=[CountCalls()])
        >>> [record.note for record in net.history if record.description == "count_calls"]
        ['2 calls']
    """

    name: ClassVar[str] = ""
    requires: ClassVar[str | tuple[str, ...]] = "captured"
    ensures: ClassVar[str | None] = None
    may_change: ClassVar[tuple[str, ...]] = ("graph",)

    def apply(self, program: StepProgram) -> str:
        """Change `program`; return a note such as "removed 3 nodes"."""
        raise NotImplementedError

    @property
    def is_built_in(self) -> bool:
        """Whether snnfx defines the pass; it then handles a first step that differs by itself."""
        return type(self).__module__.partition(".")[0] == "snnfx"

    def __str__(self) -> str:
        options = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))
        return f"{self.name}{{{options}}}" if options else self.name


def stages_of(item: Pass) -> tuple[str, ...]:
    """The stages at which a pass may run; a user's pass runs at the first of them."""
    return (item.requires,) if isinstance(item.requires, str) else tuple(item.requires)


def location_of_pass(item: object) -> str:
    """The file and line of the user's code of a pass, of `apply` or of another method; "" if unknown."""
    for base in type(item).__mro__:
        if base.__module__.partition(".")[0] == "snnfx":
            return ""
        methods = [vars(base)[name] for name in ("apply", "rewrite") if name in vars(base)]
        for method in (*methods, *vars(base).values()):
            code = getattr(method, "__code__", None)
            if code is not None and code.co_filename != "<string>":  # the code of dataclasses
                return format_location((code.co_filename, code.co_firstlineno))
    return ""


def check_passes(passes: Iterable[Any], in_convert: bool = False) -> tuple[Pass, ...]:
    """Check the definitions of passes before any of them runs.

    Args:
        passes: the passes.
        in_convert: whether `convert` runs them, where a pass stays at its stage.

    Raises:
        PassError: SNNFX702.
    """
    if isinstance(passes, Pass) or not isinstance(passes, Iterable):
        _refuse(passes, "`passes` is not a sequence of passes", "Write passes=[...].")
    checked = tuple(passes)
    for item in checked:
        _check_definition(item)
        if in_convert and item.ensures not in (None, stages_of(item)[0]):
            why = f"it moves the program from stage {stages_of(item)[0]!r} to stage {item.ensures!r}"
            _refuse(item, why, "Leave `ensures` unset; the passes of snnfx reach the stages.")
    return checked


def _check_definition(item: Any) -> None:
    if isinstance(item, type) and issubclass(item, Pass):
        _refuse(item, "it is a class, not an instance", f"Write {item.__name__}().")
    if not isinstance(item, Pass):
        _refuse(item, "it is not an instance of snnfx.passes.Pass", "Derive its class from snnfx.passes.Pass.")
    cls = type(item)
    own = [name for base in cls.__mro__ if base not in Pass.__mro__ for name in inspect.get_annotations(base)]
    options = {f.name for f in fields(item)}
    missing = [
        name for name in own if name not in options and not hasattr(Pass, name) and not _is_class_variable(cls, name)
    ]
    if missing:
        _refuse(item, f"its option `{missing[0]}` is not a field", "Decorate the class with @dataclass(frozen=True).")
    extra = [name for name in vars(item) if name not in options]
    if extra:
        _refuse(item, f"its attribute `{extra[0]}` is not a field", "Declare options as fields of a frozen dataclass.")
    if not isinstance(item.name, str) or not item.name:
        _refuse(item, "it has no name", 'Set the class variable name = "...".')
    for stage in (*stages_of(item), *([] if item.ensures is None else [item.ensures])):
        if stage not in STAGES:
            _refuse(item, f"there is no stage {stage!r}", f"Choose one of {', '.join(STAGES)}.")
    if not stages_of(item):
        _refuse(item, "it requires no stage", f"Choose one of {', '.join(STAGES)}.")
    if isinstance(item.may_change, str):
        _refuse(item, "`may_change` is a string", f"Write may_change = ({item.may_change!r},).")
    for change in item.may_change:
        if change not in CHANGES:
            _refuse(item, f"`may_change` contains {change!r}", f"Choose from {', '.join(CHANGES)}.")
    if cls.apply is Pass.apply:
        _refuse(item, "it does not implement `apply`", "Define apply(self, program), which returns a note.")


def _is_class_variable(cls: type, name: str) -> bool:
    annotations = (inspect.get_annotations(base).get(name) for base in cls.__mro__)
    return any("ClassVar" in str(annotation) for annotation in annotations if annotation is not None)


def _refuse(item: Any, why: str, hint: str) -> None:
    name = getattr(item, "name", "") or getattr(item, "__name__", "") or type(item).__name__
    raise PassError(
        "SNNFX702", f"the pass `{name}` is not well defined", where=location_of_pass(item), why=f"{why}.", hint=hint
    )


def check_picklable(passes: Iterable[Pass]) -> None:
    """Check that the passes of a net can be pickled with it.

    Raises:
        PassError: SNNFX705.
    """
    for item in passes:
        try:
            pickle.dumps(item)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            options = [f.name for f in dataclasses.fields(item) if not _is_picklable(getattr(item, f.name))]
            what = f"its option `{options[0]}` is not picklable" if options else "its class is not picklable"
            raise PassError(
                "SNNFX705",
                f"the net cannot be pickled with its pass `{item.name}`",
                where=location_of_pass(item),
                why=f"{what} ({error}).",
                hint="Define the class and its functions at the top level of a module; a lambda has no name there.",
            ) from error


def _is_picklable(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True

"""A step program as plain values, and back."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from snnfx import surrogate
from snnfx.convert import REPLANS
from snnfx.errors import PassError
from snnfx.ir.facts import FACTS, SITE
from snnfx.ir.guards import Guards
from snnfx.ir.options import ConvertOptions
from snnfx.ir.program import SELF_TARGET, STAGES, START_PREFIX, InitialAttribute, InputLeaf, Region, Slot, StepProgram
from snnfx.ir.setting_read import SettingRead
from snnfx.ir.sites import new_site
from snnfx.ir.verifier import verify_program
from snnfx.ops import step_functions
from snnfx.ops.run_loop import LoopHandle
from snnfx.ops.step_functions import FunctionHolder
from snnfx.runtime.net import Net
from snnfx.sandbox.torch_internals import pytree
from snnfx.saving.known_functions import ATTRIBUTES, function_named, is_known_method, name_of_function
from snnfx.saving.plain_values import (
    Decoder,
    Encoder,
    MalformedFile,
    NotStorable,
    entry,
    flag,
    listed,
    text,
)
from snnfx.state.carry import CarriedArgument

__all__ = ["ProgramReader", "ProgramWriter", "options_record", "read_options"]

_PATH = re.compile(r"\w+(\.\w+)*")
_UNREAD_ENTRIES = frozenset(("is_wrapped", "loop"))
"""Entries of node.meta that no pass or emitter reads."""
_SPECS = ("input_spec", "output_spec")
_PLAIN_FIELDS = (
    "requirements",
    "input_ranks",
    "batched_inputs",
    "opaque",
    "inferred_carry",
    "overwritten",
    "training",
    "whole_sequences",
)
_OWN_FUNCTIONS = {
    f"{module.__name__}.{name}": value
    for module in (surrogate, step_functions)
    for name, value in vars(module).items()
    if isinstance(value, type) and issubclass(value, torch.autograd.Function)
}


class ProgramWriter:
    """Writes the programs of a net.

    Args:
        net: the net.
        functions: the autograd.Functions that the model's code refers to, by name.
        locations: the objects of the model that its guards refer to.
    """

    def __init__(self, net: Net, functions: Mapping[str, type], locations: list[Any]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names = {function: name for name, function in {**functions, **_OWN_FUNCTIONS}.items()}
        index_of = {id(value): index for index, value in reversed([*enumerate(locations)])}
        modules = {module: name for name, module in net.source.named_modules()}
        self._encoder = Encoder(modules, lambda value: index_of.get(id(value)), self.tensors)
        self._index_of = index_of

    def programs(self, net: Net) -> list[Any]:
        """The programs of both modes; None in place of the second one if both modes share one."""
        training, evaluation = net.programs[True], net.programs[False]
        return [self._program(training), None if evaluation is training else self._program(evaluation)]

    def _program(self, program: StepProgram) -> dict[str, Any]:
        encode = self._encoder.encode
        constants = [[name, self._constant(value)] for name, value in program.constants.items()]
        self._encoder.constants = {id(value): name for name, value in program.constants.items()}
        record: dict[str, Any] = {name: encode(getattr(program, name)) for name in _PLAIN_FIELDS}
        for name in _SPECS:
            spec = getattr(program, name)
            record[name] = encode(pytree.tree_unflatten([0] * spec.num_leaves, spec))
        record["stage"] = program.stage
        record["constants"] = constants
        record["nodes"] = [self._node(program, node) for node in program.graph.nodes]
        record["input_leaves"] = [[x.name, x.placeholder, encode(x.constant)] for x in program.input_leaves]
        record["slots"] = [[s.name, s.placeholder, s.discovered, s.persistent] for s in program.slots]
        record["carried"] = [[c.name, encode(c.path), encode(c.structure), c.required] for c in program.carried]
        record["setting_reads"] = [[r.owner, r.name, encode(r.value), r.shown] for r in program.setting_reads]
        starts = program.initial_attributes
        record["initial_attributes"] = [[a.owner, a.attribute, encode(a.value), a.exists] for a in starts]
        record["regions"] = [
            [r.name, r.kind, [n.name for n in r.nodes], list(r.slots), r.lowering_refusal, list(r.absorbed)]
            for r in program.regions
        ]
        record["has_guards"] = program.guards.tree is not None
        record["first_step"] = None if program.first_step is None else self._program(program.first_step)
        return record

    def _node(self, program: StepProgram, node: fx.Node) -> list[Any]:
        encode = self._encoder.encode
        target: Any = node.target
        if node.op == "call_function":
            target = name_of_function(node.target)
            if target is None:
                name = getattr(node.target, "__qualname__", repr(node.target))
                raise NotStorable(f"the graph calls `{name}`, which is not one of the functions that a file may name")
        unknown = node.meta.keys() - FACTS.keys() - _UNREAD_ENTRIES
        if unknown:
            raise NotStorable(f"the node `{node.name}` has the meta entry {min(map(str, unknown))!r}")
        try:
            _check_target(node.op, target, node.args, program)
        except MalformedFile as error:
            raise NotStorable(str(error)) from error
        meta = [[key, encode(value)] for key, value in node.meta.items() if key in FACTS]
        return [node.name, node.op, target, encode(node.args), encode(node.kwargs), meta]

    def _constant(self, value: Any) -> Any:
        if id(value) in self._index_of:
            return {"location": self._index_of[id(value)]}
        if isinstance(value, FunctionHolder):
            name = self._names.get(value.function)
            if name is None:
                raise NotStorable(f"the model's code does not refer to {value.function.__qualname__} by a name")
            return {"autograd_function": name}
        if isinstance(value, LoopHandle):
            assert isinstance(value.net, Net)
            net = value.net
            return {"loop": [value.location, self.programs(net), options_record(net.options)]}
        return self._encoder.encode(value)


def options_record(options: ConvertOptions) -> dict[str, Any]:
    """The options of a conversion as plain values; passes by name."""
    encoder = Encoder()
    values = {f.name: getattr(options, f.name) for f in fields(options) if f.name != "passes"}
    return {name: encoder.encode(value) for name, value in values.items()} | {"passes": [*map(str, options.passes)]}


def read_options(record: Any) -> ConvertOptions:
    """The options of a record, without passes."""
    decoder = Decoder()
    values = {f.name: decoder.decode(entry(record, f.name)) for f in fields(ConvertOptions) if f.name != "passes"}
    legal: dict[str, Callable[[Any], bool]] = {
        "step_mode": lambda v: v in ("m", "s"),
        "takes": lambda v: v in ("step", "sequence"),
        "batch_norm": lambda v: v in ("fold", "per_step"),
        "entry": lambda v: isinstance(v, str) and v.isidentifier(),
        "chunk": lambda v: v in (None, "auto") or (type(v) is int and v > 0),
        "carry_state": lambda v: isinstance(v, bool),
        "reduce": lambda v: v in (None, "mean", "sum", "last"),
        "memory_format": lambda v: v in (None, "auto"),
        "lower": lambda v: v in (None, "auto"),
        "checkpoint": lambda v: v in (None, "auto", "selective", "regions") or (type(v) is int and v > 0),
        "memory_budget": lambda v: v is None or (type(v) in (int, float) and v > 0),
        "carry": lambda v: v is None or (isinstance(v, dict) and all(isinstance(p, tuple) for p in v.values())),
    }
    for name, is_legal in legal.items():
        if isinstance(values[name], list) or not is_legal(values[name]):
            raise MalformedFile(f"the option {name} has an illegal value")
    return ConvertOptions(**values)


class ProgramReader:
    """Rebuilds programs on a model.

    Args:
        model: the model.
        functions: the autograd.Functions that the model's code refers to, by name.
        locations: the objects of the model that its guards refer to.
        tensors: the tensors of the file.
        guards: the guards of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        functions: Mapping[str, type],
        locations: list[Any],
        tensors: Mapping[str, Tensor],
        guards: list[Guards],
    ) -> None:
        self.model, self.guards = model, guards
        self._functions = {**functions, **_OWN_FUNCTIONS}
        self._decoder = Decoder(dict(model.named_modules()), locations, tensors)

    def programs(self, record: Any, guards: list[Guards] | None = None) -> dict[bool, StepProgram]:
        """The programs of both modes.

        Raises:
            MalformedFile: the record is not one of `ProgramWriter`.
        """
        first, second = listed(record, 2)
        own = self.guards if guards is None else guards
        training = self._program(first, own[0] if own else Guards())
        evaluation = training if second is None else self._program(second, own[-1] if own else Guards())
        return {True: training, False: evaluation}

    def _program(self, record: Any, guards: Guards) -> StepProgram:
        decode = self._decoder.decode
        constants = {
            _identifier(name): self._constant(value) for name, value in map(_pair, listed(entry(record, "constants")))
        }
        self._decoder.constants = constants
        plain = {name: decode(entry(record, name)) for name in _PLAIN_FIELDS}
        _check_plain_fields(plain)
        specs: dict[str, Any] = {name: pytree.tree_structure(decode(entry(record, name))) for name in _SPECS}
        stage = entry(record, "stage")
        if stage not in STAGES:
            raise MalformedFile("the stage is unknown")
        program = StepProgram(
            graph=fx.Graph(),
            source=self.model,
            constants=constants,
            input_leaves=[
                InputLeaf(text(n), None if p is None else _identifier(p), decode(c))
                for n, p, c in _rows(record, "input_leaves", 3)
            ],
            slots=[_slot(*row) for row in _rows(record, "slots", 4)],
            carried=[
                CarriedArgument(text(n), _path(decode(p)), decode(s), flag(r))
                for n, p, s, r in _rows(record, "carried", 4)
            ],
            setting_reads=[
                SettingRead(self._owner(o), text(n), decode(v), text(s))
                for o, n, v, s in _rows(record, "setting_reads", 4)
            ],
            initial_attributes=[
                InitialAttribute(self._owner(o), text(n), decode(v), flag(e))
                for o, n, v, e in _rows(record, "initial_attributes", 4)
            ],
            guards=guards if flag(entry(record, "has_guards")) else Guards(),
            stage=stage,
            **specs,
            **plain,
        )
        before, self._decoder.nodes = self._decoder.nodes, {}
        for row in _rows(record, "nodes", 6):
            self._add_node(program, row)
        nodes = self._decoder.nodes
        self._decoder.nodes = before
        program.regions = [_region(row, nodes) for row in _rows(record, "regions", 6)]
        first = entry(record, "first_step")
        program = replace(program, first_step=None if first is None else self._program(first, Guards()))
        try:
            verify_program(program, "load")
        except PassError as error:
            raise MalformedFile("the graph breaks the rules of its stage") from error
        return program

    def _add_node(self, program: StepProgram, row: list[Any]) -> None:
        name, op, target, args, kwargs, meta = row
        decode, nodes = self._decoder.decode, self._decoder.nodes
        if _identifier(name) in nodes:
            raise MalformedFile("two nodes have one name")
        args, kwargs = decode(args), decode(kwargs)
        if not isinstance(args, tuple) or not isinstance(kwargs, dict) or not all(map(_is_identifier, kwargs)):
            raise MalformedFile("the arguments of a node have another form")
        _check_target(op, target, args, program)
        if op == "call_function":
            target = function_named(target)
        node = program.graph.create_node(op, target, args, kwargs, name=name)
        node.name = name
        for key, encoded in map(_pair, listed(meta)):
            value = decode(encoded)
            if key not in FACTS or not FACTS[key].has_legal_type(value) or not _is_printable(value):
                raise MalformedFile("a fact of a node has another form")
            node.meta[key] = new_site() if key == SITE.key else value  # numbers of another process mean nothing here
        nodes[name] = node

    def _constant(self, value: Any) -> Any:
        if not isinstance(value, dict) or len(value) != 1:
            return self._decoder.decode(value)
        ((kind, contents),) = value.items()
        if kind == "autograd_function":
            if text(contents) not in self._functions:
                raise MalformedFile(f"the model's code has no autograd.Function {contents[:80]!r}")
            return FunctionHolder(self._functions[contents])
        if kind == "loop":
            location, programs, options = listed(contents, 3)
            net = Net(self.model, self.programs(programs, []), read_options(options), [], REPLANS["loop"])
            return LoopHandle(net, text(location))
        return self._decoder.decode(value)

    def _owner(self, name: Any) -> str:
        if text(name) not in self._decoder.modules:
            raise MalformedFile(f"the model has no module {name[:40]!r}")
        return str(name)


def _check_target(op: Any, target: Any, args: Any, program: StepProgram) -> None:
    """Check that a node calls or reads something that a saved graph may call or read."""
    if op == "output" or (op == "placeholder" and _is_identifier(target)):
        if op == "output" and target != "output":
            raise MalformedFile("the output has another name")
        return
    if op == "call_function":
        if not isinstance(target, str) or function_named(target) is None:
            raise MalformedFile(f"the function {str(target)[:80]!r} is not one that a saved graph may call")
        if target == "builtins.getattr" and (len(args) != 2 or args[1] not in ATTRIBUTES):
            raise MalformedFile("the graph reads an attribute that a saved graph may not read")
        return
    if op == "call_method":
        if not isinstance(target, str) or not is_known_method(target):
            raise MalformedFile(f"the method {str(target)[:80]!r} is not one that a saved graph may call")
        return
    if op not in ("get_attr", "call_module") or not isinstance(target, str) or not _PATH.fullmatch(target):
        raise MalformedFile("a node has an unknown form")
    source, name = program.source, target.removeprefix(START_PREFIX)
    known = {n for n, _ in source.named_modules(remove_duplicate=False)}
    if op == "get_attr":
        known |= {*program.constants, SELF_TARGET}
        known |= {n for n, _ in source.named_parameters(remove_duplicate=False)}
        known |= {n for n, _ in source.named_buffers(remove_duplicate=False)}
    if name not in known:
        raise MalformedFile(f"the model has no {target[:80]!r}")


def _check_plain_fields(plain: dict[str, Any]) -> None:
    for name in ("requirements", "input_ranks"):
        if not isinstance(plain[name], dict) or not all(type(v) is int for v in plain[name].values()):
            raise MalformedFile(f"{name} has another form")
    if not isinstance(plain["opaque"], dict) or not _is_printable(plain["opaque"]):
        raise MalformedFile("opaque has another form")
    if not all(isinstance(plain[name], frozenset) for name in ("batched_inputs", "overwritten")):
        raise MalformedFile("a set of names has another form")
    flag(plain["training"]), flag(plain["inferred_carry"])
    whole = plain["whole_sequences"]
    if whole is not None and not (
        isinstance(whole, tuple) and [*map(type, whole)] == [str, str] and _is_printable(whole)
    ):
        raise MalformedFile("whole_sequences has another form")


def _is_identifier(name: Any) -> bool:
    return isinstance(name, str) and name.isidentifier() and name.isascii() and not keyword.iskeyword(name)


def _identifier(name: Any) -> str:
    if not _is_identifier(name):
        raise MalformedFile(f"{str(name)[:40]!r} is not the name of a node")
    return str(name)


def _is_printable(value: Any) -> bool:
    if isinstance(value, str):
        return value.isprintable()
    if isinstance(value, dict):
        return all(_is_printable(k) and _is_printable(v) for k, v in value.items())
    return all(map(_is_printable, value)) if isinstance(value, tuple | list | set | frozenset) else True


def _pair(value: Any) -> list[Any]:
    return listed(value, 2)


def _rows(record: Any, name: str, width: int) -> list[list[Any]]:
    return [listed(row, width) for row in listed(entry(record, name))]


def _path(value: Any) -> tuple[int | str, ...]:
    if not isinstance(value, tuple) or not all(isinstance(v, int | str) for v in value):
        raise MalformedFile("the path of an output has another form")
    return value


def _slot(name: Any, placeholder: Any, discovered: Any, persistent: Any) -> Slot:
    if persistent not in ("", "assigned", "in_place"):
        raise MalformedFile("a slot has another form")
    return Slot(text(name), _identifier(placeholder), flag(discovered), persistent)


def _region(row: list[Any], nodes: Mapping[str, fx.Node]) -> Region:
    name, kind, members, slots, refusal, absorbed = row
    if kind not in ("once", "fold", "map", "loop") or not all(text(n) in nodes for n in listed(members)):
        raise MalformedFile("a region has another form")
    lowering = None if refusal is None else text(refusal)
    own = [nodes[n] for n in members]
    return Region(
        _identifier(name), kind, own, [*map(text, listed(slots))], lowering, tuple(map(text, listed(absorbed)))
    )

"""The step program: one time step of a model as a graph with explicit state, and the regions found in it.

A `StepProgram` owns a `torch.fx.Graph` whose placeholders are the inputs of one step and the state slots, and whose
output node holds `(outputs, next_states, initial_values)`. Nothing in the graph changes anything: a slot is read from
its placeholder, and its value for the next step is one of the nodes in `next_states`.
"""

from __future__ import annotations

import functools
import keyword
import operator
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import fx, nn
from torch.fx import Node
from torch.nn.utils.spectral_norm import SpectralNorm

from snnfx.errors import Refusal
from snnfx.ir.setting_read import SettingRead
from snnfx.ops.step_functions import set_part, set_part_
from snnfx.sandbox.torch_internals import NormBase, SpectralNormParametrization, pytree
from snnfx.state.carry import CarriedArgument
from snnfx.state.step_calls import call_opaque, call_stateful

__all__ = [
    "InitialAttribute",
    "InputLeaf",
    "Region",
    "Slot",
    "StepProgram",
    "add_placeholder",
    "describe_node",
    "estimates_weights",
    "keeps_statistics",
    "location_of",
    "takes_from_tuple",
    "updates_buffers",
]


@dataclass(frozen=True)
class Slot:
    """One loop-carried value.

    Args:
        name: qualified name, e.g. ``"layer1.lif.v"``.
        placeholder: name of the placeholder node that reads it.
        discovered: True when no class declared it and capture found it by watching attributes.
    """

    name: str
    placeholder: str
    discovered: bool = False


@dataclass(frozen=True)
class InitialAttribute:
    """What an attribute that capture found to be state held then: `reset_net` does not know it.

    Args:
        owner: qualified name of the module, "" for the model itself.
        attribute: its name.
        value: a value, or a container with the values in it.
        exists: False where the step itself makes the attribute.
    """

    owner: str
    attribute: str
    value: Any
    exists: bool = True


@dataclass(frozen=True)
class InputLeaf:
    """One leaf of the flattened arguments of a step: a tensor (with its placeholder) or a constant fixed at capture."""

    name: str
    placeholder: str | None
    constant: Any = None


@dataclass
class Region:
    """A connected, convex set of nodes executed as one over the whole sequence.

    Args:
        name: unique in its program, e.g. ``"fold_2"``.
        kind: ``"once"``, ``"fold"``, ``"map"`` or ``"loop"``.
        nodes: the nodes of the step graph, in program order.
        slots: names of the slots that live in it (loops only).
        lowering_refusal: why no kernel may run it, "" where one may; None: it was not asked (see `snnfx.passes.lower`).
        absorbed: names of nodes that were moved into it from folds (see `snnfx.passes.absorb`).
    """

    name: str
    kind: str
    nodes: list[Node]
    slots: list[str] = field(default_factory=list)
    lowering_refusal: str | None = None
    absorbed: tuple[str, ...] = ()

    def refusals(self) -> Iterator[tuple[Node, Refusal]]:
        """The nodes of the region that could not be folded, with the reason."""
        for node in self.nodes:
            refusal = node.meta.get("refusal")
            if refusal is not None:
                yield node, refusal


@dataclass
class StepProgram:
    """One time step of a model as a graph; see the module docstring.

    Args:
        graph: nodes as described in `snnfx.capture.capture`.
        source: the user's model; targets of get_attr and call_module nodes are looked up on it.
        constants: objects that capture had to keep (tensor constants, autograd functions), by target.
        input_leaves: the flattened arguments of one step.
        input_spec: pytree structure of `(args, kwargs)`.
        output_spec: pytree structure of what one step returns.
        slots: the state slots, in program order.
        training: the mode in which the graph was captured.
        first_step: the graph of the first step when it differs from the others in more than initial values.
        requirements: least number of dimensions of one step of an input, by input name (set by the analysis).
        input_ranks: number of dimensions of one step of an input, for those that were captured with example inputs.
        batched_inputs: the inputs whose first dimension is the batch, of one size in a call.
        opaque: modules that could not be traced, with the reason.
        carried: the arguments that are outputs of the step before; those outputs are None among `outputs`.
        inferred_carry: whether `carried` was inferred from the signature.
        setting_reads: the plain values of the model that the graph holds as they were.
        initial_attributes: what the attributes that are discovered slots held before the first step.
        overwritten: states of modules that every step overwrites before anything reads them; they are no slots.
        stage: how far the pipeline has come: "captured", "classified", "partitioned".
    """

    graph: fx.Graph
    source: nn.Module
    constants: dict[str, Any]
    input_leaves: list[InputLeaf]
    input_spec: pytree.TreeSpec
    output_spec: pytree.TreeSpec
    slots: list[Slot]
    training: bool
    first_step: StepProgram | None = None
    requirements: dict[str, int] = field(default_factory=dict)
    input_ranks: dict[str, int] = field(default_factory=dict)
    batched_inputs: frozenset[str] = frozenset()
    opaque: dict[str, str] = field(default_factory=dict)
    carried: list[CarriedArgument] = field(default_factory=list)
    inferred_carry: bool = False
    overwritten: frozenset[str] = frozenset()
    setting_reads: list[SettingRead] = field(default_factory=list)
    initial_attributes: list[InitialAttribute] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    stage: str = "captured"

    @property
    def output(self) -> Node:
        """The output node, with `args[0] == (outputs, next_states, initial_values)`."""
        return self.graph.output_node()

    @property
    def results(self) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
        """`(outputs, next_states, initial_values)`."""
        return results_of(self.graph)

    @property
    def outputs(self) -> tuple[Any, ...]:
        """What one step returns, flattened: nodes and constants."""
        return self.results[0]

    @property
    def next_states(self) -> tuple[Any, ...]:
        """The next value of each slot."""
        return self.results[1]

    @property
    def initial_values(self) -> tuple[Any, ...]:
        """The value of each slot before the first step: a constant, or a node to be evaluated on the first step."""
        return self.results[2]

    def set_output(self, outputs: Iterable[Any], next_states: Iterable[Any], initial_values: Iterable[Any]) -> None:
        """Replace what the output node holds."""
        self.output.args = ((tuple(outputs), tuple(next_states), tuple(initial_values)),)

    @property
    def nodes_by_name(self) -> dict[str, Node]:
        """All nodes by their name."""
        return {node.name: node for node in self.graph.nodes}

    def slot_nodes(self) -> list[Node]:
        """The placeholder of each slot, in the order of `slots`."""
        by_name = self.nodes_by_name
        return [by_name[slot.placeholder] for slot in self.slots]

    def input_nodes(self) -> list[Node]:
        """The placeholders of the tensor inputs, in the order of `input_leaves`."""
        by_name = self.nodes_by_name
        return [by_name[leaf.placeholder] for leaf in self.input_leaves if leaf.placeholder is not None]

    def resolve(self, target: str) -> Any:
        """The object that a get_attr or call_module target names."""
        if target in self.constants:
            return self.constants[target]
        found: Any = self.source
        if target == SELF_TARGET:
            return found
        for atom in target.split("."):
            found = getattr(found, atom)
        return found

    def module_of(self, node: Node) -> nn.Module | None:
        """The module that a node calls: the target of a call_module, or the module argument of a stateful call."""
        if node.op == "call_module":
            return self.resolve(str(node.target))  # type: ignore[no-any-return]
        if is_module_call(node):
            return self.resolve(str(node.args[0].target))  # type: ignore[union-attr, no-any-return]
        return None

    def is_in_training(self, module: nn.Module) -> bool:
        """Whether a layer is taken to be in training: as the program is, unless its own flag was noted down."""
        for read in self.setting_reads:
            if read.name == "training" and self.source.get_submodule(read.owner) is module:
                return bool(read.value)
        return self.training

    def mode_of(self, module: nn.Module) -> bool:
        """Whether a layer trains in this program: its own flag counts where the model is in the program's mode."""
        return module.training if self.source.training == self.training else self.training

    def copy(self) -> StepProgram:
        """A copy with its own graph (nodes keep their names); the source model and constants are shared."""
        graph = fx.Graph()
        mapping: dict[Node, Node] = {}
        for node in self.graph.nodes:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
            mapping[node].name = node.name
            mapping[node].meta = dict(node.meta)
        regions = [replace(r, nodes=[mapping[n] for n in r.nodes], slots=list(r.slots)) for r in self.regions]
        return replace(
            self,
            graph=graph,
            slots=list(self.slots),
            setting_reads=list(self.setting_reads),
            requirements=dict(self.requirements),
            regions=regions,
            first_step=self.first_step.copy() if self.first_step is not None else None,
        )

    def unplanned(self) -> StepProgram:
        """The same program before its regions were planned, in place: at stage "normalized" again."""
        for node in self.graph.nodes:
            for key in ("kind", "region", "refusal", "batch_dim", "batch_sizes", "varying"):
                node.meta.pop(key, None)
        self.regions, self.stage = [], "normalized"
        self.constants = dict(self.constants)
        return self

    def __str__(self) -> str:
        return "\n".join(format_node(node) for node in self.graph.nodes)


SELF_TARGET = "snnfx_source"
"""The get_attr target that stands for the root model itself (a model that is one stateful module)."""


def results_of(graph: fx.Graph) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """What the output node of a step graph holds: `(outputs, next_states, initial_values)`."""
    return cast(Any, graph.output_node().args[0])  # type: ignore[no-any-return]


def add_placeholder(graph: fx.Graph, name: str, **default: Any) -> Node:
    """A placeholder whose name is a valid and unique argument name, close to `name`."""
    identifier = "".join(c if c.isalnum() else "_" for c in name) or "value"
    if identifier[0].isdigit():
        identifier = f"layer_{identifier}"
    if keyword.iskeyword(identifier):
        identifier += "_"
    node = graph.placeholder(identifier, **default)
    node.target = node.name
    return node


def is_module_call(node: Node) -> bool:
    """Whether the node is a call_function whose first argument is a module (a stateful or opaque leaf)."""
    return (
        node.op == "call_function"
        and getattr(node.target, "snnfx_calls_module", False)
        and bool(node.args)
        and isinstance(node.args[0], Node)
        and node.args[0].op == "get_attr"
    )


def is_structural(node: Node) -> bool:
    """Whether the node takes one element of a tuple that another node returned."""
    return node.op == "call_function" and node.target is operator.getitem and bool(node.meta.get("structural"))


def is_in_place(node: Node) -> bool:
    """Whether the node is an operation that changes its first operand: `x.add_(1)`, `relu(x, inplace=True)`."""
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    # The underscore of `operator.and_` only tells it from a word of the language.
    by_name = name.endswith("_") and not name.endswith("__") and getattr(operator, name, None) is not node.target
    return by_name or node.kwargs.get("inplace") is True or node.target in IN_PLACE_OPERATORS


IN_PLACE_OPERATORS: dict[Callable[..., Any], Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
    operator.ilshift: operator.lshift,
    operator.irshift: operator.rshift,
    set_part_: set_part,
}
"""`x += 1` and its like, with the operation that makes a new value."""


def has_in_place_flag(program: StepProgram, node: Node) -> bool:
    """Whether the node calls a module like `nn.ReLU(inplace=True)`."""
    return node.op == "call_module" and bool(getattr(program.resolve(str(node.target)), "inplace", False))


def takes_from_tuple(node: Node) -> bool:
    """Whether the node takes one element of a tuple of values, whoever made the tuple."""
    if node.op != "call_function" or node.target is not operator.getitem:
        return False
    source = node.args[0]
    if is_structural(node) or not isinstance(source, Node):
        return True
    value = source.meta.get("val")
    if value is not None:
        return isinstance(value, tuple | list)
    return isinstance(source.meta.get("batch_dim"), tuple)


def updates_buffers(program: StepProgram, node: Node) -> bool:
    """Whether a call changes running statistics in training, so that it counts even if nobody reads its result."""
    return program.training and keeps_statistics(program, node)


def keeps_statistics(program: StepProgram, node: Node) -> bool:
    """Whether a node calls a layer that changes its buffers when it is in training."""
    if node.op != "call_module" and node.target not in (call_opaque, call_stateful):
        return False
    module = program.module_of(node)
    assert module is not None
    return estimates_weights(module) or any(
        isinstance(part, NormBase) and part.track_running_stats for part in module.modules()
    )


def estimates_weights(module: nn.Module) -> bool:
    """Whether the weight takes one more step of a power iteration at each call (spectral normalisation)."""
    if any(isinstance(part, SpectralNormParametrization) for part in module.modules()):
        return True
    return any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())


def location_of(node: Node) -> str:
    """Where the user wrote the node: `file.py:41`, or "" when it has no line of the user's."""
    where = node.meta.get("where")
    if not where:
        return ""
    return f"{_short_path(where[0], os.getcwd())}:{where[1]}"


@functools.lru_cache(maxsize=256)
def _short_path(filename: str, folder: str) -> str:
    """The path from `folder`, or the last two parts of a path that leads elsewhere; asked for at each node."""
    relative = os.path.relpath(filename, folder)
    return relative if not relative.startswith("..") else os.path.join(*filename.split(os.sep)[-2:])


def describe_node(node: Node) -> str:
    """A node in the user's words: the qualified name of what it calls, or the operation and the module it is in."""
    module = node.meta.get("module", "")
    if node.op == "call_module":
        return str(node.target)
    if is_module_call(node):
        return module or "the model"
    name = operation_name(node)
    return f"{name} in {module}" if module else name


def operation_name(node: Node) -> str:
    """The bare name of the operation of a node, e.g. "add" or "flatten"."""
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    return name.strip("_")


def format_node(node: Node) -> str:
    """One line of IR: name, operation, arguments, shape of one step, region, the user's line."""
    if node.op == "output":
        text = f"return {node.args[0]}"
    elif node.op == "placeholder":
        slot = node.meta.get("slot")
        text = f"{node.name} = {'slot ' + slot if slot else 'input'}"
    elif node.op == "get_attr":
        text = f"{node.name} = self.{node.target}"
    else:
        arguments = ", ".join([*(str(a) for a in node.args), *(f"{k}={v}" for k, v in node.kwargs.items())])
        called = f"self.{node.target}" if node.op == "call_module" else operation_name(node)
        text = f"{node.name} = {called}({arguments})"
    notes = [text_of_value(node.meta.get("val"))]
    if node.meta.get("kind"):
        notes.append(node.meta["kind"])
    if location_of(node):
        notes.append(location_of(node))
    notes = [note for note in notes if note]
    return f"{text}    # {', '.join(notes)}" if notes else text


def text_of_value(value: Any) -> str:
    """Shape and dtype of a recorded value, e.g. "[2, 64, 28, 28] float32"."""
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return ""

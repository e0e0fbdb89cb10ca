"""The step program: one time step of a model as a graph with explicit state, and its regions.

A `StepProgram` owns a `torch.fx.Graph`. Its placeholders are the inputs of one step and the state slots; the argument
of its output node is `(outputs, next_states, initial_values)`. The graph is free of side effects on state: a slot is
read from its placeholder, and its next value is a node in `next_states`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from torch import Tensor, fx, nn
from torch.fx import Node

from snnfx.errors import Refusal
from snnfx.ir.attachments import attach, located
from snnfx.ir.facts import REFUSAL, clear_facts
from snnfx.ir.guards import Guards
from snnfx.ir.nodes import is_module_call
from snnfx.ir.printing import format_graph
from snnfx.ir.setting_read import SettingRead
from snnfx.sandbox.plain_numbers import plain_number
from snnfx.sandbox.torch_internals import pytree
from snnfx.state.carry import CarriedArgument

__all__ = [
    "SELF_TARGET",
    "STAGES",
    "START_PREFIX",
    "InitialAttribute",
    "InputLeaf",
    "Region",
    "Slot",
    "StepProgram",
    "results_of",
]


STAGES = ("captured", "normalized", "partitioned", "planned")
"""Stages of a program, each with the guarantees of the stage before; see `snnfx.ir.verifier`."""


@dataclass(frozen=True)
class Slot:
    """One loop-carried value.

    Args:
        name: qualified name, e.g. ``"layer1.lif.v"``.
        placeholder: name of the placeholder node that reads it.
        discovered: no class declares it; capture found it by watching attributes.
        persistent: the slot is the buffer or parameter of this name, and lives on from call to call: each call starts
            from its current value and writes the final value back, as the step writes it: "assigned" replaces the
            buffer, "in_place" changes the tensor. "": each call starts from the reset state.
    """

    name: str
    placeholder: str
    discovered: bool = False
    persistent: Literal["", "assigned", "in_place"] = ""


@dataclass(frozen=True)
class InitialAttribute:
    """The value at capture of a discovered state attribute, which `reset_net` cannot know.

    Args:
        owner: qualified name of the module, "" for the model itself.
        attribute: name of the attribute.
        value: a value, or a container of values.
        exists: False if the step itself creates the attribute.
    """

    owner: str
    attribute: str
    value: Any
    exists: bool = True


@dataclass(frozen=True)
class InputLeaf:
    """One leaf of the flattened arguments of a step: a tensor with its placeholder, or a constant."""

    name: str
    placeholder: str | None
    constant: Any = None


@dataclass
class Region:
    """A connected, convex set of nodes that is executed as a unit over the whole sequence.

    Args:
        name: unique in its program, e.g. ``"fold_2"``.
        kind: ``"once"``, ``"fold"``, ``"map"`` or ``"loop"``.
        nodes: the nodes of the step graph, in program order.
        slots: names of its state slots (loops only).
        lowering_refusal: why it may not be lowered, "" if it may; None: not decided (see `snnfx.passes.lower`).
        absorbed: names of the nodes moved into it from folds (see `snnfx.passes.absorb`).
    """

    name: str
    kind: str
    nodes: list[Node]
    slots: list[str] = field(default_factory=list)
    lowering_refusal: str | None = None
    absorbed: tuple[str, ...] = ()

    def refusals(self) -> Iterator[tuple[Node, Refusal]]:
        """The nodes of the region that were not folded, each with its refusal."""
        for node in self.nodes:
            refusal = REFUSAL.of(node)
            if refusal is not None:
                yield node, refusal


@dataclass
class StepProgram:
    """One time step of a model as a graph with explicit state.

    Args:
        graph: nodes as described in `snnfx.capture.capture`.
        source: the user's model, which resolves the targets of get_attr and call_module nodes.
        constants: target -> object created at capture (tensor constants, autograd functions).
        input_leaves: the flattened arguments of one step.
        input_spec: pytree structure of `(args, kwargs)`.
        output_spec: pytree structure of the outputs of one step.
        slots: the state slots, in program order.
        training: the mode in which the graph was captured.
        first_step: the program of the first step, if it differs from the others in more than initial values.
        requirements: input name -> least rank of one step (set by the batch analysis).
        input_ranks: input name -> rank of one step, for inputs captured with example inputs.
        batched_inputs: the inputs whose dim 0 is the batch, all of one size in a call.
        opaque: name of a module that could not be traced -> reason.
        carried: the arguments that are outputs of the previous step; these outputs are None in `outputs`.
        inferred_carry: whether `carried` was inferred from the signature.
        setting_reads: Python values of the model that the graph contains as constants; compiled code checks them.
        guards: everything outside the graph that the step depends on; every call checks them.
        initial_attributes: the values at capture of attributes that are discovered slots.
        overwritten: module states that every step overwrites before reading; they are not slots.
        whole_sequences: for a call of a model that runs over time itself and has no step form, `(reason, file:line)`.
        stage: the last stage reached, one of `STAGES`.
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
    guards: Guards = field(default_factory=Guards)
    initial_attributes: list[InitialAttribute] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    stage: str = "captured"
    whole_sequences: tuple[str, str] | None = None

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
        """The flattened outputs of one step: nodes and constants."""
        return self.results[0]

    @property
    def next_states(self) -> tuple[Any, ...]:
        """The next value of each slot."""
        return self.results[1]

    @property
    def initial_values(self) -> tuple[Any, ...]:
        """The value of each slot before the first step: a constant, or a node evaluated on the first step."""
        return self.results[2]

    def set_output(self, outputs: Iterable[Any], next_states: Iterable[Any], initial_values: Iterable[Any]) -> None:
        """Replace the argument of the output node; a tensor becomes a node that reads a constant."""
        results = tuple(tuple(map(self.as_node, values)) for values in (outputs, next_states, initial_values))
        self.output.args = (results,)

    def as_node(self, value: Any) -> Any:
        """Convert a tensor to a `get_attr` node of a constant and a NumPy scalar to a Python number.

        Any other value stays. The generated code could not contain the two.
        """
        if not isinstance(value, Tensor):
            return plain_number(value)
        with self.graph.inserting_before(self.output):
            return self.graph.get_attr(self.constant(value))

    def constant(self, value: Any) -> str:
        """The target of an object in `constants`, which is added if it is missing."""
        for name, known in self.constants.items():
            if known is value:
                return name
        number = len(self.constants)
        while f"snnfx_constant_{number}" in self.constants:
            number += 1
        name = f"snnfx_constant_{number}"
        self.constants[name] = value
        return name

    @property
    def nodes_by_name(self) -> dict[str, Node]:
        """All nodes by their name."""
        return {node.name: node for node in self.graph.nodes}

    def slot_nodes(self) -> list[Node]:
        """The placeholder of each slot, in the order of `slots`."""
        by_name = self.nodes_by_name
        return [by_name[slot.placeholder] for slot in self.slots]

    @property
    def persistent_slots(self) -> list[Slot]:
        """The slots that live on from call to call in a buffer or parameter."""
        return [slot for slot in self.slots if slot.persistent]

    @property
    def changed_parameters(self) -> list[str]:
        """The parameters that the steps change."""
        return [slot.name for slot in self.persistent_slots if isinstance(self.resolve(slot.name), nn.Parameter)]

    def input_nodes(self) -> list[Node]:
        """The placeholders of the tensor inputs, in the order of `input_leaves`."""
        by_name = self.nodes_by_name
        return [by_name[leaf.placeholder] for leaf in self.input_leaves if leaf.placeholder is not None]

    def resolve(self, target: str) -> Any:
        """The object named by a get_attr or call_module target."""
        if target in self.constants:
            return self.constants[target]
        if self.first_step is not None and target in self.first_step.constants:
            return self.first_step.constants[target]  # of another name than those of the later steps
        target = target.removeprefix(START_PREFIX)
        found: Any = self.source
        if target == SELF_TARGET:
            return found
        try:
            for atom in target.split("."):
                found = getattr(found, atom)
        except AttributeError:
            inside = located(self.source, target)
            if inside == target:
                raise
            return self.resolve(inside)
        return found

    def module_of(self, node: Node) -> nn.Module | None:
        """The module that a node calls: the target of a call_module, or the module argument of a stateful call."""
        if node.op == "call_module":
            return self.resolve(str(node.target))  # type: ignore[no-any-return]
        if is_module_call(node):
            return self.resolve(str(node.args[0].target))  # type: ignore[union-attr, no-any-return]
        return None

    def attach(self, name: str, value: nn.Module | nn.Parameter | Tensor) -> Any:
        """Register a module, parameter or buffer on the model, unless it has an equal one of this name.

        A pass that declares `may_change = ("modules",)` adds its own weights this way; they are then part of the
        model's `state_dict` and of copies. It runs once for each mode and at each replan, and gets the same object.

        Args:
            name: a qualified name whose parent exists; the target of `graph.call_module` or `graph.get_attr`.
            value: the object to register.

        Returns:
            The registered object.

        Raises:
            ValueError: the model has an object of this name with another class, other shapes or other options, e.g.
                from a conversion of the model with other options of the pass.
        """
        return attach(self.source, name, value)

    def add_constant(self, name: str, value: Tensor) -> Node:
        """A new `get_attr` node of a constant tensor, which belongs to the program and not to the model.

        Args:
            name: a name of letters, digits and underscores. A digest of the values is appended, so that constants of
                one name in the programs of both modes stay apart.
            value: the constant.
        """
        digest = hashlib.sha1(repr((value.shape, value.dtype, value.detach().flatten().tolist())).encode())
        target = f"{name}_{digest.hexdigest()[:8]}"
        self.constants[target] = value.detach().clone()
        return self.graph.get_attr(target)

    def is_in_training(self, module: nn.Module) -> bool:
        """Whether a layer counts as training: its recorded flag, or else the mode of the program."""
        for read in self.setting_reads:
            if read.name == "training" and self.source.get_submodule(read.owner) is module:
                return bool(read.value)
        return self.training

    def mode_of(self, module: nn.Module) -> bool:
        """Whether a layer trains in this program: its own flag if the model is in the program's mode."""
        return module.training if self.source.training == self.training else self.training

    def trains(self, module: nn.Module) -> bool:
        """Whether a layer trains in this program: its recorded flag, or else its mode."""
        for read in self.setting_reads:
            if read.name == "training" and self.source.get_submodule(read.owner) is module:
                return bool(read.value)
        return self.mode_of(module)

    def copy(self) -> StepProgram:
        """A copy with its own graph and equal node names; the source model and constants are shared."""
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
            constants=dict(self.constants),
            first_step=self.first_step.copy() if self.first_step is not None else None,
        )

    def unplanned(self) -> StepProgram:
        """Remove all regions in place and return the program to stage "normalized"."""
        clear_facts(self.graph.nodes, since="partitioned")
        self.regions, self.stage = [], "normalized"
        self.constants = dict(self.constants)
        return self

    def __str__(self) -> str:
        return format_graph(self.graph)


START_PREFIX = "snnfx_start."
"""A get_attr target with this prefix is the value of a buffer or parameter before the first step of a call."""
SELF_TARGET = "snnfx_source"
"""The get_attr target of the root model (for a model that is one stateful module)."""


def results_of(graph: fx.Graph) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """The argument of the output node: `(outputs, next_states, initial_values)`."""
    return cast(Any, graph.output_node().args[0])  # type: ignore[no-any-return]

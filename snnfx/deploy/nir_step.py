"""One time step of a net as one graph of ATen calls, in which each node knows the module that it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from snnfx.deploy.functional_step import functional_step
from snnfx.deploy.refusals import first_line
from snnfx.errors import ExportError
from snnfx.ir.facts import MODULE
from snnfx.ir.nodes import is_in_place, object_of
from snnfx.ir.printing import describe_node, location_of, operation_name
from snnfx.ir.program import StepProgram
from snnfx.ops.sequence_functions import expand_initial_value
from snnfx.sandbox.torch_internals import pytree

__all__ = ["BATCH", "AtenStep", "record_step", "refusal", "run_nodes", "two_samples"]

BATCH = 2
"""The batch size of the recording: two samples, because dimensions of size 1 broadcast."""


@dataclass
class AtenStep:
    """One time step as ATen calls.

    Args:
        graph: the calls; its placeholders are the inputs, the states and the constants.
        inputs: the placeholder of each input, with its name.
        slots: slot name -> placeholder.
        following: placeholder of a slot -> the node of its next value.
        initial: placeholder of a slot -> its value before the first step.
        outputs: the node of each output, with its name.
        constants: placeholder of a constant -> its value.
        names: id of a tensor -> qualified name, for parameters and buffers of the model.
        values: the value of each node in the first step.
    """

    graph: fx.Graph
    inputs: dict[Node, str] = field(default_factory=dict)
    slots: dict[str, Node] = field(default_factory=dict)
    following: dict[Node, Node] = field(default_factory=dict)
    initial: dict[Node, Tensor] = field(default_factory=dict)
    outputs: list[Node] = field(default_factory=list)
    constants: dict[Node, Tensor] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    values: dict[Node, Any] = field(default_factory=dict)

    def features(self, node: Node) -> tuple[int, ...]:
        """The sizes of a node without the batch."""
        value = self.values[node]
        if not isinstance(value, Tensor) or not value.dim() or value.shape[0] != BATCH:
            raise refusal(node, "it has no batch dimension in front.", 'Write the step for inputs "[N, *]".')
        return tuple(value.shape[1:])

    @property
    def varying(self) -> set[Node]:
        """The nodes that depend on an input or a state."""
        found: set[Node] = set(self.inputs) | set(self.slots.values())
        for node in self.graph.nodes:
            if any(n in found for n in node.all_input_nodes):
                found.add(node)
        return found


def refusal(node: Node, why: str, hint: str = "") -> ExportError:
    """The refusal of an operation, which names its module."""
    module, operation = MODULE.of(node), node.meta.get("operation", str(node.target))
    what = f"`{module}`" if module else f"the operation `{operation}`"
    return ExportError(
        "SNNFX813", f"{what} has no form in NIR", where=node.meta.get("where", ""), why=why, hint=hint or _HINT
    )


_HINT = "Replace this part, or export a .pt2 or .onnx file."


def record_step(program: StepProgram, steps: Sequence[Tensor], carried: Mapping[str, Any]) -> AtenStep:
    """Record one step of a program.

    Args:
        program: the program in evaluation mode.
        steps: the inputs of the first step, `[N, *]`.
        carried: the values of slots that the caller passes, by name.
    """
    recorder = _Recorder(program)
    with torch.no_grad():
        recorder.bind_inputs([two_samples(x) for x in steps])
        recorder.bind_slots({name: two_samples(torch.as_tensor(value)) for name, value in carried.items()})
        recorder.finish()
    return recorder.result


def two_samples(x: Tensor) -> Tensor:
    """The first sample of a batch, twice."""
    return x.detach()[:1].expand(BATCH, *x.shape[1:]).clone() if x.dim() else x.detach()


class _Recorder:
    """Runs the nodes of a program one by one and records each as ATen calls.

    `known` maps a node of the program to its value, and `recorded` to the same structure with nodes of the recording
    in the place of tensors that vary.
    """

    def __init__(self, program: StepProgram) -> None:
        self.program = program
        self.graph = fx.Graph()
        self.result = AtenStep(self.graph)
        self.result.names = {id(t): name for name, t in program.source.named_parameters()}
        self.result.names |= {id(t): name for name, t in program.source.named_buffers()}
        self.known: dict[Node, Any] = {}
        self.recorded: dict[Node, Any] = {}
        self.placeholders: dict[int, Node] = {}

    def bind_inputs(self, steps: Sequence[Tensor]) -> None:
        names = [leaf.name for leaf in self.program.input_leaves if leaf.placeholder is not None]
        for node, name, x in zip(self.program.input_nodes(), names, steps, strict=True):
            self.result.inputs[self._placeholder(node, x)] = name

    def bind_slots(self, carried: Mapping[str, Tensor]) -> None:
        program = self.program
        names = [slot.name for slot in program.slots]
        nodes = dict(zip(program.slot_nodes(), names, strict=True))
        initial = dict(zip(nodes, program.initial_values, strict=True))
        values = dict(self.known)

        def value_of(node: Any) -> Any:
            """The value in the first step. Initial values may be numbers, and may depend on earlier states."""
            if not isinstance(node, Node):
                return node
            if node not in values:
                if node in nodes:
                    values[node] = carried.get(nodes[node], value_of(initial[node]))
                else:
                    for n in node.all_input_nodes:
                        value_of(n)
                    values[node] = self._run(node, values)
            return values[node]

        for node, after in zip(nodes, program.next_states, strict=True):
            start, following = value_of(node), torch.as_tensor(value_of(after))
            full = torch.as_tensor(expand_initial_value(0 if start is None else start, following, nodes[node])).clone()
            placeholder = self._placeholder(node, full)
            self.result.slots[nodes[node]] = placeholder
            self.result.initial[placeholder] = full

    def finish(self) -> None:
        unused = {n for n in self.program.initial_values if isinstance(n, Node)}
        for node in self.program.graph.nodes:
            if node.op == "output":
                break
            if node not in self.known and not (node in unused and set(node.users) <= {self.program.output}):
                self._record(node)
        result = self.result
        result.outputs = [self._node_of(v) for v in self.program.outputs if v is not None]
        for placeholder, value in zip(result.slots.values(), self.program.next_states, strict=True):
            result.following[placeholder] = self._node_of(value)
        self.graph.output(())

    def _node_of(self, value: Any) -> Node:
        found = self.recorded.get(value, self.known.get(value)) if isinstance(value, Node) else value
        return found if isinstance(found, Node) else self._constant_node(torch.as_tensor(found))

    def _placeholder(self, node: Node, value: Tensor) -> Node:
        placeholder = self.graph.placeholder(f"{node.name}_value")
        placeholder.meta |= {"module": "", "where": location_of(node), "operation": node.name}
        self.known[node], self.recorded[node] = value, placeholder
        self.result.values[placeholder] = value
        return placeholder

    def _constant_node(self, value: Tensor) -> Node:
        if id(value) not in self.placeholders:
            node = self.graph.placeholder(f"constant_{len(self.placeholders)}")
            self.placeholders[id(value)] = node
            self.result.constants[node] = value
            self.result.values[node] = value.detach()
        return self.placeholders[id(value)]

    def _run(self, node: Node, values: Mapping[Node, Any]) -> Any:
        if node.op == "get_attr":
            return self.program.resolve(str(node.target))
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
        if node.op == "call_module":
            return self.program.resolve(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _record(self, node: Node) -> None:
        if node.op == "get_attr":
            self.known[node] = self.recorded[node] = self._run(node, self.known)
            return
        arguments = fx.map_arg((node.args, node.kwargs), lambda n: self.known[n])
        leaves, spec = pytree.tree_flatten(arguments)
        sources = pytree.tree_leaves(fx.map_arg((node.args, node.kwargs), lambda n: self.recorded[n]))
        varying = [i for i, source in enumerate(sources) if isinstance(source, Node)]
        if not varying:
            self.known[node] = self.recorded[node] = self._run(node, self.known)
            return
        found: list[Any] = []

        def step(*tensors: Tensor) -> list[Tensor]:
            given = list(leaves)
            for i, tensor in zip(varying, tensors, strict=True):
                given[i] = tensor
            args, kwargs = pytree.tree_unflatten(given, spec)
            values, shape = pytree.tree_flatten(self._call(node, args, kwargs))
            found[:] = [values, shape]
            return [v for v in values if isinstance(v, Tensor)]

        value = self._copied_call(node, leaves, spec)
        outputs, shape = pytree.tree_flatten(value)
        self.known[node] = value
        try:
            recorded, constants = functional_step(step, [leaves[i] for i in varying], ())
        except Exception as error:
            raise ExportError(
                "SNNFX805",
                f"`{describe_node(node)}` cannot be exported",
                where=location_of(node),
                why=f"torch cannot trace it: {first_line(error)}",
                hint="Replace this operation; one step may compute with tensors, but neither read their values in "
                "Python nor depend on them.",
            ) from error
        if not any(isinstance(v, Tensor) for v in outputs):
            self.recorded[node] = value  # a size, and no value of a tensor
            return
        inlined = self._inline(recorded, [sources[i] for i in varying], constants, node)
        nodes = iter(inlined)
        self.recorded[node] = pytree.tree_unflatten(
            [next(nodes) if isinstance(v, Tensor) else v for v in outputs], shape
        )
        if is_in_place(node):
            self.recorded[object_of(node)], self.known[object_of(node)] = self.recorded[node], value

    def _call(self, node: Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_module":
            return self.program.resolve(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _copied_call(self, node: Node, leaves: Sequence[Any], spec: Any) -> Any:
        copied = [v.clone() if isinstance(v, Tensor) and not isinstance(v, torch.nn.Parameter) else v for v in leaves]
        args, kwargs = pytree.tree_unflatten(copied, spec)
        return self._call(node, args, kwargs)

    def _inline(
        self, recorded: fx.GraphModule, sources: Sequence[Node], constants: Sequence[Tensor], origin: Node
    ) -> list[Node]:
        module, where = _module_of(origin), location_of(origin)
        given = iter([*sources, *[self._constant_node(c) for c in constants]])
        copies: dict[Node, Node] = {}
        for node in recorded.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(given)
            elif node.op == "output":
                return [copies[n] for n in node.args[0]]
            else:
                copy = copies[node] = self.graph.node_copy(node, lambda n: copies[n])
                copy.meta = {"module": module, "where": where, "operation": operation_name(origin)}
                run_nodes([copy], self.result.values)
                if _is_zero(copy):
                    # Libraries write a reset that leaves a state alone as `i - 0 * spike`; it does not tie `i` to `v`.
                    zeros = torch.zeros_like(self.result.values[copy])
                    self.graph.erase_node(copy)
                    copies[node] = self._constant_node(zeros)
        raise AssertionError("a graph ends with an output")


def _is_zero(node: Node) -> bool:
    """Whether a call is a product with the number 0, of finite values."""
    factors = (torch.ops.aten.mul.Tensor, torch.ops.aten.mul.Scalar)
    return node.target in factors and any(isinstance(v, int | float) and v == 0 for v in node.args[:2])


def _module_of(node: Node) -> str:
    return str(node.target) if node.op == "call_module" else MODULE.of(node) or ""


def run_nodes(nodes: Iterable[Node], values: dict[Node, Any], dtype: torch.dtype | None = None) -> None:
    """Run ATen calls; `values` has the values of their arguments and takes the results.

    Args:
        nodes: the calls, in order.
        values: node -> value.
        dtype: the dtype that takes the place of every floating-point dtype in the calls; None: none.
    """

    def wider(value: Any) -> Any:
        return dtype if isinstance(value, torch.dtype) and value.is_floating_point and dtype is not None else value

    for node in nodes:
        if node in values:
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
        assert callable(node.target)
        values[node] = node.target(*map(wider, args), **{k: wider(v) for k, v in kwargs.items()})

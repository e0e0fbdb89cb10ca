"""Bind an emitted graph: one flat function without the checks of the public functions.

The graph calls `snnfx.functional` for each region, which checks and unpacks its arguments at each call. The bound
function has the nodes of folded regions and of values that do not change with time inline, calls loops through
`BoundLoop`, and refers to modules directly. A loop that may run step by step also gets its steps as functions. The
conditions under which that is valid are Python expressions, which a net evaluates before each bound call: the modules
are still the same objects, they have no hooks, and the settings of neurons have not changed. Everything else, such as
parameters, is read at each call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.fx import Node
from torch.nn import functional

from snnfx.emit.bit_readers import find_readers
from snnfx.emit.norm_tails import FusedTails, find_tails
from snnfx.functional import multi_step_forward, seq_to_ann_forward
from snnfx.ir.program import SELF_TARGET
from snnfx.lowering.choices.image_formats import convolve, fastest_format
from snnfx.lowering.choices.linear_layers import linear
from snnfx.lowering.elementwise.lowered_step import LoweredStep
from snnfx.lowering.events.event_layers import call_layer_by_events
from snnfx.lowering.events.spike_bits import SpikeBits
from snnfx.lowering.events.spike_readers import SpikeReader
from snnfx.lowering.live_settings import HOOKS
from snnfx.lowering.pooling.max_pool import max_pool
from snnfx.lowering.settings_check import conditions_of_settings
from snnfx.ops.folded_weights import call_norm
from snnfx.ops.sequence_functions import call_module, call_once, select_state
from snnfx.ops.time_folding import fold_time, unfold_time
from snnfx.regions.bound_bit_loop import BoundBitLoop
from snnfx.regions.bound_loop import BoundLoop, FlatSteps
from snnfx.regions.first_neuron_step import with_neuron_kernels
from snnfx.regions.normed_loop import BoundNormedLoop, Tail
from snnfx.regions.region_modules import LoopRegion
from snnfx.regions.sequence_region import RegionGraph
from snnfx.sandbox.torch_internals import function_from_source
from snnfx.state.leaf_modules import takes_sequence

__all__ = ["BoundGraph", "bind_graph"]

_LEAST_WEIGHTS = 1 << 13
"""Elements of the weight of a linear layer from which on the faster library may compute it."""

_RESET = "None"
"""The text of the reset state."""


@dataclass(frozen=True)
class BoundGraph:
    """An emitted graph as a function.

    Args:
        run: takes the inputs of the graph.
        is_valid: whether `run` computes what the graph computes.
    """

    run: Callable[..., Any]
    is_valid: Callable[[], bool]


def bind_graph(graph: fx.Graph, root: nn.Module, from_reset: bool = False) -> BoundGraph | None:
    """Bind a graph whose inputs are tensors; None if a module that it reads has hooks.

    Args:
        graph: an emitted graph. "main" takes the state and the time steps behind its inputs.
        root: the module that its targets refer to.
        from_reset: whether the graph starts from the reset state: then "main" and "first" take neither.
    """
    return _Binder(graph, root, from_reset).bind()


class _Binder:
    def __init__(self, graph: fx.Graph, root: nn.Module, from_reset: bool) -> None:
        self.graph, self.root, self.from_reset = graph, root, from_reset
        self.tails: FusedTails = find_tails(graph, root)
        self.readers = find_readers(graph, root, self.tails.of_loop)
        self.constants: dict[str, Any] = {
            "Tensor": Tensor,
            "fold_time": fold_time,
            "unfold_time": unfold_time,
            "SpikeBits": SpikeBits,
        }
        self.names: dict[int, str] = {}
        self.lines: list[str] = []
        self.values: dict[Node, str] = {}
        self.modules: dict[Node, nn.Module] = {}
        self.objects: dict[Node, Any] = {}
        """Attributes that are neither modules nor tensors, such as autograd Functions."""
        self.attributes: dict[Node, str] = {}
        """The expression that reads an attribute."""
        self.conditions: list[str] = []
        self.neurons: list[nn.Module] = []
        self.owners: dict[int, nn.Module] = {}
        """The modules on the paths of attributes."""
        self.called: dict[int, nn.Module] = {}
        self.hooks: list[Any] = []
        self.count = 0

    def bind(self) -> BoundGraph | None:
        last_use = {operand: node for node in self.graph.nodes for operand in node.all_input_nodes}
        parameters: list[str] = []
        for node in self.graph.nodes:
            if node.op == "placeholder":
                if self.from_reset and node.args:  # the state, or the time steps: they have a default
                    self.values[node] = _RESET
                else:
                    parameters.append(self._new(node))
                continue
            self._write(node)
            freed = [self.values[n] for n in node.all_input_nodes if last_use[n] is node and n not in self.modules]
            freed = [name for name in freed if name != _RESET]
            if freed and node.op != "output":
                self.lines.append(f"{' = '.join(dict.fromkeys(freed))} = None")
        for module in self.called.values():
            attributes = vars(module)
            if any(attributes[name] for name in HOOKS) or "forward" in attributes:
                return None
            self.hooks += [attributes[name] for name in HOOKS]
            self.conditions.append(f"{self._constant(module)}.__class__ is {self._constant(type(module))}")
            self.conditions.append(f"'forward' not in {self._constant(attributes)}")
        settings = conditions_of_settings(self.neurons, self._constant, self.hooks)
        if settings is None:
            return None
        settings.append(f"not any({self._constant(self.hooks)})")
        run = "\n    ".join([f"def forward({', '.join(parameters)}):", *self.lines])
        paths = [condition for owner in self.owners.values() for condition in self._same_children(owner)]
        checks = " and ".join([*paths, *self.conditions, *settings]) or "True"
        valid = f"def forward():\n    return {checks}"
        return BoundGraph(
            function_from_source(run + "\n", self.constants), function_from_source(valid + "\n", self.constants)
        )

    def _constant(self, value: Any) -> str:
        """A name for a value in the generated code."""
        if id(value) not in self.names:
            self.names[id(value)] = f"c{len(self.constants)}"
            self.constants[self.names[id(value)]] = value  # which keeps it alive, so that its id stays its own
        return self.names[id(value)]

    def _new(self, node: Node) -> str:
        self.values[node] = name = f"v{self.count}"
        self.count += 1
        return name

    def _assign(self, node: Node, expression: str) -> None:
        self.lines.append(f"{self._new(node)} = {expression}")

    def _write(self, node: Node) -> None:
        if node.op == "get_attr":
            self._read_attribute(node)
        elif node.op == "output":
            self.lines.append(f"return {self._text(node.args[0])}")
        elif node.op == "call_method":
            receiver, *args = node.args
            self._assign(node, f"{self._text(receiver)}.{node.target}({self._arguments(args, node.kwargs)})")
        elif node.target is fastest_format and self._is_split(node):
            self._assign(node, self._call(fastest_format, (*node.args, True), {}))
        elif node.target is operator.getitem:
            self._assign(node, f"{self._text(node.args[0])}[{self._text(node.args[1])}]")
        elif node.target is seq_to_ann_forward and self._is_simple_fold(node):
            self._write_fold(node)
        elif node.target is multi_step_forward and self._is_plain_loop(node):
            self._write_loop(node)
        elif node.target is select_state and self._text(node.args[0]) == _RESET:
            self.values[node] = _RESET
        elif node.target is call_module and self._is_first_step(node):
            self._write_first_step(node)
        elif node.target is call_once and self._is_simple_once(node):
            self._write_once(node)
        else:
            self._assign(node, self._call(node.target, node.args, node.kwargs))

    def _write_loop(self, node: Node) -> None:
        loop: Any = self.modules[node.args[1]]  # type: ignore[index]
        constants: Any = node.kwargs.get("constants", ())
        fixed = [self.modules.get(c, self.objects.get(c)) for c in constants]
        tensors = [i for i, c in enumerate(constants) if c not in self.modules and c not in self.objects]
        for c in constants:
            if c in self.modules:
                self.neurons.append(self.modules[c])
            elif c in self.objects:
                self.conditions.append(f"{self.attributes[c]} is {self._constant(self.objects[c])}")
        with_finals = any(n.target is not operator.getitem or n.args[1] != 0 for n in node.users)
        operands: Any = node.args[0]
        tails = self.tails.of_loop.get(node)
        if tails is None:
            readers, steps = self.readers.of_loop.get(node, ()), self._flat_steps(loop, constants, tensors)
            bound: Any = (
                BoundBitLoop(loop, fixed, readers, with_finals, steps)
                if readers and not tensors
                else BoundLoop(loop, fixed, tensors, with_finals, steps)
            )
            sequences = [self._text(x) for x in operands]
        else:
            bound = BoundNormedLoop(loop, fixed, tensors, with_finals, tails)
            sequences = [f"{'*' if t else ''}{self._text(x)}" for x, t in zip(operands, tails, strict=True)]
        given = [self._text(constants[i]) for i in tensors]
        if node.kwargs["state"] is not None:
            given.append(f"state={self._text(node.kwargs['state'])}")
        self._assign(node, f"{self._constant(bound)}({', '.join([*sequences, *given])})")

    def _flat_steps(self, loop: Any, constants: Sequence[Node], tensors: Sequence[int]) -> FlatSteps | None:
        """The steps of a loop as functions; None if one kernel runs all steps."""
        kernels = loop.kernels
        if kernels is not None and isinstance(kernels.in_use, LoweredStep):
            return None
        step = self._function_of(loop.step, constants, tensors)
        if loop.first is None:
            return FlatSteps(step, None, loop.may_return_structures)
        first = by_kernels = self._function_of(loop.first, constants, tensors)
        modules = {k: self.modules[c] for k, c in enumerate(constants) if c in self.modules}
        graph = None if kernels is None else with_neuron_kernels(loop.first.graph, modules)
        if graph is not None:
            by_kernels = self._function_of(loop.first, constants, tensors, graph)
        return FlatSteps(step, first, loop.may_return_structures, by_kernels)

    def _function_of(
        self, region: Any, constants: Sequence[Node], tensors: Sequence[int], graph: fx.Graph | None = None
    ) -> Callable[..., Any]:
        """The step of a loop as a function of the tensors among its constants and of its other arguments.

        Args:
            region: the step.
            constants, tensors: the constants of the loop, and the positions of tensors among them.
            graph: computes the same as the graph of the step; None: that graph.
        """
        lines, self.lines = self.lines, []
        inner = list((graph or region.graph).nodes)
        placeholders = [n for n in inner if n.op == "placeholder"]
        varying = [placeholders[i] for i in tensors] + placeholders[len(constants) :]
        self._share(placeholders, constants)
        for placeholder, constant in zip(placeholders, constants, strict=False):
            if constant in self.objects:
                self.values[placeholder] = self._constant(self.objects[constant])
        parameters = [self._new(n) for n in varying]
        self._write_nodes(inner)
        body, self.lines = self.lines, lines
        self._guard_forward(region)
        source = "\n    ".join([f"def forward({', '.join(parameters)}):", *body])
        return function_from_source(source + "\n", self.constants)

    def _share(self, placeholders: Sequence[Node], constants: Sequence[Node]) -> None:
        """Read constants of a region where its graph reads placeholders."""
        for placeholder, constant in zip(placeholders, constants, strict=False):
            self.values[placeholder] = self.values[constant]
            if constant in self.modules:
                self.modules[placeholder] = self.modules[constant]

    def _guard_forward(self, region: nn.Module) -> None:
        """Check before each call that the graph of a region has the code that was inlined."""
        forward = self._constant(type(region).forward)
        self.conditions.append(f"{self._constant(type(region))}.forward is {forward}")
        self.called[id(region)] = region

    def _write_nodes(self, nodes: Sequence[Node], result: str = "return {}") -> None:
        """Write the nodes of a region, except placeholders; `result` is the statement with the results."""
        last_use = {operand: n for n in nodes for operand in n.all_input_nodes}
        own = {n for n in nodes if n.op != "placeholder"}
        for n in nodes:
            if n.op == "output":
                self.lines.append(result.format(self._text(n.args[0])))
            elif n.op != "placeholder":
                self._write_inside(n)
                freed = [
                    self.values[v] for v in n.all_input_nodes if last_use[v] is n and v in own and v not in self.modules
                ]
                if freed:
                    self.lines.append(f"{' = '.join(dict.fromkeys(freed))} = None")

    def _selects_state(self, node: Node) -> bool:
        state = node.kwargs.get("state")
        return isinstance(state, Node) and state.target is select_state

    def _is_first_step(self, node: Node) -> bool:
        """Whether a node calls a whole step from the reset state."""
        region = self.modules.get(node.args[0])  # type: ignore[arg-type]
        return type(region) is LoopRegion and not node.kwargs and self._text(node.args[-1]) == _RESET

    def _write_first_step(self, node: Node) -> None:
        """Write the nodes of a step."""
        region: Any = self.modules[node.args[0]]  # type: ignore[index]
        first = region.step if region.first is None else region.first
        inner = list(first.graph.nodes)
        arguments: Any = node.args[1:]
        self._share([n for n in inner if n.op == "placeholder"], arguments)
        self._write_nodes(inner, self._new(node) + " = {}")
        self._guard_forward(first)

    def _is_simple_once(self, node: Node) -> bool:
        region = self.modules.get(node.args[0])  # type: ignore[arg-type]
        return isinstance(region, RegionGraph) and not node.kwargs

    def _write_once(self, node: Node) -> None:
        """Write the nodes of a region whose value does not change with time."""
        region: Any = self.modules[node.args[0]]  # type: ignore[index]
        inner = list(region.graph.nodes)
        constants: Any = node.args[1]
        self._share([n for n in inner if n.op == "placeholder"], constants)
        self._write_nodes(inner, self._new(node) + " = {}")
        self._guard_forward(region)

    def _call(self, target: Any, args: Any, kwargs: Mapping[str, Any]) -> str:
        return f"{self._constant(target)}({self._arguments(args, kwargs)})"

    def _arguments(self, args: Any, kwargs: Mapping[str, Any]) -> str:
        return ", ".join([*map(self._text, args), *(f"{name}={self._text(v)}" for name, v in kwargs.items())])

    def _text(self, value: Any) -> str:
        """The text of an argument."""
        if isinstance(value, Node):
            return self.values[value]
        if type(value) in (tuple, fx.immutable_collections.immutable_list, list):
            inside = "".join(f"{self._text(v)}, " for v in value)
            return f"({inside})" if type(value) is tuple else f"[{inside}]"
        if isinstance(value, dict):
            return "{" + "".join(f"{k!r}: {self._text(v)}, " for k, v in value.items()) + "}"
        if isinstance(value, slice):
            return f"slice({self._text(value.start)}, {self._text(value.stop)}, {self._text(value.step)})"
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        return self._constant(value)

    def _read_attribute(self, node: Node) -> None:
        *path, name = str(node.target).split(".")
        owner = self.root
        for atom in path:
            owner = self._child(owner, atom)
        if isinstance(owner, nn.Module) and (name in owner._modules or name == SELF_TARGET):
            self.modules[node] = module = self._child(owner, name)
            self.values[node] = self._constant(module)
        else:
            value = getattr(owner, name)
            read = f"getattr({self._constant(owner)}, {name!r})"
            if not isinstance(value, Tensor):
                self.objects[node] = value
            self.attributes[node] = read
            self._assign(node, read)

    def _child(self, owner: nn.Module, name: str) -> nn.Module:
        """A child of a module, which stays the same as long as `is_valid` holds."""
        child: nn.Module = getattr(owner, name)
        if name == SELF_TARGET:
            self.conditions.append(f"{self._constant(vars(owner))}.get({name!r}) is {self._constant(child)}")
        else:
            self.owners[id(owner)] = owner
        return child

    def _same_children(self, owner: nn.Module) -> tuple[str, str]:
        """Conditions that a module has the same children under the same names."""
        children = self._constant(owner._modules)
        return (
            f"{self._constant(vars(owner))}['_modules'] is {children}",
            f"{children} == {self._constant(dict(owner._modules))}",
        )

    def _is_plain_loop(self, node: Node) -> bool:
        loop = self.modules.get(node.args[1])  # type: ignore[arg-type]
        constants = node.kwargs.get("constants", ())
        return (
            type(loop) is LoopRegion
            and (node.kwargs.get("state", 0) is None or self._selects_state(node))
            and set(node.kwargs) <= {"state", "constants"}
            and all(map(self._may_be_constant, constants))  # type: ignore[arg-type]
        )

    def _may_be_constant(self, node: Node) -> bool:
        """Whether a constant of a loop is an attribute, or a tensor that the graph computes."""
        return node in self.modules or node in self.attributes or isinstance(node.meta.get("val"), Tensor)

    def _is_simple_fold(self, node: Node) -> bool:
        region = self.modules.get(node.args[1])  # type: ignore[arg-type]
        return type(region).__mro__[1] is RegionGraph and set(node.kwargs) <= {"constants"}

    def _write_fold(self, node: Node) -> None:
        """Write the nodes of a folded region, between folding its inputs and unfolding its outputs."""
        operands: Any = node.args[0]
        region: Any = self.modules[node.args[1]]  # type: ignore[index]
        sequences = [self.values[n] for n in operands]
        given: Any = node.kwargs.get("constants", ())
        constants: list[Node] = list(given)
        self._guard_forward(region)
        if len(sequences) > 1:
            sizes = " or ".join(f"{x}.shape[1] != {sequences[0]}.shape[1]" for x in sequences[1:])
            self.lines.append(f"if {sizes}: {self._call(node.target, node.args, node.kwargs)}")  # which raises
        inner = list(region.graph.nodes)
        placeholders = [n for n in inner if n.op == "placeholder"]
        if self._write_linear(node, inner, constants, sequences):
            return
        self._share(placeholders, constants)
        for placeholder, x in zip(placeholders[len(constants) :], sequences, strict=True):
            self._assign(placeholder, f"fold_time({x})")
        shared = {*self.modules, *placeholders[: len(constants)]}  # later regions may read them
        tails = self.tails.of_fold.get(node, {})
        in_loops = {n for tail in tails.values() for n in tail.nodes}
        self._guard_norms(tails.values())
        inner = [n for n in inner if n not in in_loops]
        last_use = {operand: n for n in inner for operand in n.all_input_nodes}
        last_use |= {operand: inner[-1] for tail in tails.values() for operand in tail.inputs}
        self._guard_flattens(node)
        reader, before = self.readers.of_fold.get(node), len(self.lines) - len(sequences)
        for n in inner:
            if n.op == "placeholder":
                continue
            if n.op == "output":
                outputs = [self._unfolded(v, tails.get(i), sequences[0]) for i, v in enumerate(n.args[0])]
                self._assign(node, f"({''.join(f'{y}, ' for y in outputs)})")  # none if the fold only updates buffers
                freed = [self.values[v] for v, user in last_use.items() if user is n and v not in {*shared, *in_loops}]
            else:
                self._write_inside(n)
                freed = [self.values[v] for v in n.all_input_nodes if last_use[v] is n and v not in shared]
            if freed:
                self.lines.append(f"{' = '.join(dict.fromkeys(freed))} = None")
            if reader is not None and n.target is call_layer_by_events:
                self._read_bits(reader, sequences[0], n, before)
                reader = None

    def _read_bits(self, reader: SpikeReader, x: str, node: Node, before: int) -> None:
        """Let a reader compute a call of its layer, and the lines from `before` on only where it does not."""
        self.called[id(reader.layer)] = reader.layer
        name, y, lines = self._constant(reader), self.values[node], self.lines[before:]
        if type(reader.layer) is nn.Linear and not reader.pools and not reader.flattens:
            dense = f"{y} = {self._linear(reader.layer, self._text(node.args[1]))} if {name}.is_idle else "
            lines = [dense + line.removeprefix(f"{y} = ") if line.startswith(f"{y} = ") else line for line in lines]
        self.lines[before:] = [
            f"{y} = {name}({x}) if type({x}) is SpikeBits else None",
            f"if {y} is None:",
            f"    if type({x}) is SpikeBits: {x} = {x}.numbers()",
            *("    " + line for line in lines),
            f"    if not {name}.is_idle: {name}.observe()",
        ]

    def _guard_flattens(self, fold: Node) -> None:
        """Check before each call that the flattenings that a reader of bits skips keep their dimensions."""
        for flatten in self.readers.flattens.get(fold, ()):
            attributes = self._constant(vars(flatten))
            self.conditions.append(f"{attributes}['start_dim'] == 1 and {attributes}['end_dim'] == -1")

    def _guard_norms(self, tails: Iterable[Tail]) -> None:
        """Check before each call that the norms of tails are called as they were found."""
        for norm in (norm for tail in tails for norm in tail.norms.values()):
            self.called[id(norm)] = norm
            self.conditions.append(f"{self._constant(norm)}.training")

    def _unfolded(self, value: Any, tail: Tail | None, sequence: str) -> str:
        """The text of an output of a fold over time, or of all that its tail reads."""
        if tail is None:
            return f"unfold_time({self._text(value)}, {sequence}.shape[0])"
        pairs = {n: node.target is call_norm for node in tail.nodes for n in tail.reads[node]}
        # `call_layer` returns a pair, for the `call_norm` that the tail computes.
        texts = [f"{self._text(n)}{'[0]' if pairs[n] else ''}" for n in tail.inputs]
        return f"({''.join(f'unfold_time({text}, {sequence}.shape[0]), ' for text in texts)})"

    def _write_inside(self, node: Node) -> None:
        module = self.modules.get(node.args[0]) if node.target is call_module and node.args else None  # type: ignore[arg-type]
        if module is None or takes_sequence(module) or type(module).__call__ is not nn.Module.__call__:
            self._write(node)
            return
        self.called[id(module)] = module
        operands = node.args[1:]
        if type(module) is nn.Linear:
            self._assign(node, self._linear(module, self._text(operands[0])))
        elif type(module) is nn.Conv2d and operands and self._is_split(operands[0]):
            convolution: Any = operands[0].args[-1]  # type: ignore[union-attr]
            self._assign(node, self._call(convolve, (node.args[0], operands[0], convolution), {}))
        elif type(module) is nn.MaxPool2d and not module.return_indices:
            self._assign(node, self._max_pool(module, self._text(operands[0])))
        else:
            self._assign(node, f"{self._constant(module)}.forward({self._arguments(operands, node.kwargs)})")

    def _linear(self, module: nn.Module, x: str) -> str:
        parameters = self._constant(module._parameters)
        weight: Any = module._parameters.get("weight")
        function = functional.linear if weight is None or weight.numel() < _LEAST_WEIGHTS else linear
        # A tensor that is assigned after `del layer.weight` is an attribute.
        self.conditions.append(f"'weight' in {parameters} and 'bias' in {parameters}")
        return f"{self._constant(function)}({x}, {parameters}['weight'], {parameters}['bias'])"

    def _is_split(self, images: Any) -> bool:
        """Whether only a plain convolution reads images in its fastest format."""
        if not isinstance(images, Node) or images.target is not fastest_format or len(images.users) != 1:
            return False
        (user,) = images.users
        module = self.modules.get(user.args[0]) if user.target is call_module else None  # type: ignore[arg-type]
        return type(module) is nn.Conv2d and user.args[1:] == (images,) and not user.kwargs

    def _max_pool(self, module: nn.MaxPool2d, x: str) -> str:
        attributes = self._constant(vars(module))
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
        settings = ", ".join(f"{attributes}[{name!r}]" for name in names)
        self.conditions.append(f"not {attributes}['return_indices']")
        return f"{self._constant(max_pool)}({x}, {settings})"

    def _write_linear(self, node: Node, inner: list[Node], constants: list[Node], sequences: list[str]) -> bool:
        """Write a region that is one linear layer; it needs no folding, because it keeps leading dimensions."""
        calls = [n for n in inner if n.op != "placeholder"]
        if len(calls) != 2 or calls[0].target is not call_module or len(constants) != 1 or len(sequences) != 1:
            return False
        module, placeholders = self.modules.get(constants[0]), [n for n in inner if n.op == "placeholder"]
        is_linear = type(module) is nn.Linear and calls[0].args == tuple(placeholders)
        if not is_linear or calls[1].args != ((calls[0],),):
            return False
        assert module is not None
        self.called[id(module)] = module
        self._assign(node, f"({self._linear(module, sequences[0])},)")
        return True

"""The tracer that records one time step: proxies that know shapes, leaves, surrogate gradients, stateful calls.

Built on `torch.fx.Tracer`. What it adds: stateful modules become calls with explicit state; the `apply` of an
autograd.Function becomes one node, so its backward survives; with example inputs every proxy knows the value of one
step as a fake tensor, so Python control flow on shapes works; nodes remember the user's file and line.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.fx import Node
from torch.utils import _pytree as pytree

from snnfx.errors import CaptureError
from snnfx.leaves import is_leaf
from snnfx.nests import refuse_outputs
from snnfx.places import format_place, place_of_error, place_of_forward, user_calls, user_place
from snnfx.program import SELF_TARGET, add_placeholder
from snnfx.proxy import UNKNOWN, StepProxy, needs_examples, value_of
from snnfx.scalars import recorded_reads
from snnfx.state import (
    adapter_of,
    call_opaque,
    call_stateful,
    composite_adapter,
    initial_value,
    is_stateful_tree,
    opaque_initial_value,
    takes_state,
    without_hooks,
)
from snnfx.step_functions import expect_size, set_part_
from snnfx.tracing_patches import (
    autocast_state,
    patched_apply,
    patched_factories,
    patched_isinstance,
    plain_isinstance,
    quiet_fake_tensors,
)

__all__ = ["ArgumentLeaf", "StepTracer", "SubmoduleNotTraceable"]

_NUMBER_MODULES = ("_operator", "builtins", "math")
"""Where functions live that make numbers of numbers: sizes of sizes."""


class SubmoduleNotTraceable(Exception):
    """Raised through a trace when a submodule has to become an opaque leaf; the trace is then started again."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


class StepTracer(fx.Tracer):
    """Records one step of a model; see the module docstring.

    Args:
        example_arguments: `(args, kwargs)` of one step as fake tensors and constants, or None.
        entry: name of the method that is one step.
        opaque: qualified names of submodules that must not be traced, with the reason.
        inlined: slots of modules that are traced through, as `{slot name: (module, write function)}`.
        fake_mode: the mode under which values are computed, or None without example inputs.
    """

    proxy_buffer_attributes = True

    def __init__(
        self,
        arguments: pytree.PyTree,
        entry: str = "forward",
        opaque: dict[str, str] | None = None,
        fake_mode: FakeTensorMode | None = None,
    ) -> None:
        super().__init__(autowrap_functions=(call_stateful, call_opaque, initial_value, opaque_initial_value))
        self.traced_func_name = entry
        self.arguments = arguments
        self.opaque = opaque or {}
        self.fake_mode = fake_mode
        self.constants: dict[str, Any] = {}
        self.slot_values: dict[str, Any] = {}
        self.slot_initials: dict[str, Any] = {}
        self.slot_placeholders: dict[str, Node] = {}
        self.overwritten_slots: set[str] = set()
        self.carried_arguments: dict[str, Any] = {}
        self.take_carried: Callable[[Any], Any] = lambda outputs: outputs
        self.calls_at: dict[tuple[str, object], list[object]] = {}
        self._open_containers: list[object] = []
        self.output_spec: pytree.TreeSpec | None = None
        self.reads: dict[tuple[nn.Module, str], tuple[Any, str]] = {}
        self.is_evaluating = False
        self._inside_call = False
        self._value_of_next: Any = UNKNOWN
        self._autocast = autocast_state()
        self._paths: dict[nn.Module, str] = {}

    # -- recording ---------------------------------------------------------------------------------------------

    def record(
        self, root: nn.Module, prepare: Callable[[StepTracer], None], finish: Callable[[StepTracer], None]
    ) -> fx.Graph:
        """Trace `root`; `prepare` runs when placeholders may be made, `finish` when the step has been recorded."""
        self._prepare, self._finish = prepare, finish
        self._paths = {module: name for name, module in root.named_modules()}
        reads = recorded_reads(self, self.reads)
        with quiet_fake_tensors(), patched_apply(self), patched_isinstance(), patched_factories(self), reads:
            before = torch.get_rng_state()
            graph = self.trace(root)
        if not torch.equal(before, torch.get_rng_state()):
            raise CaptureError(
                "SNNFX215",
                "random numbers are drawn that the graph does not record",
                where=place_of_forward(root, self.traced_func_name),
                why="they would be the same in every call of the net.",
                hint="Draw them with torch.rand, torch.randn, torch.rand_like or torch.bernoulli of a recorded value.",
            )
        return graph

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        leaves, spec = pytree.tree_flatten(self.arguments)
        args, kwargs = pytree.tree_unflatten([self._argument(leaf) for leaf in leaves], spec)
        self._prepare(self)

        def one_step(root: nn.Module) -> Any:
            outputs = self._call_root(root, root_fn, args, {**kwargs, **self.carried_arguments})
            flat, self.output_spec = pytree.tree_flatten(self.take_carried(outputs))
            refuse_outputs(flat, place_of_forward(root, self.traced_func_name))
            self._finish(self)
            names = list(self.slot_values)
            return (
                tuple(flat),
                tuple(self.slot_values[name] for name in names),
                tuple(self.slot_initials.get(name) for name in names),
            )

        one_step.__globals__.setdefault("__name__", __name__)
        return one_step, [self.root]

    def _call_root(
        self, root: nn.Module, root_fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record the step; a model that is a single layer or neuron is one call of itself."""
        adapter = adapter_of(root)
        is_single = is_leaf(root) if adapter is None else bool(adapter.names(root)) and adapter.is_leaf(root)
        is_single = is_single or takes_state(adapter)
        if is_single and self.traced_func_name == "forward":
            return self.call_module(root, root.forward, args, kwargs)
        if self.traced_func_name == "forward":
            _refuse_hooks(root, "")
        if adapter is not None:
            _refuse_by(adapter, root, "the model", place_of_forward(root, self.traced_func_name))
        try:
            return root_fn(root, *args, **kwargs)
        except (CaptureError, SubmoduleNotTraceable):
            raise
        except Exception as error:
            raise CaptureError(
                "SNNFX201",
                "the model cannot be traced",
                where=format_place(place_of_error(error)) or place_of_forward(root, self.traced_func_name),
                why=f"{type(error).__name__}: {error}.",
                hint="Put the code that cannot be traced into a submodule: that submodule is then stepped as it is.",
            ) from error

    def _argument(self, leaf: Any) -> Any:
        if not isinstance(leaf, ArgumentLeaf):
            return leaf
        return self.placeholder(leaf.name, leaf.value, {"input": leaf.index})

    def placeholder(self, name: str, value: Any, meta: dict[str, Any]) -> StepProxy:
        """A placeholder node with a known value (or `UNKNOWN`)."""
        node = add_placeholder(self.graph, name)
        node.meta.update(meta)
        if value is not UNKNOWN:
            node.meta["val"] = value
        return self.proxy(node)

    def add_slot(self, name: str, value: Any = UNKNOWN, *, number: bool = False) -> StepProxy:
        """A slot and the placeholder that reads it; `number`: it is a Python number before and after the first step."""
        proxy = self.placeholder(name, value, {"slot": name, "number": number})
        self.slot_values[name] = proxy
        self.slot_placeholders[name] = proxy.node
        return proxy

    def proxy(self, node: Node) -> StepProxy:
        return StepProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if type(a) is StepProxy:
            return a.node
        if isinstance(a, fx.Proxy):
            return super().create_arg(a)
        if isinstance(a, nn.Module):
            if a in self._paths:
                return self.create_node("get_attr", self._paths[a] or SELF_TARGET, (), {})
            return self.constant(a)
        if isinstance(a, Tensor):
            for name, tensor in (*self.root.named_parameters(), *self.root.named_buffers()):
                if tensor is a:
                    return self.create_node("get_attr", name, (), {})
            return self.constant(a)
        return super().create_arg(a)

    def constant(self, value: Any) -> Node:
        """A get_attr node for an object that the model does not register: kept with the program."""
        for name, known in self.constants.items():
            if known is value:
                return self.create_node("get_attr", name, (), {})
        name = f"snnfx_constant_{len(self.constants)}"
        self.constants[name] = value
        return self.create_node("get_attr", name, (), {})

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        if kind == "call_method" and target == "__setitem__":  # of a tensor that the model made without its input
            kind, target = "call_function", set_part_
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        if kind.startswith("call") and not torch.is_grad_enabled() and not self._inside_call:
            return self._without_gradient(proxy)
        return proxy

    def _without_gradient(self, proxy: Any) -> Any:
        """What `torch.no_grad()` around an operation means in a graph: its result is detached."""
        value = value_of(proxy)
        is_tensor = isinstance(value, Tensor) or (value is UNKNOWN and not proxy.node.meta.get("shape_like"))
        return super().create_proxy("call_method", "detach", (proxy,), {}) if is_tensor else proxy

    def create_node(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any | None = None,
    ) -> Node:
        if kind.startswith("call") and not self.is_evaluating and autocast_state() != self._autocast:
            raise CaptureError(
                "SNNFX201",
                "autocast is switched inside the step",
                where=format_place(user_place()),
                why="a graph does not record it.",
                hint="Put autocast around the call of the net, or the code into a submodule, which is then stepped.",
            )
        node = super().create_node(kind, target, args, kwargs, name, None)
        node.meta.pop("nn_module_stack", None)
        node.meta["where"] = user_place()
        node.meta.setdefault("module", self.scope.module_path if hasattr(self, "scope") else "")
        if kind == "call_module":
            node.meta["module"] = str(target)
        if (kind == "call_function" and target is getattr and args[1] == "shape") or (
            kind == "call_method" and target in ("size", "dim", "numel", "ndimension")
        ):
            node.meta["shape_like"] = True
        elif kind == "call_function" and getattr(target, "__module__", "") in _NUMBER_MODULES:
            operands = node.all_input_nodes
            node.meta["shape_like"] = bool(operands) and all(n.meta.get("shape_like") for n in operands)
        self._evaluate(node)
        return node

    def _evaluate(self, node: Node) -> None:
        if self.fake_mode is None or node.op in ("placeholder", "output") or "val" in node.meta:
            return
        if node.op == "call_function" and self._value_of_next is not UNKNOWN:
            node.meta["val"], self._value_of_next = self._value_of_next, UNKNOWN
            return
        if node.op == "get_attr":
            self._record_value(node, lambda: self._fake(self._resolve(str(node.target))))
            return
        unknown = False

        def load(n: Node) -> Any:
            nonlocal unknown
            unknown = unknown or "val" not in n.meta
            return n.meta.get("val")

        args, kwargs = fx.map_arg((node.args, node.kwargs), load)
        if unknown:
            return
        whole, index = cast("tuple[Any, Any]", args) if node.target is operator.getitem else (None, 0)
        if isinstance(whole, tuple) and index in range(len(whole)):
            node.meta["val"] = whole[index]  # most often of what a stateful call returns
        elif node.op == "call_module":
            module = self._resolve(str(node.target))
            self._record_value(node, lambda: _call_for_shape(module, args, kwargs))
        elif node.op == "call_method":
            self._record_value(node, lambda: getattr(args[0], str(node.target))(*args[1:], **kwargs))
        else:
            self._record_value(node, lambda: node.target(*args, **kwargs))  # type: ignore[operator]

    @contextlib.contextmanager
    def _already_evaluated(self, value: Any) -> Iterator[None]:
        """The value of the next node is known, if it is not UNKNOWN."""
        before, self._value_of_next = self._value_of_next, value
        try:
            yield
        finally:
            self._value_of_next = before

    def _record_value(self, node: Node, compute: Callable[[], Any]) -> None:
        try:
            with self.evaluating():
                node.meta["val"] = compute()
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException):
            return
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise CaptureError(
                "SNNFX201",
                f"one step fails on the example inputs at `{node.name}`",
                where=format_place(node.meta["where"]),
                why=f"{type(error).__name__}: {error}.",
                hint="example_inputs has to be what ONE call of the model takes, batch dimension included.",
            ) from error

    def _resolve(self, target: str) -> Any:
        if target in self.constants:
            return self.constants[target]
        if target == SELF_TARGET:
            return self.root
        found: Any = self.root
        with self.evaluating():
            for atom in target.split("."):
                found = getattr(found, atom)
        return found

    def _fake(self, value: Any) -> Any:
        if isinstance(value, Tensor) and self.fake_mode is not None:
            return self.fake_mode.from_tensor(value, static_shapes=True)
        return value

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Run real Python on values: nothing is recorded, modules are called for what they are."""
        before, self.is_evaluating = self.is_evaluating, True
        try:
            with plain_isinstance(), self.fake_mode or contextlib.nullcontext(), torch.no_grad():
                yield
        finally:
            self.is_evaluating = before

    def concrete(self, proxy: StepProxy) -> Any:
        """The Python number behind a proxy, when it is a size; its use is remembered as an expectation."""
        value = value_of(proxy)
        place = format_place(user_place())
        if isinstance(value, Tensor) or (value is UNKNOWN and not proxy.node.meta.get("shape_like")):
            raise CaptureError(
                "SNNFX201",
                "control flow that depends on the values of a tensor cannot be captured",
                where=place,
                why=f"`{proxy.node.name}` is used as a Python bool or number.",
                hint="Use torch.where, or put the code into a submodule: that submodule is then stepped as it is.",
            )
        if value is UNKNOWN:
            raise needs_examples(proxy)
        if isinstance(value, int) and not isinstance(value, bool):
            self.create_proxy("call_function", expect_size, (proxy, value, place), {})
        elif isinstance(value, bool):
            self._expect_operands(proxy, place)
        return value

    def _expect_operands(self, proxy: StepProxy, place: str) -> None:
        # `if x.shape[1] == 3` fixes the size only where it was true: then the operand is pinned. Where it was false
        # the comparison itself is pinned, as a number.
        self.create_proxy("call_function", expect_size, (proxy, value_of(proxy), place), {})

    # -- modules ------------------------------------------------------------------------------------------------

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        # A buffer that is a slot is a proxy already.
        if self.is_evaluating or type(attr_val) is StepProxy:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def path_of_module(self, mod: nn.Module) -> str:
        if mod in self._paths:
            return self._paths[mod]
        raise CaptureError(
            "SNNFX211",
            f"a {type(mod).__name__} is called that is not a submodule of the model",
            where=format_place(user_place()),
            why="snnfx can only follow modules that are registered.",
            hint="Assign it as an attribute of a module, or use nn.ModuleList or nn.ModuleDict.",
        )

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.is_evaluating:
            return m.forward(*args, **kwargs)  # not m(...): a user's hooks have no business with fake tensors
        name = self.path_of_module(m)
        if name == "" and is_leaf(m) and adapter_of(m) is None:
            return self._at_module("", "call_module", SELF_TARGET, args, kwargs)
        if name in self.opaque:
            return self._marked(self._call_with_state(m, name, call_opaque, composite_adapter(m), args, kwargs), name)
        adapter = adapter_of(m)
        if adapter is not None:
            _refuse_by(adapter, m, name or "the model", format_place(user_place()) or place_of_forward(m))
        if takes_state(adapter):
            return self._call_that_takes_state(m, name, adapter, args, kwargs)
        if adapter is not None and adapter.names(m):
            if is_stateful_tree(m, adapter):
                return self._marked(
                    self._call_with_state(m, name, call_opaque, composite_adapter(m), args, kwargs), name
                )
            if adapter.is_leaf(m):
                return self._marked(self._call_with_state(m, name, call_stateful, adapter, args, kwargs), name)
        elif is_leaf(m):
            result = self._marked(super().call_module(m, forward, args, kwargs), name)
            # Two values, also where nothing is known of them: a state that is carried has to have a structure.
            is_pair = isinstance(m, nn.LSTMCell)
            return (self._element(result, 0, name), self._element(result, 1, name)) if is_pair else result
        _refuse_hooks(m, name)
        containers = [object()] if isinstance(m, nn.Sequential) else []
        self._open_containers += containers
        try:
            result = super().call_module(m, forward, args, kwargs)
        except SubmoduleNotTraceable:
            raise
        except CaptureError as error:
            if error.code not in ("SNNFX201", "SNNFX202") or name == "":
                raise
            raise SubmoduleNotTraceable(name, error.why or error.what) from error
        except Exception as error:
            # Whatever Python does with a proxy that it cannot do: the module is run as it is instead.
            raise SubmoduleNotTraceable(name, f"{type(error).__name__}: {error}") from error
        finally:
            del self._open_containers[len(self._open_containers) - len(containers) :]
        return self._marked(result, name)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)

    def _marked(self, result: Any, name: str) -> Any:
        if type(result) is StepProxy:
            result.node.meta.setdefault("returned_by", []).append(name)
        return result

    def _call_with_state(
        self,
        m: nn.Module,
        name: str,
        call: Callable[..., Any],
        adapter: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A node for one pure step of a module, its slots threaded through; returns what the module returns."""
        self._refuse_time_loop(name)
        self._inside_call = True
        try:
            # A user's hooks have no business with fake tensors.
            with without_hooks(m):
                output = self._record_call(m, name, call, adapter, args, kwargs)
        finally:
            self._inside_call = False
        if torch.is_grad_enabled():
            return output
        for slot in adapter.names(m):
            slot = f"{name}.{slot}" if name else slot
            self.slot_values[slot] = self._without_gradient(self.slot_values[slot])
        return self._without_gradient(output)

    def _call_that_takes_state(
        self, m: nn.Module, name: str, adapter: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A call that may pass the state as arguments: then no slot of the module is read, but all are written."""
        with self.evaluating():
            starts_as_none = any(value is None for value in self.carried_arguments.values())
            call = adapter.read_call(m, args, kwargs, starts_as_none)
            weights = adapter.projected(m) if hasattr(adapter, "projected") else None
        if weights is not None:
            product = self._at_module(name, "call_function", nn.functional.linear, (call.inputs[0], weights), {})
            call = replace(call, inputs=(product,), kwargs={**call.kwargs, "projected": True})
        slots = [f"{name}.{slot}" if name else slot for slot in adapter.names(m)]
        if call.state is None:
            output = self._call_with_state(m, name, call_stateful, adapter, call.inputs, call.kwargs)
            return call.returns(self._marked(output, name), tuple(self.slot_values[slot] for slot in slots))
        self._refuse_time_loop(name)
        self._inside_call = True
        try:
            module = self._at_module(name, "get_attr", name or SELF_TARGET, (), {})
            with without_hooks(m):
                both = self._at_module(
                    name, "call_function", call_stateful, (module, call.state, *call.inputs), call.kwargs
                )
            output, following = self._element(both, 0, name), self._element(both, 1, name)
            values = [self._element(following, index, name) for index in range(len(call.state))]
        finally:
            self._inside_call = False
        if not torch.is_grad_enabled():
            output, values = self._without_gradient(output), [self._without_gradient(v) for v in values]
        self.slot_values.update(zip(slots, values, strict=False))
        self.overwritten_slots.update(slots)
        return call.returns(self._marked(output, name), tuple(values))

    def _record_call(
        self,
        m: nn.Module,
        name: str,
        call: Callable[..., Any],
        adapter: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        prefix = f"{name}." if name else ""
        slots = [prefix + slot for slot in adapter.names(m)]
        module = self._at_module(name, "get_attr", name or SELF_TARGET, (), {})
        first_initial = initial_value if call is call_stateful else opaque_initial_value
        initial, result = self._evaluate_slots(adapter, m, slots, args, kwargs)
        for index, slot in enumerate(slots):
            if slot not in self.slot_initials:
                with self._already_evaluated(initial[index] if initial is not None else UNKNOWN):
                    self.slot_initials[slot] = self._at_module(
                        name, "call_function", first_initial, (module, index, *args), kwargs
                    )
        states = tuple(self.slot_values[slot] for slot in slots)
        with self._already_evaluated(result):
            both = self._at_module(name, "call_function", call, (module, states, *args), kwargs)
        output = self._element(both, 0, name)
        next_states = self._element(both, 1, name) if slots else None
        for index, slot in enumerate(slots):
            self.slot_values[slot] = self._element(next_states, index, name)
        return output

    def _at_module(self, name: str, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepProxy:
        proxy = self.create_proxy(kind, target, args, kwargs)
        proxy.node.meta["module"] = name
        return proxy  # type: ignore[no-any-return]

    def _element(self, proxy: Any, index: int, name: str) -> StepProxy:
        element = proxy[index]
        element.node.meta["structural"] = True
        element.node.meta["module"] = name
        return element  # type: ignore[no-any-return]

    def _evaluate_slots(
        self, adapter: Any, m: nn.Module, slots: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        """Give the slots the shape they have after a step: an initial value may be a mere number.

        Returns:
            The initial values, None if they are not known, and what a step from the values of the slots returns, as far
            as it need not be evaluated for that again.
        """
        if self.fake_mode is None or all("val" in self.slot_placeholders[s].meta for s in slots):
            return None, UNKNOWN
        leaves = pytree.tree_leaves((args, kwargs))
        if any(type(leaf) is StepProxy and value_of(leaf) is UNKNOWN for leaf in leaves):
            return None, UNKNOWN
        real_args, real_kwargs = pytree.tree_map(lambda a: value_of(a) if type(a) is StepProxy else a, (args, kwargs))
        try:
            with self.evaluating():
                initial = adapter.initial(m, *real_args, **real_kwargs)
                stepper = adapter.step
                result = stepper(m, initial, *real_args, **real_kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException):
            return None, UNKNOWN
        first_call = all("val" not in self.slot_placeholders[slot].meta for slot in slots)
        for slot, value in zip(slots, result[1], strict=True):
            self.slot_placeholders[slot].meta.setdefault("val", value)
        settled = first_call and adapter.elementwise(m) and _all_like(real_args[0], result[1])
        return initial, result if settled else UNKNOWN

    def _refuse_time_loop(self, name: str) -> None:
        calls = user_calls()
        rounds = self.calls_at.setdefault((name, calls), [])
        # A neuron that is several times in one nn.Sequential is called once by the user's code.
        container = self._open_containers[-1] if self._open_containers else object()
        if not rounds or rounds[-1] is not container:
            rounds.append(container)
        if len(rounds) >= 3 and calls:
            raise CaptureError(
                "SNNFX203",
                f"`{name}` is called {len(rounds)} times by the same line of one forward",
                where=format_place(user_place()),
                why="a stateful module called in a loop means that the forward runs over time itself.",
                hint='Move the body of the loop to a method, e.g. `step(self, x)`, and convert with entry="step".',
            )


def _call_for_shape(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a layer returns, as far as its shape goes."""
    counts = isinstance(module, nn.modules.batchnorm._NormBase) and module.training and module.momentum is None
    if not counts:
        return module(*args, **kwargs)
    # Its momentum is one over the number of batches so far, a value that no shape tells.
    module.__dict__["training"] = False
    try:
        return module(*args, **kwargs)
    finally:
        module.__dict__["training"] = True


def _all_like(x: Any, values: tuple[Any, ...]) -> bool:
    """Whether all are tensors of the shape and dtype of `x`."""
    return isinstance(x, Tensor) and all(
        isinstance(v, Tensor) and v.shape == x.shape and v.dtype == x.dtype for v in values
    )


class ArgumentLeaf:
    """A tensor argument of the step: its name, its place among the leaves, its fake value if there is one."""

    def __init__(self, name: str, index: int, value: Any = UNKNOWN) -> None:
        self.name, self.index, self.value = name, index, value


def _refuse_by(adapter: Any, m: nn.Module, name: str, where: str) -> None:
    """Let an adapter refuse a module, and say where it is called."""
    try:
        adapter.refuse(m, name)
    except CaptureError as error:
        raise CaptureError(
            error.code, error.what, where=error.where or where, why=error.why, hint=error.hint
        ) from error.__cause__


def _refuse_hooks(m: nn.Module, name: str) -> None:
    if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
        raise CaptureError(
            "SNNFX208",
            f"`{name or 'the model'}` has hooks that would never run",
            where=place_of_forward(m),
            why="it is traced through, so the converted net does not call it as a module.",
            hint="Put the hook on a leaf module inside it, or remove it while converting.",
        )

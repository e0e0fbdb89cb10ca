"""The tracer that records one time step, based on `torch.fx.Tracer`.

In addition to torch.fx:
- stateful modules become calls with explicit state;
- the `apply` of an autograd.Function becomes one node, which preserves surrogate gradients;
- with example inputs every proxy has a fake tensor as example value, so Python control flow on shapes works;
- nodes record the user's file and line.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Set
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from snnfx.capture.attribute_slots import AttributeSlot
from snnfx.capture.consumed_tensors import ConsumedTensors
from snnfx.capture.example_values import ExampleValues
from snnfx.capture.inline_modules import is_traced_inline
from snnfx.capture.input_output_checks import refusal_of_nested_tensor, refuse_outputs
from snnfx.capture.iteration_tracking import IterationLimit, IterationTracker
from snnfx.capture.leaf_module_states import LeafModuleStates
from snnfx.capture.multi_step_calls import record_folded_call, record_steps
from snnfx.capture.patches import (
    autocast_state,
    patched_apply,
    patched_factories,
    patched_isinstance,
    patched_script_functions,
    patched_size_arguments,
)
from snnfx.capture.proxy import UNKNOWN, StepProxy, needs_examples, value_of
from snnfx.capture.recording_copy import recording_modules
from snnfx.capture.setting_reads import SettingReads
from snnfx.capture.stateful_calls import StatefulCalls, element_of, mark_returned
from snnfx.capture.step_counts import StepCounts
from snnfx.capture.trace_faults import raise_internal_fault
from snnfx.capture.unrecorded_draws import PythonDraw, UnrecordedDraws, refuse_unregistered_module
from snnfx.capture.unsupported_modules import is_converted_net
from snnfx.errors import CaptureError
from snnfx.ir.conditions import Condition, condition_of
from snnfx.ir.edits import add_placeholder
from snnfx.ir.facts import ITERATIONS, MODULE, SHAPE_LIKE, VALUE, WHERE, WITHOUT_GRADIENT
from snnfx.ir.guards import text_of
from snnfx.ir.nodes import is_in_place, is_in_place_target, is_size_computation, object_of
from snnfx.ir.program import SELF_TARGET
from snnfx.ops.step_functions import expect_size, set_part_
from snnfx.sandbox.plain_numbers import plain_number
from snnfx.sandbox.torch_internals import (
    CheckpointAsPlainCall,
    FakeTensorMode,
    WrappedFunctions,
    pytree,
    quiet_fake_tensors,
)
from snnfx.sandbox.user_code import format_location, location_of_error, location_of_forward, user_location
from snnfx.state.composite_adapter import composite_adapter, is_stateful_tree
from snnfx.state.leaf_modules import is_leaf, takes_sequence
from snnfx.state.registry import adapter_of
from snnfx.state.stateful import multi_step_form, takes_state
from snnfx.state.step_calls import call_opaque, call_stateful, initial_value, opaque_initial_value

__all__ = ["RECORDED_NUMBER", "ArgumentLeaf", "StepTracer", "SubmoduleNotTraceable"]

_USES_PYTHON_RNG = "it draws random numbers from Python or NumPy, which a graph does not record."


RECORDED_NUMBER = (
    "For a log, write `x.item()` instead of `float(x)` or `int(x)`, which the net records. In a computation, keep the "
    "tensor, or put the code into a submodule, which the net then steps without tracing."
)
"""The hint for code that makes a Python number of a tensor."""


class SubmoduleNotTraceable(Exception):
    """Raised in a trace when a submodule must become an opaque leaf; capture then starts a new trace."""

    def __init__(self, name: str, reason: str, error: CaptureError | None = None) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason
        self.error = error
        """For the model itself: the error to raise if it cannot be stepped as an opaque leaf either."""
        self.undeclared: list[AttributeSlot] = []
        """State in unregistered attributes that the trace discovered before it failed."""


class StepTracer(fx.Tracer):
    """Records one step of a model; see the module docstring.

    Args:
        arguments: `(args, kwargs)` of one step, with an `ArgumentLeaf` for each tensor.
        entry: name of the method that computes one step.
        opaque: qualified names of submodules that must not be traced, each with the reason.
        fake_mode: the fake tensor mode of example values, or None without example inputs.
        iterations: record the iterations of the user's loops in `node.meta["iterations"]`, up to this limit.
    """

    proxy_buffer_attributes = True

    def __init__(
        self,
        arguments: pytree.PyTree,
        entry: str = "forward",
        opaque: dict[str, str] | None = None,
        fake_mode: FakeTensorMode | None = None,
        iterations: IterationLimit | None = None,
    ) -> None:
        super().__init__(autowrap_functions=(call_stateful, call_opaque, initial_value, opaque_initial_value))
        self.traced_func_name = entry
        self.arguments = arguments
        self.opaque = opaque or {}
        self._iterations = iterations
        self._tracker = IterationTracker() if iterations is not None else None
        self.draws = UnrecordedDraws(self, self._tracker)
        self.values = ExampleValues(self, fake_mode, self.draws)
        self.leaf_states = LeafModuleStates(self)
        self.calls = StatefulCalls(self, self.values, self.leaf_states)
        self.constants: dict[str, Any] = {}
        self.slot_values: dict[str, Any] = {}
        self.slot_initials: dict[str, Any] = {}
        self.slot_placeholders: dict[str, Node] = {}
        self.overwritten_slots: set[str] = set()
        self.carried_arguments: dict[str, Any] = {}
        self.take_carried: Callable[[Any], Any] = lambda outputs: outputs
        self.output_spec: pytree.TreeSpec | None = None
        self.reads: dict[tuple[nn.Module, str], tuple[Any, str]] = {}
        self.user_reads: dict[tuple[nn.Module, str], None] = {}
        self.consumed = ConsumedTensors(self)
        self.counts = StepCounts({})
        self.conditions: dict[Condition, Any] = {}
        """Conditions on parameters and buffers that the model's code branches on, with their values."""
        self._has_gradients = torch.is_grad_enabled()
        self.first_reads: dict[tuple[nn.Module, str], Any] = {}
        """The value of each module attribute when the model's code first read it in this trace."""
        self.changed_tensors: dict[int, Node] = {}
        """The node that reads a tensor that the step changes in place, by the id of the tensor."""
        self.writes: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        """Detects writes to tensors of the model while the step's code runs."""
        self.opened: Set[nn.Module] = frozenset()
        """Layers of torch whose forward is traced, because the step changes their parameters."""
        self.is_evaluating = False
        self._autocast = autocast_state()
        self._paths: dict[nn.Module, str] = {}
        self._registered_proxies: dict[str, fx.Proxy] = {}

    def record(
        self, root: nn.Module, prepare: Callable[[StepTracer], None], finish: Callable[[StepTracer], None]
    ) -> fx.Graph:
        """Trace `root`; `prepare` runs before the step and may create placeholders, `finish` runs after the step."""
        self._prepare, self._finish = prepare, finish
        self._paths = {module: name for name, module in root.named_modules()}
        self._setting_reads = SettingReads(self, self.leaf_states, self.reads)
        # The net has its own recomputation; a checkpoint inside a step would run its function with later state.
        plain = CheckpointAsPlainCall()
        patches = (
            patched_apply(self),
            patched_isinstance(),
            patched_factories(self),
            patched_size_arguments(self),
            patched_script_functions(self),
        )
        with contextlib.ExitStack() as stack:
            for patch in (quiet_fake_tensors(), *patches, plain, self.consumed):
                stack.enter_context(patch)
            return self._record_graph(root)

    def _record_graph(self, root: nn.Module) -> fx.Graph:
        """Record the nodes of one step, as `torch.fx.Tracer.trace` does, but without patches of `nn.Module`."""
        self.root, self.root_module_name = root, type(root).__name__
        self.graph = fx.Graph(tracer_cls=type(self))
        self.tensor_attrs = {}
        root_fn = getattr(type(root), self.traced_func_name)
        self._wrapped_functions = WrappedFunctions(self._autowrap_function_ids)
        leaves, spec = pytree.tree_flatten(self.arguments)
        args, kwargs = pytree.tree_unflatten([self._argument(leaf) for leaf in leaves], spec)
        self._prepare(self)
        with recording_modules(self), self._wrapped_functions, self.draws.detected():
            self._wrapped_functions.look_in(getattr(root_fn, "__globals__", {}))
            results = self.one_step(root, root_fn, args, {**kwargs, **self.carried_arguments})
            self.create_node("output", "output", (self.create_arg(results),), {})
        return self.graph

    def one_step(
        self, root: nn.Module, root_fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], ...]:
        """Run the step on proxies: `(outputs, next states, initial values)`."""
        with self.writes, self._tracker or contextlib.nullcontext():
            outputs = self._call_root(root, root_fn, args, kwargs)
        flat, self.output_spec = pytree.tree_flatten(self.take_carried(outputs))
        refuse_outputs(flat, location_of_forward(root, self.traced_func_name))
        with self.draws.unobserved():
            self._finish(self)
        names = list(self.slot_values)
        return (
            tuple(flat),
            tuple(self.slot_values[name] for name in names),
            tuple(self.slot_initials.get(name) for name in names),
        )

    def read_of(self, module: nn.Module, name: str) -> Any:
        return self._setting_reads.read_of(module, name)

    def registered(self, name: str, value: Any) -> Any:
        return self.getattr(name, value, self._registered_proxies)

    def call_of(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._wrapped_functions.look_in(getattr(getattr(module, "forward", module), "__globals__", {}))
        return self.call_module(module, forward, args, kwargs)

    def _call_root(
        self, root: nn.Module, root_fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record the step; a model that is a single leaf module becomes one call."""
        adapter = adapter_of(root)
        is_single = is_leaf(root) if adapter is None else bool(adapter.names(root)) and adapter.is_leaf(root)
        is_single = is_single or takes_state(adapter)
        if is_single and self.traced_func_name == "forward":
            return self.call_module(root, root.forward, args, kwargs)
        if self.traced_func_name == "forward":
            _refuse_hooks(root, "")
        if adapter is not None and (self._tracker is None or multi_step_form(adapter, root) is None):
            _refuse_by(adapter, root, "the model", location_of_forward(root, self.traced_func_name))
        if "" in self.opaque:
            return self._call_opaque(root, "", args, kwargs)
        replaced = vars(root).get(self.traced_func_name)  # a forward that replaces the one of the class
        draws_from_python = False
        outputs: Any = None
        try:
            outputs = root_fn(root, *args, **kwargs) if replaced is None else replaced(*args, **kwargs)
        except SubmoduleNotTraceable:
            raise
        except PythonDraw:
            draws_from_python = True
        except CaptureError as error:
            # An error with a cause comes from running the step on the example inputs, so stepping would fail too.
            if error.code != "SNNFX201" or error.__cause__ is not None:
                raise
            raise SubmoduleNotTraceable("", error.why or error.what, error) from error
        except Exception as error:
            refusal = CaptureError(
                "SNNFX201",
                "the model cannot be traced",
                where=format_location(location_of_error(error)) or location_of_forward(root, self.traced_func_name),
                why=f"{type(error).__name__}: {error}.",
                hint="Put the code that cannot be traced into a submodule, which the net then steps without tracing. "
                "With example_inputs the net also steps the model itself, if all its state is registered.",
            )
            raise_internal_fault(error, "the net steps the model without tracing")
            if self.values.mode is None:  # unknown whether the step runs at all
                raise refusal from error
            raise SubmoduleNotTraceable("", refusal.why, refusal) from error
        if draws_from_python or self.draws.from_python_or_numpy():
            refusal = CaptureError(
                "SNNFX215",
                "the step draws random numbers from Python or NumPy",
                where=location_of_forward(root, self.traced_func_name),
                why="the graph does not record them, so every call of the net would use the same numbers.",
                hint="Draw them with torch.rand or torch.randn, or in a submodule, which the net then steps untraced.",
            )
            raise SubmoduleNotTraceable("", _USES_PYTHON_RNG, refusal)
        return outputs

    def _argument(self, leaf: Any) -> Any:
        if not isinstance(leaf, ArgumentLeaf):
            return leaf
        return self.placeholder(leaf.name, leaf.value, {"input": leaf.index})

    def placeholder(self, name: str, value: Any, meta: dict[str, Any]) -> StepProxy:
        """Record a placeholder node with an example value (or `UNKNOWN`)."""
        node = add_placeholder(self.graph, name)
        node.meta.update(meta)
        if value is not UNKNOWN:
            VALUE.set(node, value)
        return self.proxy(node)

    def add_slot(self, name: str, value: Any = UNKNOWN, *, number: bool = False) -> StepProxy:
        """Add a slot and its placeholder; `number`: its value is a Python number before and after the first step."""
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
        if isinstance(a, torch.Generator):
            name = next((n for m in self.root.modules() for n, v in vars(m).items() if v is a), "")
            raise CaptureError(
                "SNNFX215",
                f"a step draws random numbers from the torch.Generator{f' `{name}`' if name else ''}",
                where=format_location(user_location()),
                why="a graph cannot contain a generator.",
                hint="Draw from the generator of torch instead, without generator=, and call torch.manual_seed.",
            )
        if isinstance(a, Tensor):
            if a.is_nested:
                name = next((n for m in self.root.modules() for n, v in vars(m).items() if v is a), "")
                where = format_location(user_location()) or location_of_forward(self.root, self.traced_func_name)
                raise refusal_of_nested_tensor(name, where)
            if id(a) in self.changed_tensors:
                return self.changed_tensors[id(a)]
            for name, tensor in (*self.root.named_parameters(), *self.root.named_buffers()):
                if tensor is a:
                    return self.create_node("get_attr", name, (), {})
            return self.constant(a)
        return super().create_arg(plain_number(a))

    def constant(self, value: Any) -> Node:
        """Record a get_attr node for an object that the model does not register; the program stores the object."""
        for name, known in self.constants.items():
            if known is value:
                return self.create_node("get_attr", name, (), {})
        name = f"snnfx_constant_{len(self.constants)}"
        self.constants[name] = value
        return self.create_node("get_attr", name, (), {})

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        if kind == "call_method" and target == "__setitem__":  # on a tensor that does not depend on the input
            kind, target = "call_function", set_part_
        if kind == "call_function" and kwargs.get("out") is not None:
            raise CaptureError(
                "SNNFX214",
                f"`{getattr(target, '__name__', target)}` writes into a tensor passed as out=",
                where=format_location(user_location()),
                why="a functional graph cannot write into an existing tensor.",
                hint="Use the return value instead: y = torch.add(a, b).",
            )
        source = self._tensor_behind_view(kind, target, args)
        if source is not None:
            with self.draws.unobserved():
                proxy = super().create_proxy(kind, target, (source, *args[1:]), kwargs, *rest, **more)
            WITHOUT_GRADIENT.set(proxy.node, True)
            return proxy
        with self.draws.unobserved():
            proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        if kind.startswith("call") and self.is_without_gradient() and not self.calls.is_recording:
            if is_in_place(proxy.node):
                WITHOUT_GRADIENT.set(proxy.node, True)
                return proxy
            return self.without_gradient(proxy)
        return proxy

    def _tensor_behind_view(self, kind: str, target: Any, args: Any) -> StepProxy | None:
        """The tensor of the model that an operation on its `.data` changes in place, as in `self.w.data.add_(1)`."""
        if not (kind.startswith("call") and args and type(args[0]) is StepProxy):
            return None
        source: Any = args[0].node
        while source.op == "call_method" and source.target == "detach":
            source = source.args[0]
        if source is args[0].node or not is_in_place_target(kind, target):
            return None
        root = object_of(source)
        is_tensor = root in self.changed_tensors.values() or (
            root.op == "get_attr" and str(root.target) not in self.constants
        )
        return self.proxy(source) if is_tensor else None

    def record_at(self, name: str, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepProxy:
        """Record a node that belongs to the module called `name`."""
        proxy = self.create_proxy(kind, target, args, kwargs)
        MODULE.set(proxy.node, name)
        return proxy  # type: ignore[no-any-return]

    def is_without_gradient(self) -> bool:
        return self._has_gradients and not torch.is_grad_enabled()

    def without_gradient(self, proxy: Any) -> Any:
        """Detach the result of an operation, as `torch.no_grad()` around the operation does."""
        value = value_of(proxy)
        is_tensor = isinstance(value, Tensor) or (value is UNKNOWN and not SHAPE_LIKE.of(proxy.node))
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
                "the step switches autocast on or off",
                where=format_location(user_location()),
                why="a graph does not record autocast.",
                hint="Use autocast around the call of the net, or put the code into a submodule, which is stepped.",
            )
        node = super().create_node(kind, target, args, kwargs, name, None)
        node.meta.pop("nn_module_stack", None)
        WHERE.set(node, user_location())
        if self._tracker is not None and kind != "placeholder":
            ITERATIONS.set(node, self._tracker.current())
            assert self._iterations is not None
            self._iterations.check(ITERATIONS.of(node))
        node.meta.setdefault("module", self.scope.module_path if hasattr(self, "scope") else "")
        if kind == "call_module":
            MODULE.set(node, str(target))
        if is_size_computation(node):
            SHAPE_LIKE.set(node, True)
        self.values.evaluate(node)
        return node

    def _call_opaque(self, m: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record the call of a module that cannot be traced."""
        try:
            return mark_returned(self.calls.call(m, name, call_opaque, composite_adapter(m), args, kwargs), name)
        except CaptureError as error:
            if error.code != "SNNFX213":
                raise
            why = f"{self.opaque[name].rstrip('.')}. The net therefore steps it untraced, with registered states only."
            raise CaptureError(error.code, error.what, where=error.where, why=why, hint=error.hint) from error

    def concrete(self, proxy: StepProxy, number: type, is_text: bool = False) -> Any:
        """The Python number of a proxy: a size, which the graph then checks, or a number that all steps have.

        Args:
            proxy: the recorded value.
            number: the class of the number that the code asks for.
            is_text: whether the number becomes part of a text.
        """
        value = value_of(proxy)
        where = user_location()
        location = format_location(where)
        decided = self.counts.decide(proxy.node, number, where)
        if decided is not None:
            return decided
        if number is bool and not SHAPE_LIKE.of(proxy.node):
            condition = condition_of(proxy.node, self.root, number, location)
            if condition is not None:
                before, self.is_evaluating = self.is_evaluating, True
                try:
                    self.conditions[condition] = condition.evaluate(self.root)
                finally:
                    self.is_evaluating = before
                return self.conditions[condition]
        if isinstance(value, Tensor) or (value is UNKNOWN and not SHAPE_LIKE.of(proxy.node)):
            raise CaptureError(
                "SNNFX201",
                "control flow that depends on tensor values cannot be captured",
                where=location,
                why=f"`{proxy.node.name}` is used as a Python bool or number.",
                hint=RECORDED_NUMBER
                if number is not bool and not is_text and proxy.node.target != "item"
                else "Use torch.where, or put the code into a submodule, which the net then steps without tracing.",
            )
        if value is UNKNOWN:
            raise needs_examples(proxy)
        if isinstance(value, int):  # for a bool, `if x.shape[1] == 3`, the comparison itself is checked
            self.create_proxy("call_function", expect_size, (proxy, value, location), {})
        return value

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        # A buffer that is a slot already is a proxy.
        if self.is_evaluating or type(attr_val) is StepProxy:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def path_of_module(self, mod: nn.Module) -> str:
        if mod in self._paths:
            return self._paths[mod]
        refuse_unregistered_module(mod)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.is_evaluating:
            return m.forward(*args, **kwargs)  # not m(...): hooks of the user must not run on fake tensors
        if m not in self._paths and is_traced_inline(m):
            return m.forward(*args, **kwargs)
        name = self.path_of_module(m)
        if is_converted_net(m) and name not in self.opaque:
            raise SubmoduleNotTraceable(name, "it is a converted net, which the step calls as a whole")
        if name == "" and is_leaf(m) and adapter_of(m) is None:
            return self.record_at("", "call_module", SELF_TARGET, args, kwargs)
        if name in self.opaque:
            return self._call_opaque(m, name, args, kwargs)
        adapter = adapter_of(m)
        if adapter is not None and "forward" in vars(m) and (takes_state(adapter) or adapter.is_leaf(m)):
            raise SubmoduleNotTraceable(name, f"its forward is replaced by {text_of(vars(m)['forward'])}")
        form = multi_step_form(adapter, m) if self._tracker is not None else None
        if form == "steps" and self._tracker is not None and adapter is not None and adapter.names(m):
            second: Node | None = None  # a call whose states are tensors, as are those of later calls
            stepped, step_call = adapter, call_stateful
            if is_stateful_tree(m, adapter):  # a recurrent container with a neuron
                stepped, step_call = composite_adapter(m), call_opaque

            def step(t: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                nonlocal second
                y = self.calls.call(m, name, step_call, stepped, args, kwargs, second)
                if t <= 1 and second is None and self.calls.keeps_shapes(stepped, m, args):
                    second = self.calls.latest
                return y

            return mark_returned(record_steps(self, self.calls.values, self._tracker, name, step, args, kwargs), name)
        if adapter is not None and form is None:
            _refuse_by(adapter, m, name or "the model", format_location(user_location()) or location_of_forward(m))
        if takes_state(adapter):
            return self.calls.call_that_takes_state(m, name, adapter, args, kwargs)
        if adapter is not None and adapter.names(m) and form is None:
            if is_stateful_tree(m, adapter):
                return mark_returned(self.calls.call(m, name, call_opaque, composite_adapter(m), args, kwargs), name)
            if adapter.is_leaf(m):
                return mark_returned(self.calls.call(m, name, call_stateful, adapter, args, kwargs), name)
        elif self.is_leaf_module(m, name):
            call = super().call_module
            if takes_sequence(m):
                y = record_folded_call(self, name, lambda folded: call(m, forward, folded, kwargs), args)
                return mark_returned(y, name)
            result = mark_returned(call(m, forward, args, kwargs), name)
            # Always two values: a carried state needs a known structure even without example inputs.
            is_pair = isinstance(m, nn.LSTMCell)
            return (element_of(result, 0, name), element_of(result, 1, name)) if is_pair else result
        _refuse_hooks(m, name)
        try:
            result = super().call_module(m, forward, args, kwargs)
            if name and self.draws.from_python_or_numpy():
                raise SubmoduleNotTraceable(name, _USES_PYTHON_RNG)
        except SubmoduleNotTraceable:
            raise
        except PythonDraw as draw:
            if name == "":
                raise
            raise SubmoduleNotTraceable(name, _USES_PYTHON_RNG) from draw
        except CaptureError as error:
            if error.code not in ("SNNFX201", "SNNFX202") or name == "":
                raise
            raise SubmoduleNotTraceable(name, error.why or error.what) from error
        except Exception as error:
            # Python code may fail on proxies in any way; the net then steps the module without tracing.
            raise_internal_fault(error, f"the net steps `{name}` without tracing")
            raise SubmoduleNotTraceable(name, f"{type(error).__name__}: {error}") from error
        return mark_returned(result, name)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m) and m not in self.opened


class ArgumentLeaf:
    """A tensor argument of the step: its name, its index among all leaves, its fake value or `UNKNOWN`."""

    def __init__(self, name: str, index: int, value: Any = UNKNOWN) -> None:
        self.name, self.index, self.value = name, index, value


def _refuse_by(adapter: Any, m: nn.Module, name: str, where: str) -> None:
    """Call `adapter.refuse`, and add the location of the call to its error."""
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
            f"`{name or 'the model'}` has hooks that the converted net would not run",
            where=location_of_forward(m),
            why="its forward is traced, so the net does not call it as a module.",
            hint="Register the hook on a leaf module inside it, or remove it before the conversion.",
        )

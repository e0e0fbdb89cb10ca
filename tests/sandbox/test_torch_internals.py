"""The contract of each private name of torch that snnfx uses. A release of torch that breaks one fails here first."""

from __future__ import annotations

import ast
import importlib
import logging
import math
import threading
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry

from snnfx.sandbox import torch_internals as internals

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "snnfx").rglob("*.py"), *(ROOT / "passes").rglob("*.py")])


# --- dicts


def test_each_change_of_a_dict_changes_its_version() -> None:
    values: dict[str, object] = {"a": 1}
    versions = [internals.dict_version(values)]
    for change in (
        lambda: values.update(a=2),
        lambda: values.update(b=2),
        lambda: values.pop("a"),
        lambda: values.update(b=2.0),
        values.clear,
    ):
        change()
        versions.append(internals.dict_version(values))
    assert len({*versions}) == len(versions)
    values.get("a")
    assert internals.dict_version(values) == versions[-1]


def test_attributes_that_a_hot_function_sets_change_the_version_of_their_dict() -> None:
    class Counter:
        count = 0

    counter = Counter()
    seen = set()

    def increment() -> None:
        counter.count += 1

    for _ in range(200):  # from the first few calls on, the interpreter runs specialised code
        increment()
        seen.add(internals.dict_version(vars(counter)))
    assert len(seen) == 200


def test_global_variables_that_a_hot_function_sets_change_the_version_of_their_dict() -> None:
    namespace: dict[str, Any] = {"count": 0}
    exec("def increment():\n    global count\n    count += 1", namespace)
    seen = set()
    for _ in range(200):
        namespace["increment"]()
        seen.add(internals.dict_version(namespace))
    assert len(seen) == 200


# --- modes and transforms


def test_transforms_are_active_inside_vmap_only() -> None:
    inside: list[bool] = []

    def f(x: Tensor) -> Tensor:
        inside.append(internals.are_transforms_active())
        return x * 2

    torch.vmap(f)(torch.ones(2))
    torch.func.grad(lambda x: f(x).sum())(torch.ones(2))
    assert inside == [True, True]
    assert internals.are_transforms_active() is False


def test_only_the_mapped_tensor_is_batched() -> None:
    other, seen = torch.ones(3), []
    torch.vmap(lambda x: seen.append((internals.is_batched_by_vmap(x), internals.is_batched_by_vmap(other))) or x)(
        other
    )
    assert seen == [(True, False)]
    assert internals.is_batched_by_vmap(other) is False


def test_backward_pass_has_a_number_inside_its_hooks() -> None:
    numbers: list[int] = []
    for _ in range(2):
        x = torch.ones(2, requires_grad=True)
        y = x * 2
        y.register_hook(lambda grad: numbers.append(internals.current_backward_pass()))
        y.sum().backward()
    assert -1 not in numbers
    assert len(set(numbers)) == 2
    assert internals.current_backward_pass() == -1


def test_node_of_a_backward_pass_is_current_while_it_runs() -> None:
    nodes: list[Any] = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            nodes.append(internals.current_autograd_node())
            return grad

    x = torch.ones(2, requires_grad=True)
    y = Watch.apply(x * 2)
    (y * 3).sum().backward()
    assert nodes == [y.grad_fn]
    assert isinstance(nodes[0], torch.autograd.function.BackwardCFunction)
    assert internals.current_autograd_node() is None


def test_a_mode_sees_the_code_of_a_backward_pass() -> None:
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad / grad.shape[0]

    seen: list[str] = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    x, unused = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)
    y = Scale.apply(x)
    with Mode():
        found = internals.gradients_in_modes([y], [x, unused], [torch.ones(2)])
    assert torch.equal(found[0], torch.tensor([0.5, 0.5])) and found[1] is None
    assert "__get__" in seen


def test_a_function_mode_sees_backward_passes_that_it_is_entered_for() -> None:
    class Cast(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad.float() * 2

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.autograd.grad:
                with internals.backward_passes_in(self):
                    return func(*args, **(kwargs or {}))
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    x = torch.ones(2, requires_grad=True)
    with Mode():
        torch.autograd.grad(Cast.apply(x).sum(), x)
    assert torch.Tensor.float in seen
    seen.clear()
    torch.autograd.grad(Cast.apply(x).sum(), x)
    assert not seen


def test_nodes_of_an_autograd_graph_are_numbered_in_order() -> None:
    x = torch.ones(2, requires_grad=True)
    first = x * 2
    second = torch.autograd.graph.get_gradient_edge(first * 3).node
    assert internals.sequence_number(first.grad_fn) < internals.sequence_number(second)


def test_leaf_of_an_autograd_graph_is_a_variable() -> None:
    x = torch.ones(2, requires_grad=True)
    ((node, _),) = torch.neg(x).grad_fn.next_functions
    assert isinstance(node, internals.AccumulateGrad)
    assert node.variable is x


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_is_a_plain_call_inside_a_block_only(use_reentrant: bool) -> None:
    calls: list[Tensor] = []

    def f(x: Tensor) -> Tensor:
        calls.append(x)
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    with internals.CheckpointAsPlainCall():
        with internals.CheckpointAsPlainCall():
            pass
        y = torch.utils.checkpoint.checkpoint(f, x, use_reentrant=use_reentrant)
    assert y.grad_fn.name() == "SinBackward0"
    y.sum().backward()
    assert len(calls) == 1
    assert calls[0] is x
    torch.utils.checkpoint.checkpoint(f, x, use_reentrant=use_reentrant).sum().backward()
    assert len(calls) == 3


def test_gradients_batched_by_autograd_have_a_level_and_a_size() -> None:
    found: list[Any] = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            level, size = internals.level_of_autograd_batch(grad)
            whole = internals.remove_autograd_batch(grad, level, size)
            other = internals.remove_autograd_batch(torch.ones(3), level, size)
            found.append((internals.is_batched_by_autograd(grad), level, size, whole.clone(), other.shape))
            return internals.add_autograd_batch(whole * 2, level)

    x = torch.ones(3, requires_grad=True)
    for batch in (torch.eye(3), torch.ones(1, 3)):
        (grad,) = torch.autograd.grad(Watch.apply(x), x, batch, is_grads_batched=True)
        assert torch.equal(grad, 2 * batch)
        is_batched, level, size, whole, shape = found.pop()
        assert (is_batched, level, size, shape) == (True, 1, len(batch), (len(batch), 3))
        assert torch.equal(whole, batch)
    assert internals.is_batched_by_autograd(x) is False


def test_level_of_forward_mode_is_negative_outside_of_it() -> None:
    assert internals.forward_mode_level() == -1
    with forward_ad.dual_level():
        assert internals.forward_mode_level() == 0
    assert internals.forward_mode_level() == -1


def test_forward_mode_is_disabled_inside_an_autograd_function_only() -> None:
    inside: list[bool] = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            inside.append(internals.is_forward_mode_enabled())
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 2

    Double.apply(torch.ones(2, requires_grad=True))
    assert inside == [False]
    assert internals.is_forward_mode_enabled() is True
    with torch.no_grad():
        assert internals.is_forward_mode_enabled() is True


def test_tracing_state_is_none_outside_of_a_trace() -> None:
    states: list[Any] = []

    def f(x: Tensor) -> Tensor:
        states.append(internals.tracing_state())
        return x * 2

    f(torch.ones(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(f, torch.ones(2), check_trace=False)
    assert states[0] is None
    assert states[1] is not None


def test_dispatch_mode_receives_aten_operators_and_is_counted() -> None:
    seen: list[Any] = []

    class Record(internals.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    assert internals.dispatch_mode_count() == 0
    with Record():
        assert internals.dispatch_mode_count() == 1
        torch.ones(2).add(1)
    assert torch.ops.aten.add.Tensor in seen


def test_dispatch_modes_can_be_disabled_and_come_back() -> None:
    with internals.FakeTensorMode():
        with internals.disable_dispatch_modes():
            assert internals.dispatch_mode_count() == 0
            assert type(torch.ones(2)) is Tensor
        assert isinstance(torch.ones(2), internals.FakeTensor)


def test_function_modes_are_listed_outermost_first() -> None:
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    assert list(internals.function_mode_stack()) == []
    with Mode() as outer, Mode() as inner:
        assert list(internals.function_mode_stack()) == [outer, inner]


def test_dispatch_key_sets_restore_autograd_below_autograd() -> None:
    included, excluded = internals.included_dispatch_keys(), internals.excluded_dispatch_keys()
    x = torch.ones(2, requires_grad=True)
    with internals.BelowAutograd():
        assert torch.is_grad_enabled()
        assert not (x * 2).requires_grad
        with internals.DispatchKeyGuard(included, excluded):
            assert (x * 2).requires_grad
        assert not (x * 2).requires_grad
    assert (x * 2).requires_grad


def test_is_profiling_is_true_inside_a_profiler_only() -> None:
    assert not internals.is_profiling()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert internals.is_profiling()
    assert not internals.is_profiling()


def test_saved_tensors_hooks_are_a_pair_or_none() -> None:
    assert internals.saved_tensors_hooks(False) is None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        hooks = internals.saved_tensors_hooks(False)
        assert hooks is not None
        assert len(hooks) == 2


# --- fake tensors


def test_fake_mode_accepts_real_tensors_and_computes_shapes() -> None:
    real = torch.ones(3, 2)
    mode = internals.FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        y = F.linear(mode.from_tensor(torch.ones(4, 2)), real)
        assert isinstance(y, internals.FakeTensor)
        with internals.unset_fake_temporarily():
            assert type(torch.ones(2)) is Tensor
    assert tuple(y.shape) == (4, 3)


def test_fake_mode_says_why_it_cannot_compute_a_shape() -> None:
    with torch.library._scoped_library("snnfx_contract", "FRAGMENT") as library:
        library.define("without_fake(Tensor x) -> Tensor")
        library.impl("without_fake", lambda x: x.clone(), "CPU")
        with internals.FakeTensorMode():
            x = torch.ones(2)
            with pytest.raises(internals.DataDependentOutputException):
                torch.ops.aten._local_scalar_dense(x.sum())
            with pytest.raises(internals.DynamicOutputShapeException):
                torch.nonzero(x)
            with pytest.raises(internals.UnsupportedOperatorException):
                torch.ops.snnfx_contract.without_fake(x)


# --- base classes of layers


@pytest.mark.parametrize(
    ("base", "classes"),
    [
        (internals.BatchNormBase, "BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm LazyBatchNorm2d"),
        (internals.InstanceNormBase, "InstanceNorm1d InstanceNorm2d InstanceNorm3d"),
        (internals.NormBase, "BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm InstanceNorm1d InstanceNorm2d"),
        (internals.ConvBase, "Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d"),
        (internals.DropoutBase, "Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout"),
        (internals.MaxPoolBase, "MaxPool1d MaxPool2d MaxPool3d"),
        (internals.AvgPoolBase, "AvgPool1d AvgPool2d AvgPool3d"),
        (internals.AdaptiveAvgPoolBase, "AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d"),
        (internals.AdaptiveMaxPoolBase, "AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_base_class_covers_its_layers_and_no_others(base: type, classes: str) -> None:
    names = classes.split()
    assert [name for name in names if not issubclass(getattr(nn, name), base)] == []
    assert not issubclass(nn.Linear, base)
    assert not issubclass(nn.GroupNorm, base)


def test_norm_bases_differ() -> None:
    assert not issubclass(nn.InstanceNorm2d, internals.BatchNormBase)
    assert not issubclass(nn.BatchNorm2d, internals.InstanceNormBase)


def test_spectral_norm_parametrization_is_registered_on_the_layer() -> None:
    layer = parametrizations.spectral_norm(nn.Linear(3, 2))
    assert isinstance(layer.parametrizations["weight"][0], internals.SpectralNormParametrization)
    assert not isinstance(parametrizations.weight_norm(nn.Linear(3, 2)), internals.SpectralNormParametrization)


# --- functions


def test_function_from_source_gives_the_forward_function() -> None:
    forward = internals.function_from_source("def forward(self, x):\n    return x + offset", {"offset": 2}, {})
    assert forward(None, 1) == 3
    assert forward.__name__ == "forward"


def test_global_hooks_are_found_of_every_kind() -> None:
    assert not internals.has_global_hooks()
    assert not internals.has_global_forward_hooks()
    module = nn.modules.module
    kinds = [
        (module.register_module_forward_hook, True),
        (module.register_module_forward_pre_hook, True),
        (module.register_module_full_backward_hook, False),
        (module.register_module_full_backward_pre_hook, False),
    ]
    for register, is_forward in kinds:
        handle = register(lambda *_: None)
        try:
            assert internals.has_global_hooks()
            assert internals.has_global_forward_hooks() is is_forward
        finally:
            handle.remove()
    assert not internals.has_global_hooks()


def test_compile_wrapper_is_removed() -> None:
    module = nn.Linear(2, 2)
    assert internals.without_compile_wrapper(module) is None
    assert internals.without_compile_wrapper(torch.compile(module)) is module


def test_decompositions_are_functions_of_the_same_value() -> None:
    x = torch.linspace(-2, 2, 5)
    decomposed = internals.decompositions()[torch.ops.aten.silu.default]
    torch.testing.assert_close(decomposed(x), F.silu(x))
    assert internals.decompositions().get(torch.ops.aten.add.default) is None


def test_overload_packets_list_their_overloads() -> None:
    packets = [op for op in flop_registry if isinstance(op, internals.OpOverloadPacket)]
    assert torch.ops.aten.mm in packets
    assert "default" in torch.ops.aten.mm.overloads()
    assert not isinstance(torch.ops.aten.mm.default, internals.OpOverloadPacket)
    assert isinstance(torch.ops.aten.mm.default, internals.OpOverload)
    assert (str(torch.ops.aten.mm), str(torch.ops.aten.mm.default)) == ("aten.mm", "aten.mm.default")


def test_the_functions_of_layers_are_those_of_torch() -> None:
    assert internals.layer_functions.__name__ == "torch._C._nn"
    assert torch.equal(internals.layer_functions.gelu(torch.ones(2)), nn.functional.gelu(torch.ones(2)))
    assert nn.functional.gelu is internals.layer_functions.gelu


def test_batch_size_check_refuses_one_value_per_channel() -> None:
    internals.check_batch_size([2, 3])
    internals.check_batch_size([1, 3, 2])
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        internals.check_batch_size([1, 3])


def test_foreach_functions_equal_their_loops() -> None:
    a, b = [torch.rand(3), torch.rand(2)], [torch.rand(3), torch.rand(2)]
    for result, expected in [
        (internals.foreach_add(a, b, alpha=-0.5), [x - 0.5 * y for x, y in zip(a, b, strict=True)]),
        (internals.foreach_sub(a, b), [x - y for x, y in zip(a, b, strict=True)]),
        (internals.foreach_lerp(a, b, 0.5), [x + 0.5 * (y - x) for x, y in zip(a, b, strict=True)]),
    ]:
        torch.testing.assert_close(list(result), expected)
    for in_place, function in [
        (internals.foreach_add_, lambda x, y: x + y),
        (internals.foreach_sub_, lambda x, y: x - y),
        (internals.foreach_mul_, lambda x, y: x * y),
    ]:
        changed = [x.clone() for x in a]
        in_place(changed, b)
        torch.testing.assert_close(changed, [function(x, y) for x, y in zip(a, b, strict=True)])
    scaled = [x.clone() for x in a]
    internals.foreach_mul_(scaled, [2.0, 3.0])
    internals.foreach_mul_(scaled, 2.0)
    torch.testing.assert_close(scaled, [4.0 * a[0], 6.0 * a[1]])


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(x: Any, factor: float = 3.0) -> Any:
        return x * factor

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])  # raises on anything but a tensor
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class Unknown:
    """Neither a tensor nor a number, like a proxy."""


stored = (Double.apply, Scale.apply)


def intercept(calls: list[Any]) -> Any:
    def replacement(cls: Any, args: Any, kwargs: Any) -> Any:
        calls.append((cls, args[0], torch.is_grad_enabled()))
        return args[0]

    return internals.intercepted_apply(lambda args, kwargs: isinstance(args[0], Unknown), replacement)


@pytest.mark.parametrize("grad", [True, False])
def test_calls_of_autograd_functions_are_replaced_where_wanted(grad: bool) -> None:
    calls: list[Any] = []
    value, x = Unknown(), torch.ones(2, requires_grad=True)
    with intercept(calls), torch.set_grad_enabled(grad):
        for number, cls in enumerate((Double, Scale)):
            assert cls.apply(value) is value
            assert stored[number](value) is value
        y = stored[0](x) + stored[1](x)
    assert calls == [(Double, value, grad)] * 2 + [(Scale, value, grad)] * 2
    assert y.tolist() == [5.0, 5.0]
    assert y.requires_grad is grad
    if grad:
        assert torch.autograd.grad(y.sum(), x)[0].tolist() == [5.0, 5.0]


def test_forward_called_by_its_name_is_not_replaced() -> None:
    calls: list[Any] = []
    with intercept(calls), pytest.raises(TypeError):
        Double.forward(None, Unknown())
    assert calls == []


def test_innermost_interception_counts_and_everything_is_restored() -> None:
    outer: list[Any] = []
    inner: list[Any] = []
    value = Unknown()
    with intercept(outer):
        with intercept(inner):
            stored[0](value)
        stored[0](value)
    assert (len(inner), len(outer)) == (1, 1)
    with pytest.raises(TypeError):
        stored[0](value)
    torch.testing.assert_close(stored[1](torch.ones(2)), torch.full((2,), 3.0))


def test_calls_of_other_threads_are_not_replaced() -> None:
    calls: list[Any] = []
    results: list[Any] = []
    with intercept(calls):
        thread = threading.Thread(target=lambda: results.append(stored[1](torch.ones(2))))
        thread.start()
        thread.join()
    torch.testing.assert_close(results[0], torch.full((2,), 3.0))
    assert calls == []


# --- functions that fx wraps


def test_wrapped_functions_record_proxies_and_are_restored() -> None:
    namespace = {"root": math.sqrt, "other": math.exp}
    proxy = fx.Tracer()
    proxy.graph = fx.Graph(tracer_cls=fx.Tracer)
    x = fx.Proxy(proxy.graph.placeholder("x"), proxy)
    sqrt = math.sqrt
    with internals.WrappedFunctions({id(math.sqrt)}) as wrapped:
        wrapped.look_in(namespace)
        assert namespace["root"](4.0) == 2.0 and math.sqrt(9.0) == 3.0
        assert namespace["root"](x).node.target is sqrt and math.sqrt(x).node.target is sqrt
        assert namespace["other"] is math.exp
    assert namespace["root"] is sqrt and math.sqrt is sqrt


# --- pytree


def test_pytree_round_trip_keeps_structure_and_order() -> None:
    tree = ((1, None), {"b": [2, 3], "a": 4})
    leaves, spec = internals.pytree.tree_flatten(tree)
    assert leaves == [1, None, 2, 3, 4]
    assert spec.num_leaves == 5
    assert spec == internals.pytree.tree_structure(((0, 0), {"b": [0, 0], "a": 0}))
    assert spec != internals.pytree.tree_structure(((0, 0), {"b": (0, 0), "a": 0}))
    assert internals.pytree.tree_unflatten(leaves, spec) == tree
    assert internals.pytree.tree_leaves([[], ()]) == []


def test_pytree_maps_and_names_leaves() -> None:
    pytree = internals.pytree
    assert pytree.tree_map(lambda x: x + 1, {"a": (1, 2)}) == {"a": (2, 3)}
    assert pytree.tree_map_only(str, str.upper, ["a", 1]) == ["A", 1]
    pairs, _ = pytree.tree_flatten_with_path(([1], {"a": 2}))
    assert [pytree.keystr(path) for path, _ in pairs] == ["[0][0]", "[1]['a']"]
    assert pytree.tree_leaves_with_path([1]) == [(pytree.tree_flatten_with_path([1])[0][0][0], 1)]


def test_prefix_is_broadcast_to_the_leaves_or_refused() -> None:
    spec = internals.pytree.tree_structure(((1, (2, 3)), {"a": 4}))
    assert internals.broadcast_prefix(((0, 1), {"a": None}), spec) == [0, 1, 1, None]
    assert internals.broadcast_prefix(0, spec) == [0] * 4
    assert internals.broadcast_prefix(((0,), {}), spec) is None


# --- private attributes of torch's objects

OBJECT_ATTRIBUTES = set(
    "_parameters _buffers _modules _non_persistent_buffers_set _forward_hooks _forward_pre_hooks _backward_hooks "
    "_backward_pre_hooks _call_impl _load_from_state_dict _check_input_dim _conv_forward "
    "_reversed_padding_repeated_twice _flat_weights _version _is_view _cdata _schema".split()
)
"""Read by snnfx outside of torch_internals.py; the tests below state what each one is."""


def test_module_registries_hold_parameters_buffers_and_children() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(1))
    module.register_parameter("bias", None)
    module.register_buffer("mean", torch.zeros(1))
    module.register_buffer("scratch", torch.zeros(1), persistent=False)
    module.child = nn.ReLU()
    assert module._parameters == {"weight": module.weight, "bias": None}
    assert module._buffers == {"mean": module.mean, "scratch": module.scratch}
    assert module._non_persistent_buffers_set == {"scratch"}
    assert module._modules == {"child": module.child}
    assert {"_parameters", "_buffers", "_modules"} <= module.__dict__.keys()
    assert not {"weight", "mean", "child"} & module.__dict__.keys()


def test_entry_of_a_registry_is_the_attribute() -> None:
    module = nn.Linear(2, 2)
    other = nn.Parameter(torch.ones(2, 2))
    module._parameters["weight"] = other
    assert module.weight is other
    torch.testing.assert_close(module(torch.ones(1, 2)), 2 + module.bias[None])


def test_hook_dictionaries_hold_the_hooks_of_one_module() -> None:
    module = nn.Linear(2, 2)
    names = ["_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"]
    assert [len(getattr(module, name)) for name in names] == [0, 0, 0, 0]
    module.register_forward_hook(lambda *_: None)
    module.register_forward_pre_hook(lambda *_: None)
    module.register_full_backward_hook(lambda *_: None)
    module.register_full_backward_pre_hook(lambda *_: None)
    assert [len(getattr(module, name)) for name in names] == [1, 1, 1, 1]


def test_call_goes_through_call_impl() -> None:
    class Counted(nn.Linear):
        calls = 0

        def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return super()._call_impl(*args, **kwargs)

    module = Counted(2, 2)
    module(torch.ones(1, 2))
    assert module.calls == 1


def test_loading_goes_through_load_from_state_dict() -> None:
    class Loaded(nn.Linear):
        loads = 0

        def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
            self.loads += 1
            super()._load_from_state_dict(*args, **kwargs)

    module = Loaded(2, 2)
    module.load_state_dict(nn.Linear(2, 2).state_dict())
    assert module.loads == 1


def test_batch_norm_checks_the_rank_of_its_input() -> None:
    nn.BatchNorm2d(3)._check_input_dim(torch.ones(2, 3, 4, 4))
    with pytest.raises(ValueError, match="expected 4D input"):
        nn.BatchNorm2d(3)._check_input_dim(torch.ones(2, 3))


def test_convolution_is_computed_with_given_weights() -> None:
    layer, x, other = nn.Conv2d(1, 2, 3, padding=1), torch.rand(1, 1, 4, 4), torch.rand(2, 1, 3, 3)
    torch.testing.assert_close(layer._conv_forward(x, other, None), F.conv2d(x, other, padding=1))
    assert nn.Conv2d._conv_forward.__module__.startswith("torch.nn.")


def test_reversed_padding_is_the_argument_of_pad() -> None:
    layer, x = nn.Conv2d(1, 2, 3, padding=(1, 2), padding_mode="circular"), torch.rand(1, 1, 5, 5)
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode="circular")
    torch.testing.assert_close(F.conv2d(padded, layer.weight, layer.bias), layer(x))


def test_recurrent_layer_reads_its_flat_weights() -> None:
    layer, x = nn.LSTM(2, 3), torch.rand(4, 1, 2)
    assert all(a is b for a, b in zip(layer._flat_weights, layer.parameters(), strict=True))
    before = layer(x)[0]
    layer._flat_weights = [torch.zeros_like(w) for w in layer._flat_weights]
    assert not torch.equal(layer(x)[0], before)


def test_version_counts_changes_in_place_and_is_shared_by_views() -> None:
    x = torch.zeros(4)
    view, before = x[:2], x._version
    view.add_(1)
    assert x._version == view._version == before + 1
    assert x.detach()._version == x._version


def test_view_is_known_as_a_view() -> None:
    x = torch.zeros(4)
    assert x[:2]._is_view()
    assert not x._is_view()
    assert not x.clone()._is_view()


def test_storage_number_is_shared_by_views_only() -> None:
    for x in (torch.zeros(4), torch.zeros(4, device="meta")):
        assert x.untyped_storage()._cdata == x[1:].untyped_storage()._cdata
        assert x.untyped_storage()._cdata != x.clone().untyped_storage()._cdata


def test_schema_names_arguments_and_what_they_change() -> None:
    schema = torch.ops.aten.add_.Tensor._schema
    assert schema.is_mutable
    assert [a.name for a in schema.arguments] == ["self", "other", "alpha"]
    assert [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments] == [True, False, False]
    assert not torch.ops.aten.add.Tensor._schema.is_mutable


# --- where private names may stand


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def submodule(owner: str, name: str) -> str | None:
    """The path of a module of torch inside another one; None if the name stands for something else."""
    if (owner, name) == ("torch", "ops"):
        return None  # the names of operators are public
    value = getattr(importlib.import_module(owner), name, None)
    return f"{owner}.{name}" if isinstance(value, ModuleType) else None


class PrivateNames(ast.NodeVisitor):
    """Collect the private names of torch's modules in a file, as `torch.x._y`.

    `modules` maps a name of the file to the module of torch that it stands for.
    """

    def __init__(self) -> None:
        self.modules: dict[str, str] = {}
        self.found: set[str] = set()

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] == "torch":
                if any(is_private(part) for part in alias.name.split(".")):
                    self.found.add(alias.name)
                self.modules[alias.asname or "torch"] = alias.name if alias.asname else "torch"

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        source = node.module or ""
        if source == internals.__name__:
            self.modules.update({a.asname or a.name: "torch.utils._pytree" for a in node.names if a.name == "pytree"})
        if source.split(".")[0] != "torch":
            return
        for alias in node.names:
            path = f"{source}.{alias.name}"
            if any(is_private(part) for part in path.split(".")):
                self.found.add(path)
            elif submodule(source, alias.name) is not None:
                self.modules[alias.asname or alias.name] = path

    def visit_Assign(self, node: ast.Assign) -> None:
        path = self.path(node.value)
        if path is not None and isinstance(node.targets[0], ast.Name):
            self.modules[node.targets[0].id] = path
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.check(node.value, node.attr)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id == "getattr" and isinstance(node.args[1], ast.Constant):
            self.check(node.args[0], str(node.args[1].value))
        self.generic_visit(node)

    def check(self, owner: ast.expr, name: str) -> None:
        path = self.path(owner)
        if is_private(name) and path is not None:
            self.found.add(f"{path}.{name}")

    def path(self, node: ast.expr) -> str | None:
        """The module of torch that an expression stands for; None for everything else."""
        if isinstance(node, ast.Name):
            return self.modules.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.path(node.value)
            return None if owner is None else submodule(owner, node.attr)
        return None


def private_names(tree: ast.Module) -> set[str]:
    visitor = PrivateNames()
    visitor.visit(tree)
    return visitor.found


@cache
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._C._get_tracing_state()",
        "import torch._dynamo",
        "from torch._C import Anything",
        "from torch.nn.modules.batchnorm import _BatchNorm",
        "from torch.utils import _pytree as pytree",
        "import torch\ntorch._foreach_add_([], [])",
        "from torch import nn\nisinstance(0, nn.modules.conv._ConvNd)",
        "import torch.nn.functional as F\nF._verify_batch_size([1])",
        "from torch import nn\neverywhere = nn.modules.module\neverywhere._global_forward_hooks",
        "import torch\ngetattr(torch, '_dynamo', None)",
        "from snnfx.sandbox.torch_internals import pytree\npytree._broadcast_to_and_flatten(0, 0)",
    ],
)
def test_private_name_is_found(source: str) -> None:
    assert private_names(ast.parse(source)) != set()


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.ops.aten._unsafe_view(x, [1])",  # the name of an operator
        "import torch\ntorch.__version__",
        "# torch._C\nx = 'torch._C'",
        "from torch import nn\nnn.Conv2d._conv_forward",  # an attribute of an object: the next test
        "self._C = 1",
    ],
)
def test_public_name_is_not_found(source: str) -> None:
    assert private_names(ast.parse(source)) == set()


def test_private_names_stand_in_torch_internals_only() -> None:
    # `run_file.py` is a script of its own, which runs where snnfx cannot be imported.
    elsewhere = {
        f"{path.relative_to(ROOT)}: {name}"
        for path, tree in trees().items()
        if path.name not in ("torch_internals.py", "run_file.py")
        for name in private_names(tree)
    }
    assert elsewhere == set()


def test_private_attributes_of_torchs_objects_have_a_contract() -> None:
    layers = [value for value in vars(nn).values() if isinstance(value, type) and issubclass(value, nn.Module)]
    objects = (Tensor, torch.UntypedStorage, torch.Generator, fx.Graph, fx.Node, fx.GraphModule, fx.Tracer, fx.Proxy)
    instances = (nn.LSTM(1, 1), nn.Conv2d(1, 1, 1), torch.ops.aten.add.Tensor, fx.Graph())
    of_torch = {name for thing in (*layers, *objects, *instances) for name in dir(thing) if is_private(name)}
    of_torch |= {name for thing in instances for name in getattr(thing, "__dict__", ())}
    own: set[str] = set()
    used: dict[str, str] = {}
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and is_private(node.attr):
                if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self":
                    own.add(node.attr)
                elif path.name != "torch_internals.py":
                    used[node.attr] = f"{path.relative_to(ROOT)}:{node.lineno}: {node.attr}"
    without_contract = of_torch - own - OBJECT_ATTRIBUTES
    assert [place for name, place in used.items() if name in without_contract] == []


def test_every_name_has_a_test() -> None:
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    tested = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "internals"
    }
    assert set(internals.__all__) - tested == set()


def test_torch_jit_stores_the_python_function_that_it_compiled() -> None:
    def double(x: Tensor) -> Tensor:
        return x * 2

    assert internals.python_of_script(torch.jit.script(double)) is double
    assert internals.python_of_script(torch.jit.trace(double, torch.ones(2))) is double
    assert internals.python_of_script(object()) is None


def test_scan_runs_a_recorded_step_over_a_sequence_of_any_length() -> None:
    def run(x_seq: Tensor) -> tuple[Any, ...]:
        carry = torch.zeros_like(x_seq[0])
        with internals.proxies_disabled():
            examples = [carry.clone(), x_seq[0].clone()]
            step = internals.record_aten(lambda v, x: (v * 0.5 + x, (v + x).relu()), examples)
        return internals.scan_steps(step, [carry], [x_seq], [])

    symbolic = internals.SymbolicTensors()
    fake = symbolic.like(torch.zeros(7, 11, 3), [0, 1])
    with symbolic, torch.no_grad():
        recorded = internals.record_aten(run, [fake])
    assert sum("scan" in str(node.target) for node in recorded.graph.nodes if node.op == "call_function") == 1
    for T, N in ((1, 1), (5, 2)):
        x_seq = torch.rand(T, N, 3)
        v, expected = torch.zeros(N, 3), []
        for x in x_seq:
            expected.append((v + x).relu())
            v = v * 0.5 + x
        last, y_seq = recorded(x_seq)
        assert torch.allclose(last, v) and torch.allclose(y_seq, torch.stack(expected))


def test_recording_reads_the_values_of_real_tensors() -> None:
    weight = nn.Parameter(torch.tensor(3.0))
    symbolic = internals.SymbolicTensors()
    with symbolic, torch.no_grad():
        recorded = internals.record_aten(lambda x: x * weight + weight.item(), [symbolic.like(torch.zeros(7), [0])])
    (constant,) = [n.target for n in recorded.graph.nodes if n.op == "get_attr"]
    assert getattr(recorded, constant) is weight
    assert recorded(torch.ones(2)).tolist() == [6.0, 6.0]


def test_sizes_are_not_distinguished_from_one_without_size_guards() -> None:
    class Fold(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(0, 1).view(-1, 2, 3).unflatten(0, (x.shape[0], -1))

    dims = torch.export.Dim("T", min=1), torch.export.Dim("N", min=1)
    with internals.without_size_guards():
        program = torch.export.export(Fold(), (torch.rand(7, 11, 6),), dynamic_shapes=(dict(enumerate(dims)),))
    assert program.module()(torch.rand(1, 1, 6)).shape == (1, 1, 2, 3)


def test_compile_state_is_what_code_outside_of_a_trace_reads() -> None:
    assert not torch.compiler.is_compiling()
    with internals.compile_state(True):
        assert torch.compiler.is_compiling()
        with internals.compile_state(False):
            assert not torch.compiler.is_compiling()
        assert torch.compiler.is_compiling()
    assert not torch.compiler.is_compiling()


@pytest.mark.parametrize("keep", [False, True])
def test_a_backward_pass_knows_whether_its_graph_is_kept(keep: bool) -> None:
    kept: list[bool] = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: kept.append(internals.is_backward_graph_kept()))
    y.sum().backward(retain_graph=keep)
    assert kept == [keep]


def test_size_one_of_a_dynamic_axis_is_allowed_afterwards(tmp_path: Path) -> None:
    class Fold(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (x + y).flatten(0, 1).view(-1, 2, 3)

    axes = {0: torch.export.Dim("T", min=2), 1: torch.export.Dim("N", min=2)}
    examples = (torch.rand(7, 11, 6), torch.rand(7, 11, 6))
    program = torch.export.export(Fold(), examples, dynamic_shapes=(axes, axes))
    internals.allow_size_one(program)
    torch.export.save(program, tmp_path / "net.pt2")
    module = torch.export.load(tmp_path / "net.pt2").module()
    assert module(torch.rand(1, 1, 6), torch.rand(1, 1, 6)).shape == (1, 2, 3)


def test_serializer_logs_about_scans_without_constants_only_outside_of_the_context(tmp_path: Path) -> None:
    class Sums(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            def step(c: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
                return [c + x, c * x]

            graph = internals.record_aten(step, [x[0], x[0]])
            return internals.scan_steps(graph, [torch.zeros_like(x[0])], [x], [])[1]  # type: ignore[no-any-return]

    with torch.no_grad():
        program = torch.export.export(Sums(), (torch.rand(4, 3),), strict=False)
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("torch._export.serde.serialize")
    logger.addHandler(handler)
    try:
        with internals.quiet_serializer():
            torch.export.save(program, tmp_path / "net.pt2")
        assert not logged
        torch.export.save(program, tmp_path / "net.pt2")
        assert "empty list" in logged[0]
    finally:
        logger.removeHandler(handler)


def test_package_compiles_to_a_file_that_torch_loads(tmp_path: Path) -> None:
    program = torch.export.export(nn.Linear(3, 2), (torch.rand(4, 3),))
    internals.compile_package(program, str(tmp_path / "net.pt2"), {})
    assert torch._inductor.aoti_load_package(str(tmp_path / "net.pt2"))(torch.rand(4, 3)).shape == (4, 2)


def test_composite_operations_with_integer_sizes_are_recorded_for_symbolic_sizes() -> None:
    symbolic = internals.SymbolicTensors()
    fake = symbolic.like(torch.zeros(7, 3), [0])
    with symbolic, torch.no_grad():
        recorded = internals.record_aten(lambda x: torch.constant_pad_nd(x, [1, -1]), [fake])
    (padded,) = [n.meta["val"] for n in recorded.graph.nodes if "pad" in str(n.target)]
    assert isinstance(padded.shape[0], torch.SymInt) and str(padded.shape[0]) == str(fake.shape[0])


def test_errors_on_fake_tensors_are_logged_only_outside_of_the_context() -> None:
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(handler)

    def fail() -> None:
        with internals.FakeTensorMode(), pytest.raises(RuntimeError):
            torch.zeros(2, 3) @ torch.zeros(2, 3)

    try:
        with internals.quiet_fake_tensors():
            fail()
        assert not logged
        fail()
        assert "mm" in logged[0]
    finally:
        logger.removeHandler(handler)


def test_multiples_of_a_dynamic_axis_start_at_their_factor(tmp_path: Path) -> None:
    class Rows(nn.Module):
        def forward(self, x: Tensor, v: Tensor) -> Tensor:
            return x.flatten(0, 1) + v

    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(
        Rows(), (torch.rand(7, 3, 4), torch.rand(21, 4)), dynamic_shapes=({0: rows}, {0: 3 * rows})
    )
    internals.allow_size_one(program)
    torch.export.save(program, tmp_path / "net.pt2")
    assert torch.export.load(tmp_path / "net.pt2").module()(torch.rand(1, 3, 4), torch.rand(3, 4)).shape == (3, 4)


@pytest.mark.skipif(not internals.has_one_dnn_linear(), reason="this torch has no oneDNN")
def test_one_dnn_multiplies_row_major_and_transposed_matrices() -> None:
    x, weight, bias = torch.randn(7, 5), torch.randn(3, 5), torch.randn(3)
    torch.testing.assert_close(internals.linear_by_one_dnn(x, weight, bias), x @ weight.t() + bias)
    torch.testing.assert_close(internals.linear_by_one_dnn(x, weight, None), x @ weight.t())
    grad = torch.randn(7, 3)
    torch.testing.assert_close(internals.linear_by_one_dnn(grad, weight.t(), None), grad @ weight)
    torch.testing.assert_close(internals.linear_by_one_dnn(grad.t(), x.t(), None), grad.t() @ x)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not internals.has_one_dnn_linear()

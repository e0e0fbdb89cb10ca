"""Private names of torch that snnfx uses, under public names.

A private name may change in any release of torch. `tests/sandbox/test_torch_internals.py` states the contract of each
name below, so a release that breaks one fails there first, and only this module has to change. The same test lists
the private attributes of torch's objects that snnfx reads (`module._buffers`, `tensor._version`) with their contracts.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import fx, nn
from torch._C import _AutoDispatchBelowAutograd as BelowAutograd
from torch._C import _ForceDispatchKeyGuard as DispatchKeyGuard
from torch._C._dynamo.guards import dict_version
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)
from torch.autograd import Function, forward_ad
from torch.autograd.graph import _engine_run_backward
from torch.fx._symbolic_trace import _autowrap_check, _patch_wrapped_functions, _Patcher
from torch.fx.graph_module import _forward_from_src as function_from_source
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.conv import _ConvNd as ConvBase
from torch.nn.modules.dropout import _DropoutNd as DropoutBase
from torch.nn.modules.instancenorm import _InstanceNorm as InstanceNormBase
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd as AdaptiveAvgPoolBase
from torch.nn.modules.pooling import _AdaptiveMaxPoolNd as AdaptiveMaxPoolBase
from torch.nn.modules.pooling import _AvgPoolNd as AvgPoolBase
from torch.nn.modules.pooling import _MaxPoolNd as MaxPoolBase
from torch.nn.utils.parametrizations import _SpectralNorm as SpectralNormParametrization
from torch.overrides import _get_current_function_mode_stack as function_mode_stack
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as disable_dispatch_modes

__all__ = [
    "AccumulateGrad",
    "AdaptiveAvgPoolBase",
    "AdaptiveMaxPoolBase",
    "AvgPoolBase",
    "BatchNormBase",
    "BelowAutograd",
    "CheckpointAsPlainCall",
    "ConvBase",
    "DataDependentOutputException",
    "DispatchKeyGuard",
    "DropoutBase",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "InstanceNormBase",
    "MaxPoolBase",
    "NormBase",
    "OpOverload",
    "OpOverloadPacket",
    "SpectralNormParametrization",
    "SymbolicTensors",
    "TorchDispatchMode",
    "UnsupportedOperatorException",
    "WrappedFunctions",
    "add_autograd_batch",
    "allow_size_one",
    "are_transforms_active",
    "backward_passes_in",
    "broadcast_prefix",
    "check_batch_size",
    "compile_package",
    "compile_state",
    "current_autograd_node",
    "current_backward_pass",
    "decompositions",
    "dict_version",
    "disable_dispatch_modes",
    "dispatch_mode_count",
    "excluded_dispatch_keys",
    "foreach_add",
    "foreach_add_",
    "foreach_lerp",
    "foreach_mul_",
    "foreach_sub",
    "foreach_sub_",
    "forward_mode_level",
    "function_from_source",
    "function_mode_stack",
    "gradients_in_modes",
    "has_global_forward_hooks",
    "has_global_hooks",
    "has_one_dnn_linear",
    "included_dispatch_keys",
    "intercepted_apply",
    "is_backward_graph_kept",
    "is_batched_by_autograd",
    "is_batched_by_vmap",
    "is_forward_mode_enabled",
    "is_profiling",
    "layer_functions",
    "level_of_autograd_batch",
    "linear_by_one_dnn",
    "proxies_disabled",
    "python_of_script",
    "pytree",
    "quiet_fake_tensors",
    "quiet_serializer",
    "record_aten",
    "remove_autograd_batch",
    "saved_tensors_hooks",
    "scan_steps",
    "sequence_number",
    "tracing_state",
    "unset_fake_temporarily",
    "without_compile_wrapper",
    "without_size_guards",
]

# Aliases, not wrapper functions: torch.compile recognises these objects.
AccumulateGrad: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]
are_transforms_active = torch._C._are_functorch_transforms_active
current_autograd_node = torch._C._current_autograd_node
current_backward_pass = torch._C._current_graph_task_id
dispatch_mode_count = torch._C._len_torch_dispatch_stack
included_dispatch_keys = torch._C._dispatch_tls_local_include_set
excluded_dispatch_keys = torch._C._dispatch_tls_local_exclude_set
is_batched_by_autograd = torch._C._functorch.is_legacy_batchedtensor
is_batched_by_vmap = torch._C._functorch.is_batchedtensor
is_forward_mode_enabled = forward_ad._is_fwd_grad_enabled
is_profiling = torch.autograd._profiler_enabled  # type: ignore[attr-defined]
layer_functions = torch._C._nn
_linear_pointwise = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks
tracing_state = torch._C._get_tracing_state
check_batch_size = nn.functional._verify_batch_size  # type: ignore[attr-defined]
broadcast_prefix = pytree._broadcast_to_and_flatten
foreach_add = torch._foreach_add
foreach_add_ = torch._foreach_add_
foreach_lerp = torch._foreach_lerp
foreach_mul_ = torch._foreach_mul_
foreach_sub = torch._foreach_sub
foreach_sub_ = torch._foreach_sub_
_MAX_AUTOGRAD_LEVELS = 64


def has_one_dnn_linear() -> bool:
    """Whether `linear_by_one_dnn` works in this build of torch, and oneDNN is not switched off."""
    return (
        _linear_pointwise is not None and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    )


def linear_by_one_dnn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`torch.nn.functional.linear` of float32 matrices by oneDNN; row-major or transposed ones, without gradients."""
    assert _linear_pointwise is not None
    y: torch.Tensor = _linear_pointwise.default(x, weight, bias, "none", [], "")
    return y


def level_of_autograd_batch(gradient: Any) -> tuple[int, int]:
    """Return the innermost level at which a tensor is batched by torch.autograd, and the size of the batch."""
    for level in range(_MAX_AUTOGRAD_LEVELS, 0, -1):
        # A tensor that is not batched at this level is expanded to the given size.
        first, second = (torch._remove_batch_dim(gradient, level, size, 0).shape[0] for size in (1, 2))
        if first == second:
            return level, first
    raise RuntimeError("the tensor is not batched by torch.autograd")


def remove_autograd_batch(gradient: Any, level: int, size: int) -> Any:
    """Return a tensor whose dimension 0 is the batch of a level; a tensor without this batch is expanded."""
    return torch._remove_batch_dim(gradient, level, size, 0)


def add_autograd_batch(gradient: Any, level: int) -> Any:
    """Make dimension 0 of a tensor its batch of a level."""
    return torch._add_batch_dim(gradient, 0, level)


def forward_mode_level() -> int:
    """Return the current level of forward-mode differentiation, or -1 outside of it."""
    return forward_ad._current_level


def sequence_number(node: Any) -> int:
    """Return the number of a node of an autograd graph; a thread counts the nodes that it makes."""
    return node._sequence_nr()  # type: ignore[no-any-return]


def gradients_in_modes(
    outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]
) -> tuple[torch.Tensor | None, ...]:
    """`torch.autograd.grad`, but active torch function modes see the Python code of the backward passes."""
    keep_graph, create_graph, allow_unused = False, False, True
    return _engine_run_backward(
        tuple(outputs), tuple(gradients), keep_graph, create_graph, tuple(inputs), allow_unused, accumulate_grad=False
    )


@contextlib.contextmanager
def backward_passes_in(mode: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    """Let a torch function mode see the Python code of backward passes, which `torch.autograd.grad` hides from it.

    Backward passes that other threads start meanwhile do not run in the mode.
    """
    functions: dict[str, Any] = vars(torch.autograd)
    original, thread = functions["_engine_run_backward"], threading.get_ident()

    def run(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return original(*args, **kwargs)
        with mode:
            return original(*args, **kwargs)

    functions["_engine_run_backward"] = run
    try:
        yield
    finally:
        functions["_engine_run_backward"] = original


class WrappedFunctions:
    """Records calls of functions that fx wraps: those of `torch.fx.wrap`, of `math`, and of a tracer's list.

    Args:
        function_ids: the identities of the functions to wrap, wherever `look_in` finds them.
    """

    def __init__(self, function_ids: set[int]) -> None:
        self._function_ids = function_ids
        self._patcher = _Patcher()

    def __enter__(self) -> WrappedFunctions:
        _patch_wrapped_functions(self._patcher)
        self.look_in(math.__dict__)
        return self

    def look_in(self, namespace: dict[str, Any]) -> None:
        """Wrap the functions in the globals of a module; a wrapped function records only if a proxy is passed."""
        _autowrap_check(self._patcher, namespace, self._function_ids)

    def __exit__(self, *exc_info: object) -> None:
        self._patcher.revert_all_patches()


def has_global_forward_hooks() -> bool:
    """Whether forward hooks or pre-hooks are registered for all modules."""
    return bool(nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks)


def decompositions() -> dict[Any, Any]:
    """Return torch's table of operator decompositions. The first call imports it."""
    from torch._decomp import decomposition_table

    return decomposition_table


def without_compile_wrapper(module: nn.Module) -> nn.Module | None:
    """Return the module that `torch.compile(module)` wrapped, or None if `module` is not such a wrapper."""
    # Not imported at the top: importing torch._dynamo takes a second, and making such a wrapper has imported it.
    wrapper = getattr(getattr(torch, "_dynamo", None), "OptimizedModule", None)
    return module._orig_mod if wrapper is not None and isinstance(module, wrapper) else None


def python_of_script(function: Any) -> Callable[..., Any] | None:
    """Return the Python function that torch.jit compiled, or None if the compiled one was loaded from a file."""
    return getattr(function, "_torchdynamo_inline", None)


def scan_steps(step: fx.GraphModule, carry: list[Any], x_seq: list[Any], constants: list[Any]) -> tuple[Any, ...]:
    """Call torch's `scan` operator: `(*carry, *x, *constants) -> (*carry, *y)` for each step: `(*carry, *y_seq)`.

    The function `torch._higher_order_ops.scan` would trace the step with Dynamo first.
    """
    from torch._higher_order_ops.scan import scan_op

    return tuple(scan_op(step, carry, x_seq, tuple(constants)))


def compile_package(program: Any, path: str, configs: dict[str, Any]) -> None:
    """Compile an exported program with AOTInductor and save it as a `.pt2` package."""
    torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=configs)


@contextlib.contextmanager
def quiet_serializer() -> Iterator[None]:
    """A context without the log messages of `torch.export.save` about the empty lists of a scan."""
    logger = logging.getLogger("torch._export.serde.serialize")

    def is_other(record: logging.LogRecord) -> bool:
        return "empty list" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


@contextlib.contextmanager
def quiet_fake_tensors() -> Iterator[None]:
    """A context without this thread's log of errors on fake tensors, for callers that raise them."""
    logger, thread = logging.getLogger("torch._subclasses.fake_tensor"), threading.get_ident()

    def is_loud(record: logging.LogRecord) -> bool:
        return record.thread != thread or record.levelno >= logging.CRITICAL

    logger.addFilter(is_loud)
    try:
        yield
    finally:
        logger.removeFilter(is_loud)


def proxies_disabled() -> contextlib.AbstractContextManager[Any]:
    """A context in which an enclosing `record_aten` records nothing."""
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    return disable_proxy_modes_tracing()


def record_aten(function: Callable[..., Any], arguments: Sequence[Any]) -> fx.GraphModule:
    """Record the ATen calls of a function on fake tensors; the other tensors that it reads become attributes.

    In Python's dispatcher, composite kernels with integer sizes such as that of `constant_pad_nd` have a symbolic form.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch.fx.experimental.proxy_tensor import make_fx

    with enable_python_dispatcher():
        return make_fx(function, tracing_mode="real", _allow_non_fake_inputs=True)(*arguments)


def without_size_guards() -> contextlib.AbstractContextManager[Any]:
    """A context in which tracing does not distinguish dynamic sizes from 0, 1 or each other where it need not."""
    from torch.fx.experimental import _config

    config: Any = _config
    return config.patch(backed_size_oblivious=True)  # type: ignore[no-any-return]


@contextlib.contextmanager
def compile_state(is_compiling: bool) -> Iterator[None]:
    """A context in which `torch.compiler.is_compiling()` has this value, in code that Dynamo does not trace."""
    compiler: Any = torch.compiler
    before, compiler._is_compiling_flag = compiler._is_compiling_flag, is_compiling
    try:
        yield
    finally:
        compiler._is_compiling_flag = before


def is_backward_graph_kept() -> bool:
    """Whether the backward pass that runs now in this thread was started with `retain_graph=True`."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def allow_size_one(program: Any) -> None:
    """Lower the smallest size of the dynamic axes of an exported program, and of their multiples, from 2 to 1."""
    for size, limits in program.range_constraints.items():
        smallest, one = (size.subs(dict.fromkeys(size.free_symbols, n)) for n in (2, 1))
        if limits.lower == smallest:
            program.range_constraints[size] = type(limits)(one, limits.upper)


class SymbolicTensors:
    """Makes fake tensors with symbolic sizes; as a context, tensors that are created inside are fake.

    Equal sizes of dynamic dimensions become one symbol. The context is quiet, as `quiet_fake_tensors`.
    """

    def __init__(self) -> None:
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        self.mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)

    def like(self, x: Any, dynamic: Collection[int]) -> Any:
        """A fake tensor whose `dynamic` dimensions are symbols."""
        from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

        kinds = [DimDynamic.DYNAMIC if d in dynamic else DimDynamic.STATIC for d in range(x.dim())]
        context: Any = StatelessSymbolicContext(dynamic_sizes=kinds)
        return self.mode.from_tensor(x, symbolic_context=context)

    def __enter__(self) -> None:
        self._quiet = quiet_fake_tensors()
        self._quiet.__enter__()
        self.mode.__enter__()

    def __exit__(self, *exc_info: Any) -> None:
        self.mode.__exit__(*exc_info)
        self._quiet.__exit__(*exc_info)


Wants = Callable[[tuple[Any, ...], dict[str, Any]], bool]
Replacement = Callable[[type[Function], tuple[Any, ...], dict[str, Any]], Any]


@contextlib.contextmanager
def intercepted_apply(wants: Wants, replacement: Replacement) -> Iterator[None]:
    """Replace calls `SomeFunction.apply(*args, **kwargs)` of autograd functions in this thread.

    This includes calls of bound methods that were stored before, `spike = SomeFunction.apply`, which a new attribute
    `apply` would not reach.

    Args:
        wants: whether a call with these arguments is replaced; all other calls run unchanged.
        replacement: is called with the class and the arguments of the call.
    """
    with (_code_of_apply if _HAS_PYTHON_APPLY else _lookup_of_forward)(wants, replacement):
        yield


_HAS_PYTHON_APPLY = isinstance(vars(Function)["apply"], classmethod)
"""False in torch 2.15, where C++ implements `apply` and looks `forward` up on the class."""

_NO_SETUP_CONTEXT = Function.setup_context


class _Interceptions(threading.local):
    """The active interceptions of a thread, innermost last."""

    def __init__(self) -> None:
        self.stack: list[tuple[Wants, Replacement]] = []


_interceptions = _Interceptions()
_count_lock = threading.Lock()


@contextlib.contextmanager
def _code_of_apply(wants: Wants, replacement: Replacement) -> Iterator[None]:
    """Intercept the calls of this thread; the code of `Function.apply` was replaced at import."""
    counts: Any = Function
    _interceptions.stack.append((wants, replacement))
    with _count_lock:
        counts.snnfx_interceptions += 1
    try:
        yield
    finally:
        with _count_lock:
            counts.snnfx_interceptions -= 1
        _interceptions.stack.pop()


class _InterceptableApply:
    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        """The code of `Function.apply`; it runs with the globals of torch's module."""
        super  # noqa: B018 - creates the cell `__class__` that torch's code has too; the number of cells must agree
        if cls.snnfx_interceptions:
            return cls.snnfx_intercepted_apply(args, kwargs)
        return cls.snnfx_original_apply(*args, **kwargs)


def _make_apply_interceptable() -> None:
    """Give the function `Function.apply` other code for good: every bound method refers to this function.

    The code tests one integer, then the interceptions of the calling thread. Nothing else in torch changes for good.
    """
    counts: Any = Function
    if hasattr(counts, "snnfx_interceptions"):
        return
    function = vars(Function)["apply"].__func__
    original = types.FunctionType(function.__code__, function.__globals__, closure=function.__closure__)

    def intercepted_apply(cls: type[Function], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stack = _interceptions.stack
        if stack and stack[-1][0](args, kwargs):
            return stack[-1][1](cls, args, kwargs)
        return original(cls, *args, **kwargs)

    counts.snnfx_interceptions = 0
    counts.snnfx_original_apply = classmethod(original)
    counts.snnfx_intercepted_apply = classmethod(intercepted_apply)
    function.__code__ = _InterceptableApply.apply.__code__


if _HAS_PYTHON_APPLY:
    _make_apply_interceptable()


@contextlib.contextmanager
def _lookup_of_forward(wants: Wants, replacement: Replacement) -> Iterator[None]:
    """Let the metaclass of autograd functions return another `forward` to `apply`.

    `apply` looks up `_backward_cls` on the class, disables gradients, looks up `forward` and calls it; then, if the
    class defines `setup_context`, it looks this up and calls it. All other lookups find the attributes of the class.
    """
    metaclass: Any = type(Function)
    outer = vars(metaclass).get("__getattribute__")
    thread = threading.get_ident()
    applied: Any = None  # the class whose `apply` looks up `forward` next
    replaced: Any = None  # the class whose `apply` looks up `setup_context` next, to no effect
    has_grad = True

    def get(cls: Any, name: str) -> Any:
        nonlocal applied, replaced, has_grad
        value = type.__getattribute__(cls, name)
        if name not in ("_backward_cls", "forward", "setup_context") or threading.get_ident() != thread:
            return value
        if name == "_backward_cls":
            applied, has_grad = cls, torch.is_grad_enabled()
        elif name == "forward" and cls is applied:
            applied = None
            return partial(forward, cls, value, has_grad)
        elif name == "setup_context" and cls is replaced:
            replaced = None
            return lambda *_: None
        return value

    def forward(cls: type[Function], original: Callable[..., Any], has_grad: bool, *args: Any) -> Any:
        nonlocal replaced
        has_context = type.__getattribute__(cls, "setup_context") is _NO_SETUP_CONTEXT
        operands = args[1:] if has_context else args
        if not wants(operands, {}):
            return original(*args)
        with torch.set_grad_enabled(has_grad):
            result = replacement(cls, operands, {})
        replaced = None if has_context else cls
        return result

    metaclass.__getattribute__ = get
    try:
        yield
    finally:
        if outer is None:
            del metaclass.__getattribute__
        else:
            metaclass.__getattribute__ = outer


_CHECKPOINT: Any = torch.utils.checkpoint
_CheckpointFunction = _CHECKPOINT.CheckpointFunction
_checkpoint_phases = _CHECKPOINT._checkpoint_without_reentrant_generator
_checkpoint_lock = threading.Lock()
_checkpoint_users = 0


class _OfThread(threading.local):
    depth = 0


_plain_checkpoint = _OfThread()


class _PlainCheckpointFunction:
    """Stands for the autograd function of `torch.utils.checkpoint.checkpoint(..., use_reentrant=True)`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_CheckpointFunction, name)

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        if _plain_checkpoint.depth:
            return function(*args)
        return _CheckpointFunction.apply(function, preserve_rng_state, *args)


def _plain_checkpoint_phases(*args: Any, **kwargs: Any) -> Iterator[None]:
    """Stands for the work of `checkpoint(..., use_reentrant=False)` before and after the call of the function."""
    return _no_phases() if _plain_checkpoint.depth else _checkpoint_phases(*args, **kwargs)


def _no_phases() -> Iterator[None]:
    yield  # a generator, since `checkpoint` throws the errors of the function into it


_plain_checkpoint_function = _PlainCheckpointFunction()


class CheckpointAsPlainCall:
    """Let `torch.utils.checkpoint.checkpoint(function, *args)` only call the function, in this thread.

    `checkpoint` finds both of its implementations among the globals of its module.
    """

    def __enter__(self) -> None:
        global _checkpoint_users
        with _checkpoint_lock:
            if not _checkpoint_users:
                _CHECKPOINT.CheckpointFunction = _plain_checkpoint_function
                _CHECKPOINT._checkpoint_without_reentrant_generator = _plain_checkpoint_phases
            _checkpoint_users += 1
        _plain_checkpoint.depth += 1

    def __exit__(self, *_: object) -> None:
        global _checkpoint_users
        _plain_checkpoint.depth -= 1
        with _checkpoint_lock:
            _checkpoint_users -= 1
            if not _checkpoint_users:
                _CHECKPOINT.CheckpointFunction = _CheckpointFunction
                _CHECKPOINT._checkpoint_without_reentrant_generator = _checkpoint_phases

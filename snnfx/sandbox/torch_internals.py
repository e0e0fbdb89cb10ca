"""Private names of torch that snnfx uses, under public names.

A private name may change in any release of torch. `tests/sandbox/test_torch_internals.py` states the contract of each
name below, so a release that breaks one fails there first, and only this module has to change. The same test lists
the private attributes of torch's objects that snnfx reads (`module._buffers`, `tensor._version`) with their contracts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._C import _AutoDispatchBelowAutograd as BelowAutograd
from torch._C import _ForceDispatchKeyGuard as DispatchKeyGuard
from torch._ops import OpOverloadPacket
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)
from torch.autograd import forward_ad
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
    "AdaptiveAvgPoolBase",
    "AdaptiveMaxPoolBase",
    "AvgPoolBase",
    "BatchNormBase",
    "BelowAutograd",
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
    "OpOverloadPacket",
    "SpectralNormParametrization",
    "TorchDispatchMode",
    "UnsupportedOperatorException",
    "are_transforms_active",
    "broadcast_prefix",
    "check_batch_size",
    "current_backward_pass",
    "decompositions",
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
    "has_global_forward_hooks",
    "has_global_hooks",
    "included_dispatch_keys",
    "is_batched_by_vmap",
    "is_forward_mode_enabled",
    "pytree",
    "saved_tensors_hooks",
    "tracing_state",
    "unset_fake_temporarily",
    "without_compile_wrapper",
]

# Aliases, not wrapper functions: torch.compile recognises these objects.
are_transforms_active = torch._C._are_functorch_transforms_active
current_backward_pass = torch._C._current_graph_task_id
dispatch_mode_count = torch._C._len_torch_dispatch_stack
included_dispatch_keys = torch._C._dispatch_tls_local_include_set
excluded_dispatch_keys = torch._C._dispatch_tls_local_exclude_set
is_batched_by_vmap = torch._C._functorch.is_batchedtensor
is_forward_mode_enabled = forward_ad._is_fwd_grad_enabled
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


def forward_mode_level() -> int:
    """Return the current level of forward-mode differentiation, or -1 outside of it."""
    return forward_ad._current_level


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

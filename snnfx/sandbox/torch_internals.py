"""Every private name of torch that snnfx uses, under a public name.

A private name may change in any release of torch. `tests/sandbox/test_torch_internals.py` states the contract of each
one, so a release that breaks it fails there first, and the name is replaced here only. Attributes that `nn.Module`
keeps in its instances (`_parameters`, `_buffers`, `_modules`, hooks) are part of its pickle format; they are used by
their names, and the same test states what they hold.
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

# Aliases, not functions around them: torch.compile knows these objects.
are_transforms_active = torch._C._are_functorch_transforms_active
current_backward_pass = torch._C._current_graph_task_id
dispatch_mode_count = torch._C._len_torch_dispatch_stack
included_dispatch_keys = torch._C._dispatch_tls_local_include_set
excluded_dispatch_keys = torch._C._dispatch_tls_local_exclude_set
is_batched_by_vmap = torch._C._functorch.is_batchedtensor
is_forward_mode_enabled = forward_ad._is_fwd_grad_enabled
saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks
tracing_state = torch._C._get_tracing_state
foreach_add = torch._foreach_add
foreach_add_ = torch._foreach_add_
foreach_lerp = torch._foreach_lerp
foreach_mul_ = torch._foreach_mul_
foreach_sub = torch._foreach_sub
foreach_sub_ = torch._foreach_sub_


def forward_mode_level() -> int:
    """The level of forward-mode differentiation that is active; -1 outside of it."""
    return forward_ad._current_level


def decompositions() -> dict[Any, Any]:
    """The operators that torch defines by other operators, each with its function. The first call imports them."""
    from torch._decomp import decomposition_table

    return decomposition_table


def without_compile_wrapper(module: nn.Module) -> nn.Module | None:
    """The module inside the wrapper that `torch.compile(module)` returns; None where `module` is no such wrapper."""
    # Not imported at the top: torch._dynamo takes a second, and whoever has such a wrapper has imported it.
    wrapper = getattr(getattr(torch, "_dynamo", None), "OptimizedModule", None)
    return module._orig_mod if wrapper is not None and isinstance(module, wrapper) else None

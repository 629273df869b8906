"""torch's private functions that we call: nothing else in the package names one, as a test sees to.

All were checked with torch 2.13.0, the version that CI runs. Where torch has public functions we call those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

CHECKED = "2.13.0"

if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    raise ImportError(f"lstm_ext needs torch 2.11 or newer for tensors, got {torch.__version__}")
try:
    from torch import _VF
    from torch._C import (
        _after_autograd_keyset,
        _any_requires_grad,
        _AutoDispatchBelowAutograd,
        _get_fp32_precision_getter,
        _get_tracing_state,
        _is_any_autocast_enabled,
        _len_torch_dispatch_stack,
        _len_torch_function_stack,
    )
    from torch._C._functorch import (
        TransformType,
        get_dynamic_layer_stack_depth,
        get_interpreter_stack,
        get_unwrapped,
        is_functorch_wrapped_tensor,
        is_legacy_batchedtensor,
        peek_interpreter_stack,
    )
    from torch._C._profiler import _RecordFunctionFast
    from torch._functorch.utils import enable_single_level_autograd_function
    from torch.autograd import forward_ad, profiler
    from torch.autograd.forward_ad import _current_level, _set_fwd_grad_enabled
    from torch.autograd.function import _SingleLevelFunction
    from torch.autograd.profiler import _is_profiler_enabled
    from torch.utils._pytree import tree_map

    compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)
    one_dnn_takes_bfloat16 = (
        torch.ops.mkldnn._is_mkldnn_bf16_supported if torch.backends.mkldnn.is_available() else lambda: False
    )
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"lstm_ext calls a private function that torch {torch.__version__} lacks; torch {CHECKED} has it: {error}"
    ) from error

del _current_level, _is_profiler_enabled  # they change: read as attributes of forward_ad and profiler


_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_to_compilers(function: _Function) -> _Function:
    """`torch.compiler.assume_constant_result`, which would import the compiler: as long again as torch itself takes."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def implicit_replication_allowed() -> bool:
    """Whether `torch.distributed.tensor.experimental.implicit_replication` is on."""
    from torch.distributed.tensor import DTensor

    return DTensor._op_dispatcher._allow_implicit_replication


__all__ = [
    "_VF",
    "TransformType",
    "_AutoDispatchBelowAutograd",
    "_RecordFunctionFast",
    "_SingleLevelFunction",
    "_after_autograd_keyset",
    "_any_requires_grad",
    "_get_fp32_precision_getter",
    "_get_tracing_state",
    "_is_any_autocast_enabled",
    "_len_torch_dispatch_stack",
    "_len_torch_function_stack",
    "_set_fwd_grad_enabled",
    "compiled_autograd_key",
    "constant_to_compilers",
    "enable_single_level_autograd_function",
    "forward_ad",
    "get_dynamic_layer_stack_depth",
    "get_interpreter_stack",
    "get_unwrapped",
    "implicit_replication_allowed",
    "is_functorch_wrapped_tensor",
    "is_legacy_batchedtensor",
    "one_dnn_takes_bfloat16",
    "peek_interpreter_stack",
    "profiler",
    "tree_map",
]

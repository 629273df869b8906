"""The compiled kernels on the CPU, for NumPy arrays and, from `take_tensors` on, for plain tensors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .._native import C
from ..call import CallTuple, GradsTuple, LayerCall, Needs, OutputGrads, OutputsTuple, Save, Saved

_num_threads: Callable[[], int] = int  # 0 leaves it to the core


def take_tensors(types: tuple[type, ...], num_threads: Callable[[], int], library: str) -> None:
    """From now on the core takes tensors.

    Args:
        types: exactly these; their subclasses mean more than their memory.
        num_threads: tells how many threads a call with tensors uses.
        library: what its OpenMP threads, if it has any, are shared of.
    """
    global _num_threads
    C.take_tensor_types(*types)
    C.share_openmp_threads(library)
    _num_threads = num_threads


def forward(call: CallTuple, save: Save) -> OutputsTuple:
    """See `Engine`."""
    return C.layer_forward(call, save, 0 if type(call[0]) is np.ndarray else _num_threads())


def backward(call: LayerCall, saved: Saved, grads: OutputGrads, needs: Needs) -> GradsTuple:
    """See `Engine`."""
    threads = 0 if type(call.x) is np.ndarray else _num_threads()
    return C.layer_backward(call, saved, grads, needs, threads)

"""The compiled kernels on the CPU, for NumPy arrays and, from `take_tensors` on, for plain tensors."""

from __future__ import annotations

from collections.abc import Callable

from .. import _native

if not _native.reason:
    forward, backward = _native.C.layer_forward, _native.C.layer_backward


def take_tensors(types: tuple[type, ...], num_threads: Callable[[], int], library: str) -> None:
    """From now on the core takes tensors.

    Args:
        types: exactly these; their subclasses mean more than their memory.
        num_threads: tells how many threads a call with tensors uses.
        library: what shares its OpenMP threads with the core, if it has any.
    """
    _native.C.take_tensor_types(types, num_threads)
    _native.C.share_openmp_threads(library)

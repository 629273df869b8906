"""Arrays of other libraries, such as JAX and CuPy: in and out by DLPack, without a copy.

The library of an array is the namespace that makes its kind, with a `from_dlpack`, such as `jax.numpy`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_CPU = 1  # DLPack's kDLCPU


def library_of(a: Any) -> Any:
    """The library that an array comes from; None if `a` is NumPy's or torch's, or cannot be exchanged."""
    if isinstance(a, np.ndarray) or not (hasattr(a, "__dlpack__") and hasattr(a, "__dlpack_device__")):
        return None
    if hasattr(a, "__array_namespace__"):
        library = a.__array_namespace__()
    else:
        library = sys.modules.get(type(a).__module__.partition(".")[0])
    return library if library is not sys.modules.get("torch") and hasattr(library, "from_dlpack") else None


def why_not(a: object) -> str:
    """Why something that looks like an array of another library cannot be exchanged, for the end of a message."""
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(a, jax.core.Tracer):
        return (
            ": jax.jit, grad and vmap do not see into lstm_ext; call it outside of them, or in jax.jit through "
            "jax.pure_callback on NumPy arrays"
        )
    exportable = hasattr(a, "__dlpack__") and not isinstance(a, np.ndarray)
    return ", whose library has no from_dlpack" if exportable and library_of(a) is None else ""


def _device_type(a: Any) -> Any:
    device = a.__dlpack_device__()
    if not isinstance(device, tuple) or len(device) != 2:
        raise TypeError(f"expected a pair from __dlpack_device__, got {device!r}")
    return device[0]


def _viewer(arrays: Mapping[str, Any]) -> Callable[[Any], Any]:
    """NumPy's `from_dlpack`, or torch's if an array is not on the CPU or is bfloat16, which NumPy lacks."""
    if all(str(a.dtype) != "bfloat16" and _device_type(a) == _CPU for a in arrays.values()):
        return np.from_dlpack
    try:
        import torch
    except ImportError as error:
        raise RuntimeError("lstm_ext needs torch for bfloat16 arrays and for those that are not on the CPU") from error
    return torch.utils.dlpack.from_dlpack


def take(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """NumPy arrays, or tensors, in the memory of the arrays given, which share one library.

    Raises:
        RuntimeError: their memory cannot be read.
    """
    name = ", ".join(arrays)
    try:
        view, views = _viewer(arrays), {}
        for name, a in arrays.items():
            views[name] = view(a)
    except Exception as error:  # of a foreign library, or what torch says of a device that it lacks: any kind
        raise RuntimeError(f"{name}: the memory cannot be read through DLPack: {error}") from error
    return views


def give(result: Any, like: Any) -> Any:
    """A NumPy array or tensor, or tuples of them, as arrays of the library of `like`, on its device."""
    if isinstance(result, tuple):
        return tuple(give(each, like) for each in result)
    from_dlpack = library_of(like).from_dlpack
    given = from_dlpack(result)
    device = getattr(like, "device", None)  # more than DLPack knows: JAX can have several CPU devices
    return given if getattr(given, "device", None) == device else from_dlpack(result, device=device)

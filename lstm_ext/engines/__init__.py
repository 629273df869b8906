"""The engines: each computes a layer in its own way, knows nothing of the others, and says what it cannot do.

Those that a caller can choose, the backends, are modules with the functions of `Engine`: `cuda`, `cpu` and `numpy`.
`composed`, `stock` and `onnx` step in where none of these serves; each has `forward` alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, Protocol

from .. import _native
from .._version import __version__
from .._warnings import warn as warn
from .._warnings import warn_once as warn_once
from ..call import DTYPES, CallTuple, GradsTuple, LayerCall, Needs, OutputGrads, OutputsTuple, Save, Saved
from . import logged

NAMES = ("cuda", "cpu", "numpy")
_refused_dtypes: dict[str, str] = {}  # of the CUDA kernels, and why
ENVIRONMENT = "LSTM_EXT_BACKEND"


class Engine(Protocol):
    """One backend: a module. Its functions take calls as they are and check them; a wrong one is an error.

    For `logged` it has `way(call, backward)` too: how a pass runs, and why so, in words.
    """

    def forward(self, call: CallTuple, save: Save) -> OutputsTuple:
        """The outputs; or NotImplemented, if an array is more than its memory, as a subclass of Tensor is."""

    def backward(self, call: LayerCall, saved: Saved, grads: OutputGrads, needs: Needs) -> GradsTuple:
        """The gradients of what `forward` computes with `Save.ALL`; or NotImplemented, as there."""


@dataclass(frozen=True)
class Backend:
    """One way to compute: whether it can run in this process, and if not, why."""

    name: str
    available: bool
    reason: str


@dataclass(frozen=True)
class Choice:
    """The backend that runs and its engine, or None where there is none; and why each preferred one was refused."""

    name: str | None
    engine: Engine | None
    refused: tuple[tuple[str, str], ...]

    @property
    def reason(self) -> str:
        """The refusals as text."""
        return "; ".join(f"{name}: {why}" for name, why in self.refused)


def build_info() -> dict[str, Any]:
    """What this installation is.

    Returns:
        version; native, whether the compiled core is loaded; if not, the reason. If it is, also compiler; simd_built,
        simd_available and simd: the SIMD levels in it, those that this machine has, and the one in use; cuda, whether
        the CUDA kernels are in it, and if so cuda_archs and cudart (13000 for 13.0), else
        cuda_reason.

    Raises:
        ValueError: LSTM_EXT_SIMD names no level.

    Example:
        >>> lstm_ext.build_info()["version"] == lstm_ext.__version__
        True
    """
    if _native.reason:
        return {"version": __version__, "native": False, "reason": _native.reason}
    return {"version": __version__, "native": True, **_native.C.build_info()}


@cache
def _reason(name: str) -> str:
    """Why a backend cannot run in this process; "" if it can."""
    if name == "numpy":
        return ""
    if _native.reason or name == "cpu":
        return _native.reason
    return _native.C.gpus()[1]


def backends() -> dict[str, Backend]:
    """What computes here: the backends in the order in which they are preferred.

    Returns:
        For each of the names "cuda", "cpu" and "numpy" an object with `.available` and, where that is False, `.reason`.

    Example:
        >>> lstm_ext.backends()["numpy"]
        Backend(name='numpy', available=True, reason='')
    """
    return {name: Backend(name, not _reason(name), _reason(name)) for name in NAMES}


def _known(name: str, origin: str) -> str:
    """`name` if it can run here; otherwise an error that names those that can."""
    if name in NAMES and not _reason(name):
        return name
    available = ", ".join(repr(each) for each in NAMES if not _reason(each))
    if name not in NAMES:
        raise ValueError(f"{origin}: expected one of the available backends {available}, got {name!r}")
    raise RuntimeError(f"{origin}: backend {name!r} is not available ({_reason(name)}); available: {available}")


forced: ContextVar[str | None] = ContextVar("lstm_ext_backend", default=None)  # by `use_backend`


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs everything inside the `with` block, in this thread or task, on one backend.

    Args:
        name: "cuda", "cpu" or "numpy".

    Raises:
        ValueError: no backend has this name.
        RuntimeError: the backend is not available; or, in the block, it cannot serve a tensor's device or dtype.

    Example:
        >>> with lstm_ext.use_backend("numpy"):
        ...     y, state = lstm_ext.lstm(np.ones((5, 2, 3)), None, np.ones((16, 3)), np.ones((16, 4)))
        >>> y.shape
        (5, 2, 4)
    """
    token = forced.set(_known(name, "use_backend"))
    try:
        yield
    finally:
        forced.reset(token)


@cache
def _from_environment() -> str | None:
    name = os.environ.get(ENVIRONMENT)
    return _known(name, ENVIRONMENT) if name else None


@cache
def _check_simd() -> None:
    """Says so where LSTM_EXT_SIMD asks for more than this machine has; of an unknown name the core makes an error."""
    wanted, used = os.environ.get("LSTM_EXT_SIMD"), _native.C.build_info()["simd"]
    if wanted and wanted != used:
        warn_once(f"LSTM_EXT_SIMD: this machine has no {wanted}; lstm_ext uses {used}")


def _refusal(name: str, device: str, dtype: str) -> str:
    """Why the backend does not serve tensors of this device type and dtype; "" if it does."""
    served = "cuda" if name == "cuda" else "cpu"
    if device != served:
        return f"serves {served} tensors, not {device}"
    if dtype not in DTYPES:
        return f"expected dtype {', '.join(sorted(DTYPES))}, got {dtype}"
    return _reason(name) or (_refused_dtypes.get(dtype, "") if name == "cuda" else "")


def _engine(name: str) -> Engine:
    """Imports one: `cuda` imports torch."""
    if name == "cuda":
        from . import cuda

        cuda.tell_refusal = refuse_on_gpu
        return cuda
    from . import cpu, numpy

    return cpu if name == "cpu" else numpy


@lru_cache
def choose_under(name: str | None, device: str, dtype: object) -> Choice:
    """`choose` where `use_backend` has forced this name, or none."""
    required = name or _from_environment()
    refused: list[tuple[str, str]] = []
    for name in (required,) if required else NAMES:
        why = _refusal(name, device, str(dtype).removeprefix("torch."))
        if not why and name == "numpy" and not required and str(dtype).startswith("torch."):
            why = "computes tensors where it is asked for: torch is faster"
        if not why:
            if name == "cpu":
                _check_simd()
            choice = Choice(name, _engine(name), tuple(refused))
            if not logged.ON:
                return choice
            others = "; ".join(f"{n}: {why}" for n, why in refused if (n == "cuda") == (device == "cuda"))
            return replace(choice, engine=logged.Logged(name, choice.engine, "asked for" if required else others))
        refused.append((name, why))
    choice = Choice(None, None, tuple(refused))
    if required and device != "meta":  # there shapes alone are asked for, of whichever backend
        raise RuntimeError(f"x: the backend asked for cannot run this ({choice.reason})")
    return choice


def choose(device: str, dtype: object) -> Choice:
    """The backend for tensors of a device type ("cpu", "cuda", …) and a NumPy or torch dtype.

    Raises:
        RuntimeError: `use_backend` or LSTM_EXT_BACKEND forces one that cannot serve them.
    """
    return choose_under(forced.get(), device, dtype)


def refuse_on_gpu(dtype: object, why: str) -> None:
    """From now on no CUDA kernel is chosen for this dtype: on this machine they fail their self-checks."""
    _refused_dtypes[str(dtype).removeprefix("torch.")] = why
    choose_under.cache_clear()

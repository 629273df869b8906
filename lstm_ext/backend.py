"""Which code computes: the backends of this process, why the others do not serve, and how a caller forces one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from . import _native

NAMES = ("cuda", "cpu", "numpy")
DTYPES = frozenset({"float32", "float64", "bfloat16", "float16"})
ENVIRONMENT = "LSTM_EXT_BACKEND"


@dataclass(frozen=True)
class Backend:
    """One way to compute: whether it can run in this process, and if not, why."""

    name: str
    available: bool
    reason: str


@dataclass(frozen=True)
class Choice:
    """The backend that runs, or None where there is none; and why each preferred one was refused."""

    name: str | None
    refused: tuple[tuple[str, str], ...]

    @property
    def reason(self) -> str:
        """The refusals as text."""
        return "; ".join(f"{name}: {why}" for name, why in self.refused)


def build_info() -> dict[str, Any]:
    """What this installation is: its version, whether the native core loaded (if not, why), and how that was built."""
    from . import __version__

    if _native.C is None:
        return {"version": __version__, "native": False, "reason": _native.reason}
    return {"version": __version__, "native": True, **_native.C.build_info()}


@cache
def _reason(name: str) -> str:
    """Why a backend cannot run in this process; "" if it can."""
    if name == "numpy":
        return ""
    if _native.C is None:
        return _native.reason
    if name == "cpu":
        return ""
    why_no_gpu: str = _native.C.gpus()[1]
    return why_no_gpu


def backends() -> dict[str, Backend]:
    """The backends "cuda", "cpu" and "numpy", each with `.available` and, where it is not, `.reason`."""
    return {name: Backend(name, not _reason(name), _reason(name)) for name in NAMES}


def _known(name: str, origin: str) -> str:
    """`name` if it can run here; otherwise an error that names those that can."""
    if name in NAMES and not _reason(name):
        return name
    available = ", ".join(repr(each) for each in NAMES if not _reason(each))
    if name not in NAMES:
        raise ValueError(f"{origin}: expected one of the available backends {available}, got {name!r}")
    raise RuntimeError(f"{origin}: backend {name!r} is not available ({_reason(name)}); available: {available}")


_forced: ContextVar[str | None] = ContextVar("lstm_ext_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs everything inside the `with` block, in this thread or task, on one backend.

    Args:
        name: "cuda", "cpu" or "numpy".

    Raises:
        ValueError: no backend has this name.
        RuntimeError: the backend is not available; or, in the block, it cannot serve a tensor's device or dtype.
    """
    token = _forced.set(_known(name, "use_backend"))
    try:
        yield
    finally:
        _forced.reset(token)


@cache
def _from_environment() -> str | None:
    name = os.environ.get(ENVIRONMENT)
    return _known(name, ENVIRONMENT) if name else None


def _refusal(name: str, device: str, dtype: str) -> str:
    """Why the backend does not serve tensors of this device type and dtype; "" if it does."""
    served = "cuda" if name == "cuda" else "cpu"
    if device != served:
        return f"serves {served} tensors, not {device}"
    if dtype not in DTYPES:
        return f"expected dtype {', '.join(sorted(DTYPES))}, got {dtype}"
    return _reason(name)


@lru_cache
def _choose(forced: str | None, device: str, dtype: object) -> Choice:
    forced = forced or _from_environment()
    refused: list[tuple[str, str]] = []
    for name in (forced,) if forced else NAMES:
        if not (why := _refusal(name, device, str(dtype).removeprefix("torch."))):
            return Choice(name, tuple(refused))
        refused.append((name, why))
    choice = Choice(None, tuple(refused))
    if forced:
        raise RuntimeError(f"x: the backend asked for cannot run this ({choice.reason})")
    return choice


def choose(device: str, dtype: object) -> Choice:
    """The backend for tensors of a device type ("cpu", "cuda", …) and a NumPy or torch dtype.

    Raises:
        RuntimeError: `use_backend` or LSTM_EXT_BACKEND forces one that cannot serve them.
    """
    return _choose(_forced.get(), device, dtype)


@cache
def warn_once(message: str) -> None:
    """Warns at the first call with this message."""
    warnings.warn(message, stacklevel=2)

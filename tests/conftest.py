from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import lstm_ext
from lstm_ext import _native

BACKENDS = [name for name in ("cpu", "numpy") if lstm_ext.backends()[name].available]  # those for CPU tensors and NumPy
GPU_LIMIT = 120  # s: a test on a GPU that takes longer hangs

needs_native = pytest.mark.skipif(_native.C is None, reason=f"no compiled kernels: {_native.reason}")


def why_no_gpu() -> str:
    """Why tests marked `gpu` cannot run here; "" if they can."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    # A build that has the kernels but cannot use them is no reason to skip: there the tests fail.
    return "" if lstm_ext.build_info().get("cuda") else lstm_ext.backends()["cuda"].reason


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = why_no_gpu() if marked else ""
    if reason:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"needs an NVIDIA GPU and the CUDA kernels: {reason}"))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on each."""
    with lstm_ext.use_backend(request.param):
        yield request.param


def count_runs(engine: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often an engine ran forward and backward since."""
    counts = {"forward": 0, "backward": 0}

    def counted(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def count_and_run(*arguments: Any) -> Any:
            counts[name] += 1
            return run(*arguments)

        return count_and_run

    for name in counts:
        monkeypatch.setattr(engine, name, counted(name, getattr(engine, name)))
    return counts


@pytest.fixture(autouse=True)
def _seed_torch() -> None:
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture(scope="session")
def terminal(pytestconfig: pytest.Config) -> int:
    """Where standard error went before pytest took it."""
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        return os.dup(2)


@pytest.fixture
def _no_hang(terminal: int) -> Iterator[None]:
    """A hang ends the run and says where: the process cannot go on with a GPU that never comes back."""
    faulthandler.dump_traceback_later(GPU_LIMIT, exit=True, file=terminal)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def _exact_products() -> Iterator[None]:
    """torch multiplies float32 as float32, and sums half types in float32, as TOLERANCES have it."""
    import torch

    matmul = torch.backends.cuda.matmul
    names = ("allow_tf32", "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    switches = [(torch.backends.cudnn, "allow_tf32"), *((matmul, name) for name in names)]
    before = [getattr(module, name) for module, name in switches]
    for module, name in switches:
        setattr(module, name, False)
    yield
    for (module, name), value in zip(switches, before, strict=True):
        setattr(module, name, value)

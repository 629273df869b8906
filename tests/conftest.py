from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import lstm_ext
from lstm_ext import _native

BACKENDS = [name for name in ("cpu", "numpy") if lstm_ext.backends()[name].available]  # those for CPU tensors and NumPy

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

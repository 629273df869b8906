from __future__ import annotations

import sys

import pytest


def why_no_gpu() -> str:
    """Why tests marked `gpu` cannot run here; "" if they can."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    import lstm_ext

    # A build that has the kernels but cannot use them is no reason to skip: there the tests fail.
    return "" if lstm_ext.build_info().get("cuda") else lstm_ext.backends()["cuda"].reason


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = why_no_gpu() if marked else ""
    if reason:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"needs an NVIDIA GPU and the CUDA kernels: {reason}"))


@pytest.fixture(autouse=True)
def _seed_torch() -> None:
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)

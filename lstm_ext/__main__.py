"""`python -m lstm_ext`: what this installation is, and whether its kernels compute rightly on this machine."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np

from . import _native, backends, build_info, reference

# (T, B, I, H, P or 0, directions, lengths, resets)
SHAPES = (
    (1, 1, 1, 1, 0, reference.FORWARD, False, False),
    (7, 5, 13, 33, 0, reference.BOTH, False, True),
    (9, 17, 31, 67, 0, reference.REVERSE, True, True),
    (6, 3, 65, 129, 31, reference.BOTH, True, False),
)
EPSILON = {"float32": 2.0**-23, "float64": 2.0**-52, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def _torch() -> Any:
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return None
    importlib.import_module("lstm_ext.ops")  # from its import on the native module takes tensors
    return torch


def _describe(torch: Any) -> Iterator[str]:
    """One line per fact."""
    info = build_info()
    yield f"lstm_ext {info.pop('version')}, Python {sys.version.split()[0]}, NumPy {np.__version__}, " + (
        "no torch" if torch is None else f"torch {torch.__version__}"
    )
    for name, value in info.items():
        yield f"  {name}: {', '.join(map(str, value)) if isinstance(value, (tuple, list)) else value}"
    gpus, why_none = ([], _native.reason) if _native.C is None else _native.C.gpus()
    yield f"  gpus: {', '.join(gpus) or f'none ({why_none})'}"
    for backend in backends().values():
        yield f"backend {backend.name}: {'available' if backend.available else f'not available ({backend.reason})'}"


def _inputs(shape: tuple[Any, ...]) -> tuple[list[Any], tuple[Any, ...], list[Any]]:
    """The arrays x, h0, c0 and the weights; the masks of a layer; and gradients of its outputs: random float64."""
    T, B, I, H, P, directions, with_lengths, with_resets = shape  # noqa: E741
    rng = np.random.default_rng(0)
    D, width = 2 if directions == reference.BOTH else 1, P or H
    shapes = [(4 * H, I), (4 * H, width), (4 * H,), (4 * H,)] + ([(P, H)] if P else [])
    weights = [rng.uniform(-1, 1, each) / np.sqrt(H) for each in shapes * D]
    states = [(T, B, I), (D, B, width), (D, B, H)]
    gradients = [(T, B, D * width), (D, B, width), (D, B, H), (D, T, B, H)]
    lengths = rng.integers(0, T + 1, B) if with_lengths else None
    resets = rng.random((T, B)) < 0.2 if with_resets else None
    return (
        [rng.standard_normal(each) for each in states] + weights,
        (lengths, resets, None, directions, False),
        [rng.standard_normal(each) for each in gradients],
    )


def _run(module: Any, arrays: list[Any], masks: tuple[Any, ...], gradients: list[Any], threads: tuple[int, ...]) -> Any:
    """All outputs and gradients of `module.layer_forward` and `module.layer_backward`."""
    x, h0, c0, *weights = arrays
    y, h_n, c_n, cells, gates = module.layer_forward(x, h0, c0, weights, *masks, 2, *threads)
    dx, dh0, dc0, dweights = module.layer_backward(
        *gradients, x, h0, c0, weights, y, cells, gates, *masks, 15, *threads
    )
    return [y, h_n, c_n, cells, gates, dx, dh0, dc0, *dweights]


def _to_float64(a: Any) -> Any:
    return a.astype(np.float64) if isinstance(a, np.ndarray) else a.double().numpy()


def _error(module: Any, convert: Callable[..., Any], shape: tuple[Any, ...], threads: tuple[int, ...]) -> float:
    """The largest error against the float64 oracle, relative to the largest element of its array, or to 1."""
    arrays, masks, gradients = _inputs(shape)
    rounded = [convert(a) for a in arrays]
    kept = [convert(a) for a in gradients[:3]] + [convert(gradients[3], cells=True)]
    own_masks = (*(None if a is None else convert(a, mask=True) for a in masks[:2]), *masks[2:])
    actual = _run(module, rounded, own_masks, kept, threads)
    expected = _run(reference, [_to_float64(a) for a in rounded], masks, [_to_float64(a) for a in kept], ())
    errors = [
        float(np.abs(_to_float64(a) - e).max()) / max(1.0, float(np.abs(e).max()))
        for a, e in zip(actual, expected, strict=True)
        if e.size
    ]
    return max(errors) if np.isfinite(errors).all() else float("inf")


def _numpy_converter(dtype: str) -> Callable[..., Any]:
    def convert(a: Any, mask: bool = False, cells: bool = False) -> Any:
        return a if mask else a.astype(np.promote_types(dtype, np.float32) if cells else dtype)

    return convert


def _torch_converter(torch: Any, dtype: str) -> Callable[..., Any]:
    kept = torch.promote_types(getattr(torch, dtype), torch.float32)

    def convert(a: Any, mask: bool = False, cells: bool = False) -> Any:
        tensor = torch.from_numpy(a)
        return tensor if mask else tensor.to(kept if cells else getattr(torch, dtype))

    return convert


def _checks(torch: Any) -> Iterator[tuple[str, bool, float]]:
    """(what is checked, whether it passes, its error in ulps of the dtype) for each available backend."""
    kinds: list[tuple[str, Any, str, Callable[..., Any], tuple[int, ...]]] = []
    for dtype in ("float32", "float64", "float16"):
        if dtype != "float64":  # that is the oracle
            kinds.append(("numpy", reference, dtype, _numpy_converter(dtype), ()))
        if backends()["cpu"].available:
            kinds.append(("cpu, NumPy arrays", _native.C, dtype, _numpy_converter(dtype), (0,)))
    if torch is not None and backends()["cpu"].available:
        for dtype in EPSILON:
            kinds.append(("cpu, torch tensors", _native.C, dtype, _torch_converter(torch, dtype), (0,)))
    for (name, module, dtype, convert, threads), shape in product(kinds, SHAPES):
        T, B, I, H, P, *_ = shape  # noqa: E741
        ulps = _error(module, convert, shape, threads) / EPSILON[dtype]
        # The longest sum has 4H, T * B or I + H terms; its rounding errors add up like a random walk.
        allowed = 4 + max(4 * H, T * B, I + H) ** 0.5
        yield f"{name}, {dtype}, T={T} B={B} I={I} H={H} P={P}", ulps <= allowed, ulps


def main() -> int:
    """Prints the report; 0 if every check passes, else 1."""
    torch = _torch()
    for line in _describe(torch):
        print(line)
    failed = 0
    for name, passed, ulps in _checks(torch):
        print(f"{'pass' if passed else 'FAIL'}  {name}: {ulps:.1f} ulp")
        failed += not passed
    print(f"{failed} checks failed" if failed else "all checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m lstm_ext`: what this installation is, and whether its kernels compute rightly on this machine."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from . import __version__, _native, backends, build_info, reference
from .call import BOTH, REVERSE
from .engines import choose
from .testing import TOLERANCES, Case, assert_all_close, largest_error, make_inputs, run_layer, run_oracle

CASES = (
    Case(1, 1, 1, 1),
    Case(7, 5, 13, 33, directions=BOTH, resets=True),
    Case(9, 17, 31, 67, directions=REVERSE, lengths="with_zero", resets=True),
    Case(6, 3, 65, 129, P=31, directions=BOTH, lengths="with_zero"),
)


def _torch() -> Any:
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return None
    importlib.import_module("lstm_ext.torch_op")  # from its import on the native module takes tensors
    return torch


def _describe(torch: Any) -> Iterator[str]:
    """One line per fact."""
    info = build_info()
    yield f"lstm_ext {info.pop('version')}, Python {sys.version.split()[0]}, NumPy {np.__version__}, " + (
        "no torch" if torch is None else f"torch {torch.__version__}"
    )
    for name, value in info.items():
        yield f"  {name}: {', '.join(map(str, value)) if isinstance(value, (tuple, list)) else value}"
    if not _native.reason:
        gpus, why_none = _native.C.gpus()
        yield f"  gpus: {', '.join(gpus) or f'none ({why_none})'}"
    for backend in backends().values():
        why = "the reason above" if backend.reason == _native.reason else backend.reason
        yield f"backend {backend.name}: {'available' if backend.available else f'not available ({why})'}"


def _check(engine: Any, case: Case, dtype: str, tensors: bool) -> tuple[bool, float]:
    """Whether the engine is as near to the oracle as it must be, and its largest error in ulps of the dtype."""
    inputs = make_inputs(case, dtype)
    actual, expected = run_layer(engine, inputs.to_torch(dtype) if tensors else inputs), run_oracle(inputs)
    pairs = [(a, theirs[name]) for ours, theirs in zip(actual, expected, strict=True) for name, a in ours.items()]
    ulps = max(largest_error(a, e) for a, e in pairs) / TOLERANCES[dtype].epsilon
    try:
        assert_all_close(actual, expected, case, dtype)
    except AssertionError:
        return False, ulps
    return True, ulps


def _checks(torch: Any) -> Iterator[tuple[str, bool, str]]:
    """(what is checked, whether it passes, its error) for each available backend."""
    numpy_dtypes = [dtype for dtype in TOLERANCES if dtype != "bfloat16"]
    kinds = [("numpy", reference, dtype) for dtype in numpy_dtypes if dtype != "float64"]  # float64 is the oracle
    if backends()["cpu"].available:
        kinds += [("cpu, NumPy arrays", _native.C, dtype) for dtype in numpy_dtypes]
        kinds += [("cpu, torch tensors", _native.C, dtype) for dtype in TOLERANCES if torch is not None]
    for name, engine, dtype in kinds:
        for case in CASES:
            what = f"{name}, {dtype}, T={case.T} B={case.B} I={case.I} H={case.H} P={case.P}"
            passed, ulps = _check(engine, case, dtype, "torch" in name)
            yield what, passed, f"{ulps:.1f} ulp"
    if torch is not None and backends()["cuda"].available:
        for device in range(torch.cuda.device_count()):
            yield from _kernel_checks(device)


def _kernel_checks(device: int) -> Iterator[tuple[str, bool, str]]:
    """The same for each kernel of a GPU, as before its first launch."""
    self_check = importlib.import_module("lstm_ext.self_check")
    for way, kernel in self_check.ways(device):
        try:
            finding = self_check.run(way, device)
        except RuntimeError as refusal:
            yield f"cuda:{device}, {kernel}, {way}", False, str(refusal)
        else:
            said = f"{100 * finding.share:.0f} % of the tolerance"
            yield f"cuda:{device}, {kernel}, {way}", not finding.wrong, said


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report; 0 if every check passes and no kernels are missing that should be there, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m lstm_ext",
        description="Prints what this installation of lstm_ext is, and checks each backend of this machine, and each "
        "kernel of its GPUs, against float64, in a few seconds.",
        epilog="Exit status: 0 if all checks pass; 1 if one fails, or if the CPU kernels are not in use though this "
        "installation should have them.",
    )
    parser.add_argument("--version", action="version", version=f"lstm_ext {__version__}")
    parser.parse_args(arguments)
    torch = _torch()
    try:  # what the environment variables ask for
        choose("cpu", "float32")
        lines = list(_describe(torch))
    except (RuntimeError, ValueError) as error:
        print(f"lstm_ext: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    failed = 0
    for name, passed, said in _checks(torch):
        print(f"{'pass' if passed else 'FAIL'}  {name}: {said}")
        failed += not passed
    print(f"{failed} checks failed" if failed else "all checks passed")
    if _native.missing:
        print("but the CPU kernels are not in use, for the reason above")
    return 1 if failed or _native.missing else 0


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends this process as it does others
    sys.exit(main())

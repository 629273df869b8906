"""`python -m lstm_ext`: what this installation is, whether it computes rightly on this machine, how, and how fast."""

from __future__ import annotations

import argparse
import importlib
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from . import __version__, _native, backends, build_info, plan, quick_bench, reference
from .call import BOTH, DTYPES, REVERSE
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
    if torch is not None and choose("cpu", torch.float32).name is None:
        yield "tensors on the CPU: torch's own LSTM computes them"


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


# Commands ------------------------------------------------------------------------------------------------------------


def _wrapped(line: str, indent: int) -> str:
    """For a terminal by its width; as it is for other programs."""
    if not sys.stdout.isatty():
        return line
    width = shutil.get_terminal_size().columns
    return textwrap.fill(line, width, subsequent_indent=" " * indent, break_on_hyphens=False)


def info(_arguments: argparse.Namespace) -> int:
    """Prints what this installation is."""
    for line in _describe(_torch()):
        print(_wrapped(line, 6))
    return 0


def check(_arguments: argparse.Namespace) -> int:
    """Prints the checks; 0 if all pass and no kernels are missing that should be there."""
    failed = 0
    for name, passed, said in _checks(_torch()):
        print(_wrapped(f"{'pass' if passed else 'FAIL'}  {name}: {said}", 6))
        failed += not passed
    print(f"{failed} checks failed" if failed else "all checks passed")
    if _native.missing:
        why = "for the reason above" if _arguments.command is None else f"as {_native.reason}"
        print(f"but the CPU kernels are not in use, {why}")
    return 1 if failed or _native.missing else 0


def info_and_check(arguments: argparse.Namespace) -> int:
    """Both, one after the other."""
    return info(arguments) or check(arguments)


def show_plan(arguments: argparse.Namespace) -> int:
    """Prints a plan, a line for each fact."""
    asked = vars(arguments)
    names = ("input_size", "proj_size", "dtype", "bidirectional", "backward", "num_threads", "strategy", "device")
    found = plan(arguments.T, arguments.B, arguments.H, **{name: asked[name] for name in names})
    facts = asdict(found)
    reasons = facts.pop("why", None) or {f"not {name}": why for name, why in facts.pop("refused").items()}
    for name, value in facts.items():
        if value is None:
            continue
        why = f" ({reasons.pop(name)})" if name in reasons else ""
        shown = f"{value:.3g}" if isinstance(value, float) else value
        print(_wrapped(f"{name:22} {shown}{why}", 23))
    for name, why in reasons.items():
        print(_wrapped(f"{name:22} {why}", 23))
    return 0


def bench(arguments: argparse.Namespace) -> int:
    """Prints times as they are measured; 0 if all rows agree with float64."""
    torch = _torch()
    if arguments.device == "cuda" and (torch is None or not backends()["cuda"].available):
        raise RuntimeError(f"--device cuda: {'torch is missing' if torch is None else backends()['cuda'].reason}")
    other = "NumPy" if torch is None else "torch"
    num_threads = 0 if torch is None else torch.get_num_threads()
    where = arguments.device + (f", {num_threads} thread{'s' * (num_threads > 1)}" if num_threads else "")
    print(f"Microseconds of a layer, float32, {where}; medians of rounds in turn")
    print(f"{'T':>5}{'B':>5}{'I = H':>7}  {'work':10}{'lstm_ext':>12}{other:>12}{f'{other} / lstm_ext':>20}")
    total, wrong, unsteady = quick_bench.count(torch), 0, 0
    for n, row in enumerate(quick_bench.rows(torch, arguments.device)):
        _show_progress(0, 0)
        sizes = f"{row.case.T:>5}{row.case.B:>5}{row.case.H:>7}  {row.work:10}"
        if row.agrees:
            ratio = row.theirs / row.ours
            mark = "" if row.steady else " ~"
            print(f"{sizes}{row.ours * 1e6:>12.1f}{row.theirs * 1e6:>12.1f}{ratio:>20.2f}{mark}", flush=True)
        else:
            print(f"{sizes}  WRONG: its results are too far from float64", flush=True)
        wrong += not row.agrees
        unsteady += not row.steady
        _show_progress(n + 1, total)
    _show_progress(0, 0)
    if unsteady:
        print("~: unsteady, as other programs take the processors")
    print("A quick look. benchmarks/run.py in the sources has more rows, peers and floors.")
    return 1 if wrong else 0


def _show_progress(done: int, total: int) -> None:
    """Draws a bar on stderr, or wipes it out where the total is 0; nothing where no terminal is."""
    if sys.stderr.isatty():
        width = 40
        filled = width * done // total if total else 0
        bar = f"{'#' * filled}{'.' * (width - filled)} {done}/{total}" if total else " " * (width + 10)
        print(f"\r{bar}\r", end="", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lstm_ext",
        description="Tells what this installation of lstm_ext is, and checks each backend of this machine, and each "
        "kernel of its GPUs, against float64, in a few seconds: `info`, then `check`.",
        epilog="Exit status: 0 if all is well; 1 if a check fails, if something asked for is not there, or if the CPU "
        "kernels are not in use though this installation should have them; 2 for wrong arguments.",
    )
    parser.add_argument("--version", action="version", version=f"lstm_ext {__version__}")
    parser.set_defaults(run=info_and_check)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        added.set_defaults(run=run)
        return added

    command("info", info, "versions, build, GPUs and backends")
    command("check", check, "hold each backend, and each kernel of the GPUs, against float64")
    planning = command("plan", show_plan, "how a layer would run on a device, and why so")
    for name, text in (("T", "time steps"), ("B", "sequences"), ("H", "units (hidden_size)")):
        planning.add_argument(name, type=int, help=text)
    planning.add_argument("--input-size", type=int, metavar="I", help="default: H")
    planning.add_argument("--proj-size", type=int, default=0, metavar="P", help="default: no projection")
    planning.add_argument("--dtype", default="float32", choices=sorted(DTYPES), help="default: float32")
    planning.add_argument("--bidirectional", action="store_true", help="both directions")
    planning.add_argument("--backward", action="store_true", help="the backward pass")
    planning.add_argument("--num-threads", type=int, default=0, metavar="N", help="of the CPU, at most")
    planning.add_argument("--strategy", help="of a GPU: block, cluster, grid or step; default: the one that is chosen")
    planning.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 …, or a name such as H100")
    benching = command("bench", bench, "time a few layers beside torch's, in some seconds")
    benching.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command, and returns its exit status."""
    asked = _parser().parse_args(arguments)
    try:
        choose("cpu", "float32")  # what the environment variables ask for
        return int(asked.run(asked))
    except (RuntimeError, ValueError) as error:
        print(f"lstm_ext: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends this process as it does others
    sys.exit(main())

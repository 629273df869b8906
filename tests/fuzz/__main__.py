"""A fuzzer: `python tests/fuzz --cases 10000` tries the installed package with valid calls, and with spoilt ones.

A valid call has to give what the reference does in float64; a wrong one has to raise what is documented, or to give
some result; neither may change its inputs, take longer than a minute, or end the process. Cases run in a child process,
so that one that ends it is lost alone, and told by its number: `--seed S --case N` runs it again, here. LSTM_EXT_SIMD
picks the SIMD level; under sanitizers it runs as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

MOST_MEMORY = 4 << 30  # that a case may take
PATIENCE = 60  # seconds without a result


def work(seed: int, first: int, last: int) -> None:
    """In the child: runs cases, and writes the outcome of each as a line."""
    import resource

    from cases import run

    warnings.simplefilter("ignore")
    if "asan" not in os.environ.get("LD_PRELOAD", "") and sys.platform == "linux":  # a sanitizer has limits of its own
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_MEMORY, resource.RLIM_INFINITY))
    results = os.dup(1)
    os.dup2(2, 1)
    for n in range(first, last):
        try:
            outcome = run(seed, n)
        except Exception as error:
            what = traceback.format_exception_only(error)[0].splitlines()[0]  # what follows may be whole arrays
            outcome = f"wrong\n{what}\n{traceback.format_exc()}"
        os.write(results, json.dumps(outcome).encode() + b"\n")


class Child:
    """A process that works on cases from `first` on."""

    def __init__(self, seed: int, first: int, last: int):
        command = [sys.executable, __file__, "--seed", str(seed), "--work", str(first), str(last)]
        self.said = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.said, bufsize=0)
        self.rest = b""

    def outcomes(self) -> list[str] | None:
        """Those that have come; None if no more will."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
            self.process.kill()
            return None
        came = self.process.stdout.read(1 << 16)
        *lines, self.rest = (self.rest + came).split(b"\n")
        return [json.loads(line) for line in lines] if came else None

    def end(self) -> str:
        """How it ended, and what it said."""
        status = self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.said.seek(0)
        with self.said as said:
            return f"ended with {status}\n{said.read().decode(errors='replace')[-6000:]}"


def fuzz(seed: int, cases: int, seconds: float, record: Path | None) -> dict[str, Any]:
    """Runs them, or goes on where the record ends; returns what came out."""
    from tqdm import tqdm

    state: dict[str, Any] = {"seed": seed, "simd": os.environ.get("LSTM_EXT_SIMD", ""), "next": 0, "seconds": 0.0}
    state |= {"right": 0, "refused": 0, "accepted": 0, "wrong": [], "lost": []}
    if record is not None and record.exists():
        state = json.loads(record.read_text())
        if state["seed"] != seed:
            raise SystemExit(f"{record} is of the seed {state['seed']}")
    began, before = time.monotonic(), state["seconds"]

    def save() -> None:
        state["seconds"] = before + time.monotonic() - began
        if record is not None:
            written = record.with_suffix(".part")
            written.write_text(json.dumps(state, indent=1))
            written.replace(record)  # whole, whenever this process ends

    with tqdm(total=cases, initial=state["next"], unit="case", mininterval=1, disable=None) as bar:
        while state["next"] < cases and time.monotonic() - began < seconds:
            child = Child(seed, state["next"], cases)
            while time.monotonic() - began < seconds:
                outcomes = child.outcomes()
                if outcomes is None:
                    break
                for outcome in outcomes:
                    kind, _, why = outcome.partition("\n")
                    if kind == "wrong":
                        state["wrong"].append([state["next"], why])
                        bar.write(f"--seed {seed} --case {state['next']} is wrong: {why.splitlines()[0]}")
                    else:
                        state[kind] += 1
                    state["next"] += 1
                bar.update(state["next"] - bar.n)
                save()
            else:
                child.process.kill()
                child.end()
                break
            how = child.end()
            if how.startswith("ended with 1\n"):  # not in a case
                raise SystemExit(how)
            if state["next"] < cases:
                state["lost"].append([state["next"], how])
                bar.write(f"--seed {seed} --case {state['next']} is lost: {how}")
                state["next"] += 1
                save()
    return state


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after these (default: no limit)")
    parser.add_argument("--seed", type=int, default=0, help="of all cases (default: %(default)s)")
    parser.add_argument("--case", type=int, metavar="N", help="run this one alone, in this process")
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="write the figures there, and go on where they end",
    )
    parser.add_argument("--work", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.seed, *options.work)
        return 0
    if options.case is not None:
        from cases import run

        print(run(options.seed, options.case))
        return 0
    state = fuzz(options.seed, options.cases, options.seconds, options.record)
    bad = len(state["wrong"]) + len(state["lost"])
    counts = {name: state[name] for name in ("right", "refused", "accepted")}
    print(f"{state['next']} cases: {counts}, {len(state['wrong'])} wrong, {len(state['lost'])} lost")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

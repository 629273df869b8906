"""Two builds of this package timed in turn, each in a process of its own, at one SIMD level."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .cases import Case
from .rows import Row

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("turns_worker.py")
HERE = "."  # the working tree, in place of a revision
ROUNDS = 6


def _git(*arguments: str) -> bytes:
    done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True)
    if done.returncode:
        raise ValueError(done.stderr.decode().strip().splitlines()[-1])
    return done.stdout


def commit_of(revision: str) -> str:
    """The full name of a commit; `HERE` as it is.

    Raises:
        ValueError: there is no such commit.
    """
    return HERE if revision == HERE else _git("rev-parse", "--verify", f"{revision}^{{commit}}").decode().strip()


def build(commit: str, folder: Path) -> Path:
    """The package of a commit, installed in the folder, and there for the next time; the working tree is built anew.

    Raises:
        ValueError: it cannot be built; with the end of what pip said.
    """
    target = folder / ("here" if commit == HERE else commit)
    if commit != HERE and target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        source, made = ROOT, Path(unfinished) / "made"
        if commit != HERE:
            source = Path(unfinished) / "source"
            source.mkdir()
            subprocess.run(["tar", "-x", "-C", source], input=_git("archive", commit), check=True)
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--upgrade", "--target", target]
        if commit != HERE:
            command[-1] = made
        done = subprocess.run([*command, source], env=os.environ | {"LSTM_EXT_BUILD": "cpu"}, capture_output=True)
        if done.returncode:
            raise ValueError(f"{commit}: cannot be built\n{done.stderr.decode()[-2000:]}")
        if commit != HERE:
            made.rename(target)  # whole, or not there
    return target


class Worker:
    """A process with one build, which does as it is told."""

    def __init__(self, package: Path, level: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(package), "LSTM_EXT_SIMD": level}
        self._process = subprocess.Popen(
            [sys.executable, WORKER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, question: Any) -> Any:
        """Its answer.

        Raises:
            RuntimeError: what it raised; or that it has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(question), file=self._process.stdin, flush=True)
            answer = json.loads(self._process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError) as error:
            raise RuntimeError(f"the process has ended with status {self._process.wait()}") from error
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def workers(packages: Sequence[Path], level: str) -> Iterator[list[Worker]]:
    """One for each package."""
    started: list[Worker] = []
    try:
        for package in packages:
            started.append(Worker(package, level))
        yield started
    finally:
        for worker in started:
            worker.end()


def measure(case: Case, by_name: dict[str, Worker], seconds: float) -> Row:
    """The times of each, so many seconds in all: short blocks in turn, first A B, then B A."""
    row = Row(case)
    ready = {}
    for name, worker in by_name.items():
        try:
            worker.ask(asdict(case))
            ready[name] = worker
        except RuntimeError as error:
            row.errors[name] = str(error)
    times: dict[str, list[float]] = {name: [] for name in ready}
    for n in range(ROUNDS):
        for name in list(ready)[:: 1 if n % 2 == 0 else -1]:
            times[name] += ready[name].ask(seconds / ROUNDS)
    for name, samples in times.items():
        low, middle, high = np.percentile(samples, [25, 50, 75])
        row.us[name], row.spread[name] = float(middle), float(high - low)
    return row

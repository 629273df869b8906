"""Stages: commands that run one after the other, each with a share of one time limit; what each did is kept as it ends.

Needs nothing but Python, as it runs before anything is installed.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LEFT_OUT = 77  # the exit status of a command for which there is nothing to do here; its last line says why
GRACE = 8.0  # s, between the interrupt that a command may answer and the end of its process group
KEPT = "stages.json"
NO_TIME = "no time left"

Command = Sequence[str]


def no_text() -> str:
    return ""


@dataclass(frozen=True)
class Stage:
    """Commands that run until one fails, with the output of all in NAME.log; files of theirs are called NAME.*, too.

    It takes `seconds` as a rule; `commands` is told how many there are. `said` sums it up (else the last line of the
    log does), `finds` says what is wrong although no command failed.
    """

    name: str
    purpose: str
    seconds: float
    commands: Callable[[float], Sequence[Command]]
    environment: Mapping[str, str] = field(default_factory=dict)
    needs_gpu: bool = True
    counts: bool = True  # a failure is one of the whole
    left_out: str = ""  # why
    said: Callable[[], str] = no_text
    finds: Callable[[], str] = no_text


@dataclass
class Record:
    """What became of a stage: ok, FAILED, left out, interrupted, or, where a failure does not count, see log."""

    name: str
    outcome: str
    seconds: float
    why: str = ""
    said: str = ""
    commands: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return self.outcome in ("FAILED", "interrupted")


def share(stages: Sequence[Stage], left: float) -> float:
    """How many of the seconds that are left the first of the stages may take.

    What it takes as a rule, also where the last ones then get none; more where there is more than all take, in
    proportion. What a stage leaves goes to the rest.
    """
    first, total = stages[0], sum(stage.seconds for stage in stages if not stage.left_out)
    return min(left, max(first.seconds, left * first.seconds / total))


def signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Asks the process and all that it started to end, and ends them."""
    try:
        signal_group(process, signal.SIGINT)
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        pass
    finally:  # also at a second interrupt
        signal_group(process, signal.SIGKILL)
        process.wait()


def run_command(
    command: Command, log: Any, environment: Mapping[str, str], folder: Path, end: float, tick: Callable[[], None]
) -> int | None:
    """Its exit status; None where the time was over."""
    in_a_line = shlex.join(command).replace("\n", "; ")
    log.write(f"$ {in_a_line}\n".encode())
    log.flush()
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
    try:
        process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **options)
    except OSError as error:
        log.write(f"{error}\n".encode())
        return 127
    try:
        while time.monotonic() < end:
            with suppress(subprocess.TimeoutExpired):
                status = process.wait(0.2)
                signal_group(process, signal.SIGKILL)  # what it left running would disturb the next
                return status
            tick()
    except BaseException:
        stop(process)
        raise
    stop(process)
    return None


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip() and not line.startswith("$ ")), "")


def run_stage(
    stage: Stage, seconds: float, folder: Path, environment: Mapping[str, str], tick: Callable[[], None]
) -> Record:
    start, log = time.monotonic(), folder / f"{stage.name}.log"
    for old in folder.glob(f"{stage.name}.*"):
        old.unlink()
    record = Record(stage.name, "ok", 0.0)
    with log.open("wb") as output:
        try:
            for command in stage.commands(seconds):
                record.commands.append(shlex.join(command))
                status = run_command(
                    command, output, {**environment, **stage.environment}, folder, start + seconds, tick
                )
                if status:
                    record.outcome, record.why = "FAILED", f"status {status}"
                elif status is None:
                    record.outcome, record.why = "FAILED", f"time limit of {seconds:.0f} s"
                if status != 0:
                    break
        except KeyboardInterrupt:
            record.outcome = "interrupted"
    record.seconds = round(time.monotonic() - start, 1)
    record.said = stage.said() or last_line(log)
    if record.why == f"status {LEFT_OUT}":
        record.outcome, record.why = "left out", ""
    elif record.outcome == "ok" and (finds := stage.finds()):
        record.outcome, record.why = "FAILED", finds
    if record.outcome == "FAILED" and not stage.counts:
        record.outcome = "see log"
    return record


def run_stages(
    stages: Sequence[Stage],
    folder: Path,
    end: float,
    environment: Mapping[str, str],
    tick: Callable[[], None] = lambda: None,
) -> Iterator[Record]:
    """Yields each stage's record as it ends, the last one where it is interrupted; `end` is of time.monotonic().

    Those for which there is not half the time that they take are left out, unless it is the first.
    """
    began = False
    for n, stage in enumerate(stages):
        if stage.left_out:
            yield Record(stage.name, "left out", 0.0, said=stage.left_out)
            continue
        seconds = share(stages[n:], end - time.monotonic())
        if seconds <= 0 or (began and seconds < stage.seconds / 2):
            yield Record(stage.name, "left out", 0.0, NO_TIME)
            continue
        began = True
        record = run_stage(stage, seconds, folder, environment, tick)
        yield record
        if record.outcome == "interrupted":
            return


def kept(folder: Path) -> dict[str, dict[str, Any]]:
    """The records that runs have left in the folder, by name."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return {record["name"]: record for record in json.loads((folder / KEPT).read_text())["stages"]}
    return {}


def keep(folder: Path, meta: Mapping[str, Any], records: Sequence[Record]) -> None:
    """Writes the records; those of an earlier run stay, of stages that did not run this time."""
    all_records = kept(folder) | {record.name: asdict(record) for record in records}
    unfinished = folder / f"{KEPT}.new"
    unfinished.write_text(json.dumps({"meta": dict(meta), "stages": list(all_records.values())}, indent=1) + "\n")
    unfinished.replace(folder / KEPT)


def had_time(record: Mapping[str, Any]) -> bool:
    """Whether a stage came to its turn and its end."""
    return record["outcome"] != "interrupted" and record["why"] != NO_TIME

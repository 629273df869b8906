"""Tests whose outcomes are kept as they end: a plugin of pytest, and a program that goes on where pytest broke off.

    python -m lstm_bench.pytest_log FILE PYTEST-ARGUMENT...

FILE gets a line of JSON as a test begins, and one as it ends. A hang ends the process, and after some errors a GPU has
no other answer: either costs its own test alone, since pytest is started again for those that have not begun.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

LOST = "lost the GPU"
BEGAN, ENDED = "began", "ended"  # the latter of pytest itself
TEXT = 1500  # characters of a failure's last lines


# ---- The plugin ------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--log-tests", type=Path, metavar="FILE", help="keep each test's outcome as it ends")


def pytest_configure(config: Any) -> None:
    if path := config.getoption("--log-tests"):
        config.pluginmanager.register(Log(path))


def gpu_answers() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


class Log:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._begun = {test.name for test in read(path)[0]}

    def _write(self, **event: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(event) + "\n")

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        begun = [item for item in items if item.nodeid in self._begun]
        config.hook.pytest_deselected(items=begun)
        items[:] = [item for item in items if item.nodeid not in self._begun]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(test=nodeid, outcome=BEGAN)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            text = report.longreprtext[-TEXT:] if report.failed else ""
            self._write(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 3), text=text)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if not gpu_answers():
            self._write(test=nodeid, outcome=LOST)
            import pytest

            pytest.exit(f"after {nodeid} the GPU has no other answer", returncode=1)

    def pytest_sessionfinish(self) -> None:
        if gpu_answers():
            self._write(outcome=ENDED)


# ---- The file --------------------------------------------------------------------------------------------------------


@dataclass
class Test:
    name: str
    outcome: str
    seconds: float = 0.0
    text: str = ""

    __test__ = False  # for pytest: not one of its classes

    @property
    def fate(self) -> str:
        return "never ended" if self.outcome == BEGAN else self.outcome


def read(path: Path) -> tuple[list[Test], bool]:
    """Each test with the last that is known of it, and whether pytest has ended as it should; but for torn lines."""
    tests: dict[str, Test] = {}
    ended = False
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        ended = event["outcome"] == ENDED
        if name := event.pop("test", ""):
            tests[name] = replace(tests.get(name, Test(name, "")), **event)
    return list(tests.values()), ended


def wrong(tests: Sequence[Test]) -> list[Test]:
    return [test for test in tests if test.outcome not in ("passed", "skipped")]


def summary(path: Path) -> str:
    """How many tests came to which end, and which took longest; "" where none has begun."""
    tests = read(path)[0]
    if not tests:
        return ""
    counts = Counter(test.fate for test in tests)
    slowest = max(tests, key=lambda test: test.seconds)
    text = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    return f"{text}; longest {slowest.seconds:.1f} s, {slowest.name.rpartition('::')[2]}"


# ---- The program -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Runs pytest until each test has begun, or none begins any more; 0 if some passed and none failed."""
    path, options, interrupts = Path(arguments[0]), arguments[1:], []
    # pytest answers an interrupt with its summary; this process waits for that. (A handler is not handed down.)
    signal.signal(signal.SIGINT, lambda *_: interrupts.append(1))
    begun, ended, turn = -1, False, 0
    while not (ended or interrupts) and len(read(path)[0]) > begun:
        begun, turn = len(read(path)[0]), turn + 1
        kept = ["-p", "lstm_bench.pytest_log", f"--log-tests={path}", f"--junitxml={path.with_suffix(f'.{turn}.xml')}"]
        subprocess.Popen([sys.executable, "-m", "pytest", *kept, *options]).wait()
        ended = read(path)[1]
    tests = read(path)[0]
    return 130 if interrupts else int(not tests or bool(wrong(tests)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

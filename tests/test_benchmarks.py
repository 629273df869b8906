"""benchmarks/: what is printed, written and answered, apart from the times themselves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

for library in ("torch", "rich", "tqdm"):
    pytest.importorskip(library)

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are not beside the tests", allow_module_level=True)

SIZES = {"T": 5, "B": 1, "I": 8, "H": 8, "P": 0, "layers": 1, "directions": 1, "threads": 1, "busy": 0}
KIND = {"suite": "custom", "mode": "inference", "dtype": "float32", "device": "cpu"}
ROW: dict[str, Any] = {**KIND, **SIZES, "floor_us": None, "errors": {}, "skipped": {}}
META = {"cpu": "a", "gpu": None, "cores": 2, "ceilings": {}}


def start(program: str, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(BENCHMARKS / program), *arguments]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(program: str, *arguments: str, cwd: Path) -> tuple[int, str, str]:
    """Exit status, output and errors."""
    process = start(program, *arguments, cwd=cwd)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def write(path: Path, times: dict[str, float], spread: float) -> str:
    row = {**ROW, "us": times, "spread": {arm: spread * us for arm, us in times.items()}}
    path.write_text(json.dumps({"meta": META, "rows": [row]}))
    return str(path)


@pytest.mark.parametrize("program", ["compare.py", "plot.py"])
@pytest.mark.parametrize("content", [None, "folder", "", '{"meta": {}, "rows": [{}]}'])
def test_a_bad_result_is_answered_in_a_line(tmp_path: Path, program: str, content: str | None) -> None:
    if program == "plot.py":
        pytest.importorskip("matplotlib")
    path = tmp_path / "result.json"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_text(content)
    names = [str(path)] * (2 if program == "compare.py" else 1)
    status, output, errors = run(program, *names, cwd=tmp_path)
    assert (status, output) == (2, "")
    assert errors.startswith(f"{program}: {path}: ")
    assert errors.count("\n") == 1


def test_compare_tells_slower_from_noise(tmp_path: Path) -> None:
    before, steady, unsteady = (
        write(tmp_path / f"{us}{spread}.json", {"lstm_ext": us}, spread)
        for us, spread in ((10.0, 0.01), (20.0, 0.01), (20.0, 0.9))
    )
    assert run("compare.py", before, steady, cwd=tmp_path)[0] == 1
    assert run("compare.py", before, unsteady, cwd=tmp_path)[0] == 0


@pytest.mark.parametrize(
    ("option", "size", "least"), [("--hidden", "0", 1), ("--threads", "two", 1), ("--proj", "-1", 0)]
)
def test_sizes_that_no_layer_has_are_refused(tmp_path: Path, option: str, size: str, least: int) -> None:
    status, output, errors = run("run.py", option, size, cwd=tmp_path)
    assert (status, output) == (2, "")
    assert f"argument {option}: expected a whole number from {least} on, got '{size}'" in errors


@pytest.mark.parametrize("path", ["missing/result.json", "."])
def test_where_results_cannot_be_written_is_said_before_the_first_row(tmp_path: Path, path: str) -> None:
    status, output, errors = run("run.py", "--json", path, cwd=tmp_path)
    assert (status, output) == (2, "")
    assert f"argument --json: expected a file that can be written, got '{path}'" in errors


def test_a_run_prints_lines_that_a_file_can_hold(tmp_path: Path) -> None:
    few = ["--batch", "1", "2", "--hidden", "8", "--steps", "2", "--threads", "1", "--arms", "lstm_ext", "torch"]
    status, output, errors = run("run.py", *few, "--seconds", "0.01", "--json", "r.json", cwd=tmp_path)
    assert (status, errors) == (0, "")
    assert [line for line in output.splitlines() if line != line.rstrip() or len(line) > 80] == []
    assert "Targets" not in output
    content = json.loads((tmp_path / "r.json").read_text())
    assert len(content["rows"]) == 2
    assert content["meta"]["other_processes"] >= 0


def test_an_interrupt_leaves_the_rows_done_so_far(tmp_path: Path) -> None:
    few = ["--batch", "1", "2", "3", "--hidden", "8", "--steps", "2", "--threads", "1", "--arms", "lstm_ext"]
    process = start("run.py", *few, "--seconds", "60", "--json", "r.json", cwd=tmp_path)
    end = time.monotonic() + 100
    while time.monotonic() < end and not measures(process.pid):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted after 0 of 3 rows." in output
    assert json.loads((tmp_path / "r.json").read_text())["rows"] == []


def measures(pid: int) -> bool:
    """Whether the ceilings are being measured, in a process of their own."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    if not children.exists():
        pytest.skip("needs /proc")
    for child in children.read_text().split():
        try:
            if os.readlink(f"/proc/{child}/exe").endswith("/ceilings"):
                return True
        except OSError:
            continue
    return False


def parts() -> tuple[Any, Any, Any]:
    """The modules ceilings, report and rows of the benchmark tool."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from lstm_bench import ceilings, report, rows
    finally:
        sys.path.remove(str(BENCHMARKS))
    return ceilings, report, rows


def test_unsteady_times_are_marked(tmp_path: Path) -> None:
    _, report, rows = parts()
    for spread, marked in ((0.1, False), (0.5, True)):
        write(tmp_path / "r.json", {"lstm_ext": 1.0, "torch": 3.0}, spread)
        _, [row] = rows.load(tmp_path / "r.json")
        console = report.Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        report.show(console, report.results([row]))
        report.notes(console, [row])
        [column] = [c for c in report.results([row]).columns if c.header == "ratio"]
        assert ("?" in next(iter(column.cells))) == marked
        assert ("marks 2 of 2 times as unsteady" in console.export_text()) == marked


def test_weights_beyond_a_cache_are_read_from_it_as_far_as_it_holds_them() -> None:
    ceilings, _, _ = parts()
    levels = [{"name": "L1", "bytes": 1000, "read_gbs": 4.0}, {"name": "memory", "bytes": None, "read_gbs": 1.0}]
    measured = {"levels": levels}
    assert ceilings.read_us(measured, 1000, 1000) == pytest.approx(0.25)
    assert ceilings.read_us(measured, 3000, 3000) == pytest.approx(0.25 + 2)
    assert ceilings.read_us(measured, 3000, 1500) == pytest.approx((0.25 + 2) / 2)
    assert ceilings.read_us(measured, 0, 0) == 0


def test_the_best_measurement_is_a_ceiling() -> None:
    ceilings, _, _ = parts()

    def measured(speed: float) -> dict[str, Any]:
        level = {"name": "L1", "bytes": 8, "read_gbs": speed}
        return {"fma_gflops": {"float32": speed}, "barrier_us": 1 / speed, "levels": [level]}

    assert ceilings.better(measured(1), measured(2)) == ceilings.better(measured(2), measured(1)) == measured(2)

"""benchmarks/: what is printed, written and answered, apart from the times themselves."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import needs_native

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
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, **pipes, preexec_fn=hear_interrupts)


def hear_interrupts() -> None:
    """Who starts the tests in the background lets them ignore interrupts, which programs would inherit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


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


# A package that takes so many seconds for a call, and may be wrong.
BUILD = """
import time, torch
from torch.nn import LSTMCell
class LSTM(torch.nn.LSTM):
    def forward(self, x, state=None):
        time.sleep({seconds})
        y, state = super().forward(x, state)
        return y + {wrong}, state
"""


def test_commits_are_timed_in_turn(tmp_path: Path) -> None:
    turns, cases = module("lstm_bench.turns"), module("lstm_bench.cases")
    packages = [tmp_path / name for name in ("fast", "slow", "wrong")]
    for package, seconds, wrong in zip(packages, (0.001, 0.004, 0), (0, 0, 1), strict=True):
        (package / "lstm_ext").mkdir(parents=True)
        (package / "lstm_ext" / "__init__.py").write_text(BUILD.format(seconds=seconds, wrong=wrong))
    case = cases.Case("custom", "inference", T=2, B=1, I=3, H=4)
    with turns.workers(packages, "baseline") as workers:
        row = turns.measure(case, dict(zip(("fast", "slow", "wrong"), workers, strict=True)), 0.05)
        training = turns.measure(cases.Case("custom", "compiled", T=2, B=1, I=3, H=4), {"fast": workers[0]}, 0.05)
    assert set(row.us) == {"fast", "slow"}
    assert row.us["fast"] > 1000
    assert row.us["slow"] > 4000
    assert "not close" in row.errors["wrong"]
    assert training.errors == {"fast": "ValueError: not timed in turn: compiled"}


def test_what_is_no_commit_is_named(tmp_path: Path) -> None:
    turns = module("lstm_bench.turns")
    if not (turns.ROOT / ".git").exists():
        pytest.skip("no repository is around the tests")
    assert len(turns.commit_of("HEAD")) == 40
    status, output, errors = run("compare.py", "no-such-commit", ".", cwd=tmp_path)
    assert (status, output) == (2, "")
    assert errors.startswith("compare.py: ")
    assert run("compare.py", "one.json", "HEAD", cwd=tmp_path)[0] == 2


def test_workloads_are_shown_by_their_names(tmp_path: Path) -> None:
    works = ("voice activity", "amplifier model")
    arguments = ("--suite", *works, "--threads", "1", "--seconds", "0.01", "--arms", "lstm_ext", "torch", "--targets")
    status, output, errors = run("run.py", *arguments, "--json", "rows.json", cwd=tmp_path)
    assert status == 0, errors
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["suite"] for row in rows] == list(works)
    assert all(word in output for work in works for word in work.split())
    assert "workloads" in output  # of the targets, and no other that is for the whole grid
    assert "whole grid" not in output


def test_options_are_timed_beside_the_plain_layer_and_a_loop_in_torch(tmp_path: Path) -> None:
    """All of them are right, masks included."""
    names = list(module("lstm_bench.cases").OPTIONS)
    sizes = ("--batch", "3", "--steps", "4", "--hidden", "9", "--threads", "1", "--mode", "inference", "training")
    arguments = ("--options", "", *names, *sizes, "--seconds", "0.001", "--arms", "lstm_ext", "torch", "torch-loop")
    status, output, errors = run("run.py", *arguments, "--json", "rows.json", cwd=tmp_path)
    assert status == 0, errors
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["options"] for row in rows] == 2 * ["", *names]
    for row in rows:
        assert row["errors"] == {}
        assert set(row["us"]) == {"lstm_ext", "torch-loop" if row["options"] else "torch"}
    assert [line for line in output.splitlines() if len(line) > 80] == []
    assert all(f"{name} " in output.partition("over the plain layer")[2] for name in names)


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


def wait_for(happened: Callable[[], bool], seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def test_a_run_that_is_killed_leaves_the_rows_done_so_far(tmp_path: Path) -> None:
    few = ["--batch", "1", "2", "3", "--hidden", "8", "--steps", "2", "--threads", "1", "--arms", "lstm_ext"]
    process, result = start("run.py", *few, "--seconds", "0.5", "--json", "r.json", cwd=tmp_path), tmp_path / "r.json"
    wait_for(result.exists)
    process.kill()
    process.communicate(timeout=60)
    _, _, rows = parts()
    _, done = rows.load(result)
    assert 1 <= len(done) < 3
    assert done[0].us["lstm_ext"] > 0


def test_how_far_arms_are_from_float64_is_recorded(tmp_path: Path) -> None:
    few = ["--hidden", "8", "--steps", "4", "--threads", "1", "--arms", "lstm_ext", "torch", "--seconds", "0.01"]
    few += ["--mode", "inference", "training", "--dtype", "float32", "bfloat16", "--errors", "--json", "r.json"]
    status, output, _ = run("run.py", *few, cwd=tmp_path)
    assert status == 0
    assert "‖error‖" in output
    bounds = {"float32": (1e-9, 1e-5), "bfloat16": (1e-4, 1e-1)}
    for row in json.loads((tmp_path / "r.json").read_text())["rows"]:
        kinds = {"outputs", "gradients"} if row["mode"] == "training" else {"outputs"}
        least, most = bounds[row["dtype"]]
        for arm in ("lstm_ext", "torch"):
            assert row["deviations"][arm].keys() == kinds
            assert all(least < value < most for value in row["deviations"][arm].values()), row["deviations"]


def test_predictions_stand_beside_what_was_measured() -> None:
    _, report, rows = parts()
    case = module("lstm_bench.cases").Case("gpu_strategies", "steps", 100, 16, 64, 64, dtype="bfloat16", device="cuda")
    plans = {name: {"strategy": name, "microseconds_per_step": 2.5} for name in ("block", "grid")}
    row = rows.Row(case, us={"lstm_ext": 150.0, "lstm_ext-block": 150.0, "lstm_ext-grid": 75.0})
    row.plans = {"lstm_ext": plans["block"], **{f"lstm_ext-{name}": plan for name, plan in plans.items()}}
    row.errors["lstm_ext-cluster"] = "wrong"
    assert report.strategies([rows.Row(case)]) is None
    cells = {column.header: next(iter(column.cells)) for column in report.strategies([row]).columns}
    assert cells["block"] == "1.50 / 2.50*"  # planned
    assert cells["grid"] == "[green]0.750 / 2.50 [/]"  # fastest
    assert "error" in cells["cluster"]


def test_the_floor_counts_tiles_where_they_can_pay() -> None:
    ceilings, cases = module("lstm_bench.ceilings"), module("lstm_bench.cases")

    def floor(T: int, B: int, tiles: float, read_gbs: float = 100.0) -> float:
        peaks = {"float32": 100.0, "float64": 50.0, "tiles": tiles}
        levels = [{"name": "memory", "bytes": None, "read_gbs": read_gbs}]
        machine = {"1": {"fma_gflops": peaks, "barrier_us": 0.5, "levels": levels}}
        return ceilings.floor_us(cases.Case("custom", "inference", T, B, 512, 512), machine)

    assert floor(1, 4, tiles=1e4) == floor(1, 4, tiles=0)  # packing for one step takes longer than vectors do
    assert floor(50, 1, tiles=1e4) > 0.7 * floor(50, 1, tiles=0)  # a step reads the weights for one row
    assert floor(50, 64, tiles=1e4) < 0.2 * floor(50, 64, tiles=0)
    another_tile = floor(1000, 17, tiles=1e4, read_gbs=1e4) / floor(1000, 16, tiles=1e4, read_gbs=1e4)
    assert another_tile > 1.3


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


def module(name: str) -> Any:
    """Of the benchmark tool, such as lstm_bench.report."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


@needs_native
def test_simulated_threads_have_all_of_the_work() -> None:
    scaling, ceilings = module("scaling"), {"fma_gflops": {"float32": 100.0}, "barrier_us": 0.1}
    ceilings["levels"] = [{"name": "memory", "bytes": None, "read_gbs": 50.0}]
    for case in scaling.CASES:
        simulated = scaling.simulation(case, 1000.0, 10.0, {"1": ceilings, "2": ceilings})
        n, us = simulated(1)
        assert (n, us) == (1, pytest.approx(1000.0))
        for threads in (2, 3, 8, 32):
            n, rows, units = scaling.largest_share(case, threads)
            assert n <= threads
            assert n * rows * units >= case.B * case.H
            assert rows == case.B or units == case.H
            assert simulated(threads)[0] == n
            assert simulated(threads)[1] > 10.0 + 990.0 / (1.01 * n)  # no cache is nearer here


def parts() -> tuple[Any, Any, Any]:
    """The modules ceilings, report and rows of the benchmark tool."""
    ceilings, report, rows = (module(f"lstm_bench.{name}") for name in ("ceilings", "report", "rows"))
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


# gpu_report.py, on commands that stand for its stages ----------------------------------------------------------------

FAKE = """
import sys
sys.path.insert(0, {benchmarks!r})
import gpu_report
from lstm_bench import gpu_stages
from lstm_bench.stages import Stage
gpu_stages.probe = lambda: gpu_stages.Machine("2", ("a GPU",), ("90a",))
def stage(name, code, **more):
    return Stage(name, "for a test", more.pop("seconds", 20), lambda _: [[sys.executable, "-c", code]], **more)
def stages_of(options, machine, out):
    return [{stages}]
sys.exit(gpu_report.main(None, stages_of))
"""

OK = "stage('first', 'print(1); print(\"all well\")')"
# Answers an interrupt with what it has; a process of its own does not, and would outlive it.
SLOW_CODE = """
import subprocess, sys, time
deaf = "import signal, time; signal.signal(2, signal.SIG_IGN); print(flush=True); time.sleep(60)"
other = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
other.stdout.readline()
print("other", other.pid, flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("kept", flush=True)
"""
LAST = "stage('last', 'print(2)')"


def slow(seconds: float) -> str:
    return f"stage('slow', {SLOW_CODE!r}, seconds={seconds})"


def start_fake(cwd: Path, *stages: str, arguments: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    code = FAKE.format(benchmarks=str(BENCHMARKS), stages=", ".join(stages))
    command = [sys.executable, "-c", code, "--out", "out", *arguments]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_fake(cwd: Path, *stages: str, arguments: tuple[str, ...] = ()) -> tuple[int, str, dict[str, Any]]:
    """Exit status, output, and what stages.json has of each stage."""
    process = start_fake(cwd, *stages, arguments=arguments)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output, kept(cwd)


def kept(cwd: Path) -> dict[str, Any]:
    return {each["name"]: each for each in json.loads((cwd / "out" / "stages.json").read_text())["stages"]}


def assert_other_ended(log: Path) -> None:
    [pid] = [line.split()[1] for line in log.read_text().splitlines() if line.startswith("other ")]

    def ended() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    wait_for(ended, 20)


def test_a_stage_that_fails_does_not_stop_the_next(tmp_path: Path) -> None:
    stages = [
        "stage('bad', 'import sys; print(\"so far\"); sys.exit(3)')",
        "Stage('gone', '', 20, lambda _: [['no-such-program']])",
        "stage('none', 'import sys; print(\"nothing to do\"); sys.exit(77)')",
        "stage('informs', 'import sys; sys.exit(1)', counts=False)",
        "stage('finds', 'print(1)', finds=lambda: 'two finds')",
        "stage('absent', 'print(1)', left_out='not installed')",
    ]
    status, output, records = run_fake(tmp_path, OK, *stages, LAST)
    assert status == 1
    assert {name: (each["outcome"], each["why"]) for name, each in records.items()} == {
        "first": ("ok", ""),
        "bad": ("FAILED", "status 3"),
        "gone": ("FAILED", "status 127"),
        "none": ("left out", ""),
        "informs": ("see log", "status 1"),
        "finds": ("FAILED", "two finds"),
        "absent": ("left out", ""),
        "last": ("ok", ""),
    }
    assert records["first"]["said"] == "all well"
    assert records["none"]["said"] == "nothing to do"
    assert "no-such-program" in records["gone"]["said"]
    assert "so far" in (tmp_path / "out" / "bad.log").read_text()
    assert output.index("first") < output.index("bad") < output.index("last")


def test_what_informs_is_no_failure(tmp_path: Path) -> None:
    assert run_fake(tmp_path, OK, "stage('informs', 'import sys; sys.exit(1)', counts=False)")[0] == 0


def test_a_stage_whose_time_is_over_is_ended_with_all_it_started(tmp_path: Path) -> None:
    status, output, records = run_fake(tmp_path, OK, slow(1), LAST, arguments=("--limit", "100"))
    assert status == 1
    assert records["slow"]["outcome"] == "FAILED"
    assert records["slow"]["why"].startswith("time limit of ")
    assert records["slow"]["said"] == "kept"
    assert records["last"]["outcome"] == "ok"
    assert "time limit of" in output
    assert_other_ended(tmp_path / "out" / "slow.log")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_what_was_there(tmp_path: Path, number: int) -> None:
    process, log = start_fake(tmp_path, OK, slow(60), LAST), tmp_path / "out" / "slow.log"
    wait_for(lambda: log.exists() and log.read_text().rstrip()[-1:].isdigit())
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 130
    records = kept(tmp_path)
    assert [(name, each["outcome"]) for name, each in records.items()] == [("first", "ok"), ("slow", "interrupted")]
    assert records["slow"]["said"] == "kept"
    assert_other_ended(log)
    status, _, records = run_fake(tmp_path, OK, slow(60), LAST, arguments=("--only", "last"))
    assert status == 0
    assert [each["outcome"] for each in records.values()] == ["ok", "interrupted", "ok"]
    assert "kept" in log.read_text()


def test_no_stage_begins_without_time(tmp_path: Path) -> None:
    first, last = "stage('first', 'print(1)', seconds=1000)", "stage('last', 'print(2)', seconds=3000)"
    status, _, records = run_fake(tmp_path, first, last, arguments=("--limit", "1000"))
    assert status == 0
    assert [each["outcome"] for each in records.values()] == ["ok", "left out"]
    assert records["last"]["why"] == "no time left"
    status, output, records = run_fake(tmp_path, first, last, arguments=("--rest",))
    assert status == 0
    assert [each["outcome"] for each in records.values()] == ["ok", "ok"]
    assert "first" not in output


def test_stages_share_the_time_that_is_left() -> None:
    stages = module("lstm_bench.stages")

    def stage(seconds: float, **options: Any) -> Any:
        return stages.Stage(f"{seconds}", "", seconds, lambda _: [], **options)

    one, two, three = stage(10), stage(30), stage(60)
    assert stages.share([one, two, three], 50) == 10  # as a rule
    assert stages.share([two, three], 900) == 300  # in proportion
    assert stages.share([three], 45) == 45  # no more than there is
    assert stages.share([one, stage(100, left_out="absent")], 50) == 50


def test_the_report_lists_its_stages(tmp_path: Path) -> None:
    status, output, _ = run("gpu_report.py", "--list", cwd=tmp_path)
    names = [line.split()[0] for line in output.splitlines()]
    assert status == 0
    assert names[:4] == ["tools", "build", "available", "tests"]
    assert {"strategies", "tune", "ncu-grid", "stock", "accuracy", "ceilings", "cpu", "racecheck-cluster"} < set(names)
    status, output, _ = run("gpu_report.py", "--dry-run", "--only", "tests", "cpu", cwd=tmp_path)
    assert status == 0
    assert [line.split()[0] for line in output.splitlines() if not line.startswith(" ")] == ["tests", "cpu"]
    assert "lstm_bench.pytest_log" in output
    assert "--preset quick" in output
    for option, expected in (
        (("--only", "test"), "--only: expected names of tools, build"),
        (("--limit", "none"), "argument --limit: expected seconds"),
        (("--limit", "0"), "argument --limit: expected seconds"),
        (("--wheels", "missing"), "argument --wheels: expected a folder"),
    ):
        status, output, errors = run("gpu_report.py", *option, cwd=tmp_path)
        assert (status, output) == (2, "")
        assert expected in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [[], ["-E", "-S"]], ids=["torch", "bare"])
def test_without_a_gpu_the_report_says_so(tmp_path: Path, options: list[str]) -> None:
    command = [sys.executable, *options, str(BENCHMARKS / "gpu_report.py"), "--only", "build", "tests"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("gpu_report.py: no NVIDIA GPU: torch ")
    assert ("torch is not installed for" if options else "finds no CUDA device") in done.stderr
    assert done.stderr.endswith("--only takes tools, build, cpu\n")
    assert list(tmp_path.iterdir()) == []


def test_a_stage_that_needs_no_gpu_runs_without_one(tmp_path: Path) -> None:
    fake = FAKE.replace('("a GPU",), ("90a",)', '(), (), "none is there"')
    code = fake.format(benchmarks=str(BENCHMARKS), stages=f"{OK}, stage('last', 'print(2)', needs_gpu=False)")
    for only, status in (("last", 0), ("first", 2)):
        command = [sys.executable, "-c", code, "--out", "out", "--only", only]
        assert subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120).returncode == status


def test_the_report_itself_needs_no_package(tmp_path: Path) -> None:
    code = FAKE.format(benchmarks=str(BENCHMARKS), stages=f"{OK}, {LAST}")
    command = [sys.executable, "-I", "-S", "-c", code, "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "all well" in done.stdout
    assert "no table: rich is not installed" in done.stdout


def test_tools_that_a_stage_has_brought_are_used(tmp_path: Path) -> None:
    code = (
        "import pathlib, time; time.sleep(1); pathlib.Path('tools').mkdir(); pathlib.Path('tools/tqdm.py').write_text("
        '\'class tqdm:\\n def __init__(self, **options): print(options["total"], "stages")\\n'
        ' def write(self, text): print("told:", text)\\n'
        " def __getattr__(self, name): return lambda *_: None')"
    )
    fake = FAKE.format(benchmarks=str(BENCHMARKS), stages=f"stage('tools', {code!r}), {LAST}")
    command = [sys.executable, "-I", "-S", "-c", fake, "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "2 stages" in done.stdout
    assert "told: last" in done.stdout


def write_wheel(folder: Path, name: str) -> None:
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")


def test_missing_tools_come_from_wheels_or_are_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_stages, stages, gpu_report = map(module, ("lstm_bench.gpu_stages", "lstm_bench.stages", "gpu_report"))
    monkeypatch.setattr(gpu_stages, "PROGRAMS", ("sh",))
    monkeypatch.setattr(gpu_stages, "REQUIRED", {"numpy": (1, 0), "a_tool": (1, 0), "torch": (99, 5), "sh": (3, 1)})
    assert gpu_stages.missing() == ["a_tool>=1.0", "torch>=99.5"]  # sh is a program
    monkeypatch.setattr(gpu_stages, "REQUIRED", {"numpy": (1, 0), "a_tool": (1, 0)})

    def run_tools(*arguments: str) -> Any:
        stage, end = gpu_stages.tools(gpu_report.parse(arguments), tmp_path), time.monotonic() + 100
        return next(stages.run_stages([stage], tmp_path, end, gpu_stages.make_environment(tmp_path)))

    record = run_tools()
    assert record.outcome == "FAILED"
    assert record.said == "missing: a_tool>=1.0: install them, or give a folder with their wheels by --wheels"
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels, "a_tool")
    assert run_tools("--wheels", str(wheels)).outcome == "ok"
    monkeypatch.syspath_prepend(tmp_path / "tools")
    assert run_tools().outcome == "left out"


def test_what_is_built_and_run_follows_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_stages, options = module("lstm_bench.gpu_stages"), module("gpu_report").parse([])
    monkeypatch.delenv("LSTM_EXT_CUDA_ARCHS", raising=False)
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name: f"/bin/{name}")
    assert [gpu_stages.arch_of(*each) for each in ((7, 5), (9, 0), (10, 0), (12, 0))] == ["75", "90a", "100", "120"]

    def stages_of(*archs: str) -> dict[str, Any]:
        machine = gpu_stages.Machine("2", ("a GPU",) * len(archs), archs)
        return {stage.name: stage for stage in gpu_stages.all_stages(options, machine, tmp_path)}

    hopper, cpu = stages_of("90a"), stages_of()
    assert hopper["build"].environment == {"LSTM_EXT_BUILD": "cuda", "LSTM_EXT_CUDA_ARCHS": "90a"}
    assert cpu["build"].environment["LSTM_EXT_BUILD"] == "cpu"
    assert "no clusters" in stages_of("80")["ncu-cluster"].left_out
    assert hopper["ncu-cluster"].left_out == ""
    assert [hopper[name].counts for name in ("memcheck", "racecheck", "racecheck-cluster")] == [True, True, False]
    for stage in hopper.values():
        for command in stage.commands(30.0):
            assert all(type(part) is str for part in command), stage.name
    (tmp_path / "build.log").write_text("  lstm_ext: LSTM_EXT_BUILD=cuda: nvcc not found\nERROR: failed\n")
    assert hopper["build"].said() == "nvcc not found"
    (tmp_path / "memcheck.log").write_text("3 passed\n========= ERROR SUMMARY: 2 errors\n")
    (tmp_path / "memcheck.jsonl").write_text('{"test": "a", "outcome": "passed", "seconds": 2.0}\n')
    assert hopper["memcheck"].said() == "1 passed; longest 2.0 s, a; ERROR SUMMARY: 2 errors"
    for text, found in (
        ("", False),
        ("Uninitialized read\n at torch::fill\n", False),
        ("Uninitialized read\n at lstm_ext::step\n", True),
    ):
        (tmp_path / "initcheck.finds.log").write_text(text)
        assert bool(hopper["initcheck"].finds()) == found


def test_what_stages_measured_and_which_tests_failed_is_told(tmp_path: Path) -> None:
    write(tmp_path / "benchmarks.json", {"lstm_ext": 1.0, "torch": 3.25}, 0.1)
    write(tmp_path / "stock.json", {"torch": 77.0}, 0.1)
    (tmp_path / "ceilings.json").write_text(json.dumps({"ceilings": {"copy, GB/s": 2870.0}}))
    events = [("a", "passed", ""), ("b", "failed", "line\nE   too far\ntest.py:3: Error"), ("c", "began", "")]
    lines = [json.dumps({"test": f"t.py::{name}", "outcome": end, "text": text}) for name, end, text in events]
    (tmp_path / "tests.jsonl").write_text("\n".join([*lines, '{"test": "t.py::d", "out']))
    command = [sys.executable, "-m", "lstm_bench.digest", "tests", "benchmarks", "stock", "ceilings", "absent"]
    paths = [str(BENCHMARKS), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "tests: b: failed: E   too far\ntests: c: never ended\n" in done.stdout
    assert "3.25" in done.stdout
    assert "2870" in done.stdout
    assert "77" not in done.stdout  # in its log


# pytest_log: tests whose outcomes are kept ----------------------------------------------------------------------------

TESTS = """
import os, time
import pytest
def test_one(): pass
def test_dies(): os._exit(1)  # as faulthandler ends a hang
def test_fails(): assert 1 == 2
@pytest.mark.skip(reason="so it is")
def test_skipped(): pass
def test_slow(): {slow}
def test_last(): pass
"""


def start_tests(cwd: Path, text: str) -> subprocess.Popen[str]:
    (cwd / "test_it.py").write_text(text)
    command = [sys.executable, "-m", "lstm_bench.pytest_log", "log.jsonl", "-q", "-p", "no:cacheprovider", "test_it.py"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(cwd), str(BENCHMARKS)])}
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(command, cwd=cwd, env=environment, **options)


def outcomes(cwd: Path) -> dict[str, str]:
    tests, _ = module("lstm_bench.pytest_log").read(cwd / "log.jsonl")
    return {test.name.rpartition("::")[2]: test.outcome for test in tests}


def text_of(cwd: Path, name: str) -> str:
    tests, _ = module("lstm_bench.pytest_log").read(cwd / "log.jsonl")
    return next(test.text for test in tests if test.name.endswith(name))


def test_a_test_that_ends_the_process_costs_only_itself(tmp_path: Path) -> None:
    process = start_tests(tmp_path, TESTS.format(slow="pass"))
    process.communicate(timeout=100)
    assert process.returncode == 1
    expected = {"test_one": "passed", "test_dies": "began", "test_fails": "failed", "test_skipped": "skipped"}
    assert outcomes(tmp_path) == {**expected, "test_slow": "passed", "test_last": "passed"}
    summary = module("lstm_bench.pytest_log").summary(tmp_path / "log.jsonl")
    assert summary.startswith("3 passed, 1 never ended, 1 failed, 1 skipped; longest ")
    assert "assert 1 == 2" in text_of(tmp_path, "test_fails")
    assert sorted(path.name for path in tmp_path.glob("*.xml")) == ["log.2.xml"]  # the first process wrote none


def test_tests_that_are_interrupted_are_kept_as_far_as_they_came(tmp_path: Path) -> None:
    process = start_tests(tmp_path, TESTS.format(slow="time.sleep(60)"))
    wait_for(lambda: outcomes(tmp_path).get("test_slow") == "began")
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert outcomes(tmp_path)["test_fails"] == "failed"
    assert "test_last" not in outcomes(tmp_path)
    assert "1 failed" in output  # pytest's own summary
    assert (tmp_path / "log.2.xml").exists()


def test_a_gpu_that_no_longer_answers_costs_one_test(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "broken = False\nclass cuda:\n    is_initialized = staticmethod(lambda: True)\n"
        "    @staticmethod\n    def synchronize():\n        if broken: raise RuntimeError('launch timed out')\n"
    )
    breaks = "def test_breaks():\n    torch.broken = True\n    assert 0, 'why'\n"
    text = f"import torch\ndef test_one(): pass\n{breaks}def test_last(): assert not torch.broken\n"
    process = start_tests(tmp_path, text)
    process.communicate(timeout=100)
    assert process.returncode == 1
    assert outcomes(tmp_path) == {"test_one": "passed", "test_breaks": "lost the GPU", "test_last": "passed"}
    assert "why" in text_of(tmp_path, "test_breaks")

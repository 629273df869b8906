"""The programs in examples/ run, each in a short form; the ladder's steps are right."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lstm_ext

EXAMPLES = Path(__file__).parents[1] / "examples"
STEPS = sorted(path.name for path in (EXAMPLES / "ladder").glob("step*"))
COMPILER = os.environ.get("CXX", "g++")


@pytest.fixture(autouse=True)
def restored_threads() -> Any:
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def run(name: str, *arguments: str, needs: tuple[str, ...] = ()) -> Any:
    """What the `main` of an example returns; skips where a package is missing."""
    for package in ("tqdm", *needs):
        pytest.importorskip(package)
    return runpy.run_path(str(EXAMPLES / name))["main"](list(arguments))


def test_characters_are_learnt() -> None:
    assert run("char_language_model.py", "--chunks", "30", "--units", "32", "--start", "The") < 5.5  # of 6.55


def test_a_policy_with_memory_is_better_than_a_guess() -> None:
    shares = run("recurrent_policy.py", "--rollouts", "80")
    assert shares[True] > 0.8
    assert 0.4 < shares[False] < 0.6


def test_ragged_series_are_told_apart_by_all_ways() -> None:
    accuracies = run("ragged_series.py", "--steps", "8")
    assert list(accuracies) == ["zeros", "… and lengths", "… and the mask", "… and the gap"]
    assert all(0.3 < accuracy <= 1 for accuracy in accuracies.values())


def test_a_stream_plays_an_amplifier() -> None:
    played = run("stream_audio.py", "--steps", "20", "--seconds", "0.2")
    assert len(played.seconds) == 150
    assert played.error < 1


def test_threads_serve_sessions(capsys: pytest.CaptureFixture[str]) -> None:
    rates = run("serve_threads.py", "--sessions", "3", "--requests", "4")
    assert list(rates) == [1, 2]
    difference = capsys.readouterr().out.split()[-1]
    assert float(difference) < 1e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_an_exported_file_runs_without_us(tmp_path: Path) -> None:
    difference = run("export_onnx.py", "--output", str(tmp_path / "a.onnx"), needs=("onnxscript", "onnxruntime"))
    assert difference < 1e-5


def test_numpy_alone_forecasts() -> None:
    """In a process of its own, as torch must not be imported."""
    folder = Path(lstm_ext.__file__).parents[1]
    code = (
        f"import runpy; error = runpy.run_path({str(EXAMPLES / 'numpy_only.py')!r})['main'](['--units', '128']); "
        "assert error < 0.2, error"
    )
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_jax_arrays_come_and_go() -> None:
    assert run("jax_arrays.py", needs=("jax",)) < 1e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("cell", ["lstm", "basic", "layer_norm"])
def test_widths_are_compared(cell: str, tmp_path: Path) -> None:
    picture = tmp_path / "num_units.png"
    status = run(
        *("num_units.py", "--cell", cell, "--num-units", "4", "--epochs", "1", "--output", str(picture)),
        needs=("sklearn", "matplotlib", "rich"),
    )
    assert status == 0
    assert picture.stat().st_size > 0


def test_the_ladder_has_seven_short_steps() -> None:
    assert [name[:5] for name in STEPS] == [f"step{n}" for n in range(1, 8)]
    for path in (EXAMPLES / "ladder").glob("*step*"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 80


@pytest.mark.parametrize("step", STEPS)
def test_steps_of_the_ladder_are_right(step: str, tmp_path: Path) -> None:
    if step.endswith(".cpp") and shutil.which(COMPILER) is None:
        pytest.skip(f"there is no compiler {COMPILER}")
    ladder = runpy.run_path(str(EXAMPLES / "ladder/run.py"))
    lstm = ladder["load"](EXAMPLES / "ladder" / step, tmp_path)
    for shape in [(5, 7, 3, 19), (1, 1, 1, 1), (3, 9, 17, 32)]:
        ladder["check"](lstm, ladder["draw"](*shape))


def test_the_ladder_prints_its_rates(capsys: pytest.CaptureFixture[str]) -> None:
    ladder = runpy.run_path(str(EXAMPLES / "ladder/run.py"))
    del ladder["STEPS"][2:]  # those that are not compiled
    rates = ladder["main"](["--shape", "3", "4", "5", "6", "--rounds", "1"])
    assert [*rates] == [*STEPS[:2], "lstm_ext.lstm"]
    said = capsys.readouterr().out
    assert all(f"\n{name:20} " in said for name in rates)

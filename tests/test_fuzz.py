"""The fuzzer itself: what it repeats, and that it sees what it is there for."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from .conftest import needs_native
from .test_process import run_python

pytestmark = needs_native
FUZZ = str(Path(__file__).with_name("fuzz"))

BROKEN = """
import os, pathlib, lstm_ext
lstm, marker = lstm_ext.lstm, pathlib.Path(__file__).with_name("marker")
def broken(*arguments, **options):
    y, *rest = lstm(*arguments, **options)
    if not marker.exists():
        marker.touch()
        os.abort()
    return y + 1, *rest
lstm_ext.lstm = broken
"""


def test_the_fuzzer_goes_on_where_it_ended(tmp_path: Path) -> None:
    pytest.importorskip("tqdm")
    record = tmp_path / "record.json"
    for cases in (150, 300):
        done = run_python(FUZZ, "--seed", "3", "--cases", str(cases), "--record", str(record))
        assert done.returncode == 0, done.stdout + done.stderr
        state = json.loads(record.read_text())
        assert state["next"] == state["right"] + state["refused"] + state["accepted"] == cases
        assert min(state["right"], state["refused"], state["accepted"]) > 0
    one, other = (run_python(FUZZ, "--seed", "3", "--case", "17").stdout for _ in range(2))
    assert one == other != ""


def test_the_fuzzer_tells_what_is_wrong_and_what_is_lost(tmp_path: Path) -> None:
    pytest.importorskip("tqdm")
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    record = tmp_path / "record.json"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = run_python(FUZZ, "--cases", "150", "--record", str(record), PYTHONPATH=path)
    assert done.returncode == 1
    state = json.loads(record.read_text())
    assert len(state["lost"]) == 1
    assert "ended with -6" in state["lost"][0][1]
    assert state["wrong"]
    assert all(why.startswith("AssertionError: y") for _, why in state["wrong"])
    assert done.stdout.count("is wrong: AssertionError: y") == len(state["wrong"])
    assert state["next"] == 150

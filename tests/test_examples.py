"""What the documentation shows works: the examples of docstrings, of the README and of docs/."""

from __future__ import annotations

import doctest
import inspect
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lstm_ext
from lstm_ext import convert, testing

from .conftest import needs_native

ROOT = Path(__file__).parents[1]
READERS = [getattr(convert, name) for name in convert.__all__ if name.startswith("from_")]
PUBLIC = [getattr(lstm_ext, name) for name in lstm_ext.__all__]


@needs_native  # as plans need the compiled module
@pytest.mark.parametrize("documented", [lstm_ext, testing, *PUBLIC, *READERS], ids=lambda each: each.__name__)
def test_docstrings_have_examples_that_are_true(documented: Any) -> None:
    names = {"lstm_ext": lstm_ext, "convert": convert, "np": np, "torch": torch} | (
        vars(testing) if documented is testing else {}
    )
    example = doctest.DocTestParser().get_doctest(inspect.getdoc(documented) or "", names, documented.__name__, None, 0)
    assert example.examples
    said: list[str] = []
    doctest.DocTestRunner().run(example, out=said.append)
    assert not said, "".join(said)


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@needs_native
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["README.md", "docs/recipes.md"])
def test_pages_can_be_read_aloud_to_python(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom, each block after those above it."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    blocks = python_blocks(ROOT / name)
    assert blocks
    for block in blocks:
        if "torch.onnx.export" in block and find_spec("onnxscript") is None:
            block = "".join(
                line for line in block.splitlines(keepends=True) if not line.startswith("torch.onnx.export")
            )
        exec(compile(block, name, "exec"), names)

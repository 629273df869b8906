"""What the documentation shows works: the examples of docstrings, of the README and of docs/."""

from __future__ import annotations

import doctest
import inspect
import re
import runpy
import shlex
import subprocess
import sys
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


# Of a page: what stands before a block (`not run: why`, or `needs: module`), its language, its text.
BLOCK = re.compile(r"^(?:<!-- (.*?) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = {
    path.relative_to(ROOT).as_posix(): BLOCK.findall(path.read_text(encoding="utf-8"))
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "examples/README.md"])
}
WITH_PYTHON = [name for name, blocks in PAGES.items() if any(language == "python" for _, language, _ in blocks)]
COMMANDS = [
    (name, command)
    for name, blocks in PAGES.items()
    for _, language, text in blocks
    if language == "console"
    for line in text.splitlines()
    for command in re.split("&&", re.sub(r"(^| +)#.*", "", line))
    if command.strip()
]


def test_every_block_is_run_or_says_why_not() -> None:
    """Python and commands are looked at below, texts are what they print; a block of Python that is left out counts."""
    assert {language for blocks in PAGES.values() for _, language, _ in blocks} == {"python", "console", "text"}
    marks = [(name, mark) for name, blocks in PAGES.items() for mark, _, _ in blocks if mark]
    assert all(re.fullmatch(r"not run: .{20,}|needs: \w+", mark) for _, mark in marks), marks
    assert [name for name, mark in marks if mark.startswith("not run")] == [
        "docs/architecture.md",  # signatures
        "docs/how-to/export.md",  # torch.compile, which tests/test_compile.py has
    ]


@needs_native
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", WITH_PYTHON)
def test_pages_can_be_read_aloud_to_python(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom, each block after those above it."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    missing = set()
    num_threads = torch.get_num_threads()
    try:
        for mark, language, block in PAGES[name]:
            needed = mark.removeprefix("needs: ") if mark.startswith("needs: ") else "torch"
            if find_spec(needed) is None:
                missing.add(needed)
            elif language == "python" and not mark.startswith("not run: "):
                exec(compile(block, name, "exec"), names)
    finally:
        torch.set_num_threads(num_threads)
    if missing:
        pytest.skip(f"all but the blocks that need {', '.join(missing)} were run")


def check_script(path: str, arguments: list[str]) -> None:
    """The script is there, and it or a module beside it knows the options."""
    script = ROOT / path
    known = "".join(each.read_text(encoding="utf-8") for each in {script, *script.parent.glob("**/*.py")})
    unknown = [word for word in arguments if word.startswith("--") and f'"{word}"' not in known]
    assert script.is_file()
    assert not unknown


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_commands_name_what_is_there(name: str, command: str) -> None:
    words = [word for word in shlex.split(command) if not re.match(r"LSTM_EXT_\w+=", word)]
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    match words:
        case ["pip", "install", *_]:
            assert set(re.findall(r"\w+", "".join(re.findall(r"\[(.*)\]", words[-1])))) <= set(extras)
        case ["python", "-m", module, *_]:
            assert find_spec(module) is not None
        case ["python" | "bash", script, *arguments]:
            check_script("tests/fuzz/__main__.py" if script == "tests/fuzz" else script, arguments)
        case ["torchrun", *_]:
            script = next(n for n, word in enumerate(words) if word.endswith(".py"))
            check_script(words[script], words[script + 1 :])
        case ["pytest"] | ["pytest", "-m", "gpu"] | [".", ".venv/bin/activate"] | ["mkdocs", "build" | "serve", *_]:
            pass
        case ["pipx", "run", "cibuildwheel"] if "[tool.cibuildwheel]" in (ROOT / "pyproject.toml").read_text():
            pass
        case _:
            pytest.fail(f"{name}: nothing here knows whether this is true: {command}")


def test_the_readme_is_short_and_its_figures_are_those_of_the_page() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    figures = [line for line in lines if re.match(r"\|.*\d\.\d", line)]
    assert figures
    assert set(figures) <= set((ROOT / "docs/performance.md").read_text(encoding="utf-8").splitlines())


def test_pictures_are_those_that_the_script_draws(tmp_path: Path) -> None:
    names = runpy.run_path(str(ROOT / "docs/draw.py"))
    for draw in (value for name, value in names.items() if name.startswith("draw_")):
        draw.__globals__["PICTURES"] = tmp_path
        draw()
    pictures = sorted(path.name for path in (ROOT / "docs/pictures").glob("*.svg"))
    assert sorted(path.name for path in tmp_path.iterdir()) == pictures
    for name in pictures:
        assert (tmp_path / name).read_bytes() == (ROOT / "docs/pictures" / name).read_bytes(), "python docs/draw.py"


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs the extra `docs`")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "<math" in (tmp_path / "math/index.html").read_text(encoding="utf-8")

"""setup.py: what each LSTM_EXT_BUILD gives, and what it says where it cannot."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "lstm_ext", "csrc")
BUILD = "import setuptools.build_meta as b; b.build_wheel('dist')"

if not (ROOT / "setup.py").exists():
    pytest.skip("the package's sources are not beside the tests", allow_module_level=True)


class Build:
    """One wheel build in a copy of the sources, on an empty PATH, with what `environment` adds."""

    def __init__(self, root: Path, **environment: str) -> None:
        for name in SOURCES:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
            else:
                shutil.copy(ROOT / name, root / name)
        (root / "bin").mkdir()
        ours = ("CXX", "CUDACXX", "CUDA_HOME", "CMAKE_ARGS", "PYTHONPATH")
        inherited = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith("LSTM_EXT_")}
        self.root = root
        self.environment = {**inherited, "PATH": str(root / "bin"), **environment}
        done = self.python(BUILD, root)
        self.failed = done.returncode != 0
        self.output = done.stdout + done.stderr

    def python(self, code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code], cwd=cwd, env=self.environment, capture_output=True, text=True
        )

    def unpack(self) -> tuple[str, Path, dict[str, object]]:
        """The wheel's file name, the folder that it was unpacked to, and what the build recorded."""
        assert not self.failed, self.output
        [wheel] = (self.root / "dist").glob("*.whl")
        site = self.root / "site"
        zipfile.ZipFile(wheel).extractall(site)
        return wheel.name, site, json.loads((site / "lstm_ext/_build_info.json").read_text())

    def cpu_reason(self, site: Path) -> str:
        """backends()["cpu"].reason of the package in `site`."""
        done = self.python("import lstm_ext; print(lstm_ext.backends()['cpu'].reason)", site)
        assert done.returncode == 0, done.stderr
        return done.stdout


def test_python_mode_gives_a_pure_wheel(tmp_path: Path) -> None:
    build = Build(tmp_path, LSTM_EXT_BUILD="python")
    name, site, info = build.unpack()
    assert name.endswith("-py3-none-any.whl")
    assert not list(site.glob("lstm_ext/_C*.so"))
    assert (site / "lstm_ext/py.typed").exists()
    assert info == {
        "version": name.split("-")[1],
        "mode": "python",
        "native": False,
        "reason": "built with LSTM_EXT_BUILD=python",
        "cuda": False,
        "cuda_reason": "built with LSTM_EXT_BUILD=python",
    }
    assert "LSTM_EXT_BUILD=python" in build.cpu_reason(site)


def test_auto_without_a_compiler_installs_and_remembers_why(tmp_path: Path) -> None:
    build = Build(tmp_path)
    _, site, info = build.unpack()
    assert not list(site.glob("lstm_ext/_C*.so"))
    assert (info["mode"], info["native"], info["cuda"]) == ("auto", False, False)
    said = [line for line in build.output.splitlines() if "installing without native kernels" in line]
    assert len(said) == 1
    assert "no working C++ compiler found" in said[0]
    assert "no working C++ compiler found" in str(info["reason"])
    assert str(info["reason"]) in build.cpu_reason(site)


def test_auto_drops_the_module_of_an_earlier_build(tmp_path: Path) -> None:
    suffix = f"lib.linux-x86_64-{sys.implementation.cache_tag}"
    stale = tmp_path / "build" / suffix / "lstm_ext/_C.cpython-stale.so"
    stale.parent.mkdir(parents=True)
    stale.touch()
    _, site, _ = Build(tmp_path).unpack()
    assert not list(site.glob("lstm_ext/_C*.so"))


def test_a_forced_cpu_build_names_the_missing_compiler(tmp_path: Path) -> None:
    build = Build(tmp_path, LSTM_EXT_BUILD="cpu")
    assert build.failed
    assert "LSTM_EXT_BUILD=cpu: no working C++ compiler found: install g++ or clang++, or set CXX" in build.output


@pytest.mark.parametrize("exists", [False, True])
def test_a_forced_cpu_build_names_the_compiler_that_fails(tmp_path: Path, exists: bool) -> None:
    compiler = tmp_path / "broken-c++"
    if exists:
        compiler.write_text("#!/bin/sh\nexit 1\n")
        compiler.chmod(0o755)
    build = Build(tmp_path, LSTM_EXT_BUILD="cpu", CXX=str(compiler))
    assert build.failed
    assert str(compiler) in build.output.partition("lstm_ext: LSTM_EXT_BUILD=cpu: ")[2]


def test_a_forced_cuda_build_names_nvcc(tmp_path: Path) -> None:
    build = Build(tmp_path, LSTM_EXT_BUILD="cuda")
    assert build.failed
    assert "LSTM_EXT_BUILD=cuda: nvcc not found" in build.output


def test_an_unknown_mode_is_an_error(tmp_path: Path) -> None:
    build = Build(tmp_path, LSTM_EXT_BUILD="gpu")
    assert build.failed
    assert "LSTM_EXT_BUILD: expected one of auto, python, cpu, cuda, got 'gpu'" in build.output


@pytest.mark.parametrize("mode", ["auto", "cuda"])
@pytest.mark.parametrize(("archs", "bad"), [("sm_90", "sm_90"), ("90a;hopper", "hopper"), ("75,70", "70")])
def test_a_bad_cuda_architecture_is_an_error(tmp_path: Path, mode: str, archs: str, bad: str) -> None:
    build = Build(tmp_path, LSTM_EXT_BUILD=mode, LSTM_EXT_CUDA_ARCHS=archs)
    assert build.failed
    assert f"LSTM_EXT_CUDA_ARCHS: expected architectures from 75 on, such as '90a;100', got '{bad}'" in build.output

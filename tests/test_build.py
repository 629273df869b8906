"""setup.py: what each LSTM_EXT_BUILD gives, and what it says where it cannot."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pybind11
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
    assert info["reason"] == "no C++ compiler found: install g++ 12 or newer, or clang++, or set CXX"
    said = [line for line in build.output.splitlines() if str(info["reason"]) in line]
    assert len(said) == 1
    assert "installing without native kernels" in said[0]
    assert build.cpu_reason(site).strip() == info["reason"]


@pytest.mark.parametrize("text", ["", "#error no\n"])
def test_auto_remembers_a_broken_compiler_in_a_line(tmp_path: Path, text: str) -> None:
    compiler = tmp_path / f"{'long-' * 20}c++"
    compiler.write_text(f"#!/bin/sh\necho '{text * 100}'\nexit 1\n")
    compiler.chmod(0o755)
    build = Build(tmp_path, CXX=str(compiler))
    _, site, info = build.unpack()
    reason = str(info["reason"])
    assert reason.startswith("no working C++20 compiler: install g++ 12 or newer, or clang++, or set CXX (/")
    assert len(reason) == 120
    assert build.cpu_reason(site).strip() == reason
    [log] = tmp_path.glob("build/cmake-*/build.log")
    assert f"log: {log}" in build.output
    assert str(compiler) in log.read_text()


def test_unknown_simd_levels_are_an_error(tmp_path: Path) -> None:
    build = Build(tmp_path, LSTM_EXT_BUILD_LEVELS="avx2, sse")
    assert build.failed
    levels = "baseline, avx2, avx512, avx512bf16, amx"
    assert f"LSTM_EXT_BUILD_LEVELS: expected names of {levels}, got 'sse' in 'avx2, sse'" in build.output


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have one level")
@pytest.mark.parametrize(
    ("wanted", "built"),
    [
        ("", "baseline avx2 avx512 avx512bf16"),
        ("baseline", "baseline"),
        ("avx512;avx2", "baseline avx2 avx512"),
        ("avx512bf16", "baseline avx512 avx512bf16"),  # with the level that it is built on
    ],
)
def test_the_simd_levels_that_are_named_are_built(tmp_path: Path, wanted: str, built: str) -> None:
    cmake = shutil.which("cmake", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]))
    if cmake is None or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs CMake and a compiler")
    configure = [cmake, "-S", str(ROOT), "-B", str(tmp_path), f"-DLSTM_EXT_BUILD_LEVELS={wanted}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    done = subprocess.run(configure, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    levels = re.findall(r"LSTM_EXT_LEVEL\((\w+)\)", (tmp_path / "simd_levels.inc").read_text())
    assert [level for level in levels if wanted or level != "amx"] == built.split()  # not all assemblers know AMX


@pytest.mark.parametrize(
    ("mode", "folder"), [("python", "lib"), ("auto", f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}")]
)
def test_nothing_of_an_earlier_build_is_packed(tmp_path: Path, mode: str, folder: str) -> None:
    """Neither its compiled module nor modules that the tree no longer has."""
    package = tmp_path / "build" / folder / "lstm_ext"
    (package / "engines").mkdir(parents=True)
    stale = ["_C.cpython-stale.so", "_build_info.json", "gone.py", "engines/gone.py"]
    for name in stale:
        (package / name).touch()
    _, site, info = Build(tmp_path, LSTM_EXT_BUILD=mode).unpack()
    assert package.exists()  # it is this folder that the build packs
    packed = {str(path.relative_to(site / "lstm_ext")) for path in site.glob("lstm_ext/**/*")}
    assert "__init__.py" in packed
    assert packed.isdisjoint({*stale} - {"_build_info.json"})
    assert info["mode"] == mode


def test_a_forced_cpu_build_names_the_missing_compiler(tmp_path: Path) -> None:
    build = Build(tmp_path, LSTM_EXT_BUILD="cpu")
    assert build.failed
    assert "LSTM_EXT_BUILD=cpu: no C++ compiler found: install g++ 12 or newer, or clang++, or set CXX" in build.output


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


REQUIRED = "import setuptools.build_meta as b; print(*b.get_requires_for_build_wheel(), sep='\\n')"


@pytest.mark.parametrize(("mode", "nvcc"), [("cuda", False), ("cuda", True), ("auto", False)])
def test_a_forced_cuda_build_asks_for_nvcc_where_there_is_none(tmp_path: Path, mode: str, nvcc: bool) -> None:
    build = Build(tmp_path, LSTM_EXT_BUILD="python")
    if nvcc:
        compiler = tmp_path / "bin/nvcc"
        compiler.write_text("#!/bin/sh\n")
        compiler.chmod(0o755)
    build.environment["LSTM_EXT_BUILD"] = mode
    done = build.python(REQUIRED, tmp_path)
    assert done.returncode == 0, done.stderr
    names = {line.partition("==")[0] for line in done.stdout.splitlines() if line.startswith("nvidia-")}
    packages = {"nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime", "nvidia-cuda-cccl"}
    assert names == (packages if mode == "cuda" and not nvcc else set())


def test_nvcc_is_found_among_the_packages_of_an_isolated_build(tmp_path: Path) -> None:
    """In a copy, since that environment is another each time, and with the libraries where such packages have them."""
    isolated = tmp_path / "isolated"
    toolkit = isolated / "nvidia/cu13"
    for name in ("bin/nvcc", "lib/libcudart.so.13", "lib/libcudart_static.a"):
        (toolkit / name).parent.mkdir(parents=True, exist_ok=True)
        (toolkit / name).touch(mode=0o755)
    information = isolated / "nvidia_cuda_nvcc-13.0.88.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-cuda-nvcc\nVersion: 13.0.88\n")
    (toolkit / "bin/nvcc").write_text('#!/bin/sh\necho "$LIBRARY_PATH" >"$0.said"\nexit 1\n')
    (tmp_path / "tools").mkdir()
    for tool in ("c++", "as", "ld"):
        found = shutil.which(tool)
        if found is None:
            pytest.skip(f"needs {tool}")
        (tmp_path / "tools" / tool).symlink_to(found)
    sources = tmp_path / "sources"
    sources.mkdir()
    tools = {"PATH": str(tmp_path / "tools"), "PYTHONPATH": str(isolated)}
    build = Build(sources, LSTM_EXT_BUILD="cuda", LSTM_EXT_CUDA_ARCHS="90a", **tools)
    assert build.failed
    copy = sources / "build/cu13-13.0.88"
    assert f"-DCMAKE_CUDA_COMPILER={copy}/bin/nvcc" in build.output
    assert f"-DCUDA_CUDART={copy}/lib/libcudart.so.13" in build.output
    assert (copy / "bin/nvcc.said").read_text().split(os.pathsep)[0].strip() == f"{copy}/lib"


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


# Releases ------------------------------------------------------------------------------------------------------------

CHANGES = "# Changelog\n\n## 1.2.0 — 2030-01-02\n\n- New.\n\n## 1.1.0 — 2029-01-02\n\n- Old.\n"


@pytest.fixture(scope="module")
def release() -> Any:
    """The script, as a module."""
    path = ROOT / ".ci/release.py"
    if not path.exists():
        pytest.skip(".ci is not beside the tests")
    spec = importlib.util.spec_from_file_location("release", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("version", "changes", "tag", "problem"),
    [
        ("1.2.0", CHANGES, "v1.2.0", None),
        ("1.2.0", CHANGES, None, None),
        ("1.2.0", CHANGES, "v1.2.1", "the tag is v1.2.1, the version 1.2.0"),
        ("1.3.0", CHANGES, "v1.3.0", "the newest entry is 1.2.0"),
        ("1.2.0", CHANGES.replace("2030-01-02", "unreleased"), "v1.2.0", "no date but 'unreleased'"),
        ("1.2.0", CHANGES.replace("- New.\n", ""), "v1.2.0", "says nothing"),
    ],
)
def test_a_release_says_what_is_missing(
    release: Any, version: str, changes: str, tag: str | None, problem: str | None
) -> None:
    problems = release.find_problems(version, changes, tag)
    assert len(problems) == (problem is not None)
    assert problem is None or problem in problems[0]


def test_the_changelog_begins_with_this_version(release: Any) -> None:
    version = release.read_version((ROOT / "lstm_ext/_version.py").read_text())
    newest, _, changes = release.read_changes((ROOT / "CHANGELOG.md").read_text())
    assert newest == version
    assert changes
    assert release.read_changes(CHANGES)[2] == "- New."


def test_a_version_that_is_stated_twice_is_found(release: Any) -> None:
    for text in ('version = "1.2"\n', "__version__ = '1.2'\n", "\nversion: 1.2\n"):
        assert release.STATED.findall(text) == ["1.2"], text
    for text in (
        "cff-version: 1.2.0\n",
        'target-version = "py310"\n',
        "version = {attr = 1}\n",
        'python_version = "3.10"',
    ):
        assert release.STATED.findall(text) == [], text

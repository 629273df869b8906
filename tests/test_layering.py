"""The data path of the sources: a layer includes only what lies below it, and the stub tells the truth."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

from lstm_ext import _native

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "lstm_ext"

# The include paths that a folder may name, beside the standard library's headers.
PLAIN = {"gate_math.h", "params.h"}
SYSTEM = {"cpuid.h", "dlfcn.h", "immintrin.h", "pthread.h", "sched.h", "sys/syscall.h", "unistd.h"}
ALLOWED = {
    "cpu": {
        "simd.h",
        "vec_math.h",
        "product.h",
        "amx.h",
        "tiles.h",
        "team.h",
        "steps.h",
        "forward.h",
        "backward.h",
        "kernels.h",
    },
    "cuda": {
        *("layout.h", "kernel_params.h", "device.h", "launch.h", "check.h", "plan.h", "kernels.h", "layer.h", "ptx.h"),
        *("tile.cuh", "product.cuh", "pointwise.cuh", "team.cuh", "sequence.cuh", "step.cuh"),
        *("sequence_forward.cuh", "sequence_backward.cuh", "kernels.cuh"),
        *("cuda_on_cpu/ptx.h", "cuda_on_cpu/kernel.h"),
        *("cuda_runtime.h", "cuda_runtime_api.h", "cuda_bf16.h", "cuda_fp16.h"),
    },
}
FOREIGN = re.compile(r"pybind11|Python\.h|torch|ATen|c10|numpy")

# Which of the package's modules a module may import, from the top of the data path to its end.
PYTHON_LAYERS = {
    "__main__": {"backend", "functional", "reference", "_native", "__init__"},
    "__init__": {"nn", "functional", "backend", "plan"},
    "nn": {"functional", "backend", "reference", "swap"},
    "swap": set(),
    "dispatch": {"ops", "functional", "onnx", "composed", "gpu", "backend", "reference", "_native"},
    "ops": {"functional", "composed", "gpu", "backend", "reference", "_native"},
    "onnx": {"composed", "reference"},
    "gpu": {"composed", "reference", "_native"},
    "plan": {"backend", "_native"},
    "composed": {"reference"},
    "convert": {"reference"},
    "functional": {"dispatch", "backend", "reference", "dlpack", "_native"},
    "dlpack": set(),
    "backend": {"_native", "__init__"},
    "reference": set(),
    "_native": {"_C"},
}


def includes(path: Path) -> list[str]:
    return re.findall(r'^#\s*include\s+[<"]([^">]+)[">]', path.read_text(encoding="utf-8"), re.MULTILINE)


def sources(folder: Path) -> list[Path]:
    found = [path for path in folder.rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert found, f"no sources under {folder}"
    return sorted(found)


@pytest.mark.parametrize("layer", ALLOWED)
def test_kernels_include_only_kernels_and_plain_structs(layer: str) -> None:
    for path in sources(CSRC / layer):
        for name in includes(path):
            assert not FOREIGN.search(name), f"{path.name} includes {name}"
            own = name in ALLOWED[layer] or name.removeprefix("../") in PLAIN
            standard = "." not in name or name in SYSTEM
            assert own or standard, f"{path.name} includes {name}, which is not below csrc/{layer}"


def test_gate_math_and_params_stand_alone() -> None:
    for name in PLAIN:
        assert set(includes(CSRC / name)) <= {"cstdint"}, name


def test_no_source_knows_torch() -> None:
    for path in sources(CSRC):
        assert not any(re.search(r"torch|ATen|c10", name) for name in includes(path)), path.name


def test_gate_mathematics_is_stated_once() -> None:
    """No kernel spells out a sigmoid: exp comes from the vector math and goes to gate_math.h alone."""
    for path in sources(CSRC):
        if path.name not in {"gate_math.h", "vec_math.h", "tile.cuh"}:
            assert not re.search(r"\bexp(f|m1|2)?\s*\(", path.read_text(encoding="utf-8")), path.name


def imported_modules(path: Path) -> set[str]:
    """The modules of this package that a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level == 1 or (node.module or "").startswith("lstm_ext")):
            module = (node.module or "").removeprefix("lstm_ext").strip(".")
            names |= {module} if module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lstm_ext.")}
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {"_C"}
    return {name if name in modules else "__init__" for name in names}


def test_python_modules_import_only_what_lies_below() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(PYTHON_LAYERS)
    for name, allowed in PYTHON_LAYERS.items():
        assert imported_modules(PACKAGE / f"{name}.py") <= allowed, name


def stub_signatures() -> dict[str, list[str]]:
    tree = ast.parse((PACKAGE / "_C.pyi").read_text(encoding="utf-8"))
    return {node.name: [a.arg for a in node.args.args] for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.skipif(_native.C is None, reason=f"no native module: {_native.reason}")
def test_the_stub_has_the_functions_and_arguments_of_the_module() -> None:
    assert _native.C is not None
    public = {name: value for name, value in vars(_native.C).items() if not name.startswith("_")}
    stub = stub_signatures()
    assert set(public) == set(stub)
    for name, function in public.items():
        signature = re.search(rf"{name}\((.*)\)", inspect.getdoc(function) or "")
        assert signature, name
        assert re.findall(r"(\w+):", signature[1]) == stub[name], name


@pytest.mark.skipif(_native.C is None, reason=f"no native module: {_native.reason}")
def test_the_stub_names_what_build_info_may_hold() -> None:
    assert _native.C is not None
    tree = ast.parse((PACKAGE / "_C.pyi").read_text(encoding="utf-8"))
    info = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "BuildInfo")
    keys = {
        node.target.id for node in info.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert set(_native.C.build_info()) <= keys

"""The data path of the sources: a layer includes only what lies below it, and the stub tells the truth."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from enum import IntEnum
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from lstm_ext import _native
from lstm_ext.call import Directions, Needs, Save
from lstm_ext.cell import Activation, Norm

from .conftest import needs_native

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "lstm_ext"

# The include paths that a folder may name, beside the standard library's headers.
PLAIN = {"gate_math.h", "cell_math.h", "params.h"}
SYSTEM = {"cpuid.h", "dlfcn.h", "immintrin.h", "pthread.h", "sched.h", "sys/syscall.h", "unistd.h"}
ALLOWED = {
    "cpu": {
        "simd.h",
        "vec_math.h",
        "product.h",
        "amx.h",
        "tiles.h",
        "plan.h",
        "levels.h",
        "simd_levels.inc",
        "team.h",
        "crowding.h",
        "arena.h",
        "walk.h",
        "share.h",
        "cell.h",
        "forward.h",
        "forward_cell.h",
        "narrow.h",
        "forward_alone.h",
        "backward.h",
        "backward_grads.h",
        "backward_cell.h",
    },
    "cuda": {
        *("layout.h", "kernel_params.h", "device.h", "launch.h", "check.h", "plan.h", "kernels.h", "layer.h", "ptx.h"),
        *("kernel_check.h", "plan_search.h", "step_launches.h", "norm_layer.h"),
        *("tile.cuh", "product.cuh", "pointwise.cuh", "cell.cuh", "team.cuh", "sequence.cuh", "step.cuh"),
        *("step_tile.cuh", "step_block.cuh"),
        *("sequence_forward.cuh", "sequence_backward.cuh", "kernels.cuh"),
        *("step_sums.cuh", "normed.cuh", "norm.cuh", "norm_forward.cuh", "norm_backward.cuh", "norm_kernels.cuh"),
        *("cuda_on_cpu/ptx.h", "cuda_on_cpu/kernel.h"),
        *("cuda_runtime.h", "cuda_runtime_api.h", "cuda_bf16.h", "cuda_fp16.h"),
    },
}
FOREIGN = re.compile(r"pybind11|Python\.h|torch|ATen|c10|numpy")


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
        assert set(includes(CSRC / name)) <= {"cstdint"} | PLAIN, name


def test_no_source_knows_torch() -> None:
    for path in sources(CSRC):
        assert not any(re.search(r"torch|ATen|c10", name) for name in includes(path)), path.name


def test_gate_mathematics_is_stated_once() -> None:
    """No kernel spells out a sigmoid: exp comes from the vector math and goes to gate_math.h and cell_math.h."""
    for path in sources(CSRC):
        if path.name not in {"gate_math.h", "cell_math.h", "vec_math.h", "tile.cuh"}:
            assert not re.search(r"\bexp(f|m1|2)?\s*\(", path.read_text(encoding="utf-8")), path.name


def module_name(path: Path) -> str:
    """A module or package of ours; `_C` by its stub."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py*") if path.suffix in {".py", ".pyi"}}


def imported_modules(name: str) -> set[str]:
    """The modules of this package that one imports, anywhere in it: in functions and for type checkers too."""
    path, found = MODULES[name], set()
    parents = [*name.split("."), ""] if path.stem == "__init__" else name.split(".")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = parents[: len(parents) - node.level] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            found |= {each if (each := f"{origin}.{alias.name}") in MODULES else origin for alias in node.names}
    return {each for each in found if each.split(".")[0] == PACKAGE.name}


def test_imports_go_one_way() -> None:
    """The modules have an order in which each imports only what stands before it; CycleError names a circle."""
    graph = {name: imported_modules(name) for name in MODULES}
    assert set().union(*graph.values()) <= set(MODULES)
    order = list(TopologicalSorter(graph).static_order())
    assert sorted(order) == sorted(MODULES)
    for below, above in (("call", "reference"), ("_native", "engines.cpu"), ("engines", "route"), ("route", "nn")):
        assert order.index(f"lstm_ext.{below}") < order.index(f"lstm_ext.{above}")


def private_torch_names(source: str) -> set[str]:
    """What a module names of torch with an underscore in front: imported, or reached from what is imported."""
    roots, found = {}, set()
    for node in ast.walk(tree := ast.parse(source)):
        if isinstance(node, ast.Import):
            roots |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            roots |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    found |= set(roots.values())
    for node in ast.walk(tree):
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names, node = [node.attr, *names], node.value
        if isinstance(node, ast.Name) and node.id in roots:
            found.add(".".join([roots[node.id], *names]))
    return {name for name in found if name.startswith("torch.") and re.search(r"\._(?!_)", name)}


def test_one_module_names_what_is_private_in_torch() -> None:
    found = {name: private_torch_names(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
    assert found.pop("lstm_ext._torch_private")
    assert {name: names for name, names in found.items() if names} == {}


def test_private_names_are_found() -> None:
    source = "import torch as t; from torch.autograd import _x, forward_ad as f; t._C._a(f._b, t.__version__, t.nn.x)"
    assert private_torch_names(source) == {
        "torch._C",
        "torch._C._a",
        "torch.autograd._x",
        "torch.autograd.forward_ad._b",
    }


def test_an_import_names_the_private_function_that_torch_lacks() -> None:
    torch = pytest.importorskip("torch")
    code = "import torch; del torch._C._any_requires_grad; from lstm_ext import LSTM"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.anchor, capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(
        rf"ImportError: .* torch {re.escape(torch.__version__)} lacks; .* '_any_requires_grad' from 'torch._C'", last
    )


@pytest.mark.parametrize("enum", [Directions, Save, Needs])
def test_enums_have_the_numbers_of_the_core(enum: type[IntEnum]) -> None:
    header = (CSRC / "ops" / "call.h").read_text(encoding="utf-8")
    body = re.search(rf"enum class {enum.__name__} : int {{(.*?)}}", header)
    assert body
    numbers = {name.upper(): int(number) for name, number in re.findall(r"k(\w+) = (\d+)", body[1])}
    assert numbers == {name: int(value) for name, value in enum.__members__.items()}


@pytest.mark.parametrize("enum", [Activation, Norm])
def test_cells_have_the_numbers_of_the_core(enum: type[IntEnum]) -> None:
    header = (CSRC / "params.h").read_text(encoding="utf-8")
    body = re.search(rf"enum class {enum.__name__} : uint8_t {{(.*?)}};", header, re.DOTALL)
    assert body
    names = [re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).upper() for name in re.findall(r"k(\w+)", body[1])]
    assert {name: n for n, name in enumerate(names)} == {name: int(v) for name, v in enum.__members__.items()}


def stub_signatures() -> dict[str, list[str]]:
    """The arguments of each function, and of each method as "Class.method"."""
    tree = ast.parse((PACKAGE / "_C.pyi").read_text(encoding="utf-8"))
    found = {"": tree.body} | {f"{c.name}.": c.body for c in tree.body if isinstance(c, ast.ClassDef)}
    return {
        prefix + node.name: [a.arg for a in node.args.args]
        for prefix, body in found.items()
        for node in body
        if isinstance(node, ast.FunctionDef)
    }


@needs_native
def test_the_stub_has_the_functions_and_arguments_of_the_module() -> None:
    assert _native.C is not None
    public = {name: value for name, value in vars(_native.C).items() if not name.startswith("_")}
    for cls in [name for name, value in public.items() if isinstance(value, type)]:
        methods = vars(public.pop(cls)).items()
        public |= {f"{cls}.{name}": f for name, f in methods if name == "__init__" or not name.startswith("_")}
    stub = stub_signatures()
    cuda = _native.C.build_info()["cuda"]
    assert set(public) == {name for name in stub if cuda or not name.startswith("cuda_")}
    for name, function in public.items():
        signature = re.search(rf"{name.rpartition('.')[2]}\((.*)\)", inspect.getdoc(function) or "")
        assert signature, name
        assert re.findall(r"(\w+):", signature[1]) == stub[name], name


@needs_native
def test_the_stub_names_what_build_info_may_hold() -> None:
    assert _native.C is not None
    tree = ast.parse((PACKAGE / "_C.pyi").read_text(encoding="utf-8"))
    info = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "BuildInfo")
    keys = {
        node.target.id for node in info.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert set(_native.C.build_info()) <= keys

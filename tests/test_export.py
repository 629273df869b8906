"""torch.export and AOTInductor: dynamic time and batch, files, fresh processes."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lstm_ext.testing import assert_close

torch = pytest.importorskip("torch")

from torch.export import Dim, export  # noqa: E402
from torch.nn.utils.rnn import PackedSequence  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

import lstm_ext  # noqa: E402

I, H = 3, 4  # noqa: E741


def assert_same(actual: Any, expected: Any) -> None:
    for a, e in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert_close(a, e, "float32", terms=200)


def lstm(**options: Any) -> Any:
    return lstm_ext.LSTM(I, H, 2, bidirectional=True, dropout=0.5, **options).eval()


def masks(T: int, B: int) -> dict[str, Any]:
    lengths, resets = torch.randint(T + 1, (B,)), torch.rand(T, B) < 0.2
    return {"input": torch.randn(T, B, I), "lengths": lengths, "resets": resets, "return_cells": True}


T, B = Dim("T", min=1, max=1024), Dim("B", min=1, max=1024)
STATE = ({1: B}, {1: B})
# The module, its arguments for some T and B, and which of their dimensions these are.
MODULES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "plain": (lstm, lambda T, B: {"input": torch.randn(T, B, I)}, {"input": {0: T, 1: B}}),
    "projected": (
        lambda: lstm(batch_first=True, proj_size=2),
        lambda T, B: {"input": torch.randn(B, T, I)},
        {"input": {0: B, 1: T}},
    ),
    "state": (
        lstm,
        lambda T, B: {"input": torch.randn(T, B, I), "hx": (torch.randn(4, B, H), torch.randn(4, B, H))},
        {"input": {0: T, 1: B}, "hx": STATE},
    ),
    "masks": (lstm, masks, {"input": {0: T, 1: B}, "lengths": {0: B}, "resets": {0: T, 1: B}, "return_cells": None}),
    "unbatched": (lstm, lambda T, B: {"input": torch.randn(T, I)}, {"input": {0: T}}),
    "cell": (
        lambda: lstm_ext.LSTMCell(I, H),
        lambda T, B: {"input": torch.randn(B, I), "hx": (torch.randn(B, H), torch.randn(B, H))},
        {"input": {0: B}, "hx": ({0: B}, {0: B})},
    ),
}


def our_calls(program: Any) -> list[Any]:
    """The calls of our op in a program."""
    return [node for node in program.graph.nodes if node.target is torch.ops.lstm_ext.layer_forward.default]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_exports_with_dynamic_time_and_batch(name: str, strict: bool) -> None:
    """Exported, decomposed, saved and loaded: one op a layer, that saves nothing for a backward pass."""
    make, arguments, shapes = MODULES[name]
    module = make()
    program = export(module, (), arguments(5, 2), dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for each in (program, program.run_decompositions(), torch.export.load(file)):
        calls, run = our_calls(each), each.module()
        assert len(calls) == (1 if name == "cell" else 2)
        assert [call.args[-1] for call in calls] == ([0, 1] if name == "masks" else [0] * len(calls))
        for steps, rows in ((5, 2), (9, 3), (2, 17), (1, 1)):
            given = arguments(steps, rows)
            assert_same(run(**given), module(**given))


def test_what_is_exported_still_trains() -> None:
    module = lstm()
    x = torch.randn(5, 2, I)
    exported = export(module, (x,)).module()
    gradients = [torch.autograd.grad(m(x)[0].pow(2).sum(), list(m.parameters())) for m in (exported, module)]
    assert_same(*gradients)


def test_a_length_out_of_range_is_still_an_error() -> None:
    program = export(lstm(), (), MODULES["masks"][1](5, 2), dynamic_shapes=MODULES["masks"][2])
    with pytest.raises(ValueError, match=r"lengths: expected values from 0 to T = 6, got 7$"):
        program.module()(**(masks(6, 3) | {"lengths": torch.full((3,), 7)}))


def run_python(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


LOADING = """
import torch
{before}
load = {load}
x = torch.load("x.pt")
y, (h, c) = load(x)
for actual, expected in zip((y, h, c), torch.load("expected.pt")):
    torch.testing.assert_close(actual, expected)
"""


# What is written in its place where a program has to be refused before `lstm_ext.ops` is imported, and not after.
REFUSED_BEFORE = """
try:
    {load}
except Exception as error:
    print("refused:", error)
import lstm_ext.ops
"""


def save_example(module: Any, folder: Path) -> None:
    x = torch.randn(7, 3, I)
    y, (h, c) = module(x)
    torch.save(x, folder / "x.pt")
    torch.save([a.detach() for a in (y, h, c)], folder / "expected.pt")


def test_a_fresh_process_loads_a_program(tmp_path: Path) -> None:
    """It has to import `lstm_ext.ops`, which registers the operators."""
    module = lstm()
    torch.export.save(export(module, (torch.randn(5, 2, I),), dynamic_shapes=({0: T, 1: B},)), tmp_path / "lstm.pt2")
    save_example(module, tmp_path)
    load = "torch.export.load('lstm.pt2').module()"
    done = run_python(tmp_path, LOADING.format(before=REFUSED_BEFORE.format(load=load), load=load))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused:")
    assert "lstm_ext" in done.stderr


@pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="AOTInductor needs a C++ compiler: g++ or what CXX names"
)
def test_aot_inductor_package(tmp_path: Path) -> None:
    """Compiled here, run there, for other lengths and batches; there too `lstm_ext.ops` has to be imported."""
    module = lstm()
    with torch.no_grad():
        program = export(module, (torch.randn(5, 2, I),), dynamic_shapes=({0: T, 1: B},))
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(tmp_path / "lstm.pt2"),
            inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
        )
    save_example(module, tmp_path)
    load = "torch._inductor.aoti_load_package('lstm.pt2')"
    done = run_python(tmp_path, LOADING.format(before=REFUSED_BEFORE.format(load=load), load=load))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused:")
    assert "lstm_ext::layer_forward" in done.stdout + done.stderr


# Decompositions ------------------------------------------------------------------------------------------------------


class Reverse(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = lstm_ext.LSTM(I, H)

    def forward(self, input: Any) -> Any:
        return lstm_ext.lstm(input, None, *self.lstm.parameters(), reverse=True)


class Packed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = lstm()

    def forward(self, rows: Any, batch_sizes: Any) -> Any:
        y, state = self.lstm(PackedSequence(rows, batch_sizes))
        return y.data, state


DECOMPOSED = MODULES | {
    "reverse": (Reverse, MODULES["plain"][1], MODULES["plain"][2]),
    "packed": (
        Packed,
        lambda T, B: {"rows": torch.randn(B * T, I), "batch_sizes": torch.full((T,), B)},
        {"rows": {0: Dim.DYNAMIC}, "batch_sizes": {0: Dim.DYNAMIC}},
    ),
    "bfloat16": (
        lambda: lstm().bfloat16(),
        lambda T, B: {"input": torch.randn(T, B, I).bfloat16()},
        MODULES["plain"][2],
    ),
}


def foreign_to_torch(program: Any) -> set[str]:
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return {str(target) for target in calls if getattr(target, "namespace", "aten") != "aten"}


@pytest.mark.parametrize("name", DECOMPOSED)
def test_decomposes_into_torchs_operations(name: str) -> None:
    """With the table alone or torch's beside it; for other sizes, where torch's own LSTM does all of it."""
    make, arguments, shapes = DECOMPOSED[name]
    module, stepwise = make(), name == "masks"
    if stepwise:
        shapes = {"input": {1: B}, "lengths": {0: B}, "resets": {1: B}, "return_cells": None}
    program = export(module, (), arguments(5, 2), dynamic_shapes=shapes)
    assert foreign_to_torch(program)
    for table in ({}, torch.export.default_decompositions()):
        decomposed = program.run_decompositions(dict(table) | lstm_ext.ops.decompositions())
        assert not foreign_to_torch(decomposed)
        run = decomposed.module()
        for steps, rows in ((5, 2), (5, 3)) if stepwise else ((5, 2), (9, 3), (2, 17)):
            given = arguments(steps, rows)
            for a, e in zip(tree_leaves(run(**given)), tree_leaves(module(**given)), strict=True):
                if name == "bfloat16":  # torch's own LSTM rounds h at each step, and what it multiplies
                    torch.testing.assert_close(a, e, rtol=0, atol=2**-7)
                else:
                    assert_same(a, e)


def test_a_decomposed_program_needs_no_lstm_ext(tmp_path: Path) -> None:
    module = lstm(batch_first=True)
    program = export(module, (torch.randn(5, 2, I),), dynamic_shapes=({0: B, 1: T},))
    torch.export.save(program.run_decompositions(lstm_ext.ops.decompositions()), tmp_path / "lstm.pt2")
    save_example(module, tmp_path)
    load = "torch.export.load('lstm.pt2').module()"
    done = run_python(
        tmp_path, LOADING.format(before="", load=load) + "\nimport sys; assert 'lstm_ext' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", ["plain", "projected", "masks", "packed"])
def test_the_decomposition_of_each_op_is_the_op(name: str, dtype: str) -> None:
    """With all that may be saved and asked for."""
    P, D = 2 if name == "projected" else H, 1 if name == "projected" else 2
    shapes = [(4 * H, I), (4 * H, P), (4 * H,), (4 * H,), *([(P, H)] if P != H else [])] * D
    rows = {"packed": (5,), "projected": (2, 3)}.get(name, (3, 2))
    x, h0, c0, *weights = (
        torch.randn(*shape).to(getattr(torch, dtype)) for shape in ((*rows, I), (D, 2, P), (D, 2, H), *shapes)
    )
    lengths, resets = (torch.tensor([3, 1]), torch.rand(*rows) < 0.3) if name == "masks" else (None, None)
    options = (lengths, resets, torch.tensor([2, 2, 1]) if name == "packed" else None, 2 * (D == 2), P != H)
    table: Any = lstm_ext.ops.decompositions()
    arguments = (x, h0, c0, weights, *options)
    outputs = lstm_ext.ops.layer_forward(*arguments, 2)
    for a, e in zip(table[lstm_ext.ops.layer_forward](*arguments, 2), outputs, strict=True):
        assert a.dtype == e.dtype
        assert_close(a, e, dtype, terms=64)
    y, h_n, c_n, cells, gates = outputs
    seeds = [torch.randn_like(a) for a in (y, h_n, c_n, cells)]
    arguments = (*seeds, *arguments[:4], y, cells, gates, *options, 15)
    results, expected = (f(*arguments) for f in (table[lstm_ext.ops.layer_backward], lstm_ext.ops.layer_backward))
    for a, e in zip(tree_leaves(results), tree_leaves(expected), strict=True):
        assert a.dtype == e.dtype
        assert_close(a, e, dtype, terms=200)


# Files of older versions ---------------------------------------------------------------------------------------------

SAVED = sorted(Path(__file__).with_name("golden").glob("lstm_ext_*"))  # made by tests/golden/make.py


@pytest.mark.parametrize("folder", SAVED, ids=lambda folder: folder.name)
def test_what_older_versions_saved_still_runs(folder: Path, tmp_path: Path) -> None:
    """A program, a pickled module and a state dict, each in a process that has imported no more than it must."""
    x, hx, y, state, made_with = torch.load(folder / "example.pt")
    if tuple(map(int, torch.__version__.split(".")[:2])) < tuple(map(int, made_with.split(".")[:2])):
        pytest.skip(f"the files were written by torch {made_with}")
    torch.save([y, *state], tmp_path / "expected.pt")
    torch.save((x, hx), tmp_path / "x.pt")
    for imports, load in (
        ("import lstm_ext.ops", f"torch.export.load({str(folder / 'program.pt2')!r}).module()"),
        ("", f"torch.load({str(folder / 'module.pt')!r}, weights_only=False)"),
    ):
        code = LOADING.replace("load(x)", "load(*x)").format(before=imports, load=load)
        done = run_python(tmp_path, code)
        assert done.returncode == 0, done.stderr
    module = lstm_ext.LSTM(3, 4, bidirectional=True)
    module.load_state_dict(torch.load(folder / "state_dict.pt"))
    assert_same(module(x, hx), (y, state))
    program, pickled = (
        torch.export.load(folder / "program.pt2").module(),
        torch.load(folder / "module.pt", weights_only=False),
    )
    for T, B in ((1, 1), (7, 3)):  # sizes that were dynamic
        x, hx = torch.randn(T, B, 3), tuple(torch.randn(2, 2, B, 4).unbind())
        for load in (program, pickled):
            assert_same(load(x, hx), module(x, hx))
    parameters = list(pickled.parameters())
    gradients = [torch.autograd.grad(m(x, hx)[0].sin().sum(), list(m.parameters())) for m in (pickled, program, module)]
    assert len(parameters) == len(gradients[1])
    assert_same(gradients[0], gradients[2])
    assert_same(gradients[1], gradients[2])


@pytest.mark.parametrize("folder", SAVED, ids=lambda folder: folder.name)
def test_a_backward_pass_that_was_saved_with_y_still_runs(folder: Path) -> None:
    module, x = lstm_ext.LSTM(3, 4, bidirectional=True), torch.randn(7, 3, 3, requires_grad=True)
    weights = [w.detach() for w in module.parameters()]
    (expected,) = torch.autograd.grad(module(x)[0].sin().sum(), x)
    assert_same(torch.export.load(folder / "backward.pt2").module()(x.detach(), weights), expected)

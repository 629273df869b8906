"""What editors and type checkers see: a strict mypy on user code, signatures, the `py.typed` marker."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lstm_ext

USER_CODE = """
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from typing import Any
from typing_extensions import assert_type

import lstm_ext
from lstm_ext import LSTM, BasicLSTMCell, LSTMCell, Plan, backends, build_info, lstm, lstm_cell, plan, use_backend
from lstm_ext import FrozenLSTM, FrozenLSTMCell, FrozenTensorFlowCell, Stream, freeze, set_sm_margin, tune
from lstm_ext import LayerNormBasicLSTMCell, LSTMStateTuple, MultiRNNCell, dynamic_rnn, replace_lstm, swap, to_torch

State = tuple[Tensor, Tensor]
x, packed = torch.zeros(5, 2, 3), PackedSequence(torch.zeros(5, 3), torch.tensor([3, 2]))
lengths, resets = torch.tensor([5, 0]), torch.zeros(5, 2, dtype=torch.bool)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = LSTM(3, 4, num_layers=2, bias=True, batch_first=False, dropout=0.1, bidirectional=True, proj_size=2)
        self.cell = LSTMCell(4, 5, bias=False, device=torch.device("cpu"), dtype=torch.float32)
        self.basic = BasicLSTMCell(6, forget_bias=0.5, state_is_tuple=True, activation=torch.relu, input_size=5)

    def forward(self, x: Tensor) -> Tensor:
        y, state = self.lstm(x, lengths=lengths, resets=resets)
        h, c = self.cell(y[-1])
        z, _ = self.basic(h)
        return z * c.sum() + state[0].sum()


layer = LSTM(3, 4, device="cpu", dtype=torch.float64)
assert_type(layer(x), tuple[Tensor, State])
assert_type(layer(x, (x, x), return_cells=True), tuple[Tensor, State, Tensor])
assert_type(layer(packed), tuple[PackedSequence, State])
assert_type(layer.forward(packed, return_cells=True), tuple[PackedSequence, State, PackedSequence])
assert_type(LSTMCell(3, 4)(x[0]), State)

LSTM(3, 4, proj_size=2, activation=("elu", 0.5), zoneout=(0.1, 0.2), proj_clip=1.0, layer_norm=True, weight_drop=0.1)
LSTMCell(3, 4, peephole=True, cell_clip=3.0, coupled=True, unit_forget_bias=True)
lstm(x, None, x, x, peephole=x, layer_norm=(x, x, x), recurrent_dropout=0.1, training=True, seed=1)
cells = MultiRNNCell([BasicLSTMCell(6, activation="relu"), LayerNormBasicLSTMCell(4, dropout_keep_prob=0.9)])
outputs, _ = dynamic_rnn(cells, x, sequence_length=lengths, time_major=True)
assert_type(outputs, Tensor)

model = Model()
assert_type(replace_lstm(model), Model)
assert_type(to_torch(model), Model)
assert_type(replace_lstm(nn.LSTM(3, 4)), swap.LSTM)
assert_type(replace_lstm(nn.LSTM(3, 4), compilable=True), LSTM)
zeros: LSTMStateTuple | Tensor = model.basic.zero_state(2)
assert_type(replace_lstm(nn.LSTMCell(3, 4)), LSTMCell)
assert_type(to_torch(layer), nn.LSTM)
assert_type(to_torch(LSTMCell(3, 4)), nn.LSTMCell)

assert_type(lstm(x, None, x, x, lengths=lengths, resets=resets, reverse=True), tuple[Tensor, State])
assert_type(lstm(x, (x, x), x, x, x, x, w_hr=x, return_cells=True), tuple[Tensor, State, Tensor])
assert_type(lstm_cell(x, None, x, layer.all_weights[0][0], x), State)
array: npt.NDArray[np.float32] = np.zeros((2, 3), np.float32)
y, (h_n, c_n) = lstm(array, None, array, array, lengths=np.array([1, 2, 3]))
assert_type(y, npt.NDArray[np.float32])

assert_type({name: (each.available, each.reason) for name, each in backends().items()}, dict[str, tuple[bool, str]])
with use_backend("numpy"):
    info: dict[str, Any] = build_info()
version: str = lstm_ext.__version__
if backends()["cuda"].available:
    how: Plan = plan(num_steps=512, batch_size=16, hidden_size=768, dtype=torch.bfloat16, bidirectional=True, device=0)
    assert_type((how.strategy, how.microseconds_per_step, how.refused), tuple[str, float, dict[str, str]])
    assert_type([row.microseconds for row in tune([(512, 16, 768)], [torch.bfloat16])], list[dict[str, float]])
fast = freeze(nn.LSTM(3, 4), weights="int8")
assert_type((fast, freeze(LSTMCell(3, 4))), tuple[FrozenLSTM, FrozenLSTMCell])
assert_type(freeze(BasicLSTMCell(3, input_size=4)), FrozenTensorFlowCell)
assert_type(freeze(model), Model)
stream: Stream = fast.stream(2)
assert_type((stream(x, out=x), stream(array)), tuple[Tensor, npt.NDArray[np.float32]])
with set_sm_margin(16):
    assert_type(plan(512, 16, 768, device="H100").sm_margin, int)
"""

WRONG_CODE = """
import lstm_ext, torch

lstm_ext.LSTM("3", 4)
lstm_ext.LSTM(3, 4, batchfirst=True)
lstm_ext.LSTM(3, 4)(torch.zeros(1, 1, 3), length=torch.ones(1))
lstm_ext.lstm(torch.zeros(1, 1, 3), None, torch.zeros(16, 3), torch.zeros(16, 4), revers=True)
lstm_ext.use_backend(3)
lstm_ext.replace_lstm("model")
lstm_ext.to_torch(torch.nn.Linear)
lstm_ext.tune([512, 16, 768])
lstm_ext.set_sm_margin("16")
"""

# What an engine and the core take, in the right order; each line once more with two arguments swapped.
INSIDE_CODE = """
from lstm_ext._native import C
from lstm_ext.call import LayerCall, Needs, OutputGrads, Save, Saved
from lstm_ext.engines import Engine, composed, cuda, numpy, stock
from lstm_ext.route import run


def passes(engine: Engine, call: LayerCall, save: Save, saved: Saved, grads: OutputGrads, needs: Needs, n: int) -> None:
    engine.forward(call, save)
    engine.backward(call, saved, grads, needs)
    cuda.forward(call, save)
    cuda.backward(call, saved, grads, needs)
    numpy.forward(call, save)
    numpy.backward(call, saved, grads, needs)
    composed.forward(call, save)
    stock.forward(call, save)
    run(call, save)
    C.layer_forward(call, save, n)
    C.layer_backward(call, saved, grads, needs, n)
    C.cuda_layer_forward(call, save, True, "")
    C.cuda_layer_backward(call, saved, grads, needs, True, "")
"""
SWAPPED = [("call", "save"), ("saved", "grads"), ("save", "n"), ("needs", "n"), ("call", "saved"), ("grads", "needs")]


def swapped_code() -> tuple[str, set[int]]:
    """INSIDE_CODE with a copy of each line for each two arguments in it that are swapped, and which those lines are."""
    lines, wrong = INSIDE_CODE.splitlines(), set()
    for line in [line for line in lines if line.startswith("    ")]:
        name, _, rest = line.partition("(")
        arguments = rest.rstrip(")").split(", ")
        for a, b in SWAPPED:
            if {a, b} <= set(arguments):
                swap = {a: b, b: a}
                lines.append(f"{name}({', '.join(swap.get(each, each) for each in arguments)})")
                wrong.add(len(lines))
    return "\n".join(lines) + "\n", wrong


def mypy(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """`mypy --strict` on a user's file, against the package that this process imports."""
    package = Path(lstm_ext.__file__).parents[1]
    elsewhere = {} if package.name == "site-packages" else {"MYPYPATH": str(package)}  # mypy refuses the former there
    (folder / "user.py").write_text(code, encoding="utf-8")
    cache = os.environ.get("MYPY_CACHE_DIR", str(folder.parent / "mypy"))  # one for all tests
    # As pyproject.toml has it, or what is in the cache of torch would be of no use to a run by that, nor of that here.
    options = ["--strict", "--warn-unreachable", "--python-version=3.10", "--config-file=", "--cache-dir", cache]
    return subprocess.run(
        [sys.executable, "-m", "mypy", *options, "user.py"],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | elsewhere,
        timeout=300,
        check=False,
    )


def test_strict_mypy_on_user_code(tmp_path: Path) -> None:
    """Every public name is used, with the types that come out; and what is wrong is found."""
    pytest.importorskip("mypy", reason="needs mypy (extra `dev`)")
    for name in lstm_ext.__all__:
        assert name in USER_CODE
    done = mypy(tmp_path, USER_CODE)
    assert done.returncode == 0, done.stdout + done.stderr
    done = mypy(tmp_path, WRONG_CODE)
    wrong = [n for n, line in enumerate(WRONG_CODE.splitlines(), 1) if line.startswith("lstm_ext.")]
    found = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line}
    assert found == set(wrong), done.stdout + done.stderr


def test_swapped_arguments_of_an_engine_are_found(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="needs mypy (extra `dev`)")
    done = mypy(tmp_path, INSIDE_CODE)
    assert done.returncode == 0, done.stdout + done.stderr
    code, wrong = swapped_code()
    done = mypy(tmp_path, code)
    found = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line}
    assert found == wrong, done.stdout + done.stderr
    assert len(wrong) >= 20


def test_the_marker_is_installed() -> None:
    assert Path(lstm_ext.__file__).with_name("py.typed").exists()


@pytest.mark.parametrize("name", lstm_ext.__all__)
def test_signatures_and_docstrings_are_shown(name: str) -> None:
    """No bare *args, each argument annotated; a docstring in words of its own."""
    public = getattr(lstm_ext, name)
    assert name in dir(lstm_ext)
    doc = vars(public).get("__doc__") if inspect.isclass(public) else public.__doc__
    assert doc
    called = [public, public.forward] if hasattr(public, "forward") else [public]
    for each in called:
        signature = inspect.signature(each)
        for argument in signature.parameters.values():
            assert argument.kind not in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD), argument
            assert argument.annotation is not argument.empty or argument.name == "self", argument

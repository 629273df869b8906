"""Whatever a caller says, the answer is a result or an exception: sizes, memory, environments, what is no tensor."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import lstm_ext
from lstm_ext import _native, convert
from lstm_ext.call import FORWARD, REVERSE, LayerCall, Save
from lstm_ext.checks import check

from .conftest import needs_native
from .test_bad_input import arguments, call, misaligned
from .test_process import run_python, succeed

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits a process as Linux does")

# Sizes ---------------------------------------------------------------------------------------------------------------

SETUP = """
import resource, pathlib, numpy as np, torch, lstm_ext
from lstm_ext import _native, ops
from lstm_ext.call import LayerCall, Needs, Save, FORWARD, REVERSE
C, z, one, ones = _native.C, torch.zeros, np.zeros((1, 1, 1), np.float32), torch.ones(1).long()
lstm_ext.LSTM(1, 1)(z(1, 1, 1))[0].sum().backward()  # what is loaded only once
def layer(x, weights, lengths=None, batch_sizes=None):
    return LayerCall(x, None, None, weights, lengths, None, batch_sizes, FORWARD, False)
def say(run):
    try:
        run()
        print("-")
    except Exception as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0])
w, narrow = [z(4, 1), z(4, 1)], [z(16, 1), z(16, 4)]
pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**28, resource.RLIM_INFINITY))
"""

TOO_MANY = "RuntimeError: x, weights: expected at most 2**52 numbers in an array of the layer, got "
NO_UNIT = "RuntimeError: w_hh: expected at least one hidden unit, got shape "

# In a process with little memory: an expression, and what it must raise; None is a result.
HUGE_CALLS: list[tuple[str, str | None]] = [
    ("lstm_ext.LSTM(1, 4)(z(1, 1, 1).expand(2**31, 2**31, 1))", TOO_MANY),
    ("torch.no_grad()(lstm_ext.LSTM(1, 4))(z(1, 1, 1).expand(2**31, 2**31, 1))", TOO_MANY),
    ("lstm_ext.LSTM(1, 4, 2, bidirectional=True)(z(1, 1, 1).expand(2**31, 2**31, 1))", TOO_MANY),
    ("lstm_ext.LSTM(1, 4)(z(1, 1).expand(2**61, 1))", TOO_MANY),
    ("lstm_ext.LSTMCell(1, 4)(z(1, 1).expand(2**60, 1))", TOO_MANY),
    ("lstm_ext.BasicLSTMCell(4, input_size=1)(z(1, 1).expand(2**60, 1))", "RuntimeError: "),
    ("lstm_ext.lstm_cell(z(1, 1).expand(2**60, 1), None, *narrow)", TOO_MANY),
    ("lstm_ext.lstm(z(1, 1, 1), None, z(0, 1), z(0, 1).expand(0, 2**61))", "w_hh: expected shape"),
    ("lstm_ext.lstm_cell(one[0], None, *(np.broadcast_to(one[0], s) for s in [(2**30, 1), (2**30, 2**28)]))", TOO_MANY),
    ("lstm_ext.lstm(np.broadcast_to(one, (2**30, 2**30, 1)), None, *(a.numpy() for a in narrow))", TOO_MANY),
    ("lstm_ext.lstm(z(1, 1, 1).expand(2**61, 1, 1), None, *narrow)", TOO_MANY),
    ("lstm_ext.lstm(z(1, 1, 1).expand(2**61, 1, 1), None, *narrow, lengths=torch.tensor([3]))", TOO_MANY),
    ("lstm_ext.lstm(z(1, 1, 1).expand(2**61, 1, 1), None, z(0, 1), z(0, 0), lengths=torch.tensor([3]))", NO_UNIT),
    ("lstm_ext.lstm(z(1, 1, 1).expand(2**40, 1, 1), None, z(0, 1), z(0, 0))", NO_UNIT),
    ("C.layer_forward(layer(z(2**61, 1, 0), [z(4, 0), z(4, 0), z(0, 1)], torch.tensor([1])), Save.ALL)", NO_UNIT),
    ("C.layer_forward(layer(z(1, 1).expand(2**61, 1), w, batch_sizes=ones.expand(2**61)), 0)", TOO_MANY),
    ("C.layer_forward(layer(z(2, 1), w, batch_sizes=ones.expand(2**61)), 0)", "of them"),
    ("C.layer_backward(layer(z(1, 1, 1).expand(1, 2**61, 1), [z(0, 1), z(0, 0)]), (z(1, 1, 2**61, 0), "
     "z(1, 1, 2**61, 0), None), (None,) * 4, Needs.WEIGHTS)", NO_UNIT),
    ("lstm_ext.lstm(z(1, 1, 1).expand(1, 2**31, 1), None, *w, lengths=ones.expand(2**31))", "allocate"),
    ("C.layer_forward(layer(z(1, 1).expand(2**31, 1), w, batch_sizes=ones.expand(2**31)), 0)", "allocate"),
    ("lstm_ext.lstm(z(1).expand(2**15, 2**15, 2), None, z(4, 3), z(4, 1))", "w_ih is [4, 3]"),
    ("lstm_ext.lstm(np.broadcast_to(one[0, 0], (2**15, 2**15, 2)), None, *(a.numpy() for a in w))", "w_ih is ["),
    ("lstm_ext.lstm(one, None, *(a.numpy() for a in w), b_ih=np.broadcast_to(one[0, 0], 2**40))", "allocate"),
    ("lstm_ext.lstm(z(2**61, 0, 1), None, *narrow)[1]", None),
    ("lstm_ext.lstm(z(2**61, 0, 1), None, *narrow, lengths=z(0).long())[1]", None),
    ("lstm_ext.LSTM(1, 4, batch_first=True)(z(0, 2**60, 1))", TOO_MANY),
    ("lstm_ext.LSTM(1, 4)(z(2**61, 0, 1))[1][0].sum().backward()", None),
    ("lstm_ext.LSTMCell(1, 0)(z(1, 1).expand(2**50, 1))[0].sum().backward()", None),
    ("lstm_ext.plan(2**62, 2**62, 2**62, device='cpu')", TOO_MANY),
    ("lstm_ext.plan(2**31, 2**31, 1, device='cpu', backward=True)", TOO_MANY),
]  # fmt: skip


@needs_native
@linux
def test_sizes_that_no_memory_stands_for_are_refused_at_once() -> None:
    """By the check: nothing is allocated, copied or walked that is as large as the call says it is."""
    said = succeed(SETUP + "".join(f"say(lambda: {text})\n" for text, _ in HUGE_CALLS)).splitlines()
    assert len(said) == len(HUGE_CALLS)
    for (text, expected), line in zip(HUGE_CALLS, said, strict=True):
        assert line == "-" if expected is None else expected in line, (text, line)


def test_all_engines_refuse_sizes_in_the_same_words(backend: str) -> None:
    no_masks = [None] * 3
    x, weights = np.broadcast_to(np.float32(0), (2**30, 2**30, 1)), [np.zeros((16, n), np.float32) for n in (1, 4)]
    for asked in (
        LayerCall(x, None, None, weights, None, None, None, FORWARD, False),
        LayerCall(x[:1, :1], None, None, [weights[0][:0], weights[1][:0, :0]], None, None, None, REVERSE, False),
        LayerCall(x[:1, :1], None, None, [weights[0], weights[1][:, :0], x[:0, 0].repeat(4, 1)], *no_masks, 0, False),
    ):  # fmt: skip
        with pytest.raises(RuntimeError) as expected:
            check(asked)
        with pytest.raises(RuntimeError) as caught:
            lstm_ext.engines.choose("cpu", np.dtype("float32")).engine.forward(tuple(asked), Save.NOTHING)
        assert str(caught.value) == str(expected.value)
        assert str(caught.value).startswith(("x, weights: expected at most", "w_hh: expected at least one"))


EVEN = pack_sequence([torch.ones(2, 4)] * 2)  # of one length: torch's operator runs oneDNN, which trusts these sizes
UNEVEN = pack_sequence([torch.ones(2, 4), torch.ones(1, 4)])
ONE = torch.tensor([1])
UNCHECKED: dict[str, tuple[str, tuple[int, ...], tuple[Any, ...]]] = {
    "packed, width of x": ("", (), (EVEN._replace(data=torch.ones(4, 9)),)),
    "packed, 3-D x": ("", (), (EVEN._replace(data=torch.ones(4, 9, 1)),)),
    "packed, rows of the state": ("", (), (EVEN, (torch.ones(1, 1, 8),) * 2)),
    "packed, layers of h": ("", (), (UNEVEN, (torch.ones(2, 2, 8), torch.ones(1, 2, 8)))),
    "packed, 4-D c": ("", (), (UNEVEN, (torch.ones(1, 2, 8), torch.ones(1, 1, 2, 8)))),
    "packed, a tensor as the state": ("", (), (pack_sequence([torch.ones(2, 4)] * 2, False), torch.ones(2, 1, 1, 8))),
    "packed, a lying order": ("", (), (PackedSequence(*EVEN[:2], *[ONE] * 2), (torch.ones(1, 2, 8),) * 2)),
    "weight_ih_l0": ("weight_ih_l0", (4, 4), (torch.ones(5, 2, 4),)),
    "weight_hh_l0": ("weight_hh_l0", (32, 1), (torch.ones(5, 2, 4),)),
    "bias_ih_l1": ("bias_ih_l1", (1,), (torch.ones(5, 2, 4),)),
}


@pytest.mark.parametrize("name", UNCHECKED)
def test_torch_is_not_asked_about_sizes_that_it_does_not_check(name: str) -> None:
    """It would end the process, or give back what stands in memory beyond."""
    weight, size, args = UNCHECKED[name]
    module = lstm_ext.LSTM(4, 8, 2 if weight else 1)
    if weight:
        setattr(module, weight, torch.nn.Parameter(torch.ones(size)))
    with pytest.raises((RuntimeError, TypeError), match=r"expected|Expected|input must have|out of DATA bounds"):
        module(*args)


UNCHECKED_BY_THE_CELL: dict[str, tuple[str, tuple[int, ...], tuple[Any, ...]]] = {
    "2-D state beside a 1-D x": ("", (), (torch.ones(4), (torch.ones(2, 2),) * 2)),
    "2-D c beside a 1-D x": ("", (), (torch.ones(4), (torch.ones(2), torch.ones(2, 2)))),
    "few gates": ("weight_ih weight_hh", (2,), (torch.ones(3, 4),)),
    "3-D bias": ("bias_ih", (3, 1, 8), (torch.ones(3, 4),)),
}


@pytest.mark.parametrize("name", UNCHECKED_BY_THE_CELL)
def test_nor_is_its_cell(name: str) -> None:
    weights, size, args = UNCHECKED_BY_THE_CELL[name]
    cell = lstm_ext.LSTMCell(4, 2, bias=weights != "weight_ih weight_hh")
    for weight in weights.split():
        axes = () if weight == "bias_ih" else getattr(cell, weight).shape[1:]
        setattr(cell, weight, torch.nn.Parameter(torch.ones(*size, *axes)))
    with pytest.raises(RuntimeError, match="expected"):
        cell(*args)


def test_nor_where_there_is_no_kernel() -> None:
    module = lstm_ext.LSTM(4, 8, bidirectional=True)
    x, h, c = (torch.ones(size, dtype=torch.uint8) for size in ((5, 3, 4), (2, 3, 8), (1, 3, 8)))
    with pytest.raises((RuntimeError, ValueError), match=r"Expected hidden\[1\] size|input dtype|does not match"):
        module(x, (h, c))


def test_nor_where_a_subclass_checks_nothing() -> None:
    class Unchecked(lstm_ext.LSTM):
        def check_forward_args(self, *args: Any) -> None:
            pass

    module = Unchecked(4, 8)
    for x, state in ((torch.ones(5, 2, 9), None), (torch.ones(5, 2, 4), (torch.ones(1, 1, 8),) * 2)):
        with pytest.raises(RuntimeError, match="expected shape"):
            module(x, state)


def test_a_step_of_no_units_is_empty_as_that_of_torch() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    for module in (lstm_ext.LSTMCell(3, 0), torch.nn.LSTMCell(3, 0)):
        h, c = module(x)
        assert h.shape == c.shape == (2, 0)
        (dx,) = torch.autograd.grad(h.sum() + c.sum(), x)
        assert torch.equal(dx, torch.zeros(2, 3))


# Memory that means something else ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", ["x", "w_ih", "w_hh", "b_ih", "b_hh", "h0", "c0"])
def test_lazily_negated_tensors_keep_their_sign_however_they_lie(name: str) -> None:
    a = arguments("torch")
    expected = call(a)
    lazy = torch._neg_view(-a[name])
    assert lazy.is_neg()
    assert lazy.stride(-1) == 1
    y, state = call(a | {name: lazy})
    for ours, theirs in zip((y, *state), (expected[0], *expected[1]), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("backend")
def test_the_negative_bit_of_public_calls() -> None:
    """The imaginary part of a conjugate, seen so that its columns are adjacent."""
    z = torch.randn(2, 1, 4, dtype=torch.complex64).conj().imag.as_strided((2, 1, 4), (4, 4, 1))
    assert z.is_neg()
    module, copy = lstm_ext.LSTM(4, 3), z.clone()
    for run in (module, torch.no_grad()(module), lambda x: lstm_ext.lstm(x, None, *list(module.parameters())[:2])):
        assert torch.equal(run(z)[0], run(copy)[0])
    cell = lstm_ext.LSTMCell(4, 3)
    assert torch.equal(cell(z[0])[0], cell(copy[0])[0])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", ["x", "w_ih", "b_hh", "c0"])
def test_the_conjugate_bit_cannot_come(name: str) -> None:
    """Only complex tensors have it, and their dtypes are refused."""
    a = arguments("torch")
    a[name] = torch.complex(a[name], a[name]).conj()
    assert a[name].is_conj()
    with pytest.raises(RuntimeError, match=r"expected dtype .*complex64"):
        call(a)


@needs_native
@pytest.mark.parametrize("name", ["x", "w_ih", "w_hh", "b_ih", "h0", "c0", "lengths"])
def test_misaligned_tensors_are_copied(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor may allow to load them; the language does not."""
    a, copied = arguments("torch"), []
    array = misaligned(np.ascontiguousarray(a[name].numpy()))
    own = torch.from_numpy(array.view(np.uint8).reshape(-1)).view(-1)  # numpy's views of other dtypes are refused
    lying = torch.frombuffer(own.numpy(), dtype=a[name].dtype).reshape(a[name].shape)
    assert lying.data_ptr() % lying.element_size()
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda t: copied.append(t.data_ptr()) or clone(t))
    with lstm_ext.use_backend("cpu"):
        y, _ = call(a | {name: lying})
        assert copied == [lying.data_ptr()]
        assert torch.equal(y, call(a)[0])


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_bias_alone_is_joined_by_zeros_whatever_it_holds(kind: str) -> None:
    a = arguments(kind)
    a["b_ih"][0], a["b_hh"] = float("inf"), a["b_hh"] * 0
    y, (_, c_n) = call(a)
    other = call(a | {"b_hh": None})
    assert np.array_equal(y, other[0], equal_nan=True)
    assert np.isfinite(np.asarray(c_n)).all()


# What is no array ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("missing", ["w_ih", "w_hh"])
def test_a_missing_weight_is_a_type_error(kind: str, missing: str) -> None:
    a = arguments(kind) | {missing: None}
    with pytest.raises(TypeError, match="w"):
        call(a)
    with pytest.raises(TypeError, match="w"):
        lstm_ext.lstm_cell(a["x"][0], None, a["w_ih"], a["w_hh"])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_lengths_of_any_integer_dtype(kind: str, dtype: str) -> None:
    a = arguments(kind)

    def given(values: Any) -> Any:
        array = np.array(list(values), dtype=dtype)
        return torch.from_numpy(array) if kind == "torch" else array

    lengths = given(a["lengths"])
    assert np.array_equal(call(a)[0], call(a | {"lengths": lengths})[0])
    if kind == "torch":
        module = lstm_ext.LSTM(5, 7)
        module(a["x"], lengths=lengths)[0].sum().backward()
    if dtype.startswith("u"):
        with pytest.raises(ValueError, match="lengths: expected values from 0 to T = 4"):
            call(a | {"lengths": given([1, np.iinfo(dtype).max, 1])})


class Liar:
    """Says that it speaks DLPack."""

    dtype = "float32"

    def __init__(self, device: Any):
        self.device = device

    def __array_namespace__(self) -> Any:
        return np

    def __dlpack_device__(self) -> Any:
        return self.device

    def __dlpack__(self, **_: Any) -> Any:
        raise LookupError("none")


@pytest.mark.parametrize("device", [(), None, "cpu", (2, 0), (99, 0), (1, 0)])
def test_odd_producers_of_dlpack(device: Any) -> None:
    with pytest.raises(RuntimeError, match=r"the memory cannot be read through DLPack"):
        lstm_ext.lstm(Liar(device), None, Liar(device), Liar(device))


def test_meta_tensors_have_no_weights_to_convert() -> None:
    state = torch.nn.LSTM(2, 3, device="meta").state_dict()
    with pytest.raises(TypeError, match="meta tensor"):
        convert.from_state_dict(state)


@needs_native
def test_a_capsule_of_another_name_is_no_exchange_api() -> None:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    for name in (b"another", None):
        odd = type("Odd", (), {"__dlpack_c_exchange_api__": new(1, name, None)})
        with pytest.raises(ValueError, match="PyCapsule_GetPointer called with incorrect name"):
            _native.C.take_tensor_types((odd,), None)


# Processes -----------------------------------------------------------------------------------------------------------

MANY_THREADS = """
import os, numpy as np, torch, lstm_ext, lstm_ext.ops
from lstm_ext import _native
x, a, b = (np.full(s, .1, "f4") for s in [(20, 24, 64), (256, 64), (256, 64)])
call = (x, None, None, [a, b], None, None, None, 0, False, None, None)
expected = _native.C.layer_forward(call, 0, 1)[0]
assert (lstm_ext.lstm(x, None, a, b)[0] == expected).all()
for threads in (100_000, 2**31 - 1):
    assert (_native.C.layer_forward(call, 0, threads)[0] == expected).all()
print(len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else 0)
"""


@needs_native
@pytest.mark.parametrize("threads", ["20000", "1000000000"])
def test_threads_are_no_more_than_can_be(threads: str) -> None:
    """OpenMP ends the process where it gets fewer than it asks for."""
    assert int(succeed(MANY_THREADS, OMP_NUM_THREADS=threads)) < 64 + 4 * (os.cpu_count() or 1) + 16


AT_EXIT = """
import threading, time, numpy as np, lstm_ext
class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(0.5)  # the interpreter has ended, and gives its lock away
slow = Slow()
x, a, b = (np.full(s, .1, "f4") for s in [(40, 32, 64), (512, 64), (512, 128)])
def work():
    while True:
        lstm_ext.lstm(x, None, a, b)
        began.set()
began = threading.Event()
for _ in range(2):
    threading.Thread(target=work, daemon=True).start()
began.wait()
"""


@needs_native
def test_a_daemon_thread_may_be_in_a_call_when_the_interpreter_ends() -> None:
    for _ in range(3):
        done = run_python("-c", AT_EXIT)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("record", ["", "{", "[]", "null", "{}", '{"native": false}', "\udcff", "[" * 10**5])
def test_a_damaged_record_of_the_installation_names_itself(
    record: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "_build_info.json").write_bytes(record.encode("utf-8", "surrogateescape"))
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "_native.py"))
    assert "_build_info.json, is damaged" in _native._recorded_reason()


@needs_native
def test_a_simd_level_that_is_no_text_names_itself() -> None:
    program = """
import lstm_ext, numpy as np
try:
    lstm_ext.lstm(np.zeros((1, 1, 1)), None, np.zeros((4, 1)), np.zeros((4, 1)))
except ValueError as error:
    print(error)
"""
    assert "LSTM_EXT_SIMD: expected one of" in succeed(program, LSTM_EXT_SIMD="\udcff\udcfe")


SUBINTERPRETER = """
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
import sys
interpreters.run_string(interpreters.create(), '''
import warnings
warnings.simplefilter("ignore")
try:
    import lstm_ext
    print(lstm_ext.backends()["cpu"].reason, flush=True)
    import lstm_ext._C
except ImportError as error:
    print("refused:", error, flush=True)
''')
"""


@needs_native
def test_a_subinterpreter_cannot_import_the_core() -> None:
    """It says so, where pybind11 alone would wait for ever; NumPy may refuse before."""
    said = succeed(SUBINTERPRETER)
    assert "refused:" in said
    assert "lstm_ext._C: expected the main interpreter, got a subinterpreter" in said or "numpy" in said.lower()

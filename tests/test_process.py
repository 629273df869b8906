"""The package inside a process: imports, threads, forks, and machines that lack torch or the native module."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lstm_ext
from lstm_ext import _native, quick_bench, reference
from lstm_ext.__main__ import main
from lstm_ext.call import Save
from lstm_ext.testing import Case, assert_identical, make_inputs, run_layer, run_oracle

from .conftest import needs_native

WITHOUT_TORCH = "import sys; sys.modules['torch'] = None\n"
WITHOUT_NATIVE = "import sys; sys.modules['lstm_ext._C'] = None\n"


def run_python(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Another Python, away from the sources, which would hide the package that is installed."""
    return subprocess.run(
        [sys.executable, "-W", "default", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd or tempfile.gettempdir(),
        env=os.environ | environment,
        timeout=120,
        check=False,
    )


def succeed(program: str, **environment: str) -> str:
    done = run_python("-c", textwrap.dedent(program), **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


NUMPY_PROGRAM = """
import numpy as np, lstm_ext
assert "torch" not in sys.modules or sys.modules["torch"] is None
x, w_ih, w_hh = (np.full(shape, 0.1, np.float32) for shape in [(3, 2, 4), (20, 4), (20, 5)])
y, (h, c) = lstm_ext.lstm(x, None, w_ih, w_hh)
assert y.shape == (3, 2, 5) and (y[-1] == h).all() and h.any()
"""


@pytest.mark.parametrize("missing", [WITHOUT_TORCH, WITHOUT_TORCH + WITHOUT_NATIVE], ids=["torch", "torch-and-native"])
def test_numpy_arrays_need_neither_torch_nor_the_native_module(missing: str) -> None:
    succeed(missing + NUMPY_PROGRAM)


def test_without_torch_what_needs_it_says_so() -> None:
    """By whichever way it is named, with the type of error that Python has for that way."""
    said = succeed(
        WITHOUT_TORCH
        + """
import lstm_ext
for name in ("LSTM", "LSTMCell", "BasicLSTMCell", "replace_lstm", "to_torch", "onnx", "ops"):
    for way in ("lstm_ext." + name, "from lstm_ext import " + name):
        try:
            exec(way)
        except Exception as error:
            print(way, type(error).__name__, error, sep="|")
"""
    )
    for line in said.splitlines():
        way, kind, text = line.split("|")
        name = way.removeprefix("lstm_ext.").removeprefix("from lstm_ext import ")
        assert kind == ("ImportError" if way.startswith("from") else "AttributeError")
        assert text == f"lstm_ext.{name} needs PyTorch (torch>=2.11); lstm_ext.lstm works on NumPy arrays"
    assert len(said.splitlines()) == 14


def test_without_torch_the_package_can_be_looked_at() -> None:
    succeed(
        WITHOUT_TORCH
        + """
import inspect, pydoc, numpy as np, lstm_ext
from lstm_ext import *
assert not hasattr(lstm_ext, "LSTM") and "LSTM" not in lstm_ext.__all__ + dir(lstm_ext)
assert {"lstm", "convert", "testing"} <= set(dir(lstm_ext)) and "ops" not in dir(lstm_ext)
inspect.getmembers(lstm_ext)
assert "lstm_cell(x: 'A'" in pydoc.render_doc(lstm_ext, renderer=pydoc.plaintext)
try:
    lstm_ext.convert.to_state_dict(lstm_ext.convert.Weights(np.ones((8, 3)), np.ones((8, 2))))
except ImportError as error:
    assert "to_state_dict" in str(error) and "needs PyTorch" in str(error)
"""
    )


def test_completion_shows_what_is_public_and_no_more() -> None:
    shown = {name for name in dir(lstm_ext) if not name.startswith("__")}
    assert shown == {*lstm_ext.__all__, "convert", "onnx", "ops", "testing"}


def test_without_the_native_module_tensors_are_torchs_and_one_warning_says_so() -> None:
    """NumPy has arrays, and tensors where it is asked for."""
    output = succeed(
        WITHOUT_NATIVE
        + """
import numpy as np, torch, lstm_ext
from lstm_ext.engines import numpy
ran, forward = [], numpy.forward
numpy.forward = lambda *arguments: ran.append(1) or forward(*arguments)
assert not lstm_ext.backends()["cpu"].available
print("reason:", lstm_ext.backends()["cpu"].reason)
torch.manual_seed(0)
ours = lstm_ext.LSTM(3, 5, 2, bidirectional=True)
stock = torch.nn.LSTM(3, 5, 2, bidirectional=True)
stock.load_state_dict(ours.state_dict())
x = torch.randn(4, 2, 3)
for module in (ours, stock):
    for _ in range(2):
        module(x)[0].square().sum().backward()
for a, b in zip(ours.parameters(), stock.parameters()):
    assert torch.equal(a.grad, b.grad)
layer, cell, basic = lstm_ext.LSTM(3, 5), lstm_ext.LSTMCell(3, 5), lstm_ext.BasicLSTMCell(5, input_size=3)
options = lstm_ext.LSTM(3, 5, peephole=True, layer_norm=True)
calls = [
    lambda: layer(x)[0],
    lambda: layer(x, lengths=[4, 1])[0],
    lambda: options(x)[0],
    lambda: cell(x[0])[0],
    lambda: cell(x[0], resets=[True, False])[0],
    lambda: basic(x[0])[0],
    lambda: lstm_ext.dynamic_rnn(basic, x, [2, 0, 1, 2])[0],
    lambda: lstm_ext.lstm(x, None, *layer.parameters(), reverse=True)[0],
    lambda: torch.vmap(layer)(x[None])[0][0],
    lambda: torch.func.grad(lambda x: options(x)[0].square().sum())(x),
    lambda: torch.compile(layer, fullgraph=True, backend="aot_eager")(x)[0],
]
results = [call() for call in calls]
torch.testing.assert_close(results[0], results[10])
assert not ran
with lstm_ext.use_backend("numpy"):
    for call, expected in zip(calls[:10], results):
        torch.testing.assert_close(call(), expected)
        assert ran.pop() and not ran.clear()
weights = [p.detach().numpy() for p in layer.parameters()]
np.testing.assert_allclose(lstm_ext.lstm(x.numpy(), None, *weights)[0], results[0].detach(), rtol=1e-5, atol=1e-6)
assert ran
"""
    )
    assert "reason: " in output
    assert output.count("UserWarning: lstm_ext computes in NumPy") == 1


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A folder with the package as it lies in a clone: with nothing compiled."""
    package = Path(lstm_ext.__file__).parent
    shutil.copytree(
        package, tmp_path / "lstm_ext", ignore=shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    )
    (tmp_path / "csrc").mkdir()
    return tmp_path


def test_sources_that_hide_the_installed_package_say_so_once(sources: Path) -> None:
    installed = str(Path(lstm_ext.__file__).parents[1])
    program = "import numpy as np, lstm_ext, torch; z = np.zeros; print(lstm_ext.__file__)\n"
    program += "lstm_ext.lstm(z((2, 1, 1)), None, z((4, 1)), z((4, 1))); lstm_ext.LSTM(1, 1)(torch.zeros(2, 1, 1))"
    done = run_python("-c", program, cwd=sources, PYTHONPATH=installed)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(sources / "lstm_ext" / "__init__.py")
    assert done.stderr.count("lstm_ext computes in NumPy") == done.stderr.count("UserWarning") == 1
    for words in (
        "<string>:1: ",
        "source folder",
        str(Path(installed) / "lstm_ext"),
        "another folder",
        "pip install -e .",
    ):
        assert words in done.stderr
    assert "circular" not in done.stderr


def test_sources_alone_say_that_they_have_to_be_installed(sources: Path) -> None:
    program = """
import pathlib, sys, numpy
sys.path = [each for each in sys.path if not each or not (pathlib.Path(each) / "lstm_ext").exists()]
import lstm_ext
"""
    done = run_python("-c", program, cwd=sources)
    assert done.returncode == 0, done.stderr
    assert "Install it in place (pip install -e .)" in done.stderr


def test_the_self_check_fails_where_kernels_are_missing(sources: Path) -> None:
    done = run_python("-m", "lstm_ext", cwd=sources)
    assert done.returncode == 1, done.stderr
    assert done.stdout.rstrip().endswith("the CPU kernels are not in use, for the reason above")
    record = '{"native": false, "reason": "built with LSTM_EXT_BUILD=python"}'
    (sources / "lstm_ext" / "_build_info.json").write_text(record, encoding="utf-8")
    done = run_python("-m", "lstm_ext", cwd=sources)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("built with LSTM_EXT_BUILD=python") == 1
    assert done.stdout.rstrip().endswith("all checks passed")
    assert "Warning" not in done.stderr
    program = "import torch, lstm_ext; [lstm_ext.LSTM(1, 1)(torch.zeros(1, 1, 1)) for _ in range(2)]"
    done = run_python("-c", program, cwd=sources)
    assert done.stderr.count("the compiled kernels are missing (built with LSTM_EXT_BUILD=python)") == 1


def test_import_is_fast_and_leaves_torch_alone() -> None:
    program = """
    import sys, time, numpy
    start = time.perf_counter()
    import lstm_ext
    assert "torch" not in sys.modules
    print(time.perf_counter() - start)
    """
    assert min(float(succeed(program)) for _ in range(3)) < 0.3


def test_layers_run_without_torchs_compiler() -> None:
    """Importing that takes as long as importing torch, and most programs compile nothing."""
    program = """
    import sys, torch, lstm_ext
    given = set(sys.modules)
    lstm = lstm_ext.replace_lstm(torch.nn.Sequential(torch.nn.LSTM(2, 3)))[0]
    for layer in (lstm, lstm_ext.LSTM(2, 3, peephole=True)):
        layer(torch.zeros(4, 1, 2))[0].sum().backward()
    lstm_ext.BasicLSTMCell(3)(torch.zeros(1, 2))
    lstm_ext.freeze(lstm)(torch.zeros(4, 1, 2))
    assert not {"torch._dynamo", "torch.onnx", "sympy"} & (set(sys.modules) - given)
    """
    succeed(program)


def test_importing_the_package_imports_no_module_twice_and_every_public_name_exists() -> None:
    for name in lstm_ext.__all__:
        assert getattr(lstm_ext, name) is getattr(lstm_ext, name), name
    with pytest.raises(AttributeError, match="no attribute 'lstmm'"):
        lstm_ext.lstmm  # noqa: B018


@needs_native
def test_the_self_check_passes() -> None:
    done = run_python("-m", "lstm_ext")
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("cpu", "numpy", "cuda", torch.__version__):
        assert word in done.stdout


def test_the_self_check_is_a_program_like_others() -> None:
    done = run_python("-m", "lstm_ext", "--help")
    assert done.returncode == 0
    assert "Exit status" in done.stdout
    assert run_python("-m", "lstm_ext", "--version").stdout == f"lstm_ext {lstm_ext.__version__}\n"
    done = run_python("-m", "lstm_ext", "--bogus")
    assert done.returncode == 2
    assert "unrecognized arguments: --bogus" in done.stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("info", ["lstm_ext 0.", "backend numpy: available"]),
        ("check", ["pass  numpy, float32", "all checks passed"]),
        ("plan 512 16 768 --device H100 --dtype bfloat16", ["strategy               grid", "not cluster  "]),
        ("plan 50 16 64 --num-threads 1", ["engine                 vectors (", "threads                1 ("]),
        ("bench", ["torch / lstm_ext", "    2    3      5  inference", "    2    3      5  training"]),
    ],
)
@needs_native
def test_a_command_says_its_part_in_80_columns(
    command: str, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quick_bench, "SIZES", ((2, 3, 5),))
    monkeypatch.setattr(quick_bench, "SECONDS", 1e-4)
    monkeypatch.setenv("COLUMNS", "80")
    for stream in (sys.stdout, sys.stderr):  # what is captured is taken for a terminal
        monkeypatch.setattr(stream, "isatty", lambda: True)
    assert main(command.split()) == 0
    said = capsys.readouterr()
    for text in words:
        assert text in said.out
    assert max(map(len, said.out.splitlines())) <= 80
    assert ("all checks passed" in said.out) == (command == "check")
    assert ("backend numpy" in said.out) == (command == "info")
    assert (f"\r{'#' * 40} 2/2\r" in said.err) == (command == "bench")


@needs_native
def test_a_bench_gives_no_time_of_what_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(inputs: Any) -> Any:
        outputs, gradients = run_oracle(inputs)
        return outputs, gradients | {"dx": gradients["dx"] * 1.01}

    monkeypatch.setattr(quick_bench, "SIZES", ((2, 3, 5),))
    monkeypatch.setattr(quick_bench, "run_oracle", too_large)
    assert main(["bench"]) == 1
    said = capsys.readouterr()
    assert said.out.count("WRONG") == 2
    assert said.err == ""


@pytest.mark.parametrize("command", ["bench --device cuda", "plan 0 1 1", "plan 1 1 1 --strategy grid"])
def test_a_command_that_cannot_be_done_says_so_in_a_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    if command.startswith("bench") and lstm_ext.backends()["cuda"].available:
        pytest.skip("it can be done here")
    assert main(command.split()) == 1
    assert capsys.readouterr().err.startswith("lstm_ext: ")


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="the system has no such signal")
def test_the_self_check_ends_quietly_when_nobody_reads_on() -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "lstm_ext"],
            stdout=closed,
            stderr=subprocess.PIPE,
            cwd=tempfile.gettempdir(),
            timeout=120,
            check=False,
        )
    assert done.returncode == -signal.SIGPIPE
    assert done.stderr == b""


@pytest.mark.parametrize(("name", "expected"), [("gpu", "expected one of"), ("cuda", "is not available")])
def test_an_unusable_backend_in_the_environment_is_an_error_at_first_use(name: str, expected: str) -> None:
    done = run_python("-c", "import sys" + NUMPY_PROGRAM, LSTM_EXT_BACKEND=name)
    assert done.returncode != 0
    assert expected in done.stderr
    assert "'numpy'" in done.stderr


@needs_native
@pytest.mark.parametrize(
    "use",
    [
        "lstm_ext.lstm(np.zeros((1, 1, 1)), None, np.zeros((4, 1)), np.zeros((4, 1)))",
        "import torch; lstm_ext.LSTM(1, 1)(torch.zeros(1, 1, 1))",
        "lstm_ext.build_info()",
        "lstm_ext.plan(1, 1, 1, device='cpu')",
    ],
)
def test_an_unknown_simd_level_is_an_error_at_first_use(use: str) -> None:
    program = f"""
import numpy as np, lstm_ext
assert lstm_ext.backends()['cpu'].available
try:
    {use}
except ValueError as error:
    print(error)
"""
    names = ", ".join(_native.C.build_info()["simd_built"])
    said = succeed(program, LSTM_EXT_SIMD="sse9")
    assert said.strip() == f"LSTM_EXT_SIMD: expected one of {names}, got 'sse9'"


@needs_native
def test_the_self_check_reports_wrong_variables_in_one_line() -> None:
    for name, value in (("LSTM_EXT_SIMD", "sse9"), ("LSTM_EXT_BACKEND", "gpu")):
        done = run_python("-m", "lstm_ext", **{name: value})
        assert done.returncode == 1
        assert done.stderr.startswith(f"lstm_ext: {name}: expected one of")
        assert done.stdout.count("\n") + done.stderr.count("\n") == 1


@needs_native
def test_a_simd_level_above_the_machines_is_the_highest_below_it() -> None:
    """With one warning; a level that the machine has is used without."""
    info = _native.C.build_info()
    built, available = info["simd_built"], info["simd_available"]
    program = "import numpy as np, lstm_ext; w = np.zeros((4, 1), np.float32)\n"
    program += "for _ in range(2): lstm_ext.lstm(w[None], None, w, w)\n"
    program += "lstm_ext.lstm(w[None].astype('float64'), None, w.astype('float64'), w.astype('float64'))\n"
    program += "print(lstm_ext.build_info()['simd'])"
    for n, level in enumerate(built):
        used = [each for each in built[: n + 1] if each in available][-1]
        said = succeed(program, LSTM_EXT_SIMD=level)
        assert used in said.splitlines()
        assert said.count(f"LSTM_EXT_SIMD: this machine has no {level}; lstm_ext uses {used}") == (level != used)


LOGGED = """
import numpy as np, torch, lstm_ext
x, w_ih, w_hh = (np.full(shape, 0.1, np.float32) for shape in [(8, 3, 4), (20, 4), (20, 5)])
for steps in (8, 8, 7):  # another number of steps is no other plan, unless it is planned otherwise
    lstm_ext.lstm(x[:steps], None, w_ih, w_hh)
lstm = lstm_ext.LSTM(6, 7, proj_size=2)
lstm(torch.randn(9, 3, 6))[0].sum().backward()
with lstm_ext.use_backend("numpy"):
    lstm(torch.randn(9, 3, 6))
lstm_ext.LSTMCell(6, 7)(torch.randn(3, 6))
torch.func.jvp(lambda x: lstm(x)[0], (torch.randn(9, 3, 6),), (torch.randn(9, 3, 6),))
"""


@needs_native
def test_the_log_has_a_line_for_each_new_plan() -> None:
    done = run_python("-c", LOGGED, LSTM_EXT_LOG="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("lstm_ext: ") for line in done.stderr.splitlines() if line.startswith("lstm_ext: ")]
    cpu = "cpu, engine="
    expected = [
        ("forward T=8 B=3 I=4 H=5 P=0 float32 cpu: ", cpu),
        ("forward T=9 B=3 I=6 H=7 P=2 float32 cpu: ", cpu),
        ("backward T=9 B=3 I=6 H=7 P=2 float32 cpu: ", cpu),
        ("forward T=9 B=3 I=6 H=7 P=2 float32 cpu: ", "numpy (asked for), step by step in NumPy"),
        ("forward T=1 B=3 I=6 H=7 P=0 float32 cpu cell: ", cpu),
        ("forward T=9 B=3 I=6 H=7 P=2 float32 cpu: ", "torch's operations, step by step (forward-mode derivatives)"),
    ]
    lines = [line for line in lines if not line.startswith("forward T=7")]  # which chunk_steps may tell apart
    assert [line.startswith(call + way) for line, (call, way) in zip(lines, expected, strict=True)] == [True] * 6, lines
    assert all("threads=1 (" in line and "chunk_steps=" in line for line in lines if cpu in line)
    assert "lstm_ext: " not in run_python("-c", LOGGED, LSTM_EXT_LOG="0").stderr


def test_the_log_tells_why_there_are_no_kernels() -> None:
    said = succeed(WITHOUT_TORCH + WITHOUT_NATIVE + NUMPY_PROGRAM, LSTM_EXT_LOG="1")
    assert "forward T=3 B=2 I=4 H=5 P=0 float32 cpu: numpy (cpu: lstm_ext._C cannot be imported" in said


# Threads and processes -----------------------------------------------------------------------------------------------

SHARED_CASE = Case(20, 12, 33, 65)  # large enough for the pool


def run_shared_case(num_threads: int) -> dict[str, np.ndarray]:
    outputs, gradients = run_layer(_native.C, make_inputs(SHARED_CASE, "float32"), num_threads)
    return outputs | gradients


@needs_native
def test_many_python_threads_at_once() -> None:
    expected, start = run_shared_case(1), threading.Barrier(6)

    def work(n: int) -> None:
        start.wait()
        for turn in range(10):
            assert_identical(run_shared_case(1 + (n + turn) % 4), expected)

    with ThreadPoolExecutor(6) as executor:
        list(executor.map(work, range(6)))


@needs_native
def test_many_python_threads_on_numpy_arrays() -> None:
    """The program that CI runs under ThreadSanitizer too."""
    done = run_python(str(Path(__file__).with_name("numpy_threads.py")))
    assert done.returncode == 0, done.stderr


@needs_native
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system has no affinities that can be read")
def test_threads_are_bound_to_no_processor() -> None:
    """They may move at the beginning of a call, but stay free to run wherever the process may."""
    succeed(
        """
        import os, time, torch, lstm_ext
        torch.set_num_threads(2)
        lstm, x = lstm_ext.LSTM(64, 128), torch.randn(20, 4, 64)
        for _ in range(30):
            lstm(x)
            time.sleep(0.01)
        allowed = os.sched_getaffinity(0)
        assert [t for t in os.listdir("/proc/self/task") if os.sched_getaffinity(int(t)) != allowed] == []
        """
    )


@needs_native
def test_flushing_denormals_does_not_depend_on_the_thread() -> None:
    inputs = make_inputs(SHARED_CASE, "float32").map(lambda a: a * np.float32(1e-37))
    assert torch.set_flush_denormal(True)
    try:
        one, two = (run_layer(_native.C, inputs, num_threads) for num_threads in (1, 2))
    finally:
        torch.set_flush_denormal(False)
    assert_identical(two[0] | two[1], one[0] | one[1])


def check_in_child(expected: dict[str, np.ndarray]) -> None:
    assert_identical(run_shared_case(2), expected)


@needs_native
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_computes_with_its_own_pool() -> None:
    expected = run_shared_case(2)  # the parent's pool runs
    child = multiprocessing.get_context("fork").Process(target=check_in_child, args=(expected,))
    child.start()
    child.join(60)
    assert child.exitcode == 0


class Sequences(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Runs the module in the worker that loads an item."""

    def __init__(self) -> None:
        self.module = lstm_ext.LSTM(8, 64).eval()

    def __len__(self) -> int:
        return 4

    def __getitem__(self, n: int) -> torch.Tensor:
        with torch.no_grad():
            return self.module(torch.full((30, 8, 8), n / 4))[0]


@needs_native
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_dataloader_workers() -> None:
    dataset = Sequences()
    expected = torch.stack([dataset[n] for n in range(4)])
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context="fork")
    torch.testing.assert_close(torch.cat(list(loader)), expected, rtol=0, atol=0)


@needs_native
def test_thread_counts_are_those_of_torch_or_of_openmp() -> None:
    """OMP_NUM_THREADS=1 starts no thread; torch.set_num_threads holds for tensors."""
    program = """
    import os, sys, numpy as np
    def threads(): return len(os.listdir("/proc/self/task"))
    from lstm_ext import lstm
    big = [np.full(s, .01, np.float32) for s in [(20, 24, 64), (256, 64), (256, 64)]]
    before = threads()
    lstm(big[0], None, *big[1:])
    print(threads() - before)
    """
    assert succeed(program, OMP_NUM_THREADS="1").strip() == "0"
    assert succeed(program, OMP_NUM_THREADS="2").strip() == "1"


@needs_native
def test_the_gil_is_released() -> None:
    """Another Python thread runs on while a kernel computes."""
    inputs = make_inputs(Case(200, 32, 128, 256), "float32")
    done, ticks = threading.Event(), 0

    def tick() -> None:
        nonlocal ticks
        while not done.wait(0.001):
            ticks += 1

    ticker = threading.Thread(target=tick)
    ticker.start()
    _native.C.layer_forward(inputs.call, Save.NOTHING, 1)
    done.set()
    ticker.join()
    assert ticks >= 5  # some hundred milliseconds of computing


def test_the_reference_is_what_runs_under_use_backend() -> None:
    inputs = make_inputs(Case(4, 3, 5, 7, state=False), "float32")
    expected = reference.layer_forward(inputs.call, Save.NOTHING).y
    with lstm_ext.use_backend("numpy"):
        np.testing.assert_array_equal(lstm_ext.lstm(inputs.x, None, *inputs.weights)[0], expected)

"""Self-checks of CUDA kernels, and plans by measured times, with the kernels run on the CPU: see tests/cuda_on_cpu."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lstm_ext
from lstm_ext import __main__, _native, engines, gpu_files, measured, self_check, tuning
from lstm_ext.call import Save
from lstm_ext.testing import Case, assert_all_close, make_inputs, run_layer, run_oracle

harness: Any = pytest.importorskip(
    "lstm_ext_cuda_on_cpu",
    reason="the harness is not built: see tests/cuda_on_cpu/README.md",
    exc_type=ModuleNotFoundError,
)

from .test_cuda_on_cpu import Core, cuda, input_products, torch  # noqa: E402

CASE = Case(5, 9, 7, 21, lengths="with_zero", resets=True)
PLAIN = Case(5, 9, 7, 21)
_unused = iter(range(6, 512))  # devices of which nothing is known yet


class WholeCore(Core):
    """With what is asked besides a layer."""

    cuda_device = staticmethod(harness.cuda_device)
    cuda_plan = staticmethod(harness.cuda_plan)
    cuda_set_measured = staticmethod(harness.cuda_set_measured)
    sm_margin = staticmethod(harness.sm_margin)


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WholeCore]:
    """A device that nobody has used, checked before its first launches; files go to a folder of the test's own."""
    core = WholeCore(device=next(_unused))
    monkeypatch.setattr(_native, "C", core)
    monkeypatch.setattr(cuda, "C", core)
    monkeypatch.setattr(self_check, "_device", lambda number: torch.device("cpu"))
    monkeypatch.setattr(engines, "_refused_dtypes", {})
    monkeypatch.setattr(cuda, "input_products", input_products)  # torch has no such product of half types on a CPU
    monkeypatch.setattr(cuda, "tell_refusal", engines.refuse_on_gpu)
    monkeypatch.setenv(gpu_files.VARIABLE, str(tmp_path / "kept"))
    for variable in (self_check.VARIABLE, measured.VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    measured.hand_over.cache_clear()
    engines.warn_once.cache_clear()
    harness.cuda_take_hooks(measured.hand_over, self_check.check)
    yield core
    harness.cuda_take_hooks(None, None)
    harness.spoil_kernels()
    engines.choose_under.cache_clear()


def run_case(case: Case = CASE, dtype: str = "float32") -> None:
    """Forward and backward through the engine, right to its tolerance."""
    inputs = make_inputs(case, dtype)
    actual = run_layer(cuda, inputs.to_torch(dtype))
    assert_all_close(actual, run_oracle(inputs), case, dtype)


def plan_of(core: WholeCore, backward: bool = False, strategy: str = "", dtype: str = "float32") -> Any:
    sizes = CASE.T, CASE.B, CASE.H, 0, False
    return core.cuda_plan(*sizes, dtype, False, 1, backward, strategy, core.device)


def kept(tmp_path: Path) -> dict[str, Any]:
    (path,) = (tmp_path / "kept").glob("checks-*.json")
    return dict(json.loads(path.read_text()))


# Checks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("projected", "cell"), [(False, ""), (True, ""), (True, "torch"), (False, "TensorFlow")])
@pytest.mark.parametrize("strategy", self_check.STRATEGIES)
@pytest.mark.parametrize("arithmetic", self_check.ARITHMETICS, ids=lambda a: "tf32" if a[1] else a[0])
def test_right_kernels_pass_and_wrong_ones_do_not(
    arithmetic: tuple[str, bool], strategy: str, projected: bool, cell: str, backward: bool, core: WholeCore
) -> None:
    most = 1 if arithmetic[0] == "float64" else 2 if arithmetic == ("float32", False) else 4
    most = min(most, 2 if strategy == "step" else 1) if cell else most
    core.tf32, core.device = arithmetic[1], 0
    way = self_check.Way(*arithmetic, f"{strategy}/{most}", projected, backward, cell)
    assert 0 < self_check.run(way, 0).share < 1
    harness.spoil_kernels("backward" if backward else "forward")
    finding = self_check.run(way, 0)
    assert finding.share > 1
    assert "off by" in finding.wrong


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("projected", "cell"), [(True, "torch, rows"), (False, "torch, gates"), (False, "TensorFlow, gates")]
)
@pytest.mark.parametrize("strategy", ["grid", "step"])  # the others have the code of grid
@pytest.mark.parametrize("arithmetic", self_check.ARITHMETICS, ids=lambda a: "tf32" if a[1] else a[0])
def test_the_same_of_kernels_that_normalise(
    arithmetic: tuple[str, bool], strategy: str, projected: bool, cell: str, backward: bool, core: WholeCore
) -> None:
    core.tf32, core.device = arithmetic[1], 0
    tiles = 2 if strategy == "step" and arithmetic[0] != "float64" else 1
    way = self_check.Way(*arithmetic, f"{strategy}/{tiles}", projected, backward, cell)
    assert 0 < self_check.run(way, 0).share < 1
    kernel = "backward" if backward else "forward"
    harness.spoil_kernels(f"norm_{kernel}" if strategy == "step" else f"norm_sequence_{kernel}")
    assert self_check.run(way, 0).share > 1


def test_without_a_right_kernel_a_cell_that_normalises_is_left_to_torch(core: WholeCore) -> None:
    parts = "norm_forward<float32, 16 sequences, rows>", "norm_sequence_forward<float32, 8 sequences, rows"
    harness.spoil_kernels(*parts)
    call = make_inputs(replace(CASE, cell=self_check.CELLS["torch, rows"]), "float32").to_torch("float32").call
    with pytest.warns(UserWarning, match=rf"leaves out the CUDA kernel {parts[0]}") as said:
        assert cuda.forward(call, Save.NOTHING) is NotImplemented
    assert "in torch's operations" in str(said[-1].message)
    gates = make_inputs(replace(CASE, cell=self_check.CELLS["torch, gates"]), "float32").to_torch("float32").call
    assert cuda.forward(gates, Save.NOTHING) is not NotImplemented


def test_a_right_kernel_is_checked_once_and_that_is_kept(core: WholeCore, tmp_path: Path) -> None:
    before = len(core.asked)
    run_case()
    assert len(core.asked) == before + 2  # the check's backward pass, and the layer's
    kernels = kept(tmp_path)["kernels"]
    assert {name.partition("_")[2].partition("<")[0] for name in kernels} == {"forward", "backward"}
    assert all(0 < self_check.Finding(**finding).share < 1 for finding in kernels.values())
    run_case()
    assert len(core.asked) == before + 3


@pytest.mark.parametrize("part", ["sequence_forward<float32", "sequence_backward<float32", "step_forward<float32"])
def test_a_wrong_kernel_is_left_out_and_a_warning_says_so(part: str, core: WholeCore, tmp_path: Path) -> None:
    harness.spoil_kernels(part)
    backward, step = "backward" in part, part.startswith("step")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if step:
            with (
                pytest.raises(RuntimeError, match="'step' cannot run this: step_forward<float32"),
                cuda.use_strategy("step"),
            ):
                run_case()
        run_case()
        run_case()
    assert caught
    assert len({str(each.message) for each in caught}) == len(caught)  # each kernel's once
    assert all(part in str(each.message) and "allowed are" in str(each.message) for each in caught)
    plan = plan_of(core, backward)
    assert (plan["strategy"] == "step") != step
    wrong = {name: why for name, why in plan["refused"].items() if "self-check failed" in why}
    assert set(wrong) == ({"step"} if step else {"block", "cluster", "grid"})
    assert all(part in why for why in wrong.values())
    findings = kept(tmp_path)["kernels"]
    assert {name for name, finding in findings.items() if self_check.Finding(**finding).wrong} == {
        name for name in findings if part in name
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "cases", [(CASE, PLAIN, Case(5, 9, 7, 13, packed=True)), (Case(4, 5, 6, 33, P=17, bias=False),)], ids=str
)
def test_without_any_right_kernel_torch_computes(cases: tuple[Case, ...], dtype: str, core: WholeCore) -> None:
    """Those of the same kernels, which are checked for the first of them, and are known to be wrong for the rest."""
    harness.spoil_kernels("ward<")
    with pytest.warns(UserWarning, match="leaves out the CUDA kernel"):
        run_case(cases[0], dtype)
    for case in cases:
        engines._refused_dtypes.clear()
        run_case(case, dtype)
        assert list(engines._refused_dtypes) == [dtype]
        assert "self-check failed" in engines._refused_dtypes[dtype]


def test_later_calls_are_torchs_own(core: WholeCore, monkeypatch: pytest.MonkeyPatch) -> None:
    """`choose` gives no engine then, and says why."""
    monkeypatch.setattr(engines, "_reason", lambda name: "" if name in ("cuda", "numpy") else "not here")
    engines.choose_under.cache_clear()
    assert engines.choose("cuda", torch.float32).name == "cuda"
    harness.spoil_kernels("ward<")
    with pytest.warns(UserWarning, match="leaves out"):
        run_case()
    choice = engines.choose("cuda", torch.float32)
    assert choice.engine is None
    assert "cuda: strategy: none can run this: block: sequence_" in choice.reason
    assert engines.choose("cuda", torch.float64).name == "cuda"


@pytest.mark.filterwarnings("ignore:lstm_ext leaves out")
def test_a_cell_runs_by_another_kernel(core: WholeCore) -> None:
    harness.spoil_kernels("step_")
    case = Case(1, 9, 7, 21)
    inputs = make_inputs(case, "float32").without_time()
    own = inputs.to_torch("float32")
    actual = {"y": cuda.forward(own.call, Save.NOTHING)[0]}
    _, gradients = run_layer(cuda, own)
    assert_all_close((actual, gradients), run_oracle(inputs), case, "float32")
    assert "step" in plan_of(core)["refused"]
    assert "step" in plan_of(core, backward=True)["refused"]
    assert engines._refused_dtypes == {}


def test_what_failed_before_is_not_the_kernels_fault(
    core: WholeCore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def hear_of_it(device: torch.device) -> None:
        raise RuntimeError("an illegal memory access of somebody else's")

    with monkeypatch.context() as broken:
        broken.setattr(self_check, "_wait", hear_of_it)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="somebody else's"):
                run_case()
    assert not (tmp_path / "kept").exists()
    run_case()
    assert not [why for why in plan_of(core)["refused"].values() if "self-check" in why]


def test_nothing_is_checked_in_a_capture(core: WholeCore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        run_case()
        assert (tmp_path / "kept").exists() != capturing


def test_the_check_can_be_turned_off(core: WholeCore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(self_check.VARIABLE, "0")
    run_case()
    assert not (tmp_path / "kept").exists()


ODD = [{"error": "much"}, 3, {"error": 99.0}, {"error": 99.0, "allowed": 0.0, "array": "y"}, {}]
SAYING_NOTHING = ["", "{", "[]", '{"about": 3}', "null", "[" * 100_000]


@pytest.mark.parametrize("content", [*SAYING_NOTHING, "about others", *ODD], ids=lambda each: str(each)[:30])
def test_files_that_say_nothing_are_ignored(content: Any, core: WholeCore, tmp_path: Path) -> None:
    about = gpu_files.identity(core.device)
    path = gpu_files.path_of("checks", about)
    path.parent.mkdir()
    kernels = [plan_of(core, backward)["kernel"] for backward in (False, True)]
    if content == "about others":
        findings = {key: {"error": 99.0, "allowed": 1.0, "array": "y"} for key in kernels}
        content = json.dumps({"about": about | {"driver": "another"}, "kernels": findings})
    if content in ODD:
        content = json.dumps({"about": about, "kernels": dict.fromkeys(kernels, content)})
    path.write_text(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_case()
    assert not any(self_check.Finding(**finding).wrong for finding in kept(tmp_path)["kernels"].values())


def test_what_cannot_be_written_is_not_kept(core: WholeCore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(gpu_files.VARIABLE, str(tmp_path / "file" / "below"))
    run_case()


def test_what_was_found_is_not_run_again(core: WholeCore) -> None:
    """Not even what failed: it is the file that says so here."""
    about = gpu_files.identity(core.device)
    finding = {"error": 12.5, "allowed": 0.25, "array": "c_n"}
    kernels = {name: finding for way, name in self_check.ways(core.device) if not way.forced.startswith("step")}
    gpu_files.write(gpu_files.path_of("checks", about), {"about": about, "kernels": kernels})
    with pytest.warns(UserWarning, match=r"c_n is off by 12\.5, allowed are 0\.25"):
        run_case()
    assert plan_of(core)["strategy"] == "step"


def test_all_kernels_are_listed(core: WholeCore) -> None:
    ways = dict(self_check.ways(core.device))
    most = {"float32": 2, "float64": 1}
    for way in ways:
        strategy, _, tiles = way.forced.partition("/")
        wide = 8 if strategy == "step" else 4
        assert int(tiles) <= (wide if way.tf32 else most.get(way.dtype, wide))
    plain = {kernel for way, kernel in ways.items() if not way.cell}
    assert len(plain) == 2 * sum((3 * 3 + 4, 3 * 3 + 4, 3 * 3 + 4, 3 * 2 + 2, 3 * 1 + 1))
    options = {kernel for way, kernel in ways.items() if way.cell}
    of_norms = 2 * 2 * 4  # in two layouts, of each of two norms; without one only that of a step knows its layout
    assert len(options) == 2 * len(self_check.ARITHMETICS) * (3 + 2 + of_norms)
    assert not plain & options
    assert {way.forced.partition("/")[0] for way in ways} == set(self_check.STRATEGIES)
    assert not any(way.tf32 or "cluster" in way.forced for way, _ in self_check.ways(2))  # sm_75


# Measured times ------------------------------------------------------------------------------------------------------

US = {"block": 9.0, "cluster": 5.0, "grid": 7.0, "step": 2.0}


@pytest.fixture
def clock(core: WholeCore, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The kernels run; what they take, in microseconds of a step, is what the test says."""
    times = dict(US)

    def elapsed(run: Any, strategy: str, repeats: int, device: int) -> float:
        run(strategy)
        return times[strategy] * repeats * CASE.T

    monkeypatch.setattr(tuning, "_device", lambda number: torch.device("cpu"))
    monkeypatch.setattr(tuning, "_elapsed", elapsed)
    monkeypatch.setattr(tuning, "_MOST_REPEATS", 1)
    available = {"cuda": engines.Backend("cuda", True, "")}
    monkeypatch.setattr(tuning, "backends", lambda: available)
    return times


SHAPE = (CASE.T, CASE.B, CASE.H)


def test_plans_go_by_what_was_measured(core: WholeCore, clock: dict[str, float]) -> None:
    predicted = plan_of(core)
    assert (predicted["source"], predicted["strategy"] == "step") == ("model", False)
    table = lstm_ext.tune([SHAPE], tf32=False, device=core.device)
    assert [(row.backward, row.microseconds) for row in table] == [(False, US), (True, US)]
    for backward in (False, True):
        plan = plan_of(core, backward)
        assert plan["strategy"] == "step"
        assert plan["microseconds_per_step"] == 2
        assert plan["source"] == f"measured at T5 B9 H21 on {table[0].date}"
        assert plan["refused"]["grid"] == "measured 7.00 us a step, step 2.00"
    clock["step"] = 8.0
    lstm_ext.tune([SHAPE], backward=False, tf32=False, device=core.device)
    assert plan_of(core)["strategy"] == "cluster"
    assert plan_of(core, backward=True)["strategy"] == "step"  # that row was kept


def test_the_nearest_shape_counts_if_it_is_near(core: WholeCore, clock: dict[str, float]) -> None:
    """Of the number of steps plans know the two leading bits: 95 are as 64."""
    shapes = [SHAPE, (CASE.T, 2 * CASE.B, CASE.H)]
    lstm_ext.tune(shapes, backward=False, tf32=False, device=core.device)

    def source(T: int, B: int, H: int, P: int = 0, dtype: str = "float32", directions: int = 1) -> str:
        plan = core.cuda_plan(T, B, H, P, P > 0, dtype, False, directions, False, "", core.device)
        return str(plan["source"]).partition(" on ")[0]

    at = "measured at T5 B"
    assert source(5, 9, 21) == source(5, 11, 21) == source(5, 5, 21) == source(95, 9, 21) == f"{at}9 H21"
    assert source(5, 17, 21) == source(5, 36, 21) == source(5, 18, 29) == f"{at}18 H21"
    assert {source(5, 37, 21), source(5, 4, 21), source(5, 9, 30), source(96, 9, 21)} == {"model"}
    assert {source(5, 9, 21, P=7), source(5, 9, 21, dtype="float64"), source(5, 9, 21, directions=2)} == {"model"}


def test_what_was_not_measured_comes_last(core: WholeCore, clock: dict[str, float]) -> None:
    row = measured.Times("float32", False, 1, False, *SHAPE, 0, "2026-01-02", {"grid": 50.0, "fly": 1.0})
    measured.take(core.device, [row])
    plan = plan_of(core)
    assert (plan["strategy"], plan["microseconds_per_step"]) == ("grid", 50)
    assert plan["refused"]["step"] == "not measured at T5 B9 H21 on 2026-01-02, as grid was"


def test_the_next_process_plans_by_the_file(core: WholeCore, clock: dict[str, float], tmp_path: Path) -> None:
    lstm_ext.tune([SHAPE], tf32=False, device=core.device)
    core.cuda_set_measured(core.device, [])
    assert plan_of(core)["source"] == "model"
    measured.hand_over.cache_clear()
    measured.hand_over(core.device)
    assert plan_of(core)["source"].startswith("measured at T5")


def test_a_file_can_be_named(
    core: WholeCore, clock: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.json"
    table = lstm_ext.tune([SHAPE], ["float32", torch.float16], tf32=False, device=core.device, path=path)
    assert {row.dtype for row in table} == {"float32", "float16"}
    assert not (tmp_path / "kept").exists() or not list((tmp_path / "kept").glob("times-*"))
    assert measured.table_of(core.device) == []
    monkeypatch.setenv(measured.VARIABLE, str(path))
    assert measured.table_of(core.device) == table


@pytest.mark.parametrize("content", ["", "[]", "about others", "odd row", "negative"])
def test_bad_files_are_ignored_and_named(content: str, core: WholeCore, monkeypatch: pytest.MonkeyPatch) -> None:
    row = measured.Times("float32", False, 1, False, *SHAPE, 0, "2026-01-02", dict(US))
    path = measured.path_of(core.device)
    file = measured.content_of([row], core.device)
    if content == "about others":
        file["about"]["name"] = "another"
    if content == "odd row":
        file["times"][0]["T"] = "five"
    if content == "negative":
        file["times"][0]["microseconds"]["grid"] = -1.0
    path.parent.mkdir()
    path.write_text(content if content in ("", "[]") else json.dumps(file))
    with pytest.warns(UserWarning, match="does not use the measured times in") as caught:
        assert measured.table_of(core.device) == []
    assert str(path) in str(caught[0].message)


def test_files_come_with_the_package(core: WholeCore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a GPU of this model, of any driver, from this version."""
    monkeypatch.setattr(measured, "SHIPPED", tmp_path)
    row = measured.Times("float32", False, 1, False, *SHAPE, 0, "2026-01-02", dict(US))
    file = measured.content_of([row], core.device)
    file["about"] |= {"driver": "another", "build": "another"}
    for name, changes in (("a", {"sms": 7}), ("b", {"lstm_ext": "0.0.1"}), ("c", {})):
        gpu_files.write(tmp_path / f"{name}.json", file | {"about": file["about"] | changes})
        assert measured.table_of(core.device) == ([row] if name == "c" else [])


@pytest.mark.parametrize(
    ("shapes", "dtypes", "message"),
    [
        ([], ["float32"], "expected at least one of each, got 0 and 1"),
        ([SHAPE], [], "expected at least one of each, got 1 and 0"),
        ([(1, 2)], ["float32"], r"shapes: expected \(T, B, H\) or \(T, B, H, P\)"),
        ([(1, 0, 3)], ["float32"], "shapes: expected .* each at least 1"),
        ([(1, 2, 3.5)], ["float32"], "shapes: expected"),
        ([(1, 2, 3, 3)], ["float32"], "shapes: expected P from 0"),
        ([SHAPE], ["int8"], "dtypes: expected bfloat16, float16, float32, float64, got 'int8'"),
    ],
)
def test_wrong_arguments_of_tune_are_named(shapes: Any, dtypes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lstm_ext.tune(shapes, dtypes)


def test_tune_passes_over_what_cannot_run(core: WholeCore, clock: dict[str, float]) -> None:
    harness.spoil_kernels("sequence_forward<float64")
    with pytest.warns(UserWarning, match="leaves out"):
        (row,) = lstm_ext.tune([SHAPE], ["float64"], backward=False, tf32=False, device=core.device)
    assert row.microseconds == {"step": 2.0}


def test_tune_does_not_time_what_does_not_run(core: WholeCore, clock: dict[str, float]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native.C, "cuda_layer_forward", lambda *_: NotImplemented)
        with pytest.raises(RuntimeError, match="tune: the compiled module takes no tensors"):
            lstm_ext.tune([SHAPE], tf32=False, device=core.device)


@pytest.mark.parametrize(
    ("kind", "number"), [("x86_64 Kernel Module", "535.129.03"), ("Open Kernel Module for x86_64", "580.159.04")]
)
def test_the_driver_is_found(kind: str, number: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "version").write_text(
        f"NVRM version: NVIDIA UNIX {kind}  {number}  Release Build\nGCC version:  gcc version 12.2.0\n"
    )
    monkeypatch.setattr(gpu_files, "_DRIVER", tmp_path / "version")
    assert gpu_files._driver(13000) == f"{number}, CUDA 13000"


def test_the_report_has_a_row_for_each_kernel(core: WholeCore, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = [(way, kernel) for way, kernel in self_check.ways(core.device) if way.dtype == "bfloat16"][:6]
    monkeypatch.setattr(self_check, "ways", lambda device: iter(ways))
    harness.spoil_kernels("sequence_forward<bfloat16")
    rows = list(__main__._kernel_checks(core.device))
    assert [name for name, *_ in rows] == [f"cuda:{core.device}, {kernel}, {way}" for way, kernel in ways]
    assert [passed for _, passed, _ in rows] == [way.backward for way, _ in ways]
    assert all("of the tolerance" in said for *_, said in rows)

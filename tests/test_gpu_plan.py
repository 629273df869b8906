"""`lstm_ext.plan` for GPUs by name, which need not be there."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

import lstm_ext
from lstm_ext import _native, gpus

from .conftest import needs_native
from .test_process import succeed

pytestmark = needs_native

# CUDA cores, as the data sheets say; a multiprocessor has 64 of them before 8.6, but for 9.0 and later 128.
CORES = {
    "T4": 2560,
    "RTX 2080 Ti": 4352,
    "A100": 6912,
    "A30": 3584,
    "A10": 9216,
    "A40": 10752,
    "RTX A6000": 10752,
    "RTX 3080": 8704,
    "RTX 3090": 10496,
    "L4": 7424,
    "L40S": 18176,
    "RTX 4080": 9728,
    "RTX 4090": 16384,
    "H100": 16896,
    "H100 PCIe": 14592,
    "H200": 16896,
    "B200": 18944,
    "RTX 5080": 10752,
    "RTX 5090": 21760,
}


def test_the_table_agrees_with_the_data_sheets() -> None:
    assert {name: gpu.sms * (64 if gpu.compute_capability <= 80 else 128) for name, gpu in gpus.GPUS.items()} == CORES


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", gpus.GPUS)
def test_every_gpu_has_a_plan_within_its_limits(name: str, dtype: str) -> None:
    gpu = gpus.GPUS[name]
    for T, B, H in ((1, 1, 1), (100, 1, 32), (512, 16, 256), (50, 300, 1000), (7, 5, 4000)):
        plan = lstm_ext.plan(T, B, H, dtype=dtype, device=name)
        others = {"block", "cluster", "grid", "step"} - {plan.strategy}
        assert set(plan.refused) == others
        assert plan.registers is None
        assert 0 <= plan.shared_bytes <= gpu.shared_bytes
        assert plan.microseconds_per_step > 0
        if plan.strategy == "grid":
            assert 2 <= plan.team <= plan.blocks <= gpu.sms
        if gpu.compute_capability < 90:
            assert plan.refused["cluster"] == "no clusters before compute capability 9.0"
        assert lstm_ext.plan(T, B, H, dtype=dtype, device=name, strategy=plan.strategy) == lstm_ext.Plan(
            **asdict(plan) | {"refused": {}}
        )


def test_a_cluster_of_multiprocessors_lies_within_a_group_of_them() -> None:
    """The 132 of an H100 are 8 groups, each of which holds two clusters of 8, but for one: 15 were measured to run."""
    plan = lstm_ext.plan(512, 400, 300, dtype="bfloat16", device="H100", strategy="cluster")
    assert plan.team == 8
    assert plan.blocks == 15 * 8


def test_launches_of_a_step_count_on_the_clusters_that_run_at_a_time() -> None:
    """Groups of 16, 2 and 1 multiprocessors: of this product the more blocks divide k the faster, where they may."""

    def step(groups: int) -> float:
        layer = (100, 16, 512, 0, False, "bfloat16", False, 1, True, "step")
        gpu = gpus.GPUS["H100"]
        limits = (gpu.compute_capability, gpu.sms, groups, gpu.shared_bytes, gpu.boost_mhz * 1000)
        return float(_native.C.gpu_plan(*layer, *limits)["microseconds_per_step"])

    assert 1.4 * step(8) < step(66) < step(132) / 1.3


def test_tf32_is_planned_where_it_is_there() -> None:
    def times(name: str) -> set[float]:
        options: dict[str, Any] = {"device": name, "strategy": "step"}
        return {lstm_ext.plan(9, 4000, 4000, tf32=tf32, **options).microseconds_per_step for tf32 in (False, True)}

    assert len(times("A100")) == 2
    assert len(times("T4")) == 1


@pytest.mark.parametrize("name", ["rtx4090", "RTX-4090", "NVIDIA GeForce RTX 4090", "geforce rtx 4090"])
def test_names_are_taken_as_people_write_them(name: str) -> None:
    assert lstm_ext.plan(50, 4, 100, device=name) == lstm_ext.plan(50, 4, 100, device="RTX 4090")


def test_what_has_no_plan_says_so() -> None:
    with pytest.raises(ValueError, match=r"device: expected 'cpu', .* or one of T4, .*RTX 5090, got 'H1000'"):
        lstm_ext.plan(1, 1, 1, device="H1000")
    with pytest.raises(RuntimeError, match="strategy: 'cluster' cannot run this: no clusters before"):
        lstm_ext.plan(1, 1, 1, device="A100", strategy="cluster")
    with pytest.raises(ValueError, match="strategy: expected 'block'"):
        lstm_ext.plan(1, 1, 1, device="A100", strategy="tree")
    for device, option, value in (("cpu", "strategy", "grid"), ("A100", "num_threads", 2)):
        with pytest.raises(ValueError, match=f"{option}: only plans of .*, got '?{value}'? with device='{device}'"):
            lstm_ext.plan(1, 1, 1, device=device, **{option: value})  # type: ignore[call-overload]
    if not lstm_ext.backends()["cuda"].available:
        with pytest.raises(RuntimeError, match=r"'cuda' is not available: .*; a GPU that is not here goes by its name"):
            lstm_ext.plan(1, 1, 1)


@pytest.mark.parametrize("backward", [False, True])
def test_options_are_planned(backward: bool) -> None:
    def plan(options: dict[str, Any] | None, strategy: str | None = None) -> lstm_ext.Plan:
        layer: Any = {"dtype": "bfloat16", "backward": backward, "device": "H100"}
        return lstm_ext.plan(50, 16, 256, strategy=strategy, options=options, **layer)

    assert plan({}) == plan(None)
    for options in ({"peephole": True}, {"recurrent_dropout": 0.3}, {"zoneout": 0.1}):
        times = plan(None).microseconds_per_step, plan(options).microseconds_per_step
        assert (0.6 if backward else 0.8) <= times[0] / times[1] < 1  # as an H100 was measured to take
    for strategy in ("block", "cluster", "grid", "step"):
        if strategy not in plan(None).refused or "bytes" not in plan(None).refused[strategy]:
            assert plan({"coupled": True}, strategy).strategy == strategy
    normed = plan({"layer_norm": True})
    assert normed.strategy == "cluster"
    for strategy in ("cluster", "grid", "step"):
        normed, plain = (plan(options, strategy) for options in ({"layer_norm": True}, {"peephole": True}))
        assert normed.microseconds_per_step > plain.microseconds_per_step
        assert normed.shared_bytes > plain.shared_bytes or strategy == "step"
    for name in ("T4", "A100", "RTX 4090", "B200"):
        for dtype in ("float32", "float64", "bfloat16"):
            layer: Any = {"dtype": dtype, "backward": backward, "device": name, "options": {"layer_norm": True}}
            for sizes in ((1, 1, 1), (50, 300, 1000), (7, 5, 4000)):
                plans = [lstm_ext.plan(*sizes, proj_size=P, **layer) for P in (0, sizes[2])]
                assert 0 < plans[0].microseconds_per_step < plans[1].microseconds_per_step
    with pytest.raises(ValueError, match="options: only plans of a GPU differ with them"):
        lstm_ext.plan(50, 16, 256, options={}, device="cpu")  # type: ignore[call-overload]


def test_a_margin_is_left_and_shown() -> None:
    def plan() -> lstm_ext.Plan:
        return lstm_ext.plan(512, 400, 1024, dtype="bfloat16", device="H100", strategy="grid")

    assert plan().sm_margin == 0
    assert plan().blocks > 132 - 32
    with lstm_ext.set_sm_margin(32):
        assert plan().sm_margin == 32
        assert plan().blocks <= 132 - 32
        with lstm_ext.set_sm_margin(0):
            assert plan().sm_margin == 0
        assert plan().sm_margin == 32
    assert plan().sm_margin == 0
    with pytest.raises(ValueError, match="margin: expected at least 0, got -1"):
        lstm_ext.set_sm_margin(-1)


MARGIN = """
import lstm_ext
try:
    print("margin", lstm_ext.plan(50, 4, 100, device="H100").sm_margin)
    lstm_ext.set_sm_margin(3)
    print("margin", lstm_ext.plan(50, 4, 100, device="H100").sm_margin)
except ValueError as error:
    print(error)
"""


def test_the_environment_sets_the_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSTM_EXT_SM_MARGIN", "16")
    assert succeed(MARGIN) == "margin 16\nmargin 3\n"
    for bad in ("many", "-1", "3.5", "99999999999"):
        monkeypatch.setenv("LSTM_EXT_SM_MARGIN", bad)
        expected = f"LSTM_EXT_SM_MARGIN: expected a number of multiprocessors from 0 on, got '{bad}'\n"
        assert succeed(MARGIN) == expected


def test_tune_says_why_there_is_nothing_to_measure() -> None:
    if lstm_ext.backends()["cuda"].available:
        pytest.skip("there is a GPU")
    pytest.importorskip("torch")
    with pytest.raises(RuntimeError, match="tune: the backend 'cuda' is not available: "):
        lstm_ext.tune([(5, 4, 3)])

"""What is timed: one row of the benchmark, the suites of rows, and the presets."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from itertools import product
from typing import Any

from lstm_ext import testing
from lstm_ext.call import BOTH, FORWARD
from lstm_ext.cell import Cell, make_cell

STEPS, STEPS_BACKWARD = "steps", "steps-backward"
MODES = ("cell", "inference", "training", "packed", "compiled", STEPS, STEPS_BACKWARD)
DTYPES = ("float32", "tf32", "float64", "bfloat16", "float16")

# Options of a cell, as `LSTM` takes them, by what a row calls them. Those in MASKED do nothing but in training.
OPTIONS: dict[str, dict[str, Any]] = {
    "activations": {"activation": "softsign", "recurrent_activation": "hard_sigmoid"},
    "forget_bias": {"forget_bias": 1.0},
    "peephole": {"peephole": True},
    "cell_clip": {"cell_clip": 3.0},
    "coupled": {"coupled": True},
    "zoneout": {"zoneout": 0.1},
    "layer_norm": {"layer_norm": True},
    "dropouts": {"recurrent_dropout": 0.25, "candidate_dropout": 0.1},
}
MASKED = ("dropouts",)


@dataclass(frozen=True)
class Case:
    """One row: T steps of a batch of B sequences, inputs I wide, H units in each layer and direction.

    P = 0 is no projection; `directions` is 1 or 2; `busy` is how many cores other processes keep busy meanwhile;
    `options` is a name in OPTIONS, or "" for the plain LSTM.
    dtype tf32 is float32 that torch may multiply as TF32 (on a GPU); float32 is exact.
    Modes: `cell` is one step of an LSTMCell; `inference` and `training` (forward and backward) are calls of an LSTM,
    with a PackedSequence in `packed`, through torch.compile in `compiled`; `steps` and `steps-backward` are what our
    kernels on a GPU do in one pass over one layer, without the products that are made for all steps at once.
    """

    suite: str
    mode: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    P: int = 0
    layers: int = 1
    directions: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    busy: int = 0
    options: str = ""

    @property
    def given_options(self) -> dict[str, Any]:
        """As `LSTM` takes them."""
        return OPTIONS[self.options] if self.options else {}

    @property
    def cell(self) -> Cell | None:
        """What the options make of the cell; None is the plain one."""
        made = make_cell(**self.given_options, projected=self.P > 0)
        return made._replace(training=self.trains).simplified()

    @property
    def trains(self) -> bool:
        """Whether gradients are asked for."""
        return self.mode in ("training", STEPS_BACKWARD)

    @property
    def stored(self) -> str:
        """The dtype of the tensors."""
        return "float32" if self.dtype == "tf32" else self.dtype

    @property
    def width(self) -> int:
        """The width of h."""
        return self.P or self.H

    @property
    def layer_inputs(self) -> list[int]:
        """The width of each layer's input."""
        return [self.I, *[self.directions * self.width] * (self.layers - 1)]

    @property
    def by_layer(self) -> list[testing.Case]:
        """What each of the layers is, as the tests name it."""
        directions, packed = BOTH if self.directions == 2 else FORWARD, self.mode == "packed"
        sizes = [(self.T, self.B, width, self.H, self.P) for width in self.layer_inputs]
        return [testing.Case(*each, directions=directions, packed=packed, cell=self.cell) for each in sizes]

    @property
    def step_flops(self) -> float:
        """Floating-point operations in the matrix products of one forward step of the whole batch."""
        recurrent = self.layers * (8 * self.H * self.width + 2 * self.H * self.P)
        return self.B * self.directions * (8 * self.H * sum(self.layer_inputs) + recurrent)

    @property
    def work(self) -> str:
        """What people do with it, in the preset workloads."""
        return self.suite if self.suite in WORKLOADS else ""

    def __str__(self) -> str:
        text = f"{self.mode} T{self.T} B{self.B} I{self.I} H{self.H}"
        options = {f"P{self.P}": self.P, f"layers{self.layers}": self.layers > 1, "both": self.directions == 2}
        options |= {self.dtype: self.dtype != "float32", f"busy{self.busy}": self.busy, self.options: self.options}
        return " ".join([text, *(name for name, present in options.items() if present), f"threads{self.threads}"])


def grid(suite: str, mode: str, **axes: Any) -> list[Case]:
    """The product of the axes, each a value or a list of values; I is as H where it is not given."""
    values = {name: axis if isinstance(axis, (list, tuple)) else [axis] for name, axis in axes.items()}
    rows = [dict(zip(values, row, strict=True)) for row in product(*values.values())]
    return [Case(suite, mode, **{"I": row["H"], **row}) for row in rows]


# Widths on either side of the multiples of vector widths and tiles.
CLIFFS = [31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 191, 192, 193, 255, 256, 257]

# Named after the work in targets.py that they measure.
SUITES: dict[str, list[Case]] = {
    "tiny": grid("tiny", "inference", T=1, B=[1, 2], H=[8, 17, 32, 64, 96]),
    "batch1": grid("batch1", "inference", B=1, T=[28, 100], H=[16, 32, 64, 100, 128, 200]),
    "batch1_wide": grid("batch1_wide", "inference", B=1, T=50, H=[512, 700, 1024]),
    "batches": grid("batches", "inference", T=50, B=[4, 8, 16, 32, 64, 128], H=[64, 100, 128, 200, 256, 300]),
    "batches_wide": grid("batches_wide", "inference", T=20, B=[48, 96, 128], H=[320, 512, 768]),
    "training": grid("training", "training", T=20, B=[1, 4, 16, 64, 128], H=[64, 128, 256, 512]),
    "cell": grid("cell", "cell", T=1, B=[1, 2, 4, 8], H=[32, 64, 128, 256, 512]),
    "packed": grid("packed", "packed", T=50, B=[8, 32], H=[64, 256]),
    "projection": [
        *grid("projection", "inference", T=50, B=[1, 16], H=128, P=64),
        *grid("projection", "inference", T=50, B=[1, 16], H=256, P=100),
    ],
    "float64": grid("float64", "inference", T=50, B=[1, 16], H=[64, 256], dtype="float64"),
    "bidirectional": grid("bidirectional", "inference", T=50, B=[1, 16], H=[64, 256], directions=2),
    "layers": grid("layers", "inference", T=50, B=[1, 16], H=[64, 256], layers=2),
    "bfloat16": [
        *grid("bfloat16", "inference", T=50, B=1, H=[512, 1024], dtype="bfloat16"),
        *grid("bfloat16", "inference", T=50, B=[4, 32], H=[64, 256], dtype="bfloat16"),
    ],
    "busy": grid("busy", "inference", T=50, B=[1, 16], H=[64, 256], busy=[0, 1]),
    "cliff": grid("cliff", "inference", T=20, B=[1, 16], I=64, H=CLIFFS),
    "compiled": grid("compiled", "compiled", T=20, B=[1, 16], H=128),
}

# What people run, in the sizes of well-known models and tasks; one line, one block or one batch of it.
WORKLOADS: dict[str, list[Case]] = {
    work: grid(work, mode, **axes)
    for work, mode, axes in (
        ("text line recogniser", "inference", {"T": 150, "B": 1, "I": 480, "H": 200, "layers": 3, "directions": 2}),
        ("scene text", "inference", {"T": 26, "B": 8, "I": 512, "H": 256, "layers": 2, "directions": 2}),
        ("speech separation", "inference", {"T": 160, "B": 32, "I": 64, "H": 128, "directions": 2}),
        ("music separation", "inference", {"T": 255, "B": 1, "I": 512, "H": 256, "layers": 3, "directions": 2}),
        ("tagger", "packed", {"T": 40, "B": 32, "I": 100, "H": 256, "directions": 2}),
        ("tagger, training", "training", {"T": 40, "B": 32, "I": 100, "H": 256, "directions": 2}),
        ("character model", "inference", {"T": 100, "B": 1, "I": 128, "H": 1024}),
        ("word model, training", "training", {"T": 35, "B": 20, "I": 650, "H": 650, "layers": 2}),
        ("forecaster", "inference", {"T": 168, "B": 64, "I": 8, "H": 40, "layers": 2}),
        ("forecaster, training", "training", {"T": 168, "B": 64, "I": 8, "H": 40, "layers": 2}),
        ("voice activity", "inference", {"T": 1, "B": 1, "I": 128, "H": 128}),
        ("RNN-T predictor", "inference", {"T": 1, "B": 1, "I": 640, "H": 640}),
        ("speech enhancer", "inference", {"T": 100, "B": 1, "I": 257, "H": 384, "layers": 2}),
        ("keyword spotter", "inference", {"T": 100, "B": 1, "I": 40, "H": 512, "P": 128}),
        ("amplifier model", "inference", {"T": 64, "B": 1, "I": 1, "H": 16}),
        ("RL policy, a step", "cell", {"T": 1, "B": 16, "I": 64, "H": 256}),
        ("RL policy, update", "training", {"T": 64, "B": 16, "I": 64, "H": 256}),
        ("hydrology", "inference", {"T": 365, "B": 16, "I": 30, "H": 128}),
        ("hydrology, training", "training", {"T": 365, "B": 64, "I": 30, "H": 128}),
        ("digits", "inference", {"T": 28, "B": 64, "I": 28, "H": 128}),
        ("digits, training", "training", {"T": 28, "B": 64, "I": 28, "H": 128}),
    )
}

# What a server or an audio thread calls: short, one or a few rows at a time. LATENCY rows are timed call by call.
LATENCY = "latency"
SERVING: dict[str, list[Case]] = {
    "serving": grid("serving", "inference", B=[1, 4], T=[1, 28, 100], H=[48, 128, 256, 512, 1024]),
    "serving_wide": grid("serving_wide", "inference", T=50, B=1, H=[512, 700, 1024]),
    "serving_layers": grid("serving_layers", "inference", T=1, B=1, H=64, layers=[1, 3]),
    "serving_narrow": grid("serving_narrow", "inference", T=4096, B=1, I=1, H=[8, 16, 24, 32, 40, 64, 96]),
    "serving_blocks": grid("serving_blocks", "inference", T=64, B=1, I=1, H=[16, 24]),
    LATENCY: grid(LATENCY, "inference", T=1, B=1, H=[32, 256], busy=[0, 1]),
}

# What an option costs over the plain layer beside it, and what a loop in torch costs.
CELLS: dict[str, list[Case]] = {
    "options": [
        *grid(
            "options",
            "inference",
            T=50,
            B=[1, 16, 64],
            H=[64, 128, 256],
            options=[name for name in ("", *OPTIONS) if name not in MASKED],
        ),
        *grid("options", "training", T=50, B=[1, 16, 64], H=[64, 128, 256], options=["", *OPTIONS]),
    ],
}

QUICK = [
    *grid("tiny", "inference", T=1, B=1, H=32),
    *grid("batch1", "inference", B=1, T=100, H=128),
    *grid("batch1_wide", "inference", B=1, T=50, H=512),
    *grid("batches", "inference", T=50, B=[4, 32], H=[64, 256]),
    *grid("batches_wide", "inference", T=20, B=64, H=320),
    *grid("training", "training", T=20, B=[1, 32], H=[64, 256]),
    *grid("cell", "cell", T=1, B=1, H=64),
    *grid("packed", "packed", T=50, B=8, H=64),
    *grid("bidirectional", "inference", T=50, B=1, H=64, directions=2),
    *grid("bfloat16", "inference", T=50, B=1, H=512, dtype="bfloat16"),
]

TENSOR_CORES = ["bfloat16", "tf32"]

# The most telling first, in case the time does not last for all. T is short where B * H is large: it changes no ratio.
GPU_SUITES: dict[str, list[Case]] = {
    "gpu_persistent": [
        *grid("gpu_persistent", "inference", T=1024, B=16, H=768, dtype="float16"),
        *grid("gpu_persistent", "training", T=1024, B=16, H=768, dtype="float16"),
    ],
    "gpu_mid": [
        *grid("gpu_mid", "inference", T=512, B=[1, 16], H=[512, 1024], dtype=TENSOR_CORES),
        *grid("gpu_mid", "training", T=512, B=16, H=[512, 1024], dtype="bfloat16"),
    ],
    "gpu_small": [
        *grid("gpu_small", "inference", T=512, B=[1, 16, 64], H=[128, 256], dtype=TENSOR_CORES),
        *grid("gpu_small", "training", T=512, B=16, H=256, dtype=TENSOR_CORES),
    ],
    "gpu_wide": [
        *grid("gpu_wide", "inference", T=256, B=64, H=1024, dtype=TENSOR_CORES),
        *grid("gpu_wide", "training", T=256, B=64, H=1024, dtype=TENSOR_CORES),
    ],
    "gpu_half": grid("gpu_half", "inference", T=512, B=[1, 16, 64], H=[96, 128], dtype="float16"),
    "gpu_cell": grid("gpu_cell", "cell", T=1, B=[1, 8, 64], H=[128, 512, 1024], dtype=TENSOR_CORES),
    "gpu_large": grid("gpu_large", "inference", T=64, B=256, H=[1024, 2048], dtype=TENSOR_CORES),
    "gpu_float32": grid("gpu_float32", "inference", T=512, B=[1, 16, 64], H=[256, 1024]),
    "gpu_flashrnn": [
        *grid("gpu_flashrnn", "inference", T=1024, B=16, H=768, dtype="bfloat16"),
        *grid("gpu_flashrnn", "training", T=1024, B=16, H=768, dtype="bfloat16"),
    ],
}

# Those of reviews of the planner: where each strategy should win, and where two of them come close.
PLANNED = [(16, 128), (16, 256), (16, 768), (64, 1024), (1, 512), (64, 256), (16, 1024), (256, 512)]  # B and H
GPU_STRATEGIES = [
    case
    for dtype, shapes in (("bfloat16", PLANNED), ("tf32", PLANNED[:4]), ("float32", PLANNED[:2]))
    for B, H in shapes
    for mode in (STEPS, STEPS_BACKWARD)
    for case in grid("gpu_strategies", mode, T=256, B=B, H=H, dtype=dtype)
]

GPU_ACCURACY = grid("gpu_accuracy", "training", T=128, B=16, H=[256, 1024], dtype=["float32", "tf32", *DTYPES[2:]])

# torch alone. Orders of rows: each dtype of a size, and the sizes in the middle, before the rest.
STOCK_DTYPES = ["float32", "tf32", "bfloat16", "float16"]
STOCK_WIDTHS = [768, 256, 1024, 128, 512, 192, 96, 2048]
GPU_STOCK = [
    *grid("gpu_stock", "inference", T=512, B=[16, 1, 64], H=STOCK_WIDTHS, dtype=STOCK_DTYPES),
    *grid("gpu_stock", "training", T=512, B=[16, 1, 64], H=STOCK_WIDTHS, dtype=STOCK_DTYPES),
    *grid("gpu_stock", "cell", T=1, B=[1, 16, 64], H=[128, 512, 1024], dtype=STOCK_DTYPES),
    *grid("gpu_stock", "inference", T=512, B=[8, 256], H=STOCK_WIDTHS, dtype=STOCK_DTYPES),
    *grid("gpu_stock", "training", T=512, B=[8, 256], H=STOCK_WIDTHS, dtype=STOCK_DTYPES),
]

GPU_QUICK = [
    *GPU_SUITES["gpu_persistent"],
    *grid("gpu_mid", "inference", T=512, B=16, H=[512, 1024], dtype="bfloat16"),
    *grid("gpu_small", "inference", T=512, B=[1, 64], H=128, dtype="bfloat16"),
    *grid("gpu_small", "inference", T=512, B=16, H=256, dtype="tf32"),
    *grid("gpu_wide", "inference", T=256, B=64, H=1024, dtype="bfloat16"),
    *grid("gpu_half", "inference", T=512, B=16, H=128, dtype="float16"),
    *grid("gpu_cell", "cell", T=1, B=8, H=512, dtype="bfloat16"),
    *grid("gpu_large", "inference", T=64, B=256, H=1024, dtype="bfloat16"),
    *grid("gpu_float32", "inference", T=512, B=16, H=256),
]

PRESETS = {
    "quick": QUICK,
    "workloads": [case for work in WORKLOADS.values() for case in work],
    "full": [case for suite in SUITES.values() for case in suite],
    "serving": [case for suite in SERVING.values() for case in suite],
    "options": [case for suite in CELLS.values() for case in suite],
    "gpu-quick": GPU_QUICK,
    "gpu": [case for suite in GPU_SUITES.values() for case in suite],
    "gpu-strategies": GPU_STRATEGIES,
    "gpu-accuracy": GPU_ACCURACY,
    "gpu-stock": GPU_STOCK,
}
AXES = ("dtype", "B", "T", "I", "H", "P", "layers", "directions", "mode", "busy", "options", "suite")


def usable_cores() -> list[int]:
    """The processors this process may run on."""
    return sorted(os.sched_getaffinity(0))


def select(preset: str, axes: Mapping[str, Sequence[Any]]) -> list[Case]:
    """The rows of a preset whose values are all among those given for an axis."""
    return [case for case in PRESETS[preset] if all(getattr(case, name) in axis for name, axis in axes.items())]


def custom(axes: Mapping[str, Sequence[Any]]) -> list[Case]:
    """The grid of the axes given, in order; an axis left out has one value, I that of H.

    A cell has one step, layer and direction, and no projection, whatever is asked for.
    """
    defaults: dict[str, Sequence[Any]] = {"mode": ["inference"], "B": [1], "T": [50], "H": [128]}
    values = {name: list(dict.fromkeys(axis)) for name, axis in (defaults | dict(axes)).items() if name != "suite"}
    cases = [case for mode in values.pop("mode") for case in grid("custom", mode, **values)]
    cell: dict[str, Any] = {"T": 1, "P": 0, "layers": 1, "directions": 1}
    return list(dict.fromkeys(replace(case, **cell) if case.mode == "cell" else case for case in cases))


def on(cases: Iterable[Case], device: str, threads: Sequence[int]) -> Iterator[Case]:
    """Each case with each thread count (once on a GPU), next to each other."""
    for case in cases:
        for count in threads if device == "cpu" else threads[:1]:
            if count > case.busy:  # with a core to itself, the neighbour disturbs nobody
                yield replace(case, device=device, threads=count)


def case_from(row: Mapping[str, Any]) -> Case:
    """The case of a row of a JSON file."""
    given = [field.name for field in fields(Case) if field.name in row or field.default is MISSING]
    return Case(**{name: row[name] for name in given})

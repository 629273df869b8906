"""What is num_units? Reads handwritten digits row by row with LSTMs of 4 to 128 units.

An LSTM layer is `num_units` memory cells side by side (PyTorch calls the number `hidden_size`). Each cell remembers
one number, so the layer's memory c and its output h are vectors of num_units numbers; at every time step each cell
decides with its gates what to forget, what to add and what to show. num_units is not the number of time steps (here
the rows of an image) nor of layers. The layer has 4 * num_units * (input_size + num_units + 2) weights: 4 because a
cell has four gates, 2 because PyTorch keeps two biases per gate.

    python examples/num_units.py                    # the 1797 digits that come with scikit-learn, 8 rows of 8 pixels
    python examples/num_units.py --mnist DIR        # MNIST, 28 rows of 28 pixels
    python examples/num_units.py --cell basic       # TensorFlow's BasicLSTMCell by dynamic_rnn; or layer_norm

Every size is trained twice, with `lstm_ext.LSTM` and with `torch.nn.LSTM`, from the same weights on the same batches,
on one CPU thread, which is enough for layers this small. A cell of TensorFlow's, which torch has not, is trained fused,
and step by step in torch's operations.
Exit status: 0; 1 if the two disagree by more than noise; 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import os
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import lstm_ext

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter

BATCH_SIZE = 64
LEARNING_RATE = 0.01


# The digits ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Examples:
    """Images [N, rows, columns], float32 from 0 to 1, and their digits [N]."""

    images: Tensor
    digits: Tensor


def sklearn_digits(seed: int) -> tuple[Examples, Examples]:
    """scikit-learn's 8x8 digits: four fifths to train, one fifth to test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, digits = torch.tensor(data.images / 16, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
    test, train = order.split([len(digits) // 5, len(digits) - len(digits) // 5])
    return Examples(images[train], digits[train]), Examples(images[test], digits[test])


def read_idx(folder: Path, name: str, rank: int) -> Any:
    """The bytes of the IDX file `name` or `name`.gz as an array: 0, 0, 8 (uint8), rank, big-endian sizes, contents."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise ValueError(f"{folder}: neither {name} nor {name}.gz found")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    start = 4 + 4 * rank
    if len(content) < start or content[:4] != bytes([0, 0, 8, rank]):
        raise ValueError(f"{path}: not an IDX file of unsigned bytes in {rank} dimensions")
    shape = np.frombuffer(content, ">u4", rank, offset=4).tolist()
    values = np.frombuffer(content, np.uint8, offset=start)
    if len(values) != np.prod(shape, dtype=object):
        raise ValueError(f"{path}: expected {' x '.join(map(str, shape))} values, got {len(values)}")
    return values.reshape(shape)


def mnist_part(folder: Path, prefix: str) -> Examples:
    """The images and digits of "train" or "t10k"."""
    images = read_idx(folder, f"{prefix}-images-idx3-ubyte", 3)
    digits = read_idx(folder, f"{prefix}-labels-idx1-ubyte", 1)
    if images.size == 0 or len(images) != len(digits):
        raise ValueError(f"{folder}: {prefix} has {len(images)} images and {len(digits)} labels")
    if digits.max() > 9:
        raise ValueError(f"{folder}: {prefix} has the label {digits.max()}, expected 0 to 9")
    return Examples(torch.tensor(images, dtype=torch.float32) / 255, torch.tensor(digits, dtype=torch.int64))


def mnist(folder: Path) -> tuple[Examples, Examples]:
    """MNIST's training and test sets."""
    train, test = mnist_part(folder, "train"), mnist_part(folder, "t10k")
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(f"{folder}: the training and the test images differ in size")
    return train, test


# Training ------------------------------------------------------------------------------------------------------------


CELLS: dict[str, Any] = {"basic": lstm_ext.BasicLSTMCell, "layer_norm": lstm_ext.LayerNormBasicLSTMCell}
NUM_WEIGHTS = {"lstm": "4 U (I + U + 2)", "basic": "4 U (I + U + 1)", "layer_norm": "4 U (I + U + 2) + 2 U"}


class RowReader(torch.nn.Module):
    """An LSTM that reads an image row by row, and a linear layer that names the digit from its last h."""

    def __init__(self, lstm: torch.nn.Module, num_units: int) -> None:
        super().__init__()
        self.lstm = lstm
        self.readout = torch.nn.Linear(num_units, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, T, I] → scores [B, 10]."""
        if isinstance(self.lstm, tuple(CELLS.values())):
            _, (_, h) = lstm_ext.dynamic_rnn(self.lstm, images)
            return self.readout(h)
        _, (h_n, _) = self.lstm(images)
        return self.readout(h_n[-1])

    @torch.inference_mode()
    def accuracy(self, examples: Examples) -> float:
        """The share of digits told right."""
        scores = torch.cat([self(images) for images in examples.images.split(1000)])
        return (scores.argmax(1) == examples.digits).double().mean().item()


def train_epoch(model: RowReader, optimizer: torch.optim.Optimizer, train: Examples, seed: int) -> float:
    """Trains on every example once, in the order that `seed` gives; returns the seconds taken."""
    order = torch.randperm(len(train.digits), generator=torch.Generator().manual_seed(seed))
    start = time.perf_counter()
    for batch in order.split(BATCH_SIZE):
        optimizer.zero_grad()
        F.cross_entropy(model(train.images[batch]), train.digits[batch]).backward()
        optimizer.step()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Result:
    """One num_units; of the pairs the first is lstm_ext's, the second torch's."""

    num_units: int
    weights: int
    train_accuracy: float
    test_accuracies: tuple[float, float]
    seconds: tuple[float, float]  # median of an epoch

    @property
    def difference(self) -> float:
        """Between the test accuracies of the two implementations."""
        return abs(self.test_accuracies[0] - self.test_accuracies[1])

    def noise(self, num_tests: int) -> float:
        """Two standard errors of the difference between two measured accuracies, and at least one image."""
        share = statistics.mean(self.test_accuracies)
        return max(2 * (2 * share * (1 - share) / num_tests) ** 0.5, 1 / num_tests)


def make_readers(cell: str, row_width: int, num_units: int) -> tuple[RowReader, RowReader]:
    """Ours, and the same in torch, with the same weights."""
    if cell == "lstm":
        stock = RowReader(torch.nn.LSTM(row_width, num_units, batch_first=True), num_units)
        ours = copy.deepcopy(stock)
        lstm_ext.replace_lstm(ours)
        return ours, stock
    ours = RowReader(CELLS[cell](num_units, input_size=row_width), num_units)
    # A callable may be any function: steps with it run in torch's operations.
    stock = RowReader(CELLS[cell](num_units, activation=torch.tanh, input_size=row_width), num_units)
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def compare(cell: str, num_units: int, train: Examples, test: Examples, epochs: int, seed: int, bar: Any) -> Result:
    """Trains both implementations from the same weights, epoch about, so that what slows the machine slows both."""
    torch.manual_seed(seed)
    models = ours, stock = make_readers(cell, train.images.shape[2], num_units)
    optimizers = [torch.optim.Adam(model.parameters(), LEARNING_RATE) for model in models]
    seconds: tuple[list[float], list[float]] = ([], [])
    for epoch in range(epochs):
        for n in (0, 1) if epoch % 2 == 0 else (1, 0):
            seconds[n].append(train_epoch(models[n], optimizers[n], train, seed + epoch))
            bar.update()
    return Result(
        num_units,
        sum(weight.numel() for weight in ours.lstm.parameters()),
        ours.accuracy(train),
        (ours.accuracy(test), stock.accuracy(test)),
        (statistics.median(seconds[0]), statistics.median(seconds[1])),
    )


# Results -------------------------------------------------------------------------------------------------------------


def show(results: Sequence[Result]) -> None:
    """Prints the table."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    headings = (
        *("num_units", "weights", "train\naccuracy", "test\naccuracy", "test acc.\nof torch"),
        *("s/epoch\nlstm_ext", "s/epoch\ntorch", "torch /\nlstm_ext"),
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for r in results:
        accuracies = (f"{a:.1%}" for a in (r.train_accuracy, *r.test_accuracies))
        ours, stock = r.seconds
        table.add_row(
            *(str(r.num_units), f"{r.weights:,}", *accuracies),
            *(f"{ours:.3f}", f"{stock:.3f}", f"{stock / ours:.2f}"),
        )
    console = Console()
    with console.capture() as capture:
        console.print(table)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def plot(cell: str, results: Sequence[Result], title: str, path: Path) -> None:
    """Draws accuracy and weights over num_units."""
    units = [r.num_units for r in results]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    ours, stock = zip(*(r.test_accuracies for r in results), strict=True)
    left.plot(units, [r.train_accuracy for r in results], "--", color="0.6", label="training set")
    left.plot(units, ours, "o-", color="C0", label="test set, lstm_ext")
    left.plot(units, stock, "D", color="C1", markersize=9, fillstyle="none", label="test set, torch")
    left.yaxis.set_major_formatter(PercentFormatter(1))
    left.set(ylabel="digits recognised", title="Accuracy")
    left.legend(loc="lower right")
    right.plot(units, [r.weights for r in results], "o-", color="C2")
    for r in results:
        right.annotate(f"{r.weights:,}", (r.num_units, r.weights), (5, -4), textcoords="offset points", va="top")
    right.set(ylabel="weights of the LSTM", yscale="log", title=f"Weights: {NUM_WEIGHTS[cell]}")
    right.margins(0.25, 0.15)  # room for the numbers
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(units, [str(u) for u in units])
        axes.minorticks_off()
        axes.set_xlabel("num_units U")
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """For argparse: an integer from `least` to `most`."""

    def convert(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, got {text!r}")
        return int(text)

    return convert


def png_path(text: str) -> Path:
    """For argparse: where a PNG can be written."""
    path = Path(text)
    if path.suffix.lower() != ".png" or path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a .png file in a folder that can be written to, got {text!r}")
    return path


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    option = parser.add_argument
    option("--cell", choices=("lstm", *CELLS), default="lstm", help="default: lstm, beside torch.nn.LSTM")
    option(
        "--num-units", type=whole_number(1, 4096), nargs="+", metavar="U", help="default: 4 8 … 128; of layer_norm 16 …"
    )
    option("--epochs", type=whole_number(1, 10_000), metavar="N", help="default: 30; 2 with --mnist")
    option("--seed", type=whole_number(0, 2**31), default=0, metavar="N", help="of weights and batches; default: 0")
    option("--threads", type=whole_number(1, os.cpu_count() or 1), default=1, metavar="N", help="default: 1")
    option("--mnist", type=Path, metavar="DIR", help="the folder of MNIST's four IDX files, plain or .gz")
    option("--output", type=png_path, default="num_units.png", metavar="PNG", help="default: num_units.png")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, prints the table, draws the picture; returns the exit status."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    try:
        train, test = mnist(arguments.mnist) if arguments.mnist else sklearn_digits(arguments.seed)
    except (OSError, ValueError) as error:
        parser.error(f"argument --mnist: {error}")
    epochs = arguments.epochs or (2 if arguments.mnist else 30)
    # The norm of a few numbers that are nearly equal makes much of rounding: narrow layers part ways as they train.
    defaults = [16, 32, 64, 128] if arguments.cell == "layer_norm" else [4, 8, 16, 32, 64, 128]
    sizes = sorted(set(arguments.num_units or defaults))

    results = []
    with tqdm(total=2 * epochs * len(sizes), unit="epoch", disable=None) as bar:
        for num_units in sizes:
            bar.set_description(f"num_units = {num_units}")
            results.append(compare(arguments.cell, num_units, train, test, epochs, arguments.seed, bar))

    show(results)
    plot(
        arguments.cell,
        results,
        f"An LSTM reads {'MNIST' if arguments.mnist else 'digits'} row by row",
        arguments.output,
    )
    num_tests = len(test.digits)
    worst = max(results, key=lambda r: r.difference / r.noise(num_tests))
    agree = worst.difference <= worst.noise(num_tests)
    verdict = "agree" if agree else "DISAGREE"
    if arguments.cell != "lstm":
        print("torch: the same cell step by step in torch's operations.")
    print("s/epoch: the median training epoch, with the readout, the loss and Adam.")
    print(f"Same weights, same batches: the test accuracies {verdict}. At {worst.num_units} units they are apart by")
    print(f"{worst.difference:.1%}; the noise of {num_tests} test images is {worst.noise(num_tests):.1%}.")
    print(f"Picture: {arguments.output}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())

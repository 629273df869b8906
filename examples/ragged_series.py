"""Time series of different lengths in which steps are missing: is the wave slow or fast?

Each row is a noisy wave of 12 to 60 steps of which half were not measured. Four ways to give the same rows to the same
LSTM, which names the class from its last h:

    zeros              what is missing is 0, and so is the padding after the end
    … and lengths      the padding is not read: h is that of the last step that counts
    … and the mask     a second input says which steps were measured
    … and the gap      a third says how long ago the last measured step was

    python examples/ragged_series.py            # 24 s of one core
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

import lstm_ext

MOST_STEPS, UNITS = 60, 24
WAYS = ("zeros", "… and lengths", "… and the mask", "… and the gap")


def draw(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values [B, T], measured [B, T], lengths [B], and the classes [B]: 0 is slow, 1 is fast."""
    times = torch.arange(MOST_STEPS, dtype=torch.float32)
    lengths = torch.randint(12, MOST_STEPS + 1, (rows,))
    classes = torch.randint(0, 2, (rows,))
    frequency = (0.35 + 0.1 * torch.rand(rows)) * (1 + 0.5 * classes)
    phase = 6.28 * torch.rand(rows, 1)
    values = torch.sin(frequency[:, None] * times + phase) + 0.4 * torch.randn(rows, MOST_STEPS)
    measured = (torch.rand(rows, MOST_STEPS) < 0.5) & (times < lengths[:, None])
    return values.where(measured, float("nan")), measured, lengths, classes


def inputs(way: str, values: Tensor, measured: Tensor) -> Tensor:
    """[B, T, 3]: the value, the mask, the gap; what a way does not use is 0."""
    gap = torch.zeros_like(values)
    for t in range(1, MOST_STEPS):
        gap[:, t] = torch.where(measured[:, t - 1], 1.0, gap[:, t - 1] + 1.0)
    use_mask, use_gap = WAYS.index(way) >= 2, WAYS.index(way) >= 3
    return torch.stack([values.nan_to_num(0.0), measured.float() * use_mask, gap / 10 * use_gap], -1)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = lstm_ext.LSTM(3, UNITS, batch_first=True)
        self.head = nn.Linear(UNITS, 2)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        _, (h_n, _) = self.lstm(x, lengths=lengths)
        return self.head(h_n[-1])


def learn(way: str, steps: int) -> float:
    """The share of new rows that is named right after some steps of training."""
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in tqdm(range(steps), desc=way, unit="step", disable=None):
        values, measured, lengths, classes = draw(128)
        scores = model(inputs(way, values, measured), None if way == "zeros" else lengths)
        loss = nn.functional.cross_entropy(scores, classes)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.inference_mode():
        values, measured, lengths, classes = draw(4000)
        scores = model(inputs(way, values, measured), None if way == "zeros" else lengths)
        return (scores.argmax(1) == classes).double().mean().item()


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=800, help="training steps of each way; default: 800")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    accuracies = {way: learn(way, arguments.steps) for way in WAYS}
    print("inputs            accuracy")
    for way, accuracy in accuracies.items():
        print(f"{way:16} {accuracy:9.1%}")
    return accuracies


if __name__ == "__main__":
    main()

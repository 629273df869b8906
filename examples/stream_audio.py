"""An amplifier model over audio in blocks of 64 samples: what share of real time does it take?

Plucked strings go through a made-up amplifier that saturates, and the more so the louder it just was. An LSTM of 24
units learns it from a few seconds of sound. Frozen, it then plays what it has not heard, block by block, as the driver
of a sound card asks for it: a stream keeps the state, and writes into an array that is there already.

    python examples/stream_audio.py                          # 20 s of one core
    python examples/stream_audio.py --output latency.png     # with a plot (matplotlib)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import lstm_ext

RATE, BLOCK, UNITS = 48_000, 64, 24  # samples a second, samples a block, width
CHUNK, ROWS, WARM_UP = 512, 64, 64  # samples and rows of a training step; samples before the error counts


class Played(NamedTuple):
    """Of all blocks: seconds each took, their share of real time, and the error over the signal, of energies."""

    seconds: np.ndarray
    share: float
    error: float


def pluck(seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Strings plucked four times a second (Karplus and Strong 1983)."""
    sound = np.zeros(int(seconds * RATE), np.float32)
    for start in range(0, len(sound), RATE // 4):
        period = int(RATE / rng.uniform(80, 600))
        note = rng.uniform(-1, 1, len(sound[start : start + RATE // 2])).astype(np.float32)
        for at in range(period, len(note), period - 1):
            until = min(at + period - 1, len(note))
            note[at:until] = 0.498 * (note[at - period : until - period] + note[at - period + 1 : until - period + 1])
        sound[start : start + len(note)] += 0.5 * note
    return sound


def amplify(sound: np.ndarray) -> np.ndarray:
    """The amplifier: a soft clip whose drive sags while it is loud."""
    out, sag = np.empty_like(sound), 0.0
    for n, sample in enumerate(sound.tolist()):
        out[n] = np.tanh((6.0 - 4.0 * sag) * sample + 0.2) - np.tanh(0.2)
        sag += 0.002 * (abs(out[n]) - sag)
    return out


class Amplifier(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = lstm_ext.LSTM(1, UNITS)
        self.mix = torch.nn.Linear(UNITS, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(self.lstm(x)[0])


def learn(clean: np.ndarray, loud: np.ndarray, steps: int, rng: np.random.Generator) -> Amplifier:
    model = Amplifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
    for _ in tqdm(range(steps), desc="learning", unit="step", disable=None):
        at = rng.integers(0, len(clean) - CHUNK, ROWS) + np.arange(CHUNK)[:, None]
        x, y = (torch.from_numpy(sound[at])[..., None] for sound in (clean, loud))
        loss = ((model(x) - y)[WARM_UP:] ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def play(model: Amplifier, clean: np.ndarray, loud: np.ndarray) -> Played:
    """Block by block; the last, shorter one is left out."""
    stream = lstm_ext.freeze(model.lstm).stream(batch_size=1)
    weight, bias = (parameter.detach().numpy() for parameter in model.mix.parameters())
    blocks = clean[: len(clean) // BLOCK * BLOCK].reshape(-1, BLOCK, 1, 1)
    h, played = np.empty((BLOCK, 1, UNITS), np.float32), np.empty((len(blocks), BLOCK), np.float32)
    seconds = np.empty(len(blocks))
    for n, block in enumerate(tqdm(blocks, desc="playing", unit="block", disable=None)):
        start = time.perf_counter()
        stream(block, out=h)
        np.dot(h[:, 0], weight[0], out=played[n])
        played[n] += bias
        seconds[n] = time.perf_counter() - start
    wanted = loud[: played.size]
    error = np.square(played.ravel() - wanted)[WARM_UP:].mean() / np.square(wanted).mean()
    return Played(seconds, seconds.sum() * RATE / played.size, float(error))


def plot(seconds: np.ndarray, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    microseconds = 1e6 * np.sort(seconds)
    axes.plot(microseconds, 1 - np.arange(len(seconds)) / len(seconds))
    axes.axvline(1e6 * BLOCK / RATE, color="tab:red", linestyle="--", label="real time")
    axes.set(xscale="log", yscale="log", xlabel="µs a block of 64 samples", ylabel="share of blocks that take longer")
    axes.legend()
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> Played:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="training steps; default: 300")
    parser.add_argument("--seconds", type=float, default=10.0, help="of sound to play; default: 10")
    parser.add_argument("--output", help="where a plot of the latency is written")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    heard, new = pluck(5.0, rng), pluck(arguments.seconds, rng)
    model = learn(heard, amplify(heard), arguments.steps, rng)
    played = play(model, new, amplify(new))

    print(f"{len(played.seconds)} blocks of {BLOCK} samples, {1e6 * BLOCK / RATE:.0f} µs each at {RATE // 1000} kHz")
    for percent in (50, 99, 99.9):
        print(f"  {percent:4g} % take at most {1e6 * np.percentile(played.seconds, percent):6.1f} µs")
    print(f"{played.share:.2%} of real time; error {-10 * np.log10(played.error):.1f} dB below the sound")
    if arguments.output:
        plot(played.seconds, arguments.output)
    return played


if __name__ == "__main__":
    main()

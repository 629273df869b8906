"""Learns to write like the Python manual, character by character, and then writes some lines.

The text is the one that Python carries for its `help()`. Each position predicts the next character; the state at the
end of a chunk is where the next one begins.

    python examples/char_language_model.py                      # 25 s of one core
    python examples/char_language_model.py --start 'The class'  # what the sample goes on from
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from math import log

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import lstm_ext

BATCH, STEPS = 32, 64


class Writer(nn.Module):
    """Characters [T, B] → scores of the next ones [T, B, C]."""

    def __init__(self, num_characters: int, units: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_characters, 64)
        self.lstm = lstm_ext.LSTM(64, units)
        self.head = nn.Linear(units, num_characters)

    def forward(self, characters: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, state = self.lstm(self.embed(characters), state)
        return self.head(y), state


def read_manual() -> str:
    """The plain text of Python's manual, less rare characters."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return "".join(c for c in text if c.isascii() and (c.isprintable() or c == "\n"))


def train(model: Writer, codes: Tensor, chunks: int) -> float:
    """Reads on through the text; returns the mean loss, in bits a character, of the last tenth of the chunks."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    rows = codes[: len(codes) // BATCH * BATCH].view(BATCH, -1).t()  # [T, B]: each column is a part of the text
    state, losses = None, []
    for n in (bar := tqdm(range(chunks), unit="chunk", disable=None)):
        start = n * STEPS % (len(rows) - STEPS - 1)
        scores, state = model(rows[start : start + STEPS], state)
        state = tuple(a.detach() for a in state)
        loss = F.cross_entropy(scores.flatten(0, 1), rows[start + 1 : start + STEPS + 1].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item() / log(2))
        bar.set_postfix_str(f"{losses[-1]:.2f} bits a character", refresh=False)
    last = losses[-max(1, chunks // 10) :]
    return sum(last) / len(last)


@torch.inference_mode()
def write(model: Writer, characters: Sequence[str], start: str, length: int, temperature: float) -> str:
    """Goes on from `start`, one character at a time, each the input of the next step."""
    code_of = {c: n for n, c in enumerate(characters)}
    next_codes, state, text = torch.tensor([[code_of[c]] for c in start]), None, start
    for _ in range(length):
        scores, state = model(next_codes, state)
        next_codes = torch.multinomial(F.softmax(scores[-1] / temperature, -1), 1)
        text += characters[next_codes.item()]
    return text


def main(argv: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chunks", type=int, default=800, help=f"chunks of {STEPS} steps to train on; default: 800")
    parser.add_argument("--units", type=int, default=192, help="default: 192")
    parser.add_argument("--start", default="The ", help="what the sample goes on from; default: 'The '")
    parser.add_argument("--temperature", type=float, default=0.6, help="lower is more usual; default: 0.6")
    arguments = parser.parse_args(argv)

    torch.manual_seed(0)
    torch.set_num_threads(1)  # layers this narrow gain little from more
    text = read_manual()
    characters = sorted(set(text))
    if not arguments.start or not set(arguments.start) <= set(characters):
        parser.error(f"--start: expected characters of the manual, got {arguments.start!r}")
    codes = torch.tensor([characters.index(c) for c in text])
    model = Writer(len(characters), arguments.units)
    bits = train(model, codes, arguments.chunks)
    print(write(model, characters, arguments.start, 400, arguments.temperature))
    print(f"\n{bits:.2f} bits a character; guessing among {len(characters)} takes {log(len(characters), 2):.2f}")
    return bits


if __name__ == "__main__":
    main()

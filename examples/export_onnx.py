"""Writes a model as ONNX, and runs the file in a process that has neither torch nor us.

pip install '.[onnx]'
python examples/export_onnx.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

import lstm_ext

# What the other process runs: sys.argv is the ONNX file, the inputs, and where the outputs go.
RUNNER = """
import sys
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1])
outputs = session.run(None, dict(np.load(sys.argv[2])))
assert "torch" not in sys.modules and "lstm_ext" not in sys.modules
np.save(sys.argv[3], outputs[0])
print(*(f"{node.name} {node.shape}" for node in session.get_inputs()), sep="\\n")
"""


class Tagger(nn.Module):
    """Both directions over ragged rows, and five scores for each step: [B, T, 28] → [B, T, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = lstm_ext.LSTM(28, 64, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(128, 5)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.head(self.lstm(x, lengths=lengths)[0])


def export(model: nn.Module, path: Path) -> None:
    """Batch and time are open: the file takes any."""
    x, lengths = torch.randn(4, 20, 28), torch.tensor([20, 3, 7, 11])
    sizes = {"x": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, "lengths": {0: Dim.DYNAMIC}}
    torch.onnx.export(model, (x, lengths), str(path), dynamo=True, dynamic_shapes=sizes, verbose=False)


def main(argv: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="where the ONNX file is kept; default: nowhere")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    model = Tagger().eval()
    x, lengths = torch.randn(7, 33, 28), torch.randint(1, 34, (7,))  # other sizes than those of the export
    with tempfile.TemporaryDirectory() as folder:
        path, given, result = (
            arguments.output or Path(folder, "tagger.onnx"),
            Path(folder, "in.npz"),
            Path(folder, "y.npy"),
        )
        export(model, path)
        np.savez(given, x=x.numpy(), lengths=lengths.numpy())
        done = subprocess.run(
            [sys.executable, "-c", RUNNER, path.absolute(), given, result], capture_output=True, text=True, check=True
        )
        with torch.inference_mode():
            difference = float(np.abs(np.load(result) - model(x, lengths).numpy()).max())
        size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    print(done.stdout, end="")
    print(f"{size / 1024:.0f} KiB; largest difference of ONNX Runtime's result from ours: {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()

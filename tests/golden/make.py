"""Makes the golden data beside it: what TensorFlow's and haste's own LSTMs compute, and modules of ours as saved once.

TensorFlow is large, and haste compiles CUDA. Weights and inputs are random multiples of 1/64, so that they are short to
write and exact; everything is in float64.

    pip install tf-keras && python tests/golden/make.py tensorflow
    pip download --no-deps --no-build-isolation haste-pytorch==0.5.0rc0 && tar xf haste_pytorch-0.5.0rc0.tar.gz
    python tests/golden/make.py haste haste_pytorch-0.5.0rc0/frameworks/pytorch    # needs torch

haste runs on the CPU in its own Python code; its compiled module is imported there, but not called.

What a version of lstm_ext saved has to be readable in those after it. That version has to be the one that is installed:

    python tests/golden/make.py saved lstm_ext_0.1.0    # at commit 72f0405, before calls became LayerCall
    python tests/golden/make.py backward lstm_ext_0.1.0    # at commit 233ef28, the last whose backward pass took y
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

T, B, I, U, P = 4, 2, 3, 4, 2  # noqa: E741
FORGET_BIASES = (0.0, 1.0, 0.7)


def draw(rng: np.random.Generator, *shape: int) -> Array:
    return rng.integers(-64, 65, shape) / 64


def tensorflow_case(
    kind: str, forget_bias: float, num_proj: int | None, rng: np.random.Generator, **options: Any
) -> dict[str, Any]:
    """One cell over T steps; its variables by their names without the scope."""
    import tensorflow as tf

    x, c, h = draw(rng, T, B, I), draw(rng, B, U), draw(rng, B, num_proj or U)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        given = ({"num_proj": num_proj} if num_proj else {}) | options
        cell = getattr(tf.compat.v1.nn.rnn_cell, kind)(U, forget_bias=forget_bias, dtype=tf.float64, **given)
        state, outputs = (tf.constant(c), tf.constant(h)), []
        for step in x:
            output, state = cell(tf.constant(step), state)
            outputs.append(output)
        variables = {v.name.split("/", 1)[1].removesuffix(":0"): v for v in tf.compat.v1.global_variables()}
        params = {name: draw(rng, *v.shape.as_list()) for name, v in variables.items()}
        for name, v in variables.items():
            v.load(params[name], session)
        y, (c_n, h_n) = session.run([outputs, state])
    results = {"x": x, "h0": h, "c0": c, "y": np.stack(y), "h_n": h_n, "c_n": c_n}
    options = {"options": options} if options else {}
    return {"cell": kind, "forget_bias": forget_bias, **options, "params": params, **results}


def tensorflow_cases() -> list[dict[str, Any]]:
    """The same at each call."""
    rng = np.random.default_rng(0)
    cases = [tensorflow_case("BasicLSTMCell", forget_bias, None, rng) for forget_bias in FORGET_BIASES]
    cases += [tensorflow_case("LSTMCell", 1.0, None, rng), tensorflow_case("LSTMCell", 0.7, P, rng)]
    clips = {"cell_clip": 0.4, "proj_clip": 0.3}
    return [
        *cases,
        tensorflow_case("LSTMCell", 1.0, None, rng, use_peepholes=True),
        tensorflow_case("LSTMCell", 0.7, P, rng, use_peepholes=True, **clips),
    ]


def import_haste(folder: Path) -> Any:
    sys.modules["haste_pytorch_lib"] = types.ModuleType("haste_pytorch_lib")
    spec = importlib.util.spec_from_file_location("haste_pytorch", folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    haste = sys.modules["haste_pytorch"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(haste)
    return haste


def haste_cases(folder: Path) -> list[dict[str, Any]]:
    """A layer over T steps; to its initial bias, which has the forget bias in it, random numbers are added."""
    import torch

    haste, rng, cases = import_haste(folder), np.random.default_rng(1), []
    for forget_bias in FORGET_BIASES:
        lstm = haste.LSTM(I, U, forget_bias=forget_bias).double()
        lstm.reset_parameters()
        initial_bias = lstm.bias.detach().numpy().copy()
        params = {"kernel": draw(rng, I, 4 * U), "recurrent_kernel": draw(rng, U, 4 * U)}
        params["bias"] = initial_bias + draw(rng, 4 * U)
        lstm.load_state_dict({name: torch.from_numpy(a) for name, a in params.items()})
        x, h, c = draw(rng, T, B, I), draw(rng, 1, B, U), draw(rng, 1, B, U)
        with torch.no_grad():
            y, (h_n, c_n) = lstm(torch.from_numpy(x), (torch.from_numpy(h), torch.from_numpy(c)))
        results = {"x": x, "h0": h[0], "c0": c[0], "y": y.numpy(), "h_n": h_n.numpy()[0], "c_n": c_n.numpy()[0]}
        cases.append({"forget_bias": forget_bias, "initial_bias": initial_bias, "params": params, **results})
    return cases


def save_modules(folder: Path) -> None:
    """A module in each way in which torch saves one, with an input and what it makes of that."""
    import torch

    import lstm_ext

    torch.manual_seed(0)
    module, x, hx = lstm_ext.LSTM(3, 4, bidirectional=True), torch.randn(5, 2, 3), torch.randn(2, 2, 2, 4).unbind()
    dims = {0: torch.export.Dim("T", max=1024), 1: torch.export.Dim("B", max=1024)}
    program = torch.export.export(module, (x, hx), dynamic_shapes=(dims, ({1: dims[1]}, {1: dims[1]})))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # the folders of this machine
    folder.mkdir(exist_ok=True)
    torch.export.save(program, folder / "program.pt2")
    torch.save(module, folder / "module.pt")
    torch.save(module.state_dict(), folder / "state_dict.pt")
    y, state = module(x, hx)
    torch.save([x, hx, y.detach(), [a.detach() for a in state], str(torch.__version__)], folder / "example.pt")


def save_backward(folder: Path) -> None:
    """A program that calls both ops, with the first one's y among what the second one is given."""
    import torch

    import lstm_ext.ops  # noqa: F401

    ops = torch.ops.lstm_ext

    class Gradient(torch.nn.Module):
        def forward(self, x: Any, weights: list[Any]) -> Any:
            call, masks = (x, None, None, weights), (None, None, None, 2, False)  # both directions
            y, _, _, cells, gates = ops.layer_forward(*call, *masks, 2)
            return ops.layer_backward(y.cos(), None, None, None, *call, y, cells, gates, *masks, 1)[0]

    weights = [torch.randn(shape) for shape in ((16, 3), (16, 4), (16,), (16,)) * 2]
    dims = {0: torch.export.Dim("T", max=1024), 1: torch.export.Dim("B", max=1024)}
    program = torch.export.export(Gradient(), (torch.randn(5, 2, 3), weights), dynamic_shapes=(dims, [{}] * 8))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    torch.export.save(program, folder / "backward.pt2")


def to_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: to_lists(each) for name, each in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


def main() -> None:
    name, *folders = sys.argv[1:]
    if name in ("saved", "backward"):
        {"saved": save_modules, "backward": save_backward}[name](Path(__file__).with_name(folders[0]))
        return
    os.environ["TF_USE_LEGACY_KERAS"] = "1"  # tf.compat.v1.nn.rnn_cell is in tf-keras
    cases = {"tensorflow": tensorflow_cases, "haste": haste_cases}[name](*map(Path, folders))
    lines = ",\n".join(json.dumps(to_lists(case)) for case in cases)
    Path(__file__).with_name(f"{name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The arms: each runs a case on the same weights and inputs, or says why it cannot."""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_ext
import lstm_ext.torch_op  # makes the native module take tensors
from lstm_ext._native import C
from lstm_ext.call import FORWARD, LayerCall, Needs, OutputGrads, Save, Saved
from lstm_ext.engines import cuda

from .cases import STEPS, STEPS_BACKWARD, Case, usable_cores
from .oracle import SLACK, Array, Inputs, Named, by_layer, make_inputs
from .timing import captured

Call = Callable[[], Any]

NO_OPTIONS = "no options of a cell"


class Arm(ABC):
    """One implementation. `prepare` does once what a user does once; the call it returns is what is timed."""

    name: str
    slack = SLACK
    deviation: float | None = None  # of one that rounds weights: the most that `deviations` may say, instead
    modes = frozenset({"cell", "inference"})
    dtypes = frozenset({"float32"})
    has_options = False  # of a cell

    def missing(self) -> str:
        """Why the arm cannot run here at all; "" if it can."""
        return "" if importlib.util.find_spec(self.name) else "not installed"

    def version(self) -> str:
        return version(self.name)

    def refusal(self, case: Case) -> str:
        """Why the arm does not run the case; "" if it does."""
        if case.device != "cpu":
            return f"not set up for {case.device}"
        if case.mode not in self.modes:
            return f"no {case.mode}"
        if case.options and not self.has_options:
            return NO_OPTIONS
        return "" if case.dtype in self.dtypes else f"no {case.dtype}"

    def plan(self, case: Case) -> dict[str, Any]:
        """How the arm runs a case that it does not refuse, where it can tell."""
        return {}

    @abstractmethod
    def prepare(self, case: Case, inputs: Inputs) -> Call:
        """The call to be timed."""

    @abstractmethod
    def named(self, case: Case, inputs: Inputs, result: Any) -> Named:
        """What the call returned, with the names and shapes of `oracle.answers`."""


class Torch(Arm):
    """`torch.nn.LSTM` and `torch.nn.LSTMCell`."""

    name = "torch"
    modules: Any = torch.nn

    def missing(self) -> str:
        return ""

    def version(self) -> str:
        return str(torch.__version__)

    def refusal(self, case: Case) -> str:
        if case.mode in (STEPS, STEPS_BACKWARD):
            return "steps alone are those of our kernels"
        if case.options and not self.has_options:
            return NO_OPTIONS
        if case.device != "cpu" and case.cell is not None and case.cell.draws:
            return "the oracle draws masks by the generator of a CPU"
        return "no TF32 on a CPU" if (case.device, case.dtype) == ("cpu", "tf32") else ""

    def _load(self, kind: Any, case: Case, inputs: Inputs, **options: Any) -> torch.nn.Module:
        dtype = getattr(torch, case.stored)
        module: torch.nn.Module = kind(case.I, case.H, device=case.device, dtype=dtype, **options)
        with torch.no_grad():
            for parameter, weight in zip(module.parameters(), inputs.weights, strict=True):
                parameter.copy_(torch.from_numpy(weight))
        return module

    def prepare(self, case: Case, inputs: Inputs) -> Call:
        def tensor(a: Array) -> torch.Tensor:
            return torch.from_numpy(a).to(case.device, getattr(torch, case.stored))

        x, state = tensor(inputs.x), (tensor(inputs.h0), tensor(inputs.c0))
        if case.mode == "cell":
            cell = self._load(self.modules.LSTMCell, case, inputs)
            return partial(cell, x[0], (state[0][0], state[1][0]))
        options = {"num_layers": case.layers, "bidirectional": case.directions == 2, "proj_size": case.P}
        lstm: Any = self._load(self.modules.LSTM, case, inputs, **options)
        if case.trains:
            dy, leaves = tensor(inputs.dy), [x.requires_grad_(), *lstm.parameters()]

            def train() -> Any:
                y, state_n = lstm(x, state)
                return y, state_n, torch.autograd.grad(y, leaves, dy)

            return train
        if case.mode == "compiled":
            lstm = torch.compile(lstm)
        if inputs.lengths is not None:
            return partial(lstm, pack_padded_sequence(x, torch.from_numpy(inputs.lengths)), state)
        return partial(lstm, x, state)

    def named(self, case: Case, inputs: Inputs, result: Any) -> Named:
        if case.mode == "cell":
            h, c = result
            return {"y": h[None], "h_n": h[None], "c_n": c[None]}
        y, (h_n, c_n), *gradients = result
        named = {"y": y if inputs.lengths is None else y.data, "h_n": h_n, "c_n": c_n}
        for dx, *dweights in gradients:
            named |= {"dx": dx} | {f"dweights[{n}]": dw for n, dw in enumerate(dweights)}
        return named


class LstmExt(Torch):
    """`lstm_ext.LSTM` and `lstm_ext.LSTMCell`, on the compiled kernels; the steps alone by the strategy of the plan."""

    name = "lstm_ext"
    slack = 1
    modules = lstm_ext
    has_options = True
    strategy = ""  # the plan's

    def version(self) -> str:
        return lstm_ext.__version__

    def refusal(self, case: Case) -> str:
        backend = lstm_ext.backends()[case.device]
        if not backend.available:
            return backend.reason
        if case.mode not in (STEPS, STEPS_BACKWARD):
            return super().refusal(case)
        if case.device != "cuda" or case.layers > 1 or case.directions > 1:
            return "steps alone are those of one layer and direction on a GPU"
        try:
            self.plan(case)
        except RuntimeError as error:
            return str(error)
        return ""

    def plan(self, case: Case) -> dict[str, Any]:
        if case.mode not in (STEPS, STEPS_BACKWARD):
            return {}
        options = {"proj_size": case.P, "dtype": case.stored, "tf32": case.dtype == "tf32"}
        backward, strategy = case.mode == STEPS_BACKWARD, self.strategy or None
        return asdict(lstm_ext.plan(case.T, case.B, case.H, **options, backward=backward, strategy=strategy))

    def _load(self, kind: Any, case: Case, inputs: Inputs, **options: Any) -> torch.nn.Module:
        return super()._load(kind, case, inputs, **options, **case.given_options).train(case.trains)

    def prepare(self, case: Case, inputs: Inputs) -> Call:
        if case.mode not in (STEPS, STEPS_BACKWARD):
            return super().prepare(case, inputs)
        with cuda.use_strategy(self.strategy):
            return self._steps(case, inputs)

    def _steps(self, case: Case, inputs: Inputs) -> Call:
        """What engines/cuda.py calls between its products.

        The backward pass answers with what a whole training step by the same strategy came to, since its own results
        are but parts of gradients.
        """

        def tensor(a: Array) -> torch.Tensor:
            return torch.from_numpy(a).to(case.device, getattr(torch, case.stored))

        weights, masks = [tensor(w) for w in inputs.weights], (None, None, None)
        call = LayerCall(*map(tensor, (inputs.x, inputs.h0, inputs.c0)), weights, *masks, FORWARD, False)
        tf32, strategy = cuda.tf32_allowed(), self.strategy
        if case.mode == STEPS:
            steps = cuda.steps_of(call)._replace(x=cuda.input_products(call))

            def forward() -> Any:
                y, h_n, c_n, *_ = C.cuda_layer_forward(steps, Save.NOTHING, tf32, strategy)
                return y, (h_n, c_n)

            return forward
        trained = super().prepare(case, inputs)()
        *_, cells, gates = cuda.forward(call, Save.ALL)
        steps, saved = cuda.steps_of(call)._replace(x=gates), Saved(cells, gates)
        grads, needs = OutputGrads(tensor(inputs.dy), None, None, None), Needs.X | Needs.WEIGHTS

        def backward() -> Any:
            C.cuda_layer_backward(steps, saved, grads, needs, tf32, strategy)
            return trained

        return backward


class Frozen(LstmExt):
    """`lstm_ext.freeze` of such a module, with weights of some kind."""

    def __init__(self, weights: str) -> None:
        self.name = "lstm_ext-frozen" + ("" if weights == "float32" else f"-{weights}")
        self.weights = weights
        self.deviation = {"float32": None, "bfloat16": 0.02, "int8": 0.1}[weights]

    def refusal(self, case: Case) -> str:
        if case.device != "cpu" or case.mode not in ("cell", "inference"):
            return f"no {case.mode} on {case.device}"
        return super().refusal(case) if case.dtype == "float32" else f"no {case.dtype}"

    def _load(self, kind: Any, case: Case, inputs: Inputs, **options: Any) -> Any:
        return lstm_ext.freeze(super()._load(kind, case, inputs, **options), weights=self.weights)


class Streamed(Frozen):
    """Its stream on NumPy arrays, with `out=`: the state goes on; the answers are of the first call."""

    def __init__(self) -> None:
        super().__init__("float32")
        self.name = "lstm_ext-stream"

    def refusal(self, case: Case) -> str:
        if why := super().refusal(case):
            return why
        if case.directions > 1 or case.mode != "inference":
            return "a stream goes on, step after step"
        if case.threads == (cores := len(usable_cores())):
            return ""
        frozen = lstm_ext.freeze(lstm_ext.LSTM(case.I, case.H, case.layers, proj_size=case.P))
        threads = max(plan.threads for plan in lstm_ext.plan(case.T, case.B, frozen, num_threads=cores))
        return "NumPy arrays are computed by all cores" if threads > case.threads else ""

    def prepare(self, case: Case, inputs: Inputs) -> Call:
        options = {"num_layers": case.layers, "proj_size": case.P}
        stream = self._load(lstm_ext.LSTM, case, inputs, **options).stream(batch_size=case.B)
        stream.state = inputs.h0, inputs.c0
        y = np.empty((case.T, case.B, case.width), np.float32)
        return lambda: (stream(inputs.x, out=y), stream)

    def named(self, case: Case, inputs: Inputs, result: Any) -> Named:
        y, stream = result
        h_n, c_n = stream.state
        return {"y": y.copy(), "h_n": h_n, "c_n": c_n}


class TorchInt8(Torch):
    """`torch.ao.quantization.quantize_dynamic` of `torch.nn.LSTM`."""

    name = "torch-int8"
    deviation = 0.1

    def refusal(self, case: Case) -> str:
        if case.device != "cpu" or case.mode not in ("cell", "inference") or case.dtype != "float32":
            return f"no {case.mode} of {case.dtype} on {case.device}"
        return "no projection" if case.P else super().refusal(case)

    def _load(self, kind: Any, case: Case, inputs: Inputs, **options: Any) -> Any:
        from torch.ao.quantization import quantize_dynamic

        with warnings.catch_warnings():  # that it will move to another package
            warnings.simplefilter("ignore")
            whole = torch.nn.Sequential(super()._load(kind, case, inputs, **options))
            return quantize_dynamic(whole, {torch.nn.LSTM, torch.nn.LSTMCell})[0]


class Graphed(Torch):
    """`torch.nn.LSTM` and its cell in a CUDA graph."""

    name = "torch-graph"

    def missing(self) -> str:
        return "" if torch.cuda.is_available() else "torch finds no CUDA device"

    def refusal(self, case: Case) -> str:
        return f"no graphs on {case.device}" if case.device != "cuda" else super().refusal(case)

    def prepare(self, case: Case, inputs: Inputs) -> Call:
        call = super().prepare(case, inputs)
        with torch.inference_mode(case.mode != "training"):
            return captured(call)


class LstmExtGraphed(Graphed, LstmExt):
    """`lstm_ext.LSTM` and `lstm_ext.LSTMCell` in a CUDA graph."""

    name = "lstm_ext-graph"


class Strategy(LstmExt):
    """The steps of our kernels by one strategy, where it can run them."""

    def __init__(self, strategy: str) -> None:
        self.name, self.strategy = f"lstm_ext-{strategy}", strategy

    def refusal(self, case: Case) -> str:
        return super().refusal(case) if case.mode in (STEPS, STEPS_BACKWARD) else "steps alone are forced"


class FlashRnn(Torch):
    """FlashRNN's fused kernels, which it compiles for each shape; x W_ih' by torch, as a layer of it needs."""

    name = "flashrnn"
    suites = frozenset({"gpu_flashrnn", "custom"})

    def missing(self) -> str:
        return Arm.missing(self) or ("" if torch.cuda.is_available() else "torch finds no CUDA device")

    def version(self) -> str:
        return version(self.name)

    def refusal(self, case: Case) -> str:
        if case.device != "cuda" or case.mode not in ("inference", "training"):
            return f"no {case.mode} on {case.device}"
        if case.dtype not in ("bfloat16", "float16"):
            return f"no {case.dtype}"
        if case.P or case.layers > 1 or case.directions > 1:
            return "one plain layer only"
        return "" if case.suite in self.suites else f"minutes of compiling for each shape: in {', '.join(self.suites)}"

    def prepare(self, case: Case, inputs: Inputs) -> Call:
        from flashrnn import flashrnn

        T, B, H, dtype = case.T, case.B, case.H, getattr(torch, case.stored)

        def tensor(a: Array) -> torch.Tensor:
            return torch.from_numpy(a).to(case.device, dtype)

        x, dy, w_ih, w_hh, b_ih, b_hh = map(tensor, (inputs.x, inputs.dy, *inputs.weights))
        state = torch.stack([tensor(inputs.h0[0]), tensor(inputs.c0[0])])[:, :, None, None]  # [2, B, 1, 1, H]
        leaves = [a.requires_grad_(case.mode == "training") for a in (x, w_ih, w_hh, b_ih, b_hh)]

        def forward() -> tuple[torch.Tensor, Any]:
            wx = torch.nn.functional.linear(x.transpose(0, 1), w_ih).view(B, T, 4, 1, H)
            bias = (b_ih + b_hh).view(4, 1, H)
            states, _ = flashrnn(wx, w_hh.view(4, 1, H, H), bias, states=state, backend="cuda_fused", dtype=case.dtype)
            h, c = states.squeeze(3)  # [B, T, H] each
            return h.transpose(0, 1), (h[:, -1][None], c[:, -1][None])

        def train() -> Any:
            y, state_n = forward()
            return y, state_n, torch.autograd.grad(y, leaves, dy)

        return train if case.mode == "training" else forward


ONNX_GATES = [0, 3, 1, 2]  # i, o, f, c of our i, f, g, o


def onnx_weights(weights: list[Array], directions: int) -> dict[str, Array]:
    """W [D, 4H, I], R [D, 4H, H] and B [D, 8H] of a layer."""

    def reorder(a: Array) -> Array:
        return a.reshape(4, -1, *a.shape[1:])[ONNX_GATES].reshape(a.shape)

    w_ih, w_hh, b_ih, b_hh = (np.stack([reorder(a) for a in weights[n::4]]) for n in range(4))
    assert len(w_ih) == directions
    return {"W": w_ih, "R": w_hh, "B": np.concatenate([b_ih, b_hh], axis=1)}


class Onnx(Arm):
    """A runtime of ONNX models; the model has static shapes, its states and lengths are inputs."""

    modes = frozenset({"cell", "inference", "packed"})

    def missing(self) -> str:
        return super().missing() or ("" if importlib.util.find_spec("onnx") else "onnx is not installed")

    def refusal(self, case: Case) -> str:
        return super().refusal(case) or ("the operator has no projection" if case.P else "")

    def feed(self, case: Case, inputs: Inputs) -> dict[str, Array]:
        """The model's inputs by name."""
        feed, D = {"x": inputs.x}, case.directions
        for n in range(case.layers):
            feed |= {f"h0_{n}": inputs.h0[n * D : (n + 1) * D], f"c0_{n}": inputs.c0[n * D : (n + 1) * D]}
        if inputs.lengths is not None:
            feed["lengths"] = inputs.lengths.astype(np.int32)
        return feed

    def model(self, case: Case, inputs: Inputs) -> bytes:
        """One LSTM node a layer: inputs as in `feed`, outputs y [T, B, D*H], then h_n, c_n [D, B, H] of each layer."""
        from onnx import TensorProto, helper, numpy_helper

        info = helper.make_tensor_value_info
        feed = self.feed(case, inputs)
        T, B, D, H = case.T, case.B, case.directions, case.H
        constants = {"direction_axis": np.array([1])} if D == 1 else {"joined": np.array([T, B, D * H])}
        nodes, outputs, x = [], [], "x"
        for n, weights in enumerate(by_layer(inputs.weights, case.layers)):
            arrays = onnx_weights(weights, D)
            constants |= {f"{name}_{n}": array for name, array in arrays.items()}
            sources = [x, *(f"{name}_{n}" for name in arrays), "lengths" * ("lengths" in feed), f"h0_{n}", f"c0_{n}"]
            results, x = [f"directions_{n}", f"h_n_{n}", f"c_n_{n}"], f"y_{n}"
            direction = "bidirectional" if D == 2 else "forward"
            nodes.append(helper.make_node("LSTM", sources, results, hidden_size=H, direction=direction))
            if D == 1:
                nodes.append(helper.make_node("Squeeze", [results[0], "direction_axis"], [x]))
            else:
                nodes.append(helper.make_node("Transpose", [results[0]], [f"rows_{n}"], perm=[0, 2, 1, 3]))
                nodes.append(helper.make_node("Reshape", [f"rows_{n}", "joined"], [x]))
            outputs += [(name, (D, B, H)) for name in results[1:]]
        outputs.insert(0, (x, (T, B, D * H)))
        graph = helper.make_graph(
            nodes,
            "lstm",
            [info(k, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape) for k, array in feed.items()],
            [info(name, TensorProto.FLOAT, shape) for name, shape in outputs],
            [numpy_helper.from_array(array, name) for name, array in constants.items()],
        )
        opset = helper.make_opsetid("", 17)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
        return bytes(model.SerializeToString())

    def arrays(self, result: Any) -> list[Array]:
        """The outputs, in the order of the model's."""
        return list(result)

    def named(self, case: Case, inputs: Inputs, result: Any) -> Named:
        y, *states = self.arrays(result)
        return {"y": y if inputs.lengths is None else y[inputs.valid]} | {
            name: np.concatenate(states[n::2]) for n, name in enumerate(("h_n", "c_n"))
        }


class OnnxRuntime(Onnx):
    """ONNX Runtime's CPU provider."""

    name = "onnxruntime"

    def prepare(self, case: Case, inputs: Inputs) -> Call:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = case.threads
        options.inter_op_num_threads = 1
        model = self.model(case, inputs)
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return partial(session.run, None, self.feed(case, inputs))


class OnnxRuntimeInt8(OnnxRuntime):
    """The same, its weights quantised by `quantize_dynamic` of that package."""

    name = "onnxruntime-int8"
    deviation = 0.1

    def missing(self) -> str:
        return OnnxRuntime().missing()

    def version(self) -> str:
        return OnnxRuntime().version()

    def model(self, case: Case, inputs: Inputs) -> bytes:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        with tempfile.TemporaryDirectory() as folder:
            path, quantised = Path(folder) / "lstm.onnx", Path(folder) / "int8.onnx"
            path.write_bytes(super().model(case, inputs))
            logging.disable(logging.WARNING)  # that the model could be prepared first: a single operator cannot
            try:
                quantize_dynamic(path, quantised, weight_type=QuantType.QInt8, per_channel=True)
            finally:
                logging.disable(logging.NOTSET)
            return quantised.read_bytes()


class OpenVino(Onnx):
    """OpenVINO's CPU device, set for latency, in float32 arithmetic."""

    name = "openvino"

    def prepare(self, case: Case, inputs: Inputs) -> Call:
        import openvino

        core = openvino.Core()
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": case.threads,
            "NUM_STREAMS": 1,
        }
        request = core.compile_model(core.read_model(self.model(case, inputs)), "CPU", options).create_infer_request()
        return partial(request.infer, self.feed(case, inputs), share_inputs=True, share_outputs=True)

    def arrays(self, result: Any) -> list[Array]:
        return list(result.to_tuple())


class Jax(Arm):
    """`jax.jit` of a scan over the steps, the input projection before it."""

    name = "jax"
    modes = frozenset({"cell", "inference", "training"})

    def __init__(self) -> None:
        self._threads = 0

    def refusal(self, case: Case) -> str:
        return super().refusal(case) or ("no projection" if case.P else "")

    def _use_threads(self, threads: int) -> None:
        """A new pool of as many threads as this process may use cores while it is made: JAX has no setting for it."""
        import jax
        from jax.extend.backend import clear_backends

        if threads == self._threads:
            return
        clear_backends()
        cores = usable_cores()
        os.sched_setaffinity(0, cores[:threads])
        jax.devices()
        os.sched_setaffinity(0, cores)
        self._threads = threads

    def prepare(self, case: Case, inputs: Inputs) -> Call:
        self._use_threads(case.threads)
        import jax
        import jax.numpy as jnp

        def direction(x: Any, h: Any, c: Any, weights: Any, reverse: bool) -> Any:
            w_ih, w_hh, b_ih, b_hh = weights

            def step(state: Any, gates: Any) -> Any:
                h, c = state
                i, f, g, o = jnp.split(gates + h @ w_hh.T, 4, axis=-1)
                c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
                h = jax.nn.sigmoid(o) * jnp.tanh(c)
                return (h, c), h

            return jax.lax.scan(step, (h, c), x @ w_ih.T + b_ih + b_hh, reverse=reverse)

        def forward(x: Any, weights: Any, h0: Any, c0: Any) -> Any:
            states: list[Any] = []
            for layer in by_layer(weights, case.layers):
                ys = []
                for d in range(case.directions):
                    n, own = len(states), layer[4 * d : 4 * d + 4]
                    state, y = direction(x, h0[n], c0[n], own, d == 1)
                    states.append(state)
                    ys.append(y)
                x = jnp.concatenate(ys, axis=-1)
            return x, *map(jnp.stack, zip(*states, strict=True))

        def train(x: Any, weights: Any, h0: Any, c0: Any, dy: Any) -> Any:
            (y, *state), pull = jax.vjp(lambda x, weights: forward(x, weights, h0, c0), x, weights)
            return y, *state, *pull((dy, *map(jnp.zeros_like, state)))

        arguments = [inputs.x, inputs.weights, inputs.h0, inputs.c0]
        if case.mode == "training":
            arguments.append(inputs.dy)
        call = partial(jax.jit(train if case.mode == "training" else forward), *jax.device_put(arguments))
        return lambda: jax.block_until_ready(call())

    def named(self, case: Case, inputs: Inputs, result: Any) -> Named:
        named = dict(zip(("y", "h_n", "c_n", "dx"), result, strict=False))
        dweights = result[4] if case.mode == "training" else []
        return named | {f"dweights[{n}]": dw for n, dw in enumerate(dweights)}


STRATEGIES = {arm.name: arm for arm in map(Strategy, ("block", "cluster", "grid", "step"))}
_PEERS = (OnnxRuntime(), OpenVino(), Jax(), FlashRnn())
USUAL: dict[str, Arm] = {arm.name: arm for arm in (LstmExt(), Torch(), LstmExtGraphed(), Graphed(), *_PEERS)}
_SERVED = (*map(Frozen, ("float32", "bfloat16", "int8")), Streamed(), TorchInt8(), OnnxRuntimeInt8())
SERVED: dict[str, Arm] = {arm.name: arm for arm in _SERVED}
ARMS = USUAL | STRATEGIES | SERVED


def problem_on_gpu(case: Case) -> tuple[Inputs, Named]:
    """As `oracle.problem`, the answers by `torch.nn.LSTM` in float64 on the GPU, since the reference takes minutes."""
    inputs, arm, exact = make_inputs(case), Torch(), replace(case, dtype="float64")
    with torch.inference_mode(not case.trains):
        named = arm.named(exact, inputs, arm.prepare(exact, inputs)())
    return inputs, {name: a.detach().cpu().numpy() for name, a in named.items()}

"""Cells with options: the mathematics against finite differences, every engine against it, and bad input."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import lstm_ext
from lstm_ext import reference, torch_op
from lstm_ext.call import BOTH, REVERSE, Grads, LayerCall, Needs, OutputGrads, Outputs, Save, Saved
from lstm_ext.cell import Activation, Cell, Norm
from lstm_ext.engines import composed, cpu, numpy
from lstm_ext.masks import Mask, happens, lowbias32, splitmix64
from lstm_ext.testing import Case, assert_all_close, make_inputs, run_layer, run_oracle

from .conftest import needs_native
from .test_reference import finite_differences

# Each option alone, all of those that go together, and what only modules of TensorFlow's ask for.
CELLS = {
    "hard_sigmoid": Cell(recurrent_activation=Activation.HARD_SIGMOID, recurrent_alpha=0.2, recurrent_beta=0.5),
    "relu": Cell(Activation.RELU, recurrent_activation=Activation.SOFTSIGN),
    "leaky_relu": Cell(Activation.LEAKY_RELU, 0.1, recurrent_activation=Activation.TANH),
    "elu": Cell(Activation.ELU, 0.7, recurrent_activation=Activation.SIGMOID),
    "softplus": Cell(Activation.SOFTPLUS, recurrent_activation=Activation.LINEAR),
    "hard_tanh": Cell(Activation.HARD_SIGMOID, 0.6, 0.1),
    "forget_bias": Cell(forget_bias=1.0),
    "coupled": Cell(coupled=True),
    "clips": Cell(cell_clip=0.3, proj_clip=0.1),
    "peephole": Cell(peephole=True),
    "rows": Cell(norm=Norm.ROWS, norm_epsilon=1e-3),
    "gates": Cell(norm=Norm.GATES, norm_epsilon=1e-3),
    "zoneout": Cell(zoneout_h=0.3, zoneout_c=0.4, training=True),
    "zoneout_mean": Cell(zoneout_h=0.3, zoneout_c=0.4),
    "dropouts": Cell(recurrent_dropout=0.4, candidate_dropout=0.3, training=True),
    "tensorflow": Cell(forget_bias=1.0, tensorflow=True),
    "layer_norm_basic": Cell(
        Activation.SOFTSIGN,
        forget_bias=1.0,
        norm=Norm.GATES,
        norm_epsilon=1e-3,
        candidate_dropout=0.2,
        training=True,
        tensorflow=True,
    ),
    "all": Cell(
        Activation.ELU,
        0.5,
        recurrent_activation=Activation.HARD_SIGMOID,
        recurrent_alpha=0.25,
        recurrent_beta=0.5,
        forget_bias=0.5,
        coupled=True,
        cell_clip=1.0,
        proj_clip=0.5,
        peephole=True,
        norm=Norm.ROWS,
        norm_epsilon=1e-3,
        zoneout_h=0.2,
        zoneout_c=0.3,
        recurrent_dropout=0.25,
        candidate_dropout=0.2,
        training=True,
    ),
    "all_but_coupled": Cell(
        forget_bias=-0.5,
        cell_clip=0.8,
        proj_clip=0.5,
        peephole=True,
        norm=Norm.GATES,
        norm_epsilon=1e-3,
        zoneout_h=0.2,
        zoneout_c=0.3,
        recurrent_dropout=0.25,
        candidate_dropout=0.2,
    ),
}
SHAPES = {
    "plain": Case(3, 2, 3, 4),
    "projected": Case(3, 2, 3, 5, P=3, bias=False, directions=REVERSE, batch_first=True),
    "masked": Case(4, 3, 2, 5, P=2, directions=BOTH, lengths="with_zero", resets=True),
    "packed": Case(4, 3, 2, 5, directions=BOTH, packed=True, state=False),
}


def case_of(shape: str, name: str) -> Case:
    """Such a cell in such a call; without what the cell cannot have, a clip of a projection or a projection."""
    case, cell = SHAPES[shape], CELLS[name]
    if cell.tensorflow:
        case = replace(case, P=0, bias=True)
    return replace(case, cell=cell if case.P else cell._replace(proj_clip=0.0))


FINITE_CASES = [case_of("masked", name) for name in CELLS]
ENGINE_CASES = [case_of(shape, name) for name in CELLS for shape in SHAPES]


@pytest.mark.parametrize("case", FINITE_CASES, ids=str)
def test_gradients_match_finite_differences(case: Case) -> None:
    inputs = make_inputs(case)
    _, gradients = run_layer(reference, inputs)
    arrays = [inputs.x, inputs.h0, inputs.c0, *inputs.weights]
    for array, (name, gradient) in zip(arrays, gradients.items(), strict=True):
        differences = finite_differences(array, inputs, step=1e-6)  # a larger one meets more corners of activations
        np.testing.assert_allclose(gradient, differences, rtol=1e-5, atol=1e-7, err_msg=name)


# Engines -------------------------------------------------------------------------------------------------------------


def run_ops(call: LayerCall, save: Save) -> Outputs:
    return Outputs(*torch_op.layer_forward(*torch_op.forward_arguments(call, save)))


class Differentiated:
    """A forward pass with torch's autograd."""

    def __init__(self, forward: Any) -> None:
        self.run = forward

    def forward(self, call: LayerCall, save: Save) -> Outputs:
        arrays = [None if a is None else a.requires_grad_() for a in (*call[:3], *call.weights)]
        self.asked = [a for a in arrays if a is not None]
        self.outputs = self.run(call, save)
        return self.outputs

    def backward(self, call: LayerCall, saved: Saved, grads: OutputGrads, needs: Needs) -> Grads:
        given = [None if g is None else g.nan_to_num() for g in grads]
        found = dict(zip(map(id, self.asked), torch.autograd.grad(self.outputs[:4], self.asked, given), strict=True))
        dx, dh0, dc0, *dweights = (found.get(id(a)) for a in (*call[:3], *call.weights))
        return Grads(dx, dh0, dc0, dweights)


class Ops:
    """The ops as torch sees them, below which the backend runs."""

    forward = staticmethod(run_ops)

    def backward(self, call: LayerCall, saved: Saved, grads: OutputGrads, needs: Needs) -> Grads:
        return Grads(*torch_op.layer_backward(*torch_op.backward_arguments(call, saved, grads, needs)))


ENGINES: dict[str, Any] = {
    "composed": lambda: Differentiated(composed.forward),
    "ops": Ops,
    "numpy": lambda: numpy,
    "cpu": lambda: cpu,
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", ENGINE_CASES, ids=str)
def test_engines_agree(case: Case, engine: str) -> None:
    if not case.state:
        case = replace(case, state=True)
    inputs, run = make_inputs(case), ENGINES[engine]()
    expected = run_oracle(inputs)
    own = inputs.to_torch("float64")
    if engine == "cpu" and run.forward(own.call, Save.ALL) is NotImplemented:
        cell = own.call.cell
        assert cell is not None
        assert cell.zoneout_h, "the kernels refuse more than they say"
        assert cell.proj_clip, "the kernels refuse more than they say"
        assert not cell.training, "the kernels refuse more than they say"
        pytest.skip("the kernels have no mean of zoneout of h with proj_clip")
    outputs, gradients = run_layer(run, own)
    # What is normalised is divided by the deviation of a few sums, which are smaller than 1, and so are its errors.
    magnitude = 3.0 if case.cell is not None and case.cell.norm else 1.0
    assert_all_close((outputs, gradients), expected, case, "float64", gradient_magnitude=magnitude)


HALF_CASES = [
    case_of(shape, name) for name in ("all", "all_but_coupled", "tensorflow") for shape in ("masked", "packed")
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("engine", ["numpy", "cpu"])
@pytest.mark.parametrize("case", HALF_CASES, ids=str)
def test_engines_agree_in_half_types(case: Case, engine: str, dtype: str) -> None:
    case = replace(case, state=True)
    inputs, run = make_inputs(case, dtype), ENGINES[engine]()
    own = inputs.to_torch(dtype)
    if engine == "cpu" and run.forward(own.call, Save.ALL) is NotImplemented:
        pytest.skip("test_engines_agree tells what the kernels refuse")
    results = run_layer(run, own)
    for name, a in (results[0] | results[1]).items():
        wide = name == "cells"
        assert a.dtype == (torch.float32 if wide else getattr(torch, dtype)), name
    assert_all_close(results, run_oracle(inputs), case, dtype, gradient_magnitude=3.0)


@needs_native
@pytest.mark.parametrize("way", ["ops", "ops with autograd", "ops compiled"])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_what_an_engine_refuses_the_ops_compute_in_torchs_operations(
    dtype: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, whose memory NumPy could not read."""
    for refuse in ("forward", "backward"):
        monkeypatch.setattr(cpu, refuse, lambda *_: NotImplemented)
        monkeypatch.setattr(numpy, refuse, None)
    case = case_of("masked", "all")
    inputs = make_inputs(case, dtype)
    ways: dict[str, Any] = {"ops": Ops(), "ops with autograd": Differentiated(run_ops)}
    ways["ops compiled"] = Differentiated(torch.compile(run_ops, fullgraph=True, backend="aot_eager"))
    results = run_layer(ways[way], inputs.to_torch(dtype))
    assert_all_close(results, run_oracle(inputs), case, dtype, gradient_magnitude=3.0)


def test_a_gradient_of_a_single_step_is_differentiated() -> None:
    cell, x = lstm_ext.LSTMCell(3, 4, peephole=True, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: cell(x)[0], x.requires_grad_())


# Masks ---------------------------------------------------------------------------------------------------------------


def lowbias32_of_words(n: int) -> int:
    """By NumPy's 32-bit words."""
    v = np.array([n], np.uint32)
    v = (v ^ (v >> np.uint32(16))) * np.uint32(0x7FEB352D)
    v = (v ^ (v >> np.uint32(15))) * np.uint32(0x846CA68B)
    return int((v ^ (v >> np.uint32(16)))[0])


@pytest.mark.parametrize("array", [np.array, torch.tensor])
def test_masks_are_counted_from_splitmix64(array: Any) -> None:
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]  # the first two numbers of the generator from 0
    state = array([0, 0x9E3779B97F4A7C15 - 2**64])
    assert [int(n) % 2**64 for n in splitmix64(state)] == published
    words = [int(n) for n in lowbias32(array([0, 1, 2**31, 2**32 - 1]))]
    assert words == [lowbias32_of_words(n) for n in (0, 1, 2**31, 2**32 - 1)]


def test_masks_have_their_probability() -> None:
    rows, units, times = np.arange(40), np.arange(50), np.arange(60)[:, None]
    for p in (0.0, 0.1, 0.5, 1.0):
        events = happens(np.array([3]), Mask.ZONEOUT_H, 1, np.broadcast_to(times, (60, 40)), rows, units, p)
        assert events.shape == (60, 40, 50)
        assert abs(events.mean() - p) < 4 * np.sqrt(p * (1 - p) / events.size) + 1e-12
        for axis in (0, 1, 2):  # no row, time or unit is like another
            assert p in (0.0, 1.0) or 0 < events.mean(axis).std() < 3 * np.sqrt(p / events.shape[axis])


# Modules and functions -----------------------------------------------------------------------------------------------


ALL: dict[str, Any] = {
    "activation": "elu",
    "recurrent_activation": ("hard_sigmoid", 0.2),
    "forget_bias": 1.0,
    "peephole": True,
    "cell_clip": 2.0,
    "layer_norm": True,
    "zoneout": (0.2, 0.3),
    "recurrent_dropout": 0.3,
    "candidate_dropout": 0.2,
    "weight_drop": 0.25,
    "coupled": True,
}
EACH = [{name: value} for name, value in ALL.items()]


def lstm(**options: Any) -> lstm_ext.LSTM:
    torch.manual_seed(0)
    return lstm_ext.LSTM(3, 5, dtype=torch.float64, **options)


def test_defaults_are_torchs() -> None:
    given = {"activation": "tanh", "forget_bias": 0.0, "zoneout": 0.0, "peephole": False, "cell_clip": None}
    torch.manual_seed(1)
    ours, same = lstm_ext.LSTM(3, 5, 2, **given), lstm_ext.LSTM(3, 5, 2)
    torch.manual_seed(1)
    stock = torch.nn.LSTM(3, 5, 2)
    assert str(ours) == str(same) == str(stock)
    assert list(ours.state_dict()) == list(stock.state_dict())
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_of_options() -> None:
    module = lstm(num_layers=2, bidirectional=True, proj_size=2, unit_forget_bias=True, **ALL)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    per_direction = {"peephole": (3, 5), "gamma": (2, 20), "gamma_h": (5,), "beta_h": (5,)}
    for suffix in ("l0", "l0_reverse", "l1", "l1_reverse"):
        assert {name: shapes[f"{name}_{suffix}"] for name in per_direction} == per_direction
        biases = module.get_parameter(f"bias_ih_{suffix}"), module.get_parameter(f"bias_hh_{suffix}")
        assert (biases[0][5:10] == 1).all()
        assert (biases[1][5:10] == 0).all()
        assert (module.get_parameter(f"gamma_{suffix}") == 1).all()
        assert (module.get_parameter(f"beta_h_{suffix}") == 0).all()
    assert all(isinstance(w, torch.nn.Parameter) for own in module.all_weights for w in own)
    assert [len(own) for own in module.all_weights] == [9] * 4
    assert "recurrent_activation=('hard_sigmoid', 0.2), " in str(module)
    assert "peephole=True" in str(module)


def as_function(module: lstm_ext.LSTM, x: Any, options: dict[str, Any], own: Any) -> Any:
    """A module of one layer and direction, in eval; `own` makes its weights what x is."""
    p = {name.removesuffix("_l0"): own(p) for name, p in module.named_parameters()}
    named = {name: value for name, value in options.items() if name not in ("weight_drop", "peephole", "layer_norm")}
    named |= {"peephole": p["peephole"]} if "peephole" in p else {}
    named |= {"layer_norm": (p["gamma"], p["gamma_h"], p["beta_h"])} if "gamma" in p else {}
    return lstm_ext.lstm(x, None, p["weight_ih"], p["weight_hh"], p["bias_ih"], p["bias_hh"], **named)


@pytest.mark.parametrize("options", [*EACH, ALL], ids=lambda o: "-".join(o) if len(o) < 5 else "all")
def test_modules_functions_and_cells_agree(options: dict[str, Any]) -> None:
    """Also on NumPy arrays, and for packed, ragged, batch-first and unbatched sequences."""
    module, x = lstm(**options).eval(), torch.randn(4, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.startswith(("gamma", "beta")):
                p.add_(0.1 * torch.randn_like(p))
    y, (h_n, c_n) = module(x)

    function_y, state = as_function(module, x, options, lambda p: p)
    torch.testing.assert_close((function_y, *state), (y, h_n[0], c_n[0]))
    array_y, _ = as_function(module, x.numpy(), options, lambda p: p.detach().numpy())
    np.testing.assert_allclose(array_y, y.detach().numpy(), rtol=1e-9, atol=1e-12)

    cell = lstm_ext.LSTMCell(3, 5, dtype=torch.float64, **options).eval()
    cell.load_state_dict({name.removesuffix("_l0"): p for name, p in module.state_dict().items()})
    state, steps = None, []
    for each in x:
        state = cell(each, state)
        steps.append(state[0])
    torch.testing.assert_close(torch.stack(steps), y)

    lengths = torch.tensor([4, 2, 1])
    ragged, (ragged_h, _) = module(x, lengths=lengths)
    packed, (packed_h, _) = module(pack_padded_sequence(x, lengths))
    torch.testing.assert_close((pad_packed_sequence(packed)[0], packed_h), (ragged, ragged_h))
    torch.testing.assert_close(module(x[:, 0])[0], y[:, 0])
    module.batch_first = True
    torch.testing.assert_close(module(x.transpose(0, 1))[0].transpose(0, 1), y)
    module.batch_first = False
    restored = pickle.loads(pickle.dumps(module))
    assert torch.equal(restored(x)[0], module(x)[0])
    assert str(restored) == str(module)


DRAWING = ["zoneout", "recurrent_dropout", "candidate_dropout", "weight_drop"]


@pytest.mark.parametrize("name", DRAWING)
def test_masks_follow_torchs_generator(name: str) -> None:
    module, x = lstm(num_layers=2, bidirectional=True, **{name: ALL[name]}), torch.randn(4, 3, 3, dtype=torch.float64)
    torch.manual_seed(3)
    first, state_after = module(x)[0], torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(module(x)[0], first)
    assert not torch.equal(module(x)[0], first)
    torch.set_rng_state(state_after)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        assert torch.equal(module(x)[0], first)
    assert torch.equal(torch.get_rng_state(), state_after)
    module.eval()
    assert torch.equal(module(x)[0], module(x)[0])
    assert torch.equal(torch.get_rng_state(), state_after)


def test_checkpointing_draws_the_same_again() -> None:
    module, x = lstm(**ALL), torch.randn(4, 3, 3, dtype=torch.float64, requires_grad=True)
    gradients = []
    for run in (module, lambda x: checkpoint(module, x, use_reentrant=False)):
        torch.manual_seed(4)
        gradients.append(torch.autograd.grad(run(x)[0].sum(), [x, *module.parameters()]))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_dropouts_are_masks_of_their_seed() -> None:
    """Recurrent dropout is one mask for all steps; that of the candidate is another at each."""
    x, w_ih, w_hh = (torch.randn(shape, dtype=torch.float64) for shape in ((4, 3, 2), (20, 2), (20, 5)))
    rows, units, seed = torch.arange(3), torch.arange(5), torch.tensor([6])
    dropped = happens(seed, Mask.RECURRENT_DROPOUT, 0, torch.zeros(1, dtype=torch.int64), rows, units, 0.4)
    y, _ = lstm_ext.lstm(x, None, w_ih, w_hh, recurrent_dropout=0.4, training=True, seed=6)
    h = c = torch.zeros(3, 5, dtype=torch.float64)
    for expected, each in zip(y, x, strict=True):
        h, c = lstm_ext.lstm_cell(each, (h * ~dropped / 0.6, c), w_ih, w_hh)
        torch.testing.assert_close(h, expected)
    thinned, _ = lstm_ext.lstm(x, None, w_ih, w_hh, candidate_dropout=0.4, training=True, seed=6)
    first = happens(seed, Mask.CANDIDATE_DROPOUT, 0, torch.tensor([0]), rows, units, 0.4)
    second = happens(seed, Mask.CANDIDATE_DROPOUT, 0, torch.tensor([1]), rows, units, 0.4)
    assert torch.equal(thinned[0] == 0, first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("watch", ["double backward", "func", "vmap", "jvp"])
def test_derivatives_and_transforms(watch: str) -> None:
    options = {name: value for name, value in ALL.items() if name != "weight_drop"}
    module, x = lstm(**options), torch.randn(2, 1, 3, dtype=torch.float64)

    def run(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(7)
        return module(x)[0]

    with lstm_ext.use_backend("numpy"):
        if watch == "double backward":
            assert torch.autograd.gradgradcheck(run, x.requires_grad_())
        elif watch == "func":
            gradient = torch.func.grad(lambda x: run(x).square().sum())(x)
            (expected,) = torch.autograd.grad(run(x.requires_grad_()).square().sum(), x)
            torch.testing.assert_close(gradient, expected)
        elif watch == "vmap":
            xs = torch.randn(4, 2, 1, 3, dtype=torch.float64)
            actual = torch.vmap(run, randomness="same")(xs)
            torch.testing.assert_close(actual, torch.stack([run(each) for each in xs]))
        else:
            tangent, step = torch.randn_like(x), 1e-6
            _, actual = torch.func.jvp(run, (x,), (tangent,))
            differences = (run(x + step * tangent) - run(x - step * tangent)) / (2 * step)
            torch.testing.assert_close(actual, differences, rtol=1e-6, atol=1e-8)


def test_compiles_and_exports() -> None:
    module, x = lstm(num_layers=2, **ALL), torch.randn(4, 3, 3, dtype=torch.float64)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    results = []
    for run in (compiled, module):
        torch.manual_seed(8)
        y = run(x)[0]
        results.append((y, torch.autograd.grad(y.sum(), list(module.parameters()))))
    torch.testing.assert_close(*results)
    assert not torch.equal(compiled(x)[0], results[0][0])  # the seed is drawn in the graph
    assert counter.frame_count == 1
    module.eval()
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    longer = torch.randn(7, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(exported(longer)[0], module(longer)[0])


def test_outputs_may_be_changed_in_place() -> None:
    module, x = lstm(zoneout=0.3), torch.randn(4, 3, 3, dtype=torch.float64)
    gradients = []
    for change in (lambda y: y.mul_(2), lambda y: y * 2):
        torch.manual_seed(9)
        gradients.append(torch.autograd.grad(change(module(x)[0]).sum(), list(module.parameters())))
    torch.testing.assert_close(*gradients)


def test_torch_has_no_such_modules() -> None:
    model = torch.nn.ModuleList([lstm(peephole=True, coupled=True), lstm(unit_forget_bias=True)])
    with pytest.warns(UserWarning, match="to_torch leaves 0 alone: torch has no peephole, coupled"):
        lstm_ext.to_torch(model)
    assert [type(each) for each in model] == [lstm_ext.LSTM, torch.nn.LSTM]
    with pytest.raises(NotImplementedError, match="peephole, coupled: expected none of them"):
        torch.jit.script(model[0])


def test_numpys_generator_draws_for_arrays() -> None:
    x, w_ih, w_hh = np.ones((5, 2, 3)), np.ones((16, 3)), np.ones((16, 4))

    def run(**options: Any) -> np.ndarray:
        return lstm_ext.lstm(x, None, w_ih, w_hh, candidate_dropout=0.5, training=True, **options)[0]

    np.random.seed(1)  # noqa: NPY002
    first = run()
    np.random.seed(1)  # noqa: NPY002
    np.testing.assert_array_equal(run(), first)
    assert (run(seed=1) == run(seed=np.array([1]))).all()
    assert not (run(seed=1) == run(seed=2)).all()
    tensors = map(torch.from_numpy, (x, w_ih, w_hh))
    x_t, *weights = tensors
    same = lstm_ext.lstm(x_t, None, *weights, candidate_dropout=0.5, training=True, seed=1)[0]
    np.testing.assert_allclose(same.numpy(), run(seed=1))


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "activation": ({"activation": "swish"}, ValueError, "activation: expected one of tanh, .*linear.*, got 'swish'"),
    "parameters": ({"activation": ("tanh", 1.0)}, ValueError, "activation: expected at most 0 parameters of tanh"),
    "slope": ({"recurrent_activation": ("leaky_relu", -1)}, ValueError, "recurrent_activation: expected alpha of 0 or"),
    "forget_bias": ({"forget_bias": None}, ValueError, "forget_bias: expected a finite number, got None"),
    "cell_clip": ({"cell_clip": 0}, ValueError, "cell_clip: expected None or a number above 0, got 0"),
    "proj_clip": ({"proj_clip": -1.0, "proj_size": 2}, ValueError, "proj_clip: expected None or a number above 0"),
    "no projection": ({"proj_clip": 1.0}, ValueError, r"proj_clip: expected None without a projection \(proj_size"),
    "zoneout": ({"zoneout": 1.5}, ValueError, "zoneout: expected a probability from 0 to 1, got 1.5"),
    "three": ({"zoneout": (0.1, 0.2, 0.3)}, ValueError, "zoneout: expected a probability or a pair"),
    "array": ({"zoneout": np.full(3, 0.1)}, ValueError, "zoneout: expected a probability or a pair"),
    "recurrent": ({"recurrent_dropout": -0.1}, ValueError, "recurrent_dropout: expected a probability from 0 to 1"),
    "candidate": ({"candidate_dropout": float("nan")}, ValueError, "candidate_dropout: expected a finite number"),
    "weight_drop": ({"weight_drop": 2}, ValueError, "weight_drop: expected a probability from 0 to 1, got 2"),
    "unit bias": ({"unit_forget_bias": True, "bias": False}, ValueError, "unit_forget_bias, bias: expected biases"),
    "peephole": ({"peephole": 1}, ValueError, "peephole: expected a bool, got 1"),
    "unknown": ({"peepholes": True}, TypeError, "LSTM: expected .* or of activation, .*, got peepholes"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_options_are_named(name: str) -> None:
    options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        lstm(**options)


def test_options_are_numbers_of_numpy_too() -> None:
    given: dict[str, Any] = {"cell_clip": np.float32(2), "forget_bias": np.int64(1), "coupled": np.True_}
    given["zoneout"] = np.array([0.25, 0.5])
    assert repr(lstm(**given)) == repr(lstm(cell_clip=2.0, forget_bias=1, coupled=True, zoneout=[0.25, 0.5]))


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_a_seed_is_an_integer(backend: str) -> None:
    own: Any = np.asarray if backend == "numpy" else torch.from_numpy
    arrays = own(np.ones((5, 2, 3))), None, own(np.ones((16, 3))), own(np.ones((16, 4)))

    def run(seed: Any) -> Any:
        return lstm_ext.lstm(*arrays, zoneout=0.5, training=True, seed=seed)[0]

    for same in (np.int32(7), np.array(7), own(np.array([7]))):
        np.testing.assert_array_equal(run(same), run(7))
    for wrong in (1.5, "7", True, (1, 2), own(np.array([1, 2])), own(np.array([1.0])), np.array(2**63)):
        with pytest.raises(TypeError, match=r"seed: expected an integer, or int64 \[1\], got "):
            run(wrong)
    with pytest.raises(ValueError, match="seed: expected an integer of 64 bits, got 9223372036854775808"):
        run(2**63)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_wrong_weights_are_named(backend: str) -> None:
    own: Any = np.asarray if backend == "numpy" else torch.from_numpy
    arrays = own(np.ones((5, 2, 3))), None, own(np.ones((16, 3))), own(np.ones((16, 4)))
    norms = [own(np.ones(shape)) for shape in ((2, 16), (4,), (4,))]
    for options, message in (
        ({"peephole": own(np.ones((4, 3)))}, r"peephole: expected shape \[3, H\] = \[3, 4\], got \[4, 3\]: transposed"),
        ({"peephole": own(np.ones((3, 4), np.float32))}, "peephole: expected dtype float64 as x has, got float32"),
        ({"layer_norm": [norms[0][0], *norms[1:]]}, r"gamma: expected shape \[2, 4\*H\] = \[2, 16\], got \[16\]"),
        ({"layer_norm": [*norms[:2], norms[0]]}, r"beta_h: expected shape \[H\] = \[4\], got \[2, 16\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            lstm_ext.lstm(*arrays, **options)
    with pytest.raises(TypeError, match=r"layer_norm: expected the arrays \(gamma, gamma_h, beta_h\), got "):
        lstm_ext.lstm(*arrays, layer_norm=norms[:2])
    with pytest.raises(TypeError, match="peephole: expected a "):
        lstm_ext.lstm(*arrays, peephole=[1.0])
    with pytest.raises(TypeError, match=r"lstm: expected the options activation, .*, got clip"):
        lstm_ext.lstm(*arrays, clip=1.0)

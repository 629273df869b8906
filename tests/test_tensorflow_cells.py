"""TensorFlow 1's cells and `dynamic_rnn`: its recorded numbers, its source in torch's operations, and bad input."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import lstm_ext
from lstm_ext import convert, nn
from lstm_ext.cell import ACTIVATIONS
from lstm_ext.walk import sigmoid

T, B, I, U = 5, 4, 3, 6  # noqa: E741
DOUBLE: dict[str, Any] = {"dtype": torch.float64, "input_size": I}

CELLS: dict[str, Callable[..., Any]] = {
    "basic": lambda **options: lstm_ext.BasicLSTMCell(U, **DOUBLE, **options),
    "forget bias": lambda **options: lstm_ext.BasicLSTMCell(U, forget_bias=0.3, **DOUBLE, **options),
    "layer norm": lambda **options: lstm_ext.LayerNormBasicLSTMCell(U, norm_gain=0.9, **DOUBLE, **options),
    "no norm": lambda **options: lstm_ext.LayerNormBasicLSTMCell(U, layer_norm=False, **DOUBLE, **options),
}


def filled(cell: Any) -> Any:
    """With parameters that are no constants."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in cell.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return cell


def sequence(rows: int = B) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(rows, T, I, dtype=torch.float64)


def walked(cell: Any, x: torch.Tensor, state: Any, lengths: list[int] | None = None) -> tuple[torch.Tensor, list[Any]]:
    """Each row [T, I] alone, as long as it is: the outputs [B, T, U] and the states."""
    rows, states = [], []
    for b, row in enumerate(x):
        own = None if state is None else [a[b : b + 1] for a in state]
        outputs = []
        for step in row[: None if lengths is None else lengths[b]]:
            h, own = cell(step[None], own)
            outputs.append(h[0])
        zeros = [x.new_zeros(U)] * (T - len(outputs))
        rows.append(torch.stack([*outputs, *zeros]))
        states.append(own)
    return torch.stack(rows), states


@pytest.mark.parametrize("given", ["nothing", "lengths", "state", "time major"])
@pytest.mark.parametrize("name", CELLS)
def test_dynamic_rnn_is_the_loop_over_steps(name: str, given: str) -> None:
    cell, x = filled(CELLS[name]()), sequence()
    lengths = [5, 1, 3, 2] if given == "lengths" else None
    state = tuple(torch.randn(2, B, U, dtype=torch.float64)) if given in ("state", "time major") else None
    major = given == "time major"
    outputs, (c, h) = lstm_ext.dynamic_rnn(cell, x.transpose(0, 1) if major else x, lengths, state, major)
    expected, states = walked(cell, x, state, lengths)
    torch.testing.assert_close(outputs.transpose(0, 1) if major else outputs, expected)
    torch.testing.assert_close((c, h), tuple(torch.cat(a) for a in zip(*states, strict=True)))


@pytest.mark.parametrize(
    ("name", "activation"), [*(("basic", each) for each in ACTIVATIONS), *((name, None) for name in CELLS)]
)
def test_kernels_compute_what_torchs_operations_do(name: str, activation: str | None) -> None:
    """With a callable, the steps run in torch's operations, as TensorFlow's source has them."""
    cell, x = filled(CELLS[name](activation=activation)), sequence()
    functions = {"linear": lambda a: a, "hard_sigmoid": F.hardsigmoid, "leaky_relu": F.leaky_relu, "elu": F.elu}
    functions |= {"softsign": F.softsign, "softplus": F.softplus}
    function: Any = functions.get(activation or "tanh") or getattr(torch, activation or "tanh")
    same = CELLS[name](activation=lambda a: function(a))
    same.load_state_dict(cell.state_dict())
    results = []
    for each in (cell, same):
        outputs, state = lstm_ext.dynamic_rnn(each, x, [5, 0, 3, 2])
        h, (c, _) = each(x[:, 0], state)
        loss = outputs.square().sum() + (h * c).sum()
        results.append((outputs, h, c, *torch.autograd.grad(loss, list(each.parameters()))))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("layer_norm", [True, False])
def test_weights_come_from_tensorflows_variables(layer_norm: bool) -> None:
    """Each gate by its name there: the formula of its rnn_cell.py, in NumPy."""
    rng = np.random.default_rng(3)
    gates = ("input", "transform", "forget", "output")  # of the kernel's columns
    names = [f"{gate}/{kind}" for gate in (*gates, "state") for kind in ("gamma", "beta")] if layer_norm else []
    variables = {"kernel": rng.standard_normal((I + U, 4 * U))} | {name: rng.standard_normal(U) for name in names}
    variables |= {} if layer_norm else {"bias": rng.standard_normal(4 * U)}
    cell = lstm_ext.LayerNormBasicLSTMCell(U, layer_norm=layer_norm, input_size=I, dtype=torch.float64)
    own = convert.from_tensorflow_layer_norm(variables)
    cell.load_state_dict({name: torch.from_numpy(a) for name, a in own.items()})
    back = convert.to_tensorflow_layer_norm(cell.state_dict())
    assert back.keys() == variables.keys()
    for name, a in variables.items():
        np.testing.assert_array_equal(back[name], a, err_msg=name)

    def norm(a: np.ndarray, name: str) -> np.ndarray:
        if not layer_norm:
            return a
        centred = a - a.mean(1, keepdims=True)
        scaled = centred / np.sqrt(a.var(1, keepdims=True) + 1e-12)
        return scaled * variables[f"{name}/gamma"] + variables[f"{name}/beta"]

    x, c, h = rng.standard_normal((3, I)), rng.standard_normal((3, U)), rng.standard_normal((3, U))
    sums = np.concatenate([x, h], 1) @ variables["kernel"] + variables.get("bias", 0.0)
    i, j, f, o = (norm(a, name) for a, name in zip(np.split(sums, 4, 1), gates, strict=True))
    new_c = norm(c * sigmoid(f + 1) + sigmoid(i) * np.tanh(j), "state")
    y, state = cell(torch.from_numpy(x), (torch.from_numpy(c), torch.from_numpy(h)))
    np.testing.assert_allclose(state.c.detach(), new_c, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(y.detach(), np.tanh(new_c) * sigmoid(o), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"kernel: expected shape \[I\+U, 4U\] with U = "):
        convert.from_tensorflow_layer_norm(variables | {"kernel": variables["kernel"][: U - 1]})
    with pytest.raises(ValueError, match="unknown peephole"):
        convert.to_tensorflow_layer_norm(cell.state_dict() | {"peephole": torch.ones(3)})


def test_numbers_that_tensorflow_recorded() -> None:
    """Of its rnn_cell_test.py: two layers, all that is drawn being 0.5; and one layer of another input width."""

    def cell(layer_norm: bool, width: int) -> Any:
        made = lstm_ext.LayerNormBasicLSTMCell(2, layer_norm=layer_norm, input_size=width)
        torch.nn.init.constant_(made.kernel, 0.5)
        if not layer_norm:
            torch.nn.init.constant_(made.bias, 0.5)
        return made

    state = tuple((torch.tensor([[n, n + 1.0]]) / 10, torch.tensor([[n + 2.0, n + 3.0]]) / 10) for n in (0, 4))
    h, states = lstm_ext.MultiRNNCell([cell(True, 2), cell(True, 2)])(torch.ones(1, 2), state)
    for a, expected in ((h, 0.38079708), (states[0].c, 1.0), (states[0].h, 0.38079708), (states[1].c, 1.0)):
        torch.testing.assert_close(a, torch.tensor([[-expected, expected]]), rtol=1e-5, atol=1e-5)
    h, states = lstm_ext.MultiRNNCell([cell(False, 2), cell(False, 2)])(torch.ones(1, 2), state)
    found = [h, states[0].c, states[0].h, states[1].c, states[1].h]
    expected = [
        [[0.70230919, 0.72581059]],
        [[0.8020075, 0.89599884]],
        [[0.56668288, 0.60858738]],
        [[1.17500675, 1.26892978]],
        [[0.70230919, 0.72581059]],
    ]
    torch.testing.assert_close([a.tolist() for a in found], expected, rtol=1e-5, atol=1e-5)
    h, (c, _) = cell(False, 3)(torch.ones(1, 3), state[0])
    torch.testing.assert_close(h.tolist(), [[0.64121795, 0.68166804]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(c.tolist(), [[0.88477188, 0.98103917]], rtol=1e-5, atol=1e-5)


def test_cells_are_stacked() -> None:
    below = filled(lstm_ext.BasicLSTMCell(4, **DOUBLE))
    above = filled(lstm_ext.LayerNormBasicLSTMCell(U, input_size=4, dtype=torch.float64))
    cells, x, lengths = lstm_ext.MultiRNNCell([below, above]), sequence(), [5, 0, 3, 2]
    outputs, states = lstm_ext.dynamic_rnn(cells, x, lengths)
    assert cells.output_size == U
    assert cells.state_size == ((4, 4), (U, U))
    same, same_states = lstm_ext.dynamic_rnn([below, above], x, lengths, cells.zero_state(B))
    torch.testing.assert_close((same, same_states), (outputs, states))
    middle, first = lstm_ext.dynamic_rnn(below, x, lengths)
    torch.testing.assert_close(
        (outputs, states), ((top := lstm_ext.dynamic_rnn(above, middle, lengths))[0], (first, top[1]))
    )
    h, after = cells(x[:, 0], states)
    h_below, after_below = below(x[:, 0], states[0])
    torch.testing.assert_close((h, after[0]), (above(h_below, states[1])[0], after_below))


def test_dropout_leaves_a_share_in_training() -> None:
    cell, x = filled(CELLS["no norm"](dropout_keep_prob=0.6)), sequence(500)[:, :1]
    outputs = [lstm_ext.dynamic_rnn(cell, x)[0] for _ in range(2)]
    assert not torch.equal(*outputs)
    kept = (outputs[0] != 0).double().mean()
    assert abs(kept - 0.6) < 0.03
    torch.manual_seed(3)
    first = cell(x[:, 0])[0]
    torch.manual_seed(3)
    assert torch.equal(cell(x[:, 0])[0], first)
    cell.eval()
    assert (lstm_ext.dynamic_rnn(cell, x)[0] != 0).all()
    same = CELLS["no norm"](dropout_keep_prob=0.6, activation=torch.tanh).train()
    same.load_state_dict(cell.state_dict())
    assert abs((same(x[:, 0])[0] != 0).double().mean() - 0.6) < 0.03


@pytest.mark.parametrize("name", CELLS)
def test_transforms_compilers_and_pickles(name: str) -> None:
    cell, x = filled(CELLS[name]()), sequence()
    expected, (c, h) = lstm_ext.dynamic_rnn(cell, x)
    mapped = torch.vmap(lambda row: lstm_ext.dynamic_rnn(cell, row[None])[0][0])(x)
    torch.testing.assert_close(mapped, expected)
    c, h = c.detach(), h.detach()
    (gradient,) = torch.autograd.grad(expected.sum(), cell.kernel)
    by_func = torch.func.grad(
        lambda kernel: torch.func.functional_call(cell, {"kernel": kernel}, (x[:, 0], (c, h)))[0].sum()
    )(cell.kernel)
    torch.testing.assert_close(by_func, torch.autograd.grad(cell(x[:, 0], (c, h))[0].sum(), cell.kernel)[0])
    compiled = torch.compile(lambda x: lstm_ext.dynamic_rnn(cell, x)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), cell.kernel)[0], gradient)
    program = torch.export.export(cell, (x[:, 0],)).module()
    torch.testing.assert_close(program(x[:, 0])[0], cell(x[:, 0])[0])
    restored = pickle.loads(pickle.dumps(cell))
    torch.testing.assert_close(restored(x[:, 0]), cell(x[:, 0]))
    cell.forget_bias = 2.5  # counts from the next step on
    assert not torch.allclose(restored(x[:, 0], (c, h))[0], cell(x[:, 0], (c, h))[0])


def test_fx_sees_leaves() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.below, self.above = CELLS["basic"](), lstm_ext.LayerNormBasicLSTMCell(U, input_size=U)

        def forward(self, x: Any) -> Any:
            h, state = self.below(x)
            h, state = self.below(x, state)
            return self.above(h)[0]

    model, x = Model().double(), sequence()[:, 0]
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["below", "below", "above"]
    assert torch.equal(graph(x), model(x))


def test_the_first_input_tells_the_width() -> None:
    cell = lstm_ext.LayerNormBasicLSTMCell(U)
    outputs, _ = lstm_ext.dynamic_rnn(cell, torch.randn(B, T, I))
    assert outputs.shape == (B, T, U)
    assert cell.kernel.shape == (I + U, 4 * U)
    assert str(cell) == f"LayerNormBasicLSTMCell({U}, input_size={I})"
    assert nn.BasicLSTMCell is lstm_ext.BasicLSTMCell  # where pickles of older versions have it


BAD: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "rank": (lambda c, x: lstm_ext.dynamic_rnn(c, x[0]), ValueError, r"inputs: expected shape \[B, T, I\]"),
    "no step": (lambda c, x: lstm_ext.dynamic_rnn(c, x[:, :0]), ValueError, "inputs: .* with at least one step"),
    "width": (
        lambda c, x: lstm_ext.dynamic_rnn(c, x[..., :2]),
        ValueError,
        r"input: expected shape \[B, I\] with I = 3",
    ),
    "dtype": (lambda c, x: lstm_ext.dynamic_rnn(c, x.float()), ValueError, "input: expected dtype torch.float64"),
    "lengths": (
        lambda c, x: lstm_ext.dynamic_rnn(c, x, [6, 1, 1, 1]),
        ValueError,
        "sequence_length: .* from 0 to T = 5",
    ),
    "count": (
        lambda c, x: lstm_ext.dynamic_rnn(c, x, [1]),
        ValueError,
        r"sequence_length: .*\[B\] = \[4\], got .*\[1\]",
    ),
    "floats": (lambda c, x: lstm_ext.dynamic_rnn(c, x, [1.0] * 4), ValueError, "sequence_length: expected integers"),
    "state": (lambda c, x: lstm_ext.dynamic_rnn(c, x, None, (x,) * 3), ValueError, "initial_state: expected the pair"),
    "sizes": (
        lambda c, x: lstm_ext.dynamic_rnn(c, x, None, (x[:, 0], x[:, 0])),
        ValueError,
        r"initial_state\.c: expected shape \[B, num_units\] = \[4, 6\], got \[4, 3\]",
    ),
    "cell": (lambda c, x: lstm_ext.dynamic_rnn(torch.nn.LSTMCell(3, 6), x), TypeError, "cell: .*, got LSTMCell"),
    "none": (lambda c, x: lstm_ext.dynamic_rnn([], x), ValueError, "cells: expected at least one cell"),
    "states": (
        lambda c, x: lstm_ext.dynamic_rnn([c], x, None, ()),
        ValueError,
        "initial_state: .* 1 cells, got 0 items",
    ),
    "length": (lambda c, x: lstm_ext.dynamic_rnn(c, x, "ab"), ValueError, "sequence_length: .*, got 'ab'"),
    "units": (lambda c, x: lstm_ext.BasicLSTMCell(2.5), TypeError, "num_units: expected an integer, got 2.5"),
    "no units": (lambda c, x: lstm_ext.BasicLSTMCell(None), TypeError, "num_units: expected an integer, got None"),
    "bias": (lambda c, x: lstm_ext.BasicLSTMCell(U, forget_bias="a"), ValueError, "forget_bias: expected a finite"),
    "activation": (lambda c, x: lstm_ext.BasicLSTMCell(U, activation=["tanh"]), ValueError, "activation: expected a"),
    "keep": (
        lambda c, x: lstm_ext.LayerNormBasicLSTMCell(U, dropout_keep_prob=1.2),
        ValueError,
        "dropout_keep_prob: expected a probability from 0 to 1, got 1.2",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call(CELLS["basic"](), sequence())


@pytest.mark.parametrize("assign", [False, True])
def test_normalised_cells_come_from_the_meta_device(assign: bool) -> None:
    """Nothing that no `state_dict` has is left to what memory held."""
    source, x = lstm_ext.LayerNormBasicLSTMCell(4, input_size=3).eval(), torch.randn(2, 3)
    with torch.device("meta"):
        cell = lstm_ext.LayerNormBasicLSTMCell(4, input_size=3).eval()
    if not assign:
        cell.to_empty(device="cpu")
    cell.load_state_dict(source.state_dict(), assign=assign)
    assert not list(cell.buffers())
    torch.testing.assert_close(cell(x)[0], source(x)[0])


class Doubled(lstm_ext.BasicLSTMCell):
    def forward(self, input: Any, state: Any = None) -> Any:
        output, state = super().forward(input, state)
        return 2 * output, state


class Residual(lstm_ext.MultiRNNCell):
    def forward(self, input: Any, state: Any = None) -> Any:
        output, state = super().forward(input, state)
        return output + input, state


def hooked(kind: str) -> Any:
    cell = lstm_ext.BasicLSTMCell(U)  # its kernel is made by the first call
    if kind == "hook":
        cell.register_forward_hook(lambda _, __, out: (out[0] + 1, out[1]))
    elif kind == "pre-hook":
        cell.register_forward_pre_hook(lambda _, given: (3 * given[0], *given[1:]))
    elif kind == "subclass":
        cell = Doubled(U)
    elif kind == "stack":
        return Residual([lstm_ext.BasicLSTMCell(U), lstm_ext.BasicLSTMCell(3)])
    elif kind == "normalised":
        cell = lstm_ext.LayerNormBasicLSTMCell(U)
        cell.register_forward_hook(lambda _, __, out: (out[0] + 1, out[1]))
    elif kind == "weight norm":
        cell = lstm_ext.BasicLSTMCell(U, input_size=3)
        torch.nn.utils.weight_norm(cell, "kernel")
    return cell


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", ["plain", "hook", "pre-hook", "subclass", "stack", "normalised", "weight norm"])
def test_a_cell_that_does_more_is_called_at_each_step(kind: str) -> None:
    cell, x = hooked(kind), sequence().float()
    outputs, last = lstm_ext.dynamic_rnn(cell, x, [x.shape[1], 2, 0, 1])
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter *= 0.9
    outputs, last = lstm_ext.dynamic_rnn(cell, x, [x.shape[1], 2, 0, 1])
    state, expected = None, []
    for step in x.unbind(1):
        output, state = cell(step, state)
        expected.append(output)
    torch.testing.assert_close(outputs[0], torch.stack(expected, 1)[0])
    torch.testing.assert_close(outputs[1, :2], torch.stack(expected, 1)[1, :2])
    assert not outputs[1, 2:].any()
    assert not outputs[2].any()
    final, kept = (last[0], state[0]) if kind == "stack" else (last, state)
    torch.testing.assert_close(final.h[0], kept.h[0])
    assert not final.h[2].any()


def test_hooks_of_the_backward_pass_are_called_at_each_step() -> None:
    cell, seen = lstm_ext.BasicLSTMCell(U, input_size=I), []
    cell.register_full_backward_hook(lambda *_: seen.append(1))
    lstm_ext.dynamic_rnn(cell, sequence().float())[0].sum().backward()
    assert len(seen) == T


def test_a_changed_stack_starts_with_zeros_where_it_has_no_state() -> None:
    stack, x = hooked("stack"), sequence().float()
    state = torch.ones(B, 3), torch.ones(B, 3)
    expected = lstm_ext.dynamic_rnn(stack, x, None, (stack.cells[0].zero_state(B), state))
    for lengths in (None, [T] * B):
        outputs, last = lstm_ext.dynamic_rnn(stack, x, lengths, (None, state))
        torch.testing.assert_close((outputs, last[1].c), (expected[0], expected[1][1].c))


def test_a_cell_whose_kernel_a_sequence_made_is_frozen() -> None:
    cell, x = lstm_ext.BasicLSTMCell(U), sequence().float()
    lstm_ext.dynamic_rnn(cell, x)
    torch.testing.assert_close(lstm_ext.freeze(cell)(x[:, 0])[0], cell(x[:, 0])[0])


def test_fx_has_no_width_for_a_lazy_cell() -> None:
    with pytest.raises(TypeError, match=r"input_size: expected the width of x for torch\.fx"):
        torch.fx.symbolic_trace(torch.nn.Sequential(lstm_ext.BasicLSTMCell(U)))

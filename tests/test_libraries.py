"""Other people's libraries with a model of theirs or ours before and after `replace_lstm`: they notice nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lstm_ext
import lstm_ext.swap

from .drop_in import assert_same, tensors

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries
EXTRA = "needs {} (extra `ecosystem`)"
X = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))


def library(name: str) -> Any:
    return pytest.importorskip(name, reason=EXTRA.format(name))


def stays(model: Any) -> Any:
    return model


def before_and_after(run: Callable[[Callable[[Any], Any]], Any]) -> tuple[Any, Any]:
    """What `run` makes of models that it passes through its argument: nothing, and `replace_lstm`."""
    results = []
    for swap in (stays, lstm_ext.replace_lstm):
        torch.manual_seed(0)
        results.append(run(swap))
    return results[0], results[1]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 8, 2, batch_first=True), nn.Linear(8, 1)

    def forward(self, x: Any) -> Any:
        return self.head(self.lstm(x)[0][:, -1])


def test_skorch_trains() -> None:
    skorch = library("skorch")

    def losses(swap: Callable[[Any], Any]) -> Any:
        net = skorch.NeuralNetRegressor(swap(Net()), max_epochs=3, lr=0.1, train_split=None, verbose=0)
        net.fit(X.numpy(), X[:, :1, 0].numpy())
        return net.history[:, "train_loss"]

    stock, ours = before_and_after(losses)
    np.testing.assert_allclose(ours, stock, rtol=1e-5)


def test_torchinfo_shows_the_same_table() -> None:
    torchinfo = library("torchinfo")
    stock, ours = before_and_after(lambda swap: str(torchinfo.summary(swap(Net()), input_data=X, verbose=0)))
    assert ours == stock


def test_captum_attributes() -> None:
    attr = library("captum.attr")
    stock, ours = before_and_after(lambda swap: attr.IntegratedGradients(swap(Net())).attribute(X))
    assert_same([ours.float()], [stock.float()])


def test_torchrl_resets_inside_a_row() -> None:
    """It asks `isinstance(lstm, nn.LSTM)`."""
    modules, tensordict = library("torchrl.modules"), library("tensordict")
    is_init = torch.zeros(4, 6, 1, dtype=torch.bool)
    is_init[0, 3] = True
    zeros = torch.zeros(4, 6, 1, 5)

    def features(swap: Callable[[Any], Any]) -> Any:
        keys = {"in_keys": ["x", "h", "c"], "out_keys": ["y", ("next", "h"), ("next", "c")]}
        module = swap(modules.LSTMModule(input_size=3, hidden_size=5, **keys))
        with modules.set_recurrent_mode(True):
            return module(tensordict.TensorDict({"x": X, "is_init": is_init, "h": zeros, "c": zeros}, [4, 6]))["y"]

    stock, ours = before_and_after(features)
    assert_same([ours], [stock])


@pytest.mark.parametrize("form", ["as_jit", "as_onnx"])
def test_rsl_rl_exports_its_policies(form: str) -> None:
    models, tensordict = library("rsl_rl.models"), library("tensordict")
    observed = tensordict.TensorDict({"policy": X[:, 0]}, [4])

    def actions(swap: Callable[[Any], Any]) -> Any:
        model = swap(models.RNNModel(observed, {"actor": ["policy"]}, "actor", 2, hidden_dims=(8,), rnn_hidden_dim=8))
        exported = model.as_jit() if form == "as_jit" else model.as_onnx(verbose=False)
        if form == "as_onnx":
            return tensors(exported(X[:1, 0], *(torch.zeros(1, 1, 8),) * 2))
        return tensors(torch.jit.script(exported)(X[:1, 0]))

    stock, ours = before_and_after(actions)
    assert_same(ours, stock)


def test_sb3_contrib_learns() -> None:
    contrib = library("sb3_contrib")

    def learn(swap: Callable[[Any], Any]) -> list[Any]:
        policy = {"lstm_hidden_size": 16}
        options = {"seed": 0, "n_steps": 32, "batch_size": 16, "n_epochs": 1, "device": "cpu"}
        agent = contrib.RecurrentPPO("MlpLstmPolicy", "CartPole-v1", policy_kwargs=policy, **options)
        swap(agent.policy)
        agent.learn(64)
        action, state = agent.predict(np.zeros((1, 4), np.float32))
        return [torch.from_numpy(np.asarray(a)) for a in (action, *state)]

    stock, ours = before_and_after(learn)
    assert torch.equal(ours[0], stock[0])
    torch.testing.assert_close(ours[1:], stock[1:], rtol=1e-4, atol=1e-5)  # after 8 steps of training


def test_counters_by_type_take_our_classes() -> None:
    """They look classes up by exact type; the README says what to pass."""
    thop = library("thop")
    count = library("thop.rnn_hooks").count_lstm
    ours = {lstm_ext.LSTM: count, lstm_ext.swap.LSTM: count}
    stock, counted = before_and_after(lambda swap: thop.profile(swap(Net()), (X,), custom_ops=ours, verbose=False))
    assert counted == stock

    ptflops, hook = library("ptflops"), library("ptflops.pytorch_ops").rnn_flops_counter_hook
    options = {"as_strings": False, "print_per_layer_stat": False, "verbose": False, "backend": "pytorch"}
    hooks = {lstm_ext.LSTM: hook, lstm_ext.swap.LSTM: hook}
    stock, counted = before_and_after(
        lambda swap: ptflops.get_model_complexity_info(swap(Net()), (6, 3), custom_modules_hooks=hooks, **options)
    )
    assert counted == stock


def test_fvcore_counts_what_it_counts_in_torchs() -> None:
    fvcore = library("fvcore.nn")
    stock, ours = before_and_after(lambda swap: fvcore.FlopCountAnalysis(swap(Net()), X).total())
    assert ours == stock


def test_opacus_refuses_before_and_fixes_after_the_way_back() -> None:
    """Its validator looks at the exact type: `to_torch` comes first."""
    validators = library("opacus.validators")
    model = lstm_ext.replace_lstm(Net())
    assert not validators.ModuleValidator.is_valid(lstm_ext.to_torch(model))
    assert type(validators.ModuleValidator.fix(model).lstm).__name__ == "DPLSTM"


def test_dynamic_quantisation_after_the_way_back() -> None:
    model = lstm_ext.to_torch(lstm_ext.replace_lstm(Net()).eval())
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM}, dtype=torch.qint8)
    assert isinstance(quantised.lstm, torch.ao.nn.quantized.dynamic.LSTM)
    torch.testing.assert_close(quantised(X), model(X), rtol=0.1, atol=0.05)  # of 8-bit weights

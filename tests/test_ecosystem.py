"""What stands around a module in training: autocast, checkpointing, saved-tensor hooks, Lightning, Hugging Face."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lstm_ext
from lstm_ext.testing import assert_close

from .drop_in import TERMS, B, H, I, T, assert_same, pair, run, tensors

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


# autocast ------------------------------------------------------------------------------------------------------------

# What of torch's autocast depends on: whether oneDNN's LSTM or torch's own cell computes inside of it.
AUTOCAST_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two layers, both directions": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "no bias": {"bias": False},
    "projection": {"proj_size": 3, "num_layers": 2},
    "packed": {},
    "packed, of one length": {"num_layers": 2},
    "packed projection": {"proj_size": 3},
    "empty batch": {},
    "unbatched": {},
}


# On the GPU all becomes autocast's dtype but float64, which it leaves out.
ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
DTYPES = {"cpu": [F32, BF16, F64], "cuda": [F32, BF16, F16]}


def autocast_input(name: str, dtype: Any) -> Any:
    if name.startswith("packed"):
        return pack_sequence([torch.randn(n, I).to(dtype) for n in ((4, 4, 4) if "one length" in name else (4, 3, 1))])
    return torch.randn({"empty batch": (T, 0, I), "unbatched": (T, I)}.get(name, (3, 3, I))).to(dtype)


def autocast_state(name: str, options: dict[str, Any], dtypes: tuple[Any, Any]) -> tuple[Any, Any]:
    layers = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    batch = {"empty batch": (0,), "unbatched": ()}.get(name, (3,))
    widths = options.get("proj_size") or H, H
    h, c = (torch.randn(layers, *batch, width).to(d) for width, d in zip(widths, dtypes, strict=True))
    return h, c


def under_autocast(module: Any, args: tuple[Any, ...], dtype: Any = BF16) -> list[Any]:
    """Outputs, and the gradients of all parameters; the backward pass is run outside, as torch's guide has it."""
    module.zero_grad()
    with torch.autocast(next(module.parameters()).device.type, dtype):
        outputs = [t for t in tensors(module(*args)) if t.is_floating_point()]
    sum(t.float().square().sum() for t in outputs).backward()
    return [*outputs, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize("width", [0, 1, 2])
@pytest.mark.parametrize("name", AUTOCAST_OPTIONS)
def test_autocast_returns_the_dtypes_of_stock(name: str, width: int, device: str) -> None:
    """For inputs and states of any dtypes that stock takes; float16 it takes on some CPUs only."""
    options = AUTOCAST_OPTIONS[name]
    stock, ours = pair(I, H, dtype=DTYPES[device][width], device=device, **options)
    states = [None, *itertools.product(DTYPES[device], repeat=2)]
    seen = 0
    for x_dtype, dtypes in itertools.product(DTYPES[device], states):
        args: tuple[Any, ...] = (autocast_input(name, x_dtype).to(device),)
        if dtypes is not None:
            args += (tuple(s.to(device) for s in autocast_state(name, options, dtypes)),)
        try:
            expected = under_autocast(stock, args)
        except RuntimeError:  # float64 with others
            continue
        assert [a.dtype for a in under_autocast(ours, args)] == [e.dtype for e in expected], (x_dtype, dtypes)
        seen += 1
    assert seen >= 2


@pytest.mark.filterwarnings("ignore:lstm_ext runs torch's own LSTM cell")
@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize("width", [0, 1, 2])
def test_autocast_returns_the_dtypes_of_stock_from_a_cell(width: int, device: str) -> None:
    stock, ours = pair(I, H, cell=True, dtype=DTYPES[device][width], device=device)
    states = [None, *itertools.product(DTYPES[device], repeat=2)]
    seen = 0
    for x_dtype, dtypes in itertools.product(DTYPES[device], states):
        args: tuple[Any, ...] = (torch.randn(B, I).to(device, x_dtype),)
        if dtypes is not None:
            args += (tuple(torch.randn(B, H).to(device, d) for d in dtypes),)
        try:
            expected = under_autocast(stock, args)
        except RuntimeError:
            with pytest.raises(RuntimeError, match="dtype"):
                under_autocast(ours, args)
            continue
        assert [a.dtype for a in under_autocast(ours, args)] == [e.dtype for e in expected], (x_dtype, dtypes)
        seen += 1
    assert seen >= 2


@pytest.mark.parametrize("name", ["plain", "packed", "empty batch", "unbatched"])
def test_autocast_is_as_near_to_exact_as_its_dtype(name: str) -> None:
    ours, exact = lstm_ext.LSTM(I, H, dtype=BF16).float(), nn.LSTM(I, H, dtype=F64)
    exact.load_state_dict(ours.state_dict())
    x = autocast_input(name, BF16)
    state = autocast_state(name, {}, (BF16, BF16))
    actual = under_autocast(ours, (x.float() if name != "packed" else x._replace(data=x.data.float()), state))
    doubles = x._replace(data=x.data.double()) if name == "packed" else x.double()
    outputs = tensors(exact(doubles, tuple(s.double() for s in state)))
    outputs = [t for t in outputs if t.is_floating_point()]
    gradients = torch.autograd.grad(sum(t.square().sum() for t in outputs), list(exact.parameters()))
    for a, e in zip(actual, [*outputs, *gradients], strict=True):
        assert_close(a, e, "bfloat16", terms=TERMS)


def test_autocast_nested_and_disabled() -> None:
    stock, ours = pair(I, H, 2)
    cell = lstm_ext.LSTMCell(I, H)
    x = torch.randn(T, B, I)
    plain, plain_cell = ours(x), cell(x[0])
    with torch.autocast("cpu", BF16):
        assert ours(x)[0].dtype == BF16
        with torch.autocast("cpu", enabled=False):
            for actual, expected in ((ours(x), plain), (cell(x[0]), plain_cell)):
                assert all(torch.equal(a, e) for a, e in zip(tensors(actual), tensors(expected), strict=True))
            for module in (stock, ours):
                with pytest.raises(ValueError, match="dtype"):
                    module(x.bfloat16())
            with torch.autocast("cpu", BF16):
                assert ours(x)[0].dtype == BF16
        with torch.autocast("cpu", F16):
            assert {a.dtype for a in tensors(ours(x))} == {F16}
    with torch.autocast("cpu", BF16, enabled=False):
        assert torch.equal(ours(x)[0], plain[0])


def test_autocast_of_another_device_changes_nothing() -> None:
    ours, x = lstm_ext.LSTM(I, H), torch.randn(T, B, I)
    expected = ours(x)[0]
    torch.set_autocast_enabled("cuda", True)
    try:
        assert torch.equal(ours(x)[0], expected)
        assert lstm_ext.LSTMCell(I, H)(x[0])[0].dtype == F32
    finally:
        torch.set_autocast_enabled("cuda", False)


def stock_runs_under_autocast() -> bool:
    """Not where oneDNN's LSTM has no bfloat16: without AVX-512."""
    with torch.autocast("cpu", BF16):
        try:
            nn.LSTM(I, H)(torch.randn(T, B, I))
        except RuntimeError as error:
            if "primitive descriptor" not in str(error):
                raise
            return False
    return True


def test_training_under_autocast_follows_stock() -> None:
    """From the same weights the losses fall alike, and the weights stay float32."""
    stock, ours = pair(I, H, 2, dropout=0.2)
    x, target = torch.randn(T, B, I), torch.randn(T, B, H).tanh()
    losses: list[list[float]] = []
    in_float32 = not stock_runs_under_autocast()  # it is followed nevertheless
    for module in (stock, ours):
        torch.manual_seed(1)
        optimizer = torch.optim.Adam(module.parameters(), 0.05)
        losses.append([])
        for _ in range(8):
            optimizer.zero_grad()
            with torch.autocast("cpu", BF16, enabled=not (in_float32 and module is stock)):
                loss = nn.functional.mse_loss(module(x)[0], target)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        assert {p.dtype for p in module.parameters()} == {F32}
    assert losses[1][-1] < 0.9 * losses[1][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0)


# Checkpointing and saved tensors -------------------------------------------------------------------------------------


def flat(module: Any) -> Callable[[Any], tuple[Any, ...]]:
    """The reentrant checkpoint differentiates tensors of a flat tuple only."""
    return lambda x: tuple(tensors(module(x)))


@contextmanager
def copied_to_numpy() -> Iterator[None]:
    def pack(t: Any) -> tuple[Any, ...]:
        return t.detach().to("cpu", F32, copy=True).numpy(), t.device, t.dtype  # NumPy has no bfloat16

    with saved_tensors_hooks(pack, lambda packed: torch.from_numpy(packed[0]).to(*packed[1:])):
        yield


def in_context(context: Callable[[], Any]) -> Callable[[Any], Callable[[Any], Any]]:
    def wrap(module: Any) -> Callable[[Any], Any]:
        def call(x: Any) -> Any:
            with context():
                return flat(module)(x)

        return call

    return wrap


def checkpoint_wrapped(module: Any, reentrant: bool) -> Any:
    wrapper = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    impl = wrapper.CheckpointImpl.REENTRANT if reentrant else wrapper.CheckpointImpl.NO_REENTRANT
    return wrapper.checkpoint_wrapper(Flat(module), checkpoint_impl=impl)


def offload_wrapped(module: Any) -> Any:
    wrapper = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    return wrapper.offload_wrapper(Flat(module))


class Flat(nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Any) -> tuple[Any, ...]:
        return tuple(tensors(self.module(x)))


MEMORY_SAVERS: dict[str, Callable[[Any], Callable[[Any], Any]]] = {
    "checkpoint": lambda m: lambda x: checkpoint(flat(m), x, use_reentrant=False),
    "reentrant checkpoint": lambda m: lambda x: checkpoint(flat(m), x, use_reentrant=True),
    "checkpoint_wrapper": lambda m: checkpoint_wrapped(m, reentrant=False),
    "reentrant checkpoint_wrapper": lambda m: checkpoint_wrapped(m, reentrant=True),
    "offload_wrapper": offload_wrapped,
    "save_on_cpu": in_context(save_on_cpu),
    "saved_tensors_hooks": in_context(copied_to_numpy),
}


def outputs_and_gradients(call: Callable[[Any], Any], parameters: list[Any], x: Any) -> list[Any]:
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    outputs = tensors(call(x))
    for parameter in parameters:
        parameter.grad = None
    sum(t.square().sum() for t in outputs).backward()
    drawn = torch.rand(3, device=x.device)  # shows the state of the generator
    return [*outputs, x.grad, *(p.grad for p in parameters), drawn]


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", MEMORY_SAVERS)
@pytest.mark.parametrize("cell", [False, True])
def test_memory_savers_change_no_bit(name: str, cell: bool, autocast: bool, device: str) -> None:
    """Nor does the recomputation draw other dropout masks, or leave the generator elsewhere."""
    if cell:
        module: Any = lstm_ext.LSTMCell(I, H, device=device)
        x = torch.randn(B, I, device=device)
    else:
        module = lstm_ext.LSTM(I, H, 3, dropout=0.4, bidirectional=True, device=device)
        x = torch.randn(T, B, I, device=device)
    parameters = list(module.parameters())
    with torch.autocast(device, BF16, enabled=autocast):
        expected = outputs_and_gradients(module, parameters, x)
        actual = outputs_and_gradients(MEMORY_SAVERS[name](module), parameters, x)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("cell", [False, True])
def test_all_that_is_saved_goes_through_the_hooks(cell: bool) -> None:
    """The gates and cells of every step: nothing is kept behind the back of who wants to move it."""
    module: Any = lstm_ext.LSTMCell(I, H) if cell else lstm_ext.LSTM(I, H)
    packed: list[Any] = []
    x = torch.randn(B, I) if cell else torch.randn(T, B, I)
    steps = B if cell else T * B
    with saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        outputs = tensors(module(x))
    sizes = [t.numel() for t in packed]
    assert 4 * H * steps in sizes
    assert sizes.count(H * steps) >= 1
    with saved_tensors_hooks(lambda t: t, torch.zeros_like):
        outputs = tensors(module(x))
    sum(t.sum() for t in outputs).backward()
    assert not any(p.grad.any() for p in module.parameters())


# Libraries that take any module --------------------------------------------------------------------------------------


def test_what_libraries_ask_of_a_module() -> None:
    lstm, cell = lstm_ext.LSTM(I, H, 2, bidirectional=True, proj_size=3), lstm_ext.LSTMCell(I, H)
    assert isinstance(lstm, nn.RNNBase)
    assert isinstance(cell, nn.RNNCellBase)
    assert lstm.mode == "LSTM"
    stock = nn.LSTM(I, H, 2, bidirectional=True, proj_size=3)
    assert [n for n, _ in lstm.named_parameters()] == [n for n, _ in stock.named_parameters()]
    for name, value in vars(stock).items():  # such as hidden_size, which wrappers read
        if isinstance(value, (int, float, str)):
            assert getattr(lstm, name) == value
    arguments = inspect.signature(lstm_ext.LSTM).parameters.values()  # skorch's module__hidden_size=7, LightningCLI
    assert [each.name for each in arguments if each.kind is not each.KEYWORD_ONLY] == [
        *("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size"),
        *("device", "dtype"),
    ]


def test_loops_that_initialise_by_name() -> None:
    results = []
    for module in pair(I, H, 2, bidirectional=True):
        torch.manual_seed(7)
        for name, parameter in module.named_parameters():
            if "weight_ih" in name:
                nn.init.xavier_uniform_(parameter)
            elif "weight_hh" in name:
                nn.init.orthogonal_(parameter.data)
            else:
                nn.init.zeros_(parameter)
                parameter.data[H : 2 * H].fill_(1)  # the forget gate
        results.append(module)
    x = torch.randn(T, B, I)
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in results), strict=True))
    assert_same(run(results[1], x), run(results[0], x))


class Tagger(nn.Module):
    """A model with a module used twice."""

    def __init__(self, cls: Any) -> None:
        super().__init__()
        self.encoder = cls(I, H, batch_first=True, bidirectional=True)
        self.refine = cls(2 * H, H, batch_first=True, bidirectional=True)
        self.again = self.refine
        self.head = nn.Linear(2 * H, 2)

    def forward(self, x: Any) -> Any:
        y = self.refine(self.encoder(x)[0])[0]
        return self.head(self.again(y)[0])


def taggers() -> tuple[Any, Any]:
    stock, ours = Tagger(nn.LSTM), Tagger(lstm_ext.LSTM)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def test_safetensors(tmp_path: Path) -> None:
    """A file goes to torch's modules and back, with tensors shared between two names."""
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors (extra `ecosystem`)")
    (stock, ours), x = taggers(), torch.randn(B, T, I)
    safetensors.save_model(ours, tmp_path / "ours.safetensors")
    for fresh in taggers():
        safetensors.load_model(fresh, tmp_path / "ours.safetensors", strict=True)
        assert fresh.again is fresh.refine
        assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), ours.parameters(), strict=True))
    assert_same([fresh(x)], [stock(x)])
    safetensors.save_file(ours.encoder.state_dict(), tmp_path / "encoder.safetensors")
    encoder = lstm_ext.LSTM(I, H, batch_first=True, bidirectional=True)
    encoder.load_state_dict(safetensors.load_file(tmp_path / "encoder.safetensors"))
    assert torch.equal(encoder(x)[0], ours.encoder(x)[0])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning(precision: str, tmp_path: Path) -> None:
    """Trains as stock does; the checkpoint loads into torch's modules."""
    lightning = pytest.importorskip("lightning", reason="needs lightning (extra `ecosystem`)")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, batch: Any, _: int) -> Any:
            loss = nn.functional.cross_entropy(self.model(batch[0]).flatten(0, 1), batch[1].flatten())
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 0.01)

    x = torch.randn(8, T, I)
    data = torch.utils.data.TensorDataset(x, (x.sum(-1) > 0).long())
    modules: list[Any] = []
    of_stock = precision if stock_runs_under_autocast() else "32-true"  # it is followed nevertheless
    for model in taggers():
        module = Module(model)
        trainer = lightning.Trainer(
            max_epochs=3,
            accelerator="cpu",
            precision=precision if modules else of_stock,
            gradient_clip_val=0.5,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
        modules.append(module)
    stock, ours = modules
    assert len(ours.losses) == 6
    torch.testing.assert_close(ours.losses, stock.losses, rtol=1e-5 if precision == "32-true" else 0.02, atol=0)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    stock.load_state_dict(saved, strict=True)
    assert_same([stock.model(x)], [ours.model(x)])


@pytest.fixture
def accelerate() -> Any:
    return pytest.importorskip("accelerate", reason="needs accelerate (extra `ecosystem`)")


def test_accelerate_trains(accelerate: Any) -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    x = torch.randn(8, T, I)
    losses: list[list[float]] = []
    for model in taggers():
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        if losses or stock_runs_under_autocast():  # else it is followed in float32
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        losses.append([])
        for (batch,) in loader:
            with accelerator.accumulate(model):
                loss = model(batch).float().square().mean()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses[-1].append(loss.item())
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0)


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match")  # `again` is `refine`
def test_accelerate_loads_large_models_in_pieces(accelerate: Any, tmp_path: Path) -> None:
    """Built without memory, then run with weights that come from the disk for each call."""
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors (extra `ecosystem`)")
    _, ours = taggers()
    x = torch.randn(B, T, I)
    safetensors.save_model(ours, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with accelerate.init_empty_weights():
        empty = Tagger(lstm_ext.LSTM)
    assert empty.encoder.weight_ih_l0.is_meta
    device_map = {"encoder": "disk", "refine": "cpu", "again": "cpu", "head": "cpu"}
    loaded = accelerate.load_checkpoint_and_dispatch(
        empty, str(tmp_path / "model.safetensors"), device_map, offload_folder=tmp_path / "offloaded"
    )
    with torch.no_grad():
        assert torch.equal(loaded(x), ours(x))
    assert loaded.encoder.weight_ih_l0.is_meta


# FLOPs and profiles --------------------------------------------------------------------------------------------------

COUNTED: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "projection": {"proj_size": 3},
    "both directions, batch first": {"bidirectional": True, "batch_first": True},
    "two layers, both directions": {"num_layers": 2, "bidirectional": True},
    "cell": {"cell": True},
    "packed": {},
    "packed, both directions": {"bidirectional": True},
}


def flops_of(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def counted_input(name: str) -> Any:
    if name.startswith("packed"):
        return pack_sequence([torch.randn(n, I, dtype=F64) for n in (4, 3, 1)])
    return torch.randn(*((B, I) if name == "cell" else (T, B, I)), dtype=F64)


@pytest.mark.parametrize("asking", ["nothing", "weights", "x", "state"])
@pytest.mark.parametrize("name", COUNTED)
def test_flops_are_those_of_stock(name: str, asking: str) -> None:
    """Of nn.LSTM made of torch's operations, as in float64, forward and backward."""
    options = COUNTED[name]
    stock, ours = pair(I, H, dtype=F64, **options)
    x = counted_input(name)
    if asking == "x":
        x = x._replace(data=x.data.requires_grad_()) if name.startswith("packed") else x.requires_grad_()
    args: tuple[Any, ...] = (x,)
    if asking == "state":
        LD = 1 if name == "cell" else stock.num_layers * (2 if stock.bidirectional else 1)
        rows = 3 if name.startswith("packed") else x.shape[0 if name == "cell" or stock.batch_first else 1]
        sizes = () if name == "cell" else (LD,)
        P = options.get("proj_size") or H
        args += (tuple(torch.randn(*sizes, rows, width, dtype=F64, requires_grad=True) for width in (P, H)),)

    def call(module: Any) -> None:
        with torch.set_grad_enabled(asking != "nothing"):
            y = tensors(module(*args))[0]
        if asking != "nothing":
            y.sum().backward()

    expected = flops_of(lambda: call(stock))
    assert expected > 0
    assert flops_of(lambda: call(ours)) == expected


def test_flops_of_shapes_alone_and_of_functions() -> None:
    stock, ours = pair(I, H, device="meta")
    x = torch.randn(T, B, I, device="meta")
    assert flops_of(lambda: ours(x)[0].sum().backward()) == flops_of(lambda: stock(x)[0].sum().backward())
    weights = torch.randn(4 * H, I), torch.randn(4 * H, H)
    a_step = 2 * B * 4 * H * (I + H)
    assert flops_of(lambda: lstm_ext.lstm_cell(torch.randn(B, I), None, *weights)) == a_step
    masks = {"lengths": torch.tensor([T] * B), "reverse": True, "return_cells": True}
    assert flops_of(lambda: lstm_ext.lstm(torch.randn(T, B, I), None, *weights, **masks)) == T * a_step


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"cell": True}])
def test_a_profile_shows_inference(options: dict[str, Any]) -> None:
    _, ours = pair(I, H, **options)
    x = torch.randn(*((B, I) if "cell" in options else (T, B, I)))
    with torch.profiler.profile() as profile, torch.no_grad():
        y = tensors(ours(x))[0]
        lengths = {} if "cell" in options else {"lengths": torch.tensor([T] * B, dtype=torch.int32)}
        ours(x, **lengths)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["lstm_ext::layer_forward"] == 2 * options.get("num_layers", 1)
    with torch.no_grad():
        assert torch.equal(tensors(ours(x))[0], y)

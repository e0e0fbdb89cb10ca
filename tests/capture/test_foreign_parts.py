"""Parts of a model with unusual tensors, keywords, scripted code or converted nets are stepped or refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snnfx
from snnfx import neuron
from snnfx.errors import CaptureError
from snnfx.functional import reset_net
from support.stepping import assert_converts, assert_same, step_model

X_SEQ = torch.rand(6, 3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3


def lif() -> nn.Module:
    return neuron.LIFNode(tau=2.0, v_threshold=0.4)


# -- keywords ----------------------------------------------------------------------------------------------------


class Opaque(snnfx.MemoryModule):
    def __init__(self) -> None:
        super().__init__()
        self.register_memory("v", 0.0)

    def forward(self, x: Tensor, **options: float) -> Tensor:
        gain = sum(options.values())
        self.v = self.v * 0.5 + (x * gain if float(x.sum()) < 1e9 else x)
        return self.v


class Stateful(snnfx.MemoryModule):
    def __init__(self) -> None:
        super().__init__()
        self.register_memory("v", 0.0)

    def state_names(self) -> tuple[str, ...]:
        return ("v",)

    def initial_state(self, x: Tensor, **options: float) -> tuple[Tensor, ...]:
        return (torch.zeros_like(x),)

    def step(self, state: Any, /, x: Tensor, **options: float) -> Any:
        v = state[0] * 0.5 + x * sum(options.values())
        return v, (v,)

    def forward(self, x: Tensor, **options: float) -> Tensor:
        y, (self.v,) = self.step((self.v,), x, **options)
        return y


class Calls(nn.Module):
    def __init__(self, part: nn.Module, keyword: str) -> None:
        super().__init__()
        self.fc, self.part, self.keyword = nn.Linear(12, 12), part, keyword

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.fc(x), **{self.keyword: 2.0})


@pytest.mark.parametrize("part", [Opaque, Stateful])
@pytest.mark.parametrize("keyword", "state module index adapter inputs args kwargs node name op".split())
def test_a_part_takes_a_keyword_of_any_name(part: Any, keyword: str) -> None:
    assert_converts(Calls(part(), keyword).double(), X_SEQ)


# -- tensors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_sparse_csc"])
@pytest.mark.parametrize("kind", ["buffer", "parameter", "attribute"])
@pytest.mark.parametrize("with_examples", [False, True])
def test_a_sparse_weight(layout: str, kind: str, with_examples: bool) -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            w: Any = getattr(torch.eye(8, 12, dtype=torch.float64), layout)()
            if kind == "buffer":
                self.register_buffer("w", w)
            else:
                self.w = nn.Parameter(w) if kind == "parameter" else w
            self.lif = lif()

        def forward(self, x: Tensor) -> Tensor:
            return self.lif((self.w @ x.t()).t())

    net = snnfx.convert(Sparse(), example_inputs=X_SEQ[0] if with_examples else None)
    for _ in range(2):
        assert_same(net(X_SEQ), step_model(Sparse(), X_SEQ))


def test_a_memory_budget_with_a_sparse_buffer() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", torch.eye(8, 12, dtype=torch.float64).to_sparse_csr())
            self.lif = lif()

        def forward(self, x: Tensor) -> Tensor:
            return self.lif((self.w @ x.t()).t())

    net = snnfx.convert(Sparse(), example_inputs=X_SEQ[0], memory_budget=2**20)
    assert_same(net(X_SEQ), step_model(Sparse(), X_SEQ))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_examples", [True, False])
def test_a_meta_model_with_batch_norm(training: bool, with_examples: bool) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), lif()).train(training)
        x_seq = torch.rand(6, 2, 1, 8, 8)
    y_seq = snnfx.convert(model, example_inputs=x_seq[0] if with_examples else None)(x_seq)
    assert y_seq.is_meta and y_seq.shape == step_model(model, x_seq).shape


# -- scripted code -------------------------------------------------------------------------------------------------


@torch.jit.script
def scripted_update(v: Tensor, x: Tensor, decay: float = 0.5) -> tuple[Tensor, Tensor]:
    v = v * decay + x
    spikes = (v > 1.0).to(v)
    return spikes, v * (1 - spikes)


traced_scale = torch.jit.trace(lambda x: x * 2 + 1, torch.rand(3, 12))


class UsesScriptedFunctions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.v = nn.Linear(12, 12), None
        self.update = scripted_update

    def forward(self, x: Tensor) -> Tensor:
        if self.v is None:
            self.v = torch.zeros_like(x)
        spikes, self.v = scripted_update(self.v, self.fc(x))
        other, _ = self.update(self.v, x, decay=0.3)
        return traced_scale(spikes) + other


@pytest.mark.parametrize("with_examples", [False, True])
def test_scripted_functions_are_traced_as_python(with_examples: bool) -> None:
    model = UsesScriptedFunctions().double()
    net = snnfx.convert(model, example_inputs=X_SEQ[0] if with_examples else None)
    y_seq = net(X_SEQ)
    assert_same(y_seq, step_model(model, X_SEQ))
    assert {region.kind for region in net.regions} == {"fold", "loop"}
    assert "scripted_update" not in str(net.program)


def test_scripted_functions_work_after_a_capture() -> None:
    snnfx.convert(UsesScriptedFunctions())
    assert torch.equal(scripted_update(torch.ones(2), torch.ones(2))[0], torch.ones(2))


SCRIPTED = {
    "script": torch.jit.script,
    "trace": lambda m: torch.jit.trace(m, torch.rand(3, 12)),
    "freeze": lambda m: torch.jit.freeze(torch.jit.script(m.eval())),
}


@pytest.mark.parametrize("how", SCRIPTED)
def test_a_scripted_module_is_refused_by_name_and_its_original_works(how: str) -> None:
    part = nn.Linear(12, 8)
    scripted: Any = SCRIPTED[how](part)
    with pytest.raises(CaptureError, match=r"SNNFX220 `0`") as refusal:
        snnfx.convert(nn.Sequential(scripted, lif()))
    assert "load_state_dict" in refusal.value.hint
    original = nn.Linear(12, 8)
    if how != "freeze":  # a frozen module has no weights
        original.load_state_dict(scripted.state_dict())
    assert_converts(nn.Sequential(original, lif()).double(), X_SEQ)


def test_a_scripted_model_and_a_scripted_element_of_a_list_are_refused() -> None:
    class HasList(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([torch.jit.script(nn.Linear(2, 2))])

        def forward(self, x: Tensor) -> Tensor:
            return self.parts[0](x)

    with pytest.raises(CaptureError, match=r"SNNFX220 the model"):
        snnfx.convert(torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(CaptureError, match=r"SNNFX220 `parts\.0`") as refusal:
        snnfx.convert(HasList())
    assert "test_foreign_parts.py:" in refusal.value.where


# -- nets in models ----------------------------------------------------------------------------------------------


def converted(**options: Any) -> Any:
    return snnfx.convert(nn.Sequential(nn.Linear(12, 12), lif()).double(), **options)


class RunsANet(nn.Module):
    """Runs a converted net on a sequence of one step."""

    def __init__(self) -> None:
        super().__init__()
        self.nets, self.lif = nn.ModuleList([converted()]), lif()

    def forward(self, x: Tensor) -> Tensor:
        return self.lif(self.nets[0](x[None])[0])


@pytest.mark.parametrize("make", [lambda: nn.Sequential(converted(), lif()), RunsANet], ids=["sequential", "list"])
@pytest.mark.parametrize("with_examples", [False, True])
def test_a_converted_net_is_a_part_of_a_step(make: Any, with_examples: bool) -> None:
    model = make()
    net = snnfx.convert(model, example_inputs=X_SEQ[0] if with_examples else None)
    for _ in range(2):
        reset_net(model)
        assert_same(net(X_SEQ), step_model(copy.deepcopy(model), X_SEQ))


@pytest.mark.parametrize("options", [{"carry_state": True}, {"step_mode": "s"}], ids=str)
def test_a_converted_net_with_state_is_refused_and_its_source_works(options: dict[str, Any]) -> None:
    inner = converted(**options)
    with pytest.raises(CaptureError, match=r"SNNFX221 `0`") as refusal:
        snnfx.convert(nn.Sequential(inner, lif()))
    assert "`source`" in refusal.value.hint
    assert_converts(nn.Sequential(inner.source, lif()), X_SEQ)


def test_a_data_parallel_wrapper_with_one_device_keeps_the_state_inside() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.DataParallel(nn.Sequential(nn.Linear(12, 12), lif())), lif()).double()

    torch.manual_seed(0)
    model = make()
    assert_converts(model, X_SEQ)
    assert_converts(model[0], X_SEQ, examples=True)


def test_a_layer_of_torch_with_a_neuron_inside_keeps_its_state() -> None:
    layer = nn.TransformerEncoderLayer(12, 2, 8, dropout=0.0, activation=lif(), batch_first=True)
    model = nn.Sequential(nn.Unflatten(1, (1, 12)), layer).double()
    assert_converts(model, X_SEQ)


def test_a_distributed_wrapper_is_refused(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(12, 12), lif()).double()
        wrapped = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(CaptureError, match=r"SNNFX222 the model is a DistributedDataParallel"):
            snnfx.convert(wrapped)
        net = nn.parallel.DistributedDataParallel(snnfx.convert(wrapped.module))
        assert_same(net(X_SEQ), step_model(copy.deepcopy(model), X_SEQ))
    finally:
        torch.distributed.destroy_process_group()


# -- states that are tuples ----------------------------------------------------------------------------------------


class LSTM(snnfx.MemoryModule):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(12, 12)
        self.register_memory("hc", None)

    def forward(self, x: Tensor) -> Tensor:
        self.hc = self.cell(x, self.hc)
        return self.hc[0]


class Nested(snnfx.MemoryModule):
    def __init__(self) -> None:
        super().__init__()
        self.register_memory("state", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.state is None:
            self.state = {"v": torch.zeros_like(x), "past": [x, x]}
        past = self.state["past"]
        self.state = {"v": self.state["v"] * 0.5 + x, "past": [self.state["v"], past[0]]}
        return self.state["past"][1] + self.state["v"]


@pytest.mark.parametrize("make", [LSTM, Nested, lambda: nn.Sequential(nn.Linear(12, 12), LSTM())])
def test_a_registered_state_is_a_tuple_or_dict(make: Any) -> None:
    assert_converts(make().double(), X_SEQ)


# -- batch norms that count --------------------------------------------------------------------------------------


class CountingBatchNorm(nn.BatchNorm2d):
    """In the manner of an image library: normalisation and activation in one module, which counts its batches."""

    def __init__(self, features: int, **options: Any) -> None:
        super().__init__(features, **options)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        has_own = not self.training or self.track_running_stats
        x = F.batch_norm(
            x,
            self.running_mean if has_own else None,
            self.running_var if has_own else None,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            0.0 if self.momentum is None else self.momentum,
            self.eps,
        )
        return self.act(self.drop(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}, {"affine": False}], ids=str)
def test_a_batch_norm_that_counts_its_batches(training: bool, options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), CountingBatchNorm(4, **options), lif()).double().train(training)
    assert_converts(model, torch.rand(6, 3, 1, 8, 8, dtype=torch.float64))


# -- logging -----------------------------------------------------------------------------------------------------


class Logger:
    def __init__(self) -> None:
        self.values: list[float] = []

    def add_scalar(self, name: str, value: Any) -> None:
        self.values.append(float(value))


class Logs(nn.Module):
    def __init__(self, log: Any) -> None:
        super().__init__()
        self.lif, self.rate, self.log, self.values = lif(), 0.0, log, []

    def forward(self, x: Tensor) -> Tensor:
        y = self.lif(x)
        self.log(self, y)
        return y


def add_numpy_mean(model: Any, y: Tensor) -> None:
    model.rate = model.rate + y.detach().cpu().numpy().mean()


def set_numpy_mean(model: Any, y: Tensor) -> None:
    model.rate = y.detach().cpu().numpy().mean()


def append_numpy_mean(model: Any, y: Tensor) -> None:
    model.values.append(y.detach().cpu().numpy().mean())


def add_item(model: Any, y: Tensor) -> None:
    model.rate = model.rate + y.mean().item()


def print_formatted(model: Any, y: Tensor) -> None:
    print(f"rate {y.mean():.3f}")


def print_percent(model: Any, y: Tensor) -> None:
    print("rate %.3f" % y.mean())  # noqa: UP031


LOGGER = Logger()


def write_scalar(model: Any, y: Tensor) -> None:
    LOGGER.add_scalar("rate", y.mean())


LOGS = [add_numpy_mean, set_numpy_mean, append_numpy_mean, add_item, print_formatted, print_percent, write_scalar]


@pytest.mark.parametrize("log", LOGS, ids=lambda f: f.__name__)
def test_a_step_logs_its_firing_rate(log: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = Logs(log)
    expected = step_model(Logs(log), X_SEQ)
    printed = capsys.readouterr().out
    net = snnfx.convert(model, example_inputs=X_SEQ[0])
    capsys.readouterr()
    assert_same(net(X_SEQ), expected)
    assert capsys.readouterr().out == printed


class ReplacesANestedTensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts: Any = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])

    def forward(self, x: Tensor) -> Tensor:
        self.parts = self.parts * 2
        return x


class ChangesANestedTensor(ReplacesANestedTensor):
    def forward(self, x: Tensor) -> Tensor:
        self.parts.mul_(2)
        return x


@pytest.mark.parametrize("model", [ReplacesANestedTensor, ChangesANestedTensor])
@pytest.mark.parametrize("examples", [None, X_SEQ[0]], ids=["without examples", "with examples"])
def test_a_nested_tensor_as_state_is_refused_by_name(model: Any, examples: Any) -> None:
    with pytest.raises(CaptureError, match="SNNFX216 .*`parts`") as refusal:
        snnfx.convert(model(), example_inputs=examples)
    assert "test_foreign_parts.py:" in refusal.value.where


def test_arguments_of_another_structure_are_explained_in_python() -> None:
    class TakesADict(nn.Module):
        def forward(self, parts: Any, y: Tensor) -> Tensor:
            return parts["a"] + parts["b"][0] + y

    x = X_SEQ[0]
    net = snnfx.convert(TakesADict(), example_inputs=({"a": x, "b": [x]}, x))
    with pytest.raises(snnfx.errors.InputError, match="SNNFX307") as refusal:
        net({"a": X_SEQ}, X_SEQ)
    assert "({a: parts.a, b: [parts.b.0]}, y)" in str(refusal.value)
    assert "TreeSpec" not in str(refusal.value)

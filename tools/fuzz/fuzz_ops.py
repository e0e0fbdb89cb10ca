"""Building blocks of random models: templates of expressions, statements, layers, neurons, and helper classes.

In a template, `{v}` and `{w}` stand for values of the model, `{t}` for the name of a new one, `{d}` and `{e}` for
dimensions of `{v}`, `{n0}`, `{n1}`, `{nl}` for its first, second and last size, `{k}` for a small integer, `{f}` for a
number, `{s}` for its shape without the first dimension. The generator keeps a template only if it runs on example
values, so a template need not fit every value.
"""

from __future__ import annotations

import importlib.util

__all__ = ["EFFECTS", "EXPRESSIONS", "HELPERS", "IMPORTS", "LAYERS", "NEURONS", "PREAMBLE", "SPIKINGJELLY_NEURONS"]

IMPORTS = """\
import types

import torch
import torch.nn.functional as F
from torch import nn

import snnfx
"""

PREAMBLE = """\
class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return (v >= 0).to(v.dtype)

    @staticmethod
    def backward(ctx, grad):
        (v,) = ctx.saved_tensors
        return grad / (1 + v.abs()) ** 2


class WideSpike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, width):
        ctx.save_for_backward(v, width)
        return (v >= 0).to(v.dtype)

    @staticmethod
    def backward(ctx, grad):
        v, width = ctx.saved_tensors
        slope = torch.sigmoid(v * width)
        slope = slope * (1 - slope)
        return grad * slope * width, (grad * slope * v).sum()
"""

HELPERS: dict[str, str] = {
    # Modules that torch.fx cannot trace, which therefore stay opaque.
    "DataDependent": """\
class DataDependent(nn.Module):
    def forward(self, x):
        if x.sum() > 0.3:
            return x * 2
        return x - 0.25
""",
    "OpaqueState": """\
class OpaqueState(snnfx.MemoryModule):
    def __init__(self):
        super().__init__()
        self.register_memory("v", 0.0)

    def forward(self, x):
        self.v = self.v * 0.6 + x
        if float(self.v.detach().mean()) > 0.2:
            self.v = self.v - 0.5
        return self.v
""",
    "OpaqueNeuron": """\
class OpaqueNeuron(nn.Module):
    def __init__(self):
        super().__init__()
        self.lif = snnfx.neuron.LIFNode(tau=1.7)
        self.gain = nn.Parameter(torch.tensor(1.3))

    def forward(self, x):
        y = self.lif(x * self.gain)
        if y.detach().sum() > 2:
            y = y * 0.5
        return y
""",
    "SharedScale": """\
class SharedScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.v = nn.Parameter(torch.tensor(1.2)), None

    def forward(self, x):
        x = x * self.scale
        if self.v is None:
            self.v = x.new_full(x.shape, 0.3)
        self.v = self.v * 0.6 + torch.as_tensor(x)
        return (self.v > 0.4).to(x.dtype) * self.scale + self.v
""",
    "ScaledLinear": """\
class ScaledLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 0.5, self.bias) + 0.1
""",
    "TwoOutputs": """\
class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.lif = snnfx.neuron.LIFNode(tau=1.4)

    def forward(self, x):
        spikes = self.lif(x)
        return {"spikes": spikes, "rest": (x - spikes, [x * 0.5])}
""",
    "CellWithState": """\
class CellWithState(snnfx.MemoryModule):
    def __init__(self, features):
        super().__init__()
        self.cell = nn.GRUCell(features, features)
        self.register_memory("h", None)

    def forward(self, x):
        self.h = self.cell(x, self.h)
        return self.h
""",
    "Counter": """\
class Counter(snnfx.MemoryModule):
    def __init__(self):
        super().__init__()
        self.register_memory("count", 0)

    def forward(self, x):
        self.count = self.count + 1
        return x * self.count
""",
    # Modules that change more than their output in training, or read more than their input.
    "RateBuffer": """\
class RateBuffer(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.register_buffer("rate", torch.zeros(features))

    def forward(self, x):
        if self.training:
            self.rate = self.rate * 0.9 + x.detach().reshape(-1, x.shape[-1]).mean(0) * 0.1
        return x / (1 + self.rate.abs())
""",
    "RateInPlace": """\
class RateInPlace(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.register_buffer("rate", torch.zeros(features))

    def forward(self, x):
        y = x + self.rate
        if self.training:
            with torch.no_grad():
                self.rate.mul_(0.9).add_(x.detach().reshape(-1, x.shape[-1]).mean(0) * 0.1)
        return y + 0.5 * self.rate
""",
    "StepCount": """\
class StepCount(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.tensor(0.0))

    def forward(self, x):
        if self.training:
            self.steps += 1
        return x + 0.1 * self.steps
""",
    "Homeostatic": """\
class Homeostatic(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.register_buffer("threshold", torch.full((features,), 0.4))

    def forward(self, x):
        spikes = Spike.apply(x - self.threshold)
        if self.training:
            self.threshold = self.threshold + 0.05 * (spikes.detach().reshape(-1, x.shape[-1]).mean(0) - 0.2)
        return spikes
""",
    "ReadsBehind": """\
class ReadsBehind(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.norm = nn.BatchNorm1d(features)

    def forward(self, x):
        y = self.norm(x)
        return y + self.norm.running_mean.sum() - self.norm.running_var.mean()
""",
    "ReadsBefore": """\
class ReadsBefore(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.norm = nn.BatchNorm1d(features)

    def forward(self, x):
        before = self.norm.running_mean.sum() + self.norm.running_var.mean()
        return self.norm(x) * 0.5 + before
""",
    "DictState": """\
class DictState(nn.Module):
    def __init__(self):
        super().__init__()
        self._memories = {"v": 0.0}

    def forward(self, x):
        self._memories["v"] = self._memories["v"] * 0.6 + x
        return self._memories["v"]
""",
    "Configured": """\
class Configured(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(gain=1.5, gains=[0.5] * 70)

    def forward(self, x):
        return x * self.config.gain + self.config.gains[65]
""",
    "LearnedWidth": """\
class LearnedWidth(snnfx.MemoryModule):
    def __init__(self):
        super().__init__()
        self.width = nn.Parameter(torch.tensor(2.0))
        self.register_memory("v", 0.0)

    def forward(self, x):
        v = self.v * 0.7 + x
        spikes = WideSpike.apply(v - 0.5, self.width)
        self.v = v - 0.5 * spikes
        return spikes
""",
    "TiedIterations": """\
class TiedIterations(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.fc = nn.Linear(features, features)

    def forward(self, x):
        z = torch.zeros_like(x)
        for _ in range(3):
            z = torch.tanh(self.fc(z) + x)
        return z
""",
    # BatchNorms and additions in front of a neuron, which its kernel computes in training.
    "NormedNeuron": """\
class NormedNeuron(nn.Module):
    def __init__(self, norm, neuron, form):
        super().__init__()
        self.norm, self.neuron, self.form = norm, neuron, form

    def forward(self, x):
        if self.form == 0:
            return self.neuron(self.norm(x))
        if self.form == 1:
            return self.neuron(self.norm(x) + x)
        if self.form == 2:
            first = self.norm(x)
            return self.neuron(self.norm(x * 0.5) + first)
        if self.form == 3:
            y = self.norm(x)
            return self.neuron(y) + y
        return self.norm(self.neuron(self.norm(x))) + x
""",
    "PerChannel": """\
class PerChannel(snnfx.MemoryModule):
    def __init__(self, *shape):
        super().__init__()
        self.leak, self.bias = nn.Parameter(torch.rand(shape)), nn.Parameter(torch.randn(shape))
        self.threshold = nn.Parameter(torch.rand(shape[-1]))
        self.register_memory("v", 0.0)
        self.spike = snnfx.surrogate.ATan()

    def forward(self, x):
        v = self.v * self.leak + x + self.bias
        spikes = self.spike(v - self.threshold)
        self.v = v - spikes
        return spikes
""",
    "TiedChannels": """\
class TiedChannels(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.fc = nn.Linear(features, features)

    def forward(self, x):
        return torch.stack([self.fc(x[:, i]) for i in range(x.shape[1])], 1)
""",
}

NEURONS = [
    "snnfx.neuron.LIFNode(tau=1.{k}, v_threshold={f})",
    "snnfx.neuron.LIFNode(tau=2.{k}, v_reset=None, decay_input=False, v_threshold={f})",
    "snnfx.neuron.LIFNode(tau=2.0, detach_reset=True, v_threshold={f}, surrogate_function=snnfx.surrogate.ATan())",
    "snnfx.neuron.IFNode(v_threshold={f}, v_reset=0.1)",
    "snnfx.neuron.IFNode(v_reset=None, v_threshold={f})",
    "snnfx.neuron.ParametricLIFNode(init_tau=2.{k}, v_threshold={f})",
    "snnfx.neuron.AdaptiveLIFNode(tau=1.{k})",
    "snnfx.neuron.CUBALIFNode(v_threshold={f})",
    "snnfx.neuron.LeakyIntegrator(tau=2.{k})",
    "nn.Sequential(snnfx.neuron.LIFNode(v_threshold={f}), nn.Dropout(0.0), snnfx.neuron.LeakyIntegrator())",
    *["NormedNeuron(nn.BatchNorm2d({n1}), snnfx.neuron.LIFNode(v_threshold={f}), {k} - 1)"] * 4,
    "NormedNeuron(nn.BatchNorm2d({n1}, affine=False), snnfx.neuron.ParametricLIFNode(v_threshold={f}), {k} - 1)",
    "NormedNeuron(nn.BatchNorm1d({n1}), snnfx.neuron.IFNode(v_threshold={f}), {k} - 1)",
    "PerChannel({n1}, 1, 1)",
    "PerChannel({n1}, 1)",
    "PerChannel({nl})",
]

SPIKINGJELLY_NEURONS = [
    "sj_neuron.LIFNode(tau=1.{k}, v_threshold={f})",
    "sj_neuron.LIFNode(tau=2.0, v_reset=None, detach_reset=True, v_threshold={f})",
    "sj_neuron.IFNode(v_threshold={f})",
    "sj_neuron.ParametricLIFNode(init_tau=2.{k}, v_threshold={f})",
    "sj_neuron.QIFNode()",
    "sj_neuron.EIFNode()",
    "sj_neuron.KLIFNode()",
    "sj_neuron.IzhikevichNode()",
    "sj_neuron.NonSpikingLIFNode()",
    "sj_neuron.SimpleLIFNode(tau=2.0, decay_input=True)",
    "sj_layer.SynapseFilter(tau=3.0)",
    "sj_layer.Dropout(0.0)",
    "sj_layer.Linear({nl}, {k})",
    "sj_layer.BatchNorm1d({n1})",
    "sj_layer.ElementWiseRecurrentContainer(sj_neuron.IFNode(v_threshold={f}), lambda x, y: x + 0.5 * y)",
    "sj_layer.LinearRecurrentContainer(sj_neuron.IFNode(v_threshold={f}), in_features={nl}, out_features={nl})",
]

if importlib.util.find_spec("spikingjelly") is None:
    SPIKINGJELLY_NEURONS = []

LAYERS = [
    *["nn.Linear({nl}, {k})"] * 4,
    "nn.Linear({nl}, {nl}, bias=False)",
    *["nn.Conv2d({n1}, {k}, 3, padding=1)"] * 4,
    "nn.Conv2d({n1}, {n1}, 2, stride=2, groups={n1})",
    "nn.Conv2d({n0}, {k}, 1)",
    "nn.ConvTranspose2d({n1}, {k}, 2, stride=2)",
    "nn.Conv1d({n1}, {k}, 3, padding=1)",
    "nn.Conv1d({n0}, {k}, 1)",
    "nn.ConvTranspose1d({n1}, {k}, 2)",
    *["nn.BatchNorm1d({n1})"] * 2,
    *["nn.BatchNorm2d({n1})"] * 3,
    "nn.BatchNorm2d({n1}, momentum=None)",
    "nn.BatchNorm1d({n1}, affine=False)",
    "nn.BatchNorm1d({n1}, track_running_stats=False)",
    "nn.LayerNorm({nl})",
    "nn.LayerNorm({s})",
    "nn.LayerNorm([{n0}, *{s}])",
    "nn.GroupNorm(1, {n1})",
    "nn.GroupNorm({n1}, {n1})",
    "nn.InstanceNorm2d({n1}, affine=True)",
    "nn.InstanceNorm1d({n1})",
    "nn.LocalResponseNorm(2)",
    "nn.MaxPool2d(2)",
    "nn.MaxPool2d(2, ceil_mode=True)",
    "nn.MaxPool2d(2, 3)",
    "nn.MaxPool2d((1, 2))",
    "nn.MaxPool2d(3)",
    "nn.MaxPool2d(2, 1)",
    "nn.AvgPool2d(2)",
    "nn.MaxPool1d(2)",
    "nn.AdaptiveAvgPool2d(1)",
    "nn.AdaptiveMaxPool2d(2)",
    "nn.AdaptiveAvgPool1d(2)",
    "nn.Flatten()",
    "nn.Flatten(0)",
    "nn.Flatten({d}, {e})",
    "nn.Flatten(-2)",
    "nn.Unflatten({d}, (1, -1))",
    "nn.Dropout(0.0)",
    "nn.Dropout(1.0)",
    "nn.Dropout(0.3)",
    "nn.Dropout2d(0.3)",
    "nn.ReLU(inplace=True)",
    "nn.ReLU()",
    "nn.PReLU()",
    "nn.PReLU({n1})",
    "nn.Hardtanh(inplace=True)",
    "nn.Softmax({d})",
    "nn.LogSoftmax(dim={d})",
    "nn.GLU({d})",
    "nn.Upsample(scale_factor=2)",
    "nn.ZeroPad2d(1)",
    "nn.PixelUnshuffle(2)",
    "nn.Identity()",
    "nn.CosineSimilarity(dim={d})",
    "nn.RNNCell({nl}, {k})",
    "nn.GRUCell({nl}, {k})",
    "nn.TransformerEncoderLayer({nl}, 1, dim_feedforward=4, dropout=0.0, batch_first=True)",
    "nn.TransformerEncoderLayer({nl}, 1, dim_feedforward=4, dropout=0.0)",
    "nn.Sequential(nn.Linear({nl}, {k}), nn.Tanh(), nn.Linear({k}, {nl}))",
    "nn.Sequential(nn.Conv2d({n1}, {k}, 1, bias=False), nn.BatchNorm2d({k}), snnfx.neuron.LIFNode(v_threshold={f}))",
    "nn.Sequential(nn.Linear({nl}, {k}), nn.BatchNorm1d({k}), snnfx.neuron.IFNode(v_threshold={f}))",
    "nn.utils.parametrizations.weight_norm(nn.Linear({nl}, {k}))",
    "nn.utils.parametrizations.spectral_norm(nn.Linear({nl}, {k}))",
    "ScaledLinear({nl}, {k})",
    "DataDependent()",
    "OpaqueState()",
    "OpaqueNeuron()",
    "SharedScale()",
    "CellWithState({nl})",
    "Counter()",
]

EFFECTS = [
    "RateBuffer({nl})",
    "RateInPlace({nl})",
    "StepCount()",
    "Homeostatic({nl})",
    "ReadsBehind({n1})",
    "ReadsBefore({n1})",
    "nn.InstanceNorm1d({n1}, track_running_stats=True)",
    "nn.InstanceNorm2d({n1}, track_running_stats=True, affine=True)",
    "DictState()",
    "Configured()",
    "LearnedWidth()",
    "TiedIterations({nl})",
    "TiedChannels({nl})",
]
"""Modules that change buffers, read what other nodes write, or depend on more than their input."""

_ELEMENTWISE = """
torch.relu({v}) | {v}.tanh() | F.gelu({v}) | {v} * {f} | 1 - {v} | {v}.abs() | {v}.clamp(-1, 1) | -{v} | {v} ** 2
torch.where({v} > 0, {v}, 0.1 * {v}) | F.leaky_relu({v}, 0.2) | torch.exp(-{v}.abs()) | ({v} > 0.1).to({v}.dtype)
{v}.detach() | {v}.masked_fill({v} > 1, 0.5) | {v} + torch.ones_like({v}) | {v}.clone() | {v}.contiguous()
{v}.type_as({v}) | {v}.to({v}) | Spike.apply({v} - {f}) | {v} * torch.zeros_like({v}) | torch.sign({v})
F.dropout({v}, 0.3, self.training) | F.dropout({v}, p=1.0, training=self.training) | {v}.square().add(1).log()
torch.full_like({v}, {f}) * {v} | {v} + {v}.new_ones({v}.shape) | {v}.data + 0.0 * {v} | {v}.sigmoid().round() - {v}
"""

_REDUCTIONS = """
{v}.mean({d}) | {v}.mean({d}, keepdim=True) | {v}.sum(dim={d}) | {v}.amax({d}) | torch.softmax({v}, {d})
{v}.log_softmax({d}) | {v}.norm(dim={d}) | {v}.cumsum({d}) | {v}.max({d})[0] | {v}.min({d}).values | {v}.sort({d})[0]
{v}.topk(1, {d})[0] | {v}.flip({d}) | torch.roll({v}, 1, {d}) | torch.flip({v}, [{d}, {e}]) | {v} - {v}.mean({d}, keepdim=True)
{v}.mean() | {v} - {v}.mean() | {v} / (1 + {v}.abs().max()) | {v}.std({d}, correction=0) | {v}.sum(({d}, {e})) | {v}.median({d})[0]
F.normalize({v}, dim={d}) | torch.logsumexp({v}, {d}) | {v}.argmax({d}).to({v}.dtype) | {v}.mean((-1, -2)) | {v}.prod({d})
{v} * {v}.mean(0) | F.softmax({v}, dim={d}) | F.glu({v}, {d}) | {v}.mean(0, keepdim=True).expand_as({v}) | torch.diff({v}, dim={d})
F.layer_norm({v}, {v}.shape[1:]) | F.layer_norm({v}, ({nl},)) | {v}.argsort({d}) + {v} | F.one_hot({v}.argmax({d}), {k} + 5).to({v}.dtype)
"""

_SHAPES = """
{v}.transpose({d}, {e}) | {v}.flatten(1) | {v}.flatten({d}, {e}) | {v}.flatten() | {v}.unsqueeze({d}) | {v}.squeeze({d})
{v}.reshape({v}.shape[0], -1) | {v}.view({v}.size(0), -1) | {v}.reshape({n0}, -1) | {v}.reshape(-1, {nl}) | {v}.reshape(-1)
{v}.view(-1, {v}.shape[-1]) | {v}.reshape({v}.shape[0], {v}.shape[1], -1) | {v}.reshape(*{v}.shape[:-1], -1, 2) | {v}.swapaxes({d}, {e})
{v}.movedim({d}, {e}) | {v}.T | {v}.mT | {v}.permute(*reversed(range({v}.dim()))) | {v}.permute(1, 0, *range(2, {r}))
{v}[0] | {v}[:, 0] | {v}[..., 0] | {v}[:, 1:] | {v}[1:] | {v}[:, ::2] | {v}[None] | {v}[:, None] | {v}[-1:] | {v}[:, -1]
{v}.select({d}, 0) | {v}.narrow({d}, 0, 1) | {v}.unbind({d})[0] | torch.unbind({v}, {d})[-1] | {v}.chunk(2, {d})[0]
{v}.split(2, {d})[0] | torch.split({v}, [1, 1], {d})[1] | {v}.expand(2, *{v}.shape) | {v}.unsqueeze({d}).expand(*{v}.shape[:1], *[-1] * {r})
{v}.repeat(*[1] * ({r} - 1), 2) | {v}.repeat(2, *[1] * ({r} - 1)) | {v}.repeat_interleave(2, {d}) | {v}.repeat_interleave(2)
{v}.unflatten({d}, (-1, 1)) | F.pad({v}, (1, 1)) | F.pad({v}, (0, 0, 1, 1)) | {v}.expand_as({w}) | {v}.view_as({w}) | {v}.unfold({d}, 2, 1)
{v}.diagonal() | {v}.tril() | {v}.reshape({w}.shape) | {v}[{v}.shape[0] - 1] | {v}.index_select({d}, torch.tensor([0]))
{v}[torch.arange({v}.shape[0])] | {v}[torch.arange({v}.shape[0]), 0] | {v}[[0, 1]] | {v}[:, [0]] | {v}.as_strided((2,), (1,)) | torch.atleast_2d({v})
{v} + torch.zeros({v}.shape[0], 1) | {v} * torch.arange({v}.shape[0]).sum() | {v} / {v}.shape[0] | {v} * {v}.size(1) | {v} + torch.linspace(0, 1, {nl})
{v} * len({v}) | {v} + {v}.numel() | {v}.gather({d}, {v}.argmax({d}, keepdim=True)) | {v}.new_zeros({v}.shape[0], {k}) | torch.eye({v}.shape[0]) @ {v}
{v}.reshape({v}.shape[0] * {v}.shape[1], -1) | {v}.view(-1, *{v}.shape[2:]).view({v}.shape) | {v}.view({v}.shape[0], -1, 1).flatten(1)
"""

_COMBINATIONS = """
{v} + {w} | {v} + {w} | {v} + {w} | {v} - {w} | {v} * {w} | {v} * torch.sigmoid({w}) | torch.maximum({v}, {w}) | torch.where({v} > {w}, {v}, {w})
torch.cat([{v}, {w}], {d}) | torch.cat(({v}, {w}), dim=1) | torch.cat(({v}, {w}), dim=-1) | torch.stack([{v}, {w}], {d}) | torch.stack(({v}, {w}), 1)
{v} @ {w}.transpose(-1, -2) | {v} @ {w} | torch.matmul({v}.mT, {w}) | torch.lerp({v}, {w}, 0.3) | torch.addcmul({v}, {w}, {v}, value=0.5)
torch.einsum("n...,n...->n", {v}, {w}) | torch.einsum("ij,kj->ik", {v}, {w}) | torch.bmm({v}, {w}.transpose(1, 2)) | torch.outer({v}, {w})
F.scaled_dot_product_attention({v}, {w}, {w}) | F.mse_loss({v}, {w}) | F.mse_loss({v}, {w}, reduction="none") | F.cosine_similarity({v}, {w}, dim={d})
{v}.unsqueeze(1) * {w}.unsqueeze(-1) | {v}.mul({w}.mean()) | {v} + {w}[0] | {v} * {w}.mean(-1, keepdim=True) | torch.cdist({v}, {w}) | torch.minimum({v}, {w}[:1])
{v} / (1 + {w}.abs()) | torch.hypot({v}, {w}) | {v}.where({w} > 0, {w}) | torch.add({v}, {w}, alpha=2) | F.linear({v}, {w}) | torch.addmm({v}, {w}, {w})
"""

_PARAMETERS = """
{v} * {P:nl} | {v} + {P:nl}.sigmoid() | F.linear({v}, {P:k,nl}) | F.linear({v}, {P:k,nl}.tanh(), {P:k}) | {v} @ {P:nl,k} | {v} * {P:}
torch.einsum("...i,ji->...j", {v}, {P:k,nl}) | F.conv1d({v}, {P:k,n1,1}) | F.conv2d({v}, {P:k,n1,3,3}, padding=1) | F.prelu({v}, {P:1})
{v} * {B:nl} | {v} + {B:n0,1} | {v} + {P:n0,nl} | {P:n0,n0} @ {v} | {v} + {C:nl} | {v} - {C:}.exp() | {v} * ({P:nl} * 2).softmax(-1)
F.batch_norm({v}, None, None, training=True) | F.batch_norm({v}, {B:n1}, {B:n1}.abs() + 1) | F.layer_norm({v}, ({nl},), {P:nl}) | {v} * {P:nl}.mean() + {P:n1,nl}
F.group_norm({v}, 1) | F.instance_norm({v}) | F.max_pool2d({v}, 2) | F.avg_pool2d({v}, 2) | F.adaptive_avg_pool2d({v}, (1, 1)) | F.interpolate({v}, scale_factor=2)
F.avg_pool1d({v}, 2) | torch.cat([{v}, {P:n0,nl}], -1) | torch.cat([{v}, {P:nl}.expand({v}.shape[0], -1)], -1) | {v} + {P:nl}.unsqueeze(0) | {P:nl} - {v}
"""

_STATEMENTS = [
    "{t}, {t}b = {v}.chunk(2, {d})",
    "{t}, {t}b = torch.split({v}, {nl} // 2, -1)",
    "{t}, *_ = {v}.unbind({d})",
    "B, C = {v}.shape[:2]\n{t} = {v}.reshape(B, 1, C, -1)",
    "n, c, *rest = {v}.shape\n{t} = {v}.reshape(n * c, -1)",
    "{t} = {v} + 1\n{t} += {w}",
    "{t} = {v} * 2\n{t}.mul_({w})",
    "{t} = {v} - {w}\n{t}.clamp_(min=0)\n{t}b = {t} + {v}",
    "{t} = F.relu({v} + 0.1, inplace=True)",
    "{t} = {v} * 1.5\n{t}b = {t}.flatten(1)\n{t}.add_(1)",
    "{t} = {v}.clone()\n{t}[:, 0] = 0",
    "{t} = {v} + 0.1\nF.relu_({t})",
    "{t} = {v} * 2 if self.training else {v} * 3",
    "if self.training:\n    {t} = {v} + 1\nelse:\n    {t} = {v}.relu()",
    "{t} = {v}.flatten(1) if {v}.dim() > 2 else {v} * 2",
    "{t} = {v}\nif {v}.shape[1] == {n1}:\n    {t} = {t} * 0.5",
    "{t} = {v}\nfor i in range({v}.shape[1]):\n    {t} = {t} + {v}[:, i : i + 1].mean()",
    "assert {v}.dim() == {r}\n{t} = {v} * 1.1",
    "assert {v}.shape == {w}.shape\n{t} = {v} - {w}",
    "with torch.no_grad():\n    {t} = {v} * 1.2",
    "with torch.no_grad():\n    {t}g = {v}.mean(-1, keepdim=True)\n{t} = {v} - {t}g",
    "{t} = {v}.max({d})\n{t} = {t}.values * {t}[0]",
    "{t}, {t}i = {v}.topk(2, {d})\n{t} = {t} + {t}i",
    "{t} = [{v}, {w}]\n{t} = sum({t})",
    "{t} = torch.stack([x_ * 2 for x_ in {v}.unbind({d})], {d})",
    "{t} = [{v} * i for i in range(2)]\n{t} = torch.cat({t}, {d})",
    "if isinstance({v}, torch.Tensor) and {v}.ndim >= 1:\n    {t} = {v}.sigmoid()",
]


def _split(table: str) -> list[str]:
    return [item.strip() for line in table.strip().splitlines() for item in line.split(" | ")]


EXPRESSIONS: list[tuple[int, list[str]]] = [
    (3, _split(_ELEMENTWISE)),
    (3, _split(_REDUCTIONS)),
    (4, _split(_SHAPES)),
    (6, _split(_COMBINATIONS)),
    (3, _split(_PARAMETERS)),
    (2, _STATEMENTS),
]
"""Weights and templates of the statements that call no module, by kind."""

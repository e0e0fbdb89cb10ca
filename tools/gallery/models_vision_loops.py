"""Vision models whose forward holds the loop: membranes as local variables, or layers with T as the last dimension."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from gallery_entry import Entry, rates, sequence_of
from torch import Tensor, nn

__all__ = ["ENTRIES"]

thresh, lens, decay = 0.5, 0.5, 0.2


class ActFun(torch.autograd.Function):
    """A rectangular surrogate."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.save_for_backward(input)
        return input.gt(thresh).to(input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (input,) = ctx.saved_tensors
        grad_input = grad_output.clone()
        temp = abs(input - thresh) < lens
        return grad_input * temp.to(input) / (2 * lens)


act_fun = ActFun.apply


def mem_update(ops: Any, x: Tensor, mem: Tensor, spike: Tensor) -> tuple[Tensor, Tensor]:
    mem = mem * decay * (1.0 - spike) + ops(x)
    spike = act_fun(mem)
    return mem, spike


class StbpNet(nn.Module):
    """Convolutions and linear layers passed to one update function; spikes of the last layer are counted."""

    def __init__(self, cfg_kernel: tuple[int, ...] = (28, 14, 7)) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(7 * 7 * 16, 64), nn.Linear(64, 10)
        for ops in (self.conv1, self.conv2, self.fc1, self.fc2):
            ops.weight.data *= 3
        self.cfg_kernel = cfg_kernel

    def forward(self, input: Tensor, time_window: int = 10) -> Tensor:
        batch_size, device = input.shape[0], input.device
        c1_mem = c1_spike = torch.zeros(batch_size, 8, self.cfg_kernel[0], self.cfg_kernel[0], device=device)
        c2_mem = c2_spike = torch.zeros(batch_size, 16, self.cfg_kernel[1], self.cfg_kernel[1], device=device)
        h1_mem = h1_spike = h1_sumspike = torch.zeros(batch_size, 64, device=device)
        h2_mem = h2_spike = h2_sumspike = torch.zeros(batch_size, 10, device=device)
        for _ in range(time_window):
            c1_mem, c1_spike = mem_update(self.conv1, input, c1_mem, c1_spike)
            x = F.avg_pool2d(c1_spike, 2)
            c2_mem, c2_spike = mem_update(self.conv2, x, c2_mem, c2_spike)
            x = F.avg_pool2d(c2_spike, 2).view(batch_size, -1)
            h1_mem, h1_spike = mem_update(self.fc1, x, h1_mem, h1_spike)
            h1_sumspike = h1_sumspike + h1_spike
            h2_mem, h2_spike = mem_update(self.fc2, h1_spike, h2_mem, h2_spike)
            h2_sumspike = h2_sumspike + h2_spike
        return h2_sumspike / time_window


class tdLayer(nn.Module):
    """A layer, and a norm, on each slice of the last dimension."""

    def __init__(self, layer: nn.Module, bn: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.bn = layer, bn

    def forward(self, x: Tensor) -> Tensor:
        steps = x.shape[-1]
        x_ = torch.zeros(self.layer(x[..., 0]).shape + (steps,), device=x.device, dtype=x.dtype)
        for step in range(steps):
            x_[..., step] = self.layer(x[..., step])
        return x_ if self.bn is None else self.bn(x_)


class tdBatchNorm(nn.BatchNorm3d):
    """Statistics over samples, pixels and time steps; the threshold scales the result."""

    def forward(self, input: Tensor) -> Tensor:
        return thresh * super().forward(input)


class LIFSpike(nn.Module):
    """Spikes of the last dimension, written step by step."""

    def forward(self, x: Tensor) -> Tensor:
        nsteps = x.shape[-1]
        u = torch.zeros(x.shape[:-1], device=x.device)
        spike = torch.zeros(x.shape[:-1], device=x.device)
        out = torch.zeros(x.shape, device=x.device)
        for step in range(nsteps):
            u, spike = self.state_update(u, spike, x[..., step])
            out[..., step] = spike
        return out

    def state_update(self, u_t_n1: Tensor, o_t_n1: Tensor, W_mul_o_t1_n: Tensor) -> tuple[Tensor, Tensor]:
        u_t1_n1 = decay * u_t_n1 * (1 - o_t_n1) + W_mul_o_t1_n
        return u_t1_n1, act_fun(u_t1_n1)


class tdBlock(nn.Module):
    def __init__(self, planes: int) -> None:
        super().__init__()
        self.conv1_s = tdLayer(nn.Conv2d(planes, planes, 3, padding=1, bias=False), tdBatchNorm(planes))
        self.conv2_s = tdLayer(nn.Conv2d(planes, planes, 3, padding=1, bias=False), tdBatchNorm(planes))
        self.spike = LIFSpike()

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2_s(self.spike(self.conv1_s(x)))
        return self.spike(out + x)


class TdResNet(nn.Module):
    """Residual blocks on `[N, C, H, W, T]`; the mean over time at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1_s = tdLayer(nn.Conv2d(3, 8, 3, padding=1, bias=False), tdBatchNorm(8))
        self.layer1, self.spike = nn.Sequential(tdBlock(8), tdBlock(8)), LIFSpike()
        self.avgpool_s, self.fc_s = tdLayer(nn.AdaptiveAvgPool2d(1)), tdLayer(nn.Linear(8, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.spike(self.conv1_s(x))
        x = self.avgpool_s(self.layer1(x))
        x = self.fc_s(x.view(x.shape[0], -1, x.shape[-1]))
        return torch.sum(x, dim=2) / x.shape[-1]


class MemUpdate(nn.Module):
    """A neuron over the first dimension, where the first step has no past."""

    def forward(self, x: Tensor) -> Tensor:
        mem = torch.zeros_like(x[0])
        spike = torch.zeros_like(x[0])
        output = torch.zeros_like(x)
        mem_old: Any = 0
        for i in range(x.shape[0]):
            if i >= 1:
                mem = mem_old * 0.25 * (1 - spike.detach())
                mem = mem + x[i]
            else:
                mem = x[i]
            spike = act_fun(mem)
            mem_old = mem.clone()
            output[i] = spike
        return output


class SnnConv2d(nn.Conv2d):
    """A convolution that is called for each step and writes its results to a tensor."""

    def forward(self, input: Tensor) -> Tensor:
        h = (input.size(3) + 2 * self.padding[0] - self.kernel_size[0]) // self.stride[0] + 1  # type: ignore[operator]
        w = (input.size(4) + 2 * self.padding[1] - self.kernel_size[1]) // self.stride[1] + 1  # type: ignore[operator]
        c1 = torch.zeros(input.shape[0], input.size(1), self.out_channels, h, w, device=input.device)
        for i in range(input.shape[0]):
            c1[i] = F.conv2d(input[i], self.weight, self.bias, self.stride, self.padding)
        return c1


class BatchNorm3d1(nn.BatchNorm3d):
    """Time and samples exchanged around a norm over `[N, C, T, H, W]`."""

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input.permute(1, 2, 0, 3, 4))
        return y.permute(2, 0, 1, 3, 4)


class MsBlock(nn.Module):
    """Membrane shortcuts: neuron, convolution, norm, twice."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *(MemUpdate(), SnnConv2d(in_channels, out_channels, 3, stride, 1, bias=False), BatchNorm3d1(out_channels)),
            *(MemUpdate(), SnnConv2d(out_channels, out_channels, 3, 1, 1, bias=False), BatchNorm3d1(out_channels)),
        )
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(
                nn.AvgPool3d((1, stride, stride), stride=(1, stride, stride)),
                SnnConv2d(in_channels, out_channels, 1, 1, bias=False),
                BatchNorm3d1(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x) + self.shortcut(x)


class MsResNet(nn.Module):
    """A static image at every step; the mean over time in front of the classifier."""

    def __init__(self, time_window: int = 6) -> None:
        super().__init__()
        self.time_window = time_window
        self.conv1 = nn.Sequential(SnnConv2d(3, 8, 3, padding=1, bias=False), BatchNorm3d1(8))
        self.layers, self.mem_update = nn.Sequential(MsBlock(8, 8), MsBlock(8, 16, 2)), MemUpdate()
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        input = torch.zeros(self.time_window, x.size(0), 3, x.size(2), x.size(3), device=x.device)
        for i in range(self.time_window):
            input[i] = x
        output = self.mem_update(self.layers(self.conv1(input)))
        output = F.adaptive_avg_pool3d(output, (None, 1, 1))
        output = output.view(output.size(0), output.size(1), -1)
        return self.fc(output.sum(dim=0) / output.size(0))


class Detector(nn.Module):
    """Branches of neurons and convolutions that are concatenated, and a detection head on the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(SnnConv2d(2, 8, 3, 2, 1, bias=False), BatchNorm3d1(8))
        self.block, self.mem = MsBlock(8, 8), MemUpdate()
        self.conv, self.bn = SnnConv2d(16, 16, 3, padding=1, bias=False), BatchNorm3d1(16)
        self.pool, self.head = nn.MaxPool3d((1, 2, 2), stride=(1, 2, 2)), nn.Conv2d(16, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([self.block(x), x], dim=2)
        x = self.pool(self.bn(self.conv(self.mem(x))).permute(1, 2, 0, 3, 4)).permute(2, 0, 1, 3, 4)
        return self.head(self.mem(x).sum(0) / x.shape[0])


def image(T: int) -> tuple[Tensor, ...]:
    return (2 * torch.rand(4, 3, 16, 16),)


def digit(T: int) -> tuple[Tensor, ...]:
    return (5 * torch.rand(4, 1, 28, 28),)


ENTRIES = (
    Entry("counted spikes, static image", "STBP", StbpNet, digit, 10),
    Entry("tdBN ResNet, T last", "STBP-tdBN", TdResNet, sequence_of(4, 3, 16, 16, scale=2, time_dim=-1), 6, other_T=3),
    Entry("MS-ResNet, static image", "MS-ResNet", MsResNet, image, 6),
    Entry("detector, concatenated branches", "EMS-YOLO", Detector, rates(4, 2, 32, 32, rate=0.4), 4),
)

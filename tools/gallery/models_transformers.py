"""Spiking transformers: time, batch and tokens as axes, neurons of SpikingJelly in mode "m"."""

from __future__ import annotations

from typing import Any

import torch
from gallery_entry import Entry, rates
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

__all__ = ["ENTRIES"]


def lif(v_threshold: float = 1.0) -> Any:
    return neuron.LIFNode(tau=2.0, detach_reset=True, v_threshold=v_threshold, step_mode="m")


class MLP(nn.Module):
    """Linear layers on `[T * B, N, C]`, norms on `[T * B, C, N]`, neurons on `[T, B, N, C]`."""

    def __init__(self, in_features: int, hidden_features: int) -> None:
        super().__init__()
        self.fc1_linear, self.fc1_bn, self.fc1_lif = (
            nn.Linear(in_features, hidden_features),
            nn.BatchNorm1d(hidden_features),
            lif(),
        )
        self.fc2_linear, self.fc2_bn, self.fc2_lif = (
            nn.Linear(hidden_features, in_features),
            nn.BatchNorm1d(in_features),
            lif(),
        )
        self.c_hidden = hidden_features

    def forward(self, x: Tensor) -> Tensor:
        T, B, N, C = x.shape
        x = self.fc1_linear(x.flatten(0, 1))
        x = self.fc1_bn(x.transpose(-1, -2)).transpose(-1, -2).reshape(T, B, N, self.c_hidden).contiguous()
        x = self.fc2_linear(self.fc1_lif(x).flatten(0, 1))
        x = self.fc2_bn(x.transpose(-1, -2)).transpose(-1, -2).reshape(T, B, N, C).contiguous()
        return self.fc2_lif(x)


class SSA(nn.Module):
    """Self-attention of spikes without softmax."""

    def __init__(self, dim: int, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, 0.25
        self.proj_linear: Any
        self.proj_bn: Any
        self.proj_lif: Any
        for name in ("q", "k", "v", "proj"):
            setattr(self, f"{name}_linear", nn.Linear(dim, dim))
            setattr(self, f"{name}_bn", nn.BatchNorm1d(dim))
            setattr(self, f"{name}_lif", lif())
        self.attn_lif = lif(0.5)

    def heads(self, name: str, x: Tensor, T: int, B: int, N: int, C: int) -> Tensor:
        out = getattr(self, f"{name}_linear")(x)
        out = getattr(self, f"{name}_bn")(out.transpose(-1, -2)).transpose(-1, -2).reshape(T, B, N, C).contiguous()
        out = getattr(self, f"{name}_lif")(out)
        return out.reshape(T, B, N, self.num_heads, C // self.num_heads).permute(0, 1, 3, 2, 4).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        T, B, N, C = x.shape
        x_for_qkv = x.flatten(0, 1)
        q, k, v = (self.heads(name, x_for_qkv, T, B, N, C) for name in ("q", "k", "v"))
        attn = (q @ k.transpose(-2, -1)) * self.scale
        x = (attn @ v).transpose(2, 3).reshape(T, B, N, C).contiguous()
        x = self.attn_lif(x).flatten(0, 1)
        x = self.proj_bn(self.proj_linear(x).transpose(-1, -2)).transpose(-1, -2).reshape(T, B, N, C)
        return self.proj_lif(x)


class SPS(nn.Module):
    """Patches: convolution, norm, neurons and pools, with a positional convolution."""

    def __init__(self, in_channels: int, embed_dims: int) -> None:
        super().__init__()
        self.proj_conv, self.proj_bn, self.proj_lif = (
            nn.Conv2d(in_channels, embed_dims, 3, 1, 1, bias=False),
            nn.BatchNorm2d(embed_dims),
            lif(),
        )
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.rpe_conv, self.rpe_bn, self.rpe_lif = (
            nn.Conv2d(embed_dims, embed_dims, 3, 1, 1, bias=False),
            nn.BatchNorm2d(embed_dims),
            lif(),
        )

    def forward(self, x: Tensor) -> Tensor:
        T, B, _, H, W = x.shape
        x = self.proj_conv(x.flatten(0, 1))
        x = self.proj_bn(x).reshape(T, B, -1, H, W).contiguous()
        x = self.maxpool(self.proj_lif(x).flatten(0, 1).contiguous())
        x_feat = x.reshape(T, B, -1, H // 2, W // 2).contiguous()
        x = self.rpe_bn(self.rpe_conv(x)).reshape(T, B, -1, H // 2, W // 2).contiguous()
        x = self.rpe_lif(x) + x_feat
        return x.flatten(-2).transpose(-1, -2)


class Block(nn.Module):
    def __init__(self, dim: int, attention: Any) -> None:
        super().__init__()
        self.attn, self.mlp = attention(dim), MLP(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class Spikformer(nn.Module):
    """A static image for T steps, blocks, the mean over tokens, the head, the mean over time."""

    def __init__(self, T: int = 4, dim: int = 32, depths: int = 2, attention: Any = SSA) -> None:
        super().__init__()
        self.T = T
        self.patch_embed = SPS(3, dim)
        self.block = nn.ModuleList([Block(dim, attention) for _ in range(depths)])
        self.head = nn.Linear(dim, 10)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for blk in self.block:
            x = blk(x)
        return x.mean(2)

    def forward(self, x: Tensor) -> Tensor:
        x = (2 * x.unsqueeze(0)).repeat(self.T, 1, 1, 1, 1)
        return self.head(self.forward_features(x).mean(0))


class TokenQKAttention(nn.Module):
    """A mask of tokens from the sum of the queries, applied to the keys."""

    def __init__(self, dim: int, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_conv, self.q_bn, self.q_lif = nn.Conv1d(dim, dim, 1, bias=False), nn.BatchNorm1d(dim), lif()
        self.k_conv, self.k_bn, self.k_lif = nn.Conv1d(dim, dim, 1, bias=False), nn.BatchNorm1d(dim), lif()
        self.attn_lif = lif(0.5)
        self.proj_conv, self.proj_bn, self.proj_lif = nn.Conv1d(dim, dim, 1), nn.BatchNorm1d(dim), lif()

    def forward(self, x: Tensor) -> Tensor:
        T, B, N, C = x.shape
        x_for_qkv = x.transpose(-1, -2).flatten(0, 1)
        q = self.q_lif(self.q_bn(self.q_conv(x_for_qkv)).reshape(T, B, C, N))
        q = q.unsqueeze(2).reshape(T, B, self.num_heads, C // self.num_heads, N)
        k = self.k_lif(self.k_bn(self.k_conv(x_for_qkv)).reshape(T, B, C, N))
        k = k.unsqueeze(2).reshape(T, B, self.num_heads, C // self.num_heads, N)
        q = torch.sum(q, dim=3, keepdim=True)
        attn = self.attn_lif(q)
        x = torch.mul(attn, k).flatten(2, 3).flatten(0, 1)
        x = self.proj_bn(self.proj_conv(x)).reshape(T, B, C, N).contiguous()
        return self.proj_lif(x).transpose(-1, -2)


class DrivenAttention(nn.Module):
    """Keys times values, summed over tokens, spiking, times queries; membrane shortcuts around it."""

    def __init__(self, dim: int, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.shortcut_lif = num_heads, lif()
        self.qkv = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, dim, 1, bias=False), nn.BatchNorm2d(dim)) for _ in range(3)
        )
        self.qkv_lif = nn.ModuleList(lif() for _ in range(3))
        self.talking_heads_lif = lif(0.5)
        self.proj_conv, self.proj_bn = nn.Conv2d(dim, dim, 1), nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        T, B, C, H, W = x.shape
        identity = x
        N = H * W
        x_for_qkv = self.shortcut_lif(x).flatten(0, 1)
        q, k, v = (
            spikes(conv(x_for_qkv).reshape(T, B, C, H, W).contiguous())
            .flatten(3)
            .transpose(-1, -2)
            .reshape(T, B, N, self.num_heads, C // self.num_heads)
            .permute(0, 1, 3, 2, 4)
            .contiguous()
            for conv, spikes in zip(self.qkv, self.qkv_lif, strict=True)
        )
        kv = self.talking_heads_lif(k.mul(v).sum(dim=-2, keepdim=True))
        x = q.mul(kv).transpose(3, 4).reshape(T, B, C, H, W).contiguous()
        x = self.proj_bn(self.proj_conv(x.flatten(0, 1))).reshape(T, B, C, H, W).contiguous()
        return x + identity


class SpikeDriven(nn.Module):
    """Event frames; convolutions, attention and convolutional MLPs with membrane shortcuts."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.conv, self.bn, self.lif = nn.Conv2d(2, dim, 3, 2, 1, bias=False), nn.BatchNorm2d(dim), lif()
        self.attn = nn.ModuleList(DrivenAttention(dim) for _ in range(2))
        self.fc1 = nn.Sequential(nn.Conv2d(dim, 2 * dim, 1), nn.BatchNorm2d(2 * dim))
        self.fc2 = nn.Sequential(nn.Conv2d(2 * dim, dim, 1), nn.BatchNorm2d(dim))
        self.mlp_lif1, self.mlp_lif2, self.head_lif, self.head = lif(), lif(), lif(), nn.Linear(dim, 10)

    def mlp(self, x: Tensor) -> Tensor:
        T, B, C, H, W = x.shape
        y = self.fc1(self.mlp_lif1(x).flatten(0, 1)).reshape(T, B, -1, H, W).contiguous()
        y = self.fc2(self.mlp_lif2(y).flatten(0, 1)).reshape(T, B, C, H, W).contiguous()
        return x + y

    def forward(self, x: Tensor) -> Tensor:
        T, B, _, H, W = x.shape
        x = self.bn(self.conv(2 * x.flatten(0, 1))).reshape(T, B, -1, H // 2, W // 2)
        for attn in self.attn:
            x = self.mlp(attn(x))
        x = x.flatten(3).mean(3)
        return self.head(self.head_lif(4 * x)).mean(0)


class ChunkedAttention(nn.Module):
    """Attention over the tokens of two neighbouring time steps at a time."""

    def __init__(self, dim: int, num_heads: int = 4, chunk: int = 2) -> None:
        super().__init__()
        self.num_heads, self.chunk = num_heads, chunk
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.q_lif, self.k_lif, self.v_lif, self.attn_lif, self.proj = (
            lif(0.3),
            lif(0.3),
            lif(0.3),
            lif(0.5),
            nn.Linear(dim, dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        T, B, N, C = x.shape
        head_dim = C // self.num_heads

        def split(y: Tensor) -> Tensor:
            y = y.reshape(T // self.chunk, self.chunk, B, N, self.num_heads, head_dim)
            return y.permute(0, 2, 4, 1, 3, 5).reshape(T // self.chunk, B, self.num_heads, self.chunk * N, head_dim)

        q, k, v = split(self.q_lif(self.q(x))), split(self.k_lif(self.k(x))), split(self.v_lif(self.v(x)))
        y = 0.25 * (q @ (k.transpose(-2, -1) @ v))
        y = y.reshape(T // self.chunk, B, self.num_heads, self.chunk, N, head_dim).permute(0, 3, 1, 4, 2, 5)
        return self.proj(self.attn_lif(y.reshape(T, B, N, C)))


def image(T: int) -> tuple[Tensor, ...]:
    return (2 * torch.rand(4, 3, 16, 16),)


ENTRIES = (
    Entry("Spikformer, two blocks", "Spikformer", Spikformer, image, 4),
    Entry("token attention", "QKFormer", lambda: Spikformer(attention=TokenQKAttention), image, 4),
    Entry(
        "spike-driven attention", "Spike-driven Transformer", SpikeDriven, rates(4, 2, 16, 16, rate=0.4), 4, other_T=6
    ),
    Entry("attention over pairs of steps", "STAtten", lambda: Spikformer(attention=ChunkedAttention), image, 4),
)

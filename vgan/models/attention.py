"""Self-attention over the positions of a feature map (N, C, H, W), and the layers built on it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgan.models.layers import PointwiseConv2d, init_conv


def default_heads(channels: int) -> int:
    """Return one head per 64 channels, or the next smaller number that divides the channels."""
    heads = max(1, channels // 64)
    while channels % heads:
        heads -= 1
    return heads


class SelfAttention2d(nn.Module):
    """Multi-head softmax attention between all H W positions of a feature map.

        q, k, v = W_q x, W_k x, W_v x;   y_i = W_o sum_j softmax_j(q_i . k_j / sqrt(d)) v_j

    (N, in_channels, H, W) -> (N, out_channels, H, W). q and k have unit root mean square and a
    learned gain per head, so that logits stay bounded in networks without normalisation (Dehghani
    et al. 2023). On a GPU the fused kernels of torch avoid storing the H W x H W matrix.

    Cost: 3 C^2 + C out_channels multiply-adds per position for the projections and 2 (H W) C for
    the products: negligible at 8 px, equal at 16 px with C = 128, four times as much at 32 px.

    Sources: Vaswani et al. 2017; for images Zhang et al. 2018, "Self-attention generative
    adversarial networks".
    """

    def __init__(self, in_channels: int, out_channels: int, num_heads: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads or default_heads(in_channels)
        if in_channels % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads}: must divide in_channels={in_channels}")
        self.to_qkv = init_conv(PointwiseConv2d(in_channels, 3 * in_channels, bias=False), gain=1)
        self.query_gain = nn.Parameter(torch.ones(self.num_heads, 1, 1))
        self.to_out = init_conv(PointwiseConv2d(in_channels, out_channels, bias=False), gain=1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        q, k, v = self._queries_keys_values(x)
        y = _attend(q, k, v).transpose(1, 2)  # (N, H W, heads, d)
        return self.to_out(y.reshape(n, height, width, c).permute(0, 3, 1, 2))  # channels-last

    def weights(self, x: Tensor, query: Tensor | None = None) -> Tensor:
        """Return the attention weights (N, heads, H W, H W), rows sum to 1. Not for training.

        With `query`, an index (N,) of positions, return their rows alone, (N, heads, 1, H W).
        """
        q, k, _ = self._queries_keys_values(x)
        if query is not None:
            q = q[torch.arange(len(q), device=q.device), :, query][:, :, None]
        return ((q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-1, -2)).softmax(-1)

    def _queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v, each (N, heads, H W, d)."""
        qkv = self.to_qkv(x).flatten(2).transpose(1, 2)  # (N, H W, 3 C)
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (F.rms_norm(t, t.shape[-1:]) for t in (q, k))  # float32 under autocast
        return (q * self.query_gain).to(v.dtype), k.to(v.dtype), v


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v over the last two dimensions (positions, d)."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    # On a CPU in bf16, torch's fused kernel is 5 times slower at 64 positions, 3 times at 256.
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v


class GatedSelfAttention(nn.Module):
    """x + gate SelfAttention2d(x); the gate per channel starts at 0 (Zhang et al. 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = SelfAttention2d(channels, channels)
        self.gate = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate.to(x.dtype) * self.attention(x)


class AdaptiveAttention2d(nn.Module):
    """The input multiplied by its own attention through a learned gate per position.

        y = P x * (1 + tanh(W_g x) * A(x))

    A is `SelfAttention2d`. P is the identity, or a 1x1 convolution where the widths differ. The
    gate has one value per position and head and starts at exactly 0, so the layer starts as P.
    (N, in_channels, H, W) -> (N, out_channels, H, W).

    Cost: that of `SelfAttention2d` plus in_channels heads multiply-adds per position.

    Sources: the gate of Zhang et al. 2018 (SAGAN), made position-dependent as in attention gates
    (Oktay et al. 2018) and multiplicative as in squeeze and excitation (Hu et al. 2018).
    """

    def __init__(self, in_channels: int, out_channels: int, num_heads: int | None = None) -> None:
        super().__init__()
        self.attention = SelfAttention2d(in_channels, out_channels, num_heads)
        groups = math.gcd(self.attention.num_heads, out_channels)
        self.to_gate = nn.Conv2d(in_channels, groups, 1)
        for parameter in self.to_gate.parameters():
            nn.init.zeros_(parameter)
        self.project: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.project = init_conv(PointwiseConv2d(in_channels, out_channels, bias=False), gain=1)

    def forward(self, x: Tensor) -> Tensor:
        attended = self.attention(x)
        channels_per_gate = attended.shape[1] // self.to_gate.out_channels
        gate = self.gates(x).repeat_interleave(channels_per_gate, dim=1)
        return self.project(x) * (1 + gate * attended)

    def gates(self, x: Tensor) -> Tensor:
        """Return the gate of each position (N, groups of channels, H, W) in (-1, 1)."""
        return self.to_gate(x).tanh()


def attention_layer(kind: str, channels: int) -> nn.Module:
    """Return the attention layer of `kind`: 'none' (identity), 'self' or 'adaptive'."""
    if kind == "none":
        return nn.Identity()
    if kind == "self":
        return GatedSelfAttention(channels)
    if kind == "adaptive":
        return AdaptiveAttention2d(channels, channels)
    raise ValueError(f"attention={kind}: unknown; use none, self or adaptive")

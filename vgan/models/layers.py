"""The building blocks: convolutions, activations, resampling, attention. Feature maps are (N, C, H, W).

The networks carry no normalisation. Convolutions have no bias; biases live in `BiasLeakyReLU`, so that everything
between two activations is linear. The discriminator relies on that: its directional derivative needs one extra rule,
for the activation, and none for the convolutions (see `Discriminator.jvp`).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LEAK = 0.2  # slope of every leaky ReLU below zero
_GAIN = math.sqrt(2 / (1 + LEAK**2))  # keeps the variance through a leaky ReLU (He et al. 2015)


def init_conv(conv: nn.Conv2d, gain: float = _GAIN) -> nn.Conv2d:
    """Weights ~ N(0, (gain^2 / fan_in)), bias 0; returns `conv`."""
    fan_in = conv.weight[0].numel()
    nn.init.normal_(conv.weight, std=gain / math.sqrt(fan_in))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def count_stages(
    img_resolution: int, img_channels: int, widths: Sequence[int], patch_size: int
) -> int:
    """The number of stages from 4 px to img_resolution / patch_size; raises ValueError where sizes do not fit together."""
    if img_resolution not in (16, 32, 64, 128, 256):
        raise ValueError(f"img_resolution={img_resolution}: must be a power of two from 16 to 256")
    if img_channels not in (1, 3):
        raise ValueError(f"img_channels={img_channels}: must be 1 (grey) or 3 (RGB)")
    if patch_size not in (1, 2, 4):
        raise ValueError(f"patch_size={patch_size}: must be 1, 2 or 4")
    finest = img_resolution // patch_size
    stages = int(math.log2(finest)) - 1
    if len(widths) < stages:
        raise ValueError(
            f"widths={list(widths)}: {finest} px needs {stages} of them, from 4 px up; add {stages - len(widths)}"
        )
    return stages


class ConvToPixels(nn.Sequential):
    """The last layer of a generator: (N, channels, H, W) -> (N, img_channels, H patch_size, W patch_size).

    Sub-pixel convolution (Shi et al. 2016). The pixels of a block start with equal weights, so that training does not begin
    from a checkerboard (Aitken et al. 2017), and a [1, 2, 1] filter, which is 0 at that frequency, keeps it from growing
    later: it was plain to see in the grounds of the embedded shapes.
    """

    def __init__(self, channels: int, img_channels: int, patch_size: int) -> None:
        conv = init_conv(nn.Conv2d(channels, img_channels * patch_size**2, 3, padding=1), gain=1)
        with torch.no_grad():
            conv.weight.copy_(conv.weight[:img_channels].repeat_interleave(patch_size**2, dim=0))
        super().__init__(conv, *([nn.PixelShuffle(patch_size), Smooth()] if patch_size > 1 else []))


class Smooth(nn.Module):
    """The filter [1, 2, 1] in both directions, the border repeated. Shape kept."""

    def forward(self, x: Tensor) -> Tensor:
        ones = x.new_ones(
            2
        )  # not a constant, which a traced program would keep on the device of its tracing
        taps = (F.pad(ones, (0, 1)) + F.pad(ones, (1, 0))) / 4
        kernel = (taps[:, None] * taps[None, :]).expand(x.shape[1], 1, 3, 3)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=x.shape[1])


class SeparableConv2d(nn.Module):
    """A depthwise-separable convolution: one k x k filter for every channel, then a 1x1 mixing of the channels.

        y[o] = sum_i W[o, i] (K[i] * x[i])  (+ b[o])

    (N, in_channels, H, W) -> (N, out_channels, H', W') with H' = (H + 2 padding - kernel_size) // stride + 1.

    group_width > 1 gives each filter so many channels to read (grouped convolution).

    Cost for each output pixel: in_channels (k^2 group_width + out_channels) multiply-adds and as many weights, against
    in_channels out_channels k^2 for the dense convolution: depthwise, about k^2 = 9 times less at equal width. It is quick in
    channels-last memory only: measured on two CPU cores, 128 channels at 8 px, the depthwise half takes 65 times longer
    in NCHW.

    Source: Sifre 2014; Chollet 2017, "Xception: deep learning with depthwise separable convolutions".
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 1,
        bias: bool = True,
        group_width: int = 1,
    ) -> None:
        super().__init__()
        groups = in_channels // group_width
        self.depthwise = init_conv(
            nn.Conv2d(
                in_channels, in_channels, kernel_size, stride, padding, groups=groups, bias=False
            ),
            gain=1,
        )
        self.pointwise = init_conv(nn.Conv2d(in_channels, out_channels, 1, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


def conv3x3(kind: str, in_channels: int, out_channels: int) -> nn.Module:
    """The one switch between `model=conv` and `model=sep`: kind is 'dense', 'separable', 'grouped' (16 channels, or 8 where
    the width is no multiple of 16, then 1x1) or 'pointwise' (1x1)."""
    if kind == "separable":
        return SeparableConv2d(in_channels, out_channels, bias=False)
    if kind == "grouped":
        return SeparableConv2d(
            in_channels, out_channels, bias=False, group_width=math.gcd(in_channels, 16)
        )
    if kind == "dense":
        return init_conv(nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False))
    if kind == "pointwise":
        return init_conv(nn.Conv2d(in_channels, out_channels, 1, bias=False))
    raise ValueError(f"conv={kind}: unknown; use dense, grouped, separable or pointwise")


class BiasLeakyReLU(nn.Module):
    """leaky_relu(x + bias), a bias for every channel. Shape kept.

    With `pairs` the batch holds values in its first half and tangents in its second: a tangent is multiplied by the
    slope that its value meets.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, pairs: bool = False) -> Tensor:
        bias = self.bias.to(x.dtype)[:, None, None]
        if not pairs:
            return F.leaky_relu_(x + bias, LEAK)
        if not torch.compiler.is_compiling():
            return _ActivatedPairs.apply(x, bias)
        # Written so that a compiler fuses it; one multiplication by a constant is all that autograd sees.
        with torch.no_grad():
            slope = torch.where(x[: len(x) // 2] + bias > 0, 1.0, LEAK).to(x.dtype)
            slope = torch.cat([slope, slope])
            is_value = torch.ones(len(x), 1, 1, 1, device=x.device, dtype=x.dtype)
            is_value[len(x) // 2 :] = 0
        return torch.addcmul(x, is_value, bias) * slope


class _ActivatedPairs(torch.autograd.Function):
    """leaky_relu(x + bias) for values (first half of the batch) and tangents (second), in as few passes as plain torch has.

    Halves are written in place, and the sign of the result stands for the sign of the input: 1.2 instead of 7.4 ms,
    forward and backward, for 128 maps of 128 channels at 16 px in bf16 on two CPU cores.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        n, y = len(x) // 2, torch.empty_like(x)
        value = torch.add(x[:n], bias, out=y[:n])
        F.leaky_relu_(value, LEAK)
        _times_slope(x[n:], value, y[n:])
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (y,) = ctx.saved_tensors
        n, grad_x = len(y) // 2, torch.empty_like(y)
        for half in (slice(0, n), slice(n, None)):
            _times_slope(grad[half], y[:n], grad_x[half])
        return grad_x, grad_x[:n].sum((0, 2, 3))[:, None, None]


def _times_slope(x: Tensor, result: Tensor, out: Tensor) -> None:
    """out <- x times the slope of the leaky ReLU that gave `result`."""
    torch.ops.aten.leaky_relu_backward.grad_input(x, result, LEAK, True, grad_input=out)


class ResidualBlock(nn.Module):
    """x + conv_b(act(conv_a(act(x)))): two 3x3 convolutions, `expansion` times wider between them. Shape kept.

    The last convolution starts at zero, the other is scaled down with the number of residual blocks, which replaces
    normalisation (Zhang et al. 2019, "Fixup initialization"). `fuse_depthwise` sets whether activation and depthwise
    convolution are one operator.
    """

    def __init__(
        self,
        channels: int,
        conv: str,
        expansion: int,
        num_blocks: int,
        second_conv: str | None = None,
    ) -> None:
        super().__init__()
        hidden = channels * expansion
        self.fused = False
        self.act_a = BiasLeakyReLU(channels)
        self.conv_a = conv3x3(conv, channels, hidden)
        self.act_b = BiasLeakyReLU(hidden)
        self.conv_b = conv3x3(second_conv or conv, hidden, channels)
        with torch.no_grad():
            last_layer(self.conv_a).weight.mul_(num_blocks**-0.5)
            last_layer(self.conv_b).weight.zero_()

    def forward(self, x: Tensor, pairs: bool = False) -> Tensor:
        h = self._activate_and_convolve(self.act_a, self.conv_a, x, pairs)
        return self._activate_and_convolve(self.act_b, self.conv_b, h, pairs).add_(
            x
        )  # in place: one map less to write

    def _activate_and_convolve(
        self, act: BiasLeakyReLU, conv: nn.Module, x: Tensor, pairs: bool
    ) -> Tensor:
        if not (
            self.fused and isinstance(conv, SeparableConv2d) and conv.depthwise.weight.shape[1] == 1
        ):
            return conv(act(x, pairs))
        from vgan.models.triton_kernels import (
            activated_depthwise,  # needs Triton, which not every machine has
        )

        return conv.pointwise(activated_depthwise(x, act.bias, conv.depthwise.weight, LEAK, pairs))


def fuse_depthwise(network: nn.Module, fused: bool = True) -> None:
    """Let every residual block run activation and depthwise convolution as one Triton operator, or not. Weights stay as they are.

    For NVIDIA GPUs with Triton; the operator can be differentiated once, which excludes penalty=double_backward.
    """
    for block in network.modules():
        if isinstance(block, ResidualBlock):
            block.fused = fused


def run_layer(layer: nn.Module, x: Tensor, gradient_checkpointing: bool, *arguments: Any) -> Tensor:
    """layer(x, *arguments), whose inner features are kept for the backward pass or, with gradient_checkpointing, worked out again there."""
    if gradient_checkpointing and torch.is_grad_enabled():
        return checkpoint(layer, x, *arguments, use_reentrant=False, preserve_rng_state=False)
    return layer(x, *arguments)


def last_layer(conv: nn.Module) -> nn.Conv2d:
    """The convolution that decides the scale of a dense or separable convolution's output."""
    layer = conv.pointwise if isinstance(conv, SeparableConv2d) else conv
    assert isinstance(layer, nn.Conv2d)
    return layer


def upsample2x(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, 2H, 2W) by the antialiasing filter [1, 3, 3, 1] (bilinear)."""
    return _Upsample2x.apply(x) if torch.compiler.is_compiling() else _bilinear2x(x)


def _bilinear2x(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class _Upsample2x(torch.autograd.Function):
    """Bilinear upsampling with its backward as a sum of slices: the compiler fuses it, where its own scatters with atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _bilinear2x(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Pixel i went with 3/4 to 2i and 2i + 1, with 1/4 to their outer neighbours; at the border these are themselves.
        for dim in (2, 3):
            n = grad.shape[dim] // 2
            even, odd = grad.unflatten(dim, (n, 2)).unbind(dim + 1)
            before = torch.cat([even.narrow(dim, 0, 1), odd.narrow(dim, 0, n - 1)], dim)
            after = torch.cat([even.narrow(dim, 1, n - 1), odd.narrow(dim, n - 1, 1)], dim)
            grad = 0.75 * (even + odd) + 0.25 * (before + after)
        return grad


def downsample2x(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, H/2, W/2) by averaging 2x2 pixels.

    The wider [1, 3, 3, 1] filter as a strided depthwise convolution was measured too: its backward alone took 60 % of a
    discriminator step on two CPU cores in bf16.
    """
    return F.avg_pool2d(x, 2)


def usual_heads(channels: int) -> int:
    """One head for every 64 channels, or as many fewer as divide them."""
    return next(heads for heads in range(max(1, channels // 64), 0, -1) if channels % heads == 0)


class SelfAttention2d(nn.Module):
    """Every position looks at every other: multi-head softmax attention over the H W positions of a feature map.

        q, k, v = W_q x, W_k x, W_v x;   y_i = W_o sum_j softmax_j(q_i . k_j / sqrt(d)) v_j

    (N, in_channels, H, W) -> (N, out_channels, H, W). q and k are scaled to unit root-mean-square, with a learned
    gain a head, so that the logits stay bounded in networks without normalisation (Dehghani et al. 2023). On a GPU
    torch's fused scaled-dot-product kernels do the rest, so the H W x H W matrix is never stored.

    Cost: 3 C^2 + C out_channels multiply-adds a position for the projections, 2 (H W) C for looking around: negligible
    at 8 px, as much as the projections at 16 px with C = 128, four times that at 32 px.

    Source: Vaswani et al. 2017; for images Zhang et al. 2018, "Self-attention generative adversarial networks".
    """

    def __init__(self, in_channels: int, out_channels: int, num_heads: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads or usual_heads(in_channels)
        if in_channels % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads}: must divide in_channels={in_channels}")
        self.to_qkv = init_conv(nn.Conv2d(in_channels, 3 * in_channels, 1, bias=False), gain=1)
        self.query_gain = nn.Parameter(torch.ones(self.num_heads, 1, 1))
        self.to_out = init_conv(nn.Conv2d(in_channels, out_channels, 1, bias=False), gain=1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        q, k, v = self._queries_keys_values(x)
        y = _attend(q, k, v)
        y = (
            y.transpose(1, 2).reshape(n, height, width, c).permute(0, 3, 1, 2)
        )  # channels-last, as it came in
        return self.to_out(y)

    def weights(self, x: Tensor) -> Tensor:
        """Where each position looks: (N, heads, H W, H W), rows of positive numbers with sum 1; not for training."""
        q, k, _ = self._queries_keys_values(x)
        return ((q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-1, -2)).softmax(-1)

    def _queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each (N, heads, H W, d)."""
        qkv = self.to_qkv(x).flatten(2).transpose(1, 2)  # (N, H W, 3 C)
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (F.rms_norm(t, t.shape[-1:]) for t in (q, k))  # autocast may make these float32
        return (q * self.query_gain).to(v.dtype), k.to(v.dtype), v


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the last two dimensions (positions, d)."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    # torch's fused kernel for CPUs took 5 times as long in bf16, forward and backward, at 64 positions, 3 times at 256
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v


class AdaptiveAttention2d(nn.Module):
    """The input modulated by its own attention, through a learned gate that starts closed.

        y = P x * (1 + tanh(W_g x) * A(x))

    A is `SelfAttention2d`; P the identity, or a 1x1 convolution where the widths differ. The gate tanh(W_g x), one value a
    position and head of channels, starts at exactly 0, so that the layer begins as P and the network decides
    where attention acts and with which sign. (N, in_channels, H, W) -> (N, out_channels, H, W).

    Cost: that of `SelfAttention2d` and in_channels heads multiply-adds a position.

    Source: the gate of Zhang et al. 2018 (SAGAN), made a function of the position as in attention gates (Oktay et al.
    2018), acting multiplicatively as in squeeze and excitation (Hu et al. 2018).
    """

    def __init__(self, in_channels: int, out_channels: int, num_heads: int | None = None) -> None:
        super().__init__()
        self.attention = SelfAttention2d(in_channels, out_channels, num_heads)
        groups = math.gcd(self.attention.num_heads, out_channels)
        self.to_gate = nn.Conv2d(in_channels, groups, 1)
        nn.init.zeros_(self.to_gate.weight)
        nn.init.zeros_(self.to_gate.bias)  # type: ignore[arg-type]
        same = in_channels == out_channels
        self.project = (
            nn.Identity()
            if same
            else init_conv(nn.Conv2d(in_channels, out_channels, 1, bias=False), gain=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        looked = self.attention(x)
        gate = self.gates(x).repeat_interleave(looked.shape[1] // self.to_gate.out_channels, dim=1)
        return self.project(x) * (1 + gate * looked)

    def gates(self, x: Tensor) -> Tensor:
        """How far each position is open to its attention: (N, groups of channels, H, W) in (-1, 1)."""
        return self.to_gate(x).tanh()

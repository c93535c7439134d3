"""Convolutions, activations, resampling and residual blocks. Feature maps are (N, C, H, W).

The networks have no normalisation. Convolutions have no bias; biases are part of `BiasLeakyReLU`,
so that everything between two activations is linear. `Discriminator.jvp` relies on this: only the
activation needs a rule for tangents.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LEAK = 0.2  # slope of every leaky ReLU below zero
_GAIN = math.sqrt(2 / (1 + LEAK**2))  # keeps the variance through a leaky ReLU (He et al. 2015)


def init_normal(weight: Tensor, std: float) -> None:
    """Initialise weights ~ N(0, std^2), except on the meta device, where torch imports for 4 s."""
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)


def init_conv(conv: nn.Conv2d, gain: float = _GAIN) -> nn.Conv2d:
    """Initialise weights ~ N(0, gain^2 / fan_in) and bias 0; return `conv`."""
    fan_in = conv.weight[0].numel()
    init_normal(conv.weight, gain / math.sqrt(fan_in))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution: (N, in_channels, H, W) -> (N, out_channels, H, W).

    With `as_matmul` it is one product of (N H W, in_channels) with the weights; channels-last maps
    are such matrices already. See `select_pointwise`.
    """

    as_matmul = False

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if not self.as_matmul:
            return super().forward(x)
        y = F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)
        return y.permute(0, 3, 1, 2)


def select_pointwise(network: nn.Module, as_matmul: bool) -> None:
    """Select how 1x1 convolutions run: as matrix products, or as convolutions."""
    for layer in network.modules():
        if isinstance(layer, PointwiseConv2d):
            layer.as_matmul = as_matmul


class ConvToPixels(nn.Sequential):
    """The end of a generator: (N, C, H, W) -> (N, img_channels, H patch_size, W patch_size).

    Sub-pixel convolution (Shi et al. 2016). The pixels of a patch start with equal weights, so that
    training does not start from a checkerboard (Aitken et al. 2017). A [1, 2, 1] filter, which is 0
    at the checkerboard's frequency, suppresses it later; it was visible in plain backgrounds.

    Larger patches than 2 are not drawn at once: at 4, plain areas were covered with dots. A third
    of the channels is upsampled, and an activation follows, until patches of 2 remain.
    """

    def __init__(self, channels: int, img_channels: int, patch_size: int) -> None:
        layers: list[nn.Module] = []
        while patch_size > 2:
            thin = max(8, channels // 3)
            mix = init_conv(PointwiseConv2d(channels, thin, bias=False), gain=1)
            layers += [mix, Upsample2x(), BiasLeakyReLU(thin)]
            channels, patch_size = thin, patch_size // 2
        conv = init_conv(nn.Conv2d(channels, img_channels * patch_size**2, 3, padding=1), gain=1)
        with torch.no_grad():
            conv.weight.copy_(conv.weight[:img_channels].repeat_interleave(patch_size**2, dim=0))
        layers.append(conv)
        if patch_size > 1:
            layers += [nn.PixelShuffle(patch_size), Smooth()]
        super().__init__(*layers)


class Smooth(nn.Module):
    """The filter [1, 2, 1] / 4 in both directions, with replicated borders. Keeps the shape.

    Returns float32 for half precision. Shifted copies take 0.6 of the time of a depthwise
    convolution of three channels (bf16, a CPU core). F.pad(mode="replicate") fails when compiled:
    the layout of its gradient is not what torch 2.15 expects.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        for dim in (2, 3):
            n = x.shape[dim]
            padded = torch.cat([x.narrow(dim, 0, 1), x, x.narrow(dim, n - 1, 1)], dim)
            x = 0.5 * x + 0.25 * (padded.narrow(dim, 0, n) + padded.narrow(dim, 2, n))
        return x


class SeparableConv2d(nn.Module):
    """Depthwise-separable convolution: a k x k filter per channel, then a 1x1 convolution.

        y[o] = sum_i W[o, i] (K[i] * x[i])  (+ b[o])

    (N, in_channels, H, W) -> (N, out_channels, H', W'), H' = (H + 2 padding - kernel_size) //
    stride + 1. group_width: input channels per filter (1: depthwise, more: grouped convolution).

    Cost: in_channels (k^2 group_width + out_channels) multiply-adds per output pixel, against
    in_channels out_channels k^2 of a dense convolution. It is fast in channels-last memory only:
    for 128 channels at 8 px on two CPU cores the depthwise part is 65 times slower in NCHW.

    Sources: Sifre 2014; Chollet 2017, "Xception: deep learning with depthwise separable
    convolutions".
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
        depthwise = nn.Conv2d(
            in_channels, in_channels, kernel_size, stride, padding, groups=groups, bias=False
        )
        self.depthwise = init_conv(depthwise, gain=1)
        self.pointwise = init_conv(PointwiseConv2d(in_channels, out_channels, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


def conv3x3(kind: str, in_channels: int, out_channels: int) -> nn.Module:
    """Return a convolution of `kind`: 'dense', 'separable', 'grouped' or 'pointwise'.

    'grouped' has groups of 16 channels, or of gcd(in_channels, 16), then 1x1. 'pointwise' is 1x1.
    """
    if kind == "separable":
        return SeparableConv2d(in_channels, out_channels, bias=False)
    if kind == "grouped":
        group_width = math.gcd(in_channels, 16)
        return SeparableConv2d(in_channels, out_channels, bias=False, group_width=group_width)
    if kind == "dense":
        return init_conv(nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False))
    if kind == "pointwise":
        return init_conv(PointwiseConv2d(in_channels, out_channels, bias=False))
    raise ValueError(f"conv={kind}: unknown; use dense, grouped, separable or pointwise")


class BiasLeakyReLU(nn.Module):
    """leaky_relu(x + bias) with one bias per channel. Keeps the shape.

    With `pairs` the batch holds values in its first half and tangents in its second half. A tangent
    is multiplied by the slope at its value.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, pairs: bool = False) -> Tensor:
        bias = self.bias.to(x.dtype)[:, None, None]
        if not pairs:
            return F.leaky_relu_(x + bias, LEAK)
        if torch.compiler.is_compiling():
            return _FusedPairs.apply(x, bias)
        return _ActivatedPairs.apply(x, bias)


class _ActivatedPairs(torch.autograd.Function):
    """leaky_relu(x + bias) for values (first half) and tangents (second half), in few passes.

    The halves are written in place, and the sign of the result replaces that of the input: 1.2
    instead of 7.4 ms, forward and backward, for 128 maps of 128 channels at 16 px in bf16 on two
    CPU cores.
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


class _FusedPairs(torch.autograd.Function):
    """The same without writing in place, so that a compiler fuses each pass into one kernel.

    What is saved is the result, which the next convolution saves as well.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        n = len(x) // 2
        value = F.leaky_relu(x[:n] + bias, LEAK)
        y = torch.cat([value, x[n:] * _slope(value)])
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (y,) = ctx.saved_tensors
        n = len(y) // 2
        slope = _slope(y[:n])
        grad_x = grad * torch.cat([slope, slope])
        return grad_x, grad_x[:n].sum((0, 2, 3))[:, None, None]


def _slope(result: Tensor) -> Tensor:
    """Return the slope of the leaky ReLU that returned `result`."""
    return torch.where(result > 0, 1.0, LEAK).to(result.dtype)


def _times_slope(x: Tensor, result: Tensor, out: Tensor) -> None:
    """Write x times the slope of the leaky ReLU that returned `result` into `out`."""
    torch.ops.aten.leaky_relu_backward.grad_input(x, result, LEAK, True, grad_input=out)


class ResidualBlock(nn.Module):
    """x + conv_b(act(conv_a(act(x)))), with `expansion` times more channels between the two.

    Keeps the shape. Instead of normalisation, conv_b starts at zero and conv_a is scaled down by
    the number of residual blocks (Zhang et al. 2019, "Fixup initialization"). `fuse_depthwise`
    selects whether activation and depthwise convolution are one operator.
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
        h = self._activate_and_convolve(self.act_b, self.conv_b, h, pairs)
        return h.add_(x)  # in place saves one feature map

    def _activate_and_convolve(
        self, act: BiasLeakyReLU, conv: nn.Module, x: Tensor, pairs: bool
    ) -> Tensor:
        if not self.fused or not isinstance(conv, SeparableConv2d):
            return conv(act(x, pairs))
        kernel = conv.depthwise.weight
        if kernel.shape[1] != 1:  # grouped
            return conv(act(x, pairs))
        # Imported here because Triton is not available on every machine.
        from vgan.models.triton_kernels import activated_depthwise

        return conv.pointwise(activated_depthwise(x, act.bias, kernel, LEAK, pairs))


def fuse_depthwise(network: nn.Module, fused: bool = True) -> None:
    """Select whether activation and depthwise convolution run as one Triton operator.

    For NVIDIA GPUs with Triton. Weights do not change. The operator can be differentiated once,
    which excludes penalty=double_backward.
    """
    for block in network.modules():
        if isinstance(block, ResidualBlock):
            block.fused = fused


def run_layer(layer: nn.Module, x: Tensor, gradient_checkpointing: bool, *arguments: Any) -> Tensor:
    """Return layer(x, *arguments), with or without storing inner features for backward."""
    if gradient_checkpointing and torch.is_grad_enabled():
        return checkpoint(layer, x, *arguments, use_reentrant=False, preserve_rng_state=False)
    return layer(x, *arguments)


def last_layer(conv: nn.Module) -> nn.Conv2d:
    """Return the last convolution of a dense or separable convolution; it sets the scale."""
    layer = conv.pointwise if isinstance(conv, SeparableConv2d) else conv
    assert isinstance(layer, nn.Conv2d)
    return layer


def upsample2x(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, 2H, 2W) with the antialiasing filter [1, 3, 3, 1] (bilinear)."""
    return _Upsample2x.apply(x) if torch.compiler.is_compiling() else _bilinear2x(x)


class Upsample2x(nn.Module):
    """`upsample2x` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return upsample2x(x)


def _bilinear2x(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class _Upsample2x(torch.autograd.Function):
    """Bilinear upsampling of two passes that a compiler fuses.

    Compiled, `F.interpolate` writes two float32 maps in NCHW, and its backward pass scatters with
    atomics.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        index = []
        for size in x.shape[2:]:
            i = torch.arange(2 * size, device=x.device)
            near = i // 2
            index.append((near, (near + 2 * (i % 2) - 1).clamp(0, size - 1)))
        (near_y, far_y), (near_x, far_x) = index
        x = x.permute(0, 2, 3, 1)  # contiguous, as its result will be
        x = 0.75 * x[:, near_y] + 0.25 * x[:, far_y]
        x = 0.75 * x[:, :, near_x] + 0.25 * x[:, :, far_x]
        return x.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Pixel i contributes 3/4 to 2i and 2i + 1 and 1/4 to their outer neighbours. At the border
        # the outer neighbour is the pixel itself.
        for dim in (2, 3):
            n = grad.shape[dim] // 2
            even, odd = grad.unflatten(dim, (n, 2)).unbind(dim + 1)
            before = torch.cat([even.narrow(dim, 0, 1), odd.narrow(dim, 0, n - 1)], dim)
            after = torch.cat([even.narrow(dim, 1, n - 1), odd.narrow(dim, n - 1, 1)], dim)
            grad = 0.75 * (even + odd) + 0.25 * (before + after)
        return grad


def downsample2x(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, H/2, W/2) by averaging 2x2 pixels.

    The wider [1, 3, 3, 1] filter is too slow: its backward pass as a strided depthwise convolution
    took 60 % of a discriminator step on two CPU cores in bf16.
    """
    return F.avg_pool2d(x, 2)

"""Leaky ReLU with bias and a depthwise 3x3 convolution as one Triton operator for NVIDIA GPUs.

    y = K * leaky_relu(x + bias), one 3x3 filter per channel, zeros outside the map

Plain torch writes the activation to memory and reads it back, in both passes. Here it stays in
registers: the forward pass reads and writes one map, the backward pass reads two and writes one.
With `pairs` the batch holds values in its first half and tangents in its second half, as in
`vgan.models.layers.BiasLeakyReLU`.

Maps are channels-last. A program processes ROWS rows by CHANNELS channels and moves along the width
once. It loads each column once and adds it to the three outputs that depend on it, which are kept
in registers.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, CHANNELS = 4, 128  # of one tile
TILES = 8  # tiles per program of the backward pass, which limits the number of partial sums
TAPS = 9


def activated_depthwise(
    x: Tensor, bias: Tensor, weight: Tensor, leak: float, pairs: bool = False
) -> Tensor:
    """Return the convolution of the activation of x (N, C, H, W) in the type of x.

    bias (C,), weight (C, 1, 3, 3). Sums are in float32 (float64 for float64). Differentiable once,
    in x, bias and weight. torch.compile sees one operator, so graphs are not broken.
    """
    return _operator(x, bias, weight, leak, pairs)


@torch.library.custom_op("vgan::activated_depthwise", mutates_args=())
def _operator(x: Tensor, bias: Tensor, weight: Tensor, leak: float, pairs: bool) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty_like(x)
    rows, sizes = _sizes(x, pairs)
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(x.shape[1], CHANNELS))
    _forward_kernel[grid](x, bias, weight, y, rows, **sizes, LEAK=leak, PAIRS=pairs)
    return y


@torch.library.custom_op("vgan::activated_depthwise_backward", mutates_args=())
def _operator_backward(
    grad: Tensor, x: Tensor, bias: Tensor, weight: Tensor, leak: float, pairs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad, x = (t.contiguous(memory_format=torch.channels_last) for t in (grad, x))
    grad_x = torch.empty_like(x)
    rows, sizes = _sizes(x, pairs)
    channels = x.shape[1]
    programs = triton.cdiv(rows, ROWS * TILES)
    # One sum per program: atomic additions would differ from run to run.
    sums = torch.empty(programs, TAPS + 1, channels, device=x.device, dtype=_wide(x.dtype))
    grid = (programs, triton.cdiv(channels, CHANNELS))
    _backward_kernel[grid](
        grad, x, bias, weight, grad_x, sums, rows, **sizes, LEAK=leak, PAIRS=pairs, TILES=TILES
    )
    grad_weight = sums[:, :TAPS].sum(0).t().reshape(weight.shape)
    return grad_x, sums[:, TAPS].sum(0).to(bias.dtype), grad_weight.to(weight.dtype)


@_operator.register_fake
def _(x: Tensor, bias: Tensor, weight: Tensor, leak: float, pairs: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@_operator_backward.register_fake
def _(
    grad: Tensor, x: Tensor, bias: Tensor, weight: Tensor, leak: float, pairs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x, memory_format=torch.channels_last),
        torch.empty_like(bias),
        weight.new_empty(weight.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.leak, ctx.pairs = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *_operator_backward(grad, *ctx.saved_tensors, ctx.leak, ctx.pairs), None, None


_operator.register_autograd(_backward, setup_context=_setup_context)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sizes(x: Tensor, pairs: bool) -> tuple[int, dict[str, Any]]:
    """Return the number of rows of all images (for pairs: of the values) and the constants."""
    n, channels, height, width = x.shape
    wide = tl.float64 if x.dtype == torch.float64 else tl.float32
    sizes: dict[str, Any] = {"H": height, "W": width, "C": channels}
    sizes |= {"ROWS": ROWS, "CHANNELS": CHANNELS, "WIDE": wide}
    return (n // 2 if pairs else n) * height, sizes


@triton.jit
def _column(base, row, w, channel, keep, W: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr):
    """Load (ROWS, CHANNELS) of a map at column w; 0 where `keep` is false."""
    at = (row.to(tl.int64) * W + w) * C
    return tl.load(base + at[:, None] + channel[None, :], mask=keep, other=0.0).to(WIDE)


@triton.jit
def _put(base, row, w, channel, keep, value, W: tl.constexpr, C: tl.constexpr):
    at = (row.to(tl.int64) * W + w) * C
    tl.store(base + at[:, None] + channel[None, :], value.to(base.dtype.element_ty), mask=keep)


@triton.jit
def _tap(weight, channel, in_c, i: tl.constexpr, WIDE: tl.constexpr):
    return tl.load(weight + channel * 9 + i, mask=in_c, other=0.0).to(WIDE)[None, :]


@triton.jit
def _taps(w, channel, in_c, WIDE: tl.constexpr):
    """Load the nine taps of every channel's filter, each (1, CHANNELS), row by row."""
    k0 = _tap(w, channel, in_c, 0, WIDE)
    k1 = _tap(w, channel, in_c, 1, WIDE)
    k2 = _tap(w, channel, in_c, 2, WIDE)
    k3 = _tap(w, channel, in_c, 3, WIDE)
    k4 = _tap(w, channel, in_c, 4, WIDE)
    k5 = _tap(w, channel, in_c, 5, WIDE)
    k6 = _tap(w, channel, in_c, 6, WIDE)
    k7 = _tap(w, channel, in_c, 7, WIDE)
    k8 = _tap(w, channel, in_c, 8, WIDE)
    return k0, k1, k2, k3, k4, k5, k6, k7, k8


@triton.jit
def _forward_kernel(
    x, bias, weight, y, rows, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    LEAK: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """With PAIRS, the tangents of row r are at r + rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    in_c = channel < C
    inside = (row < rows)[:, None] & in_c[None, :]
    b = tl.load(bias + channel, mask=in_c, other=0.0).to(WIDE)[None, :]
    k = _taps(weight, channel, in_c, WIDE)
    zero = tl.zeros((ROWS, CHANNELS), WIDE)
    # The outputs at w - 1 and w, as far as they are summed.
    left, middle, t_left, t_middle = zero, zero, zero, zero
    for w in range(W + 1):
        right, t_right = zero, zero
        for i in tl.static_range(3):
            h = row % H + (i - 1)
            valid = inside & ((h >= 0) & (h < H))[:, None] & (w < W)
            pre = _column(x, row + (i - 1), w, channel, valid, W, C, WIDE) + b
            slope = tl.where(pre > 0, 1.0, LEAK)
            a = tl.where(valid, pre * slope, 0.0)
            left += a * k[3 * i + 2]  # column w is the right neighbour of w - 1
            middle += a * k[3 * i + 1]
            right += a * k[3 * i]
            if PAIRS:
                t = _column(x, row + (rows + i - 1), w, channel, valid, W, C, WIDE) * slope
                t_left += t * k[3 * i + 2]
                t_middle += t * k[3 * i + 1]
                t_right += t * k[3 * i]
        known = inside & (w > 0)
        _put(y, row, w - 1, channel, known, left, W, C)
        left, middle = middle, right
        if PAIRS:
            _put(y, row + rows, w - 1, channel, known, t_left, W, C)
            t_left, t_middle = t_middle, t_right


@triton.jit
def _backward_kernel(
    grad, x, bias, weight, grad_x, sums, rows, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    LEAK: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    WIDE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Move over `grad` with the flipped filter; keep the activations a at w - 1, w and w + 1.

    d y(p) / d a(p + d) = K(d), so grad_a(q) = sum_d K(d) grad(q - d)
    and grad_K(d) = sum_q a(q) grad(q - d).
    """
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    in_c = channel < C
    b = tl.load(bias + channel, mask=in_c, other=0.0).to(WIDE)[None, :]
    k = _taps(weight, channel, in_c, WIDE)
    zero = tl.zeros((ROWS, CHANNELS), WIDE)
    s0, s1, s2, s3, s4 = zero, zero, zero, zero, zero
    s5, s6, s7, s8, sb = zero, zero, zero, zero, zero
    for tile in range(TILES):
        row = (tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & in_c[None, :]
        # grad_a at w - 1 and w, as far as it is summed.
        left, middle, t_left, t_middle = zero, zero, zero, zero
        pre = _column(x, row, 0, channel, inside, W, C, WIDE) + b
        a_left, a_middle = zero, tl.where(inside, pre * tl.where(pre > 0, 1.0, LEAK), 0.0)
        slope_left, slope_middle = zero, tl.where(pre > 0, 1.0, LEAK)
        ta_left, ta_middle = zero, zero
        if PAIRS:
            ta_middle = _column(x, row + rows, 0, channel, inside, W, C, WIDE) * slope_middle
        for w in range(W + 1):
            coming = inside & (w + 1 < W)
            pre = _column(x, row, w + 1, channel, coming, W, C, WIDE) + b
            slope_right = tl.where(pre > 0, 1.0, LEAK)
            a_right = tl.where(coming, pre * slope_right, 0.0)
            right, t_right, ta_right = zero, zero, zero
            if PAIRS:
                ta_right = _column(x, row + rows, w + 1, channel, coming, W, C, WIDE) * slope_right
            for i in tl.static_range(3):
                h = row % H - (i - 1)
                valid = inside & ((h >= 0) & (h < H))[:, None] & (w < W)
                g = _column(grad, row - (i - 1), w, channel, valid, W, C, WIDE)
                left += g * k[3 * i]
                middle += g * k[3 * i + 1]
                right += g * k[3 * i + 2]
                d0, d1, d2 = g * a_left, g * a_middle, g * a_right
                if PAIRS:
                    g = _column(grad, row + rows - (i - 1), w, channel, valid, W, C, WIDE)
                    t_left += g * k[3 * i]
                    t_middle += g * k[3 * i + 1]
                    t_right += g * k[3 * i + 2]
                    d0 += g * ta_left
                    d1 += g * ta_middle
                    d2 += g * ta_right
                if i == 0:
                    s0, s1, s2 = s0 + d0, s1 + d1, s2 + d2
                elif i == 1:
                    s3, s4, s5 = s3 + d0, s4 + d1, s5 + d2
                else:
                    s6, s7, s8 = s6 + d0, s7 + d1, s8 + d2
            known = inside & (w > 0)
            left = left * slope_left
            sb += tl.where(known, left, 0.0)
            _put(grad_x, row, w - 1, channel, known, left, W, C)
            left, middle = middle, right
            if PAIRS:
                _put(grad_x, row + rows, w - 1, channel, known, t_left * slope_left, W, C)
                t_left, t_middle = t_middle, t_right
                ta_left, ta_middle = ta_middle, ta_right
            a_left, a_middle = a_middle, a_right
            slope_left, slope_middle = slope_middle, slope_right
    out = sums + tl.program_id(0) * 10 * C + channel
    tl.store(out, tl.sum(s0, 0), mask=in_c)
    tl.store(out + C, tl.sum(s1, 0), mask=in_c)
    tl.store(out + 2 * C, tl.sum(s2, 0), mask=in_c)
    tl.store(out + 3 * C, tl.sum(s3, 0), mask=in_c)
    tl.store(out + 4 * C, tl.sum(s4, 0), mask=in_c)
    tl.store(out + 5 * C, tl.sum(s5, 0), mask=in_c)
    tl.store(out + 6 * C, tl.sum(s6, 0), mask=in_c)
    tl.store(out + 7 * C, tl.sum(s7, 0), mask=in_c)
    tl.store(out + 8 * C, tl.sum(s8, 0), mask=in_c)
    tl.store(out + 9 * C, tl.sum(sb, 0), mask=in_c)

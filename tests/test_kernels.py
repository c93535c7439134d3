"""The Triton operator against torch, in Triton's interpreter, and compiled for a GPU."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton has no package for this system")

AGAINST_TORCH = """
import torch
import torch.nn.functional as F
from vgan.models.triton_kernels import activated_depthwise
from vgan.models.layers import BiasLeakyReLU, LEAK, ResidualBlock, fuse_depthwise

def relative(a, b):
    return float(((a.double() - b.double()).norm() / b.double().norm()).detach())

torch.manual_seed(0)
TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
for dtype, tolerance in TOLERANCES.items():
    wide = [((6, 136, 3, 5), True), ((5, 130, 9, 8), False)] if dtype is torch.float64 else []
    odd = [((2, 3, 1, 7), True), ((3, 5, 7, 1), False)]
    for shape, pairs in (((2, 8, 4, 4), False), ((2, 8, 4, 4), True), *odd, *wide):
        n, channels, height, width = shape
        x = torch.randn(n, channels + 2, height, width, dtype=dtype)
        if shape not in dict(odd):  # these are parts of NCHW maps
            x = x.contiguous(memory_format=torch.channels_last)
        x = x[:, 1:-1].detach().requires_grad_()
        bias = torch.randn(channels, requires_grad=True)
        weight = torch.randn(channels, 1, 3, 3, requires_grad=True)
        grad = torch.randn(shape, dtype=dtype)
        y = activated_depthwise(x, bias, weight, LEAK, pairs)
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        ours = [y, *torch.autograd.grad(y, (x, bias, weight), grad)]
        act = BiasLeakyReLU(channels).double()
        act.bias.data = bias.detach().double()
        x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
        y = F.conv2d(act(x, pairs), weight, padding=1, groups=channels)
        plain = [y, *torch.autograd.grad(y, (x, act.bias, weight), grad.double())]
        for a, b in zip(ours, plain):
            assert relative(a, b) < tolerance, (dtype, shape, pairs, relative(a, b))

# the whole block, with a narrow tile at the edge
block = ResidualBlock(24, "separable", 2, 1)
for p in block.parameters():
    torch.nn.init.normal_(p, std=0.3)
x = torch.randn(4, 24, 6, 6).contiguous(memory_format=torch.channels_last)
results = []
for fused in (False, True):
    fuse_depthwise(block, fused)
    y = block(x, pairs=True)
    results.append([y, *torch.autograd.grad(y.square().sum(), list(block.parameters()))])
assert all(relative(b, a) < 1e-5 for a, b in zip(*results))

# one operator, not a break, for the compiler
fused = torch.compile(lambda x: block(x, pairs=True), fullgraph=True, backend="aot_eager")
assert relative(fused(x), results[0][0]) < 1e-5
print("as plain torch")
"""

FOR_GPUS = """
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from vgan.models import triton_kernels as kernels

for kernel in (kernels._forward_kernel, kernels._backward_kernel):
    for pairs in (False, True):
        constants = {"H": 16, "W": 16, "C": 512, "LEAK": 0.2, "PAIRS": pairs}
        constants |= {"ROWS": kernels.ROWS, "CHANNELS": kernels.CHANNELS}
        constants |= {"WIDE": tl.float32, "TILES": kernels.TILES}
        types = {"x": "*bf16", "y": "*bf16", "grad": "*bf16", "grad_x": "*bf16", "rows": "i32"}
        names = kernel.arg_names
        signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in names}
        pointers = [i for i, name in enumerate(names) if name not in constants]
        attributes = {(i,): [["tt.divisibility", 16]] for i in pointers}
        constants = {(names.index(n),): value for n, value in constants.items() if n in names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        for capability in (80, 90, 100):  # A100, H100 and H200, B200
            ptx = compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
            assert f".target sm_{capability}" in ptx and ".local" not in ptx, "registers spilled"
            assert "ld.global.v2" in ptx, "loads are not vectors"
print("compiled")
"""


@pytest.mark.slow  # the interpreter runs one element at a time
@pytest.mark.parametrize(("code", "interpret"), [(AGAINST_TORCH, "1"), (FOR_GPUS, "0")])
def test_operator(code: str, interpret: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": interpret}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("as plain torch", "compiled")

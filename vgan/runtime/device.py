"""Device, precision and process-wide performance settings."""

import contextlib
import ctypes
import importlib.util
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from vgan.runtime.distributed import local_rank, print0, world_size
from vgan.runtime.errors import UserError


def pick_device(name: str) -> torch.device:
    """Return the named device; 'auto' is the first accelerator, or the CPU without one.

    Raises UserError where torch cannot use it.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if cuda and world_size() > 1 and name in ("auto", "cuda"):
        name = f"cuda:{local_rank()}"
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
        is_known = device.type in ("cpu", "cuda", "mps")
    except RuntimeError:
        is_known = False
    if not is_known:
        raise UserError(f"device={name}: unknown; use auto, cpu, cuda, cuda:1 or mps")
    for kind, maker, is_usable in (("cuda", "CUDA", cuda), ("mps", "Apple", mps)):
        if device.type == kind and not is_usable:
            lacks = f"this machine has no {maker} GPU that torch can use"
            raise UserError(f"device={name}: {lacks}; leave device=auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(
            f"device={name}: this machine has {count} GPU(s), numbered from 0; leave device=auto"
        )
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """Return the named precision; 'auto' is bf16 where it is fast, fp16 on older GPUs, else fp32.

    Raises UserError for a precision that the device does not have.
    """
    if device.type == "cuda":
        fast_bf16 = torch.cuda.get_device_capability(device)[0] >= 8
        if name in ("bf16", "tf32") and not fast_bf16:
            raise UserError(f"precision={name}: this GPU is too old for it; use fp16 or fp32")
        auto = "bf16" if fast_bf16 else "fp16"
    else:
        if name in ("fp16", "tf32"):
            rule = f"needs a CUDA GPU, the device is {device.type}"
            raise UserError(f"precision={name}: {rule}; use auto, fp32 or bf16")
        auto = "bf16" if device.type == "cpu" and has_fast_bf16() else "fp32"
    return auto if name == "auto" else name


def has_fast_bf16() -> bool:
    """Return whether the CPU multiplies bf16 (AVX-512 BF16, AMX); emulation is slower than fp32."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def pick_compile(name: str, device: torch.device) -> bool:
    """Return whether to compile; 'auto' compiles on CUDA only, since CPUs were slower compiled.

    Prints one line and returns False where a compiler is missing.
    """
    choice = name.lower()
    if choice == "false" or (choice == "auto" and device.type != "cuda"):
        return False
    if missing := missing_compiler(device):
        print0(f"compile={name}: not compiled, this machine lacks {missing}; only speed is lost")
        return False
    return True


def pick_depthwise(name: str, device: torch.device) -> str:
    """Return 'torch' or 'triton'; 'auto' is torch: whole steps were not faster with Triton.

    Raises UserError where 'triton' cannot run.
    """
    if name != "triton":
        return "torch"
    if device.type != "cuda":
        rule = f"needs a CUDA GPU, the device is {device.type}"
        raise UserError(f"depthwise=triton: {rule}; use auto")
    if missing := missing_compiler(device):
        raise UserError(f"depthwise=triton: this machine lacks {missing}; use auto")
    return "triton"


def missing_compiler(device: torch.device) -> str | None:
    """Return what torch.compile needs for this device and cannot find; None if nothing."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton (pip install triton)"
    if device.type == "cuda":  # Triton builds its launchers in C
        language, variable, names = "C", "CC", ["cc", "gcc", "clang"]
    else:
        language, variable, names = "C++", "CXX", ["c++", "g++", "clang++", "cl"]
    commands = [os.environ.get(variable) or names[0], *names]
    if any(shutil.which(command) for command in commands):
        return None
    return f"a {language} compiler ({names[1]})"


def keep_compiled(folder: Path) -> None:
    """Let torch.compile cache its results in `folder`, unless the environment names another."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Return the context of forward passes: bf16 or fp16 products, float32 weights and losses."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if precision in dtypes:
        return torch.autocast(device.type, dtype=dtypes[precision])
    return contextlib.nullcontext()


def prepare_process(
    device: torch.device, precision: str, threads: int, deterministic: bool = False
) -> None:
    """Set threads, TF32, cuDNN's search and memory reuse for the whole process.

    deterministic: allow only kernels that repeat bit for bit; operations without one raise
    RuntimeError. threads: 0 leaves torch's choice.
    """
    if deterministic:
        # Read when cuBLAS starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if threads > 0:
        torch.set_num_threads(threads)
    if device.type == "cuda":
        tf32 = precision != "fp32"
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
        # The search may choose another kernel in every run.
        torch.backends.cudnn.benchmark = not deterministic
    if device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of returning it to the kernel after every operation.

    Otherwise every layer maps its features again, page by page. Measured on two CPU cores in
    float32: the generator's forward pass at batch 64 went from 72 ms to 13 ms.
    """
    if platform.system() != "Linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no separate mapping for a large block
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep free memory at the top of the heap

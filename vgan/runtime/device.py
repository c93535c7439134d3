"""Which device, which arithmetic, and the settings of the process that make it quick."""

import contextlib
import ctypes
import importlib.util
import os
import platform
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from vgan.runtime.distributed import local_rank, print0, world_size
from vgan.runtime.errors import UserError


def pick_device(name: str) -> torch.device:
    """'auto' is the first accelerator there is, else the CPU. Raises UserError where `name` cannot be had."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if cuda and world_size() > 1 and name in ("auto", "cuda"):
        name = f"cuda:{local_rank()}"
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device={name}: unknown; use auto, cpu, cuda, cuda:1 or mps")
    if device.type == "cuda" and not cuda:
        raise UserError(
            f"device={name}: this machine has no CUDA GPU that torch can use; leave device=auto"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device={name}: this machine has {torch.cuda.device_count()} GPU(s), counted from 0"
        )
    if device.type == "mps" and not mps:
        raise UserError(
            f"device={name}: this machine has no Apple GPU that torch can use; leave device=auto"
        )
    return device


def hardware(device: torch.device) -> str:
    """What the device is called by its maker, and on a CPU how many threads work."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name, table = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if table.is_file() and (
        found := re.search(r"^model name\s*:\s*(.+)$", table.read_text(errors="replace"), re.M)
    ):
        name = found[1]
    threads = torch.get_num_threads()
    return (
        f"{name}, {threads} thread{'s' * (threads > 1)}"
        if device.type == "cpu"
        else f"{name}, {device.type}"
    )


def pick_precision(name: str, device: torch.device) -> str:
    """'auto' is bf16 where the hardware multiplies it fast, fp16 on older GPUs, fp32 otherwise.

    Raises UserError for a precision that the device does not have.
    """
    if device.type == "cuda":
        fast_bf16 = torch.cuda.get_device_capability(device)[0] >= 8
        if name in ("bf16", "tf32") and not fast_bf16:
            raise UserError(f"precision={name}: this GPU is too old for it; use fp16 or fp32")
        return ("bf16" if fast_bf16 else "fp16") if name == "auto" else name
    if name in ("fp16", "tf32"):
        raise UserError(
            f"precision={name}: needs a CUDA GPU, the device is {device.type}; use auto, fp32 or bf16"
        )
    if name == "auto":
        return "bf16" if device.type == "cpu" and cpu_multiplies_bf16() else "fp32"
    return name


def cpu_multiplies_bf16() -> bool:
    """Whether the processor has bf16 products of its own (AVX-512 BF16 or AMX); emulated ones are slower than float32."""
    capabilities = torch.backends.cpu.get_cpu_capability
    if capabilities() != "AVX512":
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def pick_compile(name: str, device: torch.device) -> bool:
    """Whether to compile. 'auto' does on CUDA: on a CPU it was measured slower than plain torch.

    Where a compiler is missing, says so in one line, once, and the run goes on without.
    """
    choice = name.lower()
    if choice == "false" or (choice == "auto" and device.type != "cuda"):
        return False
    if missing := missing_compiler(device):
        print0(
            f"compile={name}: not compiled, which costs speed only, as this machine lacks {missing}"
        )
        return False
    return True


def pick_depthwise(name: str, device: torch.device) -> str:
    """'torch' or 'triton'. 'auto' is torch until the Triton kernel has been measured to make whole steps faster.

    Raises UserError where Triton is asked for and cannot run.
    """
    if name != "triton":
        return "torch"
    if device.type != "cuda":
        raise UserError(
            f"depthwise=triton: needs a CUDA GPU, the device is {device.type}; use auto"
        )
    if missing := missing_compiler(device):
        raise UserError(f"depthwise=triton: this machine lacks {missing}; use auto")
    return "triton"


def missing_compiler(device: torch.device) -> str | None:
    """What torch.compile would need for this device and cannot find; None where nothing is missing."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton (pip install triton)"
    # Triton builds its launchers with a C compiler, the CPU's kernels are C++.
    variable, names = (
        ("CC", ("cc", "gcc", "clang"))
        if device.type == "cuda"
        else ("CXX", ("c++", "g++", "clang++", "cl"))
    )
    if any(shutil.which(name) for name in (os.environ.get(variable), *names) if name):
        return None
    return f"a {'C' if variable == 'CC' else 'C++'} compiler ({names[1]})"


def keep_compiled(folder: Path) -> None:
    """Let torch.compile keep what it makes in `folder`, for the next run, unless the environment names another place."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """The context in which forward passes run; matrix products are in bf16 or fp16, weights and losses stay float32."""
    if precision in ("bf16", "fp16"):
        return torch.autocast(
            device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16
        )
    return contextlib.nullcontext()


def prepare_process(
    device: torch.device, precision: str, threads: int, deterministic: bool = False
) -> None:
    """Settings of the whole process for a run: threads, tf32, cuDNN's search, memory that is kept between steps.

    deterministic: kernels that repeat bit for bit only; what has no such kernel raises RuntimeError where it is called.
    """
    if deterministic:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # must be set before cuBLAS starts
        torch.use_deterministic_algorithms(True)
    if threads > 0:
        torch.set_num_threads(threads)
    if device.type == "cuda":
        tf32 = precision != "fp32"
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = (
            not deterministic
        )  # the quickest kernel may differ from run to run
    if device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Let the C library keep freed memory instead of returning it to the kernel after every operation.

    Feature maps of some MiB are otherwise mapped anew, and paged in anew, by every layer of every step. Measured on two CPU
    cores, float32: the generator's forward pass at batch 64 went from 72 ms to 13 ms. Only glibc has the switch.
    """
    if platform.system() != "Linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return
    mallopt(-4, 0)  # M_MMAP_MAX: never a mapping of its own for a large block
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep what is free at the top of the heap

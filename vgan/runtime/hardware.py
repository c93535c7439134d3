"""Names, cores and memory of the hardware. 1 GB is 10^9 bytes."""

import contextlib
import ctypes
import gc
import platform
import re
from pathlib import Path

import psutil
import torch

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CPUINFO, _CGROUP = Path("/proc/cpuinfo"), Path("/sys/fs/cgroup")


def device_name(device: torch.device) -> str:
    """Return the vendor's name of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if _CPUINFO.is_file():
        text = _CPUINFO.read_text(errors="replace")
        if match := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            return match[1]
    return platform.processor() or platform.machine()


def describe(device: torch.device) -> str:
    """Return a device's name; of a CPU, with the number of threads that torch uses."""
    name = device_name(device)
    if device.type == "cuda":
        return name
    if device.type != "cpu":
        return f"{name}, {device.type}"
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def usable_cores() -> int:
    """Return the number of logical cores that this process may run on."""
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):  # not on macOS
        return len(process.cpu_affinity())
    return psutil.cpu_count() or 1


def host_memory_gb() -> tuple[float, float]:
    """Return total and available memory of the host, or of the container where that has less."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or "max": no limit
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        total, free = min(total, limit), min(free, limit - used)
    return total / 1e9, free / 1e9


def resident_gb() -> float:
    """Return the memory that this process holds now."""
    return psutil.Process().memory_info().rss / 1e9


def host_peak_gb() -> float:
    """Return this process's peak memory since `reset_peak` on Linux, since its start elsewhere."""
    status = _STATUS.read_text() if _STATUS.exists() else ""
    if match := re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE):
        return int(match[1]) * 1024 / 1e9
    peak_bytes = getattr(psutil.Process().memory_info(), "peak_wset", None)  # Windows
    if peak_bytes is not None:
        return peak_bytes / 1e9
    import resource  # not on Windows

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def peak_gb(device: torch.device) -> float | None:
    """Return the peak of allocated memory of a CUDA device since `reset_peak`; None for others."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def reset_peak(device: torch.device) -> None:
    """Release unused memory and reset the peaks of the device and, on Linux, of the process."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    if platform.system() == "Linux":
        with contextlib.suppress(AttributeError):  # musl has no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):  # a container may forbid it
            _CLEAR_REFS.write_text("5")

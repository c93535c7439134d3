"""Names, cores and memory of the hardware."""

import resource

import torch

from vgan.runtime.device import hardware as describe

__all__ = ["describe", "host_peak_gb", "peak_gb"]


def peak_gb(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def host_peak_gb() -> float | None:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

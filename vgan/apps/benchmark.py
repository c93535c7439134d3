"""A run that takes steps only to be timed: what vgan-doctor and scripts/bench.py measure."""

import contextlib
import ctypes
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgan.data.loader import Loader
from vgan.data.packed import default_cache_dir
from vgan.data.webdataset import ShardLoader
from vgan.runtime.device import keep_compiled, pick_compile
from vgan.runtime.distributed import rank, world_size
from vgan.runtime.rng import Streams
from vgan.training.ema import update_ema
from vgan.training.parallel import averaged
from vgan.training.setup import Run, open_loader, set_up
from vgan.training.step import compiled, train_step

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]

_STATUS, _CLEAR, _CPUINFO = (
    Path("/proc", name) for name in ("self/status", "self/clear_refs", "cpuinfo")
)


@dataclass
class BenchmarkRun:
    """A run that is ready to take steps, as its config says."""

    run: Run
    feed: Loader | ShardLoader
    batch_size: int
    penalty_every: int
    nchw: bool = False  # features laid out as NCHW, to measure what channels-last gains
    step: int = 0

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.run.recipe.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.run.recipe.device.type == "mps":
            torch.mps.synchronize()

    def inputs(self) -> tuple[Tensor, Tensor, Streams]:
        """The next batch and its random numbers."""
        cur_nimg, rows = self.step * self.batch_size, self.batch_size // world_size()
        self.step += 1
        return *self.feed.batch(cur_nimg), Streams(
            0, cur_nimg + rank() * rows, rows, self.run.recipe.device
        )

    def take_step(self) -> None:
        """One whole step, as in the loop."""
        penalty = self.penalty_every if self.step % self.penalty_every == 0 else 0
        batch, run = self.inputs(), self.run
        now = run.moment_at(self.step * self.batch_size)
        train_step(run.state, run.recipe, now, *batch, penalty)
        update_ema(run.state.G_ema, run.state.G, 0.999)


def make_benchmark_run(
    config: dict[str, Any], device: torch.device, precision: str
) -> BenchmarkRun:
    """The run that a resolved TrainConfig describes, compiled where it says so. Raises UserError for what cannot work."""
    run = set_up(config, device, precision)
    if pick_compile(config["compile"], device):
        keep_compiled(default_cache_dir() / "compiled")
        torch._dynamo.reset()
        run = replace(run, recipe=compiled(run.recipe, config["cuda_graphs"]))
    if world_size() > 1 and config["parallel"] == "ddp":
        run = replace(run, recipe=averaged(run.recipe, run.state.G, run.state.D))
    return BenchmarkRun(
        run, open_loader(run), config["batch_size"], config["loss"]["penalty_every"]
    )


def time_of(
    subject: BenchmarkRun, work: Callable[[], object], seconds: float, most: int | None = None
) -> float:
    """Seconds of one call: the median over as many as fit, at least 3 and `most` if given.

    Calls are timed in groups where the device runs behind.
    """
    group = 1 if subject.run.recipe.device.type == "cpu" else 5
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or (
        time.perf_counter() < end and (most is None or len(times) * group < most)
    ):
        subject.wait()
        start = time.perf_counter()
        for _ in range(group):
            work()
        subject.wait()
        times.append((time.perf_counter() - start) / group)
    return statistics.median(times)


def first_steps(subject: BenchmarkRun, warm: int = 3) -> float:
    """How long it takes until every kind of step has run once (compilation included); takes `warm` more steps after that."""
    subject.wait()
    start = time.perf_counter()
    for _ in range(2 if subject.penalty_every > 1 else 1):
        subject.take_step()
    subject.wait()
    elapsed = time.perf_counter() - start
    for _ in range(warm):
        subject.take_step()
    subject.wait()
    return elapsed


def step_seconds(subject: BenchmarkRun, seconds: float, steps: int | None = None) -> float:
    """Mean of one step over the cycle of steps with and without penalty; `steps` many of them if they fit."""
    cycle = min(subject.penalty_every, 8)

    def one_cycle() -> None:
        for _ in range(cycle):
            subject.take_step()

    return (
        time_of(subject, one_cycle, seconds, None if steps is None else -(-steps // cycle)) / cycle
    )


def peak_gb(device: torch.device) -> float | None:
    """The most memory of a CUDA device that was in use since `release`; None for other devices."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def host_peak_gb() -> float | None:
    """The most memory that this process held: since `release` on Linux, since its start elsewhere, None on Windows."""
    if _STATUS.exists():
        line = next((x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM")), "")
        if line:
            return int(line.split()[1]) * 1024 / 1e9
    if resource is None:
        return None
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
        / 1e9
    )


def release(device: torch.device) -> None:
    """Give unused memory back and count its peak anew, so that what comes next is measured for itself."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if platform.system() == "Linux":
        with contextlib.suppress(AttributeError):  # musl has no such call
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):  # a container may forbid it
            _CLEAR.write_text("5")


def device_name(device: torch.device) -> str:
    """The maker's name of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if _CPUINFO.exists():
        names = [
            line.split(":")[1].strip()
            for line in _CPUINFO.read_text().splitlines()
            if "model name" in line
        ]
        if names:
            return names[0]
    return platform.processor() or platform.machine()

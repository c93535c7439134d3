"""Which settings are fastest on this machine, and fit: short trials of real steps."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vgan.apps.benchmark import (
    BenchmarkRun,
    first_steps,
    host_peak_gb,
    make_benchmark_run,
    peak_gb,
    release,
    step_seconds,
)
from vgan.runs import checkpoint
from vgan.runtime.device import missing_compiler, pick_precision, prepare_process
from vgan.runtime.errors import UserError, is_out_of_memory
from vgan.training.setup import Run

STEPS, SECONDS = 20, 5.0  # of a trial; the first limit that is reached ends it
BUDGET_S, OTHER_BUDGET_S = {"cpu": 45.0}, 600.0  # of all trials; GPUs compile for each
WORTH = 1.05  # times faster, or a setting is not recommended: less than that is noise
FULL = 0.9  # the share of the memory that a run may take


@dataclass(frozen=True)
class Trial:
    """One candidate: what differs from the config, and what was measured."""

    settings: dict[str, Any]  # precision, threads, compile, batch_size
    img_per_s: float = 0.0  # 0: could not be measured
    memory_gb: float | None = None
    first_s: float = 0.0
    note: str = ""


@dataclass
class Plan:
    """What the trials came to."""

    chosen: Trial
    best: Trial
    gains: list[tuple[str, float]] = field(
        default_factory=list
    )  # override, times faster than without it
    batches: list[Trial] = field(default_factory=list)  # other batch sizes with the best settings


def try_speeds(
    config: dict[str, Any], device: torch.device, show: Callable[[Run, int], None]
) -> Plan:
    """Trials of one setting after the other, each with the best of those before it; then of other batch sizes.

    config: a resolved TrainConfig whose precision, threads and compile are what they mean on this device. `show` gets the run
    and the bytes of one of its checkpoints before the trials. Raises UserError where not even the chosen settings run.
    """
    bench = Bench(config, device)
    chosen = {name: config[name] for name in ("precision", "threads", "compile", "batch_size")}
    bench.begin(chosen, show)
    first = bench.take(chosen)
    if not first.img_per_s:
        raise UserError(
            f"batch_size={chosen['batch_size']}: {first.note}; try batch_gpu, a smaller batch_size or size"
        )
    plan = Plan(first, first)
    for name, values in candidates(config, device).items():
        before = plan.best
        trials = [bench.take({**before.settings, name: value}) for value in values]
        fastest = max([before, *trials], key=lambda t: t.img_per_s)
        if fastest.img_per_s > before.img_per_s * WORTH:
            plan.best = fastest
            plan.gains.append(
                (f"{name}={fastest.settings[name]}", fastest.img_per_s / before.img_per_s)
            )
    b = chosen["batch_size"]
    for batch_size in sorted({max(2, b // 2), 2 * b, 4 * b} - {b}):
        trial = bench.take({**plan.best.settings, "batch_size": batch_size})
        if trial.img_per_s:
            plan.batches.append(trial)
        elif batch_size > b:
            break  # a larger one fits even less
    return plan


def candidates(config: dict[str, Any], device: torch.device) -> dict[str, list[Any]]:
    """Other values of precision, threads and compile that could be faster on this device."""
    names = ["bf16", "tf32", "fp32"] if device.type == "cuda" else ["bf16", "fp32"]
    if device.type == "cuda" and config["parallel"] != "fsdp":
        names.append("fp16")
    precisions = []
    for name in names:
        with contextlib.suppress(UserError):  # the device does not have it
            precisions.append(pick_precision(name, device))
    cores = usable_cores()
    threads = [max(1, cores // 2), cores] if device.type == "cpu" else []
    can_compile = device.type == "cuda" and not missing_compiler(
        device
    )  # on a CPU that takes minutes and gains nothing
    compiled = ["false", "true"] if can_compile else []
    found: dict[str, list[Any]] = {"precision": precisions, "threads": threads, "compile": compiled}
    return {
        name: [v for v in dict.fromkeys(values) if v != config[name]]
        for name, values in found.items()
    }


class Bench:
    """Takes trials within limits of time and memory, and prints each as a row of one table."""

    def __init__(self, config: dict[str, Any], device: torch.device) -> None:
        self._config, self._device = config, device
        self._end = time.perf_counter() + BUDGET_S.get(device.type, OTHER_BUDGET_S)
        self._taken: list[Trial] = []

    def begin(self, chosen: dict[str, Any], show: Callable[[Run, int], None]) -> None:
        """A few steps of few pictures: shows that steps work at all, what a checkpoint takes, and how memory grows.

        Hands the run and the bytes of a checkpoint to `show`. Raises UserError where steps fail.
        """
        few = {**chosen, "batch_size": max(2, chosen["batch_size"] // 4)}
        try:
            with self._subject(few) as subject:
                self._taken.append(self._measure(subject, few, 1))
                tensors = [
                    leaf
                    for _, leaf in checkpoint.walk(subject.run.state.parts())
                    if isinstance(leaf, torch.Tensor)
                ]
                show(subject.run, sum(t.nbytes for t in tensors))
        except (RuntimeError, MemoryError) as e:
            raise UserError(f"the first step fails ({first_line(e)})") from e
        title = f"speed: trials of up to {STEPS} steps"
        print(f"\n{title}\n{'-' * len(title)}")
        heads = zip(
            ("threads", "compiled", "batch", "img/s", "memory", "first step"), (7, 10, 7, 9, 10, 12)
        )
        print("precision " + "".join(f"{head:>{width}}" for head, width in heads), flush=True)

    def take(self, settings: dict[str, Any]) -> Trial:
        """Measure and print a row; img_per_s is 0, and the note says why, where that cannot be done."""
        trial = Trial(settings, note=self._refusal(settings))
        if not trial.note:
            try:
                with self._subject(settings) as subject:
                    trial = self._measure(subject, settings, STEPS)
            except (RuntimeError, MemoryError) as e:
                trial = replace(
                    trial,
                    note="out of memory"
                    if is_out_of_memory(e)
                    else f"does not run: {first_line(e)}",
                )
        row = f"{settings['precision']:<10}{settings['threads']:>7}{'yes' if settings['compile'] == 'true' else 'no':>10}"
        row += f"{settings['batch_size']:>7}"
        if trial.img_per_s:
            self._taken.append(trial)
            memory = "?" if trial.memory_gb is None else f"{trial.memory_gb:.2f} GB"
            row += f"{trial.img_per_s:>9,.0f}{memory:>10}{trial.first_s:>10.1f} s"
        print(f"{row}  {trial.note}".rstrip()[:80], flush=True)
        return trial

    @contextlib.contextmanager
    def _subject(self, settings: dict[str, Any]) -> Iterator[BenchmarkRun]:
        prepare_process(
            self._device, settings["precision"], settings["threads"], self._config["deterministic"]
        )
        release(self._device)
        subject = make_benchmark_run(
            {**self._config, **settings}, self._device, settings["precision"]
        )
        try:
            yield subject
        finally:
            subject.feed.close()

    def _measure(self, subject: BenchmarkRun, settings: dict[str, Any], steps: int) -> Trial:
        split = subject.run.recipe.split
        parts = split.count
        first = first_steps(subject, warm=0)
        if steps > 1 and settings["compile"] == "false" and self._hopeless(first, settings):
            return Trial(settings, note=f"left out: the first step took {first:.1f} s")
        rate = subject.batch_size / step_seconds(subject, SECONDS if steps > 1 else 0, steps)
        memory = peak_gb(self._device) if self._device.type == "cuda" else host_peak_gb()
        note = f"in {split.count} parts" if split.count > parts else ""
        return Trial(settings, rate, memory, first, note)

    def _hopeless(self, first_s: float, settings: dict[str, Any]) -> bool:
        """Whether a trial starts so slowly that the rest is not worth waiting for."""
        known = [
            t.first_s for t in self._taken[1:] if t.settings["batch_size"] == settings["batch_size"]
        ]
        return bool(known) and first_s > 1 + 3 * min(known)

    def _refusal(self, settings: dict[str, Any]) -> str:
        """Why a trial is not taken; empty where it is."""
        batch, last = settings["batch_size"], self._taken[-1]
        grown = batch / last.settings["batch_size"]
        seconds = last.first_s * max(1, grown) + max(SECONDS, 6 * batch / last.img_per_s)
        if (
            len(self._taken) > 1 and time.perf_counter() + seconds > self._end
        ):  # the chosen settings are always tried
            return "left out for lack of time"
        room = self._room_gb()
        known = {
            t.settings["batch_size"]: t.memory_gb for t in self._taken if t.memory_gb is not None
        }
        if room is None or not known or batch <= max(known):
            return ""
        least, most = min(known), max(known)
        if (
            least == most
        ):  # how much of it grows with the batch is not known yet: the least that it could be
            wanted = known[most] * batch / most / 4
        else:
            wanted = known[most] + max(0.0, known[most] - known[least]) / (most - least) * (
                batch - most
            )
        return f"left out: about {wanted:.1f} of {room:.1f} GB" if wanted > FULL * room else ""

    def _room_gb(self) -> float | None:
        """The memory that this process could have in all."""
        if self._device.type == "cuda":
            return (
                torch.cuda.mem_get_info(self._device)[0] + torch.cuda.memory_reserved(self._device)
            ) / 1e9
        free = host_memory_gb()[1]
        return None if free is None else free + (_resident_gb() or 0)


def _resident_gb() -> float | None:
    """The memory that this process holds now, where the system says it."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return (
            int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
        )
    return None


def usable_cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host_memory_gb() -> tuple[float | None, float | None]:
    """Total and free memory of the host, or of the container where that has less; None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        pages = "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {})
        return (
            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9 if pages else None
        ), None
    amounts = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    total, free = (int(amounts[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit, used = (
        _number(Path("/sys/fs/cgroup", name)) for name in ("memory.max", "memory.current")
    )
    if limit is not None and used is not None:
        total, free = min(total, limit), min(free, limit - used)
    return total / 1e9, free / 1e9


def _number(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return None


def first_line(e: BaseException) -> str:
    """What an error says, without what follows it in other lines."""
    lines = [line for line in str(e).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(e).__name__

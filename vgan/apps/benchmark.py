"""Time training steps, with a run's own settings and with others that may be faster."""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vgan.config import TrainConfig
from vgan.data.loader import Batch, Loader
from vgan.data.webdataset import ShardLoader
from vgan.models.sizes import CHECKPOINTING_PX
from vgan.runtime import hardware
from vgan.runtime.device import missing_compiler, pick_precision, prepare_process
from vgan.runtime.errors import UserError, first_line, is_out_of_memory
from vgan.runtime.images import height_width, parse_resolution
from vgan.training.setup import Run, prepare_step, setup
from vgan.training.step import train_step

MIN_GAIN = 1.05  # smaller speed-ups are noise and not recommended
MAX_MEMORY = 0.9  # the share of the memory that a trial may take
_HEADER = "precision threads  compiled  batch    img/s    memory  first step"

Settings = dict[str, Any]  # precision, threads, compile, batch_size


@dataclass
class BenchmarkRun:
    """A run whose steps are timed; nothing is logged or saved."""

    run: Run
    loader: Loader | ShardLoader

    @property
    def batch_size(self) -> int:
        return self.run.cfg.batch_size

    def next_batch(self) -> Batch:
        """Return the next batch and advance cur_nimg."""
        batch = self.run.batch(self.loader)
        self.run.state.cur_nimg += self.batch_size
        return batch

    def step(self) -> None:
        """Take one training step, as the training loop does."""
        run, hp = self.run, self.run.hyperparameters()
        train_step(run.state, run.objective, run.batch(self.loader), hp)

    def first_steps(self, warmup: int = 0) -> float:
        """Return the seconds until every kind of step has run once, compilation included.

        Takes `warmup` more steps after that, which are not counted.
        """
        synchronize(self.run.device)
        start = time.perf_counter()
        for _ in range(min(2, self.run.cfg.loss.penalty_every)):
            self.step()
        synchronize(self.run.device)
        elapsed = time.perf_counter() - start
        for _ in range(warmup):
            self.step()
        synchronize(self.run.device)
        return elapsed

    def seconds_per_step(self, seconds: float, max_steps: int | None = None) -> float:
        """Return the mean over a cycle of steps with and without penalty; see `median_seconds`."""
        cycle = min(self.run.cfg.loss.penalty_every, 8)
        max_calls = None if max_steps is None else -(-max_steps // cycle)

        def steps() -> None:
            for _ in range(cycle):
                self.step()

        return median_seconds(steps, self.run.device, seconds, max_calls) / cycle


@contextmanager
def open_benchmark_run(
    cfg: TrainConfig, device: torch.device, precision: str
) -> Iterator[BenchmarkRun]:
    """Build the run of `cfg`, compiled where it says so. Raises UserError where it cannot work."""
    run = setup(cfg, device, precision)
    torch.compiler.reset()  # graphs of an earlier run
    prepare_step(run)
    with closing(run.open_loader()) as loader:
        yield BenchmarkRun(run, loader)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def median_seconds(
    work: Callable[[], object], device: torch.device, seconds: float, max_calls: int | None = None
) -> float:
    """Return the median seconds of a call of `work`, from at least 3 measurements.

    Measures for `seconds`, or until `max_calls` if given. On an accelerator five calls are
    measured at once, since it runs behind the host.
    """
    group = 1 if device.type == "cpu" else 5
    times: list[float] = []
    end = time.perf_counter() + seconds
    most = math.inf if max_calls is None else max_calls
    while len(times) < 3 or (time.perf_counter() < end and len(times) * group < most):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(group):
            work()
        synchronize(device)
        times.append((time.perf_counter() - start) / group)
    return statistics.median(times)


@dataclass(frozen=True)
class Trial:
    """One candidate and its measurements."""

    settings: Settings
    img_per_s: float = 0.0  # 0: not measured, and `note` says why
    memory_gb: float = 0.0
    first_s: float = 0.0
    note: str = ""


@dataclass
class Plan:
    """The outcome of all trials."""

    chosen: Trial
    best: Trial
    gains: list[tuple[str, float]] = field(default_factory=list)  # override, speed-up
    batch_sizes: list[Trial] = field(default_factory=list)  # others, with the best settings


class Benchmark:
    """Trials of a few training steps each, within limits of time and memory.

    seconds, steps: the length of a trial; the first limit that is reached ends it. budget_s: for
    all trials; by default 45 on a CPU and 600 on a GPU, which compiles for each. cores: the most
    threads to try; by default those that are usable. memory_gb: what this process may use; by
    default what is free.
    """

    def __init__(
        self,
        seconds: float = 5.0,
        steps: int = 20,
        budget_s: float | None = None,
        cores: int | None = None,
        memory_gb: float | None = None,
    ) -> None:
        self.seconds, self.steps, self.budget_s = seconds, steps, budget_s
        self.cores, self.memory_gb = cores or hardware.usable_cores(), memory_gb
        self._deadline = math.inf
        self.trials: list[Trial] = []  # the measured ones

    @contextmanager
    def first_trial(self, cfg: TrainConfig, device: torch.device) -> Iterator[Run]:
        """Take a few steps with a small batch, of large images with two, and open the run.

        It shows that steps work and how memory grows with the batch. Raises UserError where a
        step fails.
        """
        batch_size = 2 if _has_large_images(cfg) else max(2, cfg.batch_size // 4)
        small = {**settings_of(cfg), "batch_size": batch_size}
        with contextlib.ExitStack() as stack:
            try:
                subject = stack.enter_context(self._open(cfg, device, small))
                self.trials.append(self._time(subject, small, 1))
            except (RuntimeError, MemoryError) as e:
                raise UserError(f"the first step fails ({first_line(e)})") from e
            yield subject.run

    def search(self, cfg: TrainConfig, device: torch.device) -> Plan:
        """Vary one setting after another, keep the fastest, then try other batch sizes.

        cfg: its precision, threads and compile hold no `auto`. Raises UserError where the settings
        of `cfg` do not run themselves.
        """
        budget_s = self.budget_s
        if budget_s is None:
            budget_s = 45.0 if device.type == "cpu" else 600.0
        self._deadline = time.perf_counter() + budget_s
        print(_HEADER, flush=True)
        chosen = self.take(cfg, device, settings_of(cfg))
        if not chosen.img_per_s:
            fix = "try batch_gpu, a smaller batch_size or size"
            raise UserError(f"batch_size={cfg.batch_size}: {chosen.note}; {fix}")
        plan = Plan(chosen, chosen)
        for name, values in candidates(cfg, device, self.cores).items():
            before = plan.best
            trials = [self.take(cfg, device, {**before.settings, name: v}) for v in values]
            fastest = max([before, *trials], key=lambda trial: trial.img_per_s)
            speedup = fastest.img_per_s / before.img_per_s
            if speedup > MIN_GAIN:
                plan.best = fastest
                plan.gains.append((f"{name}={fastest.settings[name]}", speedup))
        b = cfg.batch_size
        for batch_size in sorted({max(2, b // 2), 2 * b, 4 * b} - {b}):
            trial = self.take(cfg, device, {**plan.best.settings, "batch_size": batch_size})
            if trial.img_per_s:
                plan.batch_sizes.append(trial)
            elif batch_size > b:
                break  # larger ones need more memory still
        return plan

    def take(self, cfg: TrainConfig, device: torch.device, settings: Settings) -> Trial:
        """Measure one candidate and print its row; it is skipped where time or memory is short."""
        trial = Trial(settings, note=self._reason_to_skip(device, settings))
        if not trial.note:
            try:
                trial = self.measure(cfg, device, settings)
            except (RuntimeError, MemoryError) as e:
                reason = f"does not run: {first_line(e)}"
                trial = replace(trial, note="out of memory" if is_out_of_memory(e) else reason)
        if trial.img_per_s:
            self.trials.append(trial)
        print(_row(trial), flush=True)
        return trial

    def measure(self, cfg: TrainConfig, device: torch.device, settings: Settings) -> Trial:
        """Time steps of the run of `cfg` with `settings`."""
        with self._open(cfg, device, settings) as subject:
            return self._time(subject, settings, self.steps)

    @contextmanager
    def _open(
        self, cfg: TrainConfig, device: torch.device, settings: Settings
    ) -> Iterator[BenchmarkRun]:
        cfg = replace(cfg, **settings)
        prepare_process(device, cfg.precision, cfg.threads, cfg.deterministic)
        hardware.reset_peak(device)
        with open_benchmark_run(cfg, device, cfg.precision) as subject:
            yield subject

    def _time(self, subject: BenchmarkRun, settings: Settings, steps: int) -> Trial:
        run, is_first = subject.run, not self.trials
        micro_batches = run.objective.micro_batches
        count = micro_batches.count
        first_s = subject.first_steps()
        if settings["compile"] == "false" and self._is_hopeless(first_s, settings):
            return Trial(settings, note=f"skipped: the first step took {first_s:.1f} s")
        seconds_per_step = subject.seconds_per_step(0 if is_first else self.seconds, steps)
        memory_gb = hardware.peak_gb(run.device) or hardware.host_peak_gb()
        has_split = micro_batches.count > count
        note = f"{micro_batches.count} micro-batches" if has_split else ""
        rate = subject.batch_size / seconds_per_step
        return Trial(settings, rate, memory_gb, first_s, note)

    def _is_hopeless(self, first_s: float, settings: Settings) -> bool:
        """Return whether a trial starts so slowly that the rest is not worth the time."""
        size = settings["batch_size"]
        known = [t.first_s for t in self.trials[1:] if t.settings["batch_size"] == size]
        return bool(known) and first_s > 1 + 3 * min(known)

    def _reason_to_skip(self, device: torch.device, settings: Settings) -> str:
        """Return why a trial would take too much time or memory; '' where it would not."""
        batch_size, last = settings["batch_size"], self.trials[-1]
        growth = max(1, batch_size / last.settings["batch_size"])
        seconds = last.first_s * growth + max(self.seconds, 6 * batch_size / last.img_per_s)
        is_late = time.perf_counter() + seconds > self._deadline
        if is_late and len(self.trials) > 1:  # the chosen settings are always tried
            return "skipped: out of time"
        needed, available = self._needed_gb(batch_size), self._available_gb(device)
        if needed <= MAX_MEMORY * available:
            return ""
        return f"skipped: needs about {needed:.1f} of {available:.1f} GB"

    def _needed_gb(self, batch_size: int) -> float:
        """Extrapolate the memory of a trial from the largest batch so far; 0 up to it."""
        known = {t.settings["batch_size"]: t.memory_gb for t in self.trials}
        smallest, largest = min(known), max(known)
        if batch_size <= largest:
            return 0.0
        if smallest == largest:  # the least that it could be
            return known[largest] * batch_size / largest / 4
        growth = max(0.0, known[largest] - known[smallest]) / (largest - smallest)
        return known[largest] + growth * (batch_size - largest)

    def _available_gb(self, device: torch.device) -> float:
        """Return the memory that this process could have in all."""
        if self.memory_gb is not None:
            return self.memory_gb
        if device.type == "cuda":
            free, reserved = torch.cuda.mem_get_info(device)[0], torch.cuda.memory_reserved(device)
            return (free + reserved) / 1e9
        return hardware.host_memory_gb()[1] + hardware.resident_gb()


def _has_large_images(cfg: TrainConfig) -> bool:
    try:
        resolution = parse_resolution(cfg.data.get("resolution", 64))
    except ValueError:  # of somebody's own data set; the networks will complain
        return False
    return max(height_width(resolution)) >= CHECKPOINTING_PX


def settings_of(cfg: TrainConfig) -> Settings:
    """Return those settings of a config that trials vary."""
    return {name: getattr(cfg, name) for name in ("precision", "threads", "compile", "batch_size")}


def candidates(cfg: TrainConfig, device: torch.device, cores: int) -> dict[str, list[Any]]:
    """Return other values of precision, threads and compile that could be faster on a device."""
    names = ["bf16", "tf32", "fp32"] if device.type == "cuda" else ["bf16", "fp32"]
    if device.type == "cuda" and cfg.parallel != "fsdp":
        names.append("fp16")
    precisions = []
    for name in names:
        with contextlib.suppress(UserError):  # the device does not have it
            precisions.append(pick_precision(name, device))
    # On a CPU, compiling takes minutes and gains nothing.
    can_compile = device.type == "cuda" and not missing_compiler(device)
    values: dict[str, list[Any]] = {
        "precision": precisions,
        "threads": sorted({max(1, cores // 2), cores}) if device.type == "cpu" else [],
        "compile": ["false", "true"] if can_compile else [],
    }
    return {name: [v for v in vs if v != getattr(cfg, name)] for name, vs in values.items()}


def _row(trial: Trial) -> str:
    """Return a trial as a row under _HEADER, at most 80 columns wide."""
    settings = trial.settings
    compiled = "yes" if settings["compile"] == "true" else "no"
    row = f"{settings['precision']:<10}{settings['threads']:>7}{compiled:>10}"
    row += f"{settings['batch_size']:>7}"
    if trial.img_per_s:
        row += f"{trial.img_per_s:>9,.0f}{trial.memory_gb:>7.2f} GB{trial.first_s:>10.1f} s"
    return f"{row}  {trial.note}".rstrip()[:80]

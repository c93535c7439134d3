"""Measure training speed, where its time goes, and how close it is to what the hardware allows.

    uv run python scripts/bench.py                       # the embedded default, on any machine
    uv run python scripts/bench.py size=m batch_size=256 loss.penalty_every=1 --json bench.json
    uv run python scripts/bench.py size=m data.resolution=64 --toggles none

Takes vgan-train's overrides. Prints Markdown tables; --json writes the same figures. One process
measures everything, so that ratios between rows hold on a noisy machine; --rounds measures every
row several times, one row after another, and reports medians. compile=auto measures what
vgan-train would do on this machine.

The roofline (Williams et al. 2009): every convolution and matrix product of a step, forward and
backward, takes at least its FLOPs divided by the rate of a large matrix product, and at least its
bytes divided by the rate of a large copy; the larger of the two counts. Both rates are measured
first. Adam and the moving average count their bytes. All else is taken as fused into these, so
100 % cannot be reached.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vgan.apps.benchmark import BenchmarkRun, median_seconds, open_benchmark_run
from vgan.cli import register_schemas
from vgan.config import TrainConfig
from vgan.inference.latents import draw, to_host
from vgan.models.discriminator import Discriminator
from vgan.models.generator import LatentInput
from vgan.runtime.device import pick_device, pick_precision, prepare_process
from vgan.runtime.errors import UserError
from vgan.runtime.hardware import describe, peak_gb, reset_peak
from vgan.schema import CONFIG_DIR, typed
from vgan.training.setup import Run, setup
from vgan.training.state import update_ema
from vgan.training.step import d_objective, d_step, g_objective, g_step, train_step
from vgan.training.summary import count_parameters
from vgan.validation import validate

DENSE, GROUPED = (
    f"model.generator.conv={kind} model.discriminator.conv={kind}" for kind in ("dense", "grouped")
)
# name -> overrides. Two words are not overrides: "nchw" is another memory format, and "plain" the
# same model in float32 and NCHW without vgan's settings of the process, in a process of its own.
# On a CPU, compiling takes minutes.
TOGGLES = {
    "cuda": {
        "eager": "compile=false",
        "eager, NCHW": "compile=false nchw",
        "eager, NCHW, fp32": "compile=false nchw precision=fp32",
        "NCHW": "nchw",
        "tf32": "precision=tf32",
        "fp32": "precision=fp32",
        "penalty=finite_difference": "penalty=finite_difference",
        "penalty=double_backward": "penalty=double_backward",
        "no penalty": "loss.penalty_every=1000000",
        "dense": DENSE,
        "grouped": GROUPED,
        "grouped, exact, eager": f"{GROUPED} penalty=double_backward compile=false",
        "depthwise=triton": "depthwise=triton",
        "pointwise=matmul": "pointwise=matmul",
        "triton, matmul": "depthwise=triton pointwise=matmul",
        "cuda_graphs": "cuda_graphs=true",
        "plain": "plain",
    },
    "cpu": {
        "NCHW": "nchw",
        "fp32": "precision=fp32",
        "NCHW, fp32": "nchw precision=fp32",
        "penalty=finite_difference": "penalty=finite_difference",
        "penalty=double_backward": "penalty=double_backward",
        "no penalty": "loss.penalty_every=1000000",
        "dense": DENSE,
        "grouped": GROUPED,
        "one thread": "threads=1",
        "plain": "plain",
    },
}
THREADS = torch.get_num_threads()  # to restore after a variant that sets them
TOGGLES["mps"] = {k: v for k, v in TOGGLES["cpu"].items() if k != "one thread"}


def train_config(overrides: list[str]) -> TrainConfig:
    """Compose and check the config that vgan-train would use. Raises UserError for a wrong one."""
    register_schemas()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = typed(compose("train", overrides=overrides))
    validate(cfg)
    return cfg


def build_run(overrides: list[str]) -> Run:
    """Build the run that the overrides describe, without compiling it."""
    cfg = train_config(overrides)
    device = pick_device(cfg.device)
    return setup(cfg, device, pick_precision(cfg.precision, device))


@contextmanager
def open_variant(overrides: list[str]) -> Iterator[BenchmarkRun]:
    """Open the run that the overrides describe, compiled where they say so.

    Raises UserError where they are wrong.
    """
    is_plain = "plain" in overrides
    is_nchw = is_plain or "nchw" in overrides
    words = [word for word in overrides if word not in ("nchw", "plain")]
    if is_plain:
        words += ["precision=fp32", "compile=false"]
    cfg = train_config(words)
    device = pick_device(cfg.device)
    precision = pick_precision(cfg.precision, device)
    if not is_plain:
        torch.set_num_threads(THREADS)
        prepare_process(device, precision, cfg.threads)
    with open_benchmark_run(cfg, device, precision) as subject, memory_format(is_nchw):
        state = subject.run.state
        if is_nchw:
            for network in (state.G, state.D, state.G_ema):
                network.to(memory_format=torch.contiguous_format)
        yield subject


@contextmanager
def memory_format(is_nchw: bool) -> Iterator[None]:
    """Let the networks store their features as NCHW, or as channels-last."""
    kinds: list[Any] = [LatentInput, Discriminator]
    before = LatentInput.memory_format
    for kind in kinds:
        kind.memory_format = torch.contiguous_format if is_nchw else before
    try:
        yield
    finally:
        for kind in kinds:
            kind.memory_format = before


def phases(subject: BenchmarkRun, seconds: float) -> dict[str, float]:
    """Return the seconds of each phase of a step.

    What cannot run alone (the penalty, a network without its optimizer) is a difference.
    """
    run, state, how = subject.run, subject.run.state, subject.run.objective
    every = run.cfg.loss.penalty_every
    hp, batch = run.hyperparameters(), subject.next_batch()
    without, penalized = (replace(hp, penalty_weight=weight) for weight in (0, every))

    def optimize() -> None:
        state.opt_D.step()
        state.opt_G.step()

    work = {
        "data": subject.next_batch,
        "D": lambda: d_step(state, how, batch, without),
        "D with penalty": lambda: d_step(state, how, batch, penalized),
        "G": lambda: g_step(state, how, batch, without),
        "optimizers": optimize,
        "EMA": lambda: update_ema(state.G_ema, state.G, 0.999),
    }
    times = {name: median_seconds(call, run.device, seconds / 5) for name, call in work.items()}
    optimizer = times["optimizers"] / 2
    return {
        "data": times["data"],
        "discriminator": times["D"] - optimizer,
        "penalty": max(times["D with penalty"] - times["D"], 0) / every,
        "generator": times["G"] - optimizer,
        "optimizer and EMA": times["optimizers"] + times["EMA"],
    }


class Counter(TorchDispatchMode):
    """Sums of FLOPs, bytes and least seconds over all convolutions and matrix products."""

    def __init__(self, flops_per_s: float, bytes_per_s: float) -> None:
        super().__init__()
        self.rates = flops_per_s, bytes_per_s
        self.flops = self.bytes = self.seconds = 0.0

    def add(self, flops: float, tensors: list[Any]) -> None:
        moved = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
        self.flops += flops
        self.bytes += moved
        self.seconds += max(flops / self.rates[0], moved / self.rates[1])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("convolution", "mkldnn_convolution"):
            self.add(2 * out.numel() * args[1][0].numel(), [args[0], args[1], out])
        elif name == "convolution_backward":
            grad, x, weight, mask = args[0], args[1], args[2], args[10]
            flops = 2 * grad.numel() * weight[0].numel() * (mask[0] + mask[1])
            self.add(
                flops, [grad, *([x] if mask[1] else []), *([weight] if mask[0] else []), *out[:2]]
            )
        elif name in ("mm", "addmm", "bmm", "baddbmm"):
            a, b = args[-2:]
            self.add(2 * out.numel() * a.shape[-1], [a, b, out])
        elif "scaled_dot_product" in name:
            backward = "backward" in name
            q, k, v = (t for t in args[1:4]) if backward else args[:3]
            products = 5 if backward else 2  # the backward pass computes the weights again
            result = list(out[:3]) if backward else [out[0]]
            self.add(
                products * 2 * q.shape[:-1].numel() * k.shape[-2] * v.shape[-1], [q, k, v, *result]
            )
        return out


def roofline(subject: BenchmarkRun, flops_per_s: float, bytes_per_s: float) -> Counter:
    """Count the work of a mean step and the seconds that it takes at the measured rates."""
    run, state, every = subject.run, subject.run.state, subject.run.cfg.loss.penalty_every
    how = replace(run.objective, d=d_objective, g=g_objective)  # not compiled
    hp = run.hyperparameters()
    counters = []
    for weight in [1, 0] if every > 1 else [1]:
        batch = run.batch(subject.loader)
        with Counter(flops_per_s, bytes_per_s) as counter:
            train_step(state, how, batch, replace(hp, penalty_weight=weight))
        counters.append(counter)
    for name in ("flops", "bytes", "seconds"):
        penalized, without = getattr(counters[0], name), getattr(counters[-1], name)
        setattr(counter, name, without + (penalized - without) / every)
    # Adam reads p, g, m and v and writes p, m and v; the average reads two and writes one; float32.
    moved = 4 * (10 * count_parameters(state.G) + 7 * count_parameters(state.D))
    counter.bytes += moved
    counter.seconds += moved / bytes_per_s
    return counter


def ceilings(subject: BenchmarkRun, precision: str) -> tuple[float, float]:
    """Return FLOP/s of a large matrix product and bytes/s, read and written, of a large copy."""
    device = subject.run.device
    side, length = (8192, 2**29) if device.type == "cuda" else (2048, 2**26)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = median_seconds(lambda: a @ b, device, 1)
    source = torch.randn(length // 4, device=device)
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source), device, 1)
    return 2 * side**3 / product, 2 * length / copy


def sampling_rate(subject: BenchmarkRun, seconds: float) -> float:
    """Return the images per second that vgan-sample would draw, without encoding them."""
    run, index = subject.run, torch.arange(256)
    precision = "fp32" if run.device.type == "cpu" else run.precision
    G = run.state.G_ema

    def batches() -> None:
        for _ in to_host(draw(G, index, 0, precision=precision) for _ in range(4)):
            pass

    return 4 * len(index) / median_seconds(batches, run.device, seconds)


def machine(device: torch.device) -> str:
    """Return the names of device and torch."""
    name = f"{describe(device)}, torch {torch.__version__}"
    return f"{name}, CUDA {torch.version.cuda}" if device.type == "cuda" else name


def table(rows: list[list[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def measure_base(overrides: list[str], seconds: float) -> dict[str, Any]:
    """Measure the chosen configuration in full."""
    with open_variant(overrides) as subject:
        run, batch_size = subject.run, subject.batch_size
        flops_per_s, bytes_per_s = ceilings(subject, run.precision)
        reset_peak(run.device)
        first = subject.first_steps(warmup=3)
        step = subject.seconds_per_step(seconds)
        peak = peak_gb(run.device)
        steps, waited_s = run.state.cur_nimg / batch_size, subject.loader.waited_s
        counted = roofline(subject, flops_per_s, bytes_per_s)
        return {
            "machine": machine(run.device),
            "overrides": overrides,
            "precision": run.precision,
            "compiled": run.objective.d is not d_objective,
            "batch_size": batch_size,
            "parameters": {n: count_parameters(getattr(run.state, n)) for n in "GD"},
            "img_per_s": batch_size / step,
            "step_ms": step * 1e3,
            "first_step_s": first,
            "peak_gb": peak,
            "phases_ms": {k: v * 1e3 for k, v in phases(subject, seconds).items()},
            "waiting_for_data": waited_s / steps / step,
            "roofline": {
                "tflop_per_s": flops_per_s / 1e12,
                "gb_per_s": bytes_per_s / 1e9,
                "gflop_per_img": counted.flops / batch_size / 1e9,
                "mb_per_img": counted.bytes / batch_size / 1e6,
                "img_per_s": batch_size / counted.seconds,
                "share": counted.seconds / step,
            },
            "sampling_img_per_s": sampling_rate(subject, seconds / 2),
        }


def measure_toggles(
    overrides: list[str], kinds: dict[str, str], seconds: float, rounds: int
) -> dict[str, dict[str, Any]]:
    """Measure img/s, first steps and peak memory of the chosen configuration and each variant."""
    variants = {"as chosen": "", **kinds}
    rows: dict[str, dict[str, Any]] = {
        name: {"overrides": extra, "img_per_s": []} for name, extra in variants.items()
    }
    for _ in range(rounds):
        for name, extra in variants.items():
            row = rows[name]
            try:
                if extra == "plain" and "plain" not in overrides:
                    row |= measure_apart([*overrides, extra], seconds, row["img_per_s"])
                else:
                    measure_variant([*overrides, *extra.split()], seconds, row)
            except UserError as e:
                row["error"] = str(e)
            except torch.OutOfMemoryError:
                row["error"] = "out of memory"
    return rows


def measure_variant(overrides: list[str], seconds: float, row: dict[str, Any]) -> None:
    """Add a measurement of one variant to its row."""
    reset_peak(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with open_variant(overrides) as subject:
        row["first_step_s"] = subject.first_steps(warmup=3)
        row["img_per_s"].append(subject.batch_size / subject.seconds_per_step(seconds))
        row["peak_gb"] = peak_gb(subject.run.device)


def measure_apart(overrides: list[str], seconds: float, rates: list[float]) -> dict[str, Any]:
    """Return the row of a variant measured in its own process; `rates` are its earlier img/s."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        options = ["--toggles", "alone", "--seconds", str(seconds), "--json", str(path)]
        subprocess.run(
            [sys.executable, __file__, *overrides, *options], check=True, stdout=subprocess.DEVNULL
        )
        row = json.loads(path.read_text())["toggles"]["as chosen"]
    return {**row, "overrides": overrides[-1], "img_per_s": rates + row["img_per_s"]}


def print_base(figures: dict[str, Any]) -> None:
    """Print the figures of the chosen configuration as a table."""
    roof, parameters = figures["roofline"], figures["parameters"]
    print(f"\n{figures['machine']}; {' '.join(figures['overrides']) or 'the embedded default'}\n")
    compiled = "compiled" if figures["compiled"] else "eager"
    mode = f"{figures['precision']}, {compiled}, batch {figures['batch_size']}"
    sizes = f"{parameters['G'] / 1e6:.2f} M + {parameters['D'] / 1e6:.2f} M parameters"
    rate = f"**{figures['img_per_s']:,.0f}** ({figures['step_ms']:.1f} ms per step)"
    rows = {"what": "figure", "networks": f"{sizes}; {mode}", "images per second": rate}
    rows["first steps (s)"] = f"{figures['first_step_s']:.1f}"
    if figures["peak_gb"] is not None:
        rows["peak memory (GB)"] = f"{figures['peak_gb']:.2f}"
    rows |= {f"{name} (ms)": f"{ms:.2f}" for name, ms in figures["phases_ms"].items()}
    rows["waiting for data"] = f"{figures['waiting_for_data']:.2%} of the step"
    rows["work per image"] = f"{roof['gflop_per_img']:.3g} GFLOP, {roof['mb_per_img']:.3g} MB"
    rows["ceilings"] = f"{roof['tflop_per_s']:.3g} TFLOP/s, {roof['gb_per_s']:.3g} GB/s"
    rows["roofline"] = f"{roof['img_per_s']:,.0f} img/s; reached {roof['share']:.0%}"
    rows["sampling (batches of 256)"] = f"{figures['sampling_img_per_s']:,.0f} img/s"
    print(table([list(row) for row in rows.items()]), flush=True)


def print_toggles(rows: dict[str, dict[str, Any]]) -> None:
    """Print the variants as a table; rates are medians over the rounds."""
    lines = [["variant", "img/s", "of the chosen", "first steps (s)", "peak GB"]]
    reference = statistics.median(rows["as chosen"]["img_per_s"])
    for name, row in rows.items():
        if not row["img_per_s"]:
            lines.append([name, row["error"], "", "", ""])
            continue
        rate, peak = statistics.median(row["img_per_s"]), row.get("peak_gb")
        memory = "" if peak is None else f"{peak:.2f}"
        lines.append(
            [name, f"{rate:,.0f}", f"{rate / reference:.2f}", f"{row['first_step_s']:.1f}", memory]
        )
    print("\n" + table(lines), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="as for vgan-train")
    names = "; ".join(TOGGLES["cuda"])
    toggles = f"all, none, alone (img/s only) or, separated by semicolons, {names}"
    parser.add_argument("--toggles", default="all", help=toggles)
    parser.add_argument("--seconds", type=float, default=4, help="of measuring for each figure")
    parser.add_argument("--rounds", type=int, default=1, help="measurements of each variant")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_intermixed_args()  # overrides may stand before and after options
    figures: dict[str, Any] = {}
    try:
        if args.toggles == "alone":
            figures["toggles"] = measure_toggles(args.overrides, {}, args.seconds, args.rounds)
            return
        figures |= measure_base(args.overrides, args.seconds)
        print_base(figures)
        kinds = TOGGLES[pick_device(train_config(args.overrides).device).type]
        if args.toggles != "all":
            chosen = [name.strip() for name in args.toggles.split(";")]
            kinds = {name: kinds[name] for name in chosen if name in kinds}
        if kinds:
            figures["toggles"] = measure_toggles(args.overrides, kinds, args.seconds, args.rounds)
            print_toggles(figures["toggles"])
    except UserError as e:
        sys.exit(f"bench: {e}")
    finally:
        if args.json and figures:
            args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

"""How fast training is, where its time goes, and how far from what the hardware allows.

    uv run python scripts/bench.py                                        # the embedded default, on whatever machine this is
    uv run python scripts/bench.py size=m batch_size=256 loss.penalty_every=1 data.size=4096 --json bench.json
    uv run python scripts/bench.py size=m data.resolution=64 --toggles none

Takes vgan-train's overrides. Prints tables in Markdown; --json writes the same figures. Everything is measured in one process
of one run, so ratios between rows hold even on a noisy machine; --rounds takes each row several times in turn and gives
the median. compile=auto measures what vgan-train would do on this machine.

The roofline: every convolution and matrix product of a step, forward and backward, takes at least its FLOPs over
the rate of a large matrix product, and at least its inputs and outputs over the rate of a large copy, both measured here
first; the larger of the two counts, and Adam and the running average count their memory traffic. All else is taken as fused
into these, so 100 % cannot be reached.
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
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vgan.cli  # noqa: F401  registers the schema
from vgan.apps.benchmark import (
    BenchmarkRun,
    device_name,
    first_steps,
    make_benchmark_run,
    peak_gb,
    release,
    step_seconds,
    time_of,
)
from vgan.config import CONFIG_DIR, validate
from vgan.inference.latents import draw, to_host
from vgan.models.discriminator import Discriminator
from vgan.models.generator import LatentInput
from vgan.runtime.device import pick_device, pick_precision, prepare_process
from vgan.runtime.errors import UserError
from vgan.training.ema import update_ema
from vgan.training.step import Batch, d_step, g_step, train_step

DENSE, GROUPED = (
    f"model.generator.conv={kind} model.discriminator.conv={kind}" for kind in ("dense", "grouped")
)
# name -> overrides. Two words are no overrides: "nchw" is another memory format, and "plain" what the same model does in
# float32 and NCHW without any of vgan's settings of the process (in a process of its own). On a CPU, compiling takes minutes.
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
THREADS = torch.get_num_threads()  # to go back to after a variant that sets its own
TOGGLES["mps"] = {k: v for k, v in TOGGLES["cpu"].items() if k != "one thread"}


def prepare(overrides: list[str]) -> BenchmarkRun:
    """Build the run that the overrides describe, compiled where they say so. Raises UserError for wrong ones."""
    plain = "plain" in overrides
    nchw = plain or "nchw" in overrides
    if plain:
        overrides = [*overrides, "precision=fp32", "compile=false"]
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = compose("train", overrides=[o for o in overrides if o not in ("nchw", "plain")])
    validate(cfg)
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    device = pick_device(config["device"])
    precision = pick_precision(config["precision"], device)
    if not plain:
        torch.set_num_threads(THREADS)
        prepare_process(device, precision, config["threads"])
    subject = replace(make_benchmark_run(config, device, precision), nchw=nchw)
    if nchw:
        for network in (subject.run.state.G, subject.run.state.D, subject.run.state.G_ema):
            network.to(memory_format=torch.contiguous_format)
    return subject


@contextmanager
def memory_format_of(subject: BenchmarkRun) -> Iterator[None]:
    """Let the networks lay out their maps as the subject says."""
    kinds: list[Any] = [LatentInput, Discriminator]
    before = LatentInput.memory_format
    for kind in kinds:
        kind.memory_format = torch.contiguous_format if subject.nchw else before
    try:
        yield
    finally:
        for kind in kinds:
            kind.memory_format = before


def phases(subject: BenchmarkRun, seconds: float) -> dict[str, float]:
    """Seconds a step in each phase. What cannot run alone (the penalty, a network without its optimizer) is a difference."""
    run = subject.run
    state, recipe, now = run.state, run.recipe, run.moment_at(0)
    batch = Batch(*subject.inputs())
    share = seconds / 5

    def optimize() -> None:
        state.opt_D.step()
        state.opt_G.step()

    times = {
        "feed": time_of(subject, subject.inputs, share),
        "D": time_of(subject, lambda: d_step(state, recipe, now, batch, 0), share),
        "D+P": time_of(subject, lambda: d_step(state, recipe, now, batch, 1), share),
        "G": time_of(subject, lambda: g_step(state, recipe, now, batch), share),
        "optimizers": time_of(subject, optimize, share),
        "EMA": time_of(subject, lambda: update_ema(state.G_ema, state.G, 0.999), share / 5),
    }
    half = times["optimizers"] / 2
    return {
        "feed": times["feed"],
        "discriminator": times["D"] - half,
        "penalty": max(times["D+P"] - times["D"], 0) / subject.penalty_every,
        "generator": times["G"] - half,
        "optimizer and EMA": times["optimizers"] + times["EMA"],
    }


class Counter(TorchDispatchMode):
    """Sums the seconds that a roofline allows for every convolution and matrix product, and their FLOPs and bytes."""

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
            products = 5 if backward else 2  # the backward forms the weights anew
            result = list(out[:3]) if backward else [out[0]]
            self.add(
                products * 2 * q.shape[:-1].numel() * k.shape[-2] * v.shape[-1], [q, k, v, *result]
            )
        return out


def roofline(subject: BenchmarkRun, flops_per_s: float, bytes_per_s: float) -> Counter:
    """What a step with penalty must do, and the seconds that this takes at the measured ceilings."""
    run = subject.run
    kind = type(run.recipe)
    recipe = replace(run.recipe, d_forward=kind.d_forward, g_forward=kind.g_forward)
    batch, now = subject.inputs(), run.moment_at(0)
    totals = []
    for weight in dict.fromkeys((1, 0 if subject.penalty_every > 1 else 1)):
        with Counter(flops_per_s, bytes_per_s) as counter:
            train_step(run.state, recipe, now, *batch, weight)
        totals.append(counter)
    for name in ("flops", "bytes", "seconds"):
        with_penalty, without = (getattr(totals[i], name) for i in (0, -1))
        setattr(counter, name, without + (with_penalty - without) / subject.penalty_every)
    # Adam reads p, g, m, v and writes p, m, v; the average reads two and writes one; all float32
    moved = 4 * sum(
        p.numel() * (7 + 3 * (net is run.state.G))
        for net in (run.state.G, run.state.D)
        for p in net.parameters()
    )
    counter.bytes += moved
    counter.seconds += moved / bytes_per_s
    return counter


def ceilings(subject: BenchmarkRun, precision: str) -> tuple[float, float]:
    """FLOP/s of a large matrix product in `precision` and bytes/s of a large copy, read and written bytes counted."""
    device = subject.run.recipe.device
    side, length = (8192, 2**29) if device.type == "cuda" else (2048, 2**26)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = time_of(subject, lambda: a @ b, 1)
    source = torch.randn(length // 4, device=device)
    target = torch.empty_like(source)
    copy = time_of(subject, lambda: target.copy_(source), 1)
    return 2 * side**3 / product, 2 * length / copy


def sampling_rate(subject: BenchmarkRun, seconds: float) -> float:
    """Pictures a second that the generator makes as uint8 on the host, without encoding, as vgan-sample does."""
    device, index = subject.run.recipe.device, torch.arange(256)
    precision = "fp32" if device.type == "cpu" else subject.run.recipe.precision

    def batches() -> None:
        for _ in to_host(
            draw(subject.run.state.G_ema, index, 0, precision=precision) for _ in range(4)
        ):
            pass

    return 4 * len(index) / time_of(subject, batches, seconds)


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device_name(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    return f"{device.type}, {device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def table(rows: list[list[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def measure_base(overrides: list[str], seconds: float) -> tuple[dict[str, Any], BenchmarkRun]:
    """The chosen configuration in full."""
    subject = prepare(overrides)
    run = subject.run
    device, precision = run.recipe.device, run.recipe.precision
    flops_per_s, bytes_per_s = ceilings(subject, precision)
    release(device)
    first = first_steps(subject)
    step = step_seconds(subject, seconds)
    peak = peak_gb(device)
    counted = roofline(subject, flops_per_s, bytes_per_s)
    waited = subject.feed.waited_s
    steps = subject.step
    figures = {
        "machine": machine(device),
        "overrides": overrides,
        "precision": precision,
        "compiled": run.recipe.d_forward is not type(run.recipe).d_forward,
        "batch_size": subject.batch_size,
        "parameters": {n: sum(p.numel() for p in getattr(run.state, n).parameters()) for n in "GD"},
        "img_per_s": subject.batch_size / step,
        "step_ms": step * 1e3,
        "first_step_s": first,
        "peak_gb": peak,
        "phases_ms": {k: v * 1e3 for k, v in phases(subject, seconds).items()},
        "waiting_for_data": waited / max(steps, 1) / step,
        "roofline": {
            "tflop_per_s": flops_per_s / 1e12,
            "gb_per_s": bytes_per_s / 1e9,
            "gflop_per_img": counted.flops / subject.batch_size / 1e9,
            "mb_per_img": counted.bytes / subject.batch_size / 1e6,
            "img_per_s": subject.batch_size / counted.seconds,
            "share": counted.seconds / step,
        },
        "sampling_img_per_s": sampling_rate(subject, seconds / 2),
    }
    return figures, subject


def measure_toggles(
    overrides: list[str], kinds: dict[str, str], seconds: float, rounds: int
) -> dict[str, dict[str, Any]]:
    """img/s, time to the first step and peak memory of each variant, the chosen configuration among them."""
    rows: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for name, extra in {"as chosen": "", **kinds}.items():
            row = rows.setdefault(name, {"overrides": extra, "img_per_s": []})
            if extra == "plain" and "plain" not in overrides:
                row |= measure_apart([*overrides, extra], seconds, row["img_per_s"])
                continue
            try:
                subject = prepare([*overrides, *extra.split()])
            except UserError as e:
                row["error"] = str(e)
                continue
            device = subject.run.recipe.device
            release(device)
            try:
                with memory_format_of(subject):
                    row["first_step_s"] = first_steps(subject)
                    row["img_per_s"].append(subject.batch_size / step_seconds(subject, seconds))
                row["peak_gb"] = peak_gb(device)
            except torch.OutOfMemoryError:
                row["error"] = "out of memory"
            subject.feed.close()
            del subject
            release(device)
    return rows


def measure_apart(overrides: list[str], seconds: float, rates: list[float]) -> dict[str, Any]:
    """The row of one variant, measured in a process of its own; its img/s join `rates`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        options = ["--toggles", "alone", "--seconds", str(seconds), "--json", str(path)]
        subprocess.run(
            [sys.executable, __file__, *overrides, *options], check=True, stdout=subprocess.DEVNULL
        )
        row = json.loads(path.read_text())["toggles"]["as chosen"]
    return {**row, "overrides": overrides[-1], "img_per_s": rates + row["img_per_s"]}


def print_base(figures: dict[str, Any]) -> None:
    roof, parameters = figures["roofline"], figures["parameters"]
    print(f"\n{figures['machine']}; {' '.join(figures['overrides']) or 'the embedded default'}\n")
    mode = f"{figures['precision']}, {'compiled' if figures['compiled'] else 'eager'}, batch {figures['batch_size']}"
    peak = "" if figures["peak_gb"] is None else f"{figures['peak_gb']:.2f}"
    rows = [["what", "figure"]]
    rows += [
        [
            "networks",
            f"{parameters['G'] / 1e6:.2f} M + {parameters['D'] / 1e6:.2f} M parameters; {mode}",
        ]
    ]
    rows += [
        ["images a second", f"**{figures['img_per_s']:,.0f}** ({figures['step_ms']:.1f} ms a step)"]
    ]
    rows += [["first steps (s)", f"{figures['first_step_s']:.1f}"]]
    rows += [["peak memory (GB)", peak]] if peak else []
    rows += [[f"{name} (ms)", f"{ms:.2f}"] for name, ms in figures["phases_ms"].items()]
    rows += [["waiting for data", f"{figures['waiting_for_data']:.2%} of the step"]]
    rows += [["work an image", f"{roof['gflop_per_img']:.3g} GFLOP, {roof['mb_per_img']:.3g} MB"]]
    rows += [["ceilings", f"{roof['tflop_per_s']:.3g} TFLOP/s, {roof['gb_per_s']:.3g} GB/s"]]
    rows += [["roofline", f"{roof['img_per_s']:,.0f} img/s; reached {roof['share']:.0%}"]]
    rows += [["sampling (256 a pass)", f"{figures['sampling_img_per_s']:,.0f} img/s"]]
    print(table(rows), flush=True)


def print_toggles(rows: dict[str, dict[str, Any]]) -> None:
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
    parser.add_argument(
        "--toggles",
        default="all",
        help=f"all, none, alone (img/s and no more) or, between semicolons, {names}",
    )
    parser.add_argument("--seconds", type=float, default=4, help="of measuring for each figure")
    parser.add_argument(
        "--rounds", type=int, default=1, help="how often each variant is measured, in turn"
    )
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_intermixed_args()  # overrides may stand before and after options
    try:
        if args.toggles == "alone":
            figures = {"toggles": measure_toggles(args.overrides, {}, args.seconds, args.rounds)}
            return
        figures, subject = measure_base(args.overrides, args.seconds)
        print_base(figures)
        kinds = TOGGLES[subject.run.recipe.device.type]
        subject.feed.close()
        del subject
        if args.toggles != "all":
            chosen = (
                [] if args.toggles == "none" else [name.strip() for name in args.toggles.split(";")]
            )
            kinds = {name: kinds[name] for name in chosen if name in kinds}
        if kinds:
            figures["toggles"] = measure_toggles(args.overrides, kinds, args.seconds, args.rounds)
            print_toggles(figures["toggles"])
    except UserError as e:
        sys.exit(f"bench: {e}")
    finally:
        if args.json and "figures" in locals():
            args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

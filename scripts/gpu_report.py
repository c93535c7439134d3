"""Measure on a GPU what the documentation says of speed and images, in parts of some minutes.

    python scripts/gpu_report.py --part 1                  # tests, speed at 32 px, profile, start
    python scripts/gpu_report.py --part 2 --cifar cifar/train_images.npy   # 7 minutes of CIFAR-10
    python scripts/gpu_report.py --part 3                  # 64 and 128 px, data feed
    python scripts/gpu_report.py --part 4                  # penalties, sizes, precisions, layouts
    python scripts/gpu_report.py --into docs/performance.md              # copy the tables
    python scripts/gpu_report.py --rehearse --out outputs/rehearsal      # tiny, on a CPU

Every measurement runs in a process of its own, under a limit of time. After each, report.json and
report.md in --out are written again, so that whatever ends the command loses the rest only. The
same command goes on: measurements that succeeded are not repeated.

Needs torch, torchvision, hydra-core, omegaconf and, for the tests, pytest; no network.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench import measure_base, measure_variant, open_variant, table
from bench_feed import measure_sparse

Figures = dict[str, Any]
BEGIN, END = "<!-- gpu_report -->", "<!-- end of gpu_report -->"
GPU_ONLY = ("eager", "depthwise=triton", "triton, matmul", "cuda_graphs")
AT_MINUTES = (2, 4, 7)  # of a training of 7 minutes
# The first that matches names a kernel's group.
GROUPS = {
    "attention": r"flash|fmha|attention|softmax",
    "depthwise": r"depthwise|dgrad2d|wgrad2d|conv2d_c1",
    "matrix products": r"gemm|cublas|nvjet|cutlass.*(tn|nt|nn)_|\bmm\b|addmm|bmm",
    "convolutions": r"conv|cudnn|xmma|implicit|fprop|dgrad|wgrad",
    "optimizer": r"adam|multi_tensor",
    "copies": r"memcpy|memset|copy",
    "fused by the compiler": r"triton",
}


@dataclass(frozen=True)
class Step:
    """A measurement: `measure` runs in a process of its own and returns figures."""

    name: str
    seconds: float  # it is stopped after these
    measure: Callable[[], Figures]


@dataclass(frozen=True)
class Sizes:
    """What to measure: as published, or so small that a CPU needs a second."""

    device: str
    size: str
    batch: int
    seconds: float  # of timing for each figure
    resolution: int | None = None  # instead of every other
    images: int = 4096

    def words(self, resolution: int, batch: int, *more: str) -> list[str]:
        """Return overrides of vgan-train for a run on images that are in memory."""
        resolution = self.resolution or resolution
        small = [f"batch_size={min(batch, self.batch)}", f"data.size={self.images}"]
        words = [f"device={self.device}", f"size={self.size}", f"data.resolution={resolution}"]
        small += ["threads=1"] if self.device == "cpu" else []
        return [*words, *small, "loss.penalty_every=1", "model.discriminator.logits_px=4", *more]


FULL = Sizes("cuda", "m", 256, 4)
TINY = Sizes("cpu", "xs", 4, 0, resolution=16, images=16)


def run_tests(sizes: Sizes) -> Figures:
    """Run the tests marked gpu."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    if sizes is TINY:
        command += ["--collect-only", "tests/test_steps.py"]
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    print(result.stdout, result.stderr)
    last = (result.stdout.strip() or result.stderr.strip() or "no output").splitlines()[-1]
    # A failure counts as not measured, so that the same command runs the tests again.
    return {"error" if result.returncode else "result": last.strip("= ")}


def measure_speed(words: list[str], seconds: float) -> Figures:
    """Measure images per second, the first steps and memory of one configuration."""
    row: Figures = {"img_per_s": []}
    measure_variant(words, seconds, row)
    row["img_per_s"] = row["img_per_s"][0]
    return row


def measure_start(words: list[str], cache: Path) -> Figures:
    """Measure the seconds of the first steps, with the compiler's cache in a folder."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    os.environ["TRITON_CACHE_DIR"] = str(cache / "triton")
    with open_variant(words) as subject:
        return {"first_step_s": subject.first_steps()}


def profile(words: list[str], steps: int) -> Figures:
    """Measure the device time of every kernel in a step, in milliseconds."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with open_variant(words) as subject:
        subject.first_steps(warmup=3)
        is_cuda = subject.run.device.type == "cuda"
        step_ms = 1e3 * subject.seconds_per_step(1 if is_cuda else 0)
        activities = [ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]
        with torch_profile(activities=activities) as recorded:
            for _ in range(steps):
                subject.step()
            if is_cuda:
                torch.cuda.synchronize()
    groups: dict[str, float] = {}
    kernels = []
    for event in recorded.key_averages():
        us = event.self_device_time_total if is_cuda else event.self_cpu_time_total
        ms, name = us / 1e3 / steps, event.key
        if ms <= 0:
            continue
        found = (group for group, pattern in GROUPS.items() if re.search(pattern, name.lower()))
        group = next(found, "other")
        groups[group] = groups.get(group, 0) + ms
        kernels.append({"kernel": name, "group": group, "ms": ms, "calls": event.count / steps})
    kernels.sort(key=lambda kernel: -kernel["ms"])
    return {"step_ms": step_ms, "groups": groups, "kernels": kernels[:25]}


def train_cifar(sizes: Sizes, cifar: Path | None, run_dir: Path, minutes: float) -> Figures:
    """Train on CIFAR-10 for some minutes, and evaluate three of its checkpoints."""
    from vgan.cli import COMMANDS, run

    words = ["data=folder", f"data.path={cifar}", "data.resolution=32"] if cifar else []
    words += [f"device={sizes.device}", f"size={sizes.size}", f"batch_size={sizes.batch}"]
    words += ["loss.gamma.start=0.2", "loss.gamma.end=0.1", "loss.penalty_every=1"]
    words += ["optim.lr_G.start=3e-4", "optim.lr_D.start=3e-4", "ema.halflife_kimg=20"]
    if sizes is TINY:
        words += sizes.words(0, sizes.batch)
    rate = measure_speed(words, sizes.seconds)["img_per_s"]
    last = max(AT_MINUTES)
    unit = max(sizes.batch, round(rate * 60 * minutes / last / sizes.batch) * sizes.batch) / 1000
    words += [f"total_kimg={last * unit:g}", f"checkpoint_kimg={unit:g}", f"tick_kimg={unit:g}"]
    words += [f"snapshot_kimg={unit:g}", f"keep_checkpoints={last}", "checkpoint_minutes=60"]
    sys.argv = ["vgan-train", *words, f"run_dir={run_dir}"]
    run(COMMANDS["vgan-train"])
    found = sorted(run_dir.glob("checkpoint-*.safetensors"))
    chosen = [str(found[min(minute, len(found)) - 1]) for minute in AT_MINUTES]
    tiny = ["n=20", "metrics=[fid,diversity]", "features.train_kimg=0.1"]
    how = ["features=learned", *(["n=50000"] if sizes is FULL else tiny)]
    sys.argv = ["vgan-eval", f"ckpt=[{','.join(chosen)}]", *how, f"device={sizes.device}"]
    run(COMMANDS["vgan-eval"])
    ticks = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    curve = []
    for row in metrics:
        tick = next(t for t in ticks if t["cur_nimg"] >= row["cur_nimg"])
        curve.append({"minutes": tick["speed/session_s"] / 60, **row})
    return {"img_per_s": rate, "curve": curve}


def feed(sizes: Sizes) -> Figures:
    """Measure how fast images reach the device from a file, and how long steps wait for them."""
    images, batch, batches = (200_000, 256, 200) if sizes is FULL else (64, 4, 2)
    rows: Figures = {}
    for name, step_ms in {"at full speed": 0.0, "steps of 20 ms": 20.0}.items():
        how = (batch, batches, step_ms, torch.device(sizes.device))
        rate, waiting, _ = measure_sparse(images, 64, *how)
        rows[name] = {"img_per_s": rate, "waiting": waiting}
    return rows


def parts(sizes: Sizes, out: Path, cifar: Path | None, minutes: float) -> dict[int, list[Step]]:
    """Return the measurements of every part, the most important ones first."""
    at32 = sizes.words(32, 256)
    seconds = sizes.seconds

    def speed(name: str, *more: str, limit: float = 100, base: list[str] = at32) -> Step:
        return Step(name, limit, partial(measure_speed, [*base, *more], seconds))

    first = [
        Step("tests", 150, partial(run_tests, sizes)),
        Step("speed: default", 150, partial(measure_base, at32, seconds)),
        speed("speed: eager", "compile=false"),
        speed("speed: depthwise=triton", "depthwise=triton"),
        speed("speed: triton, matmul", "depthwise=triton", "pointwise=matmul"),
        Step("profile", 60, partial(profile, at32, 10 if sizes is FULL else 2)),
        Step("start: cold", 60, partial(measure_start, at32, out / "cache")),
        Step("start: warm", 60, partial(measure_start, at32, out / "cache")),
        speed("speed: cuda_graphs", "cuda_graphs=true"),
    ]
    train = partial(train_cifar, sizes, cifar, out / "cifar10", minutes)
    second = [Step("cifar10", 60 * minutes + 150, train)]
    third = []
    for px, batch in ((64, 128), (128, 64)):
        words = sizes.words(px, batch)
        third.append(Step(f"{px} px: default", 150, partial(measure_base, words, seconds)))
        triton = speed(f"{px} px: depthwise=triton", "depthwise=triton", base=words)
        third.append(triton)
    third.append(Step("feed", 60, partial(feed, sizes)))
    fourth = [
        speed("32 px: patches of 2 px", "size.patch_size=2"),
        speed("32 px: patches of 2 px, depthwise=triton", "size.patch_size=2", "depthwise=triton"),
        speed("32 px: optimizer=soap", "optimizer=soap"),
        speed("32 px: size=s, optimizer=soap", "size=s", "optimizer=soap"),
        speed("32 px: pointwise=matmul", "pointwise=matmul"),
        speed("32 px: no penalty", "loss.penalty_every=1000000"),
        speed("32 px: penalty=finite_difference", "penalty=finite_difference"),
        speed("32 px: penalty=double_backward", "penalty=double_backward"),
        speed("32 px: fp16", "precision=fp16"),
        speed("32 px: fp32", "precision=fp32"),
        speed("32 px: NCHW", "nchw"),
        speed("32 px: size=s", "size=s"),
        speed("32 px: size=l", "size=l"),
    ]
    if sizes is TINY:  # the others need a GPU, or are the same for the rehearsal
        first = [step for step in first if step.name.removeprefix("speed: ") not in GPU_ONLY]
        third, fourth = [third[0], third[-1]], [fourth[0], fourth[-3]]
    return {1: first, 2: second, 3: third, 4: fourth}


def in_child(step: Step, stem: Path) -> None:
    """Run a measurement; leave its output in stem.log and its figures in stem.json."""
    log = os.open(stem.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        figures = step.measure()
    except (Exception, SystemExit) as e:
        traceback.print_exc()
        line = next(iter(str(e).splitlines()), "")
        figures = {"error": f"{type(e).__name__}: {line}"[:200] + f"; see {stem.name}.log"}
    stem.with_suffix(".json").write_text(json.dumps(figures))


def take(step: Step, out: Path, seconds: float) -> Figures:
    """Run a measurement in a child process, for at most so many seconds."""
    stem = out / re.sub(r"[^a-z0-9]+", "-", step.name.lower())
    stem.with_suffix(".json").unlink(missing_ok=True)
    start = time.monotonic()
    # A forked child has torch imported, and CUDA not yet begun.
    context: Any = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    child = context.Process(target=in_child, args=(step, stem))
    child.start()
    child.join(seconds)
    if child.is_alive():
        child.terminate()
        child.join(5)
        child.kill()
        figures = {"error": f"stopped after {seconds:.0f} s"}
    elif stem.with_suffix(".json").exists():
        figures = json.loads(stem.with_suffix(".json").read_text())
    else:
        figures = {"error": f"ended with exit code {child.exitcode}; see {stem.name}.log"}
    return {**figures, "seconds": time.monotonic() - start}


def to_markdown(report: Figures) -> str:
    """Return the tables of everything that was measured."""
    found: dict[str, Figures] = report["figures"]
    good = {name: row for name, row in found.items() if "error" not in row}
    blocks = [f"Measured on {report['machine']}."]
    if "tests" in good:
        blocks.append(f"Tests marked `gpu`: {good['tests']['result']}.")
    rows = [["what", "images a second", "first steps (s)", "peak memory (GB)", "of the roofline"]]
    for name, row in good.items():
        if "first_step_s" in row and "img_per_s" in row:
            share = f"{row['roofline']['share']:.0%}" if "roofline" in row else ""
            memory = f"{row['peak_gb']:.1f}" if row.get("peak_gb") else ""
            cells = [f"{row['img_per_s']:,.0f}", f"{row['first_step_s']:.1f}", memory, share]
            rows.append([name, *cells])
    if len(rows) > 1:
        blocks.append(table(rows))
    starts = [f"{k[7:]} {v['first_step_s']:.1f} s" for k, v in good.items() if k[:6] == "start:"]
    if starts:
        blocks.append(f"First steps by the compiler's cache: {', '.join(starts)}.")
    if "profile" in good:
        row = good["profile"]
        rows = [["kernels", "ms of a step"]]
        groups = sorted(row["groups"].items(), key=lambda item: -item[1])
        rows += [[name, f"{ms:.2f}"] for name, ms in groups]
        rows.append(["the step, by the clock", f"{row['step_ms']:.2f}"])
        blocks.append(table(rows))
    if "cifar10" in good:
        rows = [["minutes", "images", "distance, learned features", "diversity"]]
        for point in good["cifar10"]["curve"]:
            cells = [f"{point['minutes']:.1f}", f"{point['cur_nimg']:,}"]
            rows.append([*cells, f"{point['fid']:.2f}", f"{point['diversity']:.2f}"])
        blocks.append("CIFAR-10 with its classes:\n\n" + table(rows))
    if "feed" in good:
        rows = [["data from disk, 64 px", "images a second", "waiting"]]
        rows += [
            [name, f"{row['img_per_s']:,.0f}", f"{row['waiting']:.1%}"]
            for name, row in good["feed"].items()
            if isinstance(row, dict)
        ]
        blocks.append(table(rows))
    failed = {name: row["error"] for name, row in found.items() if "error" in row}
    if failed:
        blocks.append(
            "Failed or not measured:\n\n" + "\n".join(f"- {k}: {v}" for k, v in failed.items())
        )
    return "\n\n".join(blocks) + "\n"


def copy_tables(text: str, page: Path) -> None:
    """Replace what is between the marks of a page. Raises SystemExit if it has none."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"gpu_report: {page} has no lines {BEGIN} and {END}; add them")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", type=int, choices=(1, 2, 3, 4), action="append")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--cifar", type=Path, help="train_images.npy, with train_labels.npy")
    parser.add_argument("--minutes", type=float, default=8, help="of each part but the second")
    parser.add_argument("--training-minutes", type=float, default=max(AT_MINUTES))
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--into", type=Path, help="a page to copy the tables to; measures nothing")
    args = parser.parse_args()
    path = args.out / "report.json"
    report: Figures = json.loads(path.read_text()) if path.exists() else {"figures": {}}
    if args.into:
        copy_tables(to_markdown(report), args.into)
        return
    sizes = TINY if args.rehearse else FULL
    chosen = args.part or [1, 2, 3, 4]
    if not args.rehearse and 2 in chosen and not args.cifar:
        parser.error("--part 2 needs --cifar train_images.npy")
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("no GPU is visible; --rehearse runs tiny sizes on a CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    minutes = 0 if args.rehearse else args.training_minutes
    for part in chosen:
        end = time.monotonic() + 60 * (args.minutes if part != 2 else minutes + 3)
        for step in parts(sizes, args.out, args.cifar, minutes)[part]:
            if "error" not in report["figures"].get(step.name, {"error": "not yet"}):
                continue
            left = end - time.monotonic()
            if left < 20:
                figures: Figures = {"error": f"no time left in part {part}; run it again"}
            else:
                figures = take(step, args.out, min(step.seconds, left))
            report["figures"][step.name] = figures
            if "machine" in figures:
                report["machine"] = figures["machine"]
            report.setdefault("machine", f"a {sizes.device} device")
            path.write_text(json.dumps(report, indent=1))
            path.with_suffix(".md").write_text(to_markdown(report))
            took = f"{figures.get('seconds', 0):.0f} s"
            rate = figures.get("img_per_s")
            outcome = figures.get("error") or (f"{rate:,.0f} img/s" if rate else "done")
            print(f"part {part}, {step.name}: {outcome} ({took})", flush=True)
    print("\n" + to_markdown(report))


if __name__ == "__main__":
    main()

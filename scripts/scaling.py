"""Predict memory, communication and time of a step on 1 to 1,024 devices from measurements here.

    uv run python scripts/scaling.py --processes 2 threads=1     # two cores as two devices
    uv run python scripts/scaling.py --processes 8 data=cifar10 size=l --seconds 20    # 8 GPUs

Takes vgan-train's overrides. Measures the step of one process at the batch and at its shares, the
time of all-reduces of several sizes between --processes, and the step of all of them; fits latency
and bandwidth; and prints predictions for other numbers beside the measurements. Between machines
the bandwidth is another: give it with --gbps.

    step(n) = compute(batch / n) + the part of the exchange that backward passes do not hide
    exchange(n) = 2 log2(n) latency + 2 (n - 1) / n * bytes / bandwidth
    bytes = 4 (parameters of G + D)

Half of the compute is backward passes with gradients to exchange; they hide all but the last
bucket of 25 MB.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from bench import open_variant

from vgan.runtime.distributed import process_group, rank, world_size
from vgan.training.summary import count_parameters

SIZES = (1_000, 100_000, 1_000_000, 10_000_000)  # bytes
BUCKET = 25_000_000  # bytes; DistributedDataParallel's own
COUNTS = (1, 2, 4, 8, 16, 64, 256, 1024)


def all_reduce_seconds(size: int, device: torch.device) -> float:
    """Return the median seconds of an all-reduce of `size` bytes."""
    x, times = torch.zeros(size // 4, device=device), []
    for _ in range(30):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(x)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(overrides: list[str], seconds: float) -> dict[str, float]:
    """Measure step and all-reduces in this process, alone or with others."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    with process_group(device), open_variant(overrides) as subject:
        subject.first_steps(warmup=3)
        figures = {"step": subject.seconds_per_step(seconds)}
        if world_size() > 1:
            for size in SIZES:
                figures[f"all_reduce {size}"] = all_reduce_seconds(size, subject.run.device)
        state = subject.run.state
        figures |= {"G": count_parameters(state.G), "D": count_parameters(state.D)}
        figures["batch"] = subject.batch_size
    return figures


def run(processes: int, overrides: list[str], seconds: float) -> dict[str, float]:
    """Run `measure` on several processes and return what rank 0 measured."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        options = ["--seconds", str(seconds), "--measure", out.name]
        command = [sys.executable, *launcher, __file__, *overrides, *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        return json.loads(Path(out.name).read_text())


def fit(figures: dict[str, float], n: int) -> tuple[float, float]:
    """Fit latency (s) of a hop and bandwidth (bytes/s) by least squares on relative errors."""
    rows = torch.tensor(
        [[2 * math.log2(n), 2 * (n - 1) / n * size] for size in SIZES], dtype=torch.float64
    )
    times = torch.tensor([figures[f"all_reduce {size}"] for size in SIZES], dtype=torch.float64)
    latency, per_byte = torch.linalg.lstsq(
        rows / times[:, None], torch.ones(len(SIZES), 1, dtype=torch.float64)
    ).solution.flatten()
    return max(float(latency), 0.0), 1 / max(float(per_byte), 1e-15)


def table(
    alone: dict[int, float], together: dict[str, float], n: int, bytes_per_s: float, latency: float
) -> str:
    """Return predictions as a table.

    Compute of shares that were not measured is extrapolated from the smallest that was.
    """
    G, D, batch = together["G"], together["D"], int(together["batch"])
    head = "| devices | images each | compute (ms) | exchange (ms) | exposed (ms) "
    head += "| step (ms) | img/s | efficiency | measured (ms) |"
    lines = [head, "|---" * 9 + "|"]
    for count in COUNTS:
        if batch % count:
            break
        rows = batch // count
        least = min(alone)
        compute = alone.get(rows, alone[least] * max(rows / least, 0.5))
        size = 4 * (G + D)
        exchange, exposed = exposed_seconds(count, size, compute, bytes_per_s, latency)
        step = compute + exposed
        measured = {1: alone[batch], n: together["step"]}.get(count)
        cells = [
            count,
            rows,
            *(f"{1000 * x:.2f}" for x in (compute, exchange, exposed, step)),
            f"{batch / step:,.0f}",
        ]
        cells += [
            f"{alone[batch] / step / count:.0%}",
            f"{1000 * measured:.2f}" if measured else "",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def exposed_seconds(
    count: int, size: float, compute: float, bytes_per_s: float, latency: float
) -> tuple[float, float]:
    """Return the seconds of the exchange of `size` bytes, and those that are not hidden."""
    exchange = 0.0
    if count > 1:
        exchange = 2 * math.log2(count) * latency + 2 * (count - 1) / count * size / bytes_per_s
    return exchange, max(exchange * min(1.0, BUCKET / size), exchange - compute / 2)


def growing(
    each: float, rows: int, together: dict[str, float], bytes_per_s: float, latency: float
) -> str:
    """Return predictions where every device takes `rows` images per step, in `each` seconds."""
    lines = ["", "| devices | batch | step (ms) | img/s | efficiency |", "|---" * 5 + "|"]
    size = 4 * (together["G"] + together["D"])
    for count in COUNTS:
        step = each + exposed_seconds(count, size, each, bytes_per_s, latency)[1]
        cells = f"{count} | {count * rows:,} | {1000 * step:.2f} | {count * rows / step:,.0f}"
        lines.append(f"| {cells} | {each / step:.0%} |")
    return "\n".join(lines)


def memory(G: float, D: float) -> str:
    """Return a table of memory that does not depend on the batch.

    It holds weights, gradients, Adam's two moments and the moving average, all float32.
    """
    lines = ["", "| devices | parallel=ddp, GB each | parallel=fsdp, GB each |", "|---|---|---|"]
    for count in COUNTS:
        whole = 16 * (G + D) + 4 * G
        lines.append(
            f"| {count} | {whole / 1e9:.3g} | {whole / count / 1e9:.3g} + the largest block |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="as for vgan-train")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5, help="of timing for each figure")
    parser.add_argument(
        "--gbps",
        type=float,
        help="gigabytes per second between machines, instead of the measured bandwidth",
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if args.measure:
        figures = measure(args.overrides, args.seconds)
        if rank() == 0:
            Path(args.measure).write_text(json.dumps(figures))
        return
    n = args.processes
    together = run(n, args.overrides, args.seconds)
    batch, alone = int(together["batch"]), {}
    for count in (c for c in COUNTS if batch % c == 0 and c <= max(n, 8)):
        alone[batch // count] = run(
            1, [*args.overrides, f"batch_size={batch // count}"], args.seconds
        )["step"]
    latency, bytes_per_s = fit(together, n)
    if args.gbps:
        bytes_per_s = args.gbps * 1e9
    link = f"latency {1e6 * latency:.0f} us, {bytes_per_s / 1e9:.2f} GB/s"
    print(f"{n} processes: {link}; batch {batch} in all; torch {torch.__version__}\n")
    print(table(alone, together, n, bytes_per_s, latency))
    speedup = alone[batch] / together["step"]
    print(f"\n{n} processes train {speedup:.2f} times as many images per second as one.")
    print(growing(alone[batch // n], batch // n, together, bytes_per_s, latency))
    print(memory(together["G"], together["D"]))


if __name__ == "__main__":
    main()

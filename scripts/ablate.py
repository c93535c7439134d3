"""The ladder of generators at equal parameters and equal training time: does each layer earn its place?

    uv run python scripts/ablate.py --minutes 3 --seeds 3 --out outputs/ladder                      # the embedded shapes
    uv run python scripts/ablate.py data=cifar10 size=m batch_size=256 --minutes 10 --out outputs/ladder-cifar10
    uv run python scripts/ablate.py --minutes 3 --jobs 2 threads=1                                  # two runs side by side

Takes vgan-train's overrides for all of them. Each rung's channels are scaled (in steps of 8) until its generator has as
many parameters as attn's; its images a second are measured on this machine, all rungs in turn; and each gets as many images
as fit the minutes, so that a slower machine moves the budget but not the comparison. Writes ladder.md, ladder.json and
ladder.png (with matplotlib), and evaluates as vgan-eval does. What is finished is kept: the same command goes on.
"""

import argparse
import bisect
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from bench import prepare, step_seconds

from vgan.data.packed import default_cache_dir
from vgan.data.shapes import SHAPE_NAMES
from vgan.evaluation.evaluator import make_evaluator
from vgan.evaluation.shapes_oracle import Oracle, score_samples
from vgan.inference.latents import draw
from vgan.inference.load import drawing_precision, load_generator
from vgan.runtime.device import pick_device
from vgan.training.summary import count_multiply_adds, count_parameters

RUNGS = ("plain", "conv", "sep", "attn", "adaptive")
# Tanh saturates at the others' rate: after 4,000 images of the embedded shapes plain's pictures were white, its gradient 0
PLAINS_LR = 1e-3


def widths_override(widths: Sequence[int], factor: float) -> str:
    return f"size.g_widths=[{','.join(str(max(8, round(w * factor / 8) * 8)) for w in widths)}]"


def matched(rung: str, overrides: list[str]) -> list[str]:
    """The overrides of a rung whose generator has as many parameters as attn's, to the nearest step of its widths."""
    reference = prepare([*overrides, "model=attn", "compile=false"]).run
    target, widths = count_parameters(reference.state.G), reference.config["size"]["g_widths"]
    if rung == "attn":
        return [*overrides, "model=attn"]
    options = list(dict.fromkeys(widths_override(widths, f / 40) for f in range(10, 160)))

    def size(option: str) -> int:
        return count_parameters(
            prepare([*overrides, f"model={rung}", option, "compile=false"]).run.state.G
        )

    extra = []
    if rung == "plain":
        ramp = reference.config["optim"]["lr_G"]
        extra = [
            f"optim.lr_G.{end}={min(ramp[end], most)}"
            for end, most in (("start", PLAINS_LR), ("end", PLAINS_LR / 2))
        ]
    at = min(bisect.bisect_left(options, target, key=size), len(options) - 1)
    near = options[max(0, at - 1) : at + 1]
    return [
        *overrides,
        f"model={rung}",
        min(near, key=lambda option: abs(size(option) - target)),
        *extra,
    ]


def measure(overrides: list[str], seconds: float) -> float:
    """Images a second of the training step."""
    subject = prepare(overrides)
    for _ in range(3):
        subject.take_step()
    rate = subject.batch_size / step_seconds(subject, seconds)
    subject.feed.close()
    return rate


def describe(overrides: list[str]) -> dict[str, Any]:
    run = prepare([*overrides, "compile=false"]).run
    G = run.state.G
    c = torch.zeros(1, run.dataset.label_dim, device=run.recipe.device)
    z = torch.zeros(1, G.z_dim, device=run.recipe.device)  # type: ignore[call-overload]
    return {
        "parameters": count_parameters(G),
        "multiply_adds": count_multiply_adds(G, z, c),
        "overrides": overrides,
    }


def train(overrides: list[str], run_dir: Path) -> None:
    if not (run_dir / "done").exists():
        code = "from vgan.cli import train_main; train_main()"
        log = run_dir.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as f:
            subprocess.run(
                [sys.executable, "-c", code, *overrides, f"run_dir={run_dir}"],
                check=True,
                stdout=f,
                stderr=f,
            )
        (run_dir / "done").touch()


def judge(run_dir: Path, overrides: list[str], n: int) -> dict[str, float]:
    """What vgan-eval measures, and for the embedded shapes what the oracle sees."""
    path = run_dir / "judged.json"
    if path.exists():
        return json.loads(path.read_text())
    run = prepare([*overrides, "compile=false"]).run
    device = pick_device(run.config["device"])
    config = {
        **{k: run.config[k] for k in ("features", "seed", "holdout")},
        "repeats": run.config["eval"]["repeats"],
        "n": n,
        "batch_size": 128,
        "metrics": ["fid", "kid", "pr", "diversity"],
    }
    G, precision = load_generator(run_dir), drawing_precision("auto", device)
    values = make_evaluator(run.dataset, device, **config)(G, precision, default_cache_dir()).values
    if run.dataset.name == "shapes":
        images = (
            torch.cat([draw(G, index, seed=0) for index in torch.arange(2000).split(100)])
            .permute(0, 2, 3, 1)
            .cpu()
            .numpy()
        )
        asked = torch.arange(2000).numpy() % len(SHAPE_NAMES)
        values |= {
            f"oracle_{k}": v
            for k, v in score_samples(Oracle(images.shape[1])(images), asked).items()
        }
    ticks = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    values["peak_gb"] = max(t.get("memory/peak_gb", 0) for t in ticks)
    path.write_text(json.dumps(values))
    return values


def spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def write_table(rows: dict[str, dict[str, Any]], path: Path, title: str) -> None:
    oracle = any("oracle_precision" in s for row in rows.values() for s in row["scores"])
    head = [
        "model",
        "parameters of G",
        "multiply-adds",
        "img/s",
        "images",
        "distance",
        "KID x 1000",
        "precision",
        "recall",
        "diversity",
    ]
    head += ["oracle, %", "pairs of 64"] if oracle else []
    lines = [title, "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, row in rows.items():
        scores = row["scores"]
        cells = [
            name,
            f"{row['parameters']:,}",
            f"{row['multiply_adds'] / 1e6:.1f} M",
            f"{row['img_per_s']:,.0f}",
            f"{row['nimg']:,}",
        ]
        cells += [
            spread([s["fid"] for s in scores], 2),
            spread([1000 * s["kid"] for s in scores], 2),
        ]
        cells += [spread([s[k] for s in scores], 2) for k in ("precision", "recall", "diversity")]
        if oracle:
            cells += [
                spread([100 * s["oracle_precision"] for s in scores], 1),
                spread([s["oracle_coverage"] for s in scores], 1),
            ]
        lines.append("| " + " | ".join(cells) + " |")
    path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def plot(rows: dict[str, dict[str, Any]], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print(
            f"no {path.name}: needs matplotlib (uv run --with matplotlib python scripts/ablate.py ...)"
        )
        return
    figure = Figure(figsize=(6, 3.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for i, row in enumerate(rows.values()):
        values = [s["fid"] for s in row["scores"]]
        axes.scatter([i] * len(values), values, color="tab:blue", s=18)
        axes.hlines(statistics.fmean(values), i - 0.25, i + 0.25, color="tab:orange")
    axes.set_xticks(range(len(rows)), list(rows))
    axes.set_ylabel("distance to the reals (lower is better)")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="as for vgan-train")
    parser.add_argument("--minutes", type=float, default=3, help="of training for each run")
    parser.add_argument(
        "--seeds", type=int, default=3, help="runs of each rung, with seeds 0, 1, ..."
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--n", type=int, default=10_000, help="fakes for the distance")
    parser.add_argument("--rungs", default=",".join(RUNGS))
    parser.add_argument("--out", type=Path, default=Path("outputs/ladder"))
    args = parser.parse_intermixed_args()  # overrides may stand before and after options
    args.out.mkdir(parents=True, exist_ok=True)
    plan_path = args.out / "plan.json"
    if plan_path.exists():
        rows = json.loads(plan_path.read_text())
    else:
        rows = {rung: describe(matched(rung, args.overrides)) for rung in args.rungs.split(",")}
        rates: dict[str, list[float]] = {rung: [] for rung in rows}
        for _ in range(3):
            for rung, row in rows.items():
                rates[rung].append(measure(row["overrides"], 4))
        for rung, row in rows.items():
            row["img_per_s"] = statistics.median(rates[rung])
            row["nimg"] = round(row["img_per_s"] * 60 * args.minutes / 1000) * 1000
        plan_path.write_text(json.dumps(rows, indent=1))
    jobs = {}
    for seed in range(args.seeds):
        for rung, row in rows.items():
            jobs[rung, seed] = [
                *row["overrides"],
                f"seed={seed}",
                f"total_kimg={row['nimg'] / 1000:g}",
            ]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: train(jobs[job], args.out / f"{job[0]}-{job[1]}"), jobs))
    for rung, row in rows.items():
        row["scores"] = [
            judge(args.out / f"{rung}-{s}", jobs[rung, s], args.n) for s in range(args.seeds)
        ]
    (args.out / "ladder.json").write_text(json.dumps(rows, indent=1))
    what = " ".join(args.overrides) or "the embedded default"
    title = (
        f"{args.minutes:g} minutes a run, {args.seeds} seeds; {what}; ± is one standard deviation"
    )
    write_table(rows, args.out / "ladder.md", title)
    plot(rows, args.out / "ladder.png")


if __name__ == "__main__":
    main()

"""Compare generators, or any settings, at equal training time or equal images.

    uv run python scripts/ablate.py --minutes 3 --seeds 3 --out outputs/ladder
    uv run python scripts/ablate.py data=cifar10 size=m batch_size=256 --minutes 10
    uv run python scripts/ablate.py --minutes 3 --jobs 2 threads=1       # two runs side by side
    uv run python scripts/ablate.py experiment=few data.path=images size=xs --minutes 9 \\
        --variant "lr 5e-4" "size.lr=5e-4 size.lr_end=1e-4" --variant "lr 4e-3" ""
    uv run python scripts/ablate.py --kimg 60 --variant rpgan "" --variant hinge loss=hinge

Takes vgan-train's overrides for all rows. The rows are the generators of `model=`, their channels
scaled in steps of 8 until each has as many parameters as attn's; or, with --variant, what the
variants say. Images per second are measured on this machine, one generator after another, and each
gets as many images as fit the minutes, so that a slower machine changes the budget but not the
comparison. With --kimg each gets that many thousand images. Evaluates as vgan-eval does.

Writes ladder.md, ladder.json, samples.png (a grid for each row, left to right) and, with
matplotlib, ladder.png. The same command resumes: finished parts are kept. With more --variant
at its end it adds rows; with --minutes, their speed is measured then.
"""

import argparse
import bisect
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import build_run, open_variant
from PIL import Image

from vgan.data.packed import default_cache_dir
from vgan.data.shapes import SHAPE_NAMES
from vgan.evaluation.evaluator import make_evaluator
from vgan.evaluation.shapes_oracle import Oracle, score_samples
from vgan.inference.latents import draw
from vgan.inference.load import drawing_precision, load_generator
from vgan.runtime.images import grid, to_rgb
from vgan.training.summary import count_multiply_adds, count_parameters

RUNGS = ("plain", "conv", "sep", "attn", "adaptive")
# At the others' rate tanh saturates: after 4,000 images of the embedded shapes, plain's images were
# white and its gradient 0.
PLAIN_LR = 1e-3


def widths_override(widths: Sequence[int], factor: float) -> str:
    """Return the override that scales the widths, in steps of 8."""
    scaled = [max(8, round(width * factor / 8) * 8) for width in widths]
    return f"size.g_widths=[{','.join(map(str, scaled))}]"


def matched(rung: str, overrides: list[str]) -> list[str]:
    """Return the overrides of a generator scaled to the number of parameters of attn's."""
    if rung == "attn":
        return [*overrides, "model=attn"]
    reference = build_run([*overrides, "model=attn"])
    target, widths = count_parameters(reference.state.G), reference.cfg.size.g_widths
    options = list(dict.fromkeys(widths_override(widths, f / 40) for f in range(10, 160)))

    def size(option: str) -> int:
        run = build_run([*overrides, f"model={rung}", option])
        return count_parameters(run.state.G)

    extra = []
    if rung == "plain":
        ramp = reference.cfg.optim.lr_G
        extra = [f"optim.lr_G.start={min(ramp.start, PLAIN_LR)}"]
        extra += [f"optim.lr_G.end={min(ramp.end, PLAIN_LR / 2)}"]
    at = min(bisect.bisect_left(options, target, key=size), len(options) - 1)
    near = options[max(0, at - 1) : at + 1]
    best = min(near, key=lambda option: abs(size(option) - target))
    return [*overrides, f"model={rung}", best, *extra]


def measure(overrides: list[str], seconds: float) -> float:
    """Return the images per second of training steps."""
    with open_variant(overrides) as subject:
        subject.first_steps(warmup=2)
        return subject.batch_size / subject.seconds_per_step(seconds)


def describe(overrides: list[str]) -> dict[str, Any]:
    """Return parameters and multiply-adds of the generator."""
    run = build_run(overrides)
    G, device = run.state.G, run.device
    c = torch.zeros(1, run.dataset.label_dim, device=device)
    z = torch.zeros(1, G.z_dim, device=device)
    return {
        "parameters": count_parameters(G),
        "multiply_adds": count_multiply_adds(G, z, c),
        "overrides": overrides,
    }


def train(overrides: list[str], run_dir: Path) -> None:
    """Train in another process, unless the run is complete."""
    if (run_dir / "done").exists():
        return
    code = "from vgan.cli import train_main; train_main()"
    command = [sys.executable, "-c", code, *overrides, f"run_dir={run_dir}"]
    log = run_dir.parent / f"{run_dir.name}.log"  # with_suffix would cut 1.5e-3 at its dot
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as f:
        failed = subprocess.run(command, stdout=f, stderr=f).returncode
    if failed:
        last_line = "".join(log.read_text().splitlines()[-1:])
        raise SystemExit(f"{log}: exit code {failed}: {last_line}")
    (run_dir / "done").touch()


def judge(run_dir: Path, overrides: list[str], n: int) -> dict[str, float]:
    """Measure what vgan-eval does and, for the embedded shapes, the oracle's scores."""
    path = run_dir / "judged.json"
    if path.exists():
        return json.loads(path.read_text())
    run = build_run(overrides)
    cfg = run.cfg
    G, precision = load_generator(run_dir), drawing_precision("auto", run.device)
    evaluator = make_evaluator(
        run.dataset,
        run.device,
        features=cfg.features,
        metrics=["fid", "kid", "pr", "diversity"],
        n=n,
        repeats=cfg.eval.repeats,
        seed=cfg.seed,
        batch_size=128,
        holdout=cfg.holdout,
    )
    values = evaluator(G, precision, default_cache_dir()).values
    if run.dataset.name == "shapes":
        batches = [draw(G, index, seed=0) for index in torch.arange(2000).split(100)]
        images = torch.cat(batches).permute(0, 2, 3, 1).cpu().numpy()
        labels = torch.arange(2000).numpy() % len(SHAPE_NAMES)
        scores = score_samples(Oracle(images.shape[1])(images), labels)
        values |= {f"oracle_{name}": value for name, value in scores.items()}
    ticks = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    values["peak_gb"] = max(tick.get("memory/peak_gb", 0) for tick in ticks)
    path.write_text(json.dumps(values))
    return values


def spread(values: list[float], digits: int) -> str:
    """Return mean and standard deviation."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def write_table(rows: dict[str, dict[str, Any]], path: Path, title: str) -> None:
    """Write and print the results as a Markdown table."""
    oracle = any("oracle_precision" in s for row in rows.values() for s in row["scores"])
    head = ["model", "parameters of G", "multiply-adds", "img/s", "images"]
    head += ["distance", "KID x 1000", "precision", "recall", "diversity"]
    head += ["oracle, %", "pairs of 64"] if oracle else []
    lines = [title, "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, row in rows.items():
        scores = row["scores"]
        cells = [name, f"{row['parameters']:,}", f"{row['multiply_adds'] / 1e6:.1f} M"]
        cells += [f"{row['img_per_s']:,.0f}" if "img_per_s" in row else "", f"{row['nimg']:,}"]
        cells.append(spread([s["fid"] for s in scores], 2))
        cells.append(spread([1000 * s["kid"] for s in scores], 2))
        cells += [spread([s[k] for s in scores], 2) for k in ("precision", "recall", "diversity")]
        if oracle:
            cells.append(spread([100 * s["oracle_precision"] for s in scores], 1))
            cells.append(spread([s["oracle_coverage"] for s in scores], 1))
        lines.append("| " + " | ".join(cells) + " |")
    path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def plot(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot the distance of every run, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        fix = "uv run --with matplotlib python scripts/ablate.py ..."
        print(f"no {path.name}: needs matplotlib ({fix})")
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


def draw_samples(run_dirs: Sequence[Path], path: Path) -> None:
    """Write the first 8 rows of samples of each run side by side, one column for each class."""
    grids: list[np.ndarray] = []
    for run_dir in run_dirs:
        G = load_generator(run_dir, "cpu")
        columns = min(G.label_dim, 10) if G.label_names else 8
        index = torch.arange(8 * columns)
        images = draw(G, index, seed=0, label=index % columns if G.label_names else None)
        samples = grid(to_rgb(images), columns)
        grids += [samples, np.full((len(samples), 16, 3), 128, np.uint8)]
    Image.fromarray(np.concatenate(grids[:-1], axis=1)).save(path)


def folder_of(out: Path, name: str, seed: int) -> Path:
    """Return the run folder of a row and a seed."""
    return out / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', name)}-{seed}"


def make_plan(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the rows asked for, with how many images each is trained on.

    A row that an earlier call planned keeps its number of images; new rows are added to the plan.
    """
    path = args.out / "plan.json"
    asked = {name: getattr(args, name) for name in ("overrides", "minutes", "kimg", "n")}
    asked["ladder"] = not args.variant
    plan = json.loads(path.read_text()) if path.exists() else {"asked": asked, "rows": {}}
    if any(plan["asked"].get(key, value) != value for key, value in asked.items()):
        raise SystemExit(f"--out {args.out}: holds another comparison; use another folder")
    planned = plan["rows"]
    variants = {name: [*args.overrides, *words.split()] for name, words in args.variant}
    names = [*(name for name in planned if name not in variants), *(n for n, _ in args.variant)]
    if len({folder_of(args.out, name, 0) for name in names}) < len(names):
        raise SystemExit(f"--variant: two rows would share a folder of {args.out}; rename one")
    if not variants:
        rungs = args.rungs.split(",")
        variants = {
            rung: planned[rung]["overrides"] if rung in planned else matched(rung, args.overrides)
            for rung in rungs
        }
    for name, overrides in variants.items():
        if name in planned and planned[name]["overrides"] != overrides:
            raise SystemExit(f"--out {args.out}: {name} had other overrides; use another name")
    added = {name: describe(variants[name]) for name in variants if name not in planned}
    rates: dict[str, list[float]] = {name: [] for name in added}
    for _ in range(3 if args.kimg is None else 0):
        for name, row in added.items():
            rates[name].append(measure(row["overrides"], 4))
    for name, row in added.items():
        if args.kimg is None:
            row["img_per_s"] = statistics.median(rates[name])
            row["nimg"] = round(row["img_per_s"] * 60 * args.minutes)
        else:
            row["nimg"] = round(1000 * args.kimg)
    planned |= added
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plan, indent=1))
    return {name: planned[name] for name in variants}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="as for vgan-train")
    parser.add_argument("--minutes", type=float, default=3, help="of training for each run")
    parser.add_argument("--kimg", type=float, help="thousands of images, instead of --minutes")
    parser.add_argument(
        "--seeds", type=int, default=3, help="runs of each generator, with seeds 0, 1, ..."
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--n", type=int, default=10_000, help="fakes for the distance")
    parser.add_argument("--rungs", default=",".join(RUNGS), help="which generators")
    parser.add_argument(
        "--variant", nargs=2, action="append", default=[], metavar=("NAME", "OVERRIDES"),
        help="a row with these overrides, instead of the generators",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("outputs/ladder"))
    args = parser.parse_intermixed_args()  # overrides may stand before and after options
    rows = make_plan(args)
    jobs = {}
    for seed in range(args.seeds):
        for rung, row in rows.items():
            jobs[rung, seed] = [
                *row["overrides"],
                f"seed={seed}",
                f"total_kimg={row['nimg'] / 1000}",
            ]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: train(jobs[job], folder_of(args.out, *job)), jobs))
    for rung, row in rows.items():
        row["scores"] = [
            judge(folder_of(args.out, rung, s), jobs[rung, s], args.n) for s in range(args.seeds)
        ]
    (args.out / "ladder.json").write_text(json.dumps(rows, indent=1))
    what = " ".join(args.overrides) or "the embedded default"
    length = f"{args.kimg:g} thousand images" if args.kimg else f"{args.minutes:g} minutes"
    title = f"{length} a run, {args.seeds} seeds; {what}; ± is one standard deviation"
    write_table(rows, args.out / "ladder.md", title)
    draw_samples([folder_of(args.out, rung, 0) for rung in rows], args.out / "samples.png")
    plot(rows, args.out / "ladder.png")


if __name__ == "__main__":
    main()

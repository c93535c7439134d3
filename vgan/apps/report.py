"""The command vgan-report: one HTML file about a run, or about several side by side.

The page loads nothing. What comes from a run folder is escaped, and the page's policy allows only
its own script, by its digest.
"""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

import vgan
from vgan.apps.charts import Curve, chart
from vgan.apps.command_line import Compose, command
from vgan.apps.evaluations import evaluations
from vgan.apps.templates import Embedded, asset, digest, embed_png, render
from vgan.config import ReportConfig
from vgan.runs.log_reader import RunLog, number, read_run
from vgan.runtime.console import duration
from vgan.runtime.errors import UserError
from vgan.runtime.files import write_atomically
from vgan.runtime.images import format_px, parse_resolution
from vgan.runtime.nested import flatten

MAX_GRIDS = 24  # of one run
MAX_RUNS = 8  # the number of colours
_NOT_RECORDED = "not recorded"
# Titles of the charts, and names and keys of their curves.
CHARTS = {
    "Losses": {"D": "loss/D", "G": "loss/G"},
    "Logits": {"reals": "logits/real", "fakes": "logits/fake"},
    "Logits of reals": {"training": "logits/trained_on", "held out": "logits/held_out"},
    "Sign of real logits": {"mean": "logits/real_sign"},
    "Gradient penalties": {"R1": "penalty/r1", "R2": "penalty/r2"},
    "Gradient norms": {"D": "grad_norm/D", "G": "grad_norm/G"},
    "Diversity of fakes": {"relative to reals": "diversity"},
    "Augmentation probability": {"p": "augment_p"},
    "Penalty strength": {"gamma": "gamma"},
    "Learning rates": {"G": "lr_G", "D": "lr_D"},
    "Gradient scale (fp16)": {"G": "scale/G", "D": "scale/D"},
    "Speed (images/s)": {"images/s": "speed/img_per_s"},
    "Waiting (% of time)": {
        "for data": "speed/waiting_for_data",
        "for checkpoints": "speed/waiting_for_checkpoints",
    },
    "Peak memory (GB)": {"memory": "memory/peak_gb"},
}


def report(cfg: ReportConfig, compose: Compose) -> Path:
    """Write the page and return its path.

    compose: vgan-train's config from overrides, for the command that reproduces a run. Raises
    UserError, before anything is written, for a folder that is not a run.
    """
    folders = _folders(cfg.run)
    out = _out_path(cfg.out, folders)
    logs = [read_run(*folder_and_name) for folder_and_name in zip(folders, _names(folders))]
    page = render_report(logs, compose).encode("utf-8", "replace")  # names may hold surrogates
    write_atomically(out, page)
    for log in logs:
        for note in log.notes:
            print(f"{log.given}: {note}")
    print(f"{out} ({len(page) / 1e6:.1f} MB)")
    return out


def _folders(run: Any) -> list[str]:
    given = run if isinstance(run, list) else [run]
    shown = f"run={given[0] if len(given) == 1 else given}"
    if not given or not all(isinstance(folder, (str, int, float)) for folder in given):
        raise UserError(f"{shown}: must be a run folder, or several as [a,b]")
    if len(given) > MAX_RUNS:
        raise UserError(f"{shown}: has {len(given)} runs; compare at most {MAX_RUNS}")
    folders = [str(folder) for folder in given]
    if len({Path(folder).expanduser().resolve() for folder in folders}) < len(folders):
        raise UserError(f"{shown}: names a run twice; leave one out")
    return folders


def _out_path(out: str | None, folders: Sequence[str]) -> Path:
    if out is None:
        parent = Path(folders[0]).expanduser() if len(folders) == 1 else Path()
        return parent / "report.html"
    suffix = Path(out).suffix
    if suffix.lower() != ".html":
        raise UserError(
            f"out={out}: unknown kind {suffix or 'of file'}; give a name ending in .html"
        )
    return Path(out).expanduser()


def _names(folders: Sequence[str]) -> list[str]:
    """Return the folders' own names if these differ, else the paths."""
    names = [Path(folder).expanduser().resolve().name or folder for folder in folders]
    return names if len(set(names)) == len(names) else list(folders)


def render_report(logs: Sequence[RunLog], compose: Compose) -> str:
    """Return the page as HTML. Images that cannot be read are added to the runs' notes."""
    many = len(logs) > 1
    grids = [_grids(log, 1 if many else MAX_GRIDS) for log in logs]
    same_data = all(log.setting("data") == logs[0].setting("data") for log in logs)
    reals_path = logs[0].path / "reals.png"
    reals = None
    if same_data and any(grids) and reals_path.is_file():
        reals = _embed(reals_path, logs[0])
    style, script = asset("report.css"), asset("report.js")
    return render(
        "report.html",
        title=f"{len(logs)} runs compared" if many else logs[0].name,
        many=many,
        logs=logs,
        summary=_summary(logs[0]),
        facts=[_facts(log) for log in logs],
        differences=_differences(logs),
        grids=grids,
        reals=reals,
        charts=_charts(logs),
        protocols=evaluations(logs),
        events=_events(logs),
        commands=[_command(log, compose) for log in logs],
        style=style,
        script=script,
        policy=Markup("style-src {}; script-src {}").format(digest(style), digest(script)),
        version=vgan.__version__,
    )


def _summary(log: RunLog) -> str:
    names = [log.setting(f"{group}.name") for group in ("model", "size", "loss", "data")]
    model, size, loss, data = ("?" if name is None else str(name) for name in names)
    return f"{model}, size {size}, loss {loss}, data {data}"


def _facts(log: RunLog) -> dict[str, str]:
    start = log.starts[-1] if log.starts else {}
    size_G, size_D = (number(start.get("parameters"), network) for network in "GD")
    total = number(log.config, "total_kimg")
    speeds = sorted(speed for speed in log.curve("speed/img_per_s")[1] if speed)
    model = (log.setting(f"{group}.name") for group in ("model", "size", "loss"))
    facts = {
        "Model": "{}, size {}, loss {}".format(*model),
        "Parameters": _NOT_RECORDED,
        "Data": _data(log, start),
        "Images seen": f"{log.cur_nimg:,}" + (f" of {1000 * total:,.0f}" if total else ""),
        "Time": duration(log.seconds),
        "Speed": _NOT_RECORDED,
        "Hardware": _NOT_RECORDED,
        "Versions": _NOT_RECORDED,
    }
    if size_G and size_D:
        facts["Parameters"] = f"{_count(size_G)} G + {_count(size_D)} D"
    if speeds:
        facts["Speed"] = f"{speeds[len(speeds) // 2]:,.0f} images/s (median)"
    if "device" in start:
        facts["Hardware"] = f"{start['device']}, {start.get('precision')}"
    if start:
        facts["Versions"] = f"vgan {start.get('vgan')}, torch {start.get('torch')}"
    return facts


def _data(log: RunLog, start: dict[str, Any]) -> str:
    images, label_dim = (number(start.get("data"), name) for name in ("images", "label_dim"))
    parts = [str(log.setting("data.name"))]
    found = start["data"].get("img_resolution") if isinstance(start.get("data"), dict) else None
    with contextlib.suppress(ValueError, TypeError):  # a file that somebody changed
        parts.append(format_px(parse_resolution(found or log.setting("data.resolution"))))
    has_conditions = isinstance(start.get("data"), dict) and start["data"].get("conditions")
    labels = "conditions" if has_conditions else "classes"
    for value, unit in ((images, "images"), (label_dim, labels)):
        if value:
            parts.append(f"{value:,.0f} {unit}")
    return ", ".join(parts)


def _count(count: float) -> str:
    return f"{count:,.0f}" if count < 1e6 else f"{count / 1e6:,.1f} M"


def _differences(logs: Sequence[RunLog]) -> list[tuple[str, list[str | None]]]:
    """Return name and values of the settings that differ, without run_dir; None if absent."""
    configs = [flatten(log.config) for log in logs]
    differences = []
    for name in dict.fromkeys(name for config in configs for name in config):
        values = [json.dumps(c[name], default=str) if name in c else None for c in configs]
        if name != "run_dir" and len(set(values)) > 1:
            differences.append((name, [value and value.strip('"') for value in values]))
    return differences


def _grids(log: RunLog, most: int) -> list[tuple[int, Embedded]]:
    """Return cur_nimg and image of at most `most` grids, evenly spaced, always with the last."""
    files = []
    for path in log.path.glob("fakes-*.png"):
        digits = path.stem.removeprefix("fakes-")
        if digits.isascii() and digits.isdigit():
            files.append((int(digits), path))
    files.sort()
    if len(files) > most:
        files = [files[round((i + 1) * len(files) / most) - 1] for i in range(most)]
    images = [(nimg, _embed(path, log)) for nimg, path in files]
    return [(nimg, image) for nimg, image in images if image]


def _embed(path: Path, log: RunLog) -> Embedded | None:
    try:
        return embed_png(path)
    except ValueError:
        log.notes.append(f"{path.name} cannot be read and was left out")
        return None


def _charts(logs: Sequence[RunLog]) -> list[Markup]:
    """Return a chart for each group of statistics, or for each statistic of several runs."""
    figures = []
    for title, keys in CHARTS.items():
        if len(logs) == 1:
            curves = [_curve(name, logs[0], key, i) for i, (name, key) in enumerate(keys.items())]
            used = [curve for curve in curves if _in_use(curve)]
            figures.append(chart(title, used, [nimg / 1000 for nimg, _ in logs[0].faults]))
            continue
        for name, key in keys.items():
            curves = [_curve(log.name, log, key, i) for i, log in enumerate(logs)]
            full_title = title if len(keys) == 1 else f"{title}: {name}"
            if any(_in_use(curve) for curve in curves):
                figures.append(chart(full_title, curves))
    return [figure for figure in figures if figure]


def _curve(name: str, log: RunLog, key: str, colour: int) -> Curve:
    x, y = log.curve(key)
    factor = 100 if key.startswith("speed/waiting") else 1
    return Curve(name, x, [None if value is None else factor * value for value in y], colour)


def _in_use(curve: Curve) -> bool:
    """Return whether the curve has points other than 0."""
    return any(value != 0 for value in curve.y)


def _events(logs: Sequence[RunLog]) -> list[tuple[int, int, str, str]]:
    """Return (run, cur_nimg, kind, text) of resumes and roll-backs."""
    events = []
    for run, log in enumerate(logs):
        events += sorted(
            [(run, nimg, "roll-back", text) for nimg, text in log.faults]
            + [(run, nimg, "resume", text) for nimg, text in log.resumes],
            key=lambda event: event[1:2],
        )
    return events


def _command(log: RunLog, compose: Compose) -> str | None:
    """Return the command that reproduces a run; None if no overrides give its config."""
    return command(log.config, f"outputs/{log.name.rpartition('/')[2]}-again", compose)

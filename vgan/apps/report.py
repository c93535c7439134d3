"""vgan-report's room: one HTML file about a run, or about several beside each other, which loads nothing from anywhere.

Whatever comes from a run folder is escaped, and the page allows no script but its own, by the digest of its text.
"""

import base64
import hashlib
import io
import json
import warnings
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from omegaconf import DictConfig, OmegaConf
from PIL import Image

import vgan
from vgan.apps.charts import Curve, chart
from vgan.apps.command_line import Compose, command, flat
from vgan.evaluation.evaluator import SHOWN, SMALLER_IS_BETTER
from vgan.runs.log_reader import RunLog, number, read_run
from vgan.runtime.errors import UserError
from vgan.runtime.files import write_atomically

PAGES = Path(__file__).resolve().parent / "assets"
MOST_GRIDS = 24  # of a run, in the page
MOST_RUNS = 8  # as many as there are colours
_MOST_PIXELS = 50_000_000  # of a grid that is opened
_SIDE = 16_383  # px: WebP knows no larger pictures
# title and curves of each chart
CHARTS = {
    "Losses": {"D": "loss/D", "G": "loss/G"},
    "Logits": {"reals": "logits/real", "fakes": "logits/fake"},
    "Logits of reals, by D's training": {
        "trained on": "logits/trained_on",
        "kept out": "logits/held_out",
    },
    "Certainty of D": {"mean sign of its logits": "logits/real_sign"},
    "Gradient penalties": {"R1": "penalty/r1", "R2": "penalty/r2"},
    "Gradient norms": {"D": "grad_norm/D", "G": "grad_norm/G"},
    "Diversity of fakes": {"share of the reals'": "diversity"},
    "Probability of augmentation": {"p": "augment_p"},
    "Strength of the penalties": {"gamma": "gamma"},
    "Learning rates": {"G": "lr_G", "D": "lr_D"},
    "Scale of gradients (fp16)": {"G": "scale/G", "D": "scale/D"},
    "Speed (img/s)": {"img/s": "speed/img_per_s"},
    "Waiting (% of the time)": {
        "for data": "speed/waiting_for_data",
        "for checkpoints": "speed/waiting_for_checkpoints",
    },
    "Peak memory (GB)": {"memory": "memory/peak_gb"},
}


def report(cfg: DictConfig, compose: Compose) -> Path:
    """Write the page that `cfg` (a ReportConfig) asks for; returns its path.

    compose: vgan-train's config from overrides, for the command that reproduces a run. Raises UserError, before anything is
    written, for what is no run, and where the page cannot be written.
    """
    folders = _folders(cfg.run)
    out, names = _out_path(cfg.out, folders), _names(folders)
    logs = [read_run(folder, name) for folder, name in zip(folders, names)]
    page = render(logs, compose).encode("utf-8", "replace")  # half a surrogate pair, in a name
    write_atomically(out, page)
    for log in logs:
        for note in log.notes:
            print(f"{log.given}: {note}")
    print(f"{out} ({len(page) / 1e6:.1f} MB)")
    return out


def _folders(run: Any) -> list[str]:
    """What run= names, as a list."""
    given = OmegaConf.to_container(run) if OmegaConf.is_config(run) else [run]
    told = f"run={given[0] if isinstance(given, list) and len(given) == 1 else given}"
    if (
        not isinstance(given, list)
        or not given
        or not all(isinstance(folder, (str, int, float)) for folder in given)
    ):
        raise UserError(f"{told}: must be a run folder, or several as [a,b]")
    if len(given) > MOST_RUNS:
        raise UserError(f"{told}: has {len(given)} runs; compare at most {MOST_RUNS}")
    folders = [str(folder) for folder in given]
    if len({Path(folder).expanduser().resolve() for folder in folders}) < len(folders):
        raise UserError(f"{told}: names a run twice; leave one out")
    return folders


def _out_path(out: str | None, folders: Sequence[str]) -> Path:
    if out is None:
        return (
            Path(folders[0]).expanduser() / "report.html"
            if len(folders) == 1
            else Path("report.html")
        )
    if Path(out).suffix.lower() != ".html":
        raise UserError(
            f"out={out}: unknown kind {Path(out).suffix or 'of file'}; give a name ending in .html"
        )
    return Path(out).expanduser()


def _names(folders: Sequence[str]) -> list[str]:
    """The folders' own names where these tell them apart, else the paths."""
    names = [Path(folder).expanduser().resolve().name or folder for folder in folders]
    return names if len(set(names)) == len(names) else list(folders)


def render(logs: Sequence[RunLog], compose: Compose) -> str:
    """The page."""
    many = len(logs) > 1
    grids = [_grids(log, 1 if many else MOST_GRIDS) for log in logs]
    sections = {
        "Settings that differ": _differences(logs) if many else "",
        "Samples": _final_grids(logs, grids) if many else _viewer(logs[0], grids[0]),
        "Curves": _curves(logs),
        "Quality": _quality(logs),
        "Events": _events(logs),
        "Reproduce": "".join(_reproduce(log, compose, many) for log in logs),
        "Configuration": "".join(_configuration(log, many) for log in logs),
    }
    notes = [f"{log.name}: {note}" if many else note for log in logs for note in log.notes]
    style, script = (
        (PAGES / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js")
    )
    title = f"{len(logs)} runs compared" if many else logs[0].name
    return Template((PAGES / "report.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        subtitle=" ".join(_chips(logs)) if many else escape(_what(logs[0])),
        facts=_facts_table(logs) if many else _facts_list(logs[0]),
        notes="".join(f"<p class=note>{escape(note)}</p>" for note in notes),
        sections="".join(
            f"<section><h2>{name}</h2>{body}</section>" for name, body in sections.items() if body
        ),
        style=style,
        script=script,
        style_digest=_digest(style),
        script_digest=_digest(script),
        version=escape(vgan.__version__),
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# --- what it is -----------------------------------------------------------------------------------------------------


def _what(log: RunLog) -> str:
    parts = (log.setting(f"{group}.name") for group in ("model", "size", "loss", "data"))
    model, size, loss, data = (str(part) if part is not None else "?" for part in parts)
    return f"{model}, size {size}, loss {loss}, on {data}"


def _facts(log: RunLog) -> dict[str, str]:
    """What the run is in a few words each, not escaped."""
    start = log.starts[-1] if log.starts else {}
    told = "not recorded"
    sizes = [number(start.get("parameters"), half) for half in "GD"]
    px, images, classes = (
        number(start.get("data"), name) for name in ("img_resolution", "images", "label_dim")
    )
    px = px or number(log.config.get("data"), "resolution")
    pictures = str(log.setting("data.name"))
    pictures += f", {px:.0f} px" if px else ""
    pictures += f", {images:,.0f} pictures" if images else ""
    pictures += f", {classes:.0f} classes" if classes else ""
    total, speeds = (
        number(log.config, "total_kimg"),
        sorted(v for v in log.curve("speed/img_per_s")[1] if v),
    )
    versions = {"vgan": start.get("vgan"), "torch": start.get("torch")}
    return {
        "Model": f"{log.setting('model.name')}, size {log.setting('size.name')}, loss {log.setting('loss.name')}",
        "Parameters": f"{_big(sizes[0])} G + {_big(sizes[1])} D" if all(sizes) else told,
        "Data": pictures,
        "Images shown": f"{log.cur_nimg:,}" + (f" of {1000 * total:,.0f}" if total else ""),
        "Time": _duration(log.seconds),
        "Speed": f"{speeds[len(speeds) // 2]:,.0f} img/s (median)" if speeds else told,
        "Hardware": f"{start['device']}, {start.get('precision')}" if "device" in start else told,
        "Versions": ", ".join(f"{k} {v}" for k, v in versions.items()) if start else told,
    }


def _big(count: float | None) -> str:
    return f"{count or 0:,.0f}" if (count or 0) < 1e6 else f"{(count or 0) / 1e6:,.1f} M"


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min {s:02d} s"


def _facts_list(log: RunLog) -> str:
    return f"<dl class=facts>{''.join(f'<div><dt>{k}</dt><dd>{escape(v)}</dd></div>' for k, v in _facts(log).items())}</dl>"


def _facts_table(logs: Sequence[RunLog]) -> str:
    facts = [_facts(log) for log in logs]
    return _table(
        ["", *_chips(logs)], [[name, *(escape(f[name]) for f in facts)] for name in facts[0]]
    )


def _chips(logs: Sequence[RunLog]) -> list[str]:
    return [_chip(logs, i) for i in range(len(logs))]


def _chip(logs: Sequence[RunLog], i: int) -> str:
    return f'<span class="key c{i}"><i></i>{escape(logs[i].name)}</span>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table of HTML; each row begins with its heading."""
    lines = "".join(
        f"<tr><th scope=row>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>"
        for row in rows
    )
    names = "".join(f"<th scope=col>{name}</th>" for name in head)
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table></div>'


def _differences(logs: Sequence[RunLog]) -> str:
    """Every setting that the runs do not share, but for their folders."""
    flats = [flat(log.config) for log in logs]
    names = [name for name in dict.fromkeys(k for f in flats for k in f) if name != "run_dir"]
    absent = "<i>none</i>"
    rows = []
    for name in names:
        told = [json.dumps(f[name], default=str) if name in f else None for f in flats]
        if len(set(told)) > 1:
            cells = (
                absent if t is None else f"<code>{escape(t.strip(chr(34)))}</code>" for t in told
            )
            rows.append([f"<code>{escape(name)}</code>", *cells])
    return _table(["", *_chips(logs)], rows) if rows else "<p>None but the folder.</p>"


# --- pictures -------------------------------------------------------------------------------------------------------


def _grids(log: RunLog, most: int) -> list[tuple[int, str]]:
    """(images seen, <img> attributes) of at most `most` grids of fakes, evenly thinned, the last always among them."""
    found = sorted(
        (int(p.stem[6:]), p)
        for p in log.path.glob("fakes-*.png")
        if p.stem[6:].isascii() and p.stem[6:].isdigit()
    )
    if len(found) > most:
        found = [found[round((i + 1) * len(found) / most) - 1] for i in range(most)]
    return [(nimg, image) for nimg, path in found if (image := _embedded(path, log.notes))]


def _embedded(path: Path, notes: list[str]) -> str | None:
    """src, width and height of a PNG file as a data URI, as WebP where that is smaller; None, with a note, if it is not one."""
    try:
        content = path.read_bytes()
        smaller, width, height = _as_webp(content)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        notes.append(f"{path.name} left out, as it cannot be read")
        return None
    kind, content = ("webp", smaller) if 0 < len(smaller) < len(content) else ("png", content)
    return f'src="data:image/{kind};base64,{base64.b64encode(content).decode()}" width="{width}" height="{height}"'


def _as_webp(content: bytes) -> tuple[bytes, int, int]:
    """A PNG as WebP, empty where that has no room for it; width and height in px. Raises what Pillow does for a damaged one."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pictures that are too large; what counts is said below
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            width, height = image.size
            if width * height > _MOST_PIXELS:
                raise ValueError("too large")
            pixels = image.convert("RGB")
    if max(width, height) <= _SIDE:
        pixels.save(buffer, "WEBP", quality=90, method=4)
    return buffer.getvalue(), width, height


def _reals(log: RunLog) -> str:
    path = log.path / "reals.png"
    return (_embedded(path, log.notes) or "") if path.is_file() else ""


def _viewer(log: RunLog, grids: Sequence[tuple[int, str]]) -> str:
    """The grids over time with a slider, and the reals beside them."""
    if not grids:
        return "<p>No grids yet; one is written every <code>snapshot_kimg</code>.</p>"
    last = len(grids) - 1
    frames = "".join(
        f'<img {image} alt="fakes after {nimg:,} images" data-at="{nimg / 1000:,.1f} kimg"{"" if i == last else " hidden"}>'
        for i, (nimg, image) in enumerate(grids)
    )
    controls = (
        f'<div class="controls"><button type="button" aria-label="Play">Play</button>'
        f'<input type="range" min="0" max="{last}" value="{last}" aria-label="Time">'
        f"<output>{grids[-1][0] / 1000:,.1f} kimg</output></div>"
    )
    fakes = f'<figcaption>Fakes</figcaption><div class="frames">{frames}</div>{controls if last else ""}'
    reals = _reals(log)
    beside = _figure("Reals", reals, "real pictures") if reals else ""
    return f'<div class="grids"><figure class="viewer">{fakes}</figure>{beside}</div>'


def _figure(caption: str, image: str, alt: str) -> str:
    return f'<figure><figcaption>{caption}</figcaption><div class="frames"><img {image} alt="{escape(alt)}"></div></figure>'


def _final_grids(logs: Sequence[RunLog], grids: Sequence[Sequence[tuple[int, str]]]) -> str:
    figures = [
        _figure(
            f"{_chip(logs, i)} at {grid[-1][0] / 1000:,.1f} kimg",
            grid[-1][1],
            f"fakes of {logs[i].name}",
        )
        for i, grid in enumerate(grids)
        if grid
    ]
    same = all(log.setting("data") == logs[0].setting("data") for log in logs)
    if figures and same and (reals := _reals(logs[0])):
        figures.append(_figure("Reals", reals, "real pictures"))
    return f'<div class="grids">{"".join(figures)}</div>' if figures else "<p>No grids yet.</p>"


# --- curves and metrics ---------------------------------------------------------------------------------------------


def _curves(logs: Sequence[RunLog]) -> str:
    """One chart for each group of statistics, or for each statistic where several runs share it."""
    told = (
        "<p class=note>Dashed lines: where the watchdog went back to.</p>"
        if len(logs) == 1 and logs[0].faults
        else ""
    )
    figures = []
    for title, names in CHARTS.items():
        if len(logs) == 1:
            curves = [_curve(name, logs[0], key, i) for i, (name, key) in enumerate(names.items())]
            figures.append(
                chart(
                    title,
                    list(filter(_says_something, curves)),
                    [nimg / 1000 for nimg, _ in logs[0].faults],
                )
            )
            continue
        for name, key in names.items():
            curves = [_curve(log.name, log, key, i) for i, log in enumerate(logs)]
            full_title = title if len(names) == 1 else f"{title}: {name}"
            figures.append(chart(full_title, curves) if any(map(_says_something, curves)) else "")
    return f'{told}<div class="charts">{"".join(figures)}</div>'


def _curve(name: str, log: RunLog, key: str, colour: int) -> Curve:
    x, y = log.curve(key)
    percent = 100 if key.startswith("speed/waiting") else 1
    return Curve(name, x, [None if v is None else percent * v for v in y], colour)


def _says_something(curve: Curve) -> bool:
    """Not, where it has no points or is 0 throughout: what was not in use."""
    return any(v != 0 for v in curve.y)


def _quality(logs: Sequence[RunLog]) -> str:
    """A table and charts for every protocol: what was measured by different ones never stands in one row or column."""
    protocols: dict[str, dict[str, Any]] = {}
    for log in logs:
        for record in log.records:
            protocols.setdefault(json.dumps(record["protocol"], sort_keys=True), record["protocol"])
    if not protocols:
        return "<p>Not evaluated: <code>eval_kimg</code> does so during a run, <code>vgan-eval</code> afterwards.</p>"
    parts = []
    if len(protocols) > 1:
        parts.append(
            "<p class=note>Numbers of different protocols say nothing about each other; each has its own table.</p>"
        )
    for i, (told, protocol) in enumerate(protocols.items()):
        records = [
            [r for r in log.records if json.dumps(r["protocol"], sort_keys=True) == told]
            for log in logs
        ]
        title = f"<h3>Protocol {i + 1}</h3>" if len(protocols) > 1 else ""
        values = {
            k: ", ".join(map(str, v)) if isinstance(v, list) else str(v)
            for k, v in protocol.items()
        }
        lines = "".join(
            f"<div><dt>{escape(str(k))}</dt><dd>{escape(v)}</dd></div>" for k, v in values.items()
        )
        parts.append(f"{title}<dl class=protocol>{lines}</dl>")
        parts.append(
            _metrics_of_one(records[0]) if len(logs) == 1 else _metrics_of_several(logs, records)
        )
        parts.append(_metric_charts(logs, records))
    return "".join(parts)


def _measured(records: Sequence[dict[str, Any]]) -> list[str]:
    return [name for name in SHOWN if any(number(r, name) is not None for r in records)]


def _heading(name: str) -> str:
    arrow = {True: " &darr;", False: " &uarr;", None: ""}[SMALLER_IS_BETTER.get(name)]
    return f"{name.replace('_', ' ')}{arrow}"


def _cell(record: dict[str, Any], name: str) -> str:
    value, spread = number(record, name), number(record, f"{name}_ci")
    spread = number(record, f"{name}_std") if spread is None else spread
    if value is None:
        return "&ndash;"
    return SHOWN[name].format(value) + (
        "" if spread is None else f" <small>&plusmn; {SHOWN[name].format(spread)}</small>"
    )


def _metrics_of_one(records: Sequence[dict[str, Any]]) -> str:
    """The newest evaluation, and all of them behind a fold."""
    names = _measured(records)
    rows = [
        [f"{r['cur_nimg'] / 1000:,.1f} kimg", *(_cell(r, name) for name in names)] for r in records
    ]
    head = ["", *map(_heading, names)]
    newest = _table(head, rows[-1:], "numbers")
    if len(rows) == 1:
        return newest
    return f"{newest}<details><summary>All {len(rows)} evaluations</summary>{_table(head, rows, 'numbers')}</details>"


def _metrics_of_several(logs: Sequence[RunLog], records: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Each run's newest evaluation by this protocol."""
    newest = {i: of_run[-1] for i, of_run in enumerate(records) if of_run}
    names = _measured(list(newest.values()))
    rows = [
        [_chip(logs, i), f"{r['cur_nimg'] / 1000:,.1f} kimg", *(_cell(r, name) for name in names)]
        for i, r in newest.items()
    ]
    missing = [escape(log.name) for i, log in enumerate(logs) if i not in newest]
    told = (
        f"<p class=note>Not evaluated by this protocol: {', '.join(missing)}.</p>"
        if missing
        else ""
    )
    return _table(["", "at", *map(_heading, names)], rows, "numbers") + told


def _metric_charts(logs: Sequence[RunLog], records: Sequence[Sequence[dict[str, Any]]]) -> str:
    """A chart for each metric that moved; of several evaluations at one place the newest counts."""
    figures = []
    for name in _measured([r for of_run in records for r in of_run]):
        curves = []
        for i, of_run in enumerate(records):
            values = {r["cur_nimg"] / 1000: number(r, name) for r in of_run if name in r}
            if values:
                curves.append(
                    Curve(
                        logs[i].name if len(logs) > 1 else name.replace("_", " "),
                        list(values),
                        list(values.values()),
                        i,
                    )
                )
        if len({v for c in curves for v in c.y}) > 1 and any(len(c.x) > 1 for c in curves):
            figures.append(chart(name.replace("_", " "), curves))
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


# --- events, command, config ----------------------------------------------------------------------------------------


def _events(logs: Sequence[RunLog]) -> str:
    """Where runs went on, and what the watchdog did."""
    rows = []
    for i, log in enumerate(logs):
        happened = [(nimg, "watchdog", text) for nimg, text in log.faults] + [
            (nimg, "went on", text) for nimg, text in log.resumes
        ]
        run = [_chip(logs, i)] if len(logs) > 1 else []
        rows += [
            [f"{nimg / 1000:,.1f} kimg", *run, kind, escape(text)]
            for nimg, kind, text in sorted(happened)
        ]
    head = ["at", *(["run"] if len(logs) > 1 else []), "what", ""]
    return (
        _table(head, rows, "events")
        if rows
        else "<p>Nothing: one start, and the watchdog never had to act.</p>"
    )


def _reproduce(log: RunLog, compose: Compose, titled: bool) -> str:
    """The command, which was composed and compared with the config before it is told."""
    title = f"<h3>{escape(log.name)}</h3>" if titled else ""
    line = command(log.config, f"outputs/{log.name.rpartition('/')[2]}-again", compose)
    if line is None:
        return f"{title}<p>No overrides of this vgan-train give this config; it came from another version, or from code.</p>"
    return f'{title}<div class="command"><pre>{escape(line)}</pre><button type="button">Copy</button></div>'


def _configuration(log: RunLog, titled: bool) -> str:
    title = f"config.yaml of {escape(log.name)}" if titled else "config.yaml"
    return f"<details><summary>{title}</summary><pre>{escape(log.config_text)}</pre></details>"

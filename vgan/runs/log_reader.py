"""What a run folder tells of its run. Whoever wrote the folder is not trusted: every line may say anything, or be cut short."""

import json
import math
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from vgan.runs import checkpoint
from vgan.runtime.errors import UserError

_MOST_BYTES = 100_000_000  # of one file that is read


@dataclass(frozen=True)
class RunLog:
    """A run folder, read once. kimg are thousands of images."""

    given: str  # how the user called it
    name: str  # what tells it from the others of a report
    path: Path
    config: dict[str, Any]
    config_text: str
    ticks: list[dict[str, Any]]  # lines of stats.jsonl with a loss, in the order of cur_nimg
    records: list[dict[str, Any]]  # lines of metrics.jsonl, likewise
    starts: list[
        dict[str, Any]
    ]  # lines of starts.jsonl: versions and device at each start; earlier vgans wrote none
    faults: list[tuple[int, str]]  # where the watchdog went back to, and what it said
    notes: list[str] = field(default_factory=list)  # what was left out

    @property
    def cur_nimg(self) -> int:
        return int(self.ticks[-1]["cur_nimg"])

    @property
    def resumes(self) -> list[tuple[int, str]]:
        """The images seen where the run went on, and on what: as it noted, or else where its seconds begin again."""
        if self.starts:
            return [
                (s["cur_nimg"], f"{s.get('time')}, {s.get('device')}, vgan {s.get('vgan')}")
                for s in self.starts[1:]
            ]
        laps = [
            (int(tick["cur_nimg"]), number(tick, "speed/session_s") or 0.0) for tick in self.ticks
        ]
        return [
            (nimg, "seen in its statistics")
            for (nimg, s), (_, next_s) in pairwise(laps)
            if next_s < s
        ]

    @property
    def seconds(self) -> float:
        """How long the run took; what a kill lost and repeated counts once."""
        laps = [number(tick, "speed/session_s") or 0.0 for tick in self.ticks]
        return sum(a for a, b in zip(laps, [*laps[1:], 0.0]) if b < a)

    def setting(self, name: str) -> Any:
        """The config's value of a dotted name; None without one."""
        node: Any = self.config
        for part in name.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return node

    def curve(self, name: str) -> tuple[list[float], list[float | None]]:
        """kimg and values of the ticks that have `name`; None where it was not finite."""
        found = [tick for tick in self.ticks if name in tick]
        return [tick["cur_nimg"] / 1000 for tick in found], [number(tick, name) for tick in found]


def number(line: Any, name: str) -> float | None:
    """The finite number of that name in an object; None for anything else."""
    value = line.get(name) if isinstance(line, dict) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < 1e300 and math.isfinite(value) else None


def read_run(given: str, name: str) -> RunLog:
    """The run in a folder. Raises UserError where it is none, or where there is nothing to tell of it yet."""
    path, where = Path(given).expanduser(), f"run={given}"
    if not path.is_dir():
        raise UserError(f"{where}: no such folder; give the run_dir of a vgan-train")
    if not (path / "config.yaml").is_file():
        raise UserError(
            f"{where}: not a run folder (it holds no config.yaml); give the run_dir of a vgan-train"
        )
    text = _read(path / "config.yaml")
    config = _parse_config(text, path / "config.yaml")
    notes: list[str] = []
    lines = {name: _lines(path / f"{name}.jsonl", notes) for name in ("stats", "metrics", "starts")}
    ticks = [line for line in lines["stats"] if "loss/D" in line]
    if not ticks:
        raise UserError(
            f"{where}: has no statistics yet; they come every tick_kimg={config.get('tick_kimg')} thousand images"
        )
    faults = [
        (line["cur_nimg"], str(line["watchdog"])) for line in lines["stats"] if "watchdog" in line
    ]
    records = [line for line in lines["metrics"] if isinstance(line.get("protocol"), dict)]
    return RunLog(
        given,
        name,
        path,
        config,
        text,
        _sorted(ticks),
        _sorted(records),
        lines["starts"],
        faults,
        notes,
    )


def _sorted(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(lines, key=lambda line: line["cur_nimg"])


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(
                f"{path}: has {path.stat().st_size / 1e6:,.0f} MB, which no run writes; give an intact run folder"
            )
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); check its permissions") from e


def _parse_config(text: str, path: Path) -> dict[str, Any]:
    """A mapping of bounded size: aliases in YAML can make a small file a giant."""
    try:
        config = yaml.safe_load(text)
        leaves = sum(1 for _ in checkpoint.walk(config))
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise UserError(
            f"{path}: cannot be read as YAML ({str(e).splitlines()[0]}); restore it, or give another run"
        ) from e
    if not isinstance(config, dict) or not leaves:
        raise UserError(f"{path}: not the config of a run; restore it, or give another run")
    return config


def _lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines. A last line without an end is being written, or was cut short by a kill.

    Other lines that cannot be read are left out as well, with a note.
    """
    found: list[dict[str, Any]] = []
    lines = _read(path).split("\n") if path.is_file() else [""]
    damaged = 0
    for text in lines[:-1]:
        try:
            line = json.loads(text)
            seen = line["cur_nimg"]
        except (ValueError, TypeError, LookupError, RecursionError):
            damaged += 1
            continue
        if isinstance(seen, int) and 0 <= seen < 2**53:
            found.append(line)
        else:
            damaged += 1
    if damaged:
        notes.append(f"{damaged} damaged line{'s' * (damaged > 1)} of {path.name} left out")
    return found


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl that are whole."""
    path, lines = run_dir / "metrics.jsonl", []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines

"""Reading the logs of a run folder.

The content is not trusted: every line may hold anything, or be cut short.
"""

import json
import math
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from vgan.runs import checkpoint
from vgan.runtime.errors import UserError, first_line
from vgan.runtime.renamed import METRICS

_MAX_BYTES = 100_000_000  # of one file


@dataclass(frozen=True)
class RunLog:
    """The logs of a run. kimg are thousands of images."""

    given: str  # the path as the user wrote it
    name: str  # distinguishes the runs of a report
    path: Path
    config: dict[str, Any]
    config_text: str
    ticks: list[dict[str, Any]]  # lines of stats.jsonl with a loss, sorted by cur_nimg
    records: list[dict[str, Any]]  # lines of metrics.jsonl, sorted by cur_nimg
    starts: list[dict[str, Any]]  # lines of starts.jsonl: versions and device of each start
    faults: list[tuple[int, str]]  # cur_nimg after each roll-back, and its reason
    notes: list[str] = field(default_factory=list)  # about lines that were skipped

    @property
    def cur_nimg(self) -> int:
        return int(self.ticks[-1]["cur_nimg"])

    @property
    def resumes(self) -> list[tuple[int, str]]:
        """cur_nimg of each resume, and on what.

        Without starts.jsonl, as in early versions, a session begins where its seconds decrease.
        """
        if self.starts:
            return [(s["cur_nimg"], _describe_start(s)) for s in self.starts[1:]]
        sessions = zip(self.ticks[:-1], pairwise(self._session_seconds()), strict=True)
        return [
            (int(tick["cur_nimg"]), "seen in its statistics")
            for tick, (seconds, next_seconds) in sessions
            if next_seconds < seconds
        ]

    @property
    def seconds(self) -> float:
        """The duration of the run. What was lost by a kill and repeated counts once."""
        seconds = [*self._session_seconds(), 0.0]
        return sum(last for last, following in pairwise(seconds) if following < last)

    def _session_seconds(self) -> list[float]:
        return [number(tick, "speed/session_s") or 0.0 for tick in self.ticks]

    def setting(self, name: str) -> Any:
        """Return the config's value of a dotted name; None without one."""
        node: Any = self.config
        for part in name.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return node

    def curve(self, name: str) -> tuple[list[float], list[float | None]]:
        """Return kimg and values of the ticks that have `name`; None for a value not finite."""
        ticks = [tick for tick in self.ticks if name in tick]
        return [tick["cur_nimg"] / 1000 for tick in ticks], [number(tick, name) for tick in ticks]


def _describe_start(start: dict[str, Any]) -> str:
    return f"{start.get('time')}, {start.get('device')}, vgan {start.get('vgan')}"


def number(line: Any, name: str) -> float | None:
    """Return the finite number of that name in an object; None for anything else."""
    value = line.get(name) if isinstance(line, dict) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < 1e300 and math.isfinite(value) else None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the readable lines of metrics.jsonl, with today's names of the metrics."""
    return _read_lines(run_dir / "metrics.jsonl", [])


def read_run(given: str, name: str) -> RunLog:
    """Read the logs of a run folder.

    Raises UserError if the folder is not one, or if it has no statistics yet.
    """
    path, where = Path(given).expanduser(), f"run={given}"
    fix = "give the run_dir of a vgan-train"
    if not path.is_dir():
        raise UserError(f"{where}: no such folder; {fix}")
    if not (path / "config.yaml").is_file():
        raise UserError(f"{where}: not a run folder (it holds no config.yaml); {fix}")
    text = _read_text(path / "config.yaml")
    config = _parse_config(text, path / "config.yaml")
    notes: list[str] = []
    stats, metrics, starts = (
        _read_lines(path / f"{name}.jsonl", notes) for name in ("stats", "metrics", "starts")
    )
    ticks = [line for line in stats if "loss/D" in line]
    if not ticks:
        every = f"tick_kimg={config.get('tick_kimg')} thousand images"
        raise UserError(f"{where}: has no statistics yet; they come every {every}")
    return RunLog(
        given,
        name,
        path,
        config,
        config_text=text,
        ticks=_sorted(ticks),
        records=_sorted([line for line in metrics if isinstance(line.get("protocol"), dict)]),
        starts=starts,
        faults=[(line["cur_nimg"], str(line["watchdog"])) for line in stats if "watchdog" in line],
        notes=notes,
    )


def _sorted(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(lines, key=lambda line: line["cur_nimg"])


def _read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            problem = f"has {size / 1e6:,.0f} MB, which no run writes"
            raise UserError(f"{path}: {problem}; give an intact run folder")
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); check its permissions") from e


def _parse_config(text: str, path: Path) -> dict[str, Any]:
    """Parse YAML to a dict of bounded size: with aliases a small file can describe a giant."""
    fix = "restore it, or give another run"
    try:
        config = yaml.safe_load(text)
        leaves = sum(1 for _ in checkpoint.walk(config))
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: cannot be read as YAML ({first_line(e)}); {fix}") from e
    if not isinstance(config, dict) or not leaves:
        raise UserError(f"{path}: not the config of a run; {fix}")
    return config


def _read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return the objects with a cur_nimg in a file of JSON lines.

    A last line without an end is still being written, or was cut short by a kill. The number of
    other lines that cannot be read is added to `notes`.
    """
    lines: list[dict[str, Any]] = []
    texts = _read_text(path).split("\n")[:-1] if path.is_file() else []
    for text in texts:
        try:
            line = json.loads(text)
            cur_nimg = line["cur_nimg"]
        except (ValueError, TypeError, LookupError, RecursionError):
            continue
        if isinstance(cur_nimg, int) and 0 <= cur_nimg < 2**53:
            lines.append({_current_name(key): value for key, value in line.items()})
    if damaged := len(texts) - len(lines):
        notes.append(f"{damaged} damaged line{'s' * (damaged > 1)} of {path.name} left out")
    return lines


def _current_name(metric: str) -> str:
    """Return today's name of a metric or of its spread, such as copies_std."""
    base = metric.removesuffix("_std")
    return METRICS.get(base, base) + metric[len(base) :]

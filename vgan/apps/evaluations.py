"""What the page of vgan-report shows of evaluations."""

import json
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from vgan.apps.charts import Curve, chart
from vgan.evaluation.evaluator import SHOWN, SMALLER_IS_BETTER
from vgan.runs.log_reader import RunLog, number


def evaluations(logs: Sequence[RunLog]) -> list[dict[str, Any]]:
    """Return the evaluations by protocol: values of different protocols are not comparable."""
    protocols: dict[str, dict[str, Any]] = {}
    for i, log in enumerate(logs):
        for record in log.records:
            protocol = record["protocol"]
            key = json.dumps(protocol, sort_keys=True)
            runs = protocols.setdefault(key, {"protocol": protocol, "runs": [[] for _ in logs]})
            runs["runs"][i].append(record)
    return [_protocol(logs, **group) for group in protocols.values()]


def _protocol(
    logs: Sequence[RunLog], protocol: dict[str, Any], runs: list[list[dict[str, Any]]]
) -> dict[str, Any]:
    """Return what the page shows of one protocol; runs: the records of each run."""
    fields = {}
    for name, value in protocol.items():
        fields[name] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    newest = [records[-1:] for records in runs]
    shown = runs if len(logs) == 1 else newest
    metrics = measured(shown)
    rows = []
    for run, records in enumerate(shown):
        for record in records:
            cells = [format_cell(record, name) for name in metrics]
            rows.append({"run": run, "kimg": record["cur_nimg"] / 1000, "cells": cells})
    return {
        "fields": fields,
        "head": [heading(name) for name in metrics],
        "rows": rows,
        "missing": [log.name for log, records in zip(logs, runs) if not records],
        "charts": _metric_charts(logs, runs),
    }


def measured(runs: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    """Return the names of the metrics in the records of runs, in the order to show them."""
    records = [record for records in runs for record in records]
    return [name for name in SHOWN if any(number(r, name) is not None for r in records)]


def heading(name: str) -> str:
    """Return the head of a metric's column; an arrow tells which direction is better."""
    arrow = {True: " ↓", False: " ↑", None: ""}[SMALLER_IS_BETTER.get(name)]
    return name.replace("_", " ") + arrow


def format_cell(record: dict[str, Any], name: str) -> tuple[str, str | None]:
    """Return a metric and its spread as text."""
    value, spread = number(record, name), number(record, f"{name}_ci")
    if spread is None:
        spread = number(record, f"{name}_std")
    if value is None:
        return "–", None
    return SHOWN[name].format(value), None if spread is None else SHOWN[name].format(spread)


def _metric_charts(
    logs: Sequence[RunLog], runs: Sequence[Sequence[dict[str, Any]]]
) -> list[Markup]:
    """Return a chart for each metric that changed. The newest of several values at one x counts."""
    figures = []
    for name in measured(runs):
        title = name.replace("_", " ")
        curves = []
        for i, records in enumerate(runs):
            values = {r["cur_nimg"] / 1000: number(r, name) for r in records if name in r}
            curve_name = logs[i].name if len(logs) > 1 else title
            if values:
                curves.append(Curve(curve_name, list(values), list(values.values()), i))
        changed = len({value for curve in curves for value in curve.y}) > 1
        if changed and any(len(curve.x) > 1 for curve in curves):
            figures.append(chart(title, curves))
    return [figure for figure in figures if figure]

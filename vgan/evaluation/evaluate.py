"""The command vgan-eval: evaluate checkpoints."""

from collections.abc import Sequence
from typing import Any

from vgan.config import EvalConfig
from vgan.data.conditions import Conditions
from vgan.data.open import build_dataset
from vgan.data.packed import default_cache_dir
from vgan.evaluation.evaluator import Result, make_evaluator, shown_values, write_nearest
from vgan.inference.load import drawing_precision, find_model, load_model, restore_generator
from vgan.runs.log_writer import append_metrics
from vgan.runtime import hub
from vgan.runtime.console import in_lines, report_line
from vgan.runtime.device import pick_device, prepare_process
from vgan.runtime.errors import UserError
from vgan.runtime.instantiate import require_own


def evaluate(cfg: EvalConfig) -> list[Result]:
    """Evaluate checkpoints, print a table and append to the metrics.jsonl of each folder.

    Nothing is written about models of the Hugging Face Hub.
    """
    device = pick_device(cfg.device)
    precision = drawing_precision(cfg.precision, device)
    prepare_process(device, precision, threads=0)
    names = cfg.ckpt if isinstance(cfg.ckpt, list) else [cfg.ckpt]
    for name in names:
        find_model(name)  # report a missing one before the first evaluation
    shown_names: list[str] = []
    results: list[Result] = []
    evaluator, settings = None, None
    for name in names:
        _, path, state = load_model(name)
        data, features = _data_node(cfg, state), _features_node(cfg, state)
        holdout = state["config"].get("holdout", 0)
        if evaluator is None or settings != (data, features, holdout):
            settings = (data, features, holdout)
            dataset = build_dataset(data)
            sizes = (cfg.n, cfg.repeats, cfg.seed, cfg.batch_size, holdout)
            evaluator = make_evaluator(dataset, device, features, cfg.metrics, *sizes)
        G = restore_generator(state, device)
        ours, theirs = (_describe_labels(x.label_dim, x.conditions) for x in (G, dataset))
        if G.label_dim and ours != theirs:
            raise UserError(
                f"ckpt={path}: has {ours}, the data has {theirs}; use the data of its training"
            )
        result = evaluator(G, precision, default_cache_dir())
        if hub.is_address(name):
            shown_names.append(name)
        else:
            write_nearest(path.with_name(f"nearest-{path.stem}.png"), result)
            cur_nimg = int(state["cur_nimg"])
            append_metrics(path.parent, path.name, cur_nimg, result.values, result.protocol)
            shown_names.append(f"{path.parent.name}/{path.name}")
        results.append(result)
    print(table(shown_names, results))
    return results


def _describe_labels(label_dim: int, conditions: Conditions | None) -> str:
    if conditions:
        return f"conditions {', '.join(conditions.names)}"
    return f"{label_dim} classes"


def _data_node(cfg: EvalConfig, state: dict[str, Any]) -> dict[str, Any]:
    """Return the data node of the checkpoint's run, with the changes of the command line."""
    changes = {key: value for key, value in cfg.data.items() if value is not None}
    node = state["config"].get("data")
    if not isinstance(node, dict):
        raise UserError("ckpt: does not say which data it was trained on; use an intact file")
    node = {**node, **changes}
    require_own(node, "data", "vgan.data", "evaluate during the run, with eval_kimg")
    return node


def _features_node(cfg: EvalConfig, state: dict[str, Any]) -> dict[str, Any]:
    """Return the features of the command line, else those of the checkpoint's run."""
    node = dict(cfg.features or {})
    if not node.get("_target_"):
        inception = {"_target_": "vgan.evaluation.features.Inception"}
        node = dict(state["config"].get("features") or inception)
        fix = "name yours with features._target_"
        require_own(node, "features", "vgan.evaluation.features", fix)
    if cfg.weights:
        node["weights"] = cfg.weights
    return node


def table(names: Sequence[str], results: Sequence[Result]) -> str:
    """Format results under a heading for each protocol."""
    lines: list[str] = []
    remaining = list(zip(names, results))
    while remaining:
        first = remaining[0][1]
        if lines:
            lines += ["", "NOT comparable with the results above, as the protocol differs:"]
        for name, result in remaining:
            if result.comparable(first):
                lines.append(in_lines(shown_values(result.values), f"{name}   "))
        lines += [report_line(f"  {key}", str(value)) for key, value in first.protocol.items()]
        remaining = [pair for pair in remaining if not pair[1].comparable(first)]
    return "\n".join(lines)

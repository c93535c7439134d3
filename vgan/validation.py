"""Check a typed config: kinds of values, the rule of each key, and rules between keys."""

from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin

from vgan.config import (
    DataConfig,
    ExportConfig,
    PeriodicEvaluationConfig,
    SampleConfig,
    TrainConfig,
)
from vgan.schema import Ramp, require


def validate(cfg: Any) -> None:
    """Check an instance of any schema of `vgan.config`.

    Raises UserError that names key, value and rule.
    """
    _check_fields(cfg, "")
    if isinstance(cfg, TrainConfig):
        _check_train(cfg)
    elif isinstance(cfg, SampleConfig):
        _check_sample(cfg)
    elif isinstance(cfg, ExportConfig):
        _check_export(cfg)
    elif isinstance(cfg, DataConfig):
        written = cfg.sheet is None or cfg.do != "pack"
        require(written, "sheet", cfg.sheet, "needs do=info or do=check")


def _check_fields(node: Any, prefix: str) -> None:
    for f in fields(node):
        name, value, rule = f"{prefix}{f.name}", getattr(node, f.name), f.metadata.get("rule")
        _require_kind(f.type, name, value)
        if is_dataclass(value) and not isinstance(value, Ramp):
            _check_fields(value, f"{name}.")
        elif rule is None:
            continue
        elif isinstance(value, Ramp):
            require(rule.holds(value.start), f"{name}.start", value.start, rule.text)
            require(rule.holds(value.end), f"{name}.end", value.end, rule.text)
        elif type(None) not in get_args(f.type):
            require(rule.holds(value), name, value, rule.text)
        elif value is not None:
            require(rule.holds(value), name, value, f"{rule.text}, or null")


def _require_kind(expected: Any, name: str, value: Any) -> None:
    """Refuse what an interpolation can put in place of a node or a list, as ema=${seed} does."""
    if get_origin(expected) is list:
        (item,) = get_args(expected)
        ok = isinstance(value, list) and all(isinstance(v, item) for v in value)
        require(ok, name, value, f"must be a list of {item.__name__}, such as {name}=[...]")
    elif is_dataclass(expected) or get_origin(expected) is dict:
        ok = isinstance(value, get_origin(expected) or expected)
        require(ok, name, value, "has keys of its own; set them one by one")


def _check_train(cfg: TrainConfig) -> None:
    no_triton = cfg.depthwise != "triton" or cfg.penalty != "double_backward"
    require(no_triton, "depthwise", cfg.depthwise, "needs penalty=jvp or finite_difference")
    scaled = cfg.parallel == "ddp" or cfg.precision != "fp16"
    require(scaled, "parallel", cfg.parallel, "needs bf16, tf32 or fp32; use ddp for fp16")
    soap = cfg.optim.optimizer.get("_target_") == "vgan.training.soap.SOAP"
    rule = "shards weights, and optimizer=soap needs whole ones; use ddp or optimizer=adam"
    require(cfg.parallel == "ddp" or not soap, "parallel", cfg.parallel, rule)
    begun = cfg.init is not None or cfg.freeze_d == 0
    require(begun, "freeze_d", cfg.freeze_d, "needs init=CKPT, whose weights it keeps")
    _check_best_by(cfg.eval)


def _check_best_by(cfg: PeriodicEvaluationConfig) -> None:
    metric = "pr" if cfg.best_by in ("precision", "recall") else cfg.best_by
    measured = metric in cfg.metrics
    require(measured, "eval.best_by", cfg.best_by, f"needs {metric} in eval.metrics={cfg.metrics}")


def _check_export(cfg: ExportConfig) -> None:
    to_hub = cfg.to == "hub"
    require(not to_hub or cfg.repo is not None, "repo", "null", "to=hub needs repo=USER/MODEL")
    require(to_hub or cfg.repo is None, "repo", cfg.repo, "goes with to=hub")
    require(to_hub or not cfg.private, "private", "true", "goes with to=hub")


def _check_sample(cfg: SampleConfig) -> None:
    images = cfg.show == "images"
    require(images or cfg.motion is None, "show", cfg.show, "goes with motion=null")
    given = cfg.latent is not None
    for name in ("n", "seeds"):
        value = getattr(cfg, name)
        rule = f"leave it out; latent={cfg.latent} gives the images"
        require(not given or value is None, name, value, rule)
    rule = "goes with motion=interpolate, classes or component; a walk starts from seeds"
    require(not given or cfg.motion != "walk", "latent", cfg.latent, rule)
    moves = cfg.motion == "component" or cfg.show == "components"
    rule = "goes with motion=component or show=components"
    require(moves or cfg.component is None, "component", cfg.component, rule)
    closes = cfg.loop or cfg.motion != "walk"
    rule = "goes with motion=interpolate or classes; a walk always closes"
    require(closes, "loop", cfg.loop, rule)
    for name in ("columns", "zoom"):
        value = getattr(cfg, name)
        require(images or value is None, name, value, "goes with show=images")
    attention = cfg.query is None or cfg.show == "attention"
    require(attention, "query", cfg.query, "goes with show=attention")

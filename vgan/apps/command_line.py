"""The command that gives a config again: found by comparing with what vgan-train composes, and tried before it is told."""

import re
import shlex
from collections.abc import Callable
from typing import Any

import yaml  # comes with omegaconf

from vgan.config import CONFIG_DIR

# overrides of vgan-train -> the config, and the same with the interpolations in it; raises ValueError for what does not compose
Compose = Callable[[list[str]], tuple[dict[str, Any], dict[str, Any]]]
_PLAIN = re.compile(r"[A-Za-z_/.][A-Za-z0-9_/.:@%+-]*")
_TOLD_BY = {
    "data": "name",
    "model": "name",
    "size": "name",
    "loss": "name",
    "augment": "name",
    "features": "_target_",
}
_OTHER_TYPES = ("true", "false", "null", "inf", "nan")


def flat(node: Any, name: str = "") -> dict[str, Any]:
    """{'a.b': value} of nested dicts; an empty one is a value."""
    if not isinstance(node, dict) or not node:
        return {name: node}
    return {
        k: v
        for key, child in node.items()
        for k, v in flat(child, f"{name}.{key}" if name else str(key)).items()
    }


def command(config: dict[str, Any], run_dir: str, compose: Compose) -> str | None:
    """'vgan-train data=shapes loss=hinge ... run_dir=...' for the shell, or None where no overrides give this config."""
    wanted = _but_run_dir(flat(config))
    try:
        overrides = [f"data={_option('data', config)}"]
        brought = compose(overrides)[0]  # a data set chooses some options of other groups
        for group in _TOLD_BY:
            if group != "data" and (option := _option(group, config)) != _option(group, brought):
                overrides.append(f"{group}={option}")
        resolved, written = map(flat, compose(overrides))
        # what is worked out from other values comes right by itself once those are given; if not, the second round gives it
        for follows_too in (False, True):
            now = _but_run_dir(resolved)
            for name in sorted(now.keys() | wanted.keys()):
                differs = name not in now or name not in wanted or now[name] != wanted[name]
                if differs and (follows_too or "${" not in str(written.get(name))):
                    overrides.append(_override(name, wanted, name in written))
            if now != wanted:
                resolved = flat(compose(overrides)[0])
        if _but_run_dir(resolved) != wanted:
            return None
        return " ".join(
            ["vgan-train", *map(shlex.quote, [*overrides, f"run_dir={_value(run_dir)}"])]
        )
    except ValueError:
        return None


def _but_run_dir(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k != "run_dir"}


def _option(group: str, config: dict[str, Any]) -> str:
    """The option of a group that a config's node came from; raises ValueError for one that is not vgan's."""
    node, told_by = config.get(group), _TOLD_BY[group]
    for path in sorted((CONFIG_DIR / group).glob("*.yaml")):
        option = yaml.safe_load(path.read_text(encoding="utf-8"))
        option = option.get(group, option)  # in a file for the whole config, as a data set's
        if isinstance(node, dict) and option.get(told_by) == node.get(told_by):
            return path.stem
    raise ValueError(group)


def _override(name: str, wanted: dict[str, Any], known: bool) -> str:
    if not _PLAIN.fullmatch(name):
        raise ValueError(name)
    if name not in wanted:
        return f"~{name}"
    return f"{'' if known else '+'}{name}={_value(wanted[name])}"


def _value(value: Any) -> str:
    """A value in the grammar of Hydra's overrides. Raises ValueError for what cannot be said, or would mean more than it says."""
    if isinstance(value, str):
        if (
            not value.isprintable() or "${" in value or "\\" in value
        ):  # interpolations could read the environment
            raise ValueError(value)
        quoted = value.replace("'", "\\'")
        return (
            value
            if _PLAIN.fullmatch(value) and value.lower() not in _OTHER_TYPES
            else f"'{quoted}'"
        )
    if isinstance(value, list):
        return f"[{','.join(map(_value, value))}]"
    if isinstance(value, dict):
        if not all(isinstance(k, str) and _PLAIN.fullmatch(k) for k in value):
            raise ValueError(value)
        return "{" + ",".join(f"{k}:{_value(v)}" for k, v in value.items()) + "}"
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    )

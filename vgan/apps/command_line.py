"""The vgan-train command that reproduces a config."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml  # comes with omegaconf

from vgan.runtime.nested import flatten
from vgan.schema import CONFIG_DIR

# From overrides of vgan-train to its config, resolved and with its interpolations. Raises
# ValueError for overrides that do not compose.
Compose = Callable[[list[str]], tuple[dict[str, Any], dict[str, Any]]]
# The groups of options, and the key that differs between the options of a group.
_GROUPS = {
    "data": "name",
    "model": "name",
    "size": "name",
    "loss": "name",
    "augment": "name",
    "optimizer": "_target_",
    "features": "_target_",
}
_PLAIN = re.compile(r"[A-Za-z_/.][A-Za-z0-9_/.:@%+-]*")
_OTHER_TYPES = ("true", "false", "null", "inf", "nan")


def command(config: dict[str, Any], run_dir: str, compose: Compose) -> str | None:
    """Return 'vgan-train data=shapes ... run_dir=...' for a shell.

    It is composed and compared with the config. Returns None if no overrides give this config.
    """
    try:
        overrides = _overrides(config, compose)
        if overrides is None:
            return None
        words = [*overrides, f"run_dir={_value(run_dir)}"]
    except ValueError:
        return None
    return shlex.join(["vgan-train", *words])


def _overrides(config: dict[str, Any], compose: Compose) -> list[str] | None:
    wanted = _comparable(config)
    overrides = [f"data={_option('data', config)}"]
    defaults = compose(overrides)[0]  # a data set selects options of other groups
    for group in list(_GROUPS)[1:]:
        option = _option(group, config)
        if option != _option(group, defaults):
            overrides.append(f"{group}={option}")
    resolved, written = compose(overrides)
    known = flatten(written)
    # Values that interpolate others become right when those are set. The second round sets the
    # ones that do not.
    for set_interpolated in (False, True):
        composed = _comparable(resolved)
        for name in sorted(composed.keys() | wanted.keys()):
            same = name in composed and name in wanted and composed[name] == wanted[name]
            if not same and (set_interpolated or "${" not in str(known.get(name))):
                overrides.append(_override(name, wanted, name in known))
        if composed != wanted:
            resolved = compose(overrides)[0]
    return overrides if _comparable(resolved) == wanted else None


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    unused = ("run_dir", "loss.gamma.") if config.get("gamma") == "auto" else ("run_dir",)
    return {name: v for name, v in flatten(config).items() if not name.startswith(unused)}


def _option(group: str, config: dict[str, Any]) -> str:
    """Return the option of a group that a config contains. Raises ValueError if none fits."""
    node, key = config.get(group), _GROUPS[group]
    if group == "optimizer":
        node = config.get("optim", {}).get("optimizer")
    for path in sorted((CONFIG_DIR / group).glob("*.yaml")):
        if isinstance(node, dict) and _read_option(path, group).get(key) == node.get(key):
            return path.stem
    if group == "optimizer":
        return "adam"  # any other of torch.optim is given by its _target_
    raise ValueError(group)


def _read_option(path: Path, group: str) -> dict[str, Any]:
    option = yaml.safe_load(path.read_text(encoding="utf-8"))
    return option.get(group, option)  # data sets' files are for the whole config


def _override(name: str, wanted: dict[str, Any], known: bool) -> str:
    if not _PLAIN.fullmatch(name):
        raise ValueError(name)
    if name not in wanted:
        return f"~{name}"
    return f"{'' if known else '+'}{name}={_value(wanted[name])}"


def _value(value: Any) -> str:
    """Format a value for Hydra's grammar. Raises ValueError for what the grammar cannot express."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list):
        return f"[{','.join(map(_value, value))}]"
    if not isinstance(value, dict):
        return repr(value)
    if not all(isinstance(key, str) and _PLAIN.fullmatch(key) for key in value):
        raise ValueError(value)
    return "{" + ",".join(f"{key}:{_value(child)}" for key, child in value.items()) + "}"


def _text(value: str) -> str:
    # An interpolation could read the environment.
    if not value.isprintable() or "${" in value or "\\" in value:
        raise ValueError(value)
    if _PLAIN.fullmatch(value) and value.lower() not in _OTHER_TYPES:
        return value
    quoted = value.replace("'", "\\'")
    return f"'{quoted}'"

"""Declare keys: a type, an explanation and a rule for each, and what reads them.

The dataclasses in `vgan.config` are made of these. `--help` prints the explanations, and
`vgan.validation.validate` checks the rules.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import MISSING, DictConfig, OmegaConf

from vgan.runtime.errors import UserError

_PACKAGE = Path(__file__).resolve().parent
# A wheel contains the YAML files inside the package; in a checkout they are a top-level folder.
CONFIG_DIR = _PACKAGE / "configs"
if not CONFIG_DIR.is_dir():
    CONFIG_DIR = _PACKAGE.parent / "configs"


class Rule(NamedTuple):
    """A condition on one value, and its text for the error message."""

    text: str
    holds: Callable[[Any], bool]


def at_least(low: float) -> Rule:
    return Rule(f"must be at least {low:g}", lambda v: v >= low)


def above(low: float) -> Rule:
    return Rule(f"must be above {low:g}", lambda v: v > low)


def between(low: float, high: float) -> Rule:
    return Rule(f"must be from {low:g} to {high:g}", lambda v: low <= v <= high)


def from_to_below(low: float, high: float) -> Rule:
    return Rule(f"must be from {low:g} to below {high:g}", lambda v: low <= v < high)


def one_of(*options: str) -> Rule:
    return Rule(f"must be one of {', '.join(options)}", lambda v: str(v).lower() in options)


def some_of(*options: str) -> Rule:
    text = f"must be some of {', '.join(options)}"
    return Rule(text, lambda v: len(v) > 0 and set(v) <= set(options))


def key(text: str, rule: Rule | None = None) -> Any:
    """Declare a field that `text` explains in --help and whose values obey `rule`.

    The rule of a list applies to the list, the rule of a Ramp to its start and its end. None always
    obeys the rule of an optional field.
    """
    return field(default=MISSING, metadata={"help": text, "rule": rule})


def node(schema: Callable[[], Any], text: str, rule: Rule | None = None) -> Any:
    """Declare a field with keys of its own: a dataclass, or dict for those of a `_target_`."""
    return field(default_factory=schema, metadata={"help": text, "rule": rule})


@dataclass
class Ramp:
    """A quantity that moves from start to end along half a cosine over schedule_kimg."""

    start: float = MISSING
    end: float = MISSING


def typed(cfg: DictConfig) -> Any:
    """Return the dataclass instance of a composed config, with interpolations resolved.

    Raises an OmegaConf exception for a mandatory value that is missing.
    """
    return OmegaConf.to_object(cfg)


def explained_keys(schema: type, prefix: str = "") -> list[tuple[str, str]]:
    """Return (key, explanation) for every explained key of a schema, nested ones included."""
    pairs = []
    for f in fields(schema):
        if "help" in f.metadata:
            pairs.append((prefix + f.name, f.metadata["help"]))
        if isinstance(f.type, type) and is_dataclass(f.type) and f.type is not Ramp:
            pairs += explained_keys(f.type, f"{prefix}{f.name}.")
    return pairs


def require(ok: bool, name: str, value: object, rule: str) -> None:
    """Raise a UserError `name=value: rule` unless `ok`."""
    if not ok:
        raise UserError(f"{name}={value}: {rule}")

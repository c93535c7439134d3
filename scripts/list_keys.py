"""Write the tables of keys into docs/configuration.md, from the schemas and the YAML files that the commands read.

    uv run python scripts/list_keys.py

tests/test_docs.py fails while the page says something else.
"""

import json
import re
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from vgan import cli, config  # noqa: F401  (cli registers the schemas)

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "configuration.md"
BEGIN, END = "<!-- keys: written by scripts/list_keys.py -->", "<!-- end of keys -->"


def commands() -> dict[str, tuple[str, type]]:
    """Every console script with the name of its YAML file and the schema of its keys."""
    found = {}
    for script in re.findall(
        r'^(vgan-\w+) = "vgan\.cli:', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M
    ):
        name = {"vgan-doctor": "train"}.get(script, script.removeprefix("vgan-"))
        found[script] = name, getattr(config, f"{name.capitalize()}Config")
    return found


def tables() -> str:
    """A table for every schema: key, value without overrides, explanation."""
    parts = []
    named = commands()
    with initialize_config_dir(str(config.CONFIG_DIR), version_base="1.3"):
        for script, (name, schema) in named.items():
            twins = [other for other, (its, _) in named.items() if its == name]
            if script != twins[0]:
                continue
            values = OmegaConf.to_container(compose(name))
            parts += [
                f"### {' and '.join(twins)}",
                "",
                "| key | value | what it is |",
                "|---|---|---|",
            ]
            parts += [
                f"| `{key}` | {_shown(values, key)} | {_cell(text)} |"
                for key, text in config.explained_keys(schema)
            ]
            parts.append("")
    return "\n".join(parts)


def _shown(values: Any, key: str) -> str:
    for part in key.split("."):
        values = values[part]
    if isinstance(values, dict):
        return (
            f"{values['start']:g} to {values['end']:g}" if values.keys() == {"start", "end"} else ""
        )
    if values == "???":
        return "must be given"
    if values is None or isinstance(values, bool):
        return f"`{json.dumps(values)}`"
    text = f"{values:g}" if isinstance(values, float) else str(values).replace("'", "")
    return f"`{_cell(text)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def written(page: str) -> str:
    """The page with its tables as they should be."""
    return re.sub(
        f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{tables()}\n{END}", page, flags=re.DOTALL
    )


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

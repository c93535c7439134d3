"""Write the tables of keys into docs/configuration.md, from the schemas and the YAML files.

    uv run python scripts/list_keys.py

tests/test_docs.py fails while the page differs.
"""

import json
import re
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from vgan import cli, config

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "configuration.md"
BEGIN, END = "<!-- keys: written by scripts/list_keys.py -->", "<!-- end of keys -->"


def commands() -> dict[str, tuple[str, type]]:
    """Return every console script with the name of its YAML file and the schema of its keys."""
    return {name: (command.config_name, command.schema) for name, command in cli.COMMANDS.items()}


def tables() -> str:
    """Return a table for every YAML file: key, default value, explanation."""
    cli.register_schemas()
    programs: dict[str, list[str]] = {}
    for program, command in cli.COMMANDS.items():
        programs.setdefault(command.config_name, []).append(program)
    lines = []
    with initialize_config_dir(str(config.CONFIG_DIR), version_base="1.3"):
        for name, sharing in programs.items():
            values = OmegaConf.to_container(compose(name))
            lines += [f"### {' and '.join(sharing)}", ""]
            lines += ["| key | value | meaning |", "|---|---|---|"]
            for key, text in config.explained_keys(cli.COMMANDS[sharing[0]].schema):
                lines.append(f"| `{key}` | {_shown(values, key)} | {_cell(text)} |")
            lines.append("")
    return "\n".join(lines)


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
    """Return the page with up-to-date tables."""
    text = f"{BEGIN}\n\n{tables()}\n{END}"
    return re.sub(f"{BEGIN}.*{END}", lambda _: text, page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

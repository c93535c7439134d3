"""Write the tables of keys and of renamed keys into docs/configuration.md.

    uv run python scripts/list_keys.py

The keys come from the schemas and YAML files that the commands read. tests/test_docs.py fails while
the page says something else.
"""

import json
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from vgan import cli, schema
from vgan.runtime import renamed

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"


def key_tables() -> str:
    """Return a table for every schema: key, value without overrides, explanation."""
    cli.register_schemas()
    lines: list[str] = []
    programs: dict[str, list[str]] = {}
    for command in cli.COMMANDS.values():
        programs.setdefault(command.config_name, []).append(command.program)
    with initialize_config_dir(str(schema.CONFIG_DIR), version_base="1.3"):
        for name, twins in programs.items():
            values = OmegaConf.to_container(compose(name))
            lines += [
                f"### {' and '.join(twins)}",
                "",
                "| key | value | what it is |",
                "|---|---|---|",
            ]
            for key, text in schema.explained_keys(cli.COMMANDS[twins[0]].schema):
                lines.append(f"| `{key}` | {_shown(values, key)} | {_cell(text)} |")
            lines.append("")
    return "\n".join(lines)


def renamed_table() -> str:
    """Return a table of the keys, values and classes of earlier versions with today's names."""
    rows = list(renamed.KEYS.items())
    for key, values in renamed.VALUES.items():
        rows += [(f"{key}={old}", f"{key}={new}") for old, new in values.items()]
    rows += [(f"_target_={old}", f"_target_={new}") for old, new in renamed.TARGETS.items()]
    lines = ["| earlier | now |", "|---|---|"]
    lines += [f"| `{old}` | `{new}` |" for old, new in rows]
    return "\n".join([*lines, ""])


def _shown(values: Any, key: str) -> str:
    for part in key.split("."):
        values = values[part]
    if isinstance(values, dict):
        is_ramp = values.keys() == {"start", "end"}
        return f"{values['start']:g} to {values['end']:g}" if is_ramp else ""
    if values == "???":
        return "must be given"
    if values is None or isinstance(values, bool):
        return f"`{json.dumps(values)}`"
    text = f"{values:g}" if isinstance(values, float) else str(values).replace("'", "")
    return f"`{_cell(text)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def written(page: str) -> str:
    """Return the text of the page with today's tables."""
    for name, table in (("keys", key_tables()), ("renamed", renamed_table())):
        begin, end = f"<!-- {name}: written by scripts/list_keys.py -->", f"<!-- end of {name} -->"
        before, _, rest = page.partition(begin)
        after = rest.partition(end)[2]
        page = f"{before}{begin}\n\n{table}\n{end}{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

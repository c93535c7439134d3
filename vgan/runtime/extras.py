"""How to install an optional part of vgan."""

import sys
from pathlib import Path

_CLONE = Path(__file__).resolve().parents[2]  # for an installed wheel: site-packages


def install_extra(name: str) -> str:
    """Return the shell command that adds an extra of pyproject.toml to this installation.

    It is uv's in a clone with the environment that `uv run` makes, and pip's elsewhere. Quotes keep
    zsh from expanding the brackets; --inexact keeps uv from removing other extras.
    """
    if Path(sys.prefix).resolve() == _CLONE / ".venv":
        return f"uv sync --inexact --extra {name}"
    return f"pip install 'vgan[{name}]'"

"""Nested dicts."""

from typing import Any


def flatten(node: Any, name: str = "") -> dict[str, Any]:
    """Return nested dicts as one dict with dotted keys: {'a': {'b': 1}} becomes {'a.b': 1}.

    An empty dict is a value.
    """
    if not isinstance(node, dict) or not node:
        return {name: node}
    flat: dict[str, Any] = {}
    for key, child in node.items():
        flat |= flatten(child, f"{name}.{key}" if name else str(key))
    return flat

"""Nested dicts."""

from typing import Any


def flatten(node: Any, name: str = "") -> dict[str, Any]:
    """Return {'a.b': value} of nested dicts."""
    if not isinstance(node, dict):
        return {name: node}
    flat = {}
    for key, child in node.items():
        flat |= flatten(child, f"{name}.{key}" if name else str(key))
    return flat

"""Names of earlier versions and what they are called now.

Old names keep working for one release: in checkpoints, in configs and on the command line.
"""

from collections.abc import Mapping
from typing import Any

TARGETS = {
    "vgan.data.stream.Shards": "vgan.data.webdataset.Shards",
    "vgan.features.Inception": "vgan.evaluation.features.Inception",
    "vgan.features.Learned": "vgan.evaluation.features.ClassifierFeatures",
}
KEYS = {
    "size.pixel_block": "size.patch_size",
    "size.recompute": "size.gradient_checkpointing",
    "model.generator.pixel_block": "model.generator.patch_size",
    "model.generator.recompute": "model.generator.gradient_checkpointing",
    "model.discriminator.pixel_block": "model.discriminator.patch_size",
    "model.discriminator.recompute": "model.discriminator.gradient_checkpointing",
    "watchdog.tries": "watchdog.max_rollbacks",
    "watchdog.most_penalty": "watchdog.max_penalty",
    "watchdog.least_diversity": "watchdog.min_diversity",
}
VALUES = {
    "penalty": {
        "forward": "jvp",
        "exact": "double_backward",
        "difference": "finite_difference",
    },
    "show": {"pictures": "images"},
}
# Values in metrics.jsonl and in checkpoints.
METRICS = {
    "as_asked": "class_accuracy",
    "classes_seen": "classes_covered",
    "copies": "copy_rate",
}


def upgrade_override(word: str) -> str:
    """Return a command-line word KEY=VALUE with today's key and value."""
    name, equals, value = word.partition("=")
    bare = name.lstrip("+~")
    if not equals or (bare not in KEYS and bare not in VALUES and not bare.endswith("_target_")):
        return word
    key = name.replace(bare, KEYS.get(bare, bare))
    known = TARGETS if bare.endswith("_target_") else VALUES.get(bare, {})
    return f"{key}={','.join(known.get(v, v) for v in value.split(','))}"


def upgrade_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that an earlier version resolved, with today's keys, values and targets."""
    return _upgrade(config, "")


def _upgrade(node: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    upgraded: dict[str, Any] = {}
    for name, value in node.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            value = _upgrade(value, f"{path}.")
        elif name == "_target_":
            value = TARGETS.get(value, value)
        elif path in VALUES:
            value = VALUES[path].get(value, value)
        upgraded[KEYS.get(path, path).rpartition(".")[2]] = value
    return upgraded

"""Open the data set of a `data` config node."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vgan.data.packed import default_cache_dir, pack
from vgan.data.source import Dataset, Source
from vgan.data.webdataset import Shards
from vgan.runtime.errors import UserError
from vgan.runtime.instantiate import construct


def build_source(data: Mapping[str, Any]) -> Source:
    """Return the source of a `data` node, before it is packed."""
    source = construct({k: v for k, v in data.items() if k not in ("name", "cache_dir")}, "data")
    if not isinstance(source, Source):
        raise UserError(f"data._target_={data['_target_']}: must be a vgan.data.source.Source")
    return source


def cache_dir_of(data: Mapping[str, Any]) -> Path:
    """Return the folder with the packed images of a `data` node."""
    return Path(data["cache_dir"]).expanduser() if data.get("cache_dir") else default_cache_dir()


def build_dataset(data: Mapping[str, Any]) -> Dataset:
    """Return the packed data set of a `data` node. Packs it into the cache on first use."""
    source = build_source(data)
    dataset = pack(source, cache_dir_of(data))
    return replace(dataset, stream=source) if isinstance(source, Shards) else dataset

"""Image sets of the Hugging Face Hub, and folders of that layout, through the datasets library."""

import contextlib
import hashlib
import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec

from vgan.data.preprocess import MOST_BYTES, RULES, UNREADABLE, examine_file
from vgan.data.source import BadImage, Examined, Source, check_image_settings
from vgan.runtime.distributed import print0
from vgan.runtime.errors import UserError, first_line
from vgan.runtime.extras import install_extra

LARGE = 2_000_000_000  # bytes above which streaming=auto keeps no copy of the files
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubImages(Source):
    """The images of a data set on the Hugging Face Hub, or of a folder that `datasets` reads.

    Nothing is read before it is needed: a packed set opens without `datasets`, and without a
    network where the commit is known. `label_names` is set when the rows are opened, by `len`.

    Args:
        repo: user/set, or a local folder: parquet or image files in the layout of the Hub, or what
            `save_to_disk` has written. A folder of that name comes first.
        resolution: side of square images in px, or height and width.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        split: name of the split.
        subset: name of the subset, also called config; None where there is only one.
        revision: branch, tag or commit; None: the newest commit of the main branch.
        image: column of the images; None: the only one of type datasets.Image. A column of encoded
            files as bytes can be named too.
        label: column of type ClassLabel; None: the only one, or no labels; 'none': no labels.
        streaming: true reads the rows in their order and keeps only what is packed. false downloads
            all files into the cache of `datasets` first. auto streams local folders, which are
            read in place, and what is larger than LARGE.
        skip_bad: leave unreadable images out instead of stopping.
    """

    def __init__(
        self,
        repo: str,
        resolution: int | Sequence[int] = 64,
        channels: int = 3,
        split: str = "train",
        subset: str | None = None,
        revision: str | None = None,
        image: str | None = None,
        label: str | None = None,
        streaming: str | bool = "auto",
        skip_bad: bool = False,
    ) -> None:
        self.img_resolution = check_image_settings(resolution, channels)
        self.img_channels, self.skip_bad = channels, skip_bad
        self._split, self._subset, self._revision = split, subset, revision
        self._image, self._label = image, label
        self._columns: list[str] = []  # of images and labels, once they are known
        self._streaming = str(streaming).lower()
        if self._streaming not in ("auto", "true", "false"):
            raise UserError(f"data.streaming={streaming}: must be auto, true or false")
        self._repo, self.shown = repo, f"data.repo={repo}"
        folder = Path(repo).expanduser()
        self._folder = folder.absolute() if folder.is_dir() else None
        if self._folder is None and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
            fix = "give user/set as on huggingface.co/datasets, or a folder"
            raise UserError(f"{self.shown}: no such folder, and no name of the Hub; {fix}")
        if self._folder is not None and revision is not None:
            raise UserError(f"data.revision={revision}: a folder has no revisions; leave it out")
        name = repo.rstrip("/").rpartition("/")[2]
        self.name = re.sub(r"[^A-Za-z0-9]", "-", name)[:40] or "hf"

    def __len__(self) -> int:
        return len(self._rows)

    def examine(self, i: int) -> Examined:
        row = self._rows[i]
        name, content = f"image {i}", self._content(i, row[self._columns[0]])
        label = row[self._columns[1]] if self.label_names else 0
        if label is None or not 0 <= label < (len(self.label_names) or 1):
            raise BadImage(name, f"label {label}; data.label=none ignores labels")
        return examine_file(name, content, self.img_resolution, self.img_channels, label)

    def fingerprint(self) -> str:
        image = (self.img_resolution, self.img_channels, self.skip_bad)
        rows = (self._subset, self._split, self._image, self._label)
        return hashlib.sha256(repr((RULES, image, rows, self.version)).encode()).hexdigest()

    @cached_property
    def version(self) -> str:
        """The commit on the Hub, or a digest of the names, sizes and times of a folder's files."""
        if self._folder is None:
            with self.one_line_errors():
                return _find_commit(self._repo, self._revision)
        digest = hashlib.sha256()
        for path in sorted(self._folder.rglob("*")):
            name = path.relative_to(self._folder).as_posix()
            if path.is_file() and not f"/{name}".count("/."):
                status = path.stat()
                line = f"{name} {status.st_size} {status.st_mtime_ns}\n"
                digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()

    @property
    def is_remote(self) -> bool:
        """Whether `version` is a commit on the Hub."""
        return self._folder is None

    @cached_property
    def _rows(self) -> Any:
        """The rows by number, with the image column not decoded and the label column."""
        try:
            import datasets
        except ModuleNotFoundError as e:
            raise UserError(f"data=hf: needs datasets; {install_extra('hf')}") from e
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are one line of ours
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        with self.one_line_errors():
            rows, count = self._load()
            self._find_columns(rows.features or {})
            rows = rows.select_columns(self._columns)
            rows = rows.cast_column(self._columns[0], datasets.Image(decode=False))
        return rows if count is None else _Stream(self, rows, count)

    def _load(self) -> tuple[Any, int | None]:
        """Return the rows of the split, and their number if they are a stream."""
        import datasets

        if self._folder is not None:
            saved = [self._folder / name for name in ("dataset_dict.json", "state.json")]
            if any(path.is_file() for path in saved):
                return self._choose_split(datasets.load_from_disk(str(self._folder))), None
        builder = self._open_builder()
        files = builder.config.data_files
        self._choose_split(files)
        is_large = self._folder is not None or _bytes_of(builder) > LARGE
        if self._streaming == "true" or (self._streaming == "auto" and is_large):
            count = _count_rows(builder, self._split)
            if count is not None:
                if self._folder is None:
                    print0(f"{self.shown}: read as a stream; only the packed images are kept.")
                self.sequential = True
                return builder.as_streaming_dataset(split=self._split), count
            if self._streaming == "true":
                problem = f"{self._repo} does not state how many rows it has"
                raise UserError(f"data.streaming=true: {problem}; use data.streaming=false")
        if builder.info.features:  # before gigabytes are downloaded
            self._find_columns(builder.info.features)
        builder.download_and_prepare(verification_mode="no_checks")  # the digest tells them apart
        return builder.as_dataset(split=self._split), None

    def _open_builder(self) -> Any:
        import datasets

        where = str(self._folder or self._repo)
        revision = self.version if self._folder is None else None
        try:
            return datasets.load_dataset_builder(where, self._subset, revision=revision)
        except ValueError as e:
            names = datasets.get_dataset_config_names(where, revision=revision)
            if self._subset in names or (self._subset is None and len(names) < 2):
                raise
            problem = "no such subset" if self._subset else "has several subsets"
            raise UserError(
                f"data.subset={self._subset or 'null'}: {problem}; use one of {', '.join(names)}"
            ) from e

    def _choose_split(self, splits: Any) -> Any:
        """Return an item of a mapping of splits. A set that was saved without any is returned."""
        if not isinstance(splits, dict):
            return splits
        if self._split not in splits:
            known = ", ".join(map(str, splits))
            raise UserError(f"data.split={self._split}: no such split; use one of {known}")
        return splits[self._split]

    def _find_columns(self, features: dict[str, Any]) -> None:
        """Choose the columns of images and labels by their types, and set label_names."""
        import datasets

        known = ", ".join(features) or "none"
        images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        image, label = self._image, self._label
        if image is None and not images:
            fix = "name a column of encoded files as data.image, or use another set"
            raise UserError(f"{self.shown}: has no column of images; its columns: {known}; {fix}")
        if image is None and len(images) > 1:
            fix = f"choose one, as data.image={images[0]}"
            raise UserError(f"{self.shown}: has several image columns: {', '.join(images)}; {fix}")
        if image is not None and image not in images and not _holds_files(features.get(image)):
            problem = "is no column of images" if image in features else "no such column"
            fix = f"use one of {', '.join(images) or known}"
            raise UserError(f"data.image={image}: {problem}; {fix}")
        if label is None and len(labels) > 1:
            fix = f"choose one, as data.label={labels[0]}, or data.label=none"
            raise UserError(f"{self.shown}: has several label columns: {', '.join(labels)}; {fix}")
        if label not in (None, "none", *labels):
            problem = "is no column of type ClassLabel" if label in features else "no such column"
            fix = f"use {' or '.join([*labels, 'none'])}"
            raise UserError(f"data.label={label}: {problem}; {fix}")
        self._columns = [image or images[0]]
        if label != "none" and labels:
            self._columns.append(label or labels[0])
            self.label_names = tuple(features[self._columns[1]].names)

    def _content(self, i: int, cell: dict[str, Any] | None) -> bytes:
        """Return the encoded image of a cell, which holds its bytes or a path."""
        name, cell = f"image {i}", cell or {}
        content, path = cell.get("bytes"), cell.get("path") or ""
        if content is None and "://" in path:  # an error is the network's, not the image's
            with self.one_line_errors():
                content = _read(path)
        elif content is None and path:
            try:
                content = _read(path)
            except UNREADABLE as e:
                raise BadImage.of(name, e) from e
        if not content:
            raise BadImage(name, "empty")
        if len(content) > MOST_BYTES:
            raise BadImage(name, f"over {MOST_BYTES / 1e6:.0f} MB")
        return content

    @contextlib.contextmanager
    def one_line_errors(self) -> Iterator[None]:
        """Raise UserError for what the libraries raise inside the block."""
        try:
            yield
        except UserError:
            raise
        except _library_errors() as e:
            raise UserError(self._explain(e)) from e

    def _explain(self, e: BaseException) -> str:
        """Return the line for an error of the Hub, of `datasets` or of the files."""
        causes = [e]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
        refused = {getattr(getattr(c, "response", 0), "status_code", 0) for c in causes}
        login = "log in with hf auth login or HF_TOKEN"
        if "GatedRepoError" in kinds or "gated dataset" in str(e):
            page = f"https://huggingface.co/datasets/{self._repo}"
            return f"{self.shown}: is gated; ask for access at {page}, then {login}"
        if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"} or refused & {401, 403}:
            problem = "no such folder, and no such data set on the Hub, or a private one"
            return f"{self.shown}: {problem}; check the name, or {login}"
        if "RevisionNotFoundError" in kinds:
            fix = f"see https://huggingface.co/datasets/{self._repo}/commits/main"
            return f"data.revision={self._revision}: no such branch, tag or commit; {fix}"
        reason = first_line(causes[-1])
        if kinds & _NETWORK_ERRORS:
            fix = "check the network, then give the same command"
            return f"{self.shown}: the Hub cannot be reached ({reason}); {fix}"
        fix = "check that load_dataset of the datasets library reads it"
        return f"{self.shown}: cannot be read ({reason}); {fix}"


class _Stream:
    """Rows of an IterableDataset by number, for readers that ask for them nearly in order.

    Asking for a row that has passed starts the stream again. `examine` in several threads asks for
    each once and swaps neighbours; so rows that passed are kept until they are asked for.
    """

    def __init__(self, source: HubImages, rows: Any, count: int) -> None:
        self._source, self._rows, self._count = source, rows, count
        self._most_passed = 16 * (os.cpu_count() or 1)  # as many as `read_in_order` reads ahead
        self._passed: dict[int, Any] = {}
        self._next, self._iterator = 0, iter(rows)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> Any:
        with self._lock:
            if i < self._next and i not in self._passed:
                self._passed, self._next, self._iterator = {}, 0, iter(self._rows)
            while self._next <= i:
                row = self._advance()
                self._passed[self._next - 1] = row
                if len(self._passed) > self._most_passed:
                    del self._passed[next(iter(self._passed))]
            return self._passed.pop(i)

    def _advance(self) -> Any:
        """Return the next row. Raises UserError unless there are as many rows as were stated."""
        end = object()
        with self._source.one_line_errors():
            row = next(self._iterator, end)
            is_last = self._next == self._count - 1
            has_more = is_last and next(self._iterator, end) is not end
        if row is end or has_more:
            found = "more" if has_more else f"only {self._next:,}"
            problem = f"states {self._count:,} rows and has {found}"
            raise UserError(f"{self._source.shown}: {problem}; use data.streaming=false")
        self._next += 1
        return row


# Names of network errors of httpx, aiohttp and Python, whose releases differ in their modules.
_NETWORK_ERRORS = {"TransportError", "ConnectionError", "TimeoutError", "ClientError"}
_NETWORK_ERRORS |= {"FSTimeoutError", "LocalEntryNotFoundError"}


def _library_errors() -> tuple[type[BaseException], ...]:
    """Return the exceptions of the libraries that read a data set."""
    import pyarrow
    import yaml
    from huggingface_hub import errors

    http = getattr(errors, "HTTPError", OSError)  # of httpx, which are no OSErrors
    found = [*UNREADABLE, pyarrow.ArrowException, yaml.YAMLError, http]
    if "datasets" in sys.modules:
        found.append(sys.modules["datasets"].exceptions.DatasetsError)
    return tuple(found)


def _find_commit(repo: str, revision: str | None) -> str:
    """Return the commit that a revision means now; without a network, what it meant last."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    hub.logging.set_verbosity_error()  # it warns of each retry
    where: Any = {"repo_type": "dataset", "revision": revision}
    try:
        card = hub.hf_hub_download(repo, "README.md", **where)
        return Path(card).parent.name
    except errors.LocalEntryNotFoundError:
        raise
    except errors.EntryNotFoundError:  # it has no README.md
        return str(hub.HfApi().dataset_info(repo, revision=revision).sha)


def _bytes_of(builder: Any) -> int:
    """Return the size of all files of a subset, as its card or else the listing states it."""
    if builder.info.download_size:
        return int(builder.info.download_size)
    total = 0
    for urls in builder.config.data_files.values():
        for url in urls:
            files, path = fsspec.core.url_to_fs(url)
            total += files.size(path) or 0
    return total


def _count_rows(builder: Any, split: str) -> int | None:
    """Return the number of rows, from the card or the footers of parquet files; None if unknown."""
    from pyarrow import parquet

    stated = (builder.info.splits or {}).get(split)
    if stated is not None and stated.num_examples:
        return int(stated.num_examples)
    count = 0
    for url in builder.config.data_files[split]:
        if not url.endswith(".parquet"):
            return None
        with fsspec.open(url, "rb", block_size=1_000_000) as file:
            count += parquet.read_metadata(file).num_rows
    return count


def _holds_files(kind: Any) -> bool:
    """Return whether a column may hold encoded files: bytes, or a struct that has them."""
    if isinstance(kind, dict):
        return "bytes" in kind
    return getattr(kind, "dtype", None) in ("binary", "large_binary")


def _read(path: str) -> bytes:
    with fsspec.open(path, "rb") as file:
        content: bytes = file.read(MOST_BYTES + 1)
    return content

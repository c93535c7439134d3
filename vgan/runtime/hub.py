"""Models on the Hugging Face Hub: download to its cache, upload in one commit."""

import contextlib
import errno
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from safetensors import SafetensorError, safe_open

from vgan.runtime.errors import UserError, first_line

SCHEME = "hf://"
MODEL_FILE = "model.safetensors"  # what an address without a file means
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_ADDRESS = re.compile(rf"{SCHEME}({REPO.pattern})(?:@([^@/]+))?(?:/([^@]+))?/?", re.ASCII)
_FORMS = "hf://USER/MODEL, with @REVISION or /FILE.safetensors behind it"
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


class Address(NamedTuple):
    """A file on the Hub."""

    repo: str
    revision: str | None
    file: str


def is_address(ckpt: str | Path) -> bool:
    """Return whether a checkpoint is to be taken from the Hub."""
    return str(ckpt).startswith(SCHEME)


def parse_address(ckpt: str) -> Address:
    """Split hf://USER/MODEL[@REVISION][/FILE]. A revision with slashes is written with %2F.

    Raises UserError for another form, and for a file that is not named .safetensors.
    """
    match = _ADDRESS.fullmatch(ckpt)
    if match is None:
        raise UserError(f"ckpt={ckpt}: not an address of a model; give {_FORMS}")
    repo, revision, file = match.groups()
    file = file or MODEL_FILE
    if not file.endswith(".safetensors"):
        rule = "only .safetensors files are read from the Hub, which contain no code"
        raise UserError(f"ckpt={ckpt}: {rule}; give {_FORMS}")
    return Address(repo, revision and unquote(revision), file)


def download(ckpt: str) -> Path:
    """Return the path of the file that an address names, in the cache of huggingface_hub.

    What is not in the cache is downloaded, after a look at its header: files that vgan did not
    write are refused. Without a network a cached file is used. Raises UserError.
    """
    import huggingface_hub as hub  # slow to import
    from huggingface_hub import errors

    repo, revision, file = address = parse_address(ckpt)
    try:
        with _one_line_errors(f"ckpt={ckpt}", address):
            if not isinstance(hub.try_to_load_from_cache(repo, file, revision=revision), str):
                api = hub.HfApi()
                header = api.parse_safetensors_file_metadata(repo, file, revision=revision)
                _require_vgan(ckpt, header.metadata)
            path = Path(hub.hf_hub_download(repo, file, revision=revision))
        with safe_open(path, framework="pt") as opened:
            _require_vgan(ckpt, opened.metadata())
    except (errors.SafetensorsParsingError, SafetensorError) as e:
        raise _foreign(ckpt) from e
    return path


def _require_vgan(ckpt: str, metadata: Any) -> None:
    written_by = metadata.get("format") if isinstance(metadata, dict) else None
    if not str(written_by).startswith("vgan "):
        raise _foreign(ckpt)


def _foreign(ckpt: str) -> UserError:
    fix = "give a model that vgan-export to=hub uploaded, or a checkpoint"
    return UserError(f"ckpt={ckpt}: {parse_address(ckpt).file} is not a model of vgan; {fix}")


def check_upload(repo: str, private: bool) -> bool:
    """Return whether an upload will create the repo.

    Raises UserError without a login or a network, where the repo seems to hold the model of another
    library, and where it is public but `private` is wanted.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    api = hub.HfApi()
    with _one_line_errors(f"repo={repo}", Address(repo, None, MODEL_FILE)):
        api.whoami()
        try:
            info = api.model_info(repo)
        except errors.RepositoryNotFoundError:
            return True
    names = {entry.rfilename for entry in info.siblings or ()}
    if info.library_name != "vgan" and names & {MODEL_FILE, "config.json"}:
        rule = "its card does not say library_name: vgan, so that it may be another's model"
        raise UserError(f"repo={repo}: {rule}; give a new name")
    if private and not info.private:
        rule = "the repo exists and is public"
        raise UserError(f"private=true: {rule}; make it private on {_url(repo)}/settings first")
    return False


def upload(repo: str, private: bool, is_new: bool, files: Mapping[str, bytes], message: str) -> str:
    """Create the repo if needed, and add or replace files in one commit: all of them or none.

    is_new: the result of `check_upload`. Returns the address of the repo's page. Raises UserError
    if the Hub refuses or cannot be reached.
    """
    import huggingface_hub as hub

    api = hub.HfApi()
    visibility: dict[str, Any] = {"private": True} if private else {}  # else the Hub's default
    with _one_line_errors(f"repo={repo}", Address(repo, None, MODEL_FILE)):
        api.create_repo(repo, exist_ok=True, **visibility)
    left = "; the new repo is there and empty" if is_new else ""
    operations = [hub.CommitOperationAdd(name, content) for name, content in files.items()]
    with _one_line_errors(f"repo={repo}", Address(repo, None, MODEL_FILE), left):
        api.create_commit(repo, operations, commit_message=message)
    return _url(repo)


def _url(repo: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}"


@contextlib.contextmanager
def _one_line_errors(given: str, address: Address, left: str = "") -> Iterator[None]:
    """Turn what huggingface_hub raises into a UserError `given: problem; fix`.

    left: what an upload leaves behind.
    """
    try:
        yield
    except UserError:
        raise
    # RuntimeError is what hf_xet raises, ValueError stands for a card that the Hub refuses.
    except (OSError, _network_error(), RuntimeError, ValueError) as e:
        raise UserError(f"{given}: {_explain(e, address)}{left}") from e


def _network_error() -> type[Exception]:
    """Return the base class of the errors of httpx, which are no OSErrors."""
    from huggingface_hub import errors

    return getattr(errors, "HTTPError", OSError)


def _explain(e: Exception, address: Address) -> str:
    """Return the problem and its fix."""
    from huggingface_hub import errors

    repo, revision, _ = address
    status = getattr(getattr(e, "response", None), "status_code", None)
    detail = getattr(e, "server_message", None) or first_line(e)
    if isinstance(e, errors.LocalTokenNotFoundError):
        return f"an upload needs a login; {_LOGIN}"
    if isinstance(e, errors.GatedRepoError):
        return f"the model is gated; accept its terms on {_url(repo)} and {_LOGIN}"
    if isinstance(e, errors.RepositoryNotFoundError):
        return f"no such model on the Hub, or it is private; check the name, or {_LOGIN}"
    if isinstance(e, errors.RevisionNotFoundError):
        return f"the model has no revision {revision}; give a branch, a tag or a commit"
    if isinstance(e, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        return "the Hub cannot be reached, and the file is not in the cache; check the network"
    if isinstance(e, errors.EntryNotFoundError):
        return _missing_file(address)
    if status == 401:
        return f"the Hub does not accept the token; {_LOGIN}"
    if status == 403:
        return f"no permission ({detail:.200}); use a token that may write to {repo}"
    if status is not None:
        return f"the Hub answered with an error ({detail:.200}); try again later"
    if isinstance(e, OSError) and e.errno in _DISK:
        fix = "free space, or set HF_HOME to another folder"
        return f"cannot be stored in the cache ({e.strerror}); {fix}"
    if isinstance(e, ValueError):
        return f"the Hub does not accept this ({' '.join(str(e).split()):.200}); correct it"
    return f"the Hub cannot be reached ({first_line(e):.200}); check the network"


def _missing_file(address: Address) -> str:
    """Return the problem that a repo lacks a file, and which one to give instead."""
    import huggingface_hub as hub

    repo, revision, file = address
    try:
        info = hub.HfApi().model_info(repo, revision=revision)
    except (OSError, _network_error()):
        info = None
    names = sorted(entry.rfilename for entry in (info and info.siblings) or ())
    found = [name for name in names if name.endswith(".safetensors")]
    if not found:
        return f"the repo has no {file} and no other .safetensors file; give a model of vgan"
    at = f"@{quote(revision, safe='')}" if revision else ""
    return f"the repo has no {file}; give a file of it, such as {SCHEME}{repo}{at}/{found[0]}"

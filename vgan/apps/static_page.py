"""The page to play with a model as a folder of files, for any place that serves files, and for a double-click.

The browser runs the generator itself, with onnxruntime-web. A page that was opened from a disk may load scripts but fetch
nothing; so graphs and runtime are scripts too, that hold gzipped base64.
"""

import base64
import gzip
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from vgan.apps import page as play
from vgan.runtime.errors import UserError
from vgan.runtime.files import write_atomically

RUNTIME = "1.30.0"  # of onnxruntime-web
BATCH = 4  # pictures at once: between two batches the page answers
PAGE = ("index.html", "model.js", "runtime.js", "wasm.js")  # what makes a folder such a page
LICENSE = "runtime-LICENSE.txt"
# The files of the runtime and the digests of those of RUNTIME, for what is fetched
_FILES = {
    "ort.wasm.min.js": "faece07e84faa9001f5104bbe4e5c70861d06cb2376a0dea1fa0ad33a67adc81",
    "ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
_MIT = """onnxruntime-web (runtime.js and what wasm.js holds): MIT License

Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def check_out(out: Path) -> None:
    """Raise UserError for a place that such a page may not take: nothing but an older page is replaced."""
    if out.is_dir() and not out.is_symlink():
        names = {p.name for p in out.iterdir()}
        if names and not (set(PAGE) <= names <= {*PAGE, LICENSE}):
            raise UserError(f"out={out}: holds other files than such a page; give a new folder")
    elif out.exists() or out.is_symlink():
        raise UserError(f"out={out}: is not a folder; give a new one")


def write_page(out: Path, model: play.Model, graphs: dict[str, bytes], runtime: Path) -> int:
    """Write the page into folder `out`, whole or not at all, in place of an older one; returns its size in bytes.

    graphs: ONNX of 'latents' (numbers -> z) and 'generator' (z, c -> images, attention). runtime: from `find_runtime`.
    Raises UserError where it cannot be written.
    """
    check_out(out)
    script, module, machine_code = ((runtime / name).read_bytes() for name in _FILES)
    contents = {
        "index.html": play.render(model, "static", PAGE[1:]).encode(),
        "model.js": _packed("vganModel", graphs),
        "runtime.js": script,
        "wasm.js": _packed("vganRuntime", {"mjs": module, "wasm": machine_code}),
        LICENSE: _MIT.encode(),
    }
    beside, before = (out.with_name(f".{out.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    try:
        beside.mkdir(parents=True)
        for name, content in contents.items():
            (beside / name).write_bytes(content)
        if out.exists():  # no system replaces a folder that holds files in one step
            os.replace(out, before)
        os.replace(beside, out)
    except OSError as e:
        if before.exists() and not out.exists():
            os.replace(before, out)
        raise UserError(
            f"out={out}: cannot be written ({e.strerror}); free space or choose another folder"
        ) from e
    finally:
        for folder in (beside, before):
            shutil.rmtree(folder, ignore_errors=True)
    return sum(map(len, contents.values()))


def _packed(name: str, parts: dict[str, bytes]) -> bytes:
    """A script that keeps `parts` as an object of that name."""
    texts = ", ".join(
        f'{key}: "{base64.b64encode(gzip.compress(part, 9, mtime=0)).decode()}"'
        for key, part in parts.items()
    )
    return f"globalThis.{name} = {{ {texts} }};\n".encode()


def find_runtime(given: str | None, cache: Path) -> Path:
    """The folder that holds onnxruntime-web: the given one, or one in the cache, filled by npm the first time.

    Raises UserError where files are missing, and where npm is or has no network.
    """
    if given is not None:
        folder = Path(given).expanduser()
        missing = [name for name in _FILES if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"runtime={given}: has no {missing[0]}; give the folder dist of the npm package onnxruntime-web"
            )
        return folder
    folder = cache / f"onnxruntime-web-{RUNTIME}"
    if not all((folder / name).is_file() for name in _FILES):
        for name, content in _fetch().items():
            write_atomically(folder / name, content)
    return folder


def _fetch() -> dict[str, bytes]:
    """The files, by `npm pack`."""
    npm, fix = (
        shutil.which("npm"),
        f"give runtime=FOLDER, the folder dist of the npm package onnxruntime-web {RUNTIME}",
    )
    if npm is None:
        raise UserError(
            f"runtime=null: needs npm to fetch onnxruntime-web; install it (Node.js), or {fix}"
        )
    print(f"fetching onnxruntime-web {RUNTIME} by npm, once", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", "--silent", "--ignore-scripts", f"onnxruntime-web@{RUNTIME}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
        packed = next(Path(folder).glob("*.tgz"), None)
        if done.returncode or packed is None:
            why = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no file came"]
            raise UserError(f"runtime=null: npm could not fetch onnxruntime-web ({why[0]}); {fix}")
        files = {}
        try:
            with tarfile.open(packed) as archive:
                for name in _FILES:
                    member = archive.extractfile(f"package/dist/{name}")
                    files[name] = member.read() if member else b""
        except (tarfile.TarError, KeyError, OSError) as e:
            raise UserError(
                f"runtime=null: what npm fetched is no onnxruntime-web ({e}); {fix}"
            ) from e
    for name, content in files.items():
        if hashlib.sha256(content).hexdigest() != _FILES[name]:
            raise UserError(f"runtime=null: {name} is not that of onnxruntime-web {RUNTIME}; {fix}")
    return files

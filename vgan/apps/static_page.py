"""The command vgan-export, and its page that draws images in the browser (to=html).

The page is a folder of files for any web server, or to open from a disk. The browser computes the
images with onnxruntime-web in a Web Worker. A page from a disk may load scripts but fetch nothing.
Graphs, runtime and the worker's script are therefore texts in scripts, the large ones gzipped.
"""

import base64
import gzip
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import torch

from vgan.apps.page import PageInfo, page_info, render_page
from vgan.apps.templates import asset
from vgan.config import ExportConfig
from vgan.data.packed import default_cache_dir
from vgan.inference import export as files
from vgan.inference.load import find_model, load_model, restore_generator
from vgan.runtime.errors import UserError
from vgan.runtime.files import check_folder, write_atomically, write_folder

RUNTIME = "1.30.0"  # version of onnxruntime-web
BATCH = 4  # images at once; more take more of the browser's memory
PAGE = ("index.html", "model.js", "runtime.js", "wasm.js")  # the files of such a page
LICENSE = "runtime-LICENSE.txt"
# The files of the runtime, and their SHA-256 in version RUNTIME, for those that are downloaded.
_FILES = {
    "ort.wasm.min.js": "faece07e84faa9001f5104bbe4e5c70861d06cb2376a0dea1fa0ad33a67adc81",
    "ort-wasm-simd-threaded.mjs": (
        "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b"
    ),
    "ort-wasm-simd-threaded.wasm": (
        "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2"
    ),
}
_MIT = """onnxruntime-web (in runtime.js and wasm.js): MIT License

Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or
substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT
OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def export(cfg: ExportConfig) -> Path:
    """Write a page for to=html, or else the file of `vgan.inference.export`. Returns its path.

    The images are compared with torch's before anything is written. Raises UserError if they
    differ.
    """
    if cfg.to != "html":
        return files.export(cfg)
    out = Path(cfg.out or find_model(cfg.ckpt).stem).expanduser()
    check_out(out)
    title, _, state = load_model(cfg.ckpt)
    G = restore_generator(state, torch.device("cpu"))
    generator, attention = files.generator_onnx(G)
    run = files.onnx_run(generator)
    info = page_info(G, title, state, attention, BATCH, cfg.license)
    runtime = find_runtime(cfg.runtime, default_cache_dir())  # last, since it may download
    agreement = files.parity(G, files.FromLatent(G), "z", cfg.seed, run, cfg.to)
    graphs = {"latents": files.latents_onnx(G, cfg.seed), "generator": generator}
    size = write_page(out, info, graphs, runtime)
    print(f"{out / 'index.html'}  {size / 1e6:,.1f} MB in all, {agreement}")
    return out


def check_out(out: Path) -> None:
    """Raise UserError for a path that cannot be used: only an older page is replaced."""
    check_folder(out, "a page", PAGE, (LICENSE,))


def write_page(out: Path, info: PageInfo, graphs: dict[str, bytes], runtime: Path) -> int:
    """Write the page to folder `out`, completely or not at all. Returns its size in bytes.

    An older page is replaced. graphs: ONNX of 'latents' (numbers to z) and 'generator' (z, c to
    images, attention). runtime: from `find_runtime`. Raises UserError if it cannot be written.
    """
    check_out(out)
    script, module, wasm = ((runtime / name).read_bytes() for name in _FILES)
    worker = script.decode(errors="replace") + str(asset("play_worker.js"))
    contents = {
        "index.html": render_page(info, "static", PAGE[1:]).encode(),
        "model.js": _pack("vganModel", graphs),
        "runtime.js": f"globalThis.vganWorker = {json.dumps(worker)};\n".encode(),
        "wasm.js": _pack("vganRuntime", {"mjs": module, "wasm": wasm}),
        LICENSE: _MIT.encode(),
    }
    write_folder(out, contents)
    return sum(map(len, contents.values()))


def _pack(name: str, contents: dict[str, bytes]) -> bytes:
    """Return a script that defines a global object of texts: gzipped base64 of each content."""
    texts = []
    for key, content in contents.items():
        encoded = base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()
        texts.append(f'{key}: "{encoded}"')
    return f"globalThis.{name} = {{ {', '.join(texts)} }};\n".encode()


def find_runtime(given: str | None, cache: Path) -> Path:
    """Return a folder with onnxruntime-web: the given one, or one in the cache.

    npm downloads the files to the cache once. Raises UserError if files are missing, or npm is
    missing or fails.
    """
    if given is not None:
        folder = Path(given).expanduser()
        missing = [name for name in _FILES if not (folder / name).is_file()]
        if missing:
            fix = "give the folder dist of the npm package onnxruntime-web"
            raise UserError(f"runtime={given}: has no {missing[0]}; {fix}")
        return folder
    folder = cache / f"onnxruntime-web-{RUNTIME}"
    if not all((folder / name).is_file() for name in _FILES):
        for name, content in _download().items():
            write_atomically(folder / name, content)
    return folder


def _download() -> dict[str, bytes]:
    """Return the files of the runtime, from `npm pack`."""
    fix = f"give runtime=FOLDER, the folder dist of the npm package onnxruntime-web {RUNTIME}"
    npm = shutil.which("npm")
    if npm is None:
        problem = "needs npm to download onnxruntime-web; install it (Node.js)"
        raise UserError(f"runtime=null: {problem}, or {fix}")
    print(f"Downloading onnxruntime-web {RUNTIME} with npm, once", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", "--silent", "--ignore-scripts", f"onnxruntime-web@{RUNTIME}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
        archive = next(Path(folder).glob("*.tgz"), None)
        if done.returncode or archive is None:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no file"]
            problem = f"npm could not fetch onnxruntime-web ({lines[-1]})"
            raise UserError(f"runtime=null: {problem}; {fix}")
        try:
            contents = _extract(archive)
        except (tarfile.TarError, KeyError, OSError) as e:
            problem = f"what npm fetched is not onnxruntime-web ({e})"
            raise UserError(f"runtime=null: {problem}; {fix}") from e
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != _FILES[name]:
            problem = f"{name} is not that of onnxruntime-web {RUNTIME}"
            raise UserError(f"runtime=null: {problem}; {fix}")
    return contents


def _extract(path: Path) -> dict[str, bytes]:
    contents = {}
    with tarfile.open(path) as archive:
        for name in _FILES:
            member = archive.extractfile(f"package/dist/{name}")
            contents[name] = member.read() if member else b""
    return contents

"""The command vgan-demo: a page to draw images of a model, computed by this machine."""

import asyncio
import errno
import json
import os
import re
import socket
import threading
import webbrowser
from typing import TYPE_CHECKING

import numpy as np
import torch

from vgan.apps.page import PageInfo, page_info, render_page
from vgan.config import DemoConfig
from vgan.inference.attention_maps import finest_attention
from vgan.inference.latents import FromLatent, latents, render
from vgan.inference.load import drawing_precision, load_model, restore_generator
from vgan.models.generator import GeneratorBase
from vgan.runtime.device import autocast, pick_device, prepare_process
from vgan.runtime.errors import UserError, is_out_of_memory
from vgan.runtime.extras import install_extra
from vgan.runtime.images import to_uint8
from vgan.runtime.signals import was_interrupted

if TYPE_CHECKING:
    from starlette.applications import Starlette

MAX_IMAGES = 64  # of a request
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}
_BINARY = "application/octet-stream"


def demo(cfg: DemoConfig) -> None:
    """Serve the page until Ctrl-C. Raises UserError if it cannot be served."""
    try:
        import uvicorn
        from starlette import applications  # noqa: F401  (fail before the model is read)
    except ModuleNotFoundError as e:
        fix = install_extra("demo")
        raise UserError(f"needs starlette and uvicorn; {fix}") from e
    with _listen(cfg.host, cfg.port) as listening:
        device = pick_device(cfg.device)
        precision = drawing_precision(cfg.precision, device)
        prepare_process(device, precision, threads=0)
        title, path, state = load_model(cfg.ckpt)
        backend = PageBackend(restore_generator(state, device), cfg.seed, precision)
        info = page_info(backend.G, title, state, backend.attention, cfg.batch_size)
        app = application(backend, info, local=cfg.host in _LOOPBACK)
        host, port = listening.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"{url}  (stop with Ctrl-C)\n{path}", flush=True)
        if cfg.open:
            threading.Timer(0.5, webbrowser.open, [url]).start()
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=2)
        )
        try:
            server.run(sockets=[listening])
        except KeyboardInterrupt:  # uvicorn raises it again after its shutdown
            if not was_interrupted():
                raise
        print("vgan-demo: stopped")


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. A port in use is found before the model is read."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as e:
        fix = "use 127.0.0.1, or 0.0.0.0 for all networks"
        raise UserError(f"host={host}: no such address ({e.strerror}); {fix}") from e
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name != "nt":  # where the option would share the port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as e:
        listening.close()
        fix = "port=0 for any free one"
        if isinstance(e, PermissionError):
            problem = "not permitted; give one above 1023"
            raise UserError(f"port={port}: {problem}, or {fix}") from e
        if e.errno == errno.EADDRINUSE:
            raise UserError(f"port={port}: is in use; give another, or {fix}") from e
        problem = f"cannot listen there ({e.strerror})"
        raise UserError(f"host={host}: {problem}; use 127.0.0.1") from e
    return listening


class PageBackend:
    """Computes images for the page, one request at a time, from any thread.

    attention: (heads, h, w) of the attention that comes with images, or None without such a layer.
    """

    def __init__(self, G: GeneratorBase, seed: int, precision: str) -> None:
        self.G, self.seed, self.precision = G, seed, precision
        self.device = next(G.parameters()).device
        finest = finest_attention(G)
        self._layer = finest[0] if finest else None
        self.attention = finest[1] if finest else None
        self._lock = threading.Lock()

    def latents(self, numbers: list[int]) -> bytes:
        """Return z (N, z_dim) of image numbers as float32."""
        with self._lock:
            z = latents(self.G, torch.tensor(numbers), self.seed)[0]
            return z.cpu().numpy().astype("<f4").tobytes()

    def draw(self, values: np.ndarray, n: int, with_attention: bool) -> bytes:
        """Return pixels (n, C, H, W) uint8, and after them the attention if it is wanted.

        values: z (n, z_dim) and then c (n, label_dim), in one row. The attention of each position
        is (n, heads, h w, h w) uint8, with 255 for the maximum of each row.
        """
        z_dim, label_dim = self.G.z_dim, self.G.label_dim
        with self._lock:
            row = torch.from_numpy(values).to(self.device)
            z, c = row[: n * z_dim].view(n, z_dim), row[n * z_dim :].view(n, label_dim)
            if not (with_attention and self.attention):
                return render(self.G, z, c, self.precision).cpu().numpy().tobytes()
            program = FromLatent(self.G, self._layer)
            try:
                with torch.no_grad(), autocast(self.device, self.precision):
                    images, weights = program(z, c)
            finally:
                program.close()
            scaled = (weights / weights.amax(-1, keepdim=True) * 255).round().to(torch.uint8)
            return to_uint8(images).cpu().numpy().tobytes() + scaled.cpu().numpy().tobytes()


class BadRequest(ValueError):
    """A request that the page does not make. Its text is one line."""


def parse_numbers(body: bytes) -> list[int]:
    """Parse a JSON list of image numbers. Raises BadRequest for anything else."""
    try:
        numbers = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise BadRequest("numbers: must be a JSON list") from e
    if not (isinstance(numbers, list) and 0 < len(numbers) <= MAX_IMAGES):
        raise BadRequest(f"numbers: must be a list of 1 to {MAX_IMAGES}")
    if not all(type(number) is int and 0 <= number < 2**53 for number in numbers):
        raise BadRequest("numbers: must be integers from 0 to 2^53 - 1")
    return numbers


def parse_count(text: str) -> int:
    """Parse a number of images. Raises BadRequest for anything else."""
    n = int(text) if text.isascii() and text.isdigit() and len(text) < 4 else 0
    if not 1 <= n <= MAX_IMAGES:
        raise BadRequest(f"n={text[:20]}: must be from 1 to {MAX_IMAGES}")
    return n


def parse_values(body: bytes, n: int, per_image: int) -> np.ndarray:
    """Parse n * per_image finite float32. Raises BadRequest for anything else."""
    if len(body) != 4 * n * per_image:
        raise BadRequest(f"body: must have {4 * n * per_image} bytes for n={n}, has {len(body)}")
    values = np.frombuffer(body, "<f4").astype(np.float32)  # a copy: torch needs writable memory
    if not np.isfinite(values).all():
        raise BadRequest("body: every number must be finite")
    return values


def application(backend: PageBackend, info: PageInfo, local: bool) -> "Starlette":
    """Return the ASGI application.

    local: answer only requests to names of this machine. Another web site could let a name of its
    own resolve to 127.0.0.1 and read the answers; such a request carries that name.
    """
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route

    page = render_page(info, "server").encode()

    def check_origin(request: Request) -> None:
        host = request.headers.get("host", "")
        origin = request.headers.get("origin")
        if local and re.sub(r":\d+$", "", host).strip("[]") not in _LOOPBACK:
            raise BadRequest("Host: this vgan-demo answers to 127.0.0.1 and localhost only")
        if origin is not None and origin.partition("://")[2] != host:
            raise BadRequest("Origin: must be this page, not another site")

    async def read_body(request: Request, most: int) -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                raise BadRequest(f"body: must have at most {most} bytes")
        return bytes(body)

    async def show(request: Request) -> Response:
        check_origin(request)
        return Response(page, media_type="text/html", headers=_HEADERS)

    async def send_latents(request: Request) -> Response:
        check_origin(request)
        numbers = parse_numbers(await read_body(request, 24 * MAX_IMAGES))
        content = await asyncio.to_thread(backend.latents, numbers)
        return Response(content, media_type=_BINARY, headers=_HEADERS)

    async def send_images(request: Request) -> Response:
        check_origin(request)
        n = parse_count(request.query_params.get("n", ""))
        body = await read_body(request, 4 * n * info.values_per_image)
        values = parse_values(body, n, info.values_per_image)
        with_attention = request.query_params.get("attention") == "1"
        try:
            content = await asyncio.to_thread(backend.draw, values, n, with_attention)
        except (MemoryError, RuntimeError) as e:
            if not is_out_of_memory(e):
                raise
            fix = "show fewer images, or start vgan-demo with batch_size=1"
            return PlainTextResponse(f"out of memory; {fix}", 503, _HEADERS)
        return Response(content, media_type=_BINARY, headers=_HEADERS)

    async def refuse(_: Request, e: Exception) -> Response:
        return PlainTextResponse(str(e), 400, _HEADERS)

    routes = [
        Route("/", show),
        Route("/latents", send_latents, methods=["POST"]),
        Route("/draw", send_images, methods=["POST"]),
    ]
    handlers = {BadRequest: refuse, ClientDisconnect: refuse}
    return Starlette(routes=routes, exception_handlers=handlers)

"""vgan-demo's room: a page to play with a model, drawn by this machine."""

import asyncio
import errno
import json
import os
import re
import socket
import threading
import webbrowser
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from vgan.apps import page as play
from vgan.config import validate_demo
from vgan.inference.attention_maps import AttentionMap as Look
from vgan.inference.attention_maps import attention_maps as look
from vgan.inference.latents import latents, render
from vgan.inference.load import drawing_precision, restore_generator
from vgan.runs import checkpoint
from vgan.runtime.device import pick_device, prepare_process
from vgan.runtime.errors import UserError, is_out_of_memory
from vgan.runtime.signals import was_interrupted

MOST = 64  # pictures of a request
MOST_POSITIONS = 256  # of an attention layer whose map is sent: 16 x 16
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def demo(cfg: DictConfig) -> None:
    """Serve the page of `cfg` (a DemoConfig) until Ctrl-C. Raises UserError for what cannot be served."""
    validate_demo(cfg)
    try:
        import uvicorn
        from starlette import applications  # noqa: F401  (said before the model is read)
    except ModuleNotFoundError as e:
        raise UserError("vgan-demo: needs starlette and uvicorn; pip install vgan[demo]") from e
    listening = _listen(cfg.host, cfg.port)
    with listening:
        device = pick_device(cfg.device)
        precision = drawing_precision(cfg.precision, device)
        prepare_process(device, precision, threads=0)
        path, parts = checkpoint.load_newest(cfg.ckpt)
        artist = PageBackend(restore_generator(parts, device), cfg.seed, precision)
        model = play.describe(artist.G, path, parts, artist.attention, cfg.batch_size)
        app = application(artist, model, local=cfg.host in _LOOPBACK)
        host, port = listening.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"{url}  Ctrl-C ends it\n{path}", flush=True)
        if cfg.open:
            threading.Timer(0.5, webbrowser.open, [url]).start()
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=2)
        )
        try:
            server.run(sockets=[listening])
        except KeyboardInterrupt:  # raised again by uvicorn, when all is closed
            if not was_interrupted():
                raise
        print("vgan-demo: ended")


def _listen(host: str, port: int) -> socket.socket:
    """A socket that is bound already: whether the port is free is known before the model is read."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as e:
        raise UserError(
            f"host={host}: no such address ({e.strerror}); use 127.0.0.1, or 0.0.0.0 for all networks"
        ) from e
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name != "nt":  # where the option would share the port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as e:
        listening.close()
        if isinstance(e, PermissionError):
            raise UserError(
                f"port={port}: may not be used by you; give one above 1023, or port=0 for any free one"
            ) from e
        if e.errno == errno.EADDRINUSE:
            raise UserError(
                f"port={port}: is in use; give another, or port=0 for any free one"
            ) from e
        raise UserError(f"host={host}: cannot be listened on ({e.strerror}); use 127.0.0.1") from e
    return listening


class PageBackend:
    """Draws for the page: one request at a time, whatever thread asks."""

    def __init__(self, G: nn.Module, seed: int, precision: str) -> None:
        self.G, self.seed, self.precision = G, seed, precision
        self.device = next(G.parameters()).device
        self._lock = threading.Lock()
        self.attention: tuple[int, int, int] | None = None
        try:
            looks = look(G, *latents(G, torch.arange(1), seed), precision)[1]
        except UserError:  # without attention
            return
        if (finest := _finest(looks)) is not None:
            self.attention = (
                finest.weights.shape[1],
                finest.weights.shape[2],
                finest.weights.shape[3],
            )

    def latents(self, numbers: list[int]) -> bytes:
        """Numbers of pictures -> z (N, z_dim), as float32."""
        with self._lock:
            return (
                latents(self.G, torch.tensor(numbers), self.seed)[0]
                .cpu()
                .numpy()
                .astype("<f4")
                .tobytes()
            )

    def draw(self, values: np.ndarray, n: int, attend: bool) -> bytes:
        """Values, z (n, z_dim) then c (n, label_dim) in one row, -> pixels (n, C, H, W) uint8, then, with `attend`, where each
        position looks: (n, heads, h w, h w) uint8, each row in parts of its maximum."""
        with self._lock:
            z, c = (
                torch.from_numpy(values)
                .to(self.device)
                .split([n * int(self.G.z_dim), n * int(self.G.label_dim)])
            )  # type: ignore[arg-type]
            z, c = z.view(n, -1), c.view(n, int(self.G.label_dim))  # type: ignore[arg-type]
            if not (attend and self.attention):
                return render(self.G, z, c, self.precision).cpu().numpy().tobytes()
            pictures, looks = look(self.G, z, c, self.precision)
            return pictures.cpu().numpy().tobytes() + _to_bytes(_finest(looks).weights)  # type: ignore[union-attr]


def _finest(looks: list[Look]) -> Look | None:
    return next((one for one in reversed(looks) if one.effect[0].numel() <= MOST_POSITIONS), None)


def _to_bytes(weights: Tensor) -> bytes:
    """(N, heads, h, w, h, w) -> uint8, 255 at each row's maximum."""
    rows = weights.flatten(4)
    return (rows / rows.amax(-1, keepdim=True) * 255).round().to(torch.uint8).numpy().tobytes()


class BadRequest(ValueError):
    """What the page would not ask; its text is the one line of the answer."""


def parse_numbers(body: bytes) -> list[int]:
    """A JSON list of numbers of pictures; raises BadRequest for anything else."""
    try:
        numbers = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise BadRequest("numbers: must be a JSON list") from e
    if not (isinstance(numbers, list) and 0 < len(numbers) <= MOST):
        raise BadRequest(f"numbers: must be a list of 1 to {MOST}")
    if not all(type(number) is int and 0 <= number < 2**53 for number in numbers):
        raise BadRequest("numbers: must be whole, from 0 to 2^53 - 1")
    return numbers


def parse_values(body: bytes, n: int, each: int) -> np.ndarray:
    """n times `each` finite float32; raises BadRequest for anything else."""
    if len(body) != 4 * n * each:
        raise BadRequest(f"body: must have {4 * n * each} bytes for n={n}, has {len(body)}")
    values = np.frombuffer(body, "<f4").astype(
        np.float32
    )  # a copy: torch wants memory that may be written
    if not np.isfinite(values).all():
        raise BadRequest("body: every number must be finite")
    return values


def application(artist: PageBackend, model: play.Model, local: bool) -> Any:
    """The ASGI application. local: answer only to browsers that know this machine by its own names.

    Another web site could point a name of its own at 127.0.0.1 and so read the answers; such a request carries that name.
    """
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route

    page = play.render(model, "server").encode()
    headers = {
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Cache-Control": "no-store",
    }

    def checked(request: Request) -> None:
        host = re.sub(r":\d+$", "", request.headers.get("host", ""))
        if local and host.strip("[]") not in _LOOPBACK:
            raise BadRequest("Host: this vgan-demo answers to 127.0.0.1 and localhost only")
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
            raise BadRequest("Origin: another site's page may not ask")

    async def read(request: Request, most: int) -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise BadRequest(f"body: must have at most {most} bytes")
        return bytes(body)

    async def show(request: Request) -> Response:
        checked(request)
        return Response(page, media_type="text/html", headers=headers)

    async def send_latents(request: Request) -> Response:
        checked(request)
        numbers = parse_numbers(await read(request, 24 * MOST))
        return Response(
            await asyncio.to_thread(artist.latents, numbers),
            media_type="application/octet-stream",
            headers=headers,
        )

    async def send_pictures(request: Request) -> Response:
        checked(request)
        asked = request.query_params.get("n", "")
        n = int(asked) if asked.isascii() and asked.isdigit() and len(asked) < 4 else 0
        if not 1 <= n <= MOST:
            raise BadRequest(f"n={asked[:20]}: must be from 1 to {MOST}")
        values = parse_values(
            await read(request, 4 * n * model.values_a_picture()), n, model.values_a_picture()
        )
        try:
            drawn = await asyncio.to_thread(
                artist.draw, values, n, request.query_params.get("look") == "1"
            )
        except (MemoryError, RuntimeError) as e:
            if not is_out_of_memory(e):
                raise
            return PlainTextResponse(
                "out of memory; show fewer pictures, or start vgan-demo with batch_size=1",
                503,
                headers,
            )
        return Response(drawn, media_type="application/octet-stream", headers=headers)

    async def refuse(_: Request, e: Exception) -> Response:
        return PlainTextResponse(str(e), 400, headers)

    routes = [
        Route("/", show),
        Route("/latents", send_latents, methods=["POST"]),
        Route("/draw", send_pictures, methods=["POST"]),
    ]
    return Starlette(
        routes=routes, exception_handlers={BadRequest: refuse, ClientDisconnect: refuse}
    )

"""vgan-export's room: a trained generator in files that other programs read."""

import contextlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

import vgan
from vgan.apps import page as play
from vgan.apps import static_page
from vgan.config import validate_export
from vgan.data.packed import default_cache_dir
from vgan.evaluation.evaluate import read_records
from vgan.inference.load import latents, restore_generator, save_safetensors
from vgan.models.generator import GatedSelfAttention
from vgan.models.layers import AdaptiveAttention2d
from vgan.runs import checkpoint
from vgan.runtime.errors import UserError
from vgan.runtime.files import write_atomically
from vgan.runtime.rng import normal

ENDINGS = {"onnx": ".onnx", "safetensors": ".safetensors", "torchscript": ".ts", "pt2": ".pt2"}
TOLERANCE = 1e-3  # of pictures in [-1, 1]; a step of 8-bit colour is 0.0078
MOST_POSITIONS = 256  # of an attention layer whose map a page may ask for: 16 x 16


class FromLatent(nn.Module):
    """z (N, z_dim) and, with classes, c (N, label_dim) -> images (N, C, H, W); for a page also attention (N, heads, h w, h w)."""

    def __init__(self, G: nn.Module, attention: nn.Module | None = None) -> None:
        super().__init__()
        self.G = G
        self._looked: list[Tensor] = []
        self._hook = attention.register_forward_hook(self._look) if attention else None

    def _look(self, layer: Any, args: tuple[Tensor], _: Tensor) -> None:
        self._looked.append(layer.attention.weights(args[0]))

    def forward(self, z: Tensor, c: Tensor | None = None) -> Any:
        images = self.G(z, c if c is not None else z.new_zeros(z.shape[0], 0))
        return (images, self._looked.pop()) if self._hook else images

    def close(self) -> None:
        """Leave the generator as it was."""
        if self._hook:
            self._hook.remove()


class Latents(nn.Module):
    """Numbers (N,) int64 of the pictures of a seed -> their z (N, z_dim), as vgan-sample draws them."""

    def __init__(self, z_dim: int, seed: int) -> None:
        super().__init__()
        self.z_dim, self.seed = z_dim, seed

    def forward(self, numbers: Tensor) -> Tensor:
        return normal(self.seed, "sample", numbers, self.z_dim)


class FromNumbers(nn.Module):
    """Numbers (N,) int64 and, with classes, labels (N,) int64 -> images (N, C, H, W): those of vgan-sample seeds=..."""

    def __init__(self, G: nn.Module, seed: int) -> None:
        super().__init__()
        self.G, self.label_dim = G, int(G.label_dim)  # type: ignore[arg-type]
        self.latents = Latents(G.z_dim, seed)  # type: ignore[arg-type]

    def forward(self, numbers: Tensor, labels: Tensor | None = None) -> Tensor:
        z = self.latents(numbers)
        if labels is None:
            return self.G(z, z.new_zeros(z.shape[0], 0))
        # one-hot by comparison: every exporter knows it
        return self.G(
            z, (labels[:, None] == torch.arange(self.label_dim, device=labels.device)).float()
        )


def export(cfg: DictConfig) -> Path:
    """Write what `cfg` (an ExportConfig) asks for; nothing is left where it would not give torch's pictures."""
    validate_export(cfg)
    path, parts = checkpoint.load_newest(cfg.ckpt)
    G = restore_generator(parts, torch.device("cpu"))
    if cfg.to == "html":
        return _export_page(cfg, path, parts, G)
    out = Path(cfg.out).expanduser() if cfg.out else Path(path.stem + ENDINGS[cfg.to])
    if out.suffix.lower() != ENDINGS[cfg.to]:
        raise UserError(f"out={cfg.out}: must end in {ENDINGS[cfg.to]} for to={cfg.to}")
    if out.is_dir():
        raise UserError(f"out={out}: is a folder; give the name of a file in it")
    told = metadata(path, parts, cfg.license)
    if cfg.to == "safetensors":
        content = save_safetensors(G, told)
        told_parity = "the weights as they are"
    else:
        program = FromNumbers(G, cfg.seed) if cfg.input == "numbers" else FromLatent(G)
        content, run = _WRITERS[cfg.to](program.eval(), _inputs(G, cfg.input, 2, cfg.seed), told)
        told_parity = _parity(G, program, cfg.input, cfg.seed, run, cfg.to)
    write_atomically(out, content)
    print(f"{out}  {len(content) / 1e6:,.1f} MB, {told_parity}")
    return out


def _export_page(cfg: DictConfig, path: Path, parts: dict[str, Any], G: nn.Module) -> Path:
    out = Path(cfg.out or path.stem).expanduser()
    static_page.check_out(out)
    runtime = static_page.find_runtime(cfg.runtime, default_cache_dir())
    generator, attention = generator_onnx(G)
    told_parity = _parity(G, FromLatent(G), "z", cfg.seed, _onnx_run(generator), cfg.to)
    model = play.describe(G, path, parts, attention, static_page.BATCH, cfg.license)
    size = static_page.write_page(
        out, model, {"latents": latents_onnx(G, cfg.seed), "generator": generator}, runtime
    )
    print(f"{out / 'index.html'}  {size / 1e6:,.1f} MB in all, {told_parity}")
    return out


def metadata(path: Path, parts: dict[str, Any], license: str | None) -> dict[str, str]:
    """What travels with the weights, as text: all that makes the network, where it comes from, and its last metrics."""
    config = parts["config"]
    records = read_records(path.parent)
    told = {
        "format": "vgan generator",
        "vgan": vgan.__version__,
        "model": json.dumps(config["model"]["generator"]),
        "sizes": json.dumps(parts["sizes"]),
        "labels": json.dumps(list(parts["data"]["labels"])),
        "data": json.dumps({k: parts["data"][k] for k in ("name", "digest")}),
        "images_seen": str(parts["cur_nimg"]),
        "range": f"images in [-1, 1], black to white, {'RGB' if parts['sizes']['img_channels'] == 3 else 'grey'}; z ~ N(0, I)",
        "config": json.dumps(config),
        "license": license or "not stated",
    }
    fitting = [record for record in records if record.get("cur_nimg") == parts["cur_nimg"]]
    return told | ({"metrics": json.dumps(fitting[-1])} if fitting else {})


def _inputs(G: nn.Module, kind: str, n: int, seed: int) -> dict[str, Tensor]:
    """Example inputs of n pictures, by name."""
    index = 5 + torch.arange(n)
    z, c = latents(G, index, seed)
    if kind == "numbers":
        return {"numbers": index} | ({"labels": c.argmax(1)} if G.label_dim else {})
    return {"z": z} | ({"c": c} if G.label_dim else {})


Run = Callable[[dict[str, Tensor]], np.ndarray]


def _parity(G: nn.Module, program: nn.Module, kind: str, seed: int, run: Run, to: str) -> str:
    """Compare with torch for one picture and for more than were traced; raises UserError where they differ."""
    worst = 0.0
    for n in (1, 3):
        inputs = _inputs(G, kind, n, seed)
        with torch.no_grad():
            expected = program(*inputs.values()).numpy()
        got = run(inputs)
        if got.shape != expected.shape or not np.isfinite(got).all():
            raise UserError(
                f"to={to}: gives pictures of shape {got.shape} instead of {expected.shape}; use to=safetensors"
            )
        worst = max(worst, float(np.abs(got - expected).max()))
    if worst > TOLERANCE:
        raise UserError(
            f"to={to}: its pictures differ from torch's by {worst:.2g} of a range of 2; use to=safetensors"
        )
    return f"pictures within {worst:.1g} of torch's (range 2) for 1 and 3 at once"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters announce their own plans; what counts for the user is compared and printed here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _dynamic(inputs: dict[str, Tensor]) -> dict[str, Any]:
    batch = torch.export.Dim("batch", min=1, max=65536)
    return {name: {0: batch} for name in inputs}


def to_onnx(
    program: nn.Module, inputs: dict[str, Tensor], outputs: list[str], told: dict[str, str]
) -> bytes:
    """An ONNX graph with a dynamic batch. Raises UserError where the exporter is missing or cannot follow the network."""
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ModuleNotFoundError as e:
        raise UserError("to=onnx: needs onnx and onnxscript; pip install vgan[export]") from e
    try:
        with _quiet(), torch.no_grad():
            made = torch.onnx.export(
                program, tuple(inputs.values()), dynamo=True, input_names=list(inputs), output_names=outputs,
                dynamic_shapes=tuple(_dynamic(inputs).values()), verbose=False,
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as e:
        raise UserError(
            f"to=onnx: torch cannot export this network ({_first_line(e)}); use to=safetensors"
        ) from e
    assert made is not None
    model = made.model_proto
    for (
        node
    ) in model.graph.node:  # notes of where in the Python code each came from: half of a small file
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        value.ClearField("metadata_props")
    for name, text in told.items():
        model.metadata_props.add(key=name, value=text)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]


def _onnx(program: nn.Module, inputs: dict[str, Tensor], told: dict[str, str]) -> tuple[bytes, Run]:
    content = to_onnx(program, inputs, ["images"], told)
    return content, _onnx_run(content)


def _onnx_run(content: bytes) -> Run:
    """The first output of a graph, by onnxruntime."""
    try:
        import onnxruntime
    except ModuleNotFoundError as e:
        raise UserError(
            "to=onnx: needs onnxruntime, to compare the pictures; pip install vgan[export]"
        ) from e
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda given: session.run(None, {name: value.numpy() for name, value in given.items()})[
        0
    ]


def _pt2(program: nn.Module, inputs: dict[str, Tensor], told: dict[str, str]) -> tuple[bytes, Run]:
    with _quiet(), torch.no_grad():
        exported = torch.export.export(
            program, tuple(inputs.values()), dynamic_shapes=tuple(_dynamic(inputs).values())
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "x.pt2")
            torch.export.save(exported, path, extra_files=dict(told))
            content, read = path.read_bytes(), torch.export.load(path)
    module = read.module()
    return content, lambda given: module(*given.values()).detach().numpy()


def _torchscript(
    program: nn.Module, inputs: dict[str, Tensor], told: dict[str, str]
) -> tuple[bytes, Run]:
    buffer = io.BytesIO()
    with _quiet(), torch.no_grad():
        traced = torch.jit.trace(program, tuple(inputs.values()))
        torch.jit.save(traced, buffer, _extra_files={k: v.encode() for k, v in told.items()})  # type: ignore[no-untyped-call]
        read = torch.jit.load(io.BytesIO(buffer.getvalue()))  # type: ignore[no-untyped-call]
    return buffer.getvalue(), lambda given: read(*given.values()).detach().numpy()


_WRITERS = {"onnx": _onnx, "pt2": _pt2, "torchscript": _torchscript}


def latents_onnx(G: nn.Module, seed: int) -> bytes:
    """A graph from `numbers` (N,) int64 to `z` (N, z_dim) float32: the latents of vgan-sample's pictures."""
    return to_onnx(Latents(G.z_dim, seed).eval(), {"numbers": torch.arange(2)}, ["z"], {})  # type: ignore[arg-type]


def generator_onnx(
    G: nn.Module, attention: bool = True
) -> tuple[bytes, tuple[int, int, int] | None]:
    """A graph from `z` and, with classes, `c` to `images`, and (heads, h, w) of its second output, if it has one.

    That is `attention` (N, heads, h w, h w), where each position looks, of the finest attention layer up to 16 x 16 positions.
    """
    found: list[tuple[nn.Module, int, int]] = []
    inputs = _inputs(G, "z", 2, 0)
    if attention:
        layers = [
            m for m in G.modules() if isinstance(m, (GatedSelfAttention, AdaptiveAttention2d))
        ]
        hooks = [
            m.register_forward_hook(lambda m, args, _: found.append((m, *args[0].shape[2:])))
            for m in layers
        ]
        with torch.no_grad():
            G(*inputs.values())
        for hook in hooks:
            hook.remove()
        found = sorted((f for f in found if f[1] * f[2] <= MOST_POSITIONS), key=lambda f: f[1])
    program = FromLatent(G, found[-1][0] if found else None).eval()
    try:
        content = to_onnx(program, inputs, ["images", "attention"] if found else ["images"], {})
    finally:
        program.close()
    return content, (found[-1][0].attention.num_heads, *found[-1][1:]) if found else None  # type: ignore[union-attr, return-value]

"""The command vgan-export: a trained generator in formats that other programs read."""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vgan.config import ExportConfig
from vgan.inference.attention_maps import finest_attention
from vgan.inference.latents import FromLatent, FromNumbers, Latents, latents
from vgan.inference.load import (
    find_model,
    load_model,
    metadata,
    restore_generator,
    save_safetensors,
)
from vgan.models.generator import GeneratorBase
from vgan.runs import checkpoint
from vgan.runtime.errors import UserError
from vgan.runtime.extras import install_extra
from vgan.runtime.files import write_atomically

ENDINGS = {"onnx": ".onnx", "safetensors": ".safetensors", "torchscript": ".ts", "pt2": ".pt2"}
ENDINGS["checkpoint"] = ".safetensors"
TOLERANCE = 1e-3  # of images in [-1, 1]; a step of 8-bit colour is 0.0078

Inputs = dict[str, Tensor]
Metadata = Mapping[str, str]
Runner = Callable[[Inputs], np.ndarray]
Exported = tuple[bytes, Runner]  # the file, and a function that computes images with it


def export(cfg: ExportConfig) -> Path:
    """Write a generator, or its checkpoint in the newest format. Returns the path written.

    The output is compared with torch's before it is written. Raises UserError if it differs.
    """
    path = find_model(cfg.ckpt)
    out = _check_out(cfg, path)
    if cfg.to == "checkpoint":
        if not checkpoint.is_checkpoint(path):
            problem = "an exported generator has no discriminator and no optimizers"
            raise UserError(f"to=checkpoint: {problem}; give ckpt=CHECKPOINT")
        out.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.convert(path, out)
        print(f"{out}  {out.stat().st_size / 1e6:,.1f} MB, checkpoint format {checkpoint.FORMAT}")
        return out
    _, path, state = load_model(cfg.ckpt)
    G = restore_generator(state, torch.device("cpu"))
    if G.conditions and cfg.input == "numbers" and cfg.to != "safetensors":
        raise UserError("input=numbers: not for models with conditions; use input=z")
    information = metadata(path, state, cfg.license)
    if cfg.to == "safetensors":
        content, agreement = save_safetensors(G, information), "unchanged weights"
    else:
        program = FromNumbers(G, cfg.seed) if cfg.input == "numbers" else FromLatent(G)
        inputs = example_inputs(G, cfg.input, 2, cfg.seed)
        content, run = _EXPORTERS[cfg.to](program.eval(), inputs, information)
        agreement = parity(G, program, cfg.input, cfg.seed, run, cfg.to)
    write_atomically(out, content)
    print(f"{out}  {len(content) / 1e6:,.1f} MB, {agreement}")
    return out


def _check_out(cfg: ExportConfig, path: Path) -> Path:
    ending = ENDINGS[cfg.to]
    out = Path(cfg.out).expanduser() if cfg.out else Path(path.stem + ending)
    if out.suffix.lower() != ending:
        raise UserError(f"out={cfg.out}: must end in {ending} for to={cfg.to}")
    if out.is_dir():
        raise UserError(f"out={out}: is a folder; give the name of a file in it")
    if out.exists() and out.samefile(path) and cfg.to != "checkpoint":
        raise UserError(f"out={out}: is the checkpoint itself; give another name")
    return out


def example_inputs(G: GeneratorBase, kind: str, n: int, seed: int) -> Inputs:
    """Return inputs of n images by name: z and c, or with kind 'numbers' numbers and labels."""
    index = 5 + torch.arange(n)
    z, c = latents(G, index, seed)
    inputs = {"numbers": index} if kind == "numbers" else {"z": z}
    if G.label_dim and kind == "numbers":
        inputs["labels"] = c.argmax(1)
    elif G.label_dim:
        inputs["c"] = c
    return inputs


def parity(G: GeneratorBase, program: nn.Module, kind: str, seed: int, run: Runner, to: str) -> str:
    """Compare an export with torch at batch sizes 1 and 3. Raises UserError if it differs."""
    largest = 0.0
    for n in (1, 3):
        inputs = example_inputs(G, kind, n, seed)
        with torch.no_grad():
            expected = program(*inputs.values()).numpy()
        images = run(inputs)
        if images.shape != expected.shape or not np.isfinite(images).all():
            problem = f"gives images of shape {images.shape} instead of {expected.shape}"
            raise UserError(f"to={to}: {problem}; use to=safetensors")
        largest = max(largest, float(np.abs(images - expected).max()))
    if largest > TOLERANCE:
        problem = f"its images differ from torch's by {largest:.2g} of a range of 2"
        raise UserError(f"to={to}: {problem}; use to=safetensors")
    return f"images within {largest:.1g} of torch's (range 2) at batch sizes 1 and 3"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the messages of the exporters. What matters is checked and printed here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _dynamic_shapes(inputs: Inputs) -> tuple[dict[int, Any], ...]:
    batch = torch.export.Dim("batch", min=1, max=65536)
    return tuple({0: batch} for _ in inputs)


def to_onnx(program: nn.Module, inputs: Inputs, outputs: list[str], information: Metadata) -> bytes:
    """Return an ONNX graph with a dynamic batch size.

    Raises UserError if the exporter is missing or does not support the network.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ModuleNotFoundError as e:
        fix = install_extra("export")
        raise UserError(f"to=onnx and to=html: need onnx and onnxscript; {fix}") from e
    try:
        with _quiet(), torch.no_grad():
            exported = torch.onnx.export(
                program,
                tuple(inputs.values()),
                dynamo=True,
                input_names=list(inputs),
                output_names=outputs,
                dynamic_shapes=_dynamic_shapes(inputs),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        problem = f"torch cannot export this network ({reason})"
        raise UserError(f"to=onnx: {problem}; use to=safetensors") from e
    assert exported is not None
    model = exported.model_proto
    # Notes of each node's origin in the Python code would be half of a small file.
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        value.ClearField("metadata_props")
    for name, text in information.items():
        model.metadata_props.add(key=name, value=text)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def onnx_run(content: bytes) -> Runner:
    """Return a function that computes the first output of a graph with onnxruntime."""
    try:
        import onnxruntime
    except ModuleNotFoundError as e:
        rule = "need onnxruntime, to compare the images"
        raise UserError(f"to=onnx and to=html: {rule}; {install_extra('export')}") from e
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(inputs: Inputs) -> np.ndarray:
        return session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]

    return run


def _export_onnx(program: nn.Module, inputs: Inputs, information: Metadata) -> Exported:
    content = to_onnx(program, inputs, ["images"], information)
    return content, onnx_run(content)


def _export_pt2(program: nn.Module, inputs: Inputs, information: Metadata) -> Exported:
    shapes = _dynamic_shapes(inputs)
    with _quiet(), torch.no_grad():
        exported = torch.export.export(program, tuple(inputs.values()), dynamic_shapes=shapes)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "x.pt2")
            torch.export.save(exported, path, extra_files=dict(information))
            content, module = path.read_bytes(), torch.export.load(path).module()
    return content, lambda given: module(*given.values()).detach().numpy()


def _export_torchscript(program: nn.Module, inputs: Inputs, information: Metadata) -> Exported:
    buffer = io.BytesIO()
    extra = {name: text.encode() for name, text in information.items()}
    with _quiet(), torch.no_grad():
        traced = torch.jit.trace(program, tuple(inputs.values()))
        torch.jit.save(traced, buffer, _extra_files=extra)  # type: ignore[no-untyped-call]
        module = torch.jit.load(io.BytesIO(buffer.getvalue()))  # type: ignore[no-untyped-call]
    return buffer.getvalue(), lambda given: module(*given.values()).detach().numpy()


_EXPORTERS = {"onnx": _export_onnx, "pt2": _export_pt2, "torchscript": _export_torchscript}


def latents_onnx(G: GeneratorBase, seed: int) -> bytes:
    """Return a graph from `numbers` (N,) int64 to `z` (N, z_dim), the latents of vgan-sample."""
    return to_onnx(Latents(G.z_dim, seed).eval(), {"numbers": torch.arange(2)}, ["z"], {})


def generator_onnx(G: GeneratorBase) -> tuple[bytes, tuple[int, int, int] | None]:
    """Return a graph from `z` and, with classes, `c` to `images`, and (heads, h, w) or None.

    (heads, h, w) are the sizes of a second output `attention` (N, heads, h w, h w), from
    `finest_attention`.
    """
    finest = finest_attention(G)
    layer, shape = finest or (None, None)
    outputs = ["images", "attention"] if finest else ["images"]
    program = FromLatent(G, layer).eval()
    try:
        return to_onnx(program, example_inputs(G, "z", 2, 0), outputs, {}), shape
    finally:
        program.close()

"""vgan-export: files that give torch's pictures elsewhere, with all that makes them inside."""

import json
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import seams
import torch
from checkpoints import compose_as, make_checkpoint
from safetensors import safe_open

from vgan import load_generator
from vgan.config import ExportConfig
from vgan.inference.attention_maps import finest_attention
from vgan.inference.export import ENDINGS, FromLatent, export, generator_onnx, latents_onnx
from vgan.inference.latents import draw, latents
from vgan.runs import checkpoint
from vgan.runtime.errors import UserError
from vgan.runtime.images import to_uint8


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    overrides = ("model=adaptive", "size.attention_resolutions=[4,8]")
    return make_checkpoint(folder, *overrides, noise=0.05)


@pytest.fixture(scope="module")
def without_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return make_checkpoint(folder, "model=plain", labels=(), noise=0.05)


def run(ckpt: Path, *overrides: object) -> Path:
    return export(compose_as(ExportConfig, "export", f"ckpt={ckpt}", *overrides))


def test_onnx_runs_in_onnxruntime_for_any_batch(
    ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(ckpt, "to=onnx", f"out={tmp_path / 'g.onnx'}", "license=CC0-1.0")
    assert "of torch's" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape[1:]) for i in session.get_inputs()] == [("z", [64]), ("c", [8])]
    G = load_generator(ckpt, device="cpu")
    for n in (1, 7):
        z, c = latents(G, torch.arange(n), seed=3)
        (images,) = session.run(["images"], {"z": z.numpy(), "c": c.numpy()})
        assert np.abs(images - G(z, c).numpy()).max() < 1e-4
    told = {p.key: p.value for p in onnx.load(out).metadata_props}
    assert told["license"] == "CC0-1.0"
    assert json.loads(told["data"])["digest"] == checkpoint.load(ckpt)["data"]["digest"]
    assert json.loads(told["config"])["model"]["generator"]["attention"] == "adaptive"


def test_numbers_give_the_pictures_of_vgan_sample(ckpt: Path, tmp_path: Path) -> None:
    out = run(ckpt, "to=onnx", "input=numbers", "seed=5", f"out={tmp_path / 'g.onnx'}")
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    numbers, labels = np.array([0, 9, 2**40 + 1]), np.array([1, 0, 7])
    (images,) = session.run(None, {"numbers": numbers, "labels": labels})
    ours = draw(
        load_generator(ckpt, device="cpu"), torch.from_numpy(numbers), 5, torch.from_numpy(labels)
    )
    assert (to_uint8(torch.from_numpy(images)).int() - ours.int()).abs().max() <= 1


@pytest.mark.parametrize("to", ["onnx", "pt2", "torchscript", "safetensors"])
def test_every_kind_takes_a_model_without_classes(
    without_classes: Path, tmp_path: Path, to: str
) -> None:
    out = run(without_classes, f"to={to}", f"out={tmp_path / 'g'}{ENDINGS[to]}")
    G = load_generator(without_classes, device="cpu")
    z, c = latents(G, torch.arange(3), seed=1)
    expected = G(z, c)
    if to == "onnx":
        got = torch.from_numpy(
            onnxruntime.InferenceSession(str(out)).run(None, {"z": z.numpy()})[0]
        )
    elif to == "pt2":
        got = torch.export.load(out).module()(z)
    elif to == "torchscript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of TorchScript itself
            got = torch.jit.load(str(out))(z)
    else:
        got = load_generator(out, device="cpu")(z, None)
    assert torch.allclose(got, expected, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("to", ["pt2", "torchscript"])
def test_numbers_and_labels_in_torchs_own_kinds(ckpt: Path, tmp_path: Path, to: str) -> None:
    out = run(
        ckpt,
        f"to={to}",
        "input=numbers",
        "seed=5",
        f"out={tmp_path / 'g'}{ENDINGS[to]}",
    )
    numbers, labels = torch.tensor([0, 9, 2**40 + 1]), torch.tensor([1, 0, 7])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of TorchScript itself
        read = torch.jit.load(str(out)) if to == "torchscript" else torch.export.load(out).module()
        images = read(numbers, labels)
    ours = draw(load_generator(ckpt, device="cpu"), numbers, 5, labels)
    assert (to_uint8(images).int() - ours.int()).abs().max() <= 1


def test_safetensors_are_read_and_hold_what_makes_the_network(ckpt: Path, tmp_path: Path) -> None:
    out = run(ckpt, "to=safetensors", f"out={tmp_path / 'g.safetensors'}")
    ours, theirs = load_generator(ckpt, device="cpu"), load_generator(out, device="cpu")
    z, c = latents(ours, torch.arange(2), seed=0)
    assert torch.equal(ours(z, c), theirs(z, c))
    assert theirs.label_names == ours.label_names
    with safe_open(out, framework="pt") as file:
        assert file.metadata()["license"] == "not stated"
    content = out.read_bytes()
    for i, bad in enumerate(
        (content[:100], b"", content.replace(b"vgan.models.generator", b"os.path.expanduserrrr"))
    ):
        (tmp_path / f"{i}.safetensors").write_bytes(bad)
        with pytest.raises(UserError, match=r"intact|own classes only"):
            load_generator(tmp_path / f"{i}.safetensors", device="cpu")
    with pytest.raises(UserError, match="no such file or folder"):
        load_generator(tmp_path / "none.safetensors", device="cpu")


def test_a_checkpoint_is_written_in_the_newest_format(ckpt: Path, tmp_path: Path) -> None:
    out = run(ckpt, "to=checkpoint", f"out={tmp_path / 'new' / 'x.safetensors'}")
    state = checkpoint.load(out)
    assert checkpoint.digest(state) == checkpoint.digest(checkpoint.load(ckpt))
    assert run(out, "to=checkpoint", f"out={out}") == out
    assert checkpoint.digest(checkpoint.load(out)) == checkpoint.digest(state)
    with pytest.raises(UserError, match="is the checkpoint itself; give another name"):
        run(out, "to=safetensors", f"out={out}")


@pytest.mark.slow
def test_graphs_of_the_page(ckpt: Path, without_classes: Path) -> None:
    G = load_generator(ckpt, device="cpu")
    numbers = torch.tensor([3, 2**33])
    z, c = latents(G, numbers, seed=2)
    (got,) = onnxruntime.InferenceSession(latents_onnx(G, 2)).run(
        None, {"numbers": numbers.numpy()}
    )
    assert np.abs(got - z.numpy()).max() < 1e-5
    content, places = generator_onnx(G)
    assert places == (1, 8, 8)  # the finer of the two layers
    images, attention = onnxruntime.InferenceSession(content).run(
        ["images", "attention"], {"z": z.numpy(), "c": c.numpy()}
    )
    assert np.abs(images - G(z, c).numpy()).max() < 1e-4
    assert attention.shape == (2, 1, 64, 64)
    looked = FromLatent(G, G.stages[1][-1])(z, c)[1]  # type: ignore[index, union-attr]
    assert np.abs(attention - looked.numpy()).max() < 1e-4
    assert finest_attention(load_generator(without_classes, device="cpu")) is None


def test_what_differs_is_not_written(
    ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seams.set_export_tolerance(-1.0, monkeypatch)
    with pytest.raises(
        UserError, match=r"to=torchscript: its images differ from torch's by .*; use to=safetensors"
    ):
        run(ckpt, "to=torchscript", f"out={tmp_path / 'g.ts'}")
    assert not list(tmp_path.iterdir())


def test_an_operator_that_onnx_does_not_have_is_one_line(
    without_classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(self: FromLatent, z: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        return self.G(z + torch.linalg.eigvals(z.T @ z).real[0], c)

    seams.replace_exported_forward(unknown, monkeypatch)
    with pytest.raises(UserError, match="to=onnx: torch cannot export this network") as caught:
        run(without_classes, "to=onnx", f"out={tmp_path / 'g.onnx'}")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["to=coreml"], "to=coreml: must be one of onnx"),
        (["to=onnx", "out=x.pt"], "out=x.pt: must end in .onnx"),
        (["to=onnx", "input=seed"], "input=seed: must be one of z, numbers"),
    ],
)
def test_bad_input(
    ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=text):
        run(ckpt, *overrides)
    assert not list(tmp_path.iterdir())

"""Conditions: numbers that come with the images, from the file to samples."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from checkpoints import compose_as
from hydra import initialize_config_dir
from PIL import Image
from runs import train_in_process

from vgan import cli, load_generator
from vgan.apps.hub_export import export
from vgan.config import EvalConfig, ExportConfig, InvertConfig, SampleConfig
from vgan.data.conditions import EXAMPLES, Conditions
from vgan.data.folder import Folder
from vgan.data.loader import Loader
from vgan.data.packed import pack
from vgan.data.survey import survey
from vgan.evaluation.evaluate import evaluate
from vgan.inference.invert import invert
from vgan.inference.latents import draw, latents
from vgan.inference.sample import sample
from vgan.runs import checkpoint
from vgan.runtime.errors import UserError
from vgan.schema import CONFIG_DIR

CPU = torch.device("cpu")
TINY = [
    "data=folder", "data.resolution=16", "size=xs", "size.g_widths=[16,16,16]",
    "size.d_widths=[16,16,16]", "batch_size=16", "augment=none", "device=cpu",
    "compile=false", "gamma=schedule", "loss.gamma.start=0.1", "loss.gamma.end=0.1",
    "total_kimg=0.064", "checkpoint_kimg=0.064", "snapshot_kimg=10",
]  # fmt: skip


def write_set(folder: Path, count: int = 200) -> Path:
    """Images of one grey, whose brightness from 20 to 80 % is their condition, and noise."""
    rng = np.random.default_rng(0)
    brightness = rng.uniform(20, 80, count)
    pixels = np.full((count, 16, 16, 3), 2.55 * brightness[:, None, None, None])
    path = folder / "greys_images.npy"
    np.save(path, (pixels + rng.normal(0, 5, pixels.shape)).clip(0, 255).astype(np.uint8))
    np.save(folder / "greys_labels.npy", np.stack([brightness, rng.integers(0, 2, count)], 1))
    return path


@pytest.fixture(scope="module")
def greys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("greys"))


@pytest.fixture(scope="module")
def run_dir(greys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was hardly trained."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train_in_process(folder, *TINY, f"data.path={greys}", tiny=[])
    return folder


@pytest.mark.parametrize(
    ("values", "names", "first"),
    [
        (np.arange(40) / 10, ("0",), [0.0]),
        (np.arange(80, dtype=np.float16).reshape(40, 2), ("0", "1"), [0.0, 1.0]),
        (np.eye(2, dtype=bool)[np.arange(40) % 2], ("0", "1"), [1.0, 0.0]),
        (np.eye(2, dtype=np.int64)[np.arange(40) % 2], ("0", "1"), [1.0, 0.0]),
    ],
)
def test_numbers_beside_the_images_are_conditions(
    pictures_npy: Path, tmp_path: Path, values: np.ndarray, names: tuple[str, ...],
    first: list[float],
) -> None:  # fmt: skip
    np.save(tmp_path / "tiny_labels.npy", values)
    source = Folder(str(pictures_npy), 16)
    assert (source.condition_names, source.label_names) == (names, ())
    dataset = pack(source, tmp_path / "cache")
    assert dataset.conditions
    assert dataset.conditions.values[0].tolist() == first
    assert dataset.label_dim == len(names)
    c = dataset.c_table()
    assert c.shape == (40, len(names))
    assert c.mean(0).tolist() == pytest.approx([0] * len(names), abs=1e-6)
    assert c.std(0, correction=0).tolist() == pytest.approx([1] * len(names))
    assert survey(source).digest == dataset.digest
    np.save(tmp_path / "tiny_labels.npy", values[::-1])
    assert pack(Folder(str(pictures_npy), 16), tmp_path / "cache").digest != dataset.digest


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (np.arange(39) / 10, r"float64 \(39,\); must be .*with N = 40"),
        (np.full((40, 2), np.nan), "row 0, column 0 is not finite"),
        (np.full((40, 1), 1e300) * np.arange(40)[:, None], "over 10,000 standard deviations"),
        (np.where(np.arange(40)[:, None] > 0, [[1, 2]], [[1, 1]]), "column 0 is the same"),
        (np.stack([np.arange(40), np.ones(40)], 1), "column 1 is the same for all images"),
        (np.zeros((40, 0)), "0 columns; must be from 1 to 1,024"),
        (np.zeros((40, 2000)), "2,000 columns"),
        (np.zeros((40, 2, 2)), r"must be integers from 0 \(N,\)"),
        (np.full(40, "a"), r"must be integers from 0 \(N,\)"),
        (np.full((40, 2), 1j), r"must be integers from 0 \(N,\)"),
    ],
)
def test_bad_conditions_are_refused(
    pictures_npy: Path, tmp_path: Path, values: np.ndarray, says: str
) -> None:
    np.save(tmp_path / "tiny_labels.npy", values)
    with pytest.raises(UserError, match=rf"^data.labels=.*{says}") as caught:
        Folder(str(pictures_npy), 16)
    assert "\n" not in str(caught.value)


def test_large_numbers_keep_their_differences(pictures_npy: Path, tmp_path: Path) -> None:
    """Seconds of today, which float32 rounds to multiples of 128."""
    np.save(tmp_path / "tiny_labels.npy", 1.7e9 + np.arange(40.0))
    dataset = pack(Folder(str(pictures_npy), 16), tmp_path / "cache")
    steps = dataset.c_table().diff(dim=0)
    assert dataset.conditions
    assert steps.min().item() == pytest.approx(1 / dataset.conditions.std[0].item(), rel=1e-5)
    assert steps.max().item() == pytest.approx(steps.min().item(), rel=1e-5)


def test_classes_saved_as_floats_are_noticed(
    pictures_npy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "tiny_labels.npy", np.arange(40) % 4 / 1.0)
    Folder(str(pictures_npy), 16)
    assert "if they are classes, save integers (N,)" in capsys.readouterr().out


def test_skipped_images_take_their_conditions_with_them(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "images" / "1.png").write_text("no image")
    np.save(tmp_path / "numbers.npy", np.array([0.0, 10.0, 20.0, 30.0]))
    numbers = str(tmp_path / "numbers.npy")
    source = Folder(str(tmp_path / "images"), 16, labels=numbers, skip_bad=True)
    dataset = pack(source, tmp_path / "cache")
    assert dataset.images[:, 0, 0, 0].tolist() == [0, 2, 3]
    assert dataset.conditions
    assert dataset.conditions.values[:, 0].tolist() == [0, 20, 30]
    assert survey(source).digest == dataset.digest


@pytest.mark.parametrize("hold_on_device", [True, False])
def test_a_batch_has_the_conditions_of_its_images(greys: Path, hold_on_device: bool) -> None:
    dataset = pack(Folder(str(greys), 16), greys.parent / "cache")
    loader = Loader(dataset, 32, 0, CPU, hold_on_device=hold_on_device)
    real, c = loader.batch(320)
    loader.close()
    assert dataset.conditions
    brightness = 50 * (real.mean((1, 2, 3)) + 1)
    asked = c[:, 0] * dataset.conditions.std[0] + dataset.conditions.mean[0]
    assert (brightness - asked).abs().max() < 2


def test_the_generator_learns_what_is_asked(greys: Path, tmp_path: Path) -> None:
    """The brightness of samples follows the condition, in the units of the file."""
    words = [word for word in TINY if not word.startswith(("total_kimg", "checkpoint_kimg"))]
    words += ["total_kimg=3", "checkpoint_kimg=3", "size.lr=4e-3", "ema.halflife_kimg=0.5"]
    train_in_process(tmp_path / "run", *words, f"data.path={greys}", tiny=[])
    out = tmp_path / "samples.npy"
    asked = [30, 50, 70]
    condition = f"condition={[{0: value} for value in asked]}".replace(" ", "")
    run_sample(tmp_path / "run", condition, "n=60", f"out={out}")
    drawn = np.load(out).mean((1, 2, 3)).reshape(20, 3).mean(0) / 2.55
    assert np.abs(drawn - asked).max() < 8, drawn


def run_sample(ckpt: Path, *overrides: str) -> Path:
    return sample(compose_as(SampleConfig, "sample", f"ckpt={ckpt}", "device=cpu", *overrides))


def test_samples_without_a_condition_have_those_of_training_images(run_dir: Path) -> None:
    G = load_generator(run_dir)
    assert G.conditions
    assert G.conditions.names == ("0", "1")
    assert len(G.conditions.values) == 200  # all of them, as there are few
    c = latents(G, torch.tensor([0, 1, 200]), 0)[1]
    assert torch.equal(c, G.conditions.standardize(G.conditions.values[[0, 1, 0]]))
    many = Conditions.of(np.arange(5000.0)[:, None], ["x"]).state_dict()
    assert len(many["values"]) == EXAMPLES
    assert many["values"][[0, -1], 0].tolist() == [0, 4999]


def test_conditions_are_given_in_order_or_by_name(run_dir: Path, tmp_path: Path) -> None:
    G = load_generator(run_dir)
    assert G.conditions
    mean = G.conditions.mean
    assert G.conditions.parse([40, 1]).tolist() == [[40, 1]]
    assert G.conditions.parse([[40, 1], {1: 0.5}]).tolist() == [[40, 1], [mean[0].item(), 0.5]]
    single = Conditions.of(np.arange(5.0)[:, None], ["x"])
    for given in (3, [3], [[3]], {"x": 3}):
        assert single.parse(given).tolist() == [[3]]
    assert single.parse([3, 4]).tolist() == [[3], [4]]
    out = run_sample(run_dir, "condition=[[40,1],[60,0]]", "n=3", f"out={tmp_path / 'a.npy'}")
    c = G.conditions.standardize(torch.tensor([[40.0, 1], [60, 0], [40, 1]]))
    assert c.dtype == torch.float32
    expected = draw(G, torch.arange(3), 0, c).permute(0, 2, 3, 1)
    assert np.array_equal(np.load(out), expected.numpy())
    film = ["motion=classes", "condition=[[40,1],[60,0]]", "frames=2", "loop=false"]
    frames = run_sample(run_dir, *film, f"out={tmp_path / 'film.npy'}")
    assert np.array_equal(np.load(frames)[0], np.load(out)[0])
    assert len(np.load(frames)) == 3


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["condition=[1]"], r"condition=\[1\]: has 1 numbers; give 2 in order, or some by name"),
        (["condition=[]"], "condition=.*has 0 numbers"),
        (["condition=[[1,2],[1]]"], r"condition=\[1\]: has 1 numbers"),
        (["condition=[1,cat]"], "condition=.*: cat is not a number"),
        (["condition='[1,2]'"], "is not a number"),
        (["condition=[1,1e99]"], "over 10,000 standard deviations .*2: 0 20.* to 7.*stay near"),
        (["condition=[1,nan]"], "must be finite"),
        (["condition={size:1}"], "size is unknown; use some of 0, 1"),
        (["condition={0:[1]}"], "is not a number"),
        (["label=1"], "label=1: this model was trained with conditions; use condition="),
        (
            ["motion=classes", "out=a.gif"],
            "motion=classes: needs a model with classes, and .* or conditions",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(run_dir: Path, overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        run_sample(run_dir, *overrides)
    assert "\n" not in str(caught.value)


def test_models_without_conditions_take_none(tmp_path: Path, greys: Path) -> None:
    train_in_process(tmp_path, *TINY, f"data.path={greys}", "data.labels=none", tiny=[])
    with pytest.raises(UserError, match="condition=3: this model was trained without conditions"):
        run_sample(tmp_path, "condition=3")


def test_exports_keep_the_conditions(run_dir: Path, tmp_path: Path) -> None:
    def write(*overrides: str) -> Path:
        cfg = compose_as(ExportConfig, "export", f"ckpt={run_dir}", *overrides)
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            return Path(export(cfg, cli.compose_train))

    G = load_generator(run_dir)
    again = load_generator(write("to=safetensors", f"out={tmp_path / 'g.safetensors'}"))
    assert G.conditions
    assert again.conditions
    for name in ("values", "mean", "std"):
        assert torch.equal(getattr(again.conditions, name), getattr(G.conditions, name))
    onnx = write("to=onnx", f"out={tmp_path / 'g.onnx'}")
    z, c = latents(G, torch.arange(3), 0)
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    images = session.run(None, {"z": z.numpy(), "c": c.numpy()})[0]
    assert np.abs(images - G(z, c).numpy()).max() < 1e-4
    repo = write("to=hub", "repo=me/greys", f"out={tmp_path / 'repo'}")
    assert "| conditions | 2: 0, 1 |" in (repo / "README.md").read_text()
    with pytest.raises(UserError, match="input=numbers: not for models with conditions"):
        write("to=onnx", "input=numbers", f"out={tmp_path / 'n.onnx'}")
    with pytest.raises(UserError, match="no controls for its conditions"):
        write("to=html", f"out={tmp_path / 'page'}", "runtime=nowhere")
    assert not (tmp_path / "page").exists()


def test_a_damaged_scale_is_refused(run_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / checkpoint.find(run_dir).name
    changes = {"std": torch.tensor([1, 1e-45]), "mean": torch.zeros(3), "names": ["0"]}
    for key, value in [*changes.items(), ("labels", ["a", "b"])]:
        state = checkpoint.load(checkpoint.find(run_dir))
        data = state["data"]
        (data["conditions"] if key in changes else data)[key] = value
        checkpoint.save(path, state, keep=1)
        with pytest.raises(UserError, match="use an intact checkpoint"):
            load_generator(path)


def test_evaluation_asks_for_the_conditions_of_the_data(
    run_dir: Path, greys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scaled as in training, also where the data are others."""
    words = [f"ckpt={run_dir}", "features=learned", "features.train_kimg=0.1", "n=200"]
    words += ["device=cpu", "metrics=[fid,diversity]", "batch_size=200"]
    asked: list[torch.Tensor] = []

    def note(G: Any, index: Any, seed: int, label: torch.Tensor, **_: Any) -> torch.Tensor:
        asked.append(label)
        return draw(G, index, seed, label)

    monkeypatch.setattr("vgan.evaluation.evaluator.draw", note)
    (result,) = evaluate(compose_as(EvalConfig, "eval", *words))
    values = result.values
    assert "diversity" in values
    assert "diversity_least" not in values
    assert result.protocol["labels"] == "in the data's proportions"
    numbers = np.load(greys.with_name("greys_labels.npy"))
    np.save(tmp_path / "x_images.npy", np.load(greys))
    np.save(tmp_path / "x_labels.npy", numbers + 10)
    evaluate(compose_as(EvalConfig, "eval", *words, f"data.path={tmp_path / 'x_images.npy'}"))
    before, after = (np.sort(x.numpy(), axis=0) for x in asked)
    assert np.abs(before + 10 / numbers.std(0) - after).max() < 1e-4
    np.save(tmp_path / "x_labels.npy", np.arange(200) % 2)
    with pytest.raises(UserError, match="has conditions 0, 1, the data has 2 classes"):
        evaluate(compose_as(EvalConfig, "eval", *words, f"data.path={tmp_path / 'x_images.npy'}"))


def test_another_run_begins_from_the_embeddings(
    run_dir: Path, greys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"data.path={greys}", f"init={run_dir}", "size.lr=1e-12", "size.lr_end=1e-12"]
    train_in_process(tmp_path / "new", *TINY, *words, tiny=[])
    assert "2 of 2 classes or conditions known by name" in capsys.readouterr().out
    old, new = (checkpoint.load(checkpoint.find(x)) for x in (run_dir, tmp_path / "new"))
    for was, now, key in (("G_ema", "G", "input.embed.weight"), ("D", "D", "embed.weight")):
        assert torch.allclose(old[was][key], new[now][key], atol=1e-6)


def test_a_photo_is_found_with_the_conditions_of_examples(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (16, 16), "grey").save(tmp_path / "photo.png")
    words = [f"ckpt={run_dir}", f"image={tmp_path / 'photo.png'}", f"out={tmp_path / 'z.npy'}"]
    invert(compose_as(InvertConfig, "invert", *words, "draws=8", "starts=2", "steps=2"))
    assert "class" not in capsys.readouterr().out
    G = load_generator(run_dir)
    assert np.load(tmp_path / "z.npy").shape == (1, G.z_dim + 2)
    run_sample(run_dir, f"latent={tmp_path / 'z.npy'}", f"out={tmp_path / 'a.png'}")

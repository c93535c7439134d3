"""vgan-invert, latents from files, and directions of the latent space."""

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import compose_as, make_checkpoint
from PIL import Image

from vgan import load_generator
from vgan.config import InvertConfig, SampleConfig
from vgan.data.preprocess import prepare_image
from vgan.inference.directions import components, move
from vgan.inference.invert import PhotoDistance, invert, psnr
from vgan.inference.latents import latents, render
from vgan.inference.load import load_discriminator
from vgan.inference.sample import sample
from vgan.models.generator import GeneratorBase
from vgan.runtime.errors import UserError

QUICK = ("draws=64", "starts=2", "steps=60", "zoom=1", "device=cpu")


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 16 px with 8 classes, in which z changes every stage."""
    folder = tmp_path_factory.mktemp("model")
    return make_checkpoint(folder, "size.modulation=true", noise=0.1)


@pytest.fixture(scope="module")
def G(ckpt: Path) -> GeneratorBase:
    return load_generator(ckpt, device="cpu")


@pytest.fixture(scope="module")
def own(ckpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image that the model drew, which is none of the first draws of the search."""
    out = tmp_path_factory.mktemp("own") / "own.png"
    return run_sample(ckpt, "seeds=900", "label=star", "zoom=1", f"out={out}")


@pytest.fixture(scope="module")
def found(ckpt: Path, own: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The latent of `own`, with picture and film beside it."""
    out = tmp_path_factory.mktemp("found") / "found.npy"
    film = out.with_suffix(".webp")
    return run_invert(ckpt, own, "label=star", f"out={out}", f"animation={film}", "fps=5")


def run_sample(ckpt: Path, *overrides: object) -> Path:
    return sample(compose_as(SampleConfig, "sample", f"ckpt={ckpt}", "device=cpu", *overrides))


def run_invert(ckpt: Path, image: Path | str, *overrides: object) -> Path:
    words = (f"ckpt={ckpt}", f"image={image}", *QUICK, *overrides)
    return invert(compose_as(InvertConfig, "invert", *words))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def as_array(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


def closeness(picture: np.ndarray) -> float:
    """Return the PSNR between the halves of a picture."""
    left, right = np.split(picture.copy(), 2, axis=1)
    return psnr(torch.from_numpy(left), torch.from_numpy(right))


# --- vgan-invert ---


def test_an_image_of_the_model_is_recovered(G: GeneratorBase, own: Path, found: Path) -> None:
    picture = pixels(found.with_suffix(".png"))
    assert np.array_equal(picture[:, :16], pixels(own))
    assert closeness(picture) > 30
    row = np.load(found)
    assert row.shape == (1, G.z_dim + 8)
    assert row.dtype == np.float32
    assert row[0, G.z_dim :].tolist() == [float(name == "star") for name in G.label_names]
    assert 0.7 < np.linalg.norm(row[0, : G.z_dim]) / G.z_dim**0.5 < 1.3


def test_the_film_leads_from_the_best_draw_to_the_result(own: Path, found: Path) -> None:
    with Image.open(found.with_suffix(".webp")) as film:
        frames = []
        for i in range(film.n_frames):  # type: ignore[attr-defined]
            film.seek(i)
            frames.append(np.asarray(film.convert("RGB")))
    assert all(np.array_equal(frame[:, :16], pixels(own)) for frame in frames)
    assert np.array_equal(frames[-1], pixels(found.with_suffix(".png")))
    assert closeness(frames[-1]) > closeness(frames[0]) + 10


def test_a_search_repeats_byte_for_byte(ckpt: Path, own: Path, tmp_path: Path) -> None:
    first, again = (run_invert(ckpt, own, "steps=3", f"out={tmp_path / name}.npy") for name in "ab")
    assert first.read_bytes() == again.read_bytes()


def test_the_class_is_chosen_among_all(G: GeneratorBase, ckpt: Path, tmp_path: Path) -> None:
    """One of the draws is the photo itself, and with it its class is found."""
    photo = run_sample(ckpt, "seeds=13", "zoom=1", f"out={tmp_path / 'photo.png'}")
    row = np.load(run_invert(ckpt, photo, "steps=1", "lr=1e-9", f"out={tmp_path / 'x.npy'}"))
    assert row[0, G.z_dim :].argmax() == 13 % 8
    assert np.allclose(row[0, : G.z_dim], latents(G, torch.tensor([13]), 0)[0], atol=1e-6)


def test_the_result_is_never_further_than_the_best_draw(
    ckpt: Path, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_invert(ckpt, own, "steps=2", "lr=1000", f"out={tmp_path / 'x.npy'}")
    _, distance, start = capsys.readouterr().out.split("distance ")
    assert distance.split(",")[0] == start.split(",")[0]


def test_the_prior_keeps_z_typical(ckpt: Path, tmp_path: Path, G: GeneratorBase) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    norms = []
    for prior in (0, 100):
        out = run_invert(
            ckpt, tmp_path / "noise.png", "lr=0.5", f"prior={prior}", f"out={tmp_path / 'x.npy'}"
        )
        norms.append(np.linalg.norm(np.load(out)[0, : G.z_dim]) / G.z_dim**0.5)
    assert abs(norms[1] - 1) < 0.1
    assert abs(norms[1] - 1) < abs(norms[0] - 1)


def test_a_photo_is_prepared_as_in_training(ckpt: Path, tmp_path: Path) -> None:
    photo = Image.new("RGBA", (90, 50), (200, 30, 30, 128))
    photo.paste((0, 90, 200, 255), (0, 0, 40, 25))
    photo.save(tmp_path / "photo.png")
    run_invert(ckpt, tmp_path / "photo.png", "steps=1", f"out={tmp_path / 'x.npy'}")
    expected = prepare_image(photo, 16, 3)
    assert np.array_equal(pixels(tmp_path / "x.png")[:, :16], expected)


def test_the_distance_is_0_for_the_photo_and_sees_structure(ckpt: Path, G: GeneratorBase) -> None:
    z, c = latents(G, torch.arange(2), seed=0)
    images = G(z, c)
    distance = PhotoDistance(images[:1], load_discriminator(ckpt, device="cpu"))
    same, other = distance(images).tolist()
    assert same < 1e-5 < 0.01 < other
    flipped = distance(images[:1].flip(3)).item()
    assert flipped > 0.01  # the same colours in other places


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["image=no.png"], "image=no.png: cannot be read"),
        (["image=."], "image=.: cannot be read"),
        (["image=text.png"], r"image=text.png \(not an image\): cannot be used"),
        (["label=dog"], "label=dog: unknown; use one of 0 circle"),
        (["label=8"], "label=8: unknown"),
        (["out=x.png"], r"out=x.png: must end in \.npy"),
        (["out=folder.npy"], "out=folder.npy: is a folder"),
        (["out=mine.npy"], "out's picture=mine.png: is the photo itself"),
        (["image=mine.gif", "out=x.npy", "animation=mine.gif"], "animation=mine.gif: is the photo"),
        (["animation=x.bmp"], r"animation=x.bmp: must end in \.gif, \.webp or \.mp4, or null"),
        (["animation=x.webp", "zoom=600"], "animation=x.webp: frames of 19200 x 9600 px"),
        (["steps=0"], "steps=0: must be above 0"),
        (["starts=0"], "starts=0: must be above 0"),
        (["ckpt=nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(
    ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16)).save("mine.png")
    Image.new("RGB", (16, 16)).save("mine.gif")
    Path("text.png").write_text("no image")
    Path("folder.npy").mkdir()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=text) as caught:
        run_invert(ckpt, "mine.png", *overrides)
    assert "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


# --- vgan-sample latent=FILE ---


def test_a_latent_draws_the_image_that_was_found(ckpt: Path, found: Path, tmp_path: Path) -> None:
    drawn = run_sample(ckpt, f"latent={found}", "zoom=1", f"out={tmp_path / 'x.png'}")
    assert np.array_equal(pixels(drawn), pixels(found.with_suffix(".png"))[:, 16:])


def test_latents_with_and_without_classes(G: GeneratorBase, ckpt: Path, tmp_path: Path) -> None:
    z, c = latents(G, torch.tensor([4, 11, 30]), seed=5)
    expected = as_array(render(G, z, c))
    np.save(tmp_path / "zc.npy", torch.cat([z, c], 1).numpy())
    np.save(tmp_path / "z.npy", z.double().numpy())
    out = f"out={tmp_path / 'x.npy'}"
    drawn = np.load(run_sample(ckpt, f"latent={tmp_path / 'zc.npy'}", "batch_size=2", out))
    assert np.array_equal(drawn, expected)
    labelled = ("label=[4,3,6]", f"latent={tmp_path / 'z.npy'}", out)
    assert np.array_equal(np.load(run_sample(ckpt, *labelled)), expected)
    other = np.load(run_sample(ckpt, "label=7", f"latent={tmp_path / 'zc.npy'}", out))
    assert np.array_equal(other, as_array(render(G, z, torch.eye(8)[[7, 7, 7]])))
    calm = np.load(run_sample(ckpt, "truncation=0.5", f"latent={tmp_path / 'zc.npy'}", out))
    assert np.array_equal(calm, as_array(render(G, 0.5 * z, c)))


def test_a_film_between_two_files(
    G: GeneratorBase, ckpt: Path, found: Path, tmp_path: Path
) -> None:
    z, c = latents(G, torch.tensor([1]), seed=5)
    np.save(tmp_path / "one.npy", torch.cat([z, c], 1)[0].numpy())  # a single row may be flat
    options = ("motion=interpolate", "frames=3", "loop=false", f"out={tmp_path / 'x.npy'}")
    frames = np.load(run_sample(ckpt, f"latent=[{found},{tmp_path / 'one.npy'}]", *options))
    assert len(frames) == 4
    assert np.array_equal(frames[0], pixels(found.with_suffix(".png"))[:, 16:])
    assert np.array_equal(frames[3:], as_array(render(G, z, c)))


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["latent=no.npy"], "latent=no.npy: cannot be read"),
        (["latent=text.npy"], "latent=text.npy: not an array"),
        (["latent=many.npz"], "latent=many.npz: must hold one array of numbers"),
        (["latent=words.npy"], "latent=words.npy: must hold one array of numbers"),
        (["latent=wide.npy"], r"shape \(2, 65\); this model needs rows of 64 .* or 72"),
        (["latent=deep.npy"], r"has shape \(1, 2, 64\)"),
        (["latent=none.npy"], "has 0 rows"),
        (["latent=nan.npy"], "not finite"),
        (["latent=[z.npy,zc.npy]"], "must all hold classes, or none"),
        (["latent=[]"], "must name a .npy file"),
        (["latent=z.npy", "n=3"], "n=3: leave it out"),
        (["latent=z.npy", "seeds=3"], "seeds=3: leave it out"),
        (["latent=z.npy", "motion=walk", "out=x.gif"], "a walk starts from seeds"),
        (["latent=z.npy", "label=dog"], "label=dog: unknown"),
        (["motion=component", "component=65", "out=x.gif"], "component=65: must be from 1 to 64"),
        (["show=components", "component=65"], "component=65: must be from 1 to 64"),
        (["motion=component", "component=0", "out=x.gif"], "component=0: must be above 0"),
        (["component=3"], "component=3: goes with motion=component"),
        (["motion=component", "strength=0", "out=x.gif"], "strength=0.0: must be above 0"),
        (["motion=component", "n=3", "out=x.gif"], "needs one image per tile, there are 3"),
        (["show=components", "n=2"], "draws one image, there are 2"),
        (["show=components", "out=x.gif"], r"out=x.gif: .*ending in \.png"),
    ],
)
def test_bad_latents_and_components_are_one_line(
    ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.npy").write_text("no array")
    np.savez("many.npz", a=np.zeros((1, 64)))
    np.save("words.npy", np.array(["z"]))
    shapes = {"wide": (2, 65), "deep": (1, 2, 64), "none": (0, 64), "z": (1, 64), "zc": (1, 72)}
    for name, shape in shapes.items():
        np.save(f"{name}.npy", np.zeros(shape, np.float32))
    np.save("nan.npy", np.full((1, 64), np.nan))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=text) as caught:
        run_sample(ckpt, *overrides)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


# --- components ---


def test_components_are_the_principal_ones_of_the_first_layers(G: GeneratorBase) -> None:
    V = components(G)
    assert torch.allclose(V @ V.T, torch.eye(64), atol=1e-5)
    c = torch.eye(8)[:1].expand(20000, -1)
    z = torch.randn(20000, 64, generator=torch.Generator().manual_seed(0))
    latent = G.input.latent(z, c)  # type: ignore[union-attr, operator]
    layers = [G.input.scale, *G.modulations]  # type: ignore[union-attr, list-item]
    response = torch.cat([layer(latent) for layer in layers], 1)
    sampled = torch.linalg.eigvalsh(response.T.cov()).flip(0)[:8]
    W = torch.cat([layer.weight[:, :64] for layer in layers])
    variance = (W @ V.T).square().sum(0)
    assert (variance.diff() <= 1e-5).all()
    assert torch.allclose(variance[:8], sampled, rtol=0.05)


def test_a_generator_without_a_linear_first_layer_is_refused() -> None:
    with pytest.raises(UserError, match="components: GeneratorBase has no linear first layer"):
        components(GeneratorBase())


def test_a_film_moves_along_a_component_and_back(
    G: GeneratorBase, ckpt: Path, found: Path, tmp_path: Path
) -> None:
    words = (f"latent={found}", "motion=component", "component=2", "strength=2", "frames=4")
    frames = np.load(run_sample(ckpt, *words, f"out={tmp_path / 'x.npy'}"))
    row = torch.from_numpy(np.load(found))
    z, c, direction = row[:, :64], row[:, 64:], components(G)[1]
    for i, t in ((0, -2), (2, 0), (4, 2), (6, 0)):
        expected = as_array(render(G, z + t * direction, c))[0]
        assert np.abs(frames[i].astype(int) - expected).max() <= 1
    assert len(frames) == 8
    ending = move(z, c, direction, strength=2.0, frames=4, loop=False)
    assert len(ending) == 5
    assert torch.allclose(ending.z[4], z + 2 * direction)


def test_the_overview_has_a_row_for_each_component(
    G: GeneratorBase, ckpt: Path, tmp_path: Path
) -> None:
    words = ("show=components", "component=60", "seeds=3")
    sheet = pixels(run_sample(ckpt, *words, f"out={tmp_path / 'x.png'}"))
    assert sheet.shape == (5 * 100 + 4 + 14, 28 + 7 * 100 + 4, 3)  # components 60 to 64
    z, c = latents(G, torch.tensor([3]), seed=0)
    for row, number in enumerate(range(60, 65)):
        for column, t in ((0, -3), (3, 0), (6, 3)):
            top, left = 18 + 100 * row, 32 + 100 * column
            tile = sheet[top : top + 96 : 6, left : left + 96 : 6].astype(int)
            expected = as_array(render(G, z + t * components(G)[number - 1], c))[0]
            assert np.abs(tile - expected).max() <= 1

"""Sizes and shapes of images: other squares, oblong images, and images with alpha."""

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import compose_as
from PIL import Image, ImageSequence
from runs import TINY, train_in_process
from safetensors import safe_open

from vgan import load_generator
from vgan.apps.hub_export import export
from vgan.config import EvalConfig, ExportConfig, InvertConfig, SampleConfig
from vgan.data.augment import Augment, recolour, resample
from vgan.data.folder import Folder
from vgan.data.preprocess import prepare_image
from vgan.data.shapes import Shapes
from vgan.evaluation.evaluate import evaluate
from vgan.inference.invert import invert
from vgan.inference.sample import sample
from vgan.models.discriminator import Discriminator
from vgan.models.generator import Generator, PlainGenerator
from vgan.runtime.errors import UserError
from vgan.runtime.images import grid, on_white, parse_resolution, to_rgb, to_straight_alpha
from vgan.runtime.rng import Streams
from vgan.training.losses import jvp

WIDTHS = [16, 8, 8, 8, 8, 8, 8]
TRAINING = [word for word in TINY if not word.startswith("data")]
OBLONG = ["data.resolution=[16,24]", "data.channels=4", "augment=adaptive", "model=attn"]
OBLONG += ["size.attention_resolutions=[8]", "total_kimg=0.04", "snapshot_kimg=0.04"]


@pytest.mark.parametrize(
    ("given", "parsed"),
    [(64, 64), (48, 48), (1024, 1024), ([64, 96], (64, 96)), ((96, 64), (96, 64)), ([32, 32], 32)],
)
def test_resolutions_are_a_side_or_height_and_width(given: object, parsed: object) -> None:
    assert parse_resolution(given) == parsed  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "hint"),
    [(50, "try 48"), ([60, 90], r"try \[56,88\]"), (8, "16 to 1024"), (2048, "16 to 1024"),
     ([16, 128], "at most 4 times"), ([64], "H,W"), ([64, 6.5], "H,W"), (True, "H,W")],
)  # fmt: skip
def test_other_resolutions_are_refused(given: object, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        parse_resolution(given)  # type: ignore[arg-type]


@pytest.mark.parametrize("resolution", [48, (32, 48), (48, 16)])
@pytest.mark.parametrize("patch_size", [1, 2, None])
def test_networks_follow_the_shape(resolution: object, patch_size: int | None) -> None:
    sizes = {"img_resolution": resolution, "img_channels": 4, "label_dim": 0}
    common = {"widths": WIDTHS, "patch_size": patch_size}
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    for kind in (Generator, PlainGenerator):
        G = kind(z_dim=8, **sizes, **common)  # type: ignore[arg-type]
        images = G(torch.randn(2, 8))
        assert images.shape == (2, 4, height, width)
    step = 2 ** (min(height, width).bit_length() - 3)
    for logits_px in (1, 4):
        D = Discriminator(logits_px=logits_px, **sizes, **common)  # type: ignore[arg-type]
        cells = (1, 1) if logits_px == 1 else (height // step, width // step)
        assert D(images).shape == (2, 1, *cells)


def test_penalty_of_oblong_images_is_exact() -> None:
    D = Discriminator((16, 24), WIDTHS, img_channels=4).double()
    x, v = torch.randn(2, 2, 4, 16, 24, dtype=torch.float64)
    expected = torch.func.jvp(lambda x: D(x), (x,), (v,))[1].square().mean((1, 2, 3))
    torch.testing.assert_close(
        jvp(D, x, torch.zeros(2, 0), v)[1].double(), expected.float().double()
    )


@pytest.mark.parametrize(("size", "box"), [((60, 40), (0, 0, 60, 40)), ((80, 40), (10, 0, 70, 40))])
def test_the_largest_part_of_that_shape_is_cropped(
    size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(noise)
    expected = image.crop(box).resize((24, 16), Image.Resampling.LANCZOS, reducing_gap=3)
    assert (prepare_image(image, (16, 24), 3) == np.asarray(expected)).all()
    assert prepare_image(image, (16, 24), 3, crop=20).shape == (16, 24, 3)


def test_hidden_colours_do_not_count_and_alpha_survives() -> None:
    straight = np.zeros((16, 16, 4), np.uint8)
    straight[:, :8] = (200, 100, 50, 255)
    straight[:, 8:] = (77, 88, 99, 0)  # a colour that nobody sees
    packed = prepare_image(Image.fromarray(straight), 16, 4)
    assert packed[0, 0].tolist() == [200, 100, 50, 255]
    assert packed[0, 12].tolist() == [0, 0, 0, 0]
    half = np.full((1, 1, 4), (90, 40, 0, 128), np.uint8)
    multiplied = prepare_image(Image.fromarray(half.repeat(16, 0).repeat(16, 1)), 16, 4)
    assert np.abs(to_straight_alpha(multiplied)[0, 0].astype(int) - half[0, 0]).max() <= 1
    images = torch.tensor(multiplied).permute(2, 0, 1)[None]
    assert np.abs(to_rgb(images)[0, :, 0, 0].numpy().astype(int) - on_white(half)[0, 0]).max() <= 1
    assert grid(images).shape == (16, 16, 4)


def test_turning_an_oblong_image_does_not_stretch_it() -> None:
    y, x = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(48) - 23.5, indexing="ij")
    disc = ((x**2 + y**2).sqrt() < 7).float()[None, None] * 2 - 1
    quarter = torch.tensor([[[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]])
    assert (resample(disc, [quarter]) - disc).abs().mean() < 0.01
    bar = ((x.abs() < 7) & (y.abs() < 3)).float()[None, None] * 2 - 1
    upright = ((x.abs() < 3) & (y.abs() < 7)).float()[None, None] * 2 - 1
    assert (resample(bar, [quarter]) - upright).abs().mean() < 0.01


def test_every_transform_works_on_oblong_images_with_alpha() -> None:
    names = ["flip", "quarter_turns", "translation", "scale", "rotation", "stretch", "shift"]
    names += ["brightness", "contrast", "luma_flip", "hue", "saturation", "colour", "cutout"]
    images = torch.rand(4, 4, 16, 24) * 2 - 1
    for name in names:
        result = Augment([name])(images, 1.0, Streams(0, 0, 4, torch.device("cpu")), "real")
        assert result.shape == images.shape
        assert not torch.equal(result, images), name


def test_colours_change_as_if_alpha_came_later() -> None:
    straight, alpha = torch.rand(2, 3, 4, 4) * 2 - 1, torch.rand(2, 1, 4, 4)
    matrix = torch.eye(4).repeat(2, 1, 1)
    matrix[:, :3] += 0.2 * torch.randn(2, 3, 4)

    def multiply(colours: torch.Tensor) -> torch.Tensor:
        return torch.cat([(colours + 1) * alpha - 1, 2 * alpha - 1], dim=1)

    changed = multiply(recolour(straight, [matrix]))
    torch.testing.assert_close(recolour(multiply(straight), [matrix]), changed)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on oblong images with alpha, stopped and resumed."""
    images, folder = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("runs") / "oblong"
    rng = np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(rng.integers(0, 256, (20, 30, 4), np.uint8)).save(images / f"{i}.png")
    data = ["data=folder", f"data.path={images}", f"data.cache_dir={images / '.cache'}", *OBLONG]
    train_in_process(folder, *data, tiny=TRAINING)
    train_in_process(folder, *data, "total_kimg=0.08", tiny=TRAINING)
    return folder


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.copy()


def test_run_resumes_and_shows_transparent_grids(trained: Path) -> None:
    shown = opened(max(trained.glob("fakes-*.png")))
    assert shown.mode == "RGBA"
    assert shown.size[0] * 2 == shown.size[1] * 3
    G = load_generator(trained, device="cpu")
    assert (G.img_resolution, G.img_channels) == ((16, 24), 4)


def test_samples_have_the_shape_and_alpha(trained: Path, tmp_path: Path) -> None:
    def draw(out: str, *words: str) -> Path:
        words = (f"ckpt={trained}", "device=cpu", f"out={tmp_path / out}", *words)
        return sample(compose_as(SampleConfig, "sample", *words))

    array = np.load(draw("a.npy", "n=3"))
    assert array.shape == (3, 16, 24, 4)
    assert opened(draw("a.png", "n=4", "zoom=2")).size == (96, 64)
    single = np.asarray(opened(draw("a", "n=3") / "000000.png"))
    assert (single == array[0]).all()
    with Image.open(draw("a.webp", "n=2", "motion=interpolate", "frames=2", "zoom=1")) as film:
        frames = [frame.copy() for frame in ImageSequence.Iterator(film)]
    assert [(frame.mode, frame.size) for frame in frames] == [("RGBA", (24, 16))] * 4
    assert opened(draw("a.gif", "n=2", "motion=interpolate", "frames=2")).size == (96, 64)
    for show in ("attention", "patches"):
        assert opened(draw(f"{show}.png", "n=2", f"show={show}")).mode == "RGB"
    with pytest.raises(UserError, match="below 16 and 24"):
        draw("b.png", "n=1", "show=attention", "query=[16,0]")


def test_oblong_images_are_evaluated(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"ckpt={trained}", "features=learned", "n=20", "metrics=[fid]", "device=cpu"]
    evaluate(compose_as(EvalConfig, "eval", *words, "++features.train_kimg=0.1"))
    assert "16 x 24 px" in capsys.readouterr().out


def test_a_photo_of_that_shape_is_inverted(trained: Path, tmp_path: Path) -> None:
    photo = next(trained.parent.parent.glob("images*/*.png"))
    words = [f"ckpt={trained}", f"image={photo}", f"out={tmp_path / 'z.npy'}", "device=cpu"]
    words += ["draws=4", "starts=2", "steps=2", "zoom=1", f"animation={tmp_path / 'a.webp'}"]
    invert(compose_as(InvertConfig, "invert", *words))
    assert opened(tmp_path / "z.png").size == (48, 16)
    assert opened(tmp_path / "a.webp").size == (48, 16)


def test_exports_draw_oblong_images_with_alpha(trained: Path, tmp_path: Path) -> None:
    compare = (f"ckpt={trained}", "license=MIT")
    out = tmp_path / "g.safetensors"
    export(compose_as(ExportConfig, "export", *compare, "to=safetensors", f"out={out}"), dict)
    G = load_generator(out, device="cpu")
    assert G(torch.randn(2, G.z_dim)).shape == (2, 4, 16, 24)
    assert "RGBA, multiplied by alpha" in safe_open(out, "pt").metadata()["range"]
    onnx = compose_as(ExportConfig, "export", *compare, "to=onnx", f"out={tmp_path / 'g.onnx'}")
    export(onnx, dict)  # compares with torch
    card = compose_as(
        ExportConfig, "export", *compare, "to=hub", "repo=a/b", f"out={tmp_path / 'c'}"
    )
    export(card, lambda _: ({}, {}))
    assert "16 x 24 px RGBA" in (tmp_path / "c" / "README.md").read_text()


def test_shapes_stay_square() -> None:
    with pytest.raises(UserError, match="shapes are square"):
        Shapes([16, 24])  # type: ignore[arg-type]
    assert Shapes(48, 4).read(0)[0].shape == (48, 48, 3)


def test_checkpointing_and_patches_from_512_px_on() -> None:
    assert Generator(
        8, 512, WIDTHS, patch_size=None, gradient_checkpointing=None
    ).gradient_checkpointing
    assert not Generator(8, 256, WIDTHS, gradient_checkpointing=None).gradient_checkpointing


def test_data_of_another_shape_are_other_data(trained: Path, tmp_path: Path) -> None:
    images = next(p for p in (trained.parent.parent).glob("images*") if p.is_dir())
    digests = {Folder(str(images), resolution=r).fingerprint() for r in (16, [16, 24], [24, 16])}
    assert len(digests) == 3

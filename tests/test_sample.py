"""vgan-sample: every kind of output, ways through the latent space, maps of attention."""

import hashlib
import math
import subprocess
import sys
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from checkpoints import compose_as, make_checkpoint
from PIL import Image, ImageSequence

from vgan import load_generator
from vgan.config import SampleConfig
from vgan.inference.attention_maps import (
    AttentionMap,
    attention_grid,
    attention_maps,
    patch_logits,
    patch_logits_grid,
)
from vgan.inference.latents import draw, interpolate, latents, render, slerp, walk
from vgan.inference.load import load_discriminator
from vgan.inference.sample import parse_seeds, sample
from vgan.inference.writers import FILMS, write_film
from vgan.runtime.errors import UserError


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with attention at 8 px and 8 classes, whose attention has an effect."""
    folder = tmp_path_factory.mktemp("model")
    return make_checkpoint(folder, "size.attention_resolutions=[4,8]", noise=0.05)


def run(ckpt: Path, *overrides: object) -> Path:
    return sample(compose_as(SampleConfig, "sample", f"ckpt={ckpt}", "device=cpu", *overrides))


def test_sampling_does_not_import_the_compiler(ckpt: Path, tmp_path: Path) -> None:
    """Which takes as long to import as all the rest."""
    words = ["vgan-sample", f"ckpt={ckpt}", "n=2", f"out={tmp_path / 'a.png'}", "device=cpu"]
    code = f"import sys; sys.argv = {words}; from vgan.cli import sample_main; sample_main(); "
    code += "assert not {'torch._dynamo', 'sympy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_seeds_are_numbers_of_a_series() -> None:
    assert parse_seeds(7) == [7]
    assert parse_seeds("3-5") == [3, 4, 5]
    assert parse_seeds(["0-2", 40, "7"]) == [0, 1, 2, 40, 7]


@pytest.mark.parametrize("bad", ["", [], "5-3", "a", "-1", 1.5, "0-99999999999", "²", [[1]]])
def test_bad_seeds_are_refused(bad: object) -> None:
    with pytest.raises(UserError, match=r"^seeds="):
        parse_seeds(bad)


def test_every_kind_of_output_holds_the_same_pictures(ckpt: Path, tmp_path: Path) -> None:
    chosen = ("seeds=[3,5-6]", "label=[heart,2]", "batch_size=2")
    G = load_generator(ckpt, device="cpu")
    heart = G.label_names.index("heart")  # type: ignore[union-attr, operator]
    expected = (
        draw(G, torch.tensor([3, 5, 6]), 0, torch.tensor([heart, 2, heart]))
        .permute(0, 2, 3, 1)
        .numpy()
    )
    assert np.array_equal(np.load(run(ckpt, *chosen, f"out={tmp_path / 'x.npy'}")), expected)
    with zipfile.ZipFile(run(ckpt, *chosen, f"out={tmp_path / 'x.zip'}")) as archive:
        assert archive.namelist() == ["000003.png", "000005.png", "000006.png"]
        for name, picture in zip(archive.namelist(), expected):
            with archive.open(name) as f:
                assert np.array_equal(np.asarray(Image.open(f)), picture)
    folder = run(ckpt, *chosen, f"out={tmp_path / 'files'}")
    assert np.array_equal(np.asarray(Image.open(folder / "000005.png")), expected[1])
    grid = np.asarray(
        Image.open(run(ckpt, *chosen, "columns=3", "zoom=1", f"out={tmp_path / 'x.png'}"))
    )
    assert np.array_equal(grid, np.concatenate(list(expected), axis=1))
    assert not list(tmp_path.glob(".*"))  # nothing temporary is left


@pytest.mark.parametrize("kind", ["gif", "webp", "mp4", "zip", "npy", "png"])
def test_films_repeat_byte_for_byte(ckpt: Path, tmp_path: Path, kind: str) -> None:
    options = ("motion=walk", "tiles=2", "frames=2", "columns=2")
    first, again = (run(ckpt, *options, f"out={tmp_path / name}.{kind}") for name in "ab")
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("kind", ["gif", "webp", "mp4"])
def test_a_film_shows_the_frames(ckpt: Path, tmp_path: Path, kind: str) -> None:
    options = ("motion=interpolate", "seeds=[1,4]", "frames=3", "fps=20", "zoom=4")
    frames = (
        np.load(run(ckpt, *options, f"out={tmp_path / 'f.npy'}"))
        .repeat(4, axis=1)
        .repeat(4, axis=2)
    )
    G = load_generator(ckpt, device="cpu")
    assert np.array_equal(
        frames[0, ::4, ::4], draw(G, torch.tensor([1]), 0)[0].permute(1, 2, 0).numpy()
    )
    assert np.array_equal(
        frames[3, ::4, ::4], draw(G, torch.tensor([4]), 0)[0].permute(1, 2, 0).numpy()
    )
    film = run(ckpt, *options, f"out={tmp_path / 'f'}.{kind}")
    if kind == "mp4":
        with av.open(str(film)) as container:
            shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            assert container.streams.video[0].average_rate == 20
    else:
        with Image.open(film) as image:
            assert image.info["loop"] == 0
            shown = []
            for i in range(image.n_frames):  # type: ignore[attr-defined]
                image.seek(i)
                shown.append(np.asarray(image.convert("RGB")))
            assert image.info["duration"] == 50
    assert len(shown) == len(frames) == 6
    for ours, theirs in zip(frames, shown):
        difference = np.abs(ours.astype(int) - theirs).mean()
        assert (
            difference == 0 if kind == "webp" else difference < 12
        )  # 256 colours; half the resolution of colour


def test_a_film_has_its_frames_in_their_order(tmp_path: Path) -> None:
    frames = np.stack(
        [np.full((16, 32, 3), level, np.uint8) for level in (10, 60, 110, 160, 210, 250)]
    )
    for kind in FILMS:
        path = tmp_path / f"x{kind}"
        write_film(path, frames, fps=10, zoom=2)
        if kind == ".mp4":
            with av.open(str(path)) as container:
                shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        else:
            with Image.open(path) as image:
                shown = [
                    np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)
                ]
        assert [frame.shape for frame in shown] == [(32, 64, 3)] * 6
        assert (
            np.abs(np.array([frame.mean() for frame in shown]) - frames.mean((1, 2, 3))).max() < 4
        )


def test_classes_are_gone_through_in_straight_lines(ckpt: Path, tmp_path: Path) -> None:
    G = load_generator(ckpt, device="cpu")
    out = run(
        ckpt, "motion=classes", "label=[2,5]", "frames=2", "seeds=4", f"out={tmp_path / 'x.npy'}"
    )
    z, _ = latents(G, torch.tensor([4]), seed=0)
    eye = torch.eye(8)
    c = torch.stack([eye[2], (eye[2] + eye[5]) / 2, eye[5], (eye[2] + eye[5]) / 2])
    expected = render(G, z.expand(4, -1), c).permute(0, 2, 3, 1).numpy()
    assert np.abs(np.load(out).astype(int) - expected).max() <= 1
    ending = run(
        ckpt,
        "motion=classes",
        "label=[2,5]",
        "frames=2",
        "seeds=4",
        "loop=false",
        f"out={tmp_path / 'y.npy'}",
    )
    assert len(np.load(ending)) == 3


def test_truncation_goes_to_the_mean(ckpt: Path, tmp_path: Path) -> None:
    G = load_generator(ckpt, device="cpu")
    z, c = latents(G, torch.arange(3), seed=0)
    for truncation in (0.0, 0.5):
        shown = np.load(run(ckpt, "n=3", f"truncation={truncation}", f"out={tmp_path / 'x.npy'}"))
        assert (
            np.abs(
                shown.astype(int) - render(G, truncation * z, c).permute(0, 2, 3, 1).numpy()
            ).max()
            <= 1
        )
    film = ("motion=walk", "frames=1", "label=3", "truncation=0", f"out={tmp_path / 'y.npy'}")
    assert (np.load(run(ckpt, *film)) == np.load(run(ckpt, *film))[:1]).all()


def test_a_number_asked_for_twice_is_drawn_twice(ckpt: Path, tmp_path: Path) -> None:
    folder = run(ckpt, "seeds=[1,1,1]", "label=[0,1,0]", f"out={tmp_path / 'f.d'}/x")
    assert sorted(p.name for p in folder.iterdir()) == [
        "000001-2.png",
        "000001-3.png",
        "000001.png",
    ]
    assert (folder / "000001.png").read_bytes() == (folder / "000001-3.png").read_bytes()
    assert (folder / "000001.png").read_bytes() != (folder / "000001-2.png").read_bytes()
    run(ckpt, "n=1", f"out={tmp_path / 'f.d'}")  # a folder that is there may have a dot in its name
    assert (tmp_path / "f.d" / "000000.png").is_file()


def test_a_map_shows_heat_where_it_maps_and_red_where_it_maps_fake() -> None:
    images = torch.full((2, 3, 16, 16), 128, dtype=torch.uint8)
    weights = torch.zeros(2, 1, 4, 4)
    weights[:, :, 0, 1] = 1.0  # from row 2, column 3, all of it to row 0, column 1
    position = torch.tensor([[2, 3], [2, 3]])
    gates = torch.zeros(2, 1, 4, 4)
    gates[:, :, 1, 2] = -1.0
    layer = AttentionMap(position, weights, gates)
    sheet = attention_grid(images, [layer]).astype(int)
    heat, gate = sheet[18:114, 104:200], sheet[18:114, 204:300]
    assert np.unravel_index(heat[:, :, 0].argmax(), (96, 96))[0] < 24  # the hottest place
    assert heat[12, 36, 0] > heat[84, 84, 0] + 60  # and not elsewhere
    assert (heat[48, 72:96] == (90, 230, 255)).all()  # the frame's upper edge
    assert gate[36, 60, 2] > gate[36, 60, 0] + 60  # below 0 is blue
    logits = torch.zeros(2, 4, 4)
    logits[0, 1, 1], logits[1, 1, 1] = -3.0, 3.0
    verdict = patch_logits_grid(images, logits).astype(int)
    first, second = verdict[18 + 36, 104 + 36], verdict[118 + 36, 104 + 36]
    assert first[0] > first[2] + 60  # below the mean of its place: red
    assert second[2] > second[0] + 60


def test_slerp_keeps_lengths_and_turns_steadily() -> None:
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    way = slerp(a, b, torch.tensor([0.0, 0.5, 1.0]))[:, 0]
    assert torch.allclose(
        way, torch.tensor([[2.0, 0.0], [3 / math.sqrt(2), 3 / math.sqrt(2)], [0.0, 4.0]]), atol=1e-6
    )
    same = slerp(a, a, torch.tensor([0.3]))
    assert torch.allclose(same[0], a)
    assert torch.isfinite(slerp(a, -a, torch.linspace(0, 1, 5))).all()  # no single shortest way


def test_ways_through_pictures_close_or_end() -> None:
    z, c = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.eye(6)
    film = interpolate(z, c, tiles=2, frames=4, loop=True)
    assert film.z.shape == (12, 2, 5)
    assert torch.allclose(film.z[4], z[[1, 4]], atol=1e-6)
    assert torch.allclose(film.c[2], (c[[0, 3]] + c[[1, 4]]) / 2)
    ending = interpolate(z, c, tiles=2, frames=4, loop=False)
    assert len(ending) == 9
    assert torch.equal(ending.z[-1], z[[2, 5]])


def test_a_walk_has_the_models_own_distribution_and_closes() -> None:
    film = walk(2000, torch.zeros(3, 0), seed=1, index=torch.arange(3), steps=8, frames=6)
    assert film.z.shape == (48, 3, 2000)
    assert film.z.std(dim=2).sub(1).abs().max() < 0.08
    steps = (film.z.roll(-1, 0) - film.z).norm(dim=2)  # the last one leads to the first
    assert steps.max() < 1.3 * steps.min()
    apart = torch.nn.functional.cosine_similarity(film.z[0], film.z[6], dim=1)
    assert (
        apart.sub((math.cos(math.pi / 4) + math.cos(math.pi / 2)) / 2).abs().max() < 0.06
    )  # an eighth of the slow, a quarter of the fast wave


def test_attention_maps_are_where_the_network_maps(ckpt: Path) -> None:
    G = load_generator(ckpt, device="cpu")
    z, c = latents(G, torch.arange(3), seed=0)
    images, maps = attention_maps(G, z, c)
    assert torch.equal(images, draw(G, torch.arange(3), 0))  # looking changes nothing
    assert [tuple(layer.weights.shape) for layer in maps] == [(3, 1, 4, 4), (3, 1, 8, 8)]
    for layer in maps:
        assert torch.allclose(layer.weights.sum((2, 3)), torch.ones(1), atol=1e-5)
    attention = G.stages[1][-1].attention  # type: ignore[index, union-attr]
    x = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = {}
    attention.to_out.register_forward_hook(lambda _, args, __: seen.update(y=args[0]))
    attention(x)
    values = attention.to_qkv(x).flatten(2)[:, 16:].unflatten(1, (1, 8))  # one head of 8 channels
    by_hand = (attention.weights(x) @ values.transpose(2, 3)).transpose(2, 3).reshape(2, 8, 8, 8)
    assert torch.allclose(seen["y"], by_hand, atol=1e-5)
    row = attention.weights(x, torch.tensor([5, 40]))
    assert torch.allclose(row[:, :, 0], attention.weights(x)[[0, 1], :, [5, 40]])
    asked = attention_maps(G, z, c, query=(0.9, 0.3))[1][1]
    assert asked.position.tolist() == [[7, 2]] * 3


def test_verdicts_add_up_to_the_logit(ckpt: Path) -> None:
    D = load_discriminator(ckpt, device="cpu")
    images = torch.randint(
        0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    c = torch.eye(8)[:3]
    logits = D(images.float() / 127.5 - 1, c)
    places = patch_logits(D, images, c)
    assert places.shape == (3, 4, 4)
    total = (
        places.sum((1, 2)) + D.to_logit.bias.float() if D.pool is not None else places.mean((1, 2))
    )  # type: ignore[union-attr, operator]
    assert torch.allclose(
        total.flatten(), logits.mean((1, 2, 3)) if D.pool is None else logits.flatten(), atol=1e-4
    )


def test_sheets_of_maps(ckpt: Path, tmp_path: Path) -> None:
    strongest = run(ckpt, "show=attention", "n=2", f"out={tmp_path / 'a.png'}")
    corner = run(ckpt, "show=attention", "n=2", "query=[0,15]", f"out={tmp_path / 'b.png'}")
    patches = run(ckpt, "show=patches", "n=2", f"out={tmp_path / 'c.png'}")
    a, b, c = (np.asarray(Image.open(path)).astype(int) for path in (strongest, corner, patches))
    assert a.shape == b.shape
    assert a.shape[1] == 3 * 100 + 4  # the picture and two layers of one head
    assert c.shape[1] == 2 * 100 + 4
    assert (a != b).any()
    framed = b[
        18:114, 204:300
    ]  # the finest layer of the first picture: its corner position is framed
    assert (framed[0, 96 - 12 :] == (90, 230, 255)).all()
    assert (
        hashlib.sha256(strongest.read_bytes()).digest()
        == hashlib.sha256(
            run(ckpt, "show=attention", "n=2", f"out={tmp_path / 'd.png'}").read_bytes()
        ).digest()
    )


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["out=x.bmp"], r"out=x.bmp: unknown kind .bmp; give a name ending in .png, .npy"),
        (["out=x.gif"], "a film needs motion="),
        (["show=attention", "out=files"], "a folder cannot hold this"),
        (["seeds=[1,2]", "n=3"], "n=3: seeds="),
        (["label=[heart,nothing]"], "label=nothing: unknown; use one of 0 "),
        (["label=[]"], "label=.*at least one"),
        (["motion=jump", "out=x.gif"], "motion=jump: must be one of interpolate, classes, walk"),
        (
            ["motion=interpolate", "n=3", "tiles=2", "out=x.gif"],
            "tiles=2: 3 images cannot be shared",
        ),
        (["motion=interpolate", "n=1", "out=x.gif"], "needs two images"),
        (["motion=walk", "n=3", "out=x.gif"], "one image per tile"),
        (
            ["motion=classes", "label=heart", "out=x.gif"],
            "needs a model with classes, and at least two",
        ),
        (["show=patches", "motion=walk"], "show=patches: goes with motion=null"),
        (["query=[1,1]"], "goes with show=attention"),
        (["show=attention", "query=[16,0]"], "in pixels below 16 and 16"),
        (["motion=walk", "loop=false", "out=x.gif"], "loop=False: goes with motion=interpolate"),
        (
            ["motion=walk", "frames=1", "zoom=2000", "out=x.webp"],
            r"out=x.webp: frames of 32000 x 32000 px are larger",
        ),
        (["show=attention", "n=65"], "draws at most 64 images"),
        (["show=attention", "zoom=2"], "zoom=2: goes with show=images"),
        (["seeds=0-10000000"], "seeds=0-10000000: names more than 10,000,000"),
        (["out=.png"], "out=.png: has no name before its ending"),
        (["fps=0"], "fps=0.0: must be from 1 to 100"),
    ],
)
def test_bad_input_is_one_line(
    ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=text) as caught:
        run(ckpt, *overrides)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_out_that_cannot_be_written(ckpt: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/x.npy", "file/x.png", "file/x.zip", "file/y/z.gif"):
        motion = ["motion=walk", "frames=1"] if out.endswith("gif") else []
        with pytest.raises(UserError, match=r"cannot be written|is a file"):
            run(ckpt, f"out={tmp_path / out}", "n=1", *motion)
    assert (tmp_path / "file").read_text() == "mine"

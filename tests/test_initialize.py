"""init=CKPT: a run that starts from the networks of another."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import compose_as
from PIL import Image
from runs import TINY, train_in_process
from safetensors.torch import save_file

from vgan.config import ExportConfig
from vgan.inference.export import export
from vgan.models.discriminator import Discriminator
from vgan.models.generator import Generator
from vgan.runs import checkpoint
from vgan.runtime.errors import UserError
from vgan.training.initialize import Source, initialize

WIDTHS = ["size.g_widths=[8,8,8,8]", "size.d_widths=[8,8,8,8]"]
SHORT = ["total_kimg=0.016", "optim.lr_G.start=0", "optim.lr_G.end=0"]
SHORT += ["optim.lr_D.start=0", "optim.lr_D.end=0"]  # so that the weights stay as they began


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("init") / "source"
    train_in_process(folder, *WIDTHS, "total_kimg=0.08")
    return folder


def state_of(folder: Path) -> dict[str, Any]:
    return checkpoint.load(checkpoint.find(folder))


def test_equal_networks_are_taken_whole(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_in_process(tmp_path / "new", *WIDTHS, *SHORT, f"init={source}", "seed=3")
    old, new = state_of(source), state_of(tmp_path / "new")
    for name, value in old["G_ema"].items():
        assert torch.equal(value, new["G"][name]), name
        assert torch.equal(value, new["G_ema"][name]), name
    for name, value in old["D"].items():
        assert torch.equal(value, new["D"][name]), name
    assert new["cur_nimg"] == 16
    assert "8 of 8 classes or conditions known by name" in capsys.readouterr().out


def test_at_twice_the_resolution_only_the_finest_stages_are_new(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WIDTHS, *SHORT, f"init={source}", "data.resolution=32", "seed=3"]
    train_in_process(tmp_path / "new", *words)
    old, new = state_of(source), state_of(tmp_path / "new")
    for stage in range(2):
        name = f"stages.{stage}.0.conv_a.depthwise.weight"
        assert torch.equal(old["G_ema"][name], new["G"][name])
        # D's stages are counted from the finest, of which the new one has one more.
        shifted = f"stages.{stage + 1}.0.conv_a.depthwise.weight"
        assert torch.equal(old["D"][name], new["D"][shifted])
    assert torch.equal(old["G_ema"]["input.basis"], new["G"]["input.basis"])
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("init="))
    assert "stages.0" in line.split("of D, new:")[1]
    assert "stages.1" not in line.split("of D, new:")[1]


def test_modulation_begins_from_nothing_or_from_the_source(source: Path, tmp_path: Path) -> None:
    words = [*WIDTHS, *SHORT, "size.modulation=true", "seed=3"]
    train_in_process(tmp_path / "new", *words, f"init={source}")
    first = state_of(tmp_path / "new")["G"]
    assert torch.equal(first["stages.0.0.conv_a.depthwise.weight"],
                       state_of(source)["G_ema"]["stages.0.0.conv_a.depthwise.weight"])  # fmt: skip
    assert not first["modulations.0.weight"].any()

    # Without classes the columns of z are taken, those of the class embedding are not there.
    with torch.no_grad():
        G = Generator(8, 16, [8, 8, 8], label_dim=3, embed_dim=4, modulation=True)
        G.modulations[0].weight.normal_()
        new = Generator(8, 16, [8, 8, 8], modulation=True)
    D = Discriminator(16, [8, 8, 8])
    taken = Source("other", "", 16, ("a", "b", "c"), dict(G.state_dict()), {})
    initialize(new, D, taken, ())
    assert torch.equal(new.modulations[0].weight, G.modulations[0].weight[:, :8])


def test_a_run_from_before_modulation_goes_on(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "old")
    path = checkpoint.find(tmp_path / "old")
    state = checkpoint.load(path)
    del state["config"]["model"]["generator"]["modulation"], state["config"]["size"]["modulation"]
    checkpoint.save(path, state, keep=3)
    train_in_process(tmp_path / "old", *WIDTHS, "total_kimg=0.096")
    with pytest.raises(UserError, match="modulation was False, is now True"):
        train_in_process(tmp_path / "old", *WIDTHS, "total_kimg=0.12", "size.modulation=true")


def test_embeddings_follow_the_names_of_the_classes(source: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("star", "unicorn"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    words = ["data=folder", f"data.path={tmp_path / 'images'}", "data.labels=folders"]
    tiny = [word for word in TINY if not word.startswith("data")]
    tiny += ["data.resolution=16", "augment=scheduled", "size=xs"]
    words += [*WIDTHS, *SHORT, f"init={source}"]
    train_in_process(tmp_path / "new", *words, tiny=[w for w in tiny if w not in words])
    old, new = state_of(source), state_of(tmp_path / "new")
    labels = list(old["data"]["labels"])
    for network, key in (("G", "input.embed.weight"), ("D", "embed.weight")):
        was, now = old["G_ema" if network == "G" else "D"][key], new[network][key]
        assert now.shape[1] == 2
        assert torch.equal(now[:, 0], was[:, labels.index("star")])
        assert not any(torch.equal(now[:, 1], column) for column in was.T)


def test_an_exported_generator_will_do(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "g.safetensors"
    export(compose_as(ExportConfig, "export", f"ckpt={source}", "to=safetensors", f"out={out}"))
    train_in_process(tmp_path / "new", *WIDTHS, *SHORT, f"init={out}")
    old, new = state_of(source), state_of(tmp_path / "new")
    assert torch.equal(old["G_ema"]["input.basis"], new["G"]["input.basis"])


def test_a_resumed_run_does_not_read_the_source_again(source: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(source, moved)
    words = [*WIDTHS, f"init={moved}", "schedule_kimg=0.08"]
    train_in_process(tmp_path / "a", *words, "total_kimg=0.08")
    train_in_process(tmp_path / "b", *words, "total_kimg=0.04")
    shutil.rmtree(moved)
    train_in_process(tmp_path / "b", *words, "total_kimg=0.08")
    a, b = state_of(tmp_path / "a"), state_of(tmp_path / "b")
    assert a["init"] == b["init"]
    for name, value in a["G"].items():
        assert torch.equal(value, b["G"][name]), name
    with pytest.raises(UserError, match="the run has begun with it"):
        train_in_process(tmp_path / "b", *WIDTHS, f"init={source}", "total_kimg=0.1")


def test_frozen_stages_keep_their_weights(source: Path, tmp_path: Path) -> None:
    words = [*WIDTHS, f"init={source}", "freeze_d=1", "total_kimg=0.04"]
    train_in_process(tmp_path / "new", *words)
    old, new = state_of(source)["D"], state_of(tmp_path / "new")["D"]
    frozen = [name for name in old if name.startswith(("from_rgb", "stages.0", "transitions.0"))]
    assert len(frozen) > 5
    assert all(torch.equal(old[name], new[name]) for name in frozen)
    assert not torch.equal(old["stages.1.0.act_a.bias"], new["stages.1.0.act_a.bias"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["init=missing"], "init=missing: "),
        (["init={source}", "size.g_widths=[16,16,16]"], "other sizes of networks"),
        (["init={source}", "freeze_d=2"], "freeze_d=2: must be below the 2 stages"),
        (["init={source}", "freeze_d=1", "data.resolution=32"], "needs a discriminator of 32 px"),
        (["init={source}", "size.z_dim=16"], "other sizes of networks"),
        (["freeze_d=1"], "freeze_d=1: needs init=CKPT"),
        (["init={torn}"], "init="),
        (["init={foreign}"], "not a generator that vgan-export wrote"),
    ],
)
def test_bad_input_begins_nothing(
    source: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    torn, foreign = tmp_path / "torn.safetensors", tmp_path / "foreign.safetensors"
    torn.write_bytes(checkpoint.find(source).read_bytes()[:5000])
    save_file({"weight": torch.zeros(3)}, foreign)
    words = [w.format(source=source, torn=torn, foreign=foreign) for w in words]
    with pytest.raises(UserError, match=message):
        train_in_process(tmp_path / "new", *WIDTHS, *words)
    assert not (tmp_path / "new").exists()


def test_a_higher_resolution_is_refused(source: Path, tmp_path: Path) -> None:
    big = tmp_path / "big"
    train_in_process(big, *WIDTHS, *SHORT, "data.resolution=32")
    with pytest.raises(UserError, match="higher resolution"):
        train_in_process(tmp_path / "new", *WIDTHS, f"init={big}")

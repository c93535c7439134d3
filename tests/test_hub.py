"""Models to and from the Hugging Face Hub, which a server in this process stands in for."""

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import SMALL, make_checkpoint
from hub_server import TOKEN, Hub, Repo, direct, serving, sha_of
from hydra import initialize_config_dir
from safetensors import safe_open
from safetensors.torch import save

from vgan import cli, load_generator
from vgan.apps import hub_export, model_card
from vgan.evaluation.evaluate import evaluate
from vgan.inference.latents import latents
from vgan.inference.load import load_discriminator, load_model
from vgan.inference.sample import sample
from vgan.runtime import hub as vgan_hub
from vgan.runtime.errors import UserError
from vgan.schema import CONFIG_DIR
from vgan.training.initialize import read_source

PROTOCOLS = {"fid": {"features": "Inception", "seeds": [0, 1]}, "kid": {"features": "learned"}}
FILES = ["README.md", "config.json", "model.safetensors", "samples.png"]


class Pixels:
    """Features that need no weights."""

    protocol = "images of 2 px"

    def to(self, device: torch.device) -> "Pixels":
        return self

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1), None


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint of 40 images, evaluated by two protocols."""
    folder = tmp_path_factory.mktemp("private") / "mine"
    images = "data.size=40"
    make_checkpoint(folder, images, f"run_dir='{folder}'", noise=0.05)
    lines = [
        {"cur_nimg": 20, "fid": 777.0, "protocol": PROTOCOLS["fid"]},
        {"cur_nimg": 40, "fid": 888.0, "protocol": PROTOCOLS["fid"]},
        {"cur_nimg": 40, "fid": 12.5, "fid_std": 0.25, "protocol": PROTOCOLS["fid"]},
        {"cur_nimg": 40, "kid": 0.0125, "protocol": PROTOCOLS["kid"]},
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with serving() as server:
        direct(server.url, str(tmp_path / "cache"), TOKEN, monkeypatch)
        yield server


def command(program: str, *words: object) -> Any:
    """Return the typed config of a command."""
    return cli.compose(program, list(map(str, words)))


def export(*words: object) -> Path | str:
    cfg = command("vgan-export", *words)
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return hub_export.export(cfg, cli.compose_train)


def front_matter(card: str) -> dict[str, Any]:
    _, fields, _ = card.split("---\n", 2)
    return yaml.safe_load(fields)


# --- upload --------------------------------------------------------------------------------------


def test_an_upload_is_one_commit_of_four_files(
    hub: Hub, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = export(f"ckpt='{run_dir}'", "to=hub", "repo=ada/mine", "license=CC-BY-4.0")
    assert url == f"{hub.url}/ada/mine"
    assert str(url) in capsys.readouterr().out
    (files,) = hub.repos["ada/mine"].commits
    assert sorted(files) == FILES
    assert not hub.repos["ada/mine"].private
    ours, theirs = (load_generator(name, "cpu") for name in (run_dir, "hf://ada/mine"))
    z, c = latents(ours, torch.arange(3), seed=0)
    assert torch.equal(ours(z, c), theirs(z, c))
    assert theirs.label_names == ours.label_names
    sample(command("vgan-sample", "ckpt=hf://ada/mine", "n=64", "out=drawn.png", "device=cpu"))
    assert Path("drawn.png").read_bytes() == files["samples.png"]
    assert json.loads(files["config.json"])["training"]["model"]["name"] == "attn"


def test_the_card_says_what_the_model_is(hub: Hub, run_dir: Path) -> None:
    export(f"ckpt='{run_dir}'", "to=hub", "repo=ada/mine", "license=CC-BY-4.0", "private=true")
    assert hub.repos["ada/mine"].private
    card = hub.repos["ada/mine"].commits[0]["README.md"].decode()
    fields = front_matter(card)
    assert fields["library_name"] == "vgan"
    assert fields["license"] == "cc-by-4.0"
    assert fields["pipeline_tag"] == "unconditional-image-generation"
    for text in ("0123456789", "16 x 16 px", "circle, square", "| CC-BY-4.0 |", "samples.png"):
        assert text in card
    # The newest evaluation of these weights by each protocol, and no other.
    assert "12.500 ± 0.250" in card
    assert "0.01250" in card
    assert "seeds: 0, 1" in card
    assert "777" not in card
    assert "888" not in card
    (training,) = re.findall(r"^(vgan-train .*?)\n```", card, re.M | re.S)
    assert "data.size=40" in training
    assert "run_dir=outputs/mine" in training
    assert str(run_dir.parent) not in card + str(hub.repos["ada/mine"].commits[0])


@pytest.mark.parametrize("labels", [("cat", "dog"), ()])
def test_the_snippets_of_the_card_run(hub: Hub, tmp_path: Path, labels: tuple[str, ...]) -> None:
    ckpt = make_checkpoint(tmp_path / "run", "model=plain", labels=labels)
    export(f"ckpt='{ckpt}'", "to=hub", "repo=ada/mine")
    card = hub.repos["ada/mine"].commits[0]["README.md"].decode()
    assert "license" not in front_matter(card)
    assert "not evaluated" in card
    (body,) = re.findall(r"```python\n(.*?)```", card, re.S)
    assert body.count("\n") == 3
    names: dict[str, Any] = {}
    exec(body, names)
    assert names["images"].shape == (16, 3, 16, 16)
    (words,) = re.findall(r"^vgan-sample (.*)$", card, re.M)
    drawn = sample(command("vgan-sample", *words.split(), "device=cpu"))
    assert drawn.read_bytes() == hub.repos["ada/mine"].commits[0]["samples.png"]


def test_a_folder_takes_the_files_instead(hub: Hub, run_dir: Path, tmp_path: Path) -> None:
    words = (f"ckpt='{run_dir}'", "to=hub", "repo=ada/mine", "out=card")
    for _ in range(2):  # its own files are replaced
        assert export(*words) == Path("card")
    assert sorted(path.name for path in Path("card").iterdir()) == FILES
    assert not [request for request in hub.requests if "agent" not in request]
    Path("card", "mine.txt").touch()
    with pytest.raises(UserError, match="out=card: contains files other than a model's"):
        export(*words)


def test_an_export_keeps_license_and_metrics(uploaded: Hub) -> None:
    export("ckpt=hf://ada/mine", "to=hub", "repo=ada/copy")
    card = uploaded.repos["ada/copy"].commits[0]["README.md"].decode()
    assert front_matter(card)["license"] == "other"
    assert front_matter(card)["license_name"] == "my-own 1.0"
    assert "0.01250" in card
    export("ckpt=hf://ada/copy", "to=safetensors", "out=g.safetensors")
    with safe_open("g.safetensors", framework="pt") as file:
        assert file.metadata()["license"] == "my-own 1.0"


def test_paths_of_the_machine_are_not_published() -> None:
    config = {"data": {"path": "/home/ada/cats", "urls": ["~/s-{0..9}.tar", "s3://b/x.tar"]}}
    assert hub_export.shorten_paths({**config, "init": "../secret/a.pt", "seed": 0}) == {
        "data": {"path": "cats", "urls": ["s-{0..9}.tar", "s3://b/x.tar"]},
        "init": "a.pt",
        "seed": 0,
    }


def test_identifiers_of_licenses_are_those_of_the_hub() -> None:
    assert {"mit", "cc0-1.0", "apache-2.0", "other"} <= model_card.LICENSES


@pytest.mark.parametrize(
    ("words", "token", "text"),
    [
        (["repo=ada/new"], None, "repo=ada/new: an upload needs a login; log in with"),
        (["repo=ada/new"], "wrong", "repo=ada/new: the Hub does not accept the token"),
        (["repo=bob/new"], TOKEN, r"repo=bob/new: no permission \(.*rights.*\); use a token"),
        (["repo=ada/locked"], TOKEN, "repo=ada/locked: no permission"),
        (["repo=ada/bert"], TOKEN, "repo=ada/bert: its card does not say library_name: vgan"),
        (["repo=ada/locked", "private=true"], TOKEN, "private=true: the repo exists and is public"),
        (["repo=new"], TOKEN, "repo=new: must be USER/MODEL"),
        ([], TOKEN, "repo=null: to=hub needs repo=USER/MODEL"),
        (["to=onnx", "repo=ada/new"], TOKEN, "repo=ada/new: goes with to=hub"),
        (["to=onnx", "private=true"], TOKEN, "private=true: goes with to=hub"),
    ],
)
def test_a_refused_upload_changes_nothing(
    hub: Hub, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    words: list[str], token: str | None, text: str,
) -> None:  # fmt: skip
    hub.repos["ada/bert"] = Repo([{"model.safetensors": b""}])
    hub.repos["ada/locked"] = Repo([{"README.md": b""}])
    hub.locked.add("ada/locked")
    direct(hub.url, str(tmp_path / "cache"), token, monkeypatch)
    with pytest.raises(UserError, match=f"^{text}") as caught:
        export(f"ckpt='{run_dir}'", "to=hub", *words)
    assert "\n" not in str(caught.value)
    assert hub.repos.keys() == {"ada/bert", "ada/locked"}
    assert all(len(repo.commits) == 1 for repo in hub.repos.values())


def test_a_refused_card_leaves_an_empty_repo_and_says_so(hub: Hub, run_dir: Path) -> None:
    hub.rejected_card = '"license" must be one of ...'
    with pytest.raises(UserError, match=r'"license" must be .*; the new repo is there and empty'):
        export(f"ckpt='{run_dir}'", "to=hub", "repo=ada/new")
    assert hub.repos["ada/new"].commits == []


def test_an_upload_without_a_network(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct("http://127.0.0.1:9", str(tmp_path), TOKEN, monkeypatch)
    with pytest.raises(UserError, match=r"^repo=ada/new: the Hub cannot be reached"):
        export(f"ckpt='{run_dir}'", "to=hub", "repo=ada/new")


# --- download ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an upload of the run contains."""
    out = tmp_path_factory.mktemp("hub") / "card"
    export(f"ckpt='{run_dir}'", "to=hub", "repo=ada/mine", "license=my-own 1.0", f"out='{out}'")
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture
def uploaded(hub: Hub, run_dir: Path, files: dict[str, bytes]) -> Hub:
    """A Hub with the export ada/mine, and ada/raw with the same checkpoint under its own name."""
    hub.repos["ada/mine"] = Repo([files])
    content = next(run_dir.glob("checkpoint-*")).read_bytes()
    hub.repos["ada/raw"] = Repo([{"checkpoint-000000040.safetensors": content}])
    return hub


def test_addresses_of_revisions_and_files(uploaded: Hub) -> None:
    uploaded.repos["ada/mine"].commits.append({"b.safetensors": b""})  # main has no model any more
    for revision in ("v1", sha_of("ada/mine", 1)):
        assert load_model(f"hf://ada/mine@{revision}").title == "ada/mine"
    raw = "hf://ada/raw/checkpoint-000000040.safetensors"
    assert load_discriminator(raw, "cpu").training is False
    with pytest.raises(UserError, match="no discriminator"):
        load_discriminator("hf://ada/mine@v1", "cpu")
    with pytest.raises(UserError, match=r"such as hf://ada/mine/b\.safetensors"):
        load_model("hf://ada/mine")


def test_every_command_takes_an_address(
    uploaded: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("device=cpu", "batch_size=20", "n=20", "metrics=[fid]")
    address = "hf://ada/mine"
    evaluate(command("vgan-eval", f"ckpt={address}", *small, "features._target_=test_hub.Pixels"))
    assert "hf://ada/mine   fid" in capsys.readouterr().out
    assert not list(tmp_path.rglob("metrics.jsonl"))
    assert not list(tmp_path.rglob("nearest-*"))
    assert export(f"ckpt={address}", "to=safetensors", "out=g.safetensors") == Path("g.safetensors")
    assert read_source(address).resolution == 16
    with pytest.raises(UserError, match="to=checkpoint: an exported generator has no disc"):
        export(f"ckpt={address}", "to=checkpoint")
    with pytest.raises(UserError, match="no discriminator"):
        sample(command("vgan-sample", f"ckpt={address}", "show=patches", "device=cpu"))


def test_a_cached_model_needs_no_network(
    uploaded: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_model("hf://ada/mine")
    direct("http://127.0.0.1:9", str(tmp_path / "cache"), None, monkeypatch)
    assert load_model("hf://ada/mine").title == "ada/mine"
    with pytest.raises(UserError, match=r"^ckpt=hf://ada/raw: the Hub cannot be reached"):
        load_model("hf://ada/raw")


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("hf://ada", "not an address of a model; give hf://USER/MODEL"),
        ("hf://", "not an address of a model"),
        ("hf://ada/mine@", "not an address of a model"),
        ("hf://ada/../mine", "not an address of a model|only .safetensors"),
        ("hf://ada/mine/model.pt", "only .safetensors files are read from the Hub"),
        ("hf://ada/none", "no such model on the Hub, or it is private; check the name"),
        ("hf://ada/gated", "the model is gated; accept its terms on .*/ada/gated"),
        ("hf://ada/mine@v9", "the model has no revision v9"),
        ("hf://ada/raw", "has no model.safetensors; give a file of it, such as hf://ada/raw/check"),
        ("hf://ada/text", "has no model.safetensors and no other .safetensors file"),
        ("hf://ada/bert", "model.safetensors is not a model of vgan"),
        ("hf://ada/pickle", "model.safetensors is not a model of vgan"),
        ("hf://ada/broken", "the Hub answered with an error"),
    ],
)
def test_what_cannot_be_downloaded(uploaded: Hub, address: str, text: str) -> None:
    foreign = save({"w": torch.zeros(1000)}, {"format": "pt"})
    uploaded.repos |= {
        "ada/gated": Repo(refuses=(403, "GatedRepo")),
        "ada/broken": Repo(refuses=(418, "Teapot")),
        "ada/text": Repo([{"README.md": b""}]),
        "ada/bert": Repo([{"model.safetensors": foreign}]),
        "ada/pickle": Repo([{"model.safetensors": b"PK\x03\x04" + bytes(100)}]),
    }
    uploaded.requests.clear()
    with pytest.raises(UserError, match=f"^ckpt={re.escape(address)}: .*{text}") as caught:
        load_model(address)
    assert "\n" not in str(caught.value)
    # Only the header of a foreign file was read.
    assert not [r for r in uploaded.requests if r.startswith("HEAD") and "/model.saf" in r]
    with pytest.raises(UserError, match=f"^init={re.escape(address)}: (?!ckpt)"):
        read_source(address)


def test_a_foreign_file_in_the_cache_is_refused(uploaded: Hub) -> None:
    path = vgan_hub.download("hf://ada/mine")
    path.resolve().write_bytes(save({"w": torch.zeros(10)}))
    with pytest.raises(UserError, match=r"model\.safetensors is not a model of vgan"):
        load_model("hf://ada/mine")


def test_a_full_disk_is_one_line(uploaded: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(
        UserError, match=r"cache \(No space left on device\); free space, or set HF_"
    ):
        load_model("hf://ada/mine")


def test_a_command_finds_the_hub_by_its_environment(uploaded: Hub, tmp_path: Path) -> None:
    names = {"HF_ENDPOINT": uploaded.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    code = "from vgan.cli import sample_main; sample_main()"
    words = ["ckpt=hf://ada/mine@v1/model.safetensors", "n=4", "device=cpu"]
    command = [sys.executable, "-c", code, *words]
    subprocess.run(command, check=True, env={**os.environ, **names}, cwd=tmp_path)
    assert (tmp_path / "grid.png").stat().st_size > 500


def test_models_without_a_hub_are_named_by_folder_or_file(run_dir: Path, tmp_path: Path) -> None:
    assert load_model(run_dir).title == "mine"
    out = export(f"ckpt='{run_dir}'", "to=safetensors", f"out='{tmp_path / 'cats.safetensors'}'")
    assert load_model(out).title == "cats"
    assert SMALL[0] == "data=shapes"
    assert load_model(out).state["config"]["data"]["name"] == "shapes"

"""The command line as a user meets it: what works, and one clear line for what cannot."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seams
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from vgan import cli, load_generator
from vgan.config import SampleConfig, TrainConfig
from vgan.runs import checkpoint
from vgan.schema import CONFIG_DIR, explained_keys
from vgan.training.setup import setup

TINY = [
    *("data=shapes", "data.resolution=16", "data.size=64"),
    *("size.g_widths=[8,8,8]", "size.d_widths=[8,8,8]", "batch_size=8", "device=cpu"),
    *("total_kimg=0.032", "tick_kimg=0.016", "snapshot_kimg=0.016", "checkpoint_kimg=0.016"),
]


class Cli:
    """Runs a console script in this process and keeps what it printed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, main: Callable[[], None], *argv: object) -> tuple[int, str, str]:
        self._monkeypatch.setattr(sys, "argv", [main.__name__, *map(str, argv)])
        code = 0
        try:
            main()
        except SystemExit as e:
            code = int(e.code or 0)
        out, err = self._capsys.readouterr()
        return code, out, re.sub(r".*\r", "", err)  # without the progress bar

    def train(self, *argv: object) -> tuple[int, str, str]:
        return self(cli.train_main, *argv)

    def sample(self, *argv: object) -> tuple[int, str, str]:
        return self(cli.sample_main, *argv)

    def evaluate(self, *argv: object) -> tuple[int, str, str]:
        return self(cli.eval_main, *argv)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    monkeypatch.chdir(tmp_path)
    return Cli(monkeypatch, capsys)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of TINY, trained once with run_dir=r."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("VGAN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.setattr(sys, "argv", ["vgan-train", *TINY, "run_dir=r"])
        cli.train_main()
    return folder / "r"


@pytest.fixture
def r(trained: Path, run: Cli, tmp_path: Path) -> Path:
    """A copy of the finished run as the folder r of the test."""
    shutil.copytree(trained, tmp_path / "r")
    return tmp_path / "r"


def size_of(path: str) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def message(code: int, out: str, err: str, expect_code: int = 1) -> str:
    """The one line of a failed command."""
    assert code == expect_code, (out, err)
    lines = [
        line for line in err.splitlines() if line.strip() and "img/s" not in line
    ]  # but for a progress bar
    assert len(lines) == 1, err
    return lines[0]


# --- what works ---


def test_train_writes_the_run_folder_then_is_complete_then_samples(
    run: Cli, tmp_path: Path
) -> None:
    code, out, _ = run.train(*TINY, "run_dir=outputs/mine")
    assert code == 0
    assert "vgan-sample ckpt=outputs" in out
    folder = tmp_path / "outputs" / "mine"
    names = {p.name for p in folder.iterdir() if "tfevents" not in p.name}
    assert names == {
        *(".lock", "config.yaml", "starts.jsonl", "stats.jsonl"),
        *("reals.png", "fakes-000000016.png", "fakes-000000032.png"),
        *("checkpoint-000000016.safetensors", "checkpoint-000000032.safetensors"),
    }
    assert list(folder.glob("events.out.tfevents.*"))
    ticks = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    assert [t["cur_nimg"] for t in ticks] == [16, 32]
    wanted = "loss/D loss/G logits/real logits/fake penalty/r1 penalty/r2 grad_norm/D grad_norm/G"
    wanted += " memory/peak_gb lr_G lr_D gamma augment_p speed/img_per_s"
    assert set(wanted.split()) <= ticks[0].keys()
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    code, out, _ = run.train(*TINY, "run_dir=outputs/mine")
    assert code == 0
    assert "is complete" in out
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before

    code, out, _ = run.sample("ckpt=outputs/mine", "n=9", "seed=3", "out=grid.png", "device=cpu")
    assert code == 0
    assert size_of("grid.png") == (3 * 64, 3 * 64)
    first = Path("grid.png").read_bytes()
    run.sample(
        f"ckpt={folder / 'checkpoint-000000032.safetensors'}",
        "n=9",
        "seed=3",
        "out=again.png",
        "batch_size=4",
        "device=cpu",
    )
    assert Path("again.png").read_bytes() == first
    run.sample("ckpt=outputs/mine", "n=9", "seed=4", "out=other.png", "device=cpu")
    assert Path("other.png").read_bytes() != first
    code, _, _ = run.sample(
        "ckpt=outputs/mine", "n=3", "label=heart", "truncation=0.5", "out=files", "device=cpu"
    )
    assert sorted(p.name for p in Path("files").iterdir()) == [
        "000000.png",
        "000001.png",
        "000002.png",
    ]
    assert size_of("files/000000.png") == (16, 16)

    G = load_generator(folder, device="cpu")
    images = G(torch.randn(2, G.z_dim), torch.eye(8)[:2])  # type: ignore[call-overload]
    assert images.shape == (2, 3, 16, 16)
    assert not images.requires_grad
    assert G.label_names[7] == "heart"  # type: ignore[index]


def test_a_longer_run_resumes_and_keeps_the_newest_checkpoints(run: Cli, r: Path) -> None:
    code, out, _ = run.train(*TINY, "run_dir=r", "total_kimg=0.064", "keep_checkpoints=2")
    assert code == 0
    assert "at 32 images" in out
    names = sorted(p.name for p in r.glob("checkpoint-*"))
    assert names == ["checkpoint-000000048.safetensors", "checkpoint-000000064.safetensors"]
    starts = [json.loads(line) for line in (r / "starts.jsonl").read_text().splitlines()]
    assert [start["cur_nimg"] for start in starts] == [0, 32]
    assert starts[1]["data"]["images"] == 64


@pytest.mark.parametrize("model", ["plain", "adaptive"])  # the others: test_build.py
def test_models_train(run: Cli, tmp_path: Path, model: str) -> None:
    code, out, _ = run.train(*TINY, f"model={model}", "run_dir=r")
    assert code == 0
    assert re.search(r"G +[\d,]+ parameters, [\d.,]+ M multiply-adds", out)
    assert "each logit sees" in out
    tick = json.loads((tmp_path / "r" / "stats.jsonl").read_text().splitlines()[-1])
    assert np.isfinite(list(tick.values())).all()


def test_folder_with_labels_and_fp32_and_bf16(run: Cli, pictures_npy: Path) -> None:
    for precision in ("fp32", "bf16"):
        argv = [a for a in TINY if not a.startswith("data")]
        argv += [
            "data=folder",
            f"data.path={pictures_npy}",
            "data.resolution=16",
            f"precision={precision}",
            f"run_dir={precision}",
        ]
        code, out, err = run.train(*argv)
        assert code == 0, err
        assert "40 images of 16 px, 3 channels, 4 classes" in out
        assert f", {precision}" in out


def test_sweep_gives_every_job_a_folder(run: Cli, tmp_path: Path) -> None:
    code, _, err = run.train("-m", *TINY, "model=sep,conv", "run_dir=sweep")
    assert code == 0, err
    folders = [
        p.parent.name for p in (tmp_path / "sweep").rglob("checkpoint-000000032.safetensors")
    ]
    assert sorted(folders) == ["model=conv", "model=sep"]


def test_help_explains_every_group_option_and_key(run: Cli) -> None:
    code, out, _ = run.train("--help")
    assert code == 0
    for name, _ in explained_keys(TrainConfig):
        assert re.search(rf"^  {name} ", out, re.M), name
    assert re.search(r"data.skip_bad +true skips unreadable", out)
    for path in CONFIG_DIR.glob("*/*.yaml"):
        entry = f"  {path.parent.name}={path.stem} "
        line = next(line for line in out.splitlines() if line.startswith(entry))
        assert len(line.split(maxsplit=1)[1]) > 8, f"{path.name} begins with no explanation"
    code, out, _ = run.sample("--help")
    assert all(re.search(rf"^  {name}\b", out, re.M) for name, _ in explained_keys(SampleConfig))


def test_help_needs_no_torch() -> None:
    code = "import sys; from vgan.cli import train_main; sys.argv = ['vgan-train', '--help']; "
    code += "train_main(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_defaults_for_a_data_set_can_be_switched_off() -> None:
    assert cli.compose("vgan-train", ["data=shapes"]).batch_size == 32
    off = cli.compose("vgan-train", ["data=shapes", "defaults_for=none"])
    assert (off.batch_size, off.data["name"]) == (128, "shapes")
    other = cli.compose("vgan-train", ["data=shapes", "defaults_for=cifar10"])
    assert (other.batch_size, other.size.name, other.augment.name) == (256, "s", "scheduled")


def test_the_defaults_of_own_images_suit_the_size() -> None:
    for name, key in (("folder", "path"), ("hf", "repo"), ("webdataset", "urls")):
        words = [f"data={name}", f"data.{key}=x"]
        assert cli.compose("vgan-train", words).batch_size == 64  # size=s
        assert cli.compose("vgan-train", [*words, "size=xs"]).batch_size == 16
        assert cli.compose("vgan-train", [*words, "size=xs", "batch_size=8"]).batch_size == 8
        assert cli.compose("vgan-train", words).size.modulation
        assert not cli.compose("vgan-train", [*words, "size.modulation=false"]).size.modulation


@pytest.mark.parametrize("path", sorted((CONFIG_DIR / "data").glob("*.yaml")), ids=lambda p: p.stem)
def test_data_files_hold_data_only(path: Path) -> None:
    content = OmegaConf.load(path)
    assert isinstance(content, DictConfig)
    assert content.keys() == {"defaults", "data"}
    assert content.defaults == [{"override /defaults_for": path.stem}]


def test_old_names_work_with_a_line_that_says_what_to_write(run: Cli, r: Path) -> None:
    code, _, err = run.sample("ckpt=r", "n=1", "show=pictures", "device=cpu")
    assert code == 0
    line = "show=pictures: renamed, write show=images; the next release removes it\n"
    assert err == line
    code, out, err = run.train("--cfg", "job", "size.pixel_block=1", "penalty=exact")
    assert code == 0
    assert "patch_size: 1" in out
    assert "penalty: double_backward" in out
    assert "size.pixel_block=1: renamed, write size.patch_size=1" in err
    assert "penalty=exact: renamed, write penalty=double_backward" in err


def test_data_files_of_earlier_versions(run: Cli, tmp_path: Path) -> None:
    """They set keys of training, which vgan-train still reads and vgan-data explains."""
    (tmp_path / "mine" / "data").mkdir(parents=True)
    for name, text in {
        "a": "defaults:\n  - override /size: s\ndata: {name: a}\n",
        "b": "data: {name: b}\nbatch_size: 7\n",
    }.items():
        path = tmp_path / "mine" / "data" / f"{name}.yaml"
        path.write_text(f"# @package _global_\n{text}")
        code, out, _ = run.train("--config-dir=mine", "--cfg", "job", f"data={name}")
        assert code == 0
        assert ("batch_size: 7" in out) == (name == "b")
        line = message(*run(cli.data_main, "--config-dir=mine", f"data={name}"), 2)
        assert re.match(rf"vgan-data: data={name}: .*; move it to defaults_for/{name}.yaml", line)


def test_console_scripts_exist_and_compose_without_training(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("vgan-train.exe" if os.name == "nt" else "vgan-train")
    done = subprocess.run(
        [str(script), "--cfg", "job", "data=cifar10"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "name: cifar10" in done.stdout
    assert list(tmp_path.iterdir()) == []


# --- bad input ---


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("total_king=1", "total_king=1: unknown key total_king; did you mean total_kimg"),
        ("optim.lr_Q.start=1", "optim.lr_Q.start"),
        ("data.colour=red", "data.colour=red: unknown key"),
        ("batch_size=abc", "batch_size=abc: .*'abc'.*could not be converted to Integer"),
        ("total_kimg=ten", "total_kimg=ten: .*'ten'.*could not be converted to Float"),
        (
            "model=transformer",
            "model=transformer: no such option; use one of adaptive, attn, conv, plain, sep",
        ),
        ("data=folder", "data.path: must be given"),
        ("batch_size=", "batch_size"),
        ("size.g_widths=5", "g_widths"),
        ("size=3", "size=3: no such option; use one of l, m, s, xl, xs"),
        ("loss.gamma=3", "loss.gamma=3: has two ends; give loss.gamma.start and loss.gamma.end"),
        ("nonsense", "nonsense: cannot be parsed; give KEY=VALUE"),
    ],
)
def test_usage_errors_name_the_override(run: Cli, tmp_path: Path, override: str, says: str) -> None:
    line = message(*run.train(override, "device=cpu"), expect_code=2)
    assert re.search(says, line), line
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("word", ["loss.gamma.start=2", "loss.gamma={start:2,end:1}"])
def test_a_gamma_that_auto_would_ignore_is_refused(run: Cli, tmp_path: Path, word: str) -> None:
    line = message(*run.train("gamma=auto", word, "device=cpu"), expect_code=1)
    rule = "has no effect with gamma=auto; add gamma=schedule or leave it out"
    assert line.endswith(f"{word}: {rule}")
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("batch_size=0", "batch_size=0: must be above 0"),
        ("total_kimg=-1", "total_kimg=-1"),
        ("total_kimg=inf", "total_kimg=inf: must be from 0.001"),
        ("ema=${seed}", "ema=0: has keys of its own"),
        ("loss.gamma=${seed}", "loss.gamma=0: has keys of its own"),
        ("size.g_widths=${seed}", "size.g_widths=0: must be a list of int"),
        ("total_kimg=1e-9", "total_kimg=1e-09: must be from 0.001 to 1e\\+09"),
        ("seed=-1", "seed=-1: must be at least 0"),
        ("precision=fp8", "precision=fp8: must be one of auto, fp32"),
        ("precision=fp16", "precision=fp16: needs a CUDA GPU"),
        ("compile=maybe", "compile=maybe: must be one of auto, true, false"),
        ("device=tpu", "device=tpu: unknown; use auto, cpu"),
        ("device=cuda", "device=cuda: this machine has no CUDA GPU"),
        ("augment.p.start=2", "augment.p.start=2"),
        ("optim.beta1=1", "optim.beta1=1"),
        ("loss.name=nash", "loss.name=nash: unknown; use one of rpgan"),
        ("augment.transforms=[swirl]", "augment.transforms=.*swirl.*unknown"),
        ("size.g_widths=[8,8]", r"model.generator.widths=\[8, 8\]: 16 px needs 3"),
        ("size.z_dim=0", "size.z_dim=0"),
        ("model.generator.conv=magic", "model.generator.conv=magic"),
        (
            "model.generator._target_=nowhere.G",
            "model.generator._target_=nowhere.G: cannot be imported",
        ),
        ("model.discriminator.patch_px=4", "model.discriminator.patch_px=4: must be from 16"),
        ("model.discriminator.patch_px=far", "model.discriminator.patch_px=far: must be"),
        ("data.resolution=17", "data.resolution=17: must be N or .H,W. from 16 to 1024 px"),
        ("data.size=1", "training needs at least 2"),
        (
            "optim.optimizer._target_=torch.optim.Atom",
            "optim.optimizer._target_=torch.optim.Atom: cannot be imported",
        ),
        (
            "+optim.optimizer.speed=3",
            "optim.optimizer.speed=3: vgan.training.soap.SOAP has no such argument",
        ),
    ],
)
def test_bad_values_name_key_value_and_rule(
    run: Cli, tmp_path: Path, override: str, says: str
) -> None:
    if override == "device=cuda" and torch.cuda.is_available():
        override, says = "device=cuda:99", "device=cuda:99: this machine has"
    extra = ["size.patch_size=1"] if "widths" in override else []
    line = message(*run.train(*TINY, *extra, override, "run_dir=r"))
    assert re.search(says, line), line
    assert not (tmp_path / "r").exists()


def folder_case(kind: str, tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    if kind == "one":
        Image.new("RGB", (20, 20)).save(folder / "a.png")
    if kind == "bad":
        for name in "ab":
            (folder / f"{name}.jpg").write_bytes(b"not a jpeg")
    return tmp_path / "elsewhere" if kind == "missing" else folder


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", "no such folder"),
        ("empty", "no images"),
        ("one", "only one image"),
        ("bad", "2 unreadable.*data.skip_bad=true"),
    ],
)
def test_bad_folders(run: Cli, tmp_path: Path, kind: str, says: str) -> None:
    line = message(
        *run.train(
            "data=folder", f"data.path={folder_case(kind, tmp_path)}", "run_dir=r", "device=cpu"
        )
    )
    assert re.search(says, line), line
    assert not (tmp_path / "r").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_corrupt_checkpoint_is_named_and_the_one_before_still_serves(run: Cli, r: Path) -> None:
    newest = r / "checkpoint-000000032.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1000])
    damaged = newest.read_bytes()
    assert "not a readable checkpoint" in message(*run.sample(f"ckpt={newest}", "device=cpu"))
    code, out, _ = run.sample("ckpt=r", "device=cpu")
    assert code == 0
    assert "r/checkpoint-000000032.safetensors: not a readable checkpoint" in out
    code, out, _ = run.train(*TINY, "run_dir=r")
    assert code == 0
    assert "r/checkpoint-000000032.safetensors: not a readable checkpoint" in out
    assert "at 16 images" in out
    assert (r / "damaged-checkpoint-000000032.safetensors").read_bytes() == damaged


def test_a_run_without_a_readable_checkpoint_is_not_changed(run: Cli, r: Path) -> None:
    """A fresh start would truncate its statistics, and the damaged files may be repairable."""
    for path in checkpoint.all_checkpoints(r):
        path.write_bytes(path.read_bytes()[:-1000])
    before = contents(r)
    for _ in range(2):
        line = message(*run.train(*TINY, "run_dir=r"))
        assert "run_dir=r: none of its 2 checkpoints can be read" in line
        assert "use another run_dir" in line
        assert contents(r) == before


@pytest.mark.parametrize("why", ["format", "permissions", "memory"])
def test_a_sound_checkpoint_that_cannot_be_read_here_is_not_called_damaged(
    run: Cli, r: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    newest, opened = checkpoint.find(r), Path.open
    says = {
        "format": "has format 99",
        "permissions": "(Permission denied); check its",
        "memory": "do not fit into memory",
    }[why]
    if why == "format":
        parts = checkpoint.load(newest)
        monkeypatch.setattr(checkpoint, "FORMAT", 99)
        checkpoint.save(newest, parts, keep=9)
        monkeypatch.setattr(checkpoint, "FORMAT", 3)
    elif why == "permissions":

        def refusing(path: Path, *arguments: Any, **named: Any) -> Any:
            if path.name == newest.name:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return opened(path, *arguments, **named)

        monkeypatch.setattr(Path, "open", refusing)
    else:
        short = RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 10000000000 bytes."
        )

        def load(*_: Any, **__: Any) -> Any:
            raise short

        monkeypatch.setattr(checkpoint, "safe_open", load)
    before = set(r.iterdir())
    line = message(*run.train(*TINY, "run_dir=r", "total_kimg=0.064"))
    assert newest.name in line
    assert says in line
    assert set(r.iterdir()) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
@pytest.mark.parametrize("swallowed", [False, True])
def test_a_polite_kill_before_the_first_step_asks_for_a_restart(
    run: Cli, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, swallowed: bool
) -> None:
    def pre_empted(*args: Any) -> Any:
        with contextlib.suppress(*([SystemExit] if swallowed else [])):
            signal.raise_signal(number)
        return setup(*args)

    seams.replace_setup(pre_empted, monkeypatch)
    code, out, _ = run.train(*TINY, "run_dir=r")
    assert signal.getsignal(number) == signal.SIG_DFL  # as it was before
    assert code == 75
    assert out.splitlines()[-1].lower().startswith("vgan-train: stopped before the first step")
    assert not Path("r/stats.jsonl").exists()


def test_checkpoint_of_another_model_or_of_other_data_is_refused(
    run: Cli, r: Path, tmp_path: Path
) -> None:
    before = contents(r)
    line = message(*run.train(*TINY, "run_dir=r", "model=conv"))
    assert (
        "holds another model or optimizer (model.generator.attention was self, is now none)" in line
    )
    assert "give model.generator.attention=self, or use another run_dir" in line
    other = message(*run.train(*TINY, "run_dir=r", "optim.optimizer._target_=torch.optim.AdamW"))
    assert "_target_ was vgan.training.soap.SOAP, is now torch.optim.AdamW" in other
    assert "give optimizer=soap, or use another run_dir" in other
    assert "other data (data.seed was 0, is 9)" in message(
        *run.train(*TINY, "run_dir=r", "data.seed=9")
    )
    assert contents(r) == before
    torch.save({"anything": 1}, tmp_path / "x.pt")
    assert "not a vgan checkpoint" in message(*run.sample("ckpt=x.pt", "device=cpu"))


@pytest.mark.parametrize(
    "swallowed",
    [None, ValueError("cannot parse the header"), RecursionError(), ImportError("numpy")],
)
def test_ctrl_c_before_the_first_step_is_not_lost(
    run: Cli,
    monkeypatch: pytest.MonkeyPatch,
    swallowed: Exception | None,
    request: pytest.FixtureRequest,
) -> None:
    """Importing and reading may swallow the exception, or raise another in its place."""

    # A shell ignores Ctrl-C for what it starts in the background, such as this test run.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def interrupted(*args: Any) -> Any:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        if swallowed:
            raise swallowed
        return setup(*args)

    seams.replace_setup(interrupted, monkeypatch)
    assert message(*run.train(*TINY, "run_dir=r"), expect_code=130) == "vgan-train: stopped at once"
    assert not Path("r/stats.jsonl").exists()


def test_a_key_of_other_data_is_the_one_that_is_named(run: Cli) -> None:
    line = message(*run.train("data=folder", "data.path=x", "data.size=64"), expect_code=2)
    assert line.startswith("vgan-train: data.size=64: unknown key data.size; --help lists the keys")


def test_names_that_are_not_text_are_shown(run: Cli) -> None:
    Path("pictures").mkdir()
    for name in ("a", "b", "c\udcff"):
        Image.new("RGB", (16, 16)).save(f"pictures/{name}.png")
    Path("pictures/c\udcff.png").write_bytes(b"none")
    general = [setting for setting in TINY if not setting.startswith("data")]
    assert "c\\udcff.png" in message(
        *run.train(*general, "data=folder", "data.path=pictures", "data.resolution=16")
    )


def test_paths_that_hydra_cannot_read(
    run: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run.train(*TINY, "run_dir=~/a,b={0..9}/seed=0")[0] == 0
    assert (tmp_path / "a,b={0..9}" / "seed=0" / "config.yaml").is_file()
    assert run.sample("ckpt=~/a,b={0..9}/seed=0", "n=1", "device=cpu")[0] == 0
    assert "it's: no such file or folder" in message(*run.sample("ckpt=~/it's"))
    assert "cannot be parsed" in message(*run.sample("ckpt={0..9}"), expect_code=2)


def test_help_is_80_columns_wide(run: Cli) -> None:
    mains = [main for name, main in vars(cli).items() if name.endswith("_main")]
    assert len(mains) >= 7
    for main in mains:
        lines = run(main, "--help")[1].splitlines()
        assert (
            max(len(line) for line in lines if not line.startswith("  vgan-")) <= 80
        )  # a command is not broken


def test_keys_of_other_programs_are_understood(run: Cli) -> None:
    assert "did you mean total_kimg?" in message(*run.train("minutes=1"), expect_code=2)
    assert "did you mean label?" in message(*run.sample("class=3"), expect_code=2)
    assert "did you mean" not in message(*run.sample("epochs=3"), expect_code=2)


def test_changed_settings_are_shown(run: Cli, r: Path) -> None:
    _, out, _ = run.train(*TINY, "run_dir=r", "total_kimg=0.048", "optim.lr_G.start=0.01")
    assert "hanged since the checkpoint: optim.lr_G.start was 0.006, is now 0.01" in out


def test_full_disk_keeps_what_was_written(
    run: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.train(*TINY, "run_dir=r", "total_kimg=0.016")
    r = tmp_path / "r"
    kept = (r / "checkpoint-000000016.safetensors").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        line = message(*run.train(*TINY, "run_dir=r"))
    assert "checkpoint-000000032.safetensors: cannot be written (No space left on device)" in line
    (checkpoint_file,) = r.glob("*check*")
    assert checkpoint_file.read_bytes() == kept
    code, _, _ = run.train(*TINY, "run_dir=r")
    assert code == 0


def test_a_run_folder_that_cannot_be_made(run: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "cannot be written" in message(*run.train(*TINY, "run_dir=file/r"))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
def test_file_size_limit_ends_in_one_line(run: Cli, tmp_path: Path) -> None:
    """The kernel stops every file of the process at 20 kB, as a full disk would."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        result = run.train(*TINY, f"data.cache_dir={tmp_path / 'cache'}", "run_dir=r")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written (File too large)" in message(*result)
    assert list((tmp_path / "cache").glob("*")) == []


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_says_what_to_lower(
    run: Cli, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def step(*_: object) -> None:
        raise error

    seams.wrap_step(step, monkeypatch)
    assert "smaller batch_size" in message(*run.train(*TINY, "run_dir=r"))


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        ([], 2, "ckpt: must be given"),
        (["ckpt=nowhere"], 1, "ckpt=nowhere: no such file or folder"),
        (["ckpt=."], 1, r"ckpt=.: the folder has no checkpoint-\*.safetensors"),
        (["ckpt=r", "n=0"], 1, "n=0: must be above 0"),
        (["ckpt=r", "truncation=2"], 1, "truncation=2"),
        (["ckpt=r", "label=wolf"], 1, "label=wolf: unknown; use one of 0 circle, 1 square"),
        (["ckpt=r", "label=8"], 1, "label=8: unknown"),
        (["ckpt=r", "out=grid.tiff"], 1, "out=grid.tiff: unknown kind .tiff"),
        (["ckpt=r", "out=file/grid.png"], 1, "cannot be written"),
        (["ckpt=r", "size=3"], 2, "size=3: unknown key size"),
    ],
)
def test_bad_sampling(
    run: Cli, r: Path, tmp_path: Path, argv: list[str], code: int, says: str
) -> None:
    (tmp_path / "file").write_text("mine")
    line = message(*run.sample(*argv, *([] if code == 2 else ["device=cpu"])), expect_code=code)
    assert re.search(says, line), line
    assert not list(tmp_path.glob("*.png"))


QUICK = ["features=learned", "features.train_kimg=0.1", "n=40", "batch_size=20", "device=cpu"]


def test_eval_prints_a_protocol_and_keeps_the_result(run: Cli) -> None:
    run.train(*TINY, "run_dir=a", "holdout=10")
    code, out, err = run.evaluate(
        "ckpt=a", *QUICK, "metrics=[fid,kid,pr,diversity,classes,copies]", "repeats=2"
    )
    assert (code, err) == (0, "")
    for name in (
        "fid",
        "kid",
        "precision",
        "recall",
        "diversity",
        "diversity_least",
        "class_accuracy",
        "nearest",
        "cop(ies|y_rate)",
    ):
        assert re.search(rf"\b{name} -?[\d.]+%? \+- [\d.]+", out), name
    assert re.search(r"54 training \w+ of 16 px", out)
    assert "drawn in fp32" in out
    record = json.loads(Path("a/metrics.jsonl").read_text())
    assert (record["ckpt"], record["cur_nimg"], record["protocol"]["seeds"]) == (
        "checkpoint-000000032.safetensors",
        32,
        [0, 1],
    )
    assert size_of("a/nearest-checkpoint-000000032.png") == (8 * 64, 8 * 64)
    again = run.evaluate("ckpt=a", *QUICK, "metrics=[fid]", "repeats=2")[1]
    assert f"fid {record['fid']:.3f}" in again  # the same to the last digit


def test_eval_of_several_and_of_other_data(run: Cli, r: Path) -> None:
    run.train(*TINY, "run_dir=b", "data.seed=1")
    code, out, _ = run.evaluate("ckpt=[r,b]", *QUICK, "metrics=[fid]")
    assert code == 0
    assert "NOT comparable" in out  # other data


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["ckpt=nowhere"], "ckpt=nowhere: no such file or folder"),
        (["metrics=[fid,fad]"], r"metrics=\['fid', 'fad'\]: must be some of fid"),
        (["n=5"], "n=5: must be at least 20"),
        (["repeats=0"], "repeats=0: must be above 0"),
        (
            ["features=imagenet"],
            "features=imagenet: no such option; use one of auto, dinov2, inception",
        ),
        (["weights=none.pth", "features=inception"], "features.weights=none.pth: cannot be read"),
        (
            ["features=learned", "+features.colour=1"],
            "features.colour=1: vgan.evaluation.features.ClassifierFeatures has no such argument",
        ),
        (
            ["metrics=[is]", "features._target_=vgan.evaluation.features.Nothing"],
            "features._target_=vgan.evaluation.features.Nothing: cannot be",
        ),
        (["data.path=elsewhere"], "data.path=elsewhere"),
    ],
)
def test_eval_errors_are_one_line(run: Cli, r: Path, argv: list[str], message: str) -> None:
    code, out, err = run.evaluate("ckpt=r", *argv)
    assert code != 0
    assert out == ""
    assert re.match(f"vgan-eval: {message}", err), err
    assert err.count("\n") == 1


def test_a_checkpoint_cannot_choose_code_for_evaluation(run: Cli, r: Path) -> None:
    path = r / "checkpoint-000000032.safetensors"
    for part, leads_out in (
        ("data", "vgan.data.folder.os.system"),
        ("features", "vgan.evaluation.features.torch.hub.load"),
    ):
        for target in ("os.system", leads_out):
            parts = checkpoint.load(path)
            parts["config"][part] = {"_target_": target, "command": "touch harm"}
            checkpoint.save(Path("evil.pt"), parts, keep=1)
            code, _, err = run.evaluate("ckpt=evil.pt", "n=20")
            assert code == 1
            assert f"{part}._target_={target}: a checkpoint may name vgan's own classes only" in err
    parts = checkpoint.load(path)
    parts["config"]["model"]["generator"] = {"_target_": "vgan.models.generator.torch.hub.load"}
    checkpoint.save(Path("evil.pt"), parts, keep=1)
    assert "vgan's own classes only" in run.sample("ckpt=evil.pt")[2]
    assert not Path("harm").exists()

"""What is published: the command `vgan`, the wheel, and what installs an extra."""

import argparse
import ast
import os
import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hatchling.builders.wheel import WheelBuilder
from test_cli import Cli, message

import vgan
from vgan import cli
from vgan.help import INTROS
from vgan.runtime import extras
from vgan.schema import CONFIG_DIR

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    monkeypatch.chdir(tmp_path)
    return Cli(monkeypatch, capsys)


# --- the command vgan ----------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(run: Cli, words: list[str]) -> None:
    code, out, _ = run(cli.main, *words)
    assert code == 0
    assert INTROS.keys() == cli.COMMANDS.keys()
    for program in cli.COMMANDS:
        assert re.search(rf"^  {program.removeprefix('vgan-')} +\w+", out, re.M)


def test_vgan_runs_a_command(run: Cli) -> None:
    assert run(cli.main, "--version")[1] == f"vgan {vgan.__version__}\n"
    assert run(cli.main, "sample", "--help")[1] == run.sample("--help")[1]
    composed = run(cli.main, "train", "--cfg", "job", "data=cifar10")[1]
    assert composed == run.train("--cfg", "job", "data=cifar10")[1]
    line = message(*run(cli.main, "data", "info", "data=folder"), 2)
    assert line == "vgan-data: data.path: must be given, as data.path=VALUE"


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("trian", "did you mean vgan train?"),
        ("vgan-eval", "did you mean vgan eval?"),
        ("data=cifar10", "did you mean vgan train data=cifar10?"),
        ("--fast", "use one of train, sample, "),
    ],
)
def test_an_unknown_command_is_one_line(run: Cli, name: str, fix: str) -> None:
    line = message(*run(cli.main, name), 2)
    assert line.startswith(f"vgan: {name}: no such command; {fix}")


def test_the_module_is_the_command_and_starts_without_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "vgan", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "  train " in done.stdout
    assert not re.search(r"\| +torch$", done.stderr, re.M)


@pytest.mark.skipif(os.name == "nt", reason="a pipe of POSIX")
def test_help_into_a_pipe_that_is_closed() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "vgan", "train", "--help"]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_hydras_parser_is_built_as_on_python_3_14(
    run: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There argparse looks into every help text when an option is added."""

    def check(parser: Any, action: argparse.Action) -> None:
        assert action.help is None or "%" not in action.help or action.help % {}

    add_argument = argparse.ArgumentParser.add_argument

    def checked(parser: Any, *names: str, **options: Any) -> argparse.Action:
        action = add_argument(parser, *names, **options)
        parser._check_help(action)
        return action

    monkeypatch.setattr(argparse.ArgumentParser, "_check_help", check, raising=False)
    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", checked)
    code, out, err = run.train("--cfg", "job")
    assert code == 0, err
    assert "name: shapes" in out
    assert argparse.ArgumentParser._check_help is check


# --- the wheel -----------------------------------------------------------------------------------


def test_the_wheel_holds_every_file_that_commands_read(tmp_path: Path) -> None:
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    assert Path(path).name == f"vgan-{vgan.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        scripts = wheel.read(f"vgan-{vgan.__version__}.dist-info/entry_points.txt").decode()
    configs = {f"vgan/configs/{p.relative_to(CONFIG_DIR).as_posix()}" for p in yaml_files()}
    package = (ROOT / "vgan").rglob("*.*")
    sources = {p.relative_to(ROOT).as_posix() for p in package if p.suffix != ".pyc"}
    assert len(configs) > 30
    assert names >= configs | sources
    for program in ("vgan", *cli.COMMANDS):
        target = "main" if program == "vgan" else f"{program.removeprefix('vgan-')}_main"
        assert f"\n{program} = vgan.cli:{target}\n" in scripts
        assert callable(getattr(cli, target))


def yaml_files() -> list[Path]:
    return list(CONFIG_DIR.rglob("*.yaml"))


def test_the_version_is_in_one_place() -> None:
    for name in ("pyproject.toml", "README.md", "CITATION.cff"):
        assert vgan.__version__ not in (ROOT / name).read_text(encoding="utf-8"), name
    assert f"\n## {vgan.__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_links_of_the_readme_get_an_address() -> None:
    absolute = runpy.run_path(str(ROOT / "scripts" / "pypi_readme.py"))["absolute"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    page = absolute(text, "https://host/owner/vgan", "v1")
    assert "](https://host/owner/vgan/raw/v1/docs/img/teaser.png)" in page
    assert "](https://host/owner/vgan/blob/v1/docs/recipes.md)" in page
    assert "](#citation)" in page
    relative = re.findall(r"\]\((?!https?:|#)[^)\s]+\.(?:md|png|webp|slurm)\)", page)
    assert not relative
    assert re.sub(r"https://host/owner/vgan/(raw|blob)/v1/", "", page) == text


# --- extras --------------------------------------------------------------------------------------


def test_an_extra_is_installed_the_way_vgan_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "prefix", str(ROOT / ".venv"))
    assert extras.install_extra("demo") == "uv sync --inexact --extra demo"
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert extras.install_extra("demo") == "pip install 'vgan[demo]'"


def test_every_extra_that_errors_name_exists() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    known = re.findall(
        r"^(\w+) = \[", project.partition("[project.optional-dependencies]")[2], re.M
    )
    for path in (ROOT / "vgan").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert path.name == "extras.py" or "pip install vgan" not in source.replace("'", "")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "install_extra":
                names = [c.value for c in ast.walk(node.args[0]) if isinstance(c, ast.Constant)]
                assert set(names) <= set(known), f"{path}: {names}"

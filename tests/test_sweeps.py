"""Optuna gets the best value of a run, and the shell its completions."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from runs import TINY, lines_of, train_in_process

from vgan import cli
from vgan.evaluation.evaluator import SMALLER_IS_BETTER
from vgan.runtime.extras import install_extra
from vgan.training.train import train

EVALUATED = [
    *("total_kimg=0.064", "eval_kimg=0.032", "eval.n=32", "eval.metrics=[kid,pr]"),
    *("eval.best_by=kid", "features=learned", "features.train_kimg=0.1"),
]
# SQLAlchemy 1.4, of Optuna 2.10.
pytestmark = pytest.mark.filterwarnings("ignore:Deprecated API features:DeprecationWarning")
BIN = Path(sys.executable).parent


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["vgan-train", *words])
    try:
        cli.train_main()
    except SystemExit as e:
        return int(e.code or 0)
    return 0


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("sweeps") / "run"
    train_in_process(run_dir, *EVALUATED)
    return run_dir


@pytest.mark.parametrize("name", ["kid", "recall"])
def test_train_returns_the_best_value_as_measured(evaluated: Path, name: str) -> None:
    """The run is complete, so that nothing is trained."""
    words = [*TINY, *EVALUATED, f"run_dir={evaluated}", f"eval.best_by={name}"]
    values = [line[name] for line in lines_of(evaluated / "metrics.jsonl")]
    assert len(values) == 2
    best = min(values) if SMALLER_IS_BETTER[name] else max(values)
    assert train(cli.compose("vgan-train", words)) == best


def test_optuna_gets_the_values_and_goes_on_after_a_failed_trial(
    evaluated: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One choice is a run that is complete already, the other is refused."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(evaluated, tmp_path / "out" / "batch_size=8")
    tiny = [word for word in TINY if not word.startswith("batch_size")]
    search = [*tiny, *EVALUATED, "batch_size=0,8", "run_dir=out", "hydra.sweep.dir=out"]
    sampler = ["hydra.sweeper.sampler.seed=1", "hydra.sweeper.n_trials=4"]
    assert command(monkeypatch, "-m", "hydra/sweeper=optuna", *sampler, *search) == 0
    assert "batch_size=0: must be above 0" in capsys.readouterr().err
    result = yaml.safe_load((tmp_path / "out" / "optimization_results.yaml").read_text())
    values = [line["kid"] for line in lines_of(evaluated / "metrics.jsonl")]
    assert result["best_value"] == min(values)
    assert str(result["best_params"]["batch_size"]) == "8"


def test_optuna_without_evaluations_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["-m", "hydra/sweeper=optuna", *TINY, "seed=0,1", "run_dir=out"]
    assert command(monkeypatch, *words) == 1
    assert "vgan-train: eval_kimg=0.0: " in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


def test_a_plugin_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "-m", "hydra/launcher=submitit_slurm") == 2
    assert install_extra("slurm") in capsys.readouterr().err
    assert command(monkeypatch, "-m", "hydra/sweeper=unknown") == 2
    assert capsys.readouterr().err == "vgan-train: hydra/sweeper=unknown: no such option\n"


def complete(line: str) -> list[str]:
    """What bash offers for a line, by the lines of docs/configuration.md."""
    page = Path(__file__).parent.parent / "docs" / "configuration.md"
    found = re.search(r"```bash\n(eval.*?)```", page.read_text(encoding="utf-8"), re.S)
    assert found
    script = f"""{found[1]}
COMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}; COMP_WORDS=($COMP_LINE)
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
complete -p "${{COMP_WORDS[0]}}" > /dev/null && hydra_bash_completion
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    run = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)
    assert run.stderr == ""
    return run.stdout.split()


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("vgan-train tracker=", ["mlflow", "none", "trackio", "wandb"]),
        ("vgan-train data=folder data.path=~/images total_k", ["total_kimg="]),
        ("vgan-data info data=sh", ["data=shapes"]),
        ("vgan-train model=nonsense[ seed", []),
    ],
)
def test_bash_completes_keys_groups_and_options(line: str, offered: list[str]) -> None:
    found = complete(line)
    assert found == offered or [word.partition("=")[2] for word in found] == offered


def test_an_unknown_shell_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "-sc", "install=tcsh") == 2
    assert "tcsh" in capsys.readouterr().err

"""The door: one hydra.main for each console script, and errors as one line."""

import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from vgan.config import CONFIG_DIR, SampleConfig, TrainConfig, help_lines
from vgan.errors import UserError

_STORE = ConfigStore.instance()
_STORE.store(name="train_schema", node=TrainConfig)
_STORE.store(name="sample_schema", node=SampleConfig)


def train_main() -> None:
    """vgan-train"""
    _open("vgan-train", TrainConfig, _train, _TRAIN_HELP)


def sample_main() -> None:
    """vgan-sample"""
    _open("vgan-sample", SampleConfig, _sample, _SAMPLE_HELP)


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="train")
def _train(cfg: DictConfig) -> None:
    from vgan.train import train  # after the command line was understood: torch imports slowly

    job = HydraConfig.get()
    if job.mode == RunMode.MULTIRUN:  # each job of a sweep gets a folder of its own
        cfg.run_dir = f"{cfg.run_dir}/{re.sub(r'[^A-Za-z0-9=.,+_-]', '_', job.job.override_dirname) or 'run'}"
    train(cfg)


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="sample")
def _sample(cfg: DictConfig) -> None:
    from vgan.sample import sample

    sample(cfg)


_TRAIN_HELP = """vgan-train: fit a GAN to pictures.

  vgan-train                                         the embedded shapes, on any machine
  vgan-train model=attn data=cifar10
  vgan-train data=folder data.path=~/pictures data.resolution=64 run_dir=outputs/mine
  vgan-train -m model=sep,attn seed=0,1              a sweep

The same command again resumes the run."""

_SAMPLE_HELP = """vgan-sample: make pictures with a trained model.

  vgan-sample ckpt=outputs/mine n=64 seed=0 out=grid.png
  vgan-sample ckpt=outputs/mine n=1000 out=pictures/"""


def help_text(schema: type, intro: str) -> str:
    """The text of --help: groups with their options, then every key; both read from where they are defined."""
    parts = [intro, ""]
    if schema is TrainConfig:
        parts.append("Groups (GROUP=OPTION):")
        for folder in sorted(p for p in CONFIG_DIR.iterdir() if p.is_dir()):
            for path in sorted(folder.glob("*.yaml")):
                parts.append(f"  {folder.name}={path.stem:<16} {_first_comment(path.read_text(encoding='utf-8'))}")
        parts.append("")
    parts += ["Keys (KEY=VALUE):", *help_lines(schema), ""]
    parts.append("--cfg job prints every value, the nested ones too (such as optim.lr_G.start=1e-3), and trains nothing.")
    return "\n".join(parts)


def _first_comment(text: str) -> str:
    comments = [line[1:].strip() for line in text.splitlines() if line.startswith("#") and "@package" not in line]
    return comments[0] if comments else ""


def _open(program: str, schema: type, room: Callable[[], None], intro: str) -> None:
    """Run `room` and turn what a user can mend into one line: exit code 2 for usage, 1 for the rest."""
    sys.argv[0] = program
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text(schema, intro))
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through to here
    try:
        room()
    except UserError as e:
        _fail(program, str(e), 1)
    except (HydraException, OmegaConfBaseException) as e:
        _fail(program, usage_line(e, sys.argv[1:], schema), 2)
    except ValueError as e:  # Hydra's own, for a group that is given a number
        if "Config group override" not in str(e):
            raise
        _fail(program, usage_line(e, sys.argv[1:], schema), 2)
    except KeyboardInterrupt:
        _fail(program, "stopped at once; the same command goes on from the last checkpoint", 130)
    except OSError as e:
        place = f"{e.filename}: " if e.filename else ""
        _fail(program, f"{place}{e.strerror or e}; free space or choose another folder, then the same command goes on", 1)
    except (MemoryError, RuntimeError) as e:
        if not _is_out_of_memory(e):
            raise
        _fail(program, "out of memory; try a smaller batch_size, size=s or size=xs, or a lower data.resolution", 1)
    except SystemExit as e:
        if hasattr(e, "text"):
            print(f"{program}: {e.text}")
        raise


def _fail(program: str, text: str, code: int) -> None:
    print(f"{program}: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(code)


def _is_out_of_memory(e: BaseException) -> bool:
    return isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(e)


def usage_line(e: Exception, argv: Sequence[str], schema: type) -> str:
    """Hydra's and OmegaConf's complaints as one line: the override they are about, the rule, the fix."""
    causes = [e]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)  # type: ignore[arg-type]
    text = " ".join(str(c) for c in causes)
    option = re.search(r"Could not find '(?:[^']*/)?([^'/]+)/([^'/]+)'", text)
    if option:
        return _no_such_option(option[1], option[2])
    missing = re.search(r"Missing mandatory value: (\S+)(?:.*?full_key: (\S+))?", text, re.DOTALL)
    if missing:
        name = missing[2] or missing[1]
        return f"{name}: must be given, as {name}=VALUE"
    for override in argv:
        name, _, value = override.lstrip("+~").partition("=")
        if "Config group override" in text and (CONFIG_DIR / name).is_dir():
            return _no_such_option(name, value) if schema is TrainConfig else f"{override}: unknown key {name}"
        if name in text and ("not in struct" in text or "not in" in text or "No match in the defaults" in text):
            close = difflib.get_close_matches(name, _known_keys(schema), 1, 0.6)
            hint = f"did you mean {close[0]}?" if close else "--help lists the keys, --cfg job the nested ones"
            return f"{override}: unknown key {name}; {hint}"
        if f"full_key: {name}" in text and name:
            return f"{override}: {str(causes[-1]).splitlines()[0]}"
    bad = next((a for a in argv if a in text), None)
    return (f"{bad}: " if bad else "") + str(causes[-1]).splitlines()[0]


def _no_such_option(group: str, name: str) -> str:
    known = sorted(p.stem for p in (CONFIG_DIR / group).glob("*.yaml"))
    return f"{group}={name}: no such option; use one of {', '.join(known)}"


def _known_keys(schema: type, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for f in fields(schema):
        keys.append(prefix + f.name)
        if is_dataclass(f.type):
            keys += _known_keys(f.type, f"{prefix}{f.name}.")  # type: ignore[arg-type]
    return keys

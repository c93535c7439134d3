"""The door: one hydra.main for each console script, and errors as one line."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vgan.config import (
    CONFIG_DIR,
    DataConfig,
    DataNode,
    DemoConfig,
    EvalConfig,
    ExportConfig,
    ReportConfig,
    SampleConfig,
    TrainConfig,
    typed,
    validate,
    validate_data,
)
from vgan.help import (
    DATA_INTRO,
    DEMO_INTRO,
    DOCTOR_INTRO,
    EVAL_INTRO,
    EXPORT_INTRO,
    REPORT_INTRO,
    SAMPLE_INTRO,
    TRAIN_INTRO,
    help_text,
    usage_line,
)
from vgan.runtime.console import ignore_write_errors
from vgan.runtime.errors import UserError, is_out_of_memory
from vgan.runtime.renamed import upgrade_override
from vgan.runtime.signals import (
    Stopped,
    expect_stops,
    remember_interrupts,
    was_interrupted,
    was_training,
)

_STORE = ConfigStore.instance()
_STORE.store(name="train_schema", node=TrainConfig)
_STORE.store(name="sample_schema", node=SampleConfig)
_STORE.store(name="eval_schema", node=EvalConfig)
_STORE.store(name="export_schema", node=ExportConfig)
_STORE.store(name="report_schema", node=ReportConfig)
_STORE.store(name="data_schema", node=DataNode)
_STORE.store(name="demo_schema", node=DemoConfig)


def train_main() -> None:
    """vgan-train"""
    with expect_stops(), ignore_write_errors():
        _open("vgan-train", TrainConfig, _train, TRAIN_INTRO)


def sample_main() -> None:
    """vgan-sample"""
    _open("vgan-sample", SampleConfig, _sample, SAMPLE_INTRO)


def eval_main() -> None:
    """vgan-eval"""
    _open("vgan-eval", EvalConfig, _evaluate, EVAL_INTRO)


def export_main() -> None:
    """vgan-export"""
    _open("vgan-export", ExportConfig, _export, EXPORT_INTRO)


def report_main() -> None:
    """vgan-report"""
    _open("vgan-report", ReportConfig, _report, REPORT_INTRO)


def doctor_main() -> None:
    """vgan-doctor"""
    _open("vgan-doctor", TrainConfig, _doctor, DOCTOR_INTRO)


def data_main() -> None:
    """vgan-data"""
    if len(sys.argv) > 1 and re.fullmatch(r"\w+", sys.argv[1]):  # the first word may say what to do
        sys.argv[1] = f"do={sys.argv[1]}"
    _open("vgan-data", DataConfig, _data, DATA_INTRO)


def demo_main() -> None:
    """vgan-demo"""
    _open("vgan-demo", DemoConfig, _demo, DEMO_INTRO)


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="train")
def _train(cfg: DictConfig) -> None:
    from vgan.training.train import (
        train,  # after the command line was understood: torch imports slowly
    )

    if HydraConfig.get().mode == RunMode.MULTIRUN:
        cfg.run_dir = f"{cfg.run_dir}/{_sweep_name(sys.argv[1:], HydraConfig.get().overrides.task)}"
    with _one_line_errors("vgan-train", TrainConfig):
        validate(cfg)
        train(typed(cfg))


def _sweep_name(argv: Sequence[str], job: Sequence[str]) -> str:
    """The folder of one job of a sweep: the overrides that differ between the jobs."""
    parsed = OverridesParser.create().parse_overrides([a for a in argv if "=" in a])
    swept = {o.key_or_group for o in parsed if o.is_sweep_override()}
    named = ",".join(o for o in job if o.partition("=")[0] in swept)
    return re.sub(r"[^A-Za-z0-9=.,+_-]", "_", named) or "job"


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="sample")
def _sample(cfg: DictConfig) -> None:
    from vgan.inference.sample import sample

    with _one_line_errors("vgan-sample", SampleConfig):
        sample(cfg)


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="eval")
def _evaluate(cfg: DictConfig) -> None:
    from vgan.evaluation.evaluate import evaluate

    with _one_line_errors("vgan-eval", EvalConfig):
        evaluate(cfg)


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="export")
def _export(cfg: DictConfig) -> None:
    from vgan.inference.export import export

    with _one_line_errors("vgan-export", ExportConfig):
        export(cfg)


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="report")
def _report(cfg: DictConfig) -> None:
    from vgan.apps.report import report

    with _one_line_errors("vgan-report", ReportConfig):
        report(cfg, compose_train)


def compose_train(overrides: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """vgan-train's config with these overrides, and the same with its interpolations. Raises ValueError where there is none."""
    try:
        cfg = hydra.compose("train", overrides)
        return OmegaConf.to_container(cfg, resolve=True), OmegaConf.to_container(cfg)  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException) as e:
        raise ValueError(str(e)) from e


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="train")
def _doctor(cfg: DictConfig) -> None:
    from vgan.apps.doctor import doctor

    with _one_line_errors("vgan-doctor", TrainConfig):
        validate(cfg)
        found_by = [word for word in sys.argv[1:] if word.startswith("--config-dir=")]
        sys.exit(doctor(typed(cfg), found_by + list(HydraConfig.get().overrides.task)))


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="data")
def _data(cfg: DictConfig) -> None:
    from vgan.apps.datasets import data

    with _one_line_errors("vgan-data", DataConfig):
        validate_data(cfg)
        node: Any = OmegaConf.to_container(cfg.data, resolve=True, throw_on_missing=True)
        sys.exit(data(DataConfig(cfg.do, cfg.sheet, node)))


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="demo")
def _demo(cfg: DictConfig) -> None:
    from vgan.apps.demo import demo

    with _one_line_errors("vgan-demo", DemoConfig):
        demo(cfg)


def _open(program: str, schema: type, room: Callable[[], None], intro: str) -> None:
    """Show help, or go through `room`."""
    sys.argv[0] = program
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text(schema, intro))
        return
    sys.argv[1:] = [_with_readable_path(_with_current_name(word)) for word in sys.argv[1:]]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through to here
    remember_interrupts()
    with _one_line_errors(program, schema):
        room()


def _with_current_name(word: str) -> str:
    """Return KEY=VALUE with the current names; a line on stderr names what changed."""
    current = upgrade_override(word)
    if current != word:
        print(
            f"{word} is now called {current}; the old name goes with the next release",
            file=sys.stderr,
        )
    return current


def _with_readable_path(word: str) -> str:
    """KEY=PATH with quotes where Hydra's grammar has no room for the path: ~/pictures, model=sep,seed=0/best.pt, x{0..9}.tar."""
    name, equals, value = word.partition("=")
    if not equals or "/" not in value or word.startswith("-"):
        return word
    parser = OverridesParser.create()
    quoted = value.replace("'", "\\'")
    for text in (word, f"{name}='{quoted}'"):
        with contextlib.suppress(HydraException):
            parser.parse_override(text)
            return text
    return word


@contextlib.contextmanager
def _one_line_errors(program: str, schema: type) -> Iterator[None]:
    """Turn what a user can mend into one line and an exit: code 2 for usage, 1 for the rest.

    Used around composing and again inside each job, because Hydra announces an exception that leaves a job in lines of its own.
    """
    try:
        yield
    except UserError as e:
        _fail(program, str(e), 1)
    except (HydraException, OmegaConfBaseException) as e:
        _fail(program, usage_line(e, sys.argv[1:], schema), 2)
    except ValueError as e:  # Hydra's own, for a group that is given a number
        if "Config group override" not in str(e) and not was_interrupted():
            raise
        _fail(program, usage_line(e, sys.argv[1:], schema), 2)
    except (
        TypeError,
        AttributeError,
        LookupError,
        AssertionError,
    ) as e:  # Hydra stumbles over such as model=[1,2]
        if not _is_hydras(e) and not was_interrupted():
            raise
        _fail(
            program,
            f"{' '.join(sys.argv[1:])}: cannot be understood; give KEY=VALUE, with GROUP=OPTION for groups",
            2,
        )
    except KeyboardInterrupt:
        _fail(program, "stopped", 130)
    except OSError as e:
        place = f"{e.filename}: " if e.filename else ""
        _fail(
            program,
            f"{place}{e.strerror or e}; free space or choose another folder, then the same command goes on",
            1,
        )
    except (MemoryError, RuntimeError, ImportError, SystemError) as e:
        if not is_out_of_memory(e) and not was_interrupted():
            raise
        smaller = (
            "size=s or size=xs, or a lower data.resolution"
            if program == "vgan-train"
            else "or fewer pictures"
        )
        _fail(program, f"out of memory; try a smaller batch_size, {smaller}", 1)
    except Stopped as e:
        print(f"{program}: {e.text}")
        raise SystemExit(e.code) from None  # said once, not again further out


def _is_hydras(e: BaseException) -> bool:
    """Whether an exception was raised inside the libraries that read the command line."""
    at = e.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return at is not None and str(at.tb_frame.f_globals.get("__name__")).partition(".")[0] in (
        "hydra",
        "omegaconf",
        "antlr4",
    )


def _fail(program: str, text: str, code: int) -> None:
    if code == 130 or was_interrupted():  # what else went wrong followed from it
        code, text = (
            130,
            "stopped at once"
            + ("; the same command goes on from the last checkpoint" if was_training() else ""),
        )
    print(f"{program}: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(code)

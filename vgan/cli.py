"""Entry points of the console scripts, and errors as one line."""

import argparse
import contextlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import vgan
from vgan import config, schema
from vgan.help import command_list, command_suggestion, help_text, usage_line
from vgan.runtime.console import ignore_write_errors
from vgan.runtime.errors import UserError, is_out_of_memory
from vgan.runtime.renamed import upgrade_override
from vgan.runtime.signals import (
    Stopped,
    exit_on_stop_signals,
    record_interrupts,
    training_started,
    was_interrupted,
)
from vgan.schema import require
from vgan.validation import validate

# Of Hydra, for a group that is set to a number and an unknown shell; of Optuna, after a sweep.
_VALUE_ERRORS = ("Config group override", "No completion plugin", "No trials are completed")


@dataclass(frozen=True)
class Command:
    """A console script: the schema and the YAML file of its keys, and the function it runs."""

    program: str
    schema: type
    config_name: str  # in configs/, without .yaml
    function: str  # module:name, imported late because torch takes seconds to import

    def __call__(self, cfg: DictConfig) -> float | None:
        """Run one job and return its result; Hydra calls this with the composed config."""
        sweeper = HydraConfig.get().sweeper.get("_target_", "")
        if self.program == "vgan-train" and _is_sweep() and "optuna" in sweeper:
            return self._trial(cfg)
        return self._job(cfg)

    def _trial(self, cfg: DictConfig) -> float | None:
        """Run a job of Optuna, which takes None for a failed trial and goes on with the next."""
        with _one_line_errors(self):
            rule = "Optuna compares evaluations; give the thousands of images between two of them"
            require(cfg.eval_kimg > 0, "eval_kimg", cfg.eval_kimg, rule)
        try:
            return self._job(cfg)
        except SystemExit as e:
            if e.code != 1:  # a usage error, an interrupt or a stop
                raise
            return None

    def _job(self, cfg: DictConfig) -> float | None:
        with _one_line_errors(self):
            extra: tuple[Any, ...] = ()
            if self.program == "vgan-train" and _is_sweep():
                cfg.run_dir = f"{cfg.run_dir}/{_sweep_name(HydraConfig.get().overrides.task)}"
            elif self.program in ("vgan-report", "vgan-export"):
                extra = (compose_train,)
            elif self.program == "vgan-doctor":
                words = [word for word in sys.argv[1:] if word.startswith("--config-dir=")]
                extra = (words + list(HydraConfig.get().overrides.task),)
            settings = schema.typed(cfg)
            validate(settings)
            if isinstance(settings, config.TrainConfig):
                _require_used(settings, HydraConfig.get().overrides.task)
            module, _, name = self.function.partition(":")
            result = getattr(importlib.import_module(module), name)(settings, *extra)
            if isinstance(result, int):
                sys.exit(result)
            return result if isinstance(result, float) else None


COMMANDS = {
    command.program: command
    for command in (
        Command("vgan-train", config.TrainConfig, "train", "vgan.training.train:train"),
        Command("vgan-sample", config.SampleConfig, "sample", "vgan.inference.sample:sample"),
        Command("vgan-invert", config.InvertConfig, "invert", "vgan.inference.invert:invert"),
        Command("vgan-eval", config.EvalConfig, "eval", "vgan.evaluation.evaluate:evaluate"),
        Command("vgan-export", config.ExportConfig, "export", "vgan.apps.hub_export:export"),
        Command("vgan-report", config.ReportConfig, "report", "vgan.apps.report:report"),
        Command("vgan-doctor", config.TrainConfig, "train", "vgan.apps.doctor:doctor"),
        Command("vgan-data", config.DataConfig, "data", "vgan.apps.datasets:data"),
        Command("vgan-demo", config.DemoConfig, "demo", "vgan.apps.demo:demo"),
    )
}


def register_schemas() -> None:
    """Make the schemas known to Hydra as train_schema, sample_schema and so on."""
    for command in COMMANDS.values():
        ConfigStore.instance().store(name=f"{command.config_name}_schema", node=command.schema)


def _entry_point(program: str) -> Callable[[], None]:
    def main() -> None:
        run(COMMANDS[program])

    main.__name__ = program
    return main


train_main = _entry_point("vgan-train")
sample_main = _entry_point("vgan-sample")
invert_main = _entry_point("vgan-invert")
eval_main = _entry_point("vgan-eval")
export_main = _entry_point("vgan-export")
report_main = _entry_point("vgan-report")
doctor_main = _entry_point("vgan-doctor")
data_main = _entry_point("vgan-data")
demo_main = _entry_point("vgan-demo")


def main() -> None:
    """Run `vgan COMMAND ...`, which is the console script vgan-COMMAND; exit 2 if unknown."""
    name, *words = sys.argv[1:] or ["--help"]
    program = f"vgan-{name}"
    if name in ("--help", "-h"):
        _show(command_list())
    elif name == "--version":
        print(f"vgan {vgan.__version__}")
    elif program in COMMANDS:
        sys.argv[1:] = words
        run(COMMANDS[program])
    else:
        _fail("vgan", f"{name}: no such command; {command_suggestion(name)}", 2)


def run(command: Command) -> None:
    """Run a command with the words of sys.argv; --help prints its text."""
    sys.argv[0] = command.program
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names can be undecodable
    if {"--help", "-h"} & set(sys.argv[1:]):
        _show(help_text(command.program, command.schema))
        return
    sys.argv[1:] = _overrides(command.program, sys.argv[1:])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then lets exceptions pass
    register_schemas()
    with contextlib.ExitStack() as stack:
        if command.program == "vgan-train":
            stack.enter_context(exit_on_stop_signals())
            stack.enter_context(ignore_write_errors())
        if line := os.environ.get("COMP_LINE"):  # set by the shell that completes this line
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
            name, *words = line.split(" ")
            before = _overrides(command.program, words[:-1])
            os.environ["COMP_LINE"] = " ".join([name, *before, *words[-1:]])
        record_interrupts()
        stack.enter_context(_one_line_errors(command))
        stack.enter_context(_any_help_text())
        hydra.main(str(schema.CONFIG_DIR), command.config_name, version_base="1.3")(command)()


def _show(text: str) -> None:
    """Print a text to a reader that may stop early, as `head` does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit


def compose(program: str, overrides: Sequence[str]) -> Any:
    """Return the typed, validated config of a command with these overrides.

    Raises UserError for bad values, HydraException or OmegaConfBaseException for bad overrides.
    """
    register_schemas()
    with hydra.initialize_config_dir(str(schema.CONFIG_DIR), version_base="1.3"):
        settings = schema.typed(hydra.compose(COMMANDS[program].config_name, list(overrides)))
    validate(settings)
    return settings


def compose_train(overrides: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return vgan-train's config with these overrides, resolved and with its interpolations.

    Raises ValueError for overrides that do not compose.
    """
    try:
        cfg = hydra.compose("train", overrides)
        return _plain(cfg, resolve=True), _plain(cfg, resolve=False)
    except (HydraException, OmegaConfBaseException) as e:
        raise ValueError(str(e)) from e


def _plain(cfg: DictConfig, resolve: bool) -> dict[str, Any]:
    plain = OmegaConf.to_container(cfg, resolve=resolve)
    assert isinstance(plain, dict)
    return {str(name): value for name, value in plain.items()}


def _require_used(settings: config.TrainConfig, words: Sequence[str]) -> None:
    """Refuse a schedule of gamma where gamma=auto, the default of some data, would ignore it."""
    for word in words:
        if settings.gamma == "auto" and word.lstrip("+").startswith("loss.gamma"):
            fix = "add gamma=schedule or leave it out"
            raise UserError(f"{word}: has no effect with gamma=auto; {fix}")


def _is_sweep() -> bool:
    return HydraConfig.get().mode == RunMode.MULTIRUN


def _sweep_name(job: Sequence[str]) -> str:
    """Return the folder name of one job of a sweep: the overrides that differ between jobs."""
    words = [word for word in sys.argv[1:] if "=" in word]
    parsed = OverridesParser.create().parse_overrides(words)
    swept = {o.key_or_group for o in parsed if o.is_sweep_override()}
    name = ",".join(word for word in job if word.partition("=")[0] in swept)
    return re.sub(r"[^A-Za-z0-9=.,+_-]", "_", name) or "job"


def _overrides(program: str, words: list[str]) -> list[str]:
    """Return words of the command line as Hydra reads them."""
    if program == "vgan-data" and words and re.fullmatch(r"\w+", words[0]):
        words = [f"do={words[0]}", *words[1:]]  # vgan-data info ...
    return [_quote_path(_upgrade(word)) for word in words]


def _upgrade(word: str) -> str:
    """Return KEY=VALUE with today's names; print one line if an old name was used."""
    current = upgrade_override(word)
    if current != word:
        print(f"{word}: renamed, write {current}; the next release removes it", file=sys.stderr)
    return current


def _quote_path(word: str) -> str:
    """Return KEY=PATH with quotes if Hydra's grammar cannot read the path without them.

    Examples are ~/images, model=sep,seed=0/best.safetensors and x{0..9}.tar.
    """
    name, equals, value = word.partition("=")
    if not equals or "/" not in value or word.startswith("-"):
        return word
    quoted = value.replace("'", "\\'")
    for text in (word, f"{name}='{quoted}'"):
        with contextlib.suppress(HydraException):
            OverridesParser.create().parse_override(text)
            return text
    return word


@contextlib.contextmanager
def _one_line_errors(command: Command) -> Iterator[None]:
    """Print a user's mistake as one line and exit: code 2 for usage, 1 for the rest.

    Used around composing, and again inside each job because Hydra adds lines of its own to an
    exception that leaves a job.
    """
    program = command.program
    try:
        yield
    except UserError as e:
        _fail(program, str(e), 1)
    except (HydraException, OmegaConfBaseException) as e:
        _fail(program, usage_line(e, sys.argv[1:], command.schema), 2)
    except ValueError as e:
        if not any(text in str(e) for text in _VALUE_ERRORS) and not was_interrupted():
            raise
        _fail(program, usage_line(e, sys.argv[1:], command.schema), 2)
    except (TypeError, AttributeError, LookupError, AssertionError) as e:
        if not _raised_by_hydra(e) and not was_interrupted():  # Hydra does, for model=[1,2]
            raise
        rule = "cannot be parsed; give KEY=VALUE, with GROUP=OPTION for groups"
        _fail(program, f"{' '.join(sys.argv[1:])}: {rule}", 2)
    except KeyboardInterrupt:
        _fail(program, "stopped", 130)
    except OSError as e:
        place = f"{e.filename}: " if e.filename else ""
        fix = "free space or choose another folder, then run the same command again"
        _fail(program, f"{place}{e.strerror or e}; {fix}", 1)
    except (MemoryError, RuntimeError, ImportError, SystemError) as e:
        if not is_out_of_memory(e) and not was_interrupted():
            raise
        smaller = "or fewer images"
        if program == "vgan-train":
            smaller = "size=s or size=xs, or a lower data.resolution"
        _fail(program, f"out of memory; try a smaller batch_size, {smaller}", 1)
    except Stopped as e:
        print(f"{program}: {e.text}")
        raise SystemExit(e.code) from None  # an outer _one_line_errors prints nothing more


@contextlib.contextmanager
def _any_help_text() -> Iterator[None]:
    """Let argparse accept help texts that are no strings, as Hydra 1.3 has one.

    Python 3.14 looks at them when an option is added, which ends every command in an error
    (https://github.com/facebookresearch/hydra/issues/3121).
    """
    parser: Any = argparse.ArgumentParser
    if not hasattr(parser, "_check_help"):  # Python 3.13 and earlier
        yield
        return
    check, parser._check_help = parser._check_help, lambda self, action: None
    try:
        yield
    finally:
        parser._check_help = check


def _raised_by_hydra(e: BaseException) -> bool:
    """Tell whether an exception was raised inside the libraries that parse the command line."""
    at = e.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    if at is None:
        return False
    library = str(at.tb_frame.f_globals.get("__name__")).partition(".")[0]
    return library in ("hydra", "omegaconf", "antlr4")


def _fail(program: str, text: str, code: int) -> None:
    if code == 130 or was_interrupted():  # any other error is a consequence of the interrupt
        code, text = 130, "stopped at once"
        if training_started():
            text += "; run the same command to resume from the last checkpoint"
    line = re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", " ".join(text.split()))  # a file may have sent them
    print(f"{program}: {line}", file=sys.stderr)
    sys.exit(code)

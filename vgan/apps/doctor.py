"""vgan-doctor's room: what to know before hours are spent on a run."""

import importlib.metadata
import io
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import textwrap
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from vgan.apps.benchmark import device_name
from vgan.apps.speed import WORTH, Plan, first_line, host_memory_gb, try_speeds, usable_cores
from vgan.config import require, validate
from vgan.data.open import build_dataset, build_source, cache_dir_of
from vgan.data.packed import default_cache_dir
from vgan.data.source import Dataset, Source
from vgan.data.survey import duplicates, survey
from vgan.runs import checkpoint
from vgan.runtime.console import report_line
from vgan.runtime.device import (
    keep_compiled,
    missing_compiler,
    pick_compile,
    pick_device,
    pick_precision,
    prepare_process,
)
from vgan.runtime.distributed import world_size
from vgan.runtime.errors import UserError
from vgan.runtime.files import own_folder
from vgan.training.monitor import GRID_PICTURES, facts, sheet_of
from vgan.training.resume import compare, newest_nimg
from vgan.training.setup import Run

LOOKED_AT = 500  # pictures whose files are looked at; all of them are in vgan-data
COMPARED_BYTES = 2e9  # of packed pictures that are searched for duplicates
FEW, UNEVEN, COPIES, ENLARGED = (
    1000,
    10,
    0.01,
    0.1,
)  # below, or above which the data are called a problem


class Report:
    """Prints what is found at once, since some of it takes a while, in at most 80 columns."""

    def __init__(self) -> None:
        self.stops = 0  # problems that would stop training

    def title(self, text: str) -> None:
        print(f"\n{text}\n{'-' * len(text)}", flush=True)

    def line(self, name: str, text: str) -> None:
        print(report_line(name, text), flush=True)

    def note(self, text: str) -> None:
        self._wrapped(f"note: {text}")

    def problem(self, text: str, stops: bool = False) -> None:
        self.stops += stops
        self._wrapped(f"problem: {text}{' [training would stop]' if stops else ''}")

    def _wrapped(self, text: str) -> None:
        print(
            textwrap.fill(
                text, 80, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
            ),
            flush=True,
        )


def doctor(cfg: DictConfig, overrides: Sequence[str]) -> int:
    """Examine what `cfg` (a TrainConfig, made by `overrides`) would meet, and print it; returns the exit code.

    1 where something would stop training. Nothing is written into run_dir; the data are packed into the cache, as training
    would do. Raises UserError where the config itself is wrong.
    """
    validate(cfg)
    require(
        world_size() == 1,
        "WORLD_SIZE",
        world_size(),
        "vgan-doctor looks at one device; start it without torchrun",
    )
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    device = pick_device(config["device"])
    precision = pick_precision(config["precision"], device)
    own_threads = torch.get_num_threads()
    prepare_process(device, precision, config["threads"], config["deterministic"])
    report = Report()
    try:
        examine_machine(report, device)
        compiler_works = examine_compiler(report, config, device)
        dataset = examine_data(report, config)
        plan = None
        if dataset is not None:
            config |= {"precision": precision, "threads": torch.get_num_threads()}
            config["compile"] = str(
                compiler_works and pick_compile(config["compile"], device)
            ).lower()
            try:
                plan = try_speeds(
                    config,
                    device,
                    lambda run, size: examine_folder(report, replace(run, config=config), size),
                )
            except UserError as e:
                report.problem(str(e), stops=True)
    finally:
        torch.set_num_threads(own_threads)
    conclude(report, config, overrides, [] if compiler_works else ["compile=false"], plan)
    return 1 if report.stops else 0


# --- the machine -----------------------------------------------------------------------------------------------------


def examine_machine(report: Report, device: torch.device) -> None:
    """Versions, device, memory."""
    report.title("machine")
    found = {"python": platform.python_version()} | {
        name: _version(name) for name in ("torch", "torchvision", "triton")
    }
    found |= {"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
    report.line(
        "versions", ", ".join(f"{name} {version or 'none'}" for name, version in found.items())
    )
    report.line("system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    total, free = host_memory_gb()
    known = [
        f"{gb:.1f} GB {what}"
        for gb, what in ((total, "of memory"), (free, "free"))
        if gb is not None
    ]
    cores = f"{usable_cores()} cores", f"torch uses {torch.get_num_threads()}"
    report.line("processor", ", ".join([device_name(torch.device("cpu")), *cores, *known]))
    name = str(device)
    if device.type == "cuda":
        left, all_of_it = torch.cuda.mem_get_info(device)
        name += (
            f": {device_name(device)}, {all_of_it / 1e9:.1f} GB of memory, {left / 1e9:.1f} GB free"
        )
    report.line("device", name)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > usable_cores():
        report.note(
            f"the machine is busy with other work (load {load:.1f} on {usable_cores()} cores): speeds below are unsure"
        )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine_compiler(report: Report, config: dict[str, Any], device: torch.device) -> bool:
    """Whether torch.compile works here; compiles a tiny function where training would compile."""
    if str(config["compile"]).lower() == "auto" and device.type != "cuda":
        report.line(
            "compiler",
            f"not used on {device.type} (compile=auto): plain torch was measured faster there",
        )
        return True
    if str(config["compile"]).lower() == "false":
        report.line("compiler", "not used (compile=false)")
        return True
    if missing := missing_compiler(device):
        report.line("compiler", f"not used: this machine lacks {missing}")
        report.problem(
            f"nothing is compiled, which costs speed only; to have it, install {missing}"
        )
        return False
    keep_compiled(default_cache_dir() / "compiled")
    start = time.perf_counter()
    try:
        x = torch.arange(64.0, device=device)
        wrong = bool(
            (torch.compile(lambda x: (2 * x + 1).sin())(x) - (2 * x + 1).sin()).abs().max() > 1e-3
        )
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError, AssertionError) as e:
        report.line("compiler", "does not work")
        report.problem(
            f"torch.compile fails ({first_line(e)}); set compile=false or mend it", stops=True
        )
        return False
    if wrong:
        report.problem("torch.compile gives wrong numbers; set compile=false", stops=True)
        return False
    report.line("compiler", f"works ({time.perf_counter() - start:.1f} s for a tiny function)")
    return True


# --- the data --------------------------------------------------------------------------------------------------------


def examine_data(report: Report, config: dict[str, Any]) -> Dataset | None:
    """Look at the pictures and pack them, as training would; None where they cannot be."""
    report.title("data")
    try:
        source = build_source(config["data"])
        look_at_files(report, source)
        dataset = build_dataset(config["data"])
        training = len(dataset.split(config["holdout"])[0])
    except UserError as e:
        report.problem(str(e), stops=True)
        return None
    px, channels = dataset.img_resolution, "RGB" if dataset.img_channels == 3 else "grey"
    report.line(
        "pictures",
        f"{dataset.name}: {len(dataset):,} of {px} px, {channels}"
        + (", of a stream" if dataset.stream else ""),
    )
    report.line("packed", f"{_size(dataset.images.nbytes)} in {cache_dir_of(config['data'])}")
    if dataset.label_dim:
        look_at_classes(report, dataset)
    look_for_duplicates(report, dataset)
    if training < FEW and not dataset.stream:
        fix = "experiment=few suits such sets, holdout shows over-fitting"
        report.problem(
            f"only {training:,} pictures to train on: below about {FEW:,} they are soon learned by heart; {fix}"
        )
    return dataset


def look_at_files(report: Report, source: Source) -> None:
    """What the pictures were before they became squares, by a sample of them."""
    if type(source).examine is Source.examine:
        return  # drawn to size
    found, px = survey(source, LOOKED_AT), source.img_resolution
    of = (
        ""
        if found.looked_at == len(source)
        else f"; {found.looked_at:,} of {len(source):,} looked at"
    )
    if not found.good:
        return  # packing will say so
    report.line("files", f"{_shares(found.formats)}; {_shares(found.modes)}{of}")
    ends = [f"{w} x {h}" for w, h in (pick(found.sizes, key=min) for pick in (min, max))]
    report.line("sizes", f"{' to '.join(dict.fromkeys(ends))} px")
    small = len(found.small) / found.good
    if small > ENLARGED:
        fix = "take a lower data.resolution"
        report.problem(
            f"{small:.0%} of the pictures are below {px} px and get enlarged, which is learned as blur; {fix}"
        )
    elif small:
        report.note(
            f"{small:.1%} of the pictures are below {px} px and get enlarged: {'; '.join(found.small[:3])}"
        )
    grey = sum(n for mode, n in found.modes.items() if mode[0] in "L1IF") / found.good
    if source.img_channels == 3 and 0.05 < grey < 0.95:
        report.note(
            f"{grey:.0%} of the pictures are grey, the others in colour; both will be learned"
        )
    oblong = sum(n for (w, h), n in found.sizes.items() if max(w, h) > 2 * min(w, h)) / found.good
    if oblong > 0.05:
        report.note(
            f"{oblong:.0%} of the pictures lose over half of themselves where the centred square is cut out"
        )
    if found.bad:
        report.note(
            f"{len(found.bad)} unreadable: {'; '.join(found.bad[:3])}; vgan-data check lists all"
        )


def _shares(counts: Any) -> str:
    return ", ".join(
        f"{name} {n / counts.total():.0%}" if len(counts) > 1 else name
        for name, n in counts.most_common()
    )


def look_at_classes(report: Report, dataset: Dataset) -> None:
    """How many pictures each class has."""
    counts = torch.from_numpy(dataset.labels).bincount(minlength=dataset.label_dim).tolist()
    least, most = min(counts), max(counts)
    rare, common = (dataset.label_names[counts.index(n)] for n in (least, most))
    report.line(
        "classes", f"{dataset.label_dim}, from {least:,} ({rare}) to {most:,} ({common}) pictures"
    )
    if least == 0:
        report.problem(
            f"{counts.count(0)} classes have no pictures, {rare} among them; leave them out of the numbering"
        )
    elif most > UNEVEN * least:
        report.problem(
            f"{common} has {most / least:,.0f} times the pictures of {rare}, which will be drawn poorly"
        )


def look_for_duplicates(report: Report, dataset: Dataset) -> None:
    """Pictures without any difference as training sees them."""
    some = dataset.images[: max(2, int(COMPARED_BYTES / dataset.images[0].nbytes))]
    copies = sum(len(group) - 1 for group in duplicates(some))
    of = "" if len(some) == len(dataset) else f" among the first {len(some):,}"
    report.line("duplicates", f"{copies:,}{of}")
    if copies > COPIES * len(some):
        report.problem(
            f"{copies / len(some):.1%} of the pictures are exact duplicates; vgan-data check names them"
        )


# --- the run folder --------------------------------------------------------------------------------------------------


def examine_folder(report: Report, run: Run, checkpoint_bytes: int) -> None:
    """How large the networks are; whether run_dir can be written, what it holds, and whether the disk has room for the run."""
    report.title("networks")
    told = facts(run, 0)
    for name in ("G", "D"):
        report.line(name, told[name])
    report.title("run folder")
    config, folder = run.config, run.run_dir
    ground = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    total_nimg, held = round(config["total_kimg"] * 1000), newest_nimg(folder)
    try:
        with tempfile.TemporaryFile(dir=ground):
            pass
    except OSError as e:
        report.problem(
            f"run_dir={folder}: cannot be written ({e.strerror}); choose another folder", stops=True
        )
        return
    if held:
        report.line(
            "run_dir", f"{folder}: holds a run at {held:,} images; the same command resumes it"
        )
        if held >= total_nimg:
            report.note(
                f"that run is complete; to train longer: total_kimg={2 * config['total_kimg']:g}"
            )
        examine_checkpoint(report, run)
    else:
        report.line(
            "run_dir",
            f"{folder}: " + ("holds no checkpoint yet" if folder.is_dir() else "will be made"),
        )
    if (folder / ".lock").is_file():
        try:
            with own_folder(folder):
                pass
        except UserError as e:
            report.problem(str(e), stops=True)
    best = 1 if config["eval_kimg"] > 0 else 0
    count = config["keep_checkpoints"] + 1 + best  # one more while the newest is written
    grids = math.ceil(config["total_kimg"] / config["snapshot_kimg"]) + 1
    grid_bytes = 2 * len(
        _png(sheet_of(run.dataset.reals(GRID_PICTURES)[0]))
    )  # as a file and in TensorBoard
    needed, free = count * checkpoint_bytes + grids * grid_bytes, shutil.disk_usage(ground).free
    kept = (
        f"{count} checkpoints of {_size(checkpoint_bytes)}, {grids:,} grids of {_size(grid_bytes)}"
    )
    report.line("writes", f"{_size(needed)} at most: {kept}")
    report.line("disk", f"{_size(free)} free")
    if free < 2 * checkpoint_bytes:
        report.problem(
            f"run_dir={folder}: the disk has no room for two checkpoints; free space", stops=True
        )
    elif free < needed:
        report.problem(
            f"run_dir={folder}: the disk will be full before the end; free space, or keep_checkpoints=1"
        )


def examine_checkpoint(report: Report, run: Run) -> None:
    """Whether the newest readable checkpoint can be resumed by this config; says what has changed."""
    for path in reversed(checkpoint.all_checkpoints(run.run_dir)):
        try:
            compare(run, checkpoint.load(path))
            return
        except checkpoint.Damaged as e:
            report.problem(f"{e}; training passes it over")
        except UserError as e:
            report.problem(str(e), stops=True)
            return


def _png(sheet: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, format="PNG")
    return buffer.getvalue()


def _size(n: float) -> str:
    return (
        f"{n / 1e9:,.1f} GB"
        if n >= 1e9
        else f"{n / 1e6:,.1f} MB"
        if n >= 1e6
        else f"{n / 1e3:,.0f} kB"
    )


# --- the end ---------------------------------------------------------------------------------------------------------


def conclude(
    report: Report,
    config: dict[str, Any],
    overrides: Sequence[str],
    advised: Sequence[str],
    plan: Plan | None,
) -> None:
    """How long the run takes, what would make it shorter, and the command."""
    report.title("result")
    if plan is not None:
        left = max(
            0,
            round(config["total_kimg"] * 1000) - newest_nimg(Path(config["run_dir"]).expanduser()),
        )
        for name, trial in {"as chosen": plan.chosen, "fastest": plan.best}.items():
            rate = trial.img_per_s
            if name == "as chosen" or plan.gains:
                report.line(
                    name, f"{rate:,.0f} img/s: {left / 1000:g} kimg in {duration(left / rate)}"
                )
        for override, times in plan.gains:
            advised = [*advised, override]
            report.line("gain", f"{override}: {times - 1:+.0%} img/s")
        for trial in plan.batches:
            times = trial.img_per_s / plan.best.img_per_s
            if times > WORTH:
                b = trial.settings["batch_size"]
                report.line(
                    "option",
                    f"batch_size={b}: {times - 1:+.0%} img/s, but other steps and so another result",
                )
        print("Without the time of evaluations, grids and checkpoints. Up to 5 % is noise.")
    if report.stops:
        print(
            f"{report.stops} problem{'s' if report.stops > 1 else ''} would stop training; mend what is said above. Then:"
        )
    print(f"\n{command(overrides, advised)}")


def duration(seconds: float) -> str:
    """Such as 40 s, 12 min, 3 h 05 min, 2 d 4 h."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 120:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    return (
        f"{minutes // 60} h {minutes % 60:02d} min"
        if hours < 48
        else f"{hours // 24} d {hours % 24} h"
    )


def command(overrides: Sequence[str], advised: Sequence[str]) -> str:
    """vgan-train with the overrides given, replaced and followed by those advised; broken as a shell takes it."""
    names = {a.partition("=")[0] for a in advised}
    words = [
        shlex.quote(o) for o in overrides if o.partition("=")[0].lstrip("+") not in names
    ] + list(advised)
    lines = ["vgan-train"]
    for word in words:
        if len(lines[-1]) + len(word) > 76:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {word}"
    return "\n".join(lines)

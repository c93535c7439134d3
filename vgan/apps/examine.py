"""Examine machine, compiler and data: the parts of vgan-doctor that need no run."""

import importlib.metadata
import platform
import subprocess
import textwrap
import time
from collections import Counter

import psutil
import torch

from vgan.config import TrainConfig
from vgan.data.open import build_dataset, build_source, cache_dir_of
from vgan.data.packed import default_cache_dir
from vgan.data.source import CHANNELS, Dataset, Source
from vgan.data.survey import find_duplicates, survey
from vgan.runtime.console import report_line
from vgan.runtime.device import keep_compiled, missing_compiler
from vgan.runtime.errors import UserError, first_line
from vgan.runtime.hardware import device_name, host_memory_gb, usable_cores
from vgan.runtime.images import format_px, height_width

SURVEYED = 500  # files that are examined; vgan-data examines all
COMPARED_BYTES = 2e9  # of packed images that are searched for duplicates
MIN_IMAGES = 1000  # from here on to MAX_ENLARGED: limits beyond which data are a problem
MAX_IMBALANCE = 10
MAX_DUPLICATES, MAX_ENLARGED = 0.01, 0.1  # shares


class Report:
    """Findings, printed as soon as they are known, in at most 80 columns."""

    def __init__(self) -> None:
        self.blocking = 0  # problems that would stop training

    def title(self, text: str) -> None:
        print(f"\n{text}\n{'-' * len(text)}", flush=True)

    def line(self, name: str, text: str) -> None:
        print(report_line(name, text), flush=True)

    def note(self, text: str) -> None:
        self._print_wrapped(f"note: {text}")

    def problem(self, text: str, blocking: bool = False) -> None:
        self.blocking += blocking
        self._print_wrapped(f"problem: {text}{' [training would stop]' if blocking else ''}")

    def _print_wrapped(self, text: str) -> None:
        wrapped = textwrap.fill(
            text, 80, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        print(wrapped, flush=True)


def format_bytes(n: float) -> str:
    """Return a size in kB, MB or GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if n >= size:
            return f"{n / size:,.1f} {unit}"
    return f"{n / 1e3:,.0f} kB"


def examine_machine(report: Report, device: torch.device) -> None:
    """Report versions, processor, device and memory."""
    report.title("machine")
    versions: dict[str, str | int | None] = {"python": platform.python_version()}
    versions |= {name: _version(name) for name in ("torch", "torchvision", "triton")}
    versions |= {"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
    shown = [f"{name} {version or 'none'}" for name, version in versions.items()]
    report.line("versions", ", ".join(shown))
    report.line("system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    cores, (total, free) = usable_cores(), host_memory_gb()
    threads = f"{cores} cores, torch uses {torch.get_num_threads()}"
    name = device_name(torch.device("cpu"))
    report.line("processor", f"{name}, {threads}, {total:.1f} GB of memory, {free:.1f} GB free")
    text = str(device)
    if device.type == "cuda":
        memory = [f"{n / 1e9:.1f} GB" for n in torch.cuda.mem_get_info(device)]
        text += f": {device_name(device)}, {memory[1]} of memory, {memory[0]} free"
    report.line("device", text)
    load = psutil.getloadavg()[0]
    if load > cores:
        busy = f"other programs are running (load {load:.1f} on {cores} cores)"
        report.note(f"{busy}; the speeds below are uncertain")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine_compiler(report: Report, choice: str, device: torch.device) -> bool:
    """Compile a tiny function where training would compile; return False if that fails.

    choice: auto, true or false.
    """
    if choice == "auto" and device.type != "cuda":
        report.line("compiler", f"not used on {device.type} (compile=auto): it would be slower")
        return True
    if choice == "false":
        report.line("compiler", "not used (compile=false)")
        return True
    if missing := missing_compiler(device):
        report.line("compiler", f"not used: this machine lacks {missing}")
        report.problem(f"nothing is compiled, which is slower; to compile, install {missing}")
        return False
    keep_compiled(default_cache_dir() / "compiled")
    start = time.perf_counter()
    x = torch.arange(64.0, device=device)
    try:
        y = torch.compile(lambda x: (2 * x + 1).sin())(x)
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError, AssertionError) as e:
        report.line("compiler", "does not work")
        fix = "set compile=false, or repair the compiler"
        report.problem(f"torch.compile fails ({first_line(e)}); {fix}", blocking=True)
        return False
    if not torch.allclose(y, (2 * x + 1).sin(), atol=1e-3):
        report.line("compiler", "does not work")
        report.problem("torch.compile gives wrong numbers; set compile=false", blocking=True)
        return False
    report.line("compiler", f"works ({time.perf_counter() - start:.1f} s for a tiny function)")
    return True


def examine_data(report: Report, cfg: TrainConfig) -> Dataset | None:
    """Examine the images and pack them, as training does; return None where that fails."""
    report.title("data")
    try:
        source = build_source(cfg.data)
        examine_files(report, source)
        dataset = build_dataset(cfg.data)
        count = len(dataset.split(cfg.holdout)[0])
    except UserError as e:
        report.problem(str(e), blocking=True)
        return None
    color = CHANNELS[dataset.img_channels]
    stream = ", the first of a stream" if dataset.stream else ""
    what = f"{len(dataset):,} of {format_px(dataset.img_resolution)}, {color}{stream}"
    report.line("images", f"{dataset.name}: {what}")
    report.line("packed", f"{format_bytes(dataset.images.nbytes)} in {cache_dir_of(cfg.data)}")
    if dataset.label_names:
        examine_classes(report, dataset)
    elif dataset.conditions:
        report.line("conditions", dataset.conditions.describe())
    examine_duplicates(report, dataset)
    if count < MIN_IMAGES and not dataset.stream:
        few = f"only {count:,} images to train on: below about {MIN_IMAGES:,}, GANs overfit"
        report.problem(f"{few}; try experiment=few, and holdout to measure it")
    return dataset


def examine_files(report: Report, source: Source) -> None:
    """Report formats and sizes of the image files, from a sample of them."""
    if type(source).examine is Source.examine:  # drawn at the resolution of training
        return
    found, size = survey(source, SURVEYED), format_px(source.img_resolution)
    if not found.good:  # packing raises the error
        return
    part = f"; {found.examined:,} of {len(source):,} examined"
    part = part if found.examined < len(source) else ""
    report.line("files", f"{_shares(found.formats)}; {_shares(found.modes)}{part}")
    sizes = [f"{w} x {h}" for w, h in (min(found.sizes, key=min), max(found.sizes, key=min))]
    report.line("sizes", f"{' to '.join(dict.fromkeys(sizes))} px")
    small = len(found.small) / found.good
    if small > MAX_ENLARGED:
        effect = f"below {size} and are enlarged, so that samples will be blurred"
        report.problem(f"{small:.0%} of the images are {effect}; lower data.resolution")
    elif small:
        names = "; ".join(found.small[:3])
        report.note(f"{small:.1%} of the images are below {size} and are enlarged: {names}")
    grey = sum(n for mode, n in found.modes.items() if mode[0] in "L1IF") / found.good
    if source.img_channels > 1 and 0.05 < grey < 0.95:
        report.note(f"{grey:.0%} of the images are grey; the model will learn both kinds")
    height, width = height_width(source.img_resolution)
    lost = [n for (w, h), n in found.sizes.items() if not 0.5 <= w * height / (h * width) <= 2]
    if sum(lost) > 0.05 * found.good:
        share, shape = sum(lost) / found.good, "square" if height == width else f"to {size}"
        report.note(f"{share:.0%} of the images lose over half of their area when cropped {shape}")
    if found.bad:
        names = "; ".join(found.bad[:3])
        report.note(f"{len(found.bad)} unreadable: {names}; vgan-data check lists all")


def _shares(counts: Counter[str]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} {n / counts.total():.0%}" for name, n in counts.most_common())


def examine_classes(report: Report, dataset: Dataset) -> None:
    """Report the number of images per class."""
    counts = torch.from_numpy(dataset.labels).bincount(minlength=dataset.label_dim).tolist()
    least, most = min(counts), max(counts)
    rare, common = (dataset.label_names[counts.index(n)] for n in (least, most))
    sizes = f"from {least:,} ({rare}) to {most:,} ({common}) images"
    report.line("classes", f"{dataset.label_dim}, {sizes}")
    if least == 0:
        empty = f"{counts.count(0)} classes have no images, such as {rare}"
        report.problem(f"{empty}; number the classes without them")
    elif most > MAX_IMBALANCE * least:
        ratio = f"{common} has {most / least:,.0f} times the images of {rare}"
        report.problem(f"{ratio}, whose samples will be poor")


def examine_duplicates(report: Report, dataset: Dataset) -> None:
    """Report images that are equal as training sees them."""
    images = dataset.images[: max(2, int(COMPARED_BYTES / dataset.images[0].nbytes))]
    copies = sum(len(group) - 1 for group in find_duplicates(images))
    part = "" if len(images) == len(dataset) else f" among the first {len(images):,}"
    report.line("duplicates", f"{copies:,}{part}")
    if copies > MAX_DUPLICATES * len(images):
        share = f"{copies / len(images):.1%} of the images"
        report.problem(f"{share} are exact duplicates; vgan-data check lists them")

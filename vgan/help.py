"""What the command line says: the text of --help, and other libraries' complaints as one line."""

import difflib
import re
import textwrap
from collections.abc import Sequence
from dataclasses import fields, is_dataclass

from vgan.config import CONFIG_DIR, DataConfig, TrainConfig, explained_keys

TRAIN_INTRO = """vgan-train: fit a GAN to pictures.

  vgan-train                                         the embedded shapes, on any machine
  vgan-train model=attn data=cifar10
  vgan-train data=folder data.path=pictures data.resolution=64 run_dir=outputs/mine
  vgan-train -m model=sep,attn seed=0,1              a sweep

The same command again resumes the run."""

SAMPLE_INTRO = """vgan-sample: make pictures with a trained model.

  vgan-sample ckpt=outputs/mine n=64 seed=0 out=grid.png
  vgan-sample ckpt=outputs/mine n=1000 out=pictures/               or pictures.zip, pictures.npy
  vgan-sample ckpt=outputs/mine seeds=[0-15,40] label=[cat,dog] truncation=0.7
  vgan-sample ckpt=outputs/mine motion=interpolate seeds=[3,7,9] out=way.gif
  vgan-sample ckpt=outputs/mine motion=walk tiles=16 out=walk.mp4
  vgan-sample ckpt=outputs/mine show=attention out=attention.png"""


EVAL_INTRO = """vgan-eval: how far a model's pictures lie from the data, by a stated protocol.

  vgan-eval ckpt=outputs/mine metrics=[fid,kid,is,pr]
  vgan-eval ckpt=[outputs/a,outputs/b] n=10000 repeats=3
  vgan-eval ckpt=outputs/mine features=learned         where Inception's weights cannot be had"""

EXPORT_INTRO = """vgan-export: a trained generator in a file that other programs read.

  vgan-export ckpt=outputs/mine to=onnx out=mine.onnx               for onnxruntime, browsers, other languages
  vgan-export ckpt=outputs/mine to=onnx input=numbers               draws its own z: the pictures of vgan-sample seeds=...
  vgan-export ckpt=outputs/mine to=safetensors license=CC-BY-4.0    for load_generator("mine.safetensors")
  vgan-export ckpt=outputs/mine to=html out=page/                   a page to play with it, drawn in the browser"""

REPORT_INTRO = """vgan-report: a page about a run, or about several side by side, in one file that
needs no network.

  vgan-report run=outputs/mine                         writes outputs/mine/report.html
  vgan-report run=[outputs/a,outputs/b] out=compared.html"""


# What other programs call it.
_ELSEWHERE = {
    "class": "label", "classes": "label", "trunc": "truncation", "minutes": "total_kimg", "epochs": "total_kimg",
    "kimg": "total_kimg", "steps": "total_kimg", "batch": "batch_size", "resolution": "data.resolution", "path": "data.path",
    "outdir": "run_dir", "lr": "optim.lr_G.start", "workers": "threads", "gpus": "device", "network": "ckpt",
}  # fmt: skip


DOCTOR_INTRO = """vgan-doctor: what to know before a run: the machine, the data, the disk, the
speed. Writes nothing into run_dir.

  vgan-doctor                                        the embedded shapes
  vgan-doctor data=folder data.path=pictures run_dir=outputs/mine

Takes what vgan-train takes and ends with the command to give. Exit code 1:
training would stop."""


DATA_INTRO = """vgan-data: look at a data set, or pack it ahead of time.

  vgan-data info data=folder data.path=pictures sheet=contact.png
  vgan-data check data=folder data.path=pictures   every problem file; exit code 1 if some cannot be read
  vgan-data pack data=folder data.path=pictures data.resolution=64"""


DEMO_INTRO = """vgan-demo: a page to play with a model, drawn by this machine.

  vgan-demo ckpt=outputs/mine                        then open http://127.0.0.1:7860
  vgan-demo ckpt=outputs/mine port=0 open=true       any free port, and the browser opened

vgan-export to=html writes the same page as files that need no server."""


def help_text(schema: type, intro: str) -> str:
    """The text of --help: groups with their options, then every key; all read from where they are defined."""
    parts = [intro, ""]
    if schema in (TrainConfig, DataConfig):
        parts.append("Groups (GROUP=OPTION):")
        for folder in sorted(
            p
            for p in CONFIG_DIR.iterdir()
            if p.is_dir() and (schema is TrainConfig or p.name == "data")
        ):
            for path in sorted(folder.glob("*.yaml")):
                text = path.read_text(encoding="utf-8")
                parts.append(_entry(f"  {f'{folder.name}={path.stem}':<22} ", _first_comment(text)))
                if folder.name == "data":
                    node = text.partition("\ndata:")[2].partition("\n\n")[0]
                    found = re.findall(r"^  (\w+): .*?# (.*)$", node, re.M)
                    parts += [_entry(f"      data.{name:<12} ", why) for name, why in found]
        parts.append("")
    keys = explained_keys(schema)
    width = max(len(name) for name, _ in keys)
    parts += ["Keys (KEY=VALUE):", *(_entry(f"  {name:<{width}}  ", why) for name, why in keys), ""]
    parts.append("--cfg job prints every value that a command would use, and trains nothing.")
    return "\n".join(parts)


def _entry(lead: str, text: str) -> str:
    """Text behind its name, in lines of at most 80 columns."""
    return textwrap.fill(
        text,
        80,
        initial_indent=lead,
        subsequent_indent=" " * len(lead),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _first_comment(text: str) -> str:
    comments = [
        line[1:].strip()
        for line in text.splitlines()
        if line.startswith("#") and "@package" not in line
    ]
    return comments[0] if comments else ""


def usage_line(e: Exception, argv: Sequence[str], schema: type) -> str:
    """Hydra's and OmegaConf's complaints as one line: the override they are about, the rule, the fix."""
    causes = [e]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)  # type: ignore[arg-type]
    text = " ".join(str(c) for c in causes)
    unread = getattr(e, "override", None)  # of Hydra's parser
    if unread:
        return f"{unread}: cannot be understood; give KEY=VALUE, with quotes around what the shell would change"
    option = re.search(r"Could not find '(?:[^']*/)?([^'/]+)/([^'/]+)'", text)
    if option:
        return _no_such_option(option[1], option[2])
    missing = re.search(r"Missing mandatory value: (\S+)(?:.*?full_key: (\S+))?", text, re.DOTALL)
    if missing:
        name = missing[2] or missing[1]
        return f"{name}: must be given, as {name}=VALUE"
    named = [(override, *override.lstrip("+~").partition("=")[::2]) for override in argv]
    for override, name, value in sorted(
        named, key=lambda each: -len(each[1])
    ):  # data.size before data
        if "Config group override" in text and (CONFIG_DIR / name).is_dir():
            return (
                _no_such_option(name, value)
                if schema in (TrainConfig, DataConfig)
                else f"{override}: unknown key {name}"
            )
        if name in text and (
            "not in struct" in text or "not in" in text or "No match in the defaults" in text
        ):
            if _ELSEWHERE.get(name, "").partition(".")[0] in _known_keys(schema):
                return f"{override}: unknown key {name}; did you mean {_ELSEWHERE[name]}?"
            close = difflib.get_close_matches(name, _known_keys(schema), 1, 0.7)
            hint = (
                f"did you mean {close[0]}?"
                if close
                else "--help lists the keys, --cfg job the nested ones"
            )
            return f"{override}: unknown key {name}; {hint}"
        if "is not a subclass of Ramp" in text and f"full_key: {name}" in text:
            return f"{override}: has two ends; give {name}.start and {name}.end"
        if override in text and "Error parsing override" in text:
            return f"{override}: cannot be understood; give KEY=VALUE, with quotes around what the shell would change"
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

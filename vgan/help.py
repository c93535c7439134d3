"""Text of --help, and the complaints of Hydra and OmegaConf as one line."""

import difflib
import re
import textwrap
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path

from vgan.config import DataConfig, TrainConfig
from vgan.runtime.errors import first_line
from vgan.runtime.extras import install_extra
from vgan.schema import CONFIG_DIR, explained_keys

INTROS = {
    "vgan-train": """vgan-train: train a GAN on images.

  vgan-train                                         the built-in shapes, on any machine
  vgan-train model=attn data=cifar10
  vgan-train data=folder data.path=images data.resolution=64 run_dir=outputs/mine
  vgan-train -m model=sep,attn seed=0,1              a sweep

Run the same command again to resume.""",
    "vgan-sample": """vgan-sample: generate images with a trained model.

  vgan-sample ckpt=outputs/mine n=64 seed=0 out=grid.png
  vgan-sample ckpt=outputs/mine n=1000 out=images/               or images.zip, images.npy
  vgan-sample ckpt=outputs/mine seeds=[0-15,40] label=[cat,dog] truncation=0.7
  vgan-sample ckpt=outputs/mine motion=interpolate seeds=[3,7,9] out=way.gif
  vgan-sample ckpt=outputs/mine motion=walk tiles=16 out=walk.mp4
  vgan-sample ckpt=outputs/mine show=attention out=attention.png
  vgan-sample ckpt=outputs/mine show=components out=components.png
  vgan-sample ckpt=outputs/mine motion=component component=3 out=third.gif
  vgan-sample ckpt=outputs/mine latent=[a.npy,b.npy] motion=interpolate out=way.gif
  vgan-sample ckpt=hf://user/mine                       a model on the Hugging Face Hub""",
    "vgan-invert": """vgan-invert: find the latent whose image is nearest to a photo.

  vgan-invert ckpt=outputs/mine image=photo.jpg out=photo.npy     and photo.png to compare
  vgan-invert ckpt=outputs/mine image=photo.jpg label=cat animation=search.gif

Then vgan-sample ckpt=outputs/mine latent=photo.npy draws from it.""",
    "vgan-eval": """vgan-eval: measure FID, KID and other metrics, and print the protocol.

  vgan-eval ckpt=outputs/mine metrics=[fid,kid,is,pr]
  vgan-eval ckpt=[outputs/a,outputs/b] n=10000 repeats=3
  vgan-eval ckpt=outputs/mine features=learned         without Inception's weights""",
    "vgan-export": """vgan-export: convert a trained generator for other programs.

  vgan-export ckpt=outputs/mine to=onnx out=mine.onnx               for onnxruntime
  vgan-export ckpt=outputs/mine to=onnx input=numbers               draws z itself, from a seed
  vgan-export ckpt=outputs/mine to=safetensors license=CC-BY-4.0    for load_generator
  vgan-export ckpt=outputs/mine to=html out=page/                   runs in the browser
  vgan-export ckpt=outputs/mine to=hub repo=user/mine license=MIT   on the Hugging Face Hub""",
    "vgan-report": """vgan-report: write a report on one or several runs as one HTML file.

  vgan-report run=outputs/mine                         writes outputs/mine/report.html
  vgan-report run=[outputs/a,outputs/b] out=compared.html""",
    "vgan-doctor": """vgan-doctor: check machine, data, disk and speed; run_dir is not changed.

  vgan-doctor                                        the built-in shapes
  vgan-doctor data=folder data.path=images run_dir=outputs/mine

It ends with the command to run. Exit code 1: training would fail.""",
    "vgan-data": """vgan-data: inspect a data set, or pack it ahead of time.

  vgan-data info data=folder data.path=images sheet=contact.png
  vgan-data check data=folder data.path=images     list bad files; exit code 1 if there are any
  vgan-data pack data=folder data.path=images data.resolution=64""",
    "vgan-demo": """vgan-demo: serve a web page that generates images.

  vgan-demo ckpt=outputs/mine                        then open http://127.0.0.1:7860
  vgan-demo ckpt=outputs/mine port=0 open=true       any free port; opens the browser

vgan-export to=html writes the same page as files that need no server.""",
}

# Names that other programs use for a key.
_FOREIGN = dict.fromkeys(("minutes", "epochs", "kimg", "steps"), "total_kimg")
_FOREIGN |= {"class": "label", "classes": "label", "trunc": "truncation", "batch": "batch_size"}
_FOREIGN |= {"resolution": "data.resolution", "path": "data.path", "outdir": "run_dir"}
_FOREIGN |= {"lr": "optim.lr_G.start", "workers": "threads", "gpus": "device", "network": "ckpt"}
# Plugins of Hydra, and the extras that install them.
_PLUGINS = {"optuna": "optuna", "submitit_slurm": "slurm", "submitit_local": "slurm"}


def command_list() -> str:
    """Return the text of `vgan --help`: a line for each command."""
    lines = ["vgan: train GANs and draw with them.", "", "Commands (vgan COMMAND KEY=VALUE ...):"]
    for intro in INTROS.values():
        program, _, purpose = intro.partition("\n")[0].partition(": ")
        lines.append(f"  {program.removeprefix('vgan-'):<8} {purpose.rstrip('.')}")
    lines += ["", "vgan COMMAND --help lists the keys of a command, vgan --version the version."]
    lines.append("vgan-train and vgan train are the same command, and so are the others.")
    return "\n".join(lines)


def command_suggestion(name: str) -> str:
    """Return what to write instead of a command that does not exist."""
    names = [program.removeprefix("vgan-") for program in INTROS]
    if "=" in name:  # a key without a command
        return f"did you mean vgan train {name}?"
    if close := difflib.get_close_matches(name.removeprefix("vgan-"), names, 1):
        return f"did you mean vgan {close[0]}?"
    return f"use one of {', '.join(names)}"


def help_text(program: str, schema: type) -> str:
    """Return the text of --help: the groups with their options, then every key."""
    lines = [INTROS[program], ""]
    groups = {TrainConfig: "*", DataConfig: "data"}
    if schema in groups:
        lines.append("Groups (GROUP=OPTION):")
        for path in sorted(CONFIG_DIR.glob(f"{groups[schema]}/*.yaml")):
            lines += _option_lines(path)
        lines.append("")
    lines.append("Keys (KEY=VALUE):")
    keys = explained_keys(schema)
    width = max(len(name) for name, _ in keys)
    lines += [_entry(f"  {name:<{width}}  ", text) for name, text in keys]
    lines += ["", "--cfg job prints the values that the command would use, and stops."]
    return "\n".join(lines)


def _option_lines(path: Path) -> list[str]:
    """Return the option of a YAML file with its first comment; a data set also with its keys."""
    text, group = path.read_text(encoding="utf-8"), path.parent.name
    comments = re.findall(r"^# (?!@package)(.*)$", text, re.M)
    lines = [_entry(f"  {f'{group}={path.stem}':<22} ", comments[0])]
    if group == "data":
        keys = re.findall(r"^  (\w+): .*?# (.*)$", text, re.M)
        lines += [_entry(f"      data.{name:<12} ", why) for name, why in keys]
    return lines


def _entry(lead: str, text: str) -> str:
    """Return text behind its name, in lines of at most 80 columns."""
    wrapper = textwrap.TextWrapper(80, lead, " " * len(lead))
    wrapper.break_long_words = wrapper.break_on_hyphens = False
    return wrapper.fill(text)


def usage_line(e: BaseException, argv: Sequence[str], schema: type) -> str:
    """Return an exception of Hydra or OmegaConf as one line: the override, the rule, the fix."""
    causes = [e]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    text = " ".join(str(c) for c in causes)
    reason = first_line(causes[-1])
    if "No completion plugin" in text:  # for the shell in -sc install=SHELL
        return text
    if override := getattr(e, "override", None):  # set by Hydra's parser
        return f"{override}: cannot be parsed; give KEY=VALUE, in quotes for the shell"
    if plugin := re.search(r"Could not find 'hydra/(\w+)/(\w+)'", text):
        rule = "no such option"
        if extra := _PLUGINS.get(plugin[2]):
            rule = f"not installed; {install_extra(extra)}"
        return f"hydra/{plugin[1]}={plugin[2]}: {rule}"
    if option := re.search(r"Could not find '(?:[^']*/)?([^'/]+)/([^'/]+)'", text):
        return _no_such_option(option[1], option[2])
    if missing := re.search(r"issing mandatory value: (\S+)(?:.*?full_key: (\S+))?", text, re.S):
        name = missing[2] or missing[1]
        return f"{name}: must be given, as {name}=VALUE"
    if found := re.search(r"In 'data/([^']+)': .*?(?:override|Key) '(\w+)", text, re.S):
        rule = (
            f"its file sets {found[2]}, a key of training; move it to defaults_for/{found[1]}.yaml"
        )
        return f"data={found[1]}: {rule}"
    for override in sorted(
        argv, key=lambda word: word.find("="), reverse=True
    ):  # data.size before data
        if line := _line_about(override, text, reason, schema):
            return line
    blamed = [f"{word}: " for word in argv if word in text]
    return "".join(blamed[:1]) + reason


def _line_about(override: str, text: str, reason: str, schema: type) -> str | None:
    """Return the line if the exception is about this override, else None."""
    name, _, value = override.lstrip("+~").partition("=")
    if "Config group override" in text and (CONFIG_DIR / name).is_dir():
        if schema in (TrainConfig, DataConfig):
            return _no_such_option(name, value)
        return f"{override}: unknown key {name}"
    if name in text and ("not in" in text or "No match in the defaults" in text):
        return f"{override}: unknown key {name}; {_suggestion(name, schema)}"
    if "is not a subclass of Ramp" in text and f"full_key: {name}" in text:
        return f"{override}: has two ends; give {name}.start and {name}.end"
    if name and f"full_key: {name}" in text:
        return f"{override}: {reason}"
    return None


def _suggestion(name: str, schema: type) -> str:
    known = _all_keys(schema)
    if _FOREIGN.get(name, "").partition(".")[0] in known:
        return f"did you mean {_FOREIGN[name]}?"
    if close := difflib.get_close_matches(name, known, 1, 0.7):
        return f"did you mean {close[0]}?"
    return "--help lists the keys, --cfg job the nested ones"


def _no_such_option(group: str, name: str) -> str:
    known = sorted(p.stem for p in (CONFIG_DIR / group).glob("*.yaml"))
    return f"{group}={name}: no such option; use one of {', '.join(known)}"


def _all_keys(schema: type, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for f in fields(schema):
        keys.append(prefix + f.name)
        if isinstance(f.type, type) and is_dataclass(f.type):
            keys += _all_keys(f.type, f"{prefix}{f.name}.")
    return keys

"""The schema of the command line: every key with its type, unit and meaning. Values live in configs/*.yaml.

Hydra merges the YAML into these dataclasses, so that a wrong key or type is refused at the prompt; `validate` checks
what types cannot say. The text behind each key is what `--help` prints.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_origin

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf

from vgan.runtime.errors import UserError

_PACKAGE = Path(__file__).resolve().parent
# In a wheel the YAML files travel inside the package; in a checkout they are the top-level folder.
CONFIG_DIR = (
    _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
)

PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")
PENALTIES = ("jvp", "double_backward", "finite_difference")
METRICS = ("fid", "kid", "is", "pr", "diversity", "classes", "copies")
EXPORTS = ("onnx", "safetensors", "pt2", "torchscript", "html")
MOTIONS = ("interpolate", "classes", "walk")
SHOWN = ("pictures", "attention", "patches")
BEST_BY = ("fid", "kid", "is", "precision", "recall")


def key(text: str, default: Any = MISSING) -> Any:
    """A dataclass field whose `text` explains it in --help; a class as default makes it a node of its own."""
    if isinstance(default, type):
        return field(default_factory=default, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class Ramp:
    """A quantity that runs from start to end along half a cosine over schedule_kimg."""

    start: float = MISSING
    end: float = MISSING


@dataclass
class SizeConfig:
    name: str = MISSING
    z_dim: int = key("length of the latent vector")
    embed_dim: int = key("length of the class embeddings")
    g_widths: list[int] = key("generator's channels at 4, 8, 16, ... px")
    d_widths: list[int] = key("discriminator's channels at 4, 8, 16, ... px")
    blocks: int = key("residual blocks a stage")
    expansion: int = key("times wider inside a residual block")
    patch_size: int = key("pixels a side that one finest feature holds: 1, 2 or 4")
    gradient_checkpointing: bool = key(
        "keep no features inside the layers, work them out again in the backward pass"
    )
    attention_resolutions: list[int] = key(
        "px of the stages that get attention, where the model has it"
    )


@dataclass
class ModelConfig:
    name: str = MISSING
    generator: dict[str, Any] = key("_target_ and arguments of the generator")
    discriminator: dict[str, Any] = key(
        "likewise; patch_px bounds what a logit sees, logits_px=1 judges the image as one"
    )


@dataclass
class LossConfig:
    name: str = MISSING
    gamma: Ramp = key("strength of the gradient penalties R1 and R2, .start and .end", Ramp)
    penalty_every: int = key("steps between two penalties; each counts as many times more")


@dataclass
class AugmentConfig:
    name: str = MISSING
    transforms: list[str] = key(
        "some of those in vgan/augment.py: flip, translation, rotation, hue, cutout, ..."
    )
    p: Ramp = key("probability of each transform for a picture, .start and .end", Ramp)
    target: float | None = key(
        "augment=adaptive: p moves to keep the sign of real logits at this mean; null: p as scheduled"
    )
    adapt_kimg: float = key("augment=adaptive: thousands of images in which p could go from 0 to 1")


@dataclass
class OptimConfig:
    optimizer: dict[str, Any] = key("_target_ and arguments of the optimizer")
    lr_G: Ramp = key("learning rate of the generator, .start and .end", Ramp)
    lr_D: Ramp = key("learning rate of the discriminator, .start and .end", Ramp)
    beta1: float = key("Adam's momentum")
    beta2: Ramp = key("Adam's second decay, .start and .end", Ramp)


@dataclass
class EmaConfig:
    halflife_kimg: float = key(
        "half-life of the generator's running average, in thousands of images"
    )
    ramp: float = key("half-life at most this share of the images so far; 0: no ramp")


@dataclass
class PeriodicEvaluationConfig:
    metrics: list[str] = key(
        "some of fid, kid, is, pr (precision and recall), diversity, classes, copies"
    )
    n: int = key("pictures drawn for an evaluation; fid of fewer than 50,000 is no published FID")
    repeats: int = key("evaluations with other seeds; their mean and spread are given")
    best_by: str = key("the best checkpoint stays as best.pt: by fid, kid, is, precision or recall")


@dataclass
class WatchdogConfig:
    max_rollbacks: int = key(
        "how often a run that went wrong goes back to a checkpoint and changes one thing; 0: it ends"
    )
    max_penalty: float = key("gamma / 2 (r1 + r2) above this counts as a fault; 0.1 is usual")
    min_diversity: float = key(
        "fakes of one class nearer to each other than this share of the reals' distance are a fault"
    )


@dataclass
class TrainConfig:
    """Everything that vgan-train reads."""

    run_dir: str = key(
        "folder of the run: config, statistics, grids, checkpoints; the same folder resumes"
    )
    seed: int = key("every random number of the run follows from it")
    device: str = key("auto, cpu, cuda, cuda:1, mps; auto takes the first accelerator there is")
    precision: str = key(
        "auto, fp32, tf32, bf16 or fp16; auto takes bf16 where the hardware multiplies it fast"
    )
    compile: str = key(
        "auto, true or false: torch.compile; auto compiles on NVIDIA GPUs with Triton"
    )
    cuda_graphs: bool = key(
        "with compile: replay each graph's kernels in one launch; more memory, for small networks"
    )
    depthwise: str = key(
        "auto, torch or triton: what runs activation and depthwise convolution; triton needs an NVIDIA GPU"
    )
    parallel: str = key(
        "under torchrun: ddp (whole networks on each device) or fsdp (spread over them, for large ones)"
    )
    deterministic: bool = key("only kernels that repeat bit for bit, on GPUs too; slower")
    threads: int = key("CPU threads for torch; 0 leaves torch's own choice")
    total_kimg: float = key("length of the run in thousands of real images shown")
    batch_size: int = key("images a step, over all processes")
    batch_gpu: int | None = key(
        "at most so many images at once on each device, with the same result; null: as many as fit"
    )
    schedule_kimg: float = key(
        "the quantities with a start and an end reach their end here, in thousands of images"
    )
    tick_kimg: float = key("statistics are written every so many thousand images")
    snapshot_kimg: float = key("a grid of fakes is written every so many thousand images")
    checkpoint_kimg: float = key("a checkpoint is written every so many thousand images")
    checkpoint_minutes: float = key("a checkpoint is written at least every so many minutes")
    keep_checkpoints: int = key("the newest so many checkpoints stay on disk")
    eval_kimg: float = key(
        "the averaged generator is evaluated every so many thousand images; 0: never"
    )
    watchdog: WatchdogConfig = key(
        "what counts as a run gone wrong, and how often it is set right", WatchdogConfig
    )
    model: ModelConfig = key("the networks", ModelConfig)
    size: SizeConfig = key("how large they are", SizeConfig)
    data: dict[str, Any] = key("where the pictures come from, and what suits them", dict)
    holdout: int = key(
        "pictures that are kept out of training, to see over-fitting by: their logits beside the others'"
    )
    penalty: str = key(
        "jvp (one forward-mode pass), double_backward (exact) or finite_difference (float32, for any network)"
    )
    gamma: str = key(
        "schedule (loss.gamma) or auto (from resolution and batch, corrected by the gradient norms of the run)"
    )
    loss: LossConfig = key("what the two networks are trained for", LossConfig)
    augment: AugmentConfig = key(
        "changes to the pictures before the discriminator sees them", AugmentConfig
    )
    optim: OptimConfig = key("how the weights move", OptimConfig)
    ema: EmaConfig = key("the averaged generator, which makes the pictures", EmaConfig)
    features: dict[str, Any] = key("the network that evaluation compares pictures by", dict)
    eval: PeriodicEvaluationConfig = key("what an evaluation measures", PeriodicEvaluationConfig)


@dataclass
class SampleConfig:
    """Everything that vgan-sample reads."""

    ckpt: str = key("a checkpoint file or a run folder (its newest checkpoint)")
    n: int | None = key("how many pictures; null: 64, or what suits motion and show")
    seed: int = key("a series of pictures that follows from it")
    seeds: Any = key("which of the series, by number: 7, 0-15 or [0-15,40]; null: the first n")
    label: Any = key(
        "class by number or name, or several in turn: [cat,dog]; null: picture i has class i modulo their number"
    )
    truncation: float = key(
        "1 is the model as trained; towards 0 pictures get cleaner and less varied"
    )
    out: str = key(
        "ends in .png: one grid; .npy or .zip: single pictures; .gif, .webp or .mp4: a film; else a folder of PNG files"
    )
    motion: str | None = key(
        "interpolate (through the pictures), classes (one picture through the labels) or walk (at random)"
    )
    frames: int = key("of a film, from one picture to the next")
    fps: float = key("frames a second of a film")
    loop: bool = key("the film ends where it begins")
    tiles: int = key("films side by side in one")
    show: str = key(
        "pictures, attention (where the generator looks) or patches (what looks fake to the discriminator)"
    )
    query: list[int] | None = key(
        "show=attention: [row,column] of the pixel that looks; null: the one that attention changed most"
    )
    columns: int | None = key("of a grid; null: as many as make it nearly square")
    zoom: int | None = key("times larger in grids and films; null: at least 64 px a picture")
    batch_size: int = key("pictures a pass")
    device: str = key("auto, cpu, cuda, cuda:1, mps")
    precision: str = key(
        "auto, fp32, tf32, bf16 or fp16; auto is fp32 on a CPU and bf16 on GPUs that multiply it fast"
    )


@dataclass
class EvalConfig:
    """Everything that vgan-eval reads."""

    ckpt: Any = key("a checkpoint file or a run folder (its newest checkpoint), or several: [a,b]")
    metrics: list[str] = key(
        "some of fid, kid, is, pr (precision and recall), diversity, classes, copies"
    )
    n: int = key("pictures drawn; fid of fewer than 50,000 is no published FID")
    repeats: int = key(
        "evaluations with the seeds seed, seed + 1, ...; their mean and spread are given"
    )
    seed: int = key("the pictures follow from it")
    features: dict[str, Any] = key(
        "the network to compare by: auto (the run's), inception, learned or a _target_ of yours",
        dict,
    )
    weights: str | None = key("file of Inception weights, for machines without a network")
    data: dict[str, Any] = key(
        "where the pictures lie now, if elsewhere than in training: .path, .root, .cache_dir", dict
    )
    batch_size: int = key("pictures a pass")
    device: str = key("auto, cpu, cuda, cuda:1, mps")
    precision: str = key(
        "of drawing: auto, fp32, tf32, bf16 or fp16; features are always worked out in fp32"
    )


@dataclass
class ExportConfig:
    """Everything that vgan-export reads."""

    ckpt: str = key("a checkpoint file or a run folder (its newest checkpoint)")
    to: str = key(
        "onnx, safetensors (weights), pt2 (torch.export), torchscript, or html (a page that draws in the browser)"
    )
    out: str | None = key("the file, or the folder of to=html; null: named after the checkpoint")
    input: str = key(
        "z (latents, and one-hot c) or numbers (of vgan-sample's pictures, and labels; torchscript on CPUs only)"
    )
    seed: int = key("input=numbers and to=html: the series that they count")
    license: str | None = key("under which terms the weights may be used; written into the file")
    runtime: str | None = key(
        "to=html: the folder dist of the npm package onnxruntime-web; null: fetched by npm, once"
    )


@dataclass
class DemoConfig:
    """Everything that vgan-demo reads."""

    ckpt: str = key("a checkpoint file or a run folder (its newest checkpoint)")
    host: str = key(
        "the address to answer at; 127.0.0.1 is for this machine alone, 0.0.0.0 for all that reach it"
    )
    port: int = key("of the address; 0: any free one")
    open: bool = key("open the page in the browser")
    seed: int = key("the series that the page's numbers count, as vgan-sample's")
    batch_size: int = key("pictures a pass, at most 64")
    device: str = key("auto, cpu, cuda, cuda:1, mps")
    precision: str = key(
        "auto, fp32, tf32, bf16 or fp16; auto is fp32 on a CPU and bf16 on GPUs that multiply it fast"
    )


@dataclass
class ReportConfig:
    """Everything that vgan-report reads."""

    run: Any = key("a run folder, or several to compare: [a,b]")
    out: str | None = key(
        "the .html file; null: report.html, in the run folder of one run, here for several"
    )


@dataclass
class DataConfig:
    """Everything that vgan-data reads."""

    do: str = key("info, check or pack; the first word may say it: vgan-data check data=folder ...")
    sheet: str | None = key(
        "a .png file for some pictures as training will see them, class by class; null: none"
    )
    data: dict[str, Any] = key("where the pictures come from", dict)


@dataclass
class DataNode(DataConfig, TrainConfig):
    """What vgan-data's options compose into: data sets and experiments set keys of training too, which it leaves unread."""


def explained_keys(schema: type, prefix: str = "") -> list[tuple[str, str]]:
    """(key, explanation) for every explained key of a schema, nested ones too, in their order."""
    pairs = []
    for f in fields(schema):
        if "help" in f.metadata:
            pairs.append((prefix + f.name, f.metadata["help"]))
        if is_dataclass(f.type) and f.type is not Ramp:
            pairs += explained_keys(f.type, f"{prefix}{f.name}.")  # type: ignore[arg-type]
    return pairs


def require(ok: bool, name: str, value: object, rule: str) -> None:
    """Raise the one-line error of a bad value unless `ok`."""
    if not ok:
        raise UserError(f"{name}={value}: {rule}")


def _require_nodes(cfg: Any, schema: type, prefix: str = "") -> None:
    """That what has keys of its own has not become a plain value, as ema=${seed} makes it."""
    for f in fields(schema):
        if get_origin(f.type) is list:
            require(
                isinstance(cfg[f.name], (list, ListConfig)),
                prefix + f.name,
                cfg[f.name],
                "must be a list, such as [8,8]",
            )
        if is_dataclass(f.type) or f.type == dict[str, Any]:
            name = prefix + f.name
            require(
                hasattr(cfg[f.name], "keys"),
                name,
                cfg[f.name],
                "has keys of its own; give them one by one",
            )
            if is_dataclass(f.type):
                _require_nodes(cfg[f.name], f.type, f"{name}.")  # type: ignore[arg-type]


def validate(cfg: Any) -> None:
    """What the types of a TrainConfig cannot say; raises UserError naming key, value and rule."""
    _require_nodes(cfg, TrainConfig)
    for name in (
        "total_kimg",
        "batch_size",
        "tick_kimg",
        "snapshot_kimg",
        "checkpoint_kimg",
        "checkpoint_minutes",
        "keep_checkpoints",
        "schedule_kimg",
    ):
        require(cfg[name] > 0, name, cfg[name], "must be above 0")
    require(
        cfg.total_kimg >= 0.001,
        "total_kimg",
        cfg.total_kimg,
        "must be at least 0.001, which is one image",
    )
    if cfg.batch_gpu is not None:
        require(cfg.batch_gpu > 0, "batch_gpu", cfg.batch_gpu, "must be above 0, or null")
    require(
        cfg.watchdog.max_rollbacks >= 0,
        "watchdog.max_rollbacks",
        cfg.watchdog.max_rollbacks,
        "must be 0 or above",
    )
    require(
        cfg.watchdog.max_penalty > 0,
        "watchdog.max_penalty",
        cfg.watchdog.max_penalty,
        "must be above 0",
    )
    least = cfg.watchdog.min_diversity
    require(0 <= least < 1, "watchdog.min_diversity", least, "must be from 0 to below 1")
    require(cfg.holdout >= 0, "holdout", cfg.holdout, "must be 0 or above")
    require(cfg.eval_kimg >= 0, "eval_kimg", cfg.eval_kimg, "must be 0 or above")
    _validate_judge(cfg.eval, "eval.")
    best, wanted = cfg.eval.best_by, list(cfg.eval.metrics)
    require(best in BEST_BY, "eval.best_by", best, f"must be one of {', '.join(BEST_BY)}")
    need = "pr" if best in ("precision", "recall") else best
    require(need in wanted, "eval.best_by", best, f"needs {need} among eval.metrics={wanted}")
    for name in ("seed", "threads"):
        require(cfg[name] >= 0, name, cfg[name], "must be 0 or above")
    require(
        cfg.precision in PRECISIONS,
        "precision",
        cfg.precision,
        f"must be one of {', '.join(PRECISIONS)}",
    )
    require(
        cfg.depthwise in ("auto", "torch", "triton"),
        "depthwise",
        cfg.depthwise,
        "must be auto, torch or triton",
    )
    require(
        cfg.depthwise != "triton" or cfg.penalty != "double_backward",
        "depthwise",
        "triton",
        "needs penalty=jvp or finite_difference",
    )
    require(cfg.parallel in ("ddp", "fsdp"), "parallel", cfg.parallel, "must be ddp or fsdp")
    require(
        cfg.parallel == "ddp" or cfg.precision != "fp16",
        "parallel",
        cfg.parallel,
        "needs bf16, tf32 or fp32; use ddp for fp16",
    )
    require(
        cfg.penalty in PENALTIES, "penalty", cfg.penalty, f"must be one of {', '.join(PENALTIES)}"
    )
    require(
        cfg.gamma in ("schedule", "auto"),
        "gamma",
        cfg.gamma,
        "must be schedule or auto; numbers go into loss.gamma",
    )
    if cfg.augment.target is not None:
        require(
            -1 < cfg.augment.target < 1,
            "augment.target",
            cfg.augment.target,
            "must be between -1 and 1",
        )
    require(
        cfg.augment.adapt_kimg > 0, "augment.adapt_kimg", cfg.augment.adapt_kimg, "must be above 0"
    )
    require(
        str(cfg.compile).lower() in ("auto", "true", "false"),
        "compile",
        cfg.compile,
        "must be auto, true or false",
    )
    require(cfg.size.z_dim > 0, "size.z_dim", cfg.size.z_dim, "must be above 0")
    require(cfg.size.blocks > 0, "size.blocks", cfg.size.blocks, "must be above 0")
    for name in ("g_widths", "d_widths"):
        widths = list(cfg.size[name])
        require(
            all(w > 0 and w % 8 == 0 for w in widths),
            f"size.{name}",
            widths,
            "every width must be a positive multiple of 8",
        )
    require(
        cfg.loss.penalty_every > 0, "loss.penalty_every", cfg.loss.penalty_every, "must be above 0"
    )
    require(0 <= cfg.optim.beta1 < 1, "optim.beta1", cfg.optim.beta1, "must be in [0, 1)")
    require(
        cfg.ema.halflife_kimg >= 0, "ema.halflife_kimg", cfg.ema.halflife_kimg, "must be 0 or above"
    )
    bounds = {
        "loss.gamma": (cfg.loss.gamma, 0, float("inf")),
        "augment.p": (cfg.augment.p, 0, 1),
        "optim.lr_G": (cfg.optim.lr_G, 0, float("inf")),
        "optim.lr_D": (cfg.optim.lr_D, 0, float("inf")),
        "optim.beta2": (cfg.optim.beta2, 0, 1 - 1e-9),
    }
    for name, (ramp, low, high) in bounds.items():
        for end in ("start", "end"):
            rule = f"must be from {low} to {high:g}" if high < 1e9 else f"must be {low} or above"
            require(low <= ramp[end] <= high, f"{name}.{end}", ramp[end], rule)


def _validate_judge(cfg: Any, prefix: str) -> None:
    metrics = list(cfg.metrics)
    known = bool(metrics) and all(m in METRICS for m in metrics)
    require(known, f"{prefix}metrics", metrics, f"must be some of {', '.join(METRICS)}")
    require(cfg.n >= 20, f"{prefix}n", cfg.n, "must be at least 20")
    require(cfg.repeats > 0, f"{prefix}repeats", cfg.repeats, "must be above 0")


def validate_eval(cfg: Any) -> None:
    """What the types of an EvalConfig cannot say; raises UserError naming key, value and rule."""
    _validate_judge(cfg, "")
    require(cfg.batch_size > 0, "batch_size", cfg.batch_size, "must be above 0")
    require(cfg.seed >= 0, "seed", cfg.seed, "must be 0 or above")
    require(
        cfg.precision in PRECISIONS,
        "precision",
        cfg.precision,
        f"must be one of {', '.join(PRECISIONS)}",
    )


def validate_export(cfg: Any) -> None:
    """What the types of an ExportConfig cannot say; raises UserError naming key, value and rule."""
    require(cfg.to in EXPORTS, "to", cfg.to, f"must be one of {', '.join(EXPORTS)}")
    require(cfg.input in ("z", "numbers"), "input", cfg.input, "must be z or numbers")
    require(cfg.seed >= 0, "seed", cfg.seed, "must be 0 or above")


def validate_sample(cfg: Any) -> None:
    """What the types of a SampleConfig cannot say; raises UserError naming key, value and rule."""
    for name in ("n", "columns", "zoom"):
        require(cfg[name] is None or cfg[name] > 0, name, cfg[name], "must be above 0, or null")
    for name in ("batch_size", "frames", "tiles"):
        require(cfg[name] > 0, name, cfg[name], "must be above 0")
    require(cfg.seed >= 0, "seed", cfg.seed, "must be 0 or above")
    require(
        cfg.precision in PRECISIONS,
        "precision",
        cfg.precision,
        f"must be one of {', '.join(PRECISIONS)}",
    )
    require(0 <= cfg.truncation <= 1, "truncation", cfg.truncation, "must be from 0 to 1")
    require(1 <= cfg.fps <= 100, "fps", cfg.fps, "must be from 1 to 100")
    require(
        cfg.motion in (None, *MOTIONS),
        "motion",
        cfg.motion,
        f"must be one of {', '.join(MOTIONS)}, or null",
    )
    require(cfg.show in SHOWN, "show", cfg.show, f"must be one of {', '.join(SHOWN)}")
    require(cfg.show == "pictures" or cfg.motion is None, "show", cfg.show, "goes with motion=null")
    require(
        cfg.loop or cfg.motion != "walk",
        "loop",
        cfg.loop,
        "goes with motion=interpolate or classes; a walk always closes",
    )
    for name in ("columns", "zoom"):
        require(
            cfg[name] is None or cfg.show == "pictures", name, cfg[name], "goes with show=pictures"
        )
    require(
        cfg.query is None or cfg.show == "attention", "query", cfg.query, "goes with show=attention"
    )


def validate_demo(cfg: Any) -> None:
    """What the types of a DemoConfig cannot say; raises UserError naming key, value and rule."""
    require(0 <= cfg.port <= 65535, "port", cfg.port, "must be from 0 to 65535")
    require(0 < cfg.batch_size <= 64, "batch_size", cfg.batch_size, "must be from 1 to 64")
    require(cfg.seed >= 0, "seed", cfg.seed, "must be 0 or above")
    require(
        cfg.precision in PRECISIONS,
        "precision",
        cfg.precision,
        f"must be one of {', '.join(PRECISIONS)}",
    )


def validate_data(cfg: Any) -> None:
    """What the types of a DataConfig cannot say; raises UserError naming key, value and rule."""
    require(cfg.do in ("info", "check", "pack"), "do", cfg.do, "must be info, check or pack")
    require(
        hasattr(cfg.data, "keys"), "data", cfg.data, "has keys of its own; give them one by one"
    )
    if cfg.sheet is not None:
        require(cfg.do != "pack", "sheet", cfg.sheet, "is written by info and check; leave it out")
        require(Path(cfg.sheet).suffix.lower() == ".png", "sheet", cfg.sheet, "must end in .png")


def typed(cfg: DictConfig) -> Any:
    """Return the dataclass instance that a composed config describes."""
    return OmegaConf.to_object(cfg)

"""Schemas of the commands: every key with its type, unit, rule and explanation.

The values live in configs/*.yaml. Hydra merges them into these dataclasses and refuses unknown
keys and wrong types. `vgan.validation.validate` checks the rules. `--help` prints the explanations.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from vgan.runtime.hub import REPO
from vgan.schema import (
    Ramp,
    Rule,
    above,
    at_least,
    between,
    from_to_below,
    key,
    node,
    one_of,
    some_of,
)

METRICS = some_of("fid", "kid", "is", "pr", "diversity", "classes", "copies")
PRECISION = one_of("auto", "fp32", "tf32", "bf16", "fp16")
WIDTHS = Rule(
    "every width must be a positive multiple of 8", lambda v: all(w > 0 and w % 8 == 0 for w in v)
)
_DEVICE = "auto, cpu, cuda, cuda:1 or mps; auto is the first accelerator found"
_PRECISION = "auto, fp32, tf32, bf16 or fp16; auto is bf16 where the GPU is fast at it, else fp32"
_CKPT = "checkpoint file, run folder (its newest checkpoint), export, or hf://USER/MODEL"
_FILMS = (".gif", ".webp", ".mp4")
_METRICS = "list of fid, kid, is, pr (precision and recall), diversity, classes, copies"


@dataclass
class SizeConfig:
    name: str = MISSING
    z_dim: int = key("dimension of the latent vector z", above(0))
    embed_dim: int = key("dimension of the class embeddings")
    g_widths: list[int] = key("channels of the generator at 4, 8, 16, ... px", WIDTHS)
    d_widths: list[int] = key("channels of the discriminator at 4, 8, 16, ... px", WIDTHS)
    blocks: int = key("residual blocks per stage", above(0))
    expansion: int = key("channel expansion inside a residual block")
    patch_size: int | None = key("px per side of a cell of the finest map; null: 16 x 16 cells")
    modulation: bool = key("whether z and class scale the features of every stage of the generator")
    gradient_checkpointing: bool | None = key(
        "recompute activations in the backward pass: less memory, a third more time; null: from "
        "512 px on"
    )
    attention_resolutions: list[int] = key("px of the stages with attention, if the model uses it")
    lr: float = key("learning rate that suits the widths, at the start", above(0))
    lr_end: float = key("the same at the end", above(0))
    batch_size: int = key("batch size of data=folder, hf and webdataset", above(0))


@dataclass
class ModelConfig:
    name: str = MISSING
    generator: dict[str, Any] = key("_target_ and arguments of the generator")
    discriminator: dict[str, Any] = key(
        "_target_ and arguments of the discriminator; patch_px limits the receptive field of a "
        "logit, logits_px=1 gives one logit per image"
    )


@dataclass
class LossConfig:
    name: str = MISSING
    gamma: Ramp = node(
        Ramp, "weight of the gradient penalties R1 and R2, .start and .end", at_least(0)
    )
    penalty_every: int = key(
        "steps between two gradient penalties; the weight is multiplied by it", above(0)
    )


@dataclass
class AugmentConfig:
    name: str = MISSING
    transforms: list[str] = key(
        "list of transforms of vgan/data/augment.py: flip, translation, rotation, hue, cutout, ..."
    )
    p: Ramp = node(Ramp, "probability of each transform, .start and .end", between(0, 1))
    target: float | None = key(
        "ADA: p moves to keep the mean sign of the real logits here; null: p follows its schedule",
        Rule("must be between -1 and 1", lambda v: -1 < v < 1),
    )
    adapt_kimg: float = key("ADA: thousands of images in which p can move from 0 to 1", above(0))


@dataclass
class OptimConfig:
    optimizer: dict[str, Any] = key("_target_ and arguments of the optimizer")
    lr_G: Ramp = node(Ramp, "learning rate of the generator, .start and .end", at_least(0))
    lr_D: Ramp = node(Ramp, "learning rate of the discriminator, .start and .end", at_least(0))
    beta1: float = key("Adam's beta1; SOAP needs 0", from_to_below(0, 1))
    beta2: Ramp = node(Ramp, "Adam's beta2, .start and .end", from_to_below(0, 1))


@dataclass
class EmaConfig:
    halflife_kimg: float = key("half-life of the EMA in thousands of images", at_least(0))
    ramp: float = key("limit of the half-life as a fraction of the images so far; 0: no limit")


@dataclass
class PeriodicEvaluationConfig:
    metrics: list[str] = key(_METRICS, METRICS)
    n: int = key("images per evaluation; a published FID needs 50,000", at_least(20))
    repeats: int = key("evaluations with different seeds; gives mean and deviation", above(0))
    best_by: str = key(
        "metric that selects the best checkpoint: fid, kid, is, precision or recall",
        one_of("fid", "kid", "is", "precision", "recall"),
    )


@dataclass
class TrackerConfig:
    name: str = key("none, wandb, trackio or mlflow", one_of("none", "wandb", "trackio", "mlflow"))
    project: str = key("project or experiment of the tracker; the run is named after run_dir")


@dataclass
class WatchdogConfig:
    max_rollbacks: int = key("rollbacks after a failure before the run ends", at_least(0))
    max_penalty: float = key("failure: gamma / 2 (r1 + r2) above this; 0.1 is usual", above(0))
    min_diversity: float = key(
        "failure: distance between fakes of a class below this fraction of the reals' distance",
        from_to_below(0, 1),
    )


@dataclass
class TrainConfig:
    """Keys of vgan-train and vgan-doctor."""

    run_dir: str = key(
        "folder of the run: config, statistics, grids, checkpoints; an existing run is resumed"
    )
    seed: int = key("seed of every random number of the run", at_least(0))
    init: str | None = key(f"model to start from, of no higher resolution: {_CKPT}")
    freeze_d: int = key("stages of D, from the pixels on, that keep their weights", at_least(0))
    device: str = key(_DEVICE)
    precision: str = key(_PRECISION, PRECISION)
    compile: str = key(
        "auto, true or false: torch.compile; auto compiles on NVIDIA GPUs with Triton",
        one_of("auto", "true", "false"),
    )
    cuda_graphs: bool = key("use CUDA graphs if compiled: faster for small networks, more memory")
    depthwise: str = key(
        "kernels of activation and depthwise convolution: auto, torch or triton (NVIDIA GPUs only)",
        one_of("auto", "torch", "triton"),
    )
    pointwise: str = key("1x1 convolutions: auto, conv, matmul", one_of("auto", "conv", "matmul"))
    parallel: str = key(
        "under torchrun: ddp (a copy per device) or fsdp (weights sharded, for large networks)",
        one_of("ddp", "fsdp"),
    )
    deterministic: bool = key("use deterministic kernels only; slower on GPUs")
    threads: int = key("CPU threads of torch; 0 keeps torch's default", at_least(0))
    total_kimg: float = key("length of the run in thousands of real images", between(0.001, 1e9))
    batch_size: int = key("images per step, over all processes", above(0))
    batch_gpu: int | None = key(
        "images per micro-batch on each device, with the same result; null: as many as fit",
        above(0),
    )
    schedule_kimg: float = key(
        "length of the schedules from .start to .end in thousands of images", above(0)
    )
    tick_kimg: float = key("thousands of images between two lines of statistics", above(0))
    snapshot_kimg: float = key("thousands of images between two grids of fakes", above(0))
    checkpoint_kimg: float = key("thousands of images between two checkpoints", above(0))
    checkpoint_minutes: float = key("maximum minutes between two checkpoints", above(0))
    keep_checkpoints: int = key("number of newest checkpoints kept on disk", above(0))
    eval_kimg: float = key(
        "thousands of images between two evaluations of the EMA generator; 0: never", at_least(0)
    )
    watchdog: WatchdogConfig = node(WatchdogConfig, "detection of failures, and rollbacks")
    model: ModelConfig = node(ModelConfig, "the two networks")
    size: SizeConfig = node(SizeConfig, "size of the networks")
    data: dict[str, Any] = node(dict, "data set: _target_ and arguments")
    holdout: int = key(
        "images held out of training; the gap between their logits and the others' shows "
        "overfitting of the discriminator",
        at_least(0),
    )
    penalty: str = key(
        "algorithm of the gradient penalty: jvp (one forward-mode pass), double_backward (exact) "
        "or finite_difference (float32, for any network)",
        one_of("jvp", "double_backward", "finite_difference"),
    )
    gamma: str = key(
        "schedule (loss.gamma) or auto (from resolution and batch size, corrected by the "
        "gradient norms during the run)",
        one_of("schedule", "auto"),
    )
    loss: LossConfig = node(LossConfig, "adversarial loss and gradient penalties")
    augment: AugmentConfig = node(AugmentConfig, "augmentation before the discriminator")
    optim: OptimConfig = node(OptimConfig, "optimizers and learning rates")
    ema: EmaConfig = node(EmaConfig, "exponential moving average (EMA) of the generator's weights")
    features: dict[str, Any] = node(dict, "feature network of the evaluation")
    eval: PeriodicEvaluationConfig = node(
        PeriodicEvaluationConfig, "evaluation during the run, every eval_kimg"
    )
    tracker: TrackerConfig = node(
        TrackerConfig, "experiment tracker, which gets the scalars and grids of TensorBoard"
    )


@dataclass
class SampleConfig:
    """Keys of vgan-sample."""

    ckpt: str = key(_CKPT)
    n: int | None = key("number of images; null: 64, or what suits motion and show", above(0))
    seed: int = key("seed of the series of images", at_least(0))
    seeds: Any = key("indices in the series: 7, 0-15 or [0-15,40]; null: the first n")
    label: Any = key(
        "class by number or name, or a list to cycle through: [cat,dog]; null: all classes, by "
        "the index of the image"
    )
    condition: Any = key(
        "conditions in the units of the data: [0.5,1], {age: 0.5} with means for the rest, or a "
        "list of those to cycle through; null: those of training images"
    )
    truncation: float = key("scale of z: 1 as trained; lower is less varied", between(0, 1))
    out: str = key(
        ".png: one grid; .npy or .zip: single images; .gif, .webp or .mp4: a film; else a folder "
        "of PNG files"
    )
    latent: Any = key(
        ".npy file of latents, or a list of them, instead of seeds: z of each image in a row, then "
        "perhaps its c, as vgan-invert writes them"
    )
    motion: str | None = key(
        "film: interpolate (between images), classes (one z, all labels), walk (random) or "
        "component (back and forth along one direction)",
        one_of("interpolate", "classes", "walk", "component"),
    )
    component: int | None = key(
        "principal component of the first layer to move along, from 1; null: 1; with "
        "show=components the first row",
        above(0),
    )
    strength: float = key("components: distance each way, in standard deviations of z", above(0))
    frames: int = key("frames from one image of a film to the next", above(0))
    fps: float = key("frames per second of a film", between(1, 100))
    loop: bool = key("whether a film returns to its first image")
    tiles: int = key("films side by side", above(0))
    show: str = key(
        "images, attention (maps of the generator), patches (logits of the discriminator) or "
        "components (an image moved along each)",
        one_of("images", "attention", "patches", "components"),
    )
    query: list[int] | None = key(
        "show=attention: [row,column] of the query pixel; null: the pixel attention changed most"
    )
    columns: int | None = key("columns of a grid; null: about as many as rows", above(0))
    zoom: int | None = key(
        "enlargement in grids and films; null: at least 64 px an image", above(0)
    )
    batch_size: int = key("images per forward pass", above(0))
    device: str = key(_DEVICE)
    precision: str = key(_PRECISION, PRECISION)


@dataclass
class InvertConfig:
    """Keys of vgan-invert."""

    ckpt: str = key(_CKPT)
    image: str = key("photo; cropped and resized as the images of training")
    label: Any = key("class by number or name; null: the one in which the search ends nearest")
    out: str = key(".npy file of the latent; the photo and the image found are .png beside it")
    animation: str | None = key(
        "film of the search, .gif, .webp or .mp4; null: none",
        Rule("must end in .gif, .webp or .mp4", lambda v: Path(v).suffix.lower() in _FILMS),
    )
    fps: float = key("frames per second of the film", between(1, 100))
    zoom: int | None = key("enlargement; null: at least 256 px an image", above(0))
    draws: int = key("random images from which the nearest are improved", above(0))
    starts: int = key("how many of them are improved, in one batch; the best is kept", above(0))
    steps: int = key("steps of Adam", above(0))
    lr: float = key("learning rate at the start; it falls to 0 along a cosine", above(0))
    prior: float = key("weight of keeping the norm of z near sqrt(z_dim), as trained", at_least(0))
    seed: int = key("seed of the random images", at_least(0))
    batch_size: int = key("random images per forward pass", above(0))
    device: str = key(_DEVICE)


@dataclass
class EvalConfig:
    """Keys of vgan-eval."""

    ckpt: Any = key(f"{_CKPT}; or several: [a,b]")
    metrics: list[str] = key(_METRICS, METRICS)
    n: int = key("number of generated images; a published FID needs 50,000", at_least(20))
    repeats: int = key(
        "evaluations with the seeds seed, seed + 1, ...; gives mean and deviation", above(0)
    )
    seed: int = key("seed of the generated images", at_least(0))
    features: dict[str, Any] = node(
        dict, "auto (as in the run), inception, dinov2, mobilenet, learned or a _target_"
    )
    weights: str | None = key("file of the features' weights, for machines without internet access")
    data: dict[str, Any] = node(
        dict, "new location of the training data, if they moved: .path, .root, .repo, .cache_dir"
    )
    batch_size: int = key("images per forward pass", above(0))
    device: str = key(_DEVICE)
    precision: str = key(f"of the generator: {_PRECISION}; features use fp32", PRECISION)


@dataclass
class ExportConfig:
    """Keys of vgan-export."""

    ckpt: str = key(_CKPT)
    to: str = key(
        "onnx, safetensors (weights), pt2 (torch.export), torchscript, html (a page that runs the "
        "model in the browser), hub (upload to the Hugging Face Hub) or checkpoint (the newest "
        "format, for training)",
        one_of("onnx", "safetensors", "pt2", "torchscript", "html", "hub", "checkpoint"),
    )
    out: str | None = key(
        "output file, or folder for to=html; null: named after the checkpoint. to=hub: folder that "
        "gets the files of the repo, without an upload; null: upload"
    )
    repo: str | None = key(
        "to=hub: repo on the Hugging Face Hub, USER/MODEL; created if it does not exist",
        Rule(
            "must be USER/MODEL, of letters, digits, -, _ and .", lambda v: bool(REPO.fullmatch(v))
        ),
    )
    private: bool = key(
        "to=hub: whether a new repo is private; false: the Hub's default, which is public unless "
        "an organization has set another"
    )
    input: str = key(
        "z (latents and c) or numbers (indices in vgan-sample's series, and labels; "
        "torchscript on CPUs only)",
        one_of("z", "numbers"),
    )
    seed: int = key("input=numbers, to=html and to=hub: seed of the series", at_least(0))
    license: str | None = key("license of the weights, such as CC-BY-4.0, written into the file")
    runtime: str | None = key(
        "to=html: folder dist of the npm package onnxruntime-web; null: downloaded by npm"
    )


@dataclass
class DemoConfig:
    """Keys of vgan-demo."""

    ckpt: str = key(_CKPT)
    host: str = key("address to listen on: 127.0.0.1 for this machine only, 0.0.0.0 for all")
    port: int = key("port to listen on; 0: any free one", between(0, 65535))
    open: bool = key("whether to open the page in the browser")
    seed: int = key("seed of the series of images, as in vgan-sample", at_least(0))
    batch_size: int = key("images per forward pass, at most 64", between(1, 64))
    device: str = key(_DEVICE)
    precision: str = key(_PRECISION, PRECISION)


@dataclass
class ReportConfig:
    """Keys of vgan-report."""

    run: Any = key("run folder, or several to compare: [a,b]")
    out: str | None = key(
        "output .html file; null: report.html, in the run folder if there is only one"
    )


@dataclass
class DataConfig:
    """Keys of vgan-data."""

    do: str = key(
        "info, check or pack; may be the first word: vgan-data check data=folder ...",
        one_of("info", "check", "pack"),
    )
    sheet: str | None = key(
        "output .png file with images of each class, as in training; null: none",
        Rule("must end in .png", lambda v: Path(v).suffix.lower() == ".png"),
    )
    data: dict[str, Any] = node(dict, "data set: _target_ and arguments")

"""Every YAML composes, builds and takes a step."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vgan import cli
from vgan.config import TrainConfig
from vgan.models.layers import PointwiseConv2d
from vgan.runtime.errors import UserError
from vgan.runtime.instantiate import construct, construct_own
from vgan.schema import CONFIG_DIR
from vgan.training.setup import build_networks, setup
from vgan.training.step import train_step

CPU = torch.device("cpu")
TINY = [
    "size.g_widths=[8,8,8,8,8,8,8]",
    "size.d_widths=[8,8,8,8,8,8,8]",
    "size.blocks=1",
    "batch_size=2",
    "data.cache_dir=null",
]
GROUPS = {
    g: sorted(p.stem for p in (CONFIG_DIR / g).glob("*.yaml"))
    for g in ("model", "size", "data", "loss", "augment", "experiment")
}


def train_config(*overrides: str) -> TrainConfig:
    cfg = cli.compose("vgan-train", overrides)
    assert isinstance(cfg, TrainConfig)
    return cfg


def one_step(cfg: TrainConfig) -> dict[str, float]:
    run = setup(cfg, CPU, "fp32")
    networks: Sequence[torch.nn.Module] = (run.state.G, run.state.D)
    before = [p.detach().clone() for net in networks for p in net.parameters()]
    with closing(run.open_loader()) as loader:
        scalars = train_step(run.state, run.objective, run.batch(loader), run.hyperparameters())
    after = [p for net in networks for p in net.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(before, after))
    return {k: v.item() for k, v in scalars.items()}


@pytest.mark.parametrize(
    ("group", "option"),
    [(g, o) for g in ("model", "loss", "augment") for o in GROUPS[g]],
    ids=lambda x: x,
)
def test_options_build_and_take_a_step(group: str, option: str) -> None:
    scalars = one_step(
        train_config(*TINY, "data.resolution=16", "data.size=40", f"{group}={option}")
    )
    assert all(np.isfinite(v) for v in scalars.values())
    wanted = "loss/D loss/G logits/real logits/fake logits/real_sign penalty/r1 penalty/r2"
    wanted += " grad_norm/D grad_norm/G broken/D broken/G"
    assert set(wanted.split()) <= scalars.keys()


@pytest.mark.parametrize(
    ("loss", "moves"), [("rpgan", False), ("wgan", False), ("nonsaturating", True)]
)
def test_the_bias_of_logits_stays_where_it_has_no_effect(loss: str, moves: bool) -> None:
    """Rounding would move it, at the full rate of Adam."""
    cfg = train_config(*TINY, "data.resolution=16", "data.size=40", f"loss={loss}")
    run = setup(cfg, CPU, "fp32")
    with closing(run.open_loader()) as loader:
        for _ in range(3):
            train_step(run.state, run.objective, run.batch(loader), run.hyperparameters())
    (bias,) = run.state.D.logit_biases()
    assert (bias.item() != 0) == moves


@pytest.mark.parametrize(
    "size", [pytest.param(s, marks=pytest.mark.slow) if s == "l" else s for s in GROUPS["size"]]
)
def test_sizes_build_at_every_resolution_and_take_a_step(size: str) -> None:
    config = train_config(f"size={size}", "batch_size=1", "data.resolution=16", "data.size=40")
    counts = []
    for resolution in (16, 64, 256, 1024):
        sizes = {"img_resolution": resolution, "img_channels": 3, "label_dim": 2}
        with torch.device("meta"):
            G = construct(config.model.generator, "model.generator", **sizes)
            D = construct(config.model.discriminator, "model.discriminator", **sizes)
        counts += [sum(p.numel() for p in net.parameters()) for net in (G, D)]
    assert counts[4] > counts[0]
    if size != "xl":  # which takes 20 GB and a minute of a CPU
        one_step(config)
    if size in ("l", "xl"):
        about = {"l": 80e6, "xl": 500e6}[size]
        assert all(0.75 * about < n < 1.2 * about for n in counts[2:4])


def fake_set(size: tuple[int, int], attributes: bool) -> type:
    class Fake:
        classes = tuple("abcdefghij")
        attr_names = ("Smiling", "Male", "")

        def __init__(self, root: str, **_: object) -> None: ...

        def __len__(self) -> int:
            return 4

        def __getitem__(self, i: int) -> tuple[Image.Image, object]:
            return Image.new("RGB", size, (i, 0, 0)), torch.tensor([0, 1, 0]) if attributes else i

    return Fake


@pytest.mark.parametrize(
    "option", [name for name in GROUPS["data"] if name not in ("webdataset", "hf")]
)  # which test_stream.py and test_hub_sets.py train on
def test_data_sets_build_and_take_a_step(
    option: str, monkeypatch: pytest.MonkeyPatch, pictures_npy: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("torchvision.datasets.CIFAR10", fake_set((32, 32), False))
    monkeypatch.setattr("torchvision.datasets.CelebA", fake_set((178, 218), True))
    extra = {
        "folder": [f"data.path={pictures_npy}"],
        "shapes": ["data.size=40"],
        "celeba": ["data.attributes=[Smiling]"],
    }
    config = train_config(
        f"data={option}", *TINY, *extra.get(option, []), f"data.cache_dir={tmp_path / 'cache'}"
    )
    assert np.isfinite(one_step(config)["loss/D"])


@pytest.mark.parametrize("option", GROUPS["experiment"])
def test_experiments_build_and_take_a_step(
    option: str, monkeypatch: pytest.MonkeyPatch, pictures_npy: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("torchvision.datasets.CIFAR10", fake_set((32, 32), False))
    monkeypatch.setattr("torchvision.datasets.CelebA", fake_set((178, 218), True))
    own = {
        key: [f"data.path={pictures_npy}", "data.resolution=16"]
        for key in ("cifar10_cpu", "few", "grow")
    }
    config = train_config(
        f"experiment={option}", *TINY, *own.get(option, []), f"data.cache_dir={tmp_path}"
    )
    assert np.isfinite(one_step(config)["loss/D"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"_target_": "vgan.models.nowhere.Generator"},
            r"node._target_=vgan.models.nowhere.Generator: cannot be imported",
        ),
        (
            {"_target_": "vgan.models.generator.Generator", "z_dmi": 3},
            "node.z_dmi=3: .* it takes z_dim",
        ),
        (
            {"_target_": "vgan.models.generator.Generator", "z_dim": "abc", "widths": [8, 8, 8]},
            "node.z_dim=abc: must be int",
        ),
        ({"_target_": "vgan.models.generator.Generator", "z_dim": 8}, "node.widths: is missing"),
        (
            {"_target_": "vgan.models.generator.Generator", "z_dim": 8, "widths": [8, "x", 8]},
            "node.widths",
        ),
        (
            {"_target_": "vgan.models.generator.Generator", "z_dim": 8, "widths": [8]},
            "node.widths=.*needs 3",
        ),
        ({"z_dim": 8}, "has no _target_"),
    ],
)
def test_construct_names_node_key_value_and_rule(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        construct(config, "node", img_resolution=16)
    assert "\n" not in str(caught.value)


def test_initial_weights_follow_from_the_seed_and_leave_the_global_state() -> None:
    configs = [train_config(*TINY, f"seed={seed}") for seed in (1, 1, 2)]
    sizes = {"img_resolution": 16, "img_channels": 3, "label_dim": 2}
    state = torch.random.get_rng_state()
    nets = [build_networks(config, sizes)[0].state_dict() for config in configs]
    assert torch.equal(torch.random.get_rng_state(), state)
    weight = [n["to_rgb.0.weight"] for n in nets]
    assert torch.equal(weight[0], weight[1])
    assert not torch.equal(weight[0], weight[2])


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "os.system", "command": "true"},
        {"_target_": "vgan.models.generator.torch.hub.load"},
        {"_target_": "vgan.models.layers.upsample2x"},  # a function, and not a network
        {"_target_": "vgan.modelsx.Generator"},
        {
            "_target_": "vgan.models.generator.Generator",
            "widths": [{"_target_": "os.system", "command": "true"}],
        },
        {"_target_": "vgan.models.generator.Generator", "z_dim": {"a": {"_target_": "os.system"}}},
        {"widths": [8]},
    ],
)
def test_a_checkpoint_may_name_vgans_networks_only(node: dict[str, object]) -> None:
    with pytest.raises(UserError, match="vgan's own classes only"):
        construct_own(node, "model.generator", {})


@pytest.mark.parametrize("pointwise", ["auto", "matmul"])
def test_pointwise_convolutions_run_as_chosen(pointwise: str) -> None:
    words = ("data.resolution=16", "data.size=40", f"pointwise={pointwise}")
    state = setup(train_config(*TINY, *words), CPU, "fp32").state
    for network in (state.G, state.D, state.G_ema):
        layers = [m for m in network.modules() if isinstance(m, PointwiseConv2d)]
        assert {layer.as_matmul for layer in layers} == {pointwise == "matmul"}

"""Compare the gradient noise of estimated penalties with that of choosing a batch.

    uv run python scripts/penalty_noise.py outputs/shapes-attn-xs

Loads a run's newest checkpoint. At its gamma, and in float32, it compares gradients of the
discriminator's loss: their variance between batches with exact penalties, which every method has,
and their variance between draws of v for one batch, which the estimate adds, for several kinds of
v and for the finite difference.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from vgan.cli import compose
from vgan.config import TrainConfig
from vgan.data.loader import Loader
from vgan.runs import checkpoint
from vgan.runtime.device import pick_device, prepare_process
from vgan.runtime.errors import UserError
from vgan.runtime.rng import Streams
from vgan.training.losses import double_backward, finite_difference, jvp
from vgan.training.setup import Run, setup

BATCHES, DRAWS = 12, 12


def open_run(run_dir: Path) -> tuple[Run, Loader]:
    """Open the run in `run_dir` at its newest checkpoint, in float32."""
    _, state = checkpoint.load_newest(run_dir)
    device = pick_device("auto")
    prepare_process(device, "fp32", 0)
    defaults = OmegaConf.structured(compose("vgan-train", ["run_dir=unused"]))
    cfg = OmegaConf.to_object(OmegaConf.merge(defaults, state["config"]))
    assert isinstance(cfg, TrainConfig)
    run = setup(cfg, device, "fp32")
    run.state.load_state_dict(state)
    return run, Loader(run.dataset, cfg.batch_size, cfg.seed, device)


def noise(gradients: list[Tensor]) -> float:
    """Return the mean squared distance of gradients from their mean, unbiased."""
    stack = torch.stack(gradients)
    return float((stack - stack.mean(0)).square().sum() / (len(gradients) - 1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path)
    args = parser.parse_args()
    try:
        run, loader = open_run(args.run_dir)
    except UserError as e:
        sys.exit(f"penalty_noise: {e}")
    G, D, n, cur_nimg = run.state.G, run.state.D, run.cfg.batch_size, run.state.cur_nimg
    gamma = run.schedules["gamma"](cur_nimg)
    weights = [p for p in D.parameters() if p.requires_grad]

    def gradient(
        batch: int,
        penalty: Callable[..., tuple[Tensor, Tensor]] | None,
        v: Tensor | None,
        weight: float = 1,
    ) -> Tensor:
        real, c = loader.batch(cur_nimg + batch * n)
        rng = Streams(1, cur_nimg + batch * n, n, run.device)
        with torch.no_grad():
            fake = G(rng.normal("z_d", G.z_dim), c)
        images, cc = torch.cat([real, fake]), torch.cat([c, c])
        if penalty is None:
            logits, grad_norm_sq = D(images, cc), torch.zeros(2 * n)
        else:
            logits, grad_norm_sq = penalty(D, images, cc, images if v is None else v)
        penalty_loss = weight * gamma / 2 * 2 * grad_norm_sq.mean()
        loss = run.objective.d_loss(*logits.chunk(2)) + penalty_loss
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])

    def averaged(count: int) -> Callable[..., tuple[Tensor, Tensor]]:
        def penalty(D: Any, x: Tensor, c: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            results = [jvp(D, x, c, vv) for vv in v.chunk(count)]
            return results[0][0], torch.stack([r[1] for r in results]).mean(0)

        return penalty

    shape = (2 * n, *loader.batch(cur_nimg)[0].shape[1:])
    draw = torch.Generator().manual_seed(0)

    def signs(*size: int) -> Tensor:
        return torch.randint(0, 2, size, generator=draw).float() * 2 - 1

    kinds: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], Callable[[], Tensor]]] = {
        "+1 and -1": (jvp, lambda: signs(*shape)),
        "normal": (jvp, lambda: torch.randn(shape, generator=draw)),
        "+1 and -1, two per image": (averaged(2), lambda: signs(2 * shape[0], *shape[1:])),
        "one v for the whole batch": (jvp, lambda: signs(1, *shape[1:]).expand(shape)),
        "real and fake share v": (jvp, lambda: signs(n, *shape[1:]).repeat(2, 1, 1, 1)),
        "antithetic, v and -v": (averaged(2), lambda: torch.cat([v := signs(*shape), -v])),
        "finite difference": (finite_difference, lambda: signs(*shape)),
    }
    exact_gradients = [gradient(batch, double_backward, None) for batch in range(BATCHES)]
    between_batches = noise(exact_gradients)
    without = noise([gradient(batch, None, None) for batch in range(BATCHES)])
    norm = float(torch.stack(exact_gradients).mean(0).square().sum())
    print(f"{args.run_dir} at {cur_nimg:,} images, gamma {gamma:g}")
    print(f"squared norm of the mean gradient {norm:.3g}\n")
    print("| penalty | variance between batches or draws | of that between batches |")
    print("|---|---|---|")
    print(f"| exact, between batches | {between_batches:.3g} | 1 |")
    print(f"| no penalty, between batches | {without:.3g} | {without / between_batches:.2f} |")
    for name, (penalty, directions) in kinds.items():
        added = noise([gradient(0, penalty, directions()) for _ in range(DRAWS)])
        print(
            f"| {name}, between draws | {added:.3g} | {added / between_batches:.2f} |", flush=True
        )
    every_second = noise([gradient(0, jvp, signs(*shape), weight=2) for _ in range(DRAWS)])
    ratio = every_second / between_batches
    print(f"| +1 and -1, counted twice (every 2nd step) | {every_second:.3g} | {ratio:.2f} |")
    loader.close()


if __name__ == "__main__":
    main()

"""What the oracle sees in the samples of a model trained on the embedded shapes.

    uv run python scripts/score_shapes.py outputs/shapes-attn-xs [number of samples, 2000]

precision: the share of samples that show the shape they were asked for, in one of the eight colours; coverage: how many of
the 64 pairs of shape and colour are among those.
"""

import sys

import numpy as np
import torch

from vgan.data.shapes import SHAPE_NAMES
from vgan.evaluation.shapes_oracle import Oracle, score_samples
from vgan.inference.latents import draw
from vgan.inference.load import load_generator


def main(ckpt: str, n: int) -> None:
    G = load_generator(ckpt)
    batches = [draw(G, index, seed=0) for index in torch.arange(n).split(100)]
    images = torch.cat(batches).permute(0, 2, 3, 1).cpu().numpy()
    reading = Oracle(images.shape[1])(images)
    asked = np.arange(n) % len(SHAPE_NAMES)  # draw takes the classes in turn
    score = score_samples(reading, asked)
    print(
        f"{n} samples: precision {score['precision']:.1%}, coverage {score['coverage']} of 64 pairs of shape and colour"
    )
    for label, name in enumerate(SHAPE_NAMES):
        print(f"  {name:<9} {np.mean(reading.shape[asked == label] == label):.1%}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 2000) if len(
        sys.argv
    ) > 1 else sys.exit(__doc__)

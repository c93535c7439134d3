"""Score the samples of a model trained on the embedded shapes with the oracle.

    uv run python scripts/score_shapes.py outputs/shapes-attn-xs [number of samples, 2000]

precision: the share of samples that show the shape of their class in one of the eight colours.
coverage: how many of the 64 pairs of shape and colour are among those.
"""

import sys

import numpy as np
import torch

from vgan.data.shapes import SHAPE_NAMES
from vgan.evaluation.shapes_oracle import Oracle, score_samples
from vgan.inference.latents import draw
from vgan.inference.load import load_generator


def main(ckpt: str, n: int) -> None:
    """Print the scores of n samples, of all classes and of each."""
    G = load_generator(ckpt)
    batches = [draw(G, index, seed=0) for index in torch.arange(n).split(100)]
    images = torch.cat(batches).permute(0, 2, 3, 1).cpu().numpy()
    reading = Oracle(images.shape[1])(images)
    labels = np.arange(n) % len(SHAPE_NAMES)  # the classes that draw gives
    score = score_samples(reading, labels)
    coverage = f"{score['coverage']} of 64 pairs of shape and colour"
    print(f"{n} samples: precision {score['precision']:.1%}, coverage {coverage}")
    for label, name in enumerate(SHAPE_NAMES):
        print(f"  {name:<9} {np.mean(reading.shape[labels == label] == label):.1%}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 2000)

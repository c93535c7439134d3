"""An oracle that recognises the images of `vgan.data.shapes.Shapes`, and scores of samples by it."""

from dataclasses import dataclass

import numpy as np

from vgan.data.shapes import PALETTE, RADIUS, SHAPE_NAMES, coverage


@dataclass(frozen=True)
class Reading:
    """What the oracle sees in N pictures."""

    shape: np.ndarray  # int64 (N,), -1 where no shape is recognisable
    colour: np.ndarray  # int64 (N,), -1 where no colour is
    score: (
        np.ndarray
    )  # float32 (N,): overlap of the picture with the best shape it could be, 1 is perfect


class Oracle:
    """Names shape and colour of pictures like those of `Shapes`; exact on its own renderings.

    A picture is split into ground (the median of its border) and figure, whose colour is the
    nearest of the eight. The figure's cover is compared with every shape of the same area at the
    same place in every turn, by intersection over union. What overlaps by less than `threshold`, is
    not of one colour, or not of a size that `Shapes` draws, is not recognised. The default lets
    through all renderings (0.85 and more) and all that are softened over 3 px, but few over 5 px.
    """

    def __init__(self, resolution: int, threshold: float = 0.75, step_degrees: float = 6.0) -> None:
        self._size, self._threshold = resolution, threshold
        period = {"circle": 0, "ring": 0, "square": 90, "plus": 90, "triangle": 120, "star": 72}
        turns = [
            (k, t)
            for k, name in enumerate(SHAPE_NAMES)
            for t in np.arange(0, max(1, period.get(name, 360)), step_degrees)
        ]
        self._kinds = np.array([k for k, _ in turns])
        self._turns = np.radians([t for _, t in turns])
        fine, n = 128, len(SHAPE_NAMES)
        middle, radius = np.full(n, fine / 2), np.full(n, fine / 3)
        upright = coverage(np.arange(n), middle, middle, radius, np.zeros(n), fine)
        at = (np.arange(fine) + 0.5 - fine / 2) / (fine / 3)
        weight = upright.sum((1, 2))
        self._areas = (weight / (fine / 3) ** 2)[self._kinds]  # of a shape of radius 1
        x, y = upright.sum(1) @ at / weight, upright.sum(2) @ at / weight  # its centre of mass
        c, s = np.cos(self._turns), np.sin(self._turns)
        self._mass_x = c * x[self._kinds] - s * y[self._kinds]  # and where a turn puts it
        self._mass_y = s * x[self._kinds] + c * y[self._kinds]

    def __call__(self, images: np.ndarray) -> Reading:
        """images: uint8 (N, resolution, resolution, 3)."""
        shape, colour, score = zip(*(self._read(image.astype(np.float32)) for image in images))
        return Reading(np.array(shape), np.array(colour), np.array(score, dtype=np.float32))

    def _read(self, image: np.ndarray) -> tuple[int, int, float]:
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        difference = image - np.median(border, axis=0)
        far = np.linalg.norm(difference, axis=2)
        if far.max() < 50:
            return -1, -1, 0.0  # an empty ground
        axis = np.median(difference[far > 0.7 * far.max()], axis=0)
        apart = np.linalg.norm(PALETTE - (axis + np.median(border, axis=0)), axis=1)
        colour = int(apart.argmin()) if apart.min() < 50 else -1
        cover = (difference @ axis / (axis @ axis)).clip(0, 1)
        impure = np.linalg.norm(difference - cover[..., None] * axis, axis=2).mean() / far.mean()
        shape, score = self._match(cover)
        return (shape if score >= self._threshold and impure < 0.25 else -1), colour, score

    def _match(self, cover: np.ndarray) -> tuple[int, float]:
        """The best shape for a cover (size, size) in [0, 1], and its intersection over union."""
        at, area = np.arange(self._size) + 0.5, float(cover.sum())
        mx, my = cover.sum(0) @ at / area, cover.sum(1) @ at / area
        radius = np.sqrt(area / self._areas)
        low, high = 0.8 * RADIUS[0] * self._size, 1.2 * RADIUS[1] * self._size
        fits = (radius > low) & (radius < high)
        if not fits.any():
            return -1, 0.0
        cx, cy = (m - radius * mass for m, mass in ((mx, self._mass_x), (my, self._mass_y)))
        could = coverage(
            self._kinds[fits], cx[fits], cy[fits], radius[fits], self._turns[fits], self._size
        )
        overlap = np.minimum(could, cover).sum((1, 2)) / np.maximum(could, cover).sum((1, 2))
        return int(self._kinds[fits][overlap.argmax()]), float(overlap.max())


def score_samples(reading: Reading, asked: np.ndarray) -> dict[str, float]:
    """precision: the share of N pictures that show the asked shape (N,) in a recognised colour; coverage: how many of
    the 64 pairs of shape and colour are among those; colours_seen, shapes_seen: likewise, of 8 each."""
    right = (reading.shape == asked) & (reading.colour >= 0)
    pairs = set(zip(reading.shape[right].tolist(), reading.colour[right].tolist()))
    return {
        "precision": float(right.mean()),
        "coverage": len(pairs),
        "shapes_seen": len({s for s, _ in pairs}),
        "colours_seen": len({c for _, c in pairs}),
    }

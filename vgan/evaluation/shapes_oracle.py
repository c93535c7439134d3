"""An oracle that recognises the images of `vgan.data.shapes.Shapes`, and scores by it."""

from dataclasses import dataclass

import numpy as np

from vgan.data.shapes import PALETTE, RADIUS, SHAPE_NAMES, coverage


@dataclass(frozen=True)
class Reading:
    """Shapes and colours that the oracle recognises in N images."""

    shape: np.ndarray  # int64 (N,), -1 if no shape is recognised
    colour: np.ndarray  # int64 (N,), -1 if no colour is recognised
    score: np.ndarray  # float32 (N,): overlap with the best shape, 1 is perfect


class Oracle:
    """A classifier of shape and colour of images like those of `Shapes`. It knows its own drawings.

    An image is split into background (the median of its border) and figure, whose colour is the
    nearest of the eight. The coverage of the figure is compared with every shape of the same area
    and centre at every angle, by intersection over union. A figure is not recognised if it overlaps
    by less than `threshold`, has several colours, or a size that `Shapes` does not draw. The
    default recognises all drawings (0.85 and more) and all that are blurred over 3 px, but few of
    those blurred over 5 px.
    """

    def __init__(self, resolution: int, threshold: float = 0.75, step_degrees: float = 6.0) -> None:
        self._size, self._threshold = resolution, threshold
        period = {"circle": 0, "ring": 0, "square": 90, "plus": 90, "triangle": 120, "star": 72}
        kinds: list[int] = []
        angles: list[float] = []
        for kind, name in enumerate(SHAPE_NAMES):
            steps = np.arange(0, max(1, period.get(name, 360)), step_degrees)
            kinds += [kind] * len(steps)
            angles += steps.tolist()
        self._kinds, self._turns = np.array(kinds), np.radians(angles)
        fine, n = 128, len(SHAPE_NAMES)
        middle, radius = np.full(n, fine / 2), np.full(n, fine / 3)
        upright = coverage(np.arange(n), middle, middle, radius, np.zeros(n), fine)
        at = (np.arange(fine) + 0.5 - fine / 2) / (fine / 3)
        weight = upright.sum((1, 2))
        self._areas = (weight / (fine / 3) ** 2)[self._kinds]  # of a shape of radius 1
        x, y = upright.sum(1) @ at / weight, upright.sum(2) @ at / weight  # centre of mass
        c, s = np.cos(self._turns), np.sin(self._turns)
        self._mass_x = c * x[self._kinds] - s * y[self._kinds]  # after the turn
        self._mass_y = s * x[self._kinds] + c * y[self._kinds]

    def __call__(self, images: np.ndarray) -> Reading:
        """Recognise uint8 images (N, resolution, resolution, 3)."""
        shape, colour, score = zip(*(self._read(image.astype(np.float32)) for image in images))
        return Reading(np.array(shape), np.array(colour), np.array(score, dtype=np.float32))

    def _read(self, image: np.ndarray) -> tuple[int, int, float]:
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        difference = image - np.median(border, axis=0)
        far = np.linalg.norm(difference, axis=2)
        if far.max() < 50:
            return -1, -1, 0.0  # only background
        axis = np.median(difference[far > 0.7 * far.max()], axis=0)
        apart = np.linalg.norm(PALETTE - (axis + np.median(border, axis=0)), axis=1)
        colour = int(apart.argmin()) if apart.min() < 50 else -1
        cover = (difference @ axis / (axis @ axis)).clip(0, 1)
        impure = np.linalg.norm(difference - cover[..., None] * axis, axis=2).mean() / far.mean()
        shape, score = self._match(cover)
        return (shape if score >= self._threshold and impure < 0.25 else -1), colour, score

    def _match(self, cover: np.ndarray) -> tuple[int, float]:
        """Return the best shape for a coverage (size, size) and its intersection over union."""
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


def score_samples(reading: Reading, labels: np.ndarray) -> dict[str, float]:
    """Score N samples by the shapes (N,) that they should show.

    precision: share that shows this shape in a recognised colour. coverage: number of the 64 pairs
    of shape and colour among those. shapes_seen, colours_seen: number of the 8 shapes and colours.
    """
    right = (reading.shape == labels) & (reading.colour >= 0)
    pairs = set(zip(reading.shape[right].tolist(), reading.colour[right].tolist()))
    return {
        "precision": float(right.mean()),
        "coverage": len(pairs),
        "shapes_seen": len({s for s, _ in pairs}),
        "colours_seen": len({c for _, c in pairs}),
    }

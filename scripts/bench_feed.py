"""Measure how long steps wait for data, and how much memory the loader takes.

    uv run python scripts/bench_feed.py                         # 200,000 images of 64 px
    uv run python scripts/bench_feed.py --gb 100 --batches 2000 # a sparse file larger than memory

Makes a sparse .npy of zeros, which takes no disk space, and reads it as training does. Prints
images per second at full speed, the share of time spent waiting when steps take --step-ms, and the
growth of the process. Sets that fit a GPU are usually kept there: --hold measures that.
"""

import argparse
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from vgan.data.loader import Loader
from vgan.data.source import Dataset
from vgan.runtime.device import pick_device
from vgan.runtime.hardware import resident_gb


def sparse_array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Map a uint8 array of zeros that takes no disk space."""
    with open(path, "wb") as f:
        np.lib.format.write_array_header_1_0(
            f, {"descr": "|u1", "fortran_order": False, "shape": shape}
        )
        f.truncate(f.tell() + int(np.prod(shape, dtype=np.int64)))
    return np.load(path, mmap_mode="r")


def measure(
    loader: Loader, batch_size: int, batches: int, step_ms: float, device: torch.device
) -> tuple[float, float, float]:
    """Return images per second, the share of time spent waiting, and growth in MB.

    step_ms is the time of a step besides loading.
    """
    for i in range(20):
        loader.batch(i * batch_size)
    before_gb, waited_s, start = resident_gb(), loader.waited_s, time.perf_counter()
    for i in range(20, 20 + batches):
        real, _ = loader.batch(i * batch_size)
        if device.type == "cuda":
            torch.cuda.synchronize()
        time.sleep(step_ms / 1e3)
    elapsed = time.perf_counter() - start
    assert real.shape[0] == batch_size
    grown_mb = 1e3 * (resident_gb() - before_gb)
    return batches * batch_size / elapsed, (loader.waited_s - waited_s) / elapsed, grown_mb


def measure_sparse(
    images: int, resolution: int, batch_size: int, batches: int, step_ms: float,
    device: torch.device, hold: bool = False,
) -> tuple[float, float, float]:  # fmt: skip
    """Measure a set of that many images of zeros, as `measure` does."""
    with tempfile.TemporaryDirectory() as folder:
        array = sparse_array(Path(folder) / "images.npy", (images, resolution, resolution, 3))
        dataset = Dataset("sparse", array, np.zeros(images, np.int64), (), "")
        with closing(Loader(dataset, batch_size, 0, device, hold_on_device=hold)) as loader:
            return measure(loader, batch_size, batches, step_ms, device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--gb", type=float, help="size of the file instead of the number of images")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=500)
    parser.add_argument("--step-ms", type=float, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--hold", action="store_true")
    args = parser.parse_args()
    device, size = pick_device(args.device), args.resolution
    images = args.images if args.gb is None else round(args.gb * 1e9 / (size * size * 3))
    size_gb = f"{images * size * size * 3 / 1e9:.1f} GB"
    print(f"{images:,} images of {size} px, {size_gb}, batches of {args.batch_size}, {device}")
    for step_ms in (0.0, args.step_ms):
        how = (args.batch_size, args.batches, step_ms, device, args.hold)
        rate, share, grown = measure_sparse(images, size, *how)
        waiting = f"{rate:,.0f} img/s, waiting {share:.2%} of the time"
        print(f"steps of {step_ms:g} ms: {waiting}, process grew by {grown:,.0f} MB")


if __name__ == "__main__":
    main()

"""Whether data ever keeps a step waiting, and how much memory it takes.

    uv run python scripts/bench_feed.py                         # 200,000 images of 64 px
    uv run python scripts/bench_feed.py --gb 100 --batches 2000 # a sparse file larger than memory

Makes a sparse .npy of zeros (it takes no room on the disk), reads it as training does, and prints images a second at full
speed, the share of a training step of --step-ms spent waiting, and how far the process grew. On a GPU, whole sets that
fit are held there instead: --hold measures that.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from vgan.data.loader import Loader
from vgan.data.source import Dataset
from vgan.runtime.device import pick_device


def sparse_array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A mapped uint8 array of zeros that takes no room on the disk."""
    with open(path, "wb") as f:
        np.lib.format.write_array_header_1_0(
            f, {"descr": "|u1", "fortran_order": False, "shape": shape}
        )
        f.truncate(f.tell() + int(np.prod(shape, dtype=np.int64)))
    return np.load(path, mmap_mode="r")


def resident_mb() -> float:
    """Memory of this process that is neither swapped out nor returned."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(
    feed: Loader, batch_size: int, batches: int, step_ms: float, device: torch.device
) -> tuple[float, float, float]:
    """(images a second, share of the time spent waiting, growth in MB) over steps that take step_ms besides the feed."""
    for i in range(20):
        feed.batch(i * batch_size)
    before, waited, start = resident_mb(), feed.waited_s, time.perf_counter()
    for i in range(20, 20 + batches):
        real, _ = feed.batch(i * batch_size)
        if device.type == "cuda":
            torch.cuda.synchronize()
        time.sleep(step_ms / 1e3)
    elapsed = time.perf_counter() - start
    assert real.shape[0] == batch_size
    return (
        batches * batch_size / elapsed,
        (feed.waited_s - waited) / elapsed,
        resident_mb() - before,
    )


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
    with tempfile.TemporaryDirectory() as folder:
        array = sparse_array(Path(folder) / "images.npy", (images, size, size, 3))
        print(
            f"{images:,} images of {size} px, {array.nbytes / 1e9:.1f} GB, batches of {args.batch_size}, {device}"
        )
        for step_ms in (0.0, args.step_ms):
            dataset = Dataset("sparse", array, np.zeros(images, np.int64), (), "")
            feed = Loader(dataset, args.batch_size, 0, device, hold_on_device=args.hold)
            rate, share, grown = measure(feed, args.batch_size, args.batches, step_ms, device)
            feed.close()
            print(
                f"steps of {step_ms:g} ms: {rate:,.0f} img/s, waiting {share:.2%} of the time, process grew by {grown:,.0f} MB"
            )


if __name__ == "__main__":
    main()

"""Batches: the images of a step as a pure function of (data, seed, cur_nimg)."""

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vgan.data.source import Dataset
from vgan.runtime.images import to_float
from vgan.runtime.rng import Streams, permute

AHEAD = 4  # batches that are read while one is in use
_BLOCK = 4096  # images whose order is computed at once


class Batch(NamedTuple):
    """Reals (N, C, H, W) in [-1, 1], c (N, label_dim) and random numbers.

    c: one-hot classes or standardized conditions.
    """

    real: Tensor
    c: Tensor
    rng: Streams

    def split(self, count: int) -> list["Batch"]:
        """Return `count` or fewer micro-batches of equal size, except the last."""
        if count == 1:
            return [self]
        size = -(-len(self.real) // count)
        starts = range(0, len(self.real), size)
        parts = [slice(i, i + size) for i in starts]
        return [Batch(self.real[part], self.c[part], self.rng[part]) for part in parts]


class Loader:
    """Batches of a data set in a shuffled order that is computed, so that it can start anywhere.

    Image i of the run is item permute(i mod N) of epoch i // N, held-out items excluded. On a GPU
    the whole set is kept as uint8 if it takes less than half of the free memory (or as
    hold_on_device says). Otherwise threads prefetch, row by row from the file: a memory map would
    grow the process by every page it touched. `waited_s` counts the seconds spent waiting for data.

    `share` = (i, n) selects the i-th of n equal shares of every batch, for one of n processes.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        device: torch.device,
        hold_on_device: bool | None = None,
        holdout: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self._dataset, self._batch_size = dataset, batch_size
        self._seed, self._device = seed, device
        self._rows = batch_size // share[1]
        self._first_row = share[0] * self._rows
        self._train_items = torch.from_numpy(dataset.split(holdout)[0]) if holdout else None
        self._count = len(dataset) - holdout
        self._pin = device.type == "cuda"
        self.waited_s = 0.0
        self._c_table = dataset.c_table().to(device)
        self._labels = torch.from_numpy(dataset.labels)
        self._held: Tensor | None = None
        self._file: int | None = None
        self._orders: dict[int, Tensor] = {}
        self._ahead: dict[int, Future[tuple[Tensor, Tensor]]] = {}  # by cur_nimg
        if hold_on_device is None:
            on_cuda = device.type == "cuda"
            free = torch.cuda.mem_get_info(device)[0] if on_cuda else 0
            hold_on_device = dataset.images.nbytes < free / 2
        if hold_on_device:
            self._held = torch.from_numpy(np.array(dataset.images)).to(device)
            self._labels = self._labels.to(device)
            return
        self._pool = ThreadPoolExecutor(AHEAD, thread_name_prefix="loader")
        if isinstance(dataset.images, np.memmap) and hasattr(os, "preadv"):
            self._file = os.open(str(dataset.images.filename), os.O_RDONLY)

    def items(self, cur_nimg: int) -> Tensor:
        """Return the items (N,) int64 of the batch at cur_nimg, or of this share of it."""
        begin = cur_nimg + self._first_row
        first, last = begin // _BLOCK, (begin + self._rows - 1) // _BLOCK
        blocks = torch.cat([self._order(block) for block in range(first, last + 1)])
        return blocks[begin - first * _BLOCK :][: self._rows]

    def _order(self, block: int) -> Tensor:
        """Return the items of images block * _BLOCK and on; one alone would cost as much."""
        order = self._orders.get(block)
        if order is None:
            i, n = torch.arange(block * _BLOCK, (block + 1) * _BLOCK), self._count
            order = permute(i % n, n, self._seed, i // n)
            order = order if self._train_items is None else self._train_items[order]
            near = range(block - 2, block + 3)
            self._orders = {k: v for k, v in self._orders.items() if k in near}
            self._orders[block] = order
        return order

    def batch(self, cur_nimg: int) -> tuple[Tensor, Tensor]:
        """Return images cur_nimg .. cur_nimg + batch_size - 1 of the run, or this share of them.

        Float32 (N, C, H, W) in [-1, 1], channels-last, and c (N, label_dim), both on the device.
        Nothing waits for the device: copies come from pinned memory.
        """
        if self._held is not None:
            items = self._to_device(self.items(cur_nimg))
            pixels, labels = self._held[items], self._labels[items]
        else:
            pixels, labels = (self._to_device(x) for x in self._read_ahead(cur_nimg))
        real = to_float(pixels.permute(0, 3, 1, 2))  # the memory below is channels-last already
        return real, self._c_table[labels]

    def close(self) -> None:
        """Stop the reading threads, if there are any."""
        if self._held is not None:
            return
        self._pool.shutdown(cancel_futures=True)
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _to_device(self, x: Tensor) -> Tensor:
        if self._pin and not x.is_pinned():
            x = x.pin_memory()
        return x.to(self._device, non_blocking=True)

    def _gather(self, cur_nimg: int) -> tuple[Tensor, Tensor]:
        """Return a copy of the pixels uint8 (N, H, W, C) of the batch at cur_nimg, and labels."""
        images, items = self._dataset.images, self.items(cur_nimg)
        labels = self._labels[items]
        shape = (len(items), *images.shape[1:])
        pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin)
        if self._file is None:
            pixels.numpy()[:] = images[items.numpy()]
            return pixels, labels
        row = images[0].nbytes
        for into, i in zip(pixels.numpy(), items.tolist()):
            if os.preadv(self._file, [into], images.offset + i * row) != row:  # type: ignore[attr-defined]
                raise OSError(f"{images.filename}: was cut short while in use")  # type: ignore[attr-defined]
        return pixels, labels

    def _read_ahead(self, cur_nimg: int) -> tuple[Tensor, Tensor]:
        """Return pixels and labels at cur_nimg, usually read already; start on the next ones."""
        wanted = [cur_nimg + k * self._batch_size for k in range(AHEAD + 1)]
        self._ahead = {n: self._ahead.get(n) or self._pool.submit(self._gather, n) for n in wanted}
        start = time.perf_counter()
        batch = self._ahead.pop(cur_nimg).result()
        self.waited_s += time.perf_counter() - start
        return batch

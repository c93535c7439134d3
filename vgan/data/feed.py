"""The feed: the batch at any image count, as a pure function of (data, seed, cur_nimg)."""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from vgan.data.source import Dataset
from vgan.images import to_float
from vgan.randomness import permute


class Feed:
    """Batches of a data set in a shuffled order that is computed, not drawn: it can be entered anywhere.

    Image number i of the run is item permute(i mod N) of epoch i // N. On an accelerator the whole set is held as
    uint8 if it takes less than half of the free memory (or as hold_on_device says); otherwise the next batch is
    gathered ahead of need by one thread, through pinned memory.
    """

    def __init__(
        self, dataset: Dataset, batch_size: int, seed: int, device: torch.device, hold_on_device: bool | None = None
    ) -> None:
        self._dataset, self._batch_size, self._seed, self._device = dataset, batch_size, seed, device
        self._labels = torch.from_numpy(dataset.labels)
        self._held: Tensor | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: tuple[int, Future[Tensor]] | None = None
        if device.type == "cpu":
            return
        if hold_on_device is None:
            hold_on_device = device.type == "cuda" and dataset.images.nbytes < torch.cuda.mem_get_info(device)[0] / 2
        if hold_on_device:
            self._held = torch.from_numpy(np.ascontiguousarray(dataset.images)).to(device)
        else:
            self._pool = ThreadPoolExecutor(1)

    def items(self, cur_nimg: int) -> Tensor:
        """Which items of the data set (N,) int64 the batch at cur_nimg holds."""
        i, n = torch.arange(cur_nimg, cur_nimg + self._batch_size), len(self._dataset)
        return permute(i % n, n, self._seed, i // n)

    def batch(self, cur_nimg: int) -> tuple[Tensor, Tensor]:
        """Images number cur_nimg .. cur_nimg + batch_size - 1 of the run, on the device.

        Returns float32 (N, C, H, W) in [-1, 1], channels-last, and one-hot classes (N, label_dim).
        """
        items = self.items(cur_nimg)
        if self._held is not None:
            pixels = self._held[items.to(self._device)]
        else:
            pixels = self._read_ahead(cur_nimg).to(self._device, non_blocking=True)
        real = to_float(pixels.permute(0, 3, 1, 2))  # the memory below is channels-last already
        return real, self._one_hot(self._labels[items]).to(self._device, non_blocking=True)

    def reals(self, n: int) -> tuple[Tensor, Tensor]:
        """The first n pictures uint8 (n, C, H, W) and their labels (n,); classes take turns where there are any."""
        items = np.arange(min(n, len(self._dataset)))
        if self._dataset.label_dim > 1:
            nth_of_class = np.zeros(len(self._labels), dtype=np.int64)
            for label in range(self._dataset.label_dim):
                mine = self._dataset.labels == label
                nth_of_class[mine] = np.arange(mine.sum())
            items = np.lexsort((self._dataset.labels, nth_of_class))[:n]
        pixels = torch.from_numpy(np.ascontiguousarray(self._dataset.images[items]))
        return pixels.permute(0, 3, 1, 2), self._labels[torch.from_numpy(items)]

    def close(self) -> None:
        """End the reading thread, if there is one."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _one_hot(self, labels: Tensor) -> Tensor:
        if not self._dataset.label_dim:
            return torch.zeros(len(labels), 0)
        return torch.nn.functional.one_hot(labels, self._dataset.label_dim).float()

    def _gather(self, cur_nimg: int) -> Tensor:
        pixels = torch.from_numpy(self._dataset.images[self.items(cur_nimg).numpy()])
        return pixels.pin_memory() if self._device.type == "cuda" else pixels

    def _read_ahead(self, cur_nimg: int) -> Tensor:
        """The pixels at cur_nimg, which were usually begun one call ago; begins the next."""
        if self._pool is None:
            return self._gather(cur_nimg)
        begun = self._ahead
        pixels = begun[1].result() if begun is not None and begun[0] == cur_nimg else self._gather(cur_nimg)
        coming = cur_nimg + self._batch_size
        self._ahead = coming, self._pool.submit(self._gather, coming)
        return pixels

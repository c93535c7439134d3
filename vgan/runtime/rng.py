"""Random numbers as a function of (seed, stream, image index).

The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"),
a counter-based generator written in int64 operations of torch: vectorised over the batch and
bit-exact on every device. There is no state to save, and a run does not depend on how a batch is
split over steps, processes and machines.
"""

import copy
import hashlib
import math

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # Philox multipliers
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # Weyl increments of the key: golden ratio, sqrt(3) - 1
_MASK = 0xFFFFFFFF
_FEISTEL_ROUNDS = 8


def _philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, ...]:
    """Apply ten rounds to four 32-bit words stored in int64.

    The product of two 32-bit words overflows into the sign bit; shift and mask still give the right
    32 bits.
    """
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = x0 * _M0, x2 * _M1
        x0, x1, x2, x3 = (
            ((p1 >> 32) & _MASK) ^ x1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ x3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return x0, x1, x2, x3


def _stream_id(stream: str) -> int:
    """Return the 32-bit FNV-1a hash of a name, in arithmetic that torch.compile can trace."""
    h = 0x811C9DC5
    for letter in stream:
        h = ((h ^ ord(letter)) * 0x01000193) & _MASK
    return h


def words(seed: int, stream: str, index: Tensor, n: int) -> Tensor:
    """Return (N, n) int64 of uniform 32-bit words for images `index` (N,) int64."""
    blocks = torch.arange(math.ceil(n / 4), device=index.device)
    shape = (index.shape[0], len(blocks))  # len() would become a constant in an exported program
    i = index[:, None].expand(shape)
    stream_word = torch.full_like(i, _stream_id(stream))
    counter = (i & _MASK, (i >> 32) & _MASK, blocks[None].expand(shape), stream_word)
    out = torch.stack(_philox(counter, (seed & _MASK, (seed >> 32) & _MASK)), dim=2)
    return out.flatten(1)[:, :n]


def uniform(seed: int, stream: str, index: Tensor, n: int) -> Tensor:
    """Return (N, n) float32 in [0, 1), multiples of 2^-24 so that rounding cannot give 1.0."""
    return (words(seed, stream, index, n) >> 8).float() * 2.0**-24


def normal(seed: int, stream: str, index: Tensor, n: int) -> Tensor:
    """Return (N, n) float32 ~ N(0, 1), by the Box-Muller method.

    Computed in float64 where the device has it and rounded once, so that differences between the
    logarithm and cosine of devices do not show.
    """
    dtype = torch.float32 if index.device.type == "mps" else torch.float64
    w = words(seed, stream, index, n + n % 2).to(dtype)
    u, v = w.chunk(2, dim=1)
    radius = (-2 * torch.log((u + 1) * 2.0**-32)).sqrt()  # u + 1 > 0: the logarithm is finite
    angle = v * (2 * math.pi * 2.0**-32)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :n].float()


def signs(seed: int, stream: str, index: Tensor, n: int) -> Tensor:
    """Return (N, n) float32 of +1 and -1 with equal probability, 32 from each word."""
    w = words(seed, stream, index, math.ceil(n / 32))
    bits = (w[:, :, None] >> torch.arange(32, device=index.device)) & 1
    return bits.reshape(len(index), -1)[:, :n].float() * 2 - 1


def integers(seed: int, stream: str, index: Tensor, high: int) -> Tensor:
    """Return (N,) int64, uniform in [0, high)."""
    return words(seed, stream, index, 1)[:, 0] * high >> 32


def permute(index: Tensor, n: int, seed: int, epoch: Tensor | int) -> Tensor:
    """Return the positions of items in a shuffled order: a bijection of [0, n).

    index: int64 of any shape with values in [0, n). epoch: an int or a tensor of that shape.

    A Feistel network over the next even power of two, applied until the result is in [0, n) (Black
    & Rogaway 2002), with the 32-bit finalizer of MurmurHash3 (Appleby) as round function. Philox as
    round function took a fifth of a training step on a CPU, and an order does not need it.
    """
    half = max(1, math.ceil(math.log2(max(n, 2)) / 2))
    mask = (1 << half) - 1
    salt = int.from_bytes(hashlib.sha256(f"order {seed}".encode()).digest()[:4], "little")
    keys = torch.as_tensor(epoch, device=index.device) * _W0 + salt

    def walk(x: Tensor) -> Tensor:
        left, right = x >> half, x & mask
        for r in range(_FEISTEL_ROUNDS):
            h = (right * _M1 + keys + r * _W1) & _MASK
            h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _MASK
            h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _MASK
            left, right = right, left ^ ((h ^ (h >> 16)) & mask)
        return (left << half) | right

    x = walk(index)
    while bool((outside := x >= n).any()):
        x = torch.where(outside, walk(x), x)
    return x


class Streams:
    """The random numbers of one batch: images first .. first + batch - 1 of the run with `seed`.

    Each method returns one row per image. The stream's name separates uses.
    """

    def __init__(
        self, seed: int, first: int, batch: int, device: torch.device | str = "cpu"
    ) -> None:
        self.seed = seed
        self.index = torch.arange(first, first + batch, device=device)

    def __getitem__(self, rows: slice) -> "Streams":
        """Return the streams of a slice of the images."""
        part = copy.copy(self)
        part.index = self.index[rows]
        return part

    def normal(self, stream: str, n: int) -> Tensor:
        return normal(self.seed, stream, self.index, n)

    def uniform(self, stream: str, n: int) -> Tensor:
        return uniform(self.seed, stream, self.index, n)

    def signs(self, stream: str, n: int) -> Tensor:
        return signs(self.seed, stream, self.index, n)

    def integers(self, stream: str, high: int) -> Tensor:
        return integers(self.seed, stream, self.index, high)

"""Counter-based randomness: every draw is a pure function of a name, never of what was drawn before.

NumPy's distributions may change between versions, its Philox raw words may not. Splits, orders and
cohorts are therefore built here from raw words only. Draws inside a training step use an integer hash
of (client key, step, tag, position) in torch, so that a client trained alone and the same client trained
in a stacked cohort see the same numbers.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Hashable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Words = npt.NDArray[np.uint64]
_MASK = 0xFFFFFFFF


def key(*parts: object) -> int:
    """128-bit key of a purpose, for example ``key(seed, "partition", task)``.

    >>> key(0, "a") == key(0, "a"), key(0, "a") == key(1, "a")
    (True, False)
    """
    # A NumPy integer and Python's are the same name: which one a caller has may depend on the version.
    plain = (int(p) if isinstance(p, np.integer) else p for p in parts)
    text = "\x1f".join(f"{type(p).__name__}:{p}" for p in plain)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def words(count: int, *parts: object) -> Words:
    """``count`` raw 64-bit Philox4x64 words of the stream named by ``parts``."""
    return np.random.Philox(key=key(*parts)).random_raw(count)


def uniform(count: int, *parts: object) -> npt.NDArray[np.float64]:
    """``count`` doubles in [0, 1): the top 53 bits of each word."""
    return (words(count, *parts) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(count: int, *parts: object) -> npt.NDArray[np.int64]:
    """A permutation of ``range(count)``: the stable order of ``count`` random words.

    >>> sorted(permutation(5, 0, "x").tolist())
    [0, 1, 2, 3, 4]
    """
    return np.argsort(words(count, *parts), kind="stable").astype(np.int64)


def sample(population: int, count: int, *parts: object) -> list[int]:
    """``count`` distinct integers of ``range(population)``, ascending, in O(count) (Floyd's algorithm).

    >>> sample(3, 3, 0)
    [0, 1, 2]
    """
    if not 0 <= count <= population:
        raise ValueError(f"cannot draw {count} of {population}")
    chosen: set[int] = set()
    for top, word in zip(range(population - count, population), words(count, *parts).tolist(), strict=True):
        pick = (word * (top + 1)) >> 64  # multiply-shift: bias below 2^-43 for populations below 2^20
        chosen.add(top if pick in chosen else pick)
    return sorted(chosen)


class Stream:
    """Sequential draws from one named stream, for samplers that reject (gamma, Dirichlet).

    The words are those of :func:`words` in order, fetched in blocks.
    """

    def __init__(self, *parts: object) -> None:
        self._source = np.random.Philox(key=key(*parts))
        self._block: list[int] = []

    def word(self) -> int:
        """The next raw 64-bit word."""
        if not self._block:
            self._block = self._source.random_raw(256).tolist()[::-1]
        return self._block.pop()

    def uniform(self) -> float:
        """The next double in (0, 1]: never zero, so that its logarithm is finite."""
        return ((self.word() >> 11) + 1) * 2.0**-53

    def below(self, bound: int) -> int:
        """The next integer of ``range(bound)``."""
        return (self.word() * bound) >> 64

    def normal(self) -> float:
        """A standard normal by Box-Muller; two words a draw."""
        radius = math.sqrt(-2.0 * math.log(self.uniform()))
        return radius * math.cos(2.0 * math.pi * self.uniform())

    def log_gamma_draw(self, shape: float) -> float:
        """Logarithm of a Gamma(shape, 1) draw (Marsaglia and Tsang 2000).

        The logarithm keeps tiny shapes alive: Gamma(0.01) underflows as a float.
        """
        if shape < 1.0:
            return self.log_gamma_draw(shape + 1.0) + math.log(self.uniform()) / shape
        d = shape - 1.0 / 3.0
        c = 1.0 / math.sqrt(9.0 * d)
        while True:
            x = self.normal()
            v = (1.0 + c * x) ** 3
            if v > 0.0 and math.log(self.uniform()) < 0.5 * x * x + d - d * v + d * math.log(v):
                return math.log(d) + math.log(v)

    def dirichlet(self, alphas: list[float]) -> npt.NDArray[np.float64]:
        """One Dirichlet draw; ``alphas`` are all above zero. Returns (len(alphas),) summing to 1."""
        logs = [self.log_gamma_draw(a) for a in alphas]
        top = max(logs)
        shares = [math.exp(value - top) for value in logs]
        total = math.fsum(shares)
        return np.array([share / total for share in shares])

    def shuffle(self, values: list[int]) -> list[int]:
        """A new list in random order (Fisher-Yates)."""
        out = list(values)
        for last in range(len(out) - 1, 0, -1):
            other = self.below(last + 1)
            out[last], out[other] = out[other], out[last]
        return out


# --- inside a training step: torch, branch-free, the same alone and under vmap -----------------------------


@functools.lru_cache(maxsize=4096, typed=True)
def fold(*parts: Hashable) -> int:
    """31-bit integer of a name, to be combined with counters in :func:`hash32`."""
    return key(*parts) & 0x7FFFFFFF


def hash32(value: Tensor) -> Tensor:
    """Mixes int64 values below 2^32 to uniform 32-bit integers, in int64 (Wellons' lowbias32).

    Elementwise, any shape. Products wrap in int64; the low 32 bits that are kept are exact.
    """
    value = value & _MASK
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & _MASK
    value = ((value ^ (value >> 15)) * 0x846CA68B) & _MASK
    return value ^ (value >> 16)


def _signed(value: Tensor) -> Tensor:
    """int64 below 2^32 as the int32 of the same bits."""
    return (value - ((value >> 31) << 32)).to(torch.int32)


def _mixed32(value: Tensor) -> Tensor:
    """:func:`hash32` on the bits of int32, where it is several times faster; products wrap."""
    # In place where it can be: masks of a whole stack are larger than the cache.
    value = (value >> 16).bitwise_and_(0xFFFF).bitwise_xor_(value).mul_(0x7FEB352D)
    value = (value >> 15).bitwise_and_(0x1FFFF).bitwise_xor_(value).mul_(0x846CA68B - 2**32)
    return (value >> 16).bitwise_and_(0xFFFF).bitwise_xor_(value)


@functools.lru_cache(maxsize=32)
def _host_positions(count: int) -> Tensor:
    """Hashed positions int32. Made by NumPy: a tensor made inside a transform must not outlive it."""
    value = np.arange(count, dtype=np.uint64)
    mask = np.uint64(_MASK)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        value = ((value ^ (value >> np.uint64(shift))) * np.uint64(factor)) & mask
    return torch.from_numpy((value ^ (value >> np.uint64(16))).astype(np.uint32).view(np.int32))


def _bits(seed: Tensor, tag: int, shape: tuple[int, ...]) -> Tensor:
    """:func:`counter_bits` as int32 of the same bits."""
    count = math.prod(shape)
    base = _signed(hash32(hash32(seed) ^ tag))
    if seed.device.type == "cpu":
        positions = _host_positions(count)
    else:
        positions = _mixed32(torch.arange(count, dtype=torch.int32, device=seed.device))
    return _mixed32(positions ^ base).reshape(shape)


def counter_bits(seed: Tensor, tag: int, shape: tuple[int, ...]) -> Tensor:
    """Uniform 32-bit integers of ``shape``, in int64: position i gets hash(hash(hash(seed) ^ tag) ^ hash(i)).

    Args:
        seed: int64 scalar tensor (a client's key folded with its step); under vmap one a client.
        tag: what the numbers are for (:func:`fold` of a name).
    """
    return _bits(seed, tag, shape).to(torch.int64) & _MASK


def counter_uniform(seed: Tensor, tag: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers in (0, 1), see :func:`counter_bits`; 24 bits."""
    drawn = (((_bits(seed, tag, shape) >> 8) & 0xFFFFFF).to(dtype) + 0.5) * 2.0**-24
    return drawn.clamp(max=1.0 - torch.finfo(dtype).eps / 2)  # float32 rounds the largest of them up to 1


def counter_keep(seed: Tensor, tag: int, shape: tuple[int, ...], p: float) -> Tensor:
    """Bool mask of ``shape``: where :func:`counter_uniform` is at least ``p``, so false with probability ``p``."""
    return (_bits(seed, tag, shape) >> 8).bitwise_and_(0xFFFFFF) >= math.ceil(p * 2**24 - 0.5)


def counter_normal(seed: Tensor, tag: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers by Box-Muller of two counter-based uniforms."""
    radius = torch.sqrt(-2.0 * torch.log(counter_uniform(seed, tag, shape, dtype)))
    return radius * torch.cos(2.0 * math.pi * counter_uniform(seed, tag ^ 0x5BD1E995, shape, dtype))


def counter_integers(seed: Tensor, tag: int, bound: int, shape: tuple[int, ...]) -> Tensor:
    """Integers of ``range(bound)``, see :func:`counter_bits`; ``bound`` is below 2^31."""
    return (counter_bits(seed, tag, shape) * bound) >> 32


def step_seed(client_key: Tensor, step: Tensor) -> Tensor:
    """The seed of one step of one client; int64 scalars in and out."""
    return hash32(hash32(client_key) ^ (hash32(step) + 0x3C6EF372))

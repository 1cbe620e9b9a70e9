"""Randomness, and Poisson sampling.

Accounting holds for Poisson sampling only: every record enters a step by a coin flip of its own, so the number of
drawn records is itself random and private. There is no epoch and no shuffling here.

Two sources of randomness stand behind one interface. ``SystemRandomness`` draws from a cryptographic generator with
keys from the operating system and is what a deployed client uses: nobody can predict or replay its noise.
``SeededRandomness`` makes simulations repeatable; whoever knows the seed can remove the noise, so it gives no privacy.
"""

import hashlib
import operator
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

from adadpigu_core.box_muller import standard_normals

Vector = NDArray[np.float64]


class Randomness(Protocol):
    """Independent uniform and normal variates."""

    def uniform(self, size: int) -> Vector:
        """Draw ``size`` variates uniform on [0, 1)."""
        ...

    def normal(self, size: int) -> Vector:
        """Draw ``size`` standard normal variates."""
        ...

    def torch_seed(self) -> int:
        """Draw a seed for what torch itself has to randomise, such as dropout."""
        ...


class SystemRandomness:
    """Randomness for real data: ChaCha20 under a key of the operating system's, a new one for each call.

    The operating system's own generator is some ten times slower, which for the noise of a million coordinates would
    cost as much as their gradient.
    """

    def uniform(self, size: int) -> Vector:
        """Draw ``size`` variates uniform on [0, 1), with 53 random bits each."""
        return _uniform(self._bits(size))

    def normal(self, size: int) -> Vector:
        """Draw ``size`` standard normal variates; nothing is compiled, since a client's process answers one message."""
        return standard_normals(self._bits(size + size % 2), long_lived=False)[:size]

    @staticmethod
    def _bits(size: int) -> NDArray[np.uint64]:
        stream = Cipher(algorithms.ChaCha20(os.urandom(32), bytes(16)), mode=None).encryptor()
        bits = np.empty(size, dtype=np.uint64)
        stream.update_into(bytes(8 * size), bits.view(np.uint8).data)
        return bits

    def torch_seed(self) -> int:
        """Draw a 63-bit seed."""
        return int.from_bytes(os.urandom(8), "little") >> 1


class SeededRandomness:
    """Repeatable randomness for simulations: no privacy against anyone who knows the key.

    Args:
        key: Integers that name the stream, such as seed, client, round. Different keys give independent streams.
    """

    def __init__(self, *key: int) -> None:
        # hashed, because SeedSequence itself takes (1,) and (1, 0) for the same key, and (2**32,) and (0, 1)
        name = ",".join(str(operator.index(part)) for part in key)
        entropy = int.from_bytes(hashlib.sha256(name.encode()).digest(), "little")
        self._generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence(entropy)))

    def uniform(self, size: int) -> Vector:
        """Draw ``size`` variates uniform on [0, 1)."""
        return self._generator.random(size)

    def normal(self, size: int) -> Vector:
        """Draw ``size`` standard normal variates, by the transform of `SystemRandomness`."""
        bits = self._generator.bit_generator.random_raw(size + size % 2)
        return standard_normals(bits, long_lived=True)[:size]

    def torch_seed(self) -> int:
        """Draw a 63-bit seed."""
        return int(self._generator.integers(2**63))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed what torch itself randomises on the CPU and on one device, and restore both generators afterwards.

    ``torch.manual_seed`` would reach the generators of every device.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _uniform(bits: NDArray[np.uint64]) -> Vector:
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def poisson_sample(num_records: int, sampling_probability: float, randomness: Randomness) -> NDArray[np.int64]:
    """Draw each record independently with the same probability.

    Args:
        num_records: How many records there are.
        sampling_probability: In (0, 1].
        randomness: Private source of the coin flips.

    Returns:
        Sorted indices of the drawn records, possibly none. Their number is private.
    """
    return np.flatnonzero(randomness.uniform(num_records) < sampling_probability)

"""Noise: uniform and normal numbers as a pure function of (seed, round, image, pixel)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hpt_hf.types import ImageIds


@dataclass(frozen=True)
class Noise:
    """An image gets the same noise on any device and process, at any place in any batch: resuming is exact."""

    image_ids: ImageIds  # (batch,) see `hpt_hf.data.collator.image_id`
    seed: int = 0  # of the run
    round: int = 0  # which draw for this image, for example the training step

    def uniform(self, shape: tuple[int, ...]) -> torch.Tensor:
        """float32 in [0, 1), of shape (batch, *shape)."""
        stream = _signed((self.seed * 0x9E3779B1 + self.round) % 2**64)
        start = _mix(self.image_ids.long() ^ _mix(torch.tensor(stream, device=self.image_ids.device)))
        counter = torch.arange(math.prod(shape), device=self.image_ids.device)
        # Only 24 bits fit a float32 below 1.
        bits = (_mix(start[:, None] + counter[None, :] * _signed(0x9E3779B97F4A7C15)) >> 40) & 0xFFFFFF
        return (bits.float() / 2**24).view(len(self.image_ids), *shape)

    def normal(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal float32 of shape (batch, *shape) (Box-Muller)."""
        radius, angle = self.uniform((2, *shape)).unbind(1)
        return (-2 * torch.log1p(-radius)).sqrt() * torch.cos(2 * math.pi * angle)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser (Steele et al. 2014) on int64 tensors, whose products wrap around."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return x ^ ((x >> 31) & ((1 << 33) - 1))

"""The threat model: which perturbations an attacker may use. It holds to the last bit, in float32 and in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch

from hpt_hf.attacks.noise import Noise
from hpt_hf.types import Images, PerExample

# On which pixels eps counts.
PROTOCOLS = {
    "input": "eps on the pixels that the model reads; template ensembles and splits of clip-benchmark (FARE)",
    "native": "eps on the image's own pixels, then resized; one template, torchvision splits (TeCoA, HPT-GPD)",
}


def parse_eps(eps: str | float | int) -> float:
    """`"8/255"` or `0.03` -> float; ValueError for anything that is not a finite number of at least 0."""
    try:
        top, *rest = (Fraction(part.strip()) for part in str(eps).split("/"))  # also "0.5/255"
        (bottom,) = rest or [Fraction(1)]
        value = float(top / bottom)
    except (ValueError, ArithmeticError):  # "a", "8/", "1/2/3", "nan", 1/0, 1e400
        value = -1.0
    if value < 0:
        raise ValueError(f"eps={eps!r}: expected a finite number of at least 0, such as '8/255'")
    return value


@dataclass(frozen=True)
class ThreatModel:
    """A ball around images in [0, 1] (Madry et al. 2018)."""

    norm: str = "linf"  # or "l2"
    eps: str | float | int = "1/255"  # radius as a fraction of the pixel range, for l-inf at most 1

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm={self.norm!r}: expected one of linf, l2")
        if self.radius > 1 and self.norm == "linf":
            raise ValueError(f"eps={self.eps}: expected an l-inf radius of at most 1. Fix: '{self.eps}/255'.")

    @property
    def radius(self) -> float:
        """The largest float32 that is not above eps: a bound that holds however it is compared."""
        exact = parse_eps(self.eps)
        rounded = torch.tensor(exact, dtype=torch.float32)
        return (rounded if rounded.item() <= exact else torch.nextafter(rounded, torch.tensor(-math.inf))).item()

    def __str__(self) -> str:
        return f"{self.norm} {self.eps}"

    def random_start(self, images: Images, noise: Noise) -> Images:
        """A uniformly random point of the ball, then clipped to [0, 1]."""
        shape = tuple(images.shape[1:])
        if self.norm == "linf":
            delta = (2 * noise.uniform(shape) - 1) * self.radius
        else:
            direction = noise.normal(shape)
            own = noise.uniform((2 * math.prod(shape) + 1,))[:, -1]  # of which no pixel of the direction is drawn
            length = own ** (1 / math.prod(shape))  # volume grows as radius^dimension
            delta = direction / l2_norm(direction).clamp_min(1e-12) * (length * self.radius).view(-1, 1, 1, 1)
        return self.project(images + delta, images)

    def ascent_direction(self, gradient: torch.Tensor) -> torch.Tensor:
        """The steepest ascent of unit size: sign for l-inf, the normalised gradient for l-2 (0 where it is 0)."""
        if self.norm == "linf":
            return gradient.sign()
        return gradient / l2_norm(gradient).clamp_min(1e-12)

    def bounds(self, images: Images) -> dict[str, Images]:
        """For `project`: `low` and `high`, the ends of each pixel's range, for l-inf; empty for l-2."""
        if self.norm != "linf":
            return {}
        exact = images.double()
        low, high = (_rounded_towards(images, bound) for bound in (exact - self.radius, exact + self.radius))
        return {"low": low.clamp_min(0), "high": high.clamp_max(1)}

    def project(self, perturbed: Images, images: Images, bounds: Mapping[str, Images] | None = None) -> Images:
        """The nearest point of the ball within [0, 1]; for l-2 of the ball, then clipped."""
        if self.norm == "linf":
            bounds = bounds or self.bounds(images)
            return torch.minimum(torch.maximum(perturbed, bounds["low"]), bounds["high"])
        delta = perturbed.double() - images.double()
        size = self.radius * (1 - 1e-6)  # a hair inside, so that a norm taken in float32 agrees
        exact = images.double() + delta * (size / l2_norm(delta).clamp_min(1e-30)).clamp_max(1)
        return _rounded_towards(images, exact).clamp(0, 1)

    def distance(self, perturbed: Images, images: Images) -> PerExample:
        """The norm of each perturbation, in float64."""
        delta = (perturbed.double() - images.double()).flatten(1)
        return delta.abs().amax(1) if self.norm == "linf" else delta.norm(dim=1)

    def contains(self, perturbed: Images, images: Images) -> torch.Tensor:
        """(batch,) bool: inside the ball and inside [0, 1], with no tolerance."""
        inside = ((perturbed >= 0) & (perturbed <= 1)).flatten(1).all(1)
        return inside & (self.distance(perturbed, images) <= self.radius)


def l2_norm(delta: torch.Tensor) -> torch.Tensor:
    """(batch, …) -> (batch, 1, 1, 1), to be divided by."""
    return delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def _rounded_towards(images: Images, exact: torch.Tensor) -> Images:
    """float64 -> float32, each pixel rounded towards the clean one: no rounding leaves a ball."""
    nearest = exact.float()
    outwards = (nearest.double() - images.double()).abs() > (exact - images.double()).abs()
    return torch.where(outwards, torch.nextafter(nearest, images), nearest)

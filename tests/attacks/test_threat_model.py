"""Proves that no perturbation leaves its ball or [0, 1], not by one bit, and that noise hangs on the picture and on nothing else."""

from fractions import Fraction

import pytest
import torch

from hpt_hf.attacks.noise import Noise
from hpt_hf.attacks.threat_model import ThreatModel, parse_eps

LINF = ("0", "1/255", "2/255", "3/255", "4/255", "8/255", "16/255", 0.1, 1 / 3, "1")
L2 = ("0", "1/255", "8/255", "128/255", 0.1, 0.5, "1", 3.0)
THREATS = [("linf", e) for e in LINF] + [("l2", e) for e in L2]
every_threat = pytest.mark.parametrize(("norm", "eps"), THREATS)
KEYS = torch.tensor([0, 1, 2, 3, 2**62, 2**63 - 1, 123456789012345])


def awkward_images(size=12):
    """Exact 0 and 1, bytes, values beside 0, beside 1 and beside each other's rounding: wherever float32 could step over a bound."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(len(KEYS), 3, size, size, generator=generator)
    x[1] = 0
    x[2] = 1
    x[3] = (x[3] * 255).round() / 255
    x[4] = x[4].round()
    x[5] *= 1e-8
    x[6] = 1 - x[6] * 1e-6
    return x


def assert_inside(perturbed, images, threat):
    """The bound as anyone would compare it: in float32, in float64, and against the number the user wrote."""
    asked = parse_eps(threat.eps)
    assert perturbed.dtype == torch.float32
    assert perturbed.min() >= 0 and perturbed.max() <= 1
    for a, x in ((perturbed, images), (perturbed.double(), images.double()), (perturbed.numpy(), images.numpy())):
        delta = torch.as_tensor(a - x).flatten(1)
        length = delta.abs().amax(1) if threat.norm == "linf" else delta.norm(dim=1)
        assert length.max().item() <= asked, f"{length.max().item()!r} > {asked!r}"
    assert threat.contains(perturbed, images).all()


@every_threat
@pytest.mark.parametrize("size", [1, 5, 32])
def test_random_start_and_projection_stay_in_the_ball_to_the_last_bit(norm, eps, size):
    threat, images = ThreatModel(norm, eps), awkward_images(size)
    for draw in range(3):
        assert_inside(threat.random_start(images, Noise(KEYS, round=draw)), images, threat)
    generator = torch.Generator().manual_seed(1)
    for scale in (1e-9, parse_eps(eps), 1.0, 1e6):
        assert_inside(
            threat.project(images + scale * torch.randn(images.shape, generator=generator), images), images, threat
        )


def test_the_ball_holds_at_full_resolution():
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    for threat in (ThreatModel("linf", "8/255"), ThreatModel("l2", "1/255"), ThreatModel("l2", 0.5)):
        adversarial = threat.project(images + torch.randn_like(images).sign(), images)
        assert_inside(adversarial, images, threat)
    x, threat = images, ThreatModel("linf", "8/255")
    x_adv = threat.random_start(x, Noise(KEYS[:2]))
    assert (x_adv - x).abs().max().item() <= 8 / 255


@every_threat
def test_projection_is_idempotent_and_leaves_the_ball_alone(norm, eps):
    threat, images = ThreatModel(norm, eps), awkward_images()
    once = threat.project(images + torch.randn(images.shape, generator=torch.Generator().manual_seed(3)), images)
    assert torch.equal(threat.project(once, images), once)
    assert torch.equal(threat.project(images, images), images)
    shorter = images + (once - images) * 0.5
    assert torch.allclose(threat.project(shorter, images), shorter, rtol=0, atol=1e-9 if norm == "l2" else 0)


@pytest.mark.parametrize("eps", LINF)
def test_linf_projection_is_the_nearest_point(eps):
    threat, images = ThreatModel("linf", eps), awkward_images()
    wild = images + torch.randn(images.shape, generator=torch.Generator().manual_seed(4))
    exact = wild.double().clamp(images.double() - threat.radius, images.double() + threat.radius).clamp(0, 1)
    got = threat.project(wild, images)
    towards = torch.nextafter(got, wild)  # one float nearer to what was projected ...
    better = (towards.double() - exact).abs() < (got.double() - exact).abs()
    outside = ((towards.double() - images.double()).abs() > threat.radius) | (towards < 0) | (towards > 1)
    assert (outside | ~better).all()  # ... is outside, or no nearer
    assert (got.double() - exact).abs().max() < 1e-7


@pytest.mark.parametrize("eps", [0.01, 0.1, 0.3])
def test_l2_projection_is_the_nearest_point_where_the_box_does_not_bind(eps):
    generator = torch.Generator().manual_seed(5)
    threat, images = ThreatModel("l2", eps), torch.full((4, 3, 6, 6), 0.5)
    wild = images + torch.randn(images.shape, generator=generator)
    got = threat.project(wild, images)
    delta = wild - images
    assert torch.allclose(got, images + eps * delta / delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1), atol=1e-6)
    nearest = (wild - got).flatten(1).norm(dim=1)
    for _ in range(20):  # no point of the sphere is nearer
        other = torch.randn(images.shape, generator=generator) + 3 * delta
        other = images + eps * other / other.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        assert ((wild - other).flatten(1).norm(dim=1) >= nearest * (1 - 1e-5)).all()


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_ascent_direction_is_the_steepest_of_unit_size(norm, dual):
    gradient = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(6))
    gradient[4] = 0
    direction = ThreatModel(norm).ascent_direction(gradient)
    # By duality no unit step gains more than the dual norm.
    assert torch.allclose((direction * gradient).flatten(1).sum(1), gradient.flatten(1).norm(p=dual, dim=1), rtol=1e-5)
    assert not direction[4].any()


def test_contains_sees_one_bit_too_far_one_bit_out_of_range_and_nan():
    threat, images = ThreatModel("linf", "8/255"), torch.full((1, 3, 2, 2), 0.5)
    edge = threat.project(images + 1, images)
    assert threat.contains(edge, images).item()
    for value in (torch.nextafter(edge[0, 0, 0, 0], torch.tensor(1.0)), torch.tensor(float("nan"))):
        beyond = edge.clone()
        beyond[0, 1, 1, 0] = value
        assert not threat.contains(beyond, images).item()
    ones = torch.ones_like(images)
    assert not threat.contains(torch.nextafter(ones, ones + 1), ones).item()
    assert not threat.contains(-torch.full_like(images, 1e-30), torch.zeros_like(images)).item()


@every_threat
def test_radius_is_the_largest_float32_not_above_eps(norm, eps):
    radius, asked = ThreatModel(norm, eps).radius, parse_eps(eps)
    assert torch.tensor(radius, dtype=torch.float32).item() == radius <= asked
    above = torch.nextafter(torch.tensor(radius, dtype=torch.float32), torch.tensor(torch.inf)).item()
    assert above > asked


# --- eps as people write it


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8/255", 8 / 255),
        (" 8 / 255 ", 8 / 255),
        ("0.03", 0.03),
        (0.03, 0.03),
        ("1e-2", 0.01),
        ("0", 0.0),
        (0, 0.0),
        (1, 1.0),
    ],
)
def test_eps_is_read_exactly(text, value):
    assert parse_eps(text) == value


@pytest.mark.parametrize("k", range(0, 256, 15))
def test_every_fraction_of_255_is_the_quotient(k):
    assert parse_eps(f"{k}/255") == k / 255 == float(Fraction(k, 255))


@pytest.mark.parametrize(
    "bad",
    ["", "abc", "8/", "1/0", "eight", "8/255/2", "nan", "inf", "1e400", "-1/255", -0.1, float("nan"), float("inf")],
)
def test_eps_that_is_no_size_is_an_error_that_shows_one(bad):
    with pytest.raises(ValueError, match="8/255"):
        parse_eps(bad)
    with pytest.raises(ValueError, match="8/255"):
        ThreatModel("l2", bad)


@pytest.mark.parametrize("eps", ["8", 8, 8.0])
def test_eight_where_eight_255ths_are_meant(eps):
    with pytest.raises(ValueError, match="8(.0)?/255"):
        ThreatModel("linf", eps)
    assert ThreatModel("l2", eps).radius == 8  # an l-2 ball may be that large


def test_unknown_norm_lists_the_known_ones():
    with pytest.raises(ValueError, match="linf, l2"):
        ThreatModel("l1", "1/255")


# --- noise


@pytest.mark.parametrize("method", ["uniform", "normal"])
def test_noise_is_a_function_of_the_picture_not_of_its_batch(method):
    def draw(keys):
        return getattr(Noise(keys, seed=3, round=7), method)((3, 5, 4))

    whole = draw(KEYS)
    order = torch.tensor([4, 0, 6, 2, 5, 1, 3])
    assert torch.equal(draw(KEYS[order]), whole[order])
    assert torch.equal(torch.cat([draw(k[None]) for k in KEYS]), whole)
    assert torch.equal(torch.cat([draw(part) for part in KEYS.split([3, 4])]), whole)


def test_picture_seed_and_draw_each_change_all_of_the_noise():
    base = Noise(KEYS, seed=1, round=1).uniform((3, 8, 8))
    others = [Noise(KEYS, 2, 1), Noise(KEYS, 1, 2), Noise(KEYS, 0, 1), Noise(KEYS, 1, 0), Noise(KEYS.flip(0), 1, 1)]
    for other in others:
        changed = (other.uniform((3, 8, 8)) != base).flatten(1).float().mean(1)
        if torch.equal(other.image_ids, KEYS.flip(0)):
            changed = changed[torch.arange(len(KEYS)) != len(KEYS) // 2]  # the middle one stays in its place
        assert changed.min() > 0.99
    assert len({tuple(r) for r in base.flatten(1).tolist()}) == len(KEYS)


@pytest.mark.parametrize("seed", [0, -1, 2**31, 2**32 - 1, 2**63])
def test_every_seed_that_torch_takes_will_do(seed):
    noise = Noise(KEYS, seed, round=10**6).uniform((3, 16, 16))
    assert abs(noise.mean().item() - 0.5) < 0.02


def views_of_noise():
    """The same noise read along pixels, along neighbouring keys and along steps: each must look uniform."""
    neighbours = Noise(torch.arange(20_000))
    return {
        "pixels": Noise(torch.tensor([5]), 1, 1).uniform((20_000,))[0],
        "image_ids": neighbours.uniform((1,))[:, 0],
        "draws": torch.cat([Noise(torch.tensor([5]), 1, d).uniform((1,))[0] for d in range(3000)]),
    }


@pytest.mark.parametrize("along", ["pixels", "image_ids", "draws"])
def test_noise_looks_uniform_and_independent(along):
    u = views_of_noise()[along].double()
    n = len(u)
    assert u.min() >= 0 and u.max() < 1
    assert u.min() < 20 / n and u.max() > 1 - 20 / n
    assert abs(u.mean() - 1 / 2) < 5 * (1 / 12 / n) ** 0.5
    assert abs(u.var() - 1 / 12) < 5 * (1 / 180 / n) ** 0.5
    counts = torch.histc(u, 50, 0, 1)
    chi2 = ((counts - n / 50) ** 2 / (n / 50)).sum()
    assert chi2 < 49 + 5 * 98**0.5
    for lag in (1, 2, 64):
        assert abs(torch.corrcoef(torch.stack([u[:-lag], u[lag:]]))[0, 1]) < 5 / n**0.5


def test_normal_noise_has_the_moments_of_a_normal():
    z = Noise(torch.tensor([9])).normal((40_000,)).double()[0]
    assert torch.isfinite(z).all()
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - moment) < 5 * (spread / len(z)) ** 0.5


def test_random_start_fills_the_ball_evenly():
    keys = torch.arange(4000)
    grey = torch.full((len(keys), 3, 2, 2), 0.5)
    delta = (ThreatModel("linf", "8/255").random_start(grey, Noise(keys)) - grey) / (8 / 255)
    assert abs(delta.mean()) < 0.01 and abs(delta.var() - 1 / 3) < 0.01 and delta.abs().max() > 0.999
    threat = ThreatModel("l2", 0.3)
    volume = (
        threat.distance(threat.random_start(grey, Noise(keys)), grey) / 0.3
    ) ** 12  # the share of the ball inside it
    assert abs(volume.mean() - 1 / 2) < 0.03 and abs(volume.var() - 1 / 12) < 0.01


def test_the_global_random_generator_is_not_touched():
    images = awkward_images()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for norm in ("linf", "l2"):
        ThreatModel(norm, "8/255").random_start(images, Noise(KEYS))
    assert torch.equal(torch.get_rng_state(), before)
    first = ThreatModel().random_start(images, Noise(KEYS))
    torch.manual_seed(99)
    assert torch.equal(ThreatModel().random_start(images, Noise(KEYS)), first)

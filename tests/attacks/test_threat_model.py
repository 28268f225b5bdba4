"""No perturbation leaves its ball or [0, 1], not by one bit, and noise hangs on the image and on nothing else."""

import pytest
import torch

from hpt_hf.attacks.noise import Noise
from hpt_hf.attacks.threat_model import ThreatModel, parse_eps

LINF = ("0", "1/255", "2/255", "3/255", "4/255", "8/255", "16/255", 0.1, 1 / 3, "1")
L2 = ("0", "1/255", "8/255", "128/255", 0.1, 0.5, "1", 3.0)
every_threat = pytest.mark.parametrize(
    "threat", [ThreatModel("linf", e) for e in LINF] + [ThreatModel("l2", e) for e in L2], ids=str
)
IDS = torch.tensor([0, 1, 2, 3, 2**62, 2**63 - 1, 123456789012345])


def randn(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def awkward_images(size=12):
    """0, 1, bytes, values beside 0, 1 and each other's rounding: wherever float32 could step over a bound."""
    x = torch.rand(len(IDS), 3, size, size, generator=torch.Generator().manual_seed(0))
    x[1], x[2], x[3], x[4] = 0, 1, (x[3] * 255).round() / 255, x[4].round()
    x[5] *= 1e-8
    x[6] = 1 - x[6] * 1e-6
    return x


def assert_inside(perturbed, images, threat):
    """The bound as anyone would compare it: in float32, in float64, and against the number the user wrote."""
    assert perturbed.dtype == torch.float32 and perturbed.min() >= 0 and perturbed.max() <= 1
    for a, x in ((perturbed, images), (perturbed.double(), images.double()), (perturbed.numpy(), images.numpy())):
        delta = torch.as_tensor(a - x).flatten(1)
        length = delta.abs().amax(1) if threat.norm == "linf" else delta.norm(dim=1)
        assert length.max().item() <= parse_eps(threat.eps)
    assert threat.contains(perturbed, images).all()


@every_threat
@pytest.mark.parametrize("size", [1, 32, 128])
def test_random_start_and_projection_stay_in_the_ball_to_the_last_bit(threat, size):
    images = awkward_images(size)
    for number in range(3):
        assert_inside(threat.random_start(images, Noise(IDS, round=number)), images, threat)
    for scale in (1e-9, threat.radius, 1.0, 1e6):
        assert_inside(threat.project(images + scale * randn(images.shape, 1), images), images, threat)


@every_threat
def test_projection_is_idempotent_and_leaves_the_ball_alone(threat):
    images = awkward_images()
    once = threat.project(images + randn(images.shape, 3), images)
    assert torch.equal(threat.project(once, images), once) and torch.equal(threat.project(images, images), images)
    shorter = images + (once - images) * 0.5
    assert torch.allclose(threat.project(shorter, images), shorter, rtol=0, atol=1e-9 if threat.norm == "l2" else 0)
    radius = torch.tensor(threat.radius)
    above = torch.nextafter(radius, torch.tensor(torch.inf)).item()
    assert radius.item() == threat.radius <= parse_eps(threat.eps) < above


@pytest.mark.parametrize("eps", LINF)
def test_linf_projection_is_the_nearest_point(eps):
    threat, images = ThreatModel("linf", eps), awkward_images()
    wild = images + randn(images.shape, 4)
    exact = wild.double().clamp(images.double() - threat.radius, images.double() + threat.radius).clamp(0, 1)
    got = threat.project(wild, images)
    towards = torch.nextafter(got, wild)  # one float nearer to what was projected is outside, or no nearer
    better = (towards.double() - exact).abs() < (got.double() - exact).abs()
    outside = ((towards.double() - images.double()).abs() > threat.radius) | (towards < 0) | (towards > 1)
    assert (outside | ~better).all() and (got.double() - exact).abs().max() < 1e-7


@pytest.mark.parametrize("eps", [0.01, 0.1, 0.3])
def test_l2_projection_is_the_nearest_point_where_the_box_does_not_bind(eps):
    threat, images = ThreatModel("l2", eps), torch.full((4, 3, 6, 6), 0.5)
    delta = randn(images.shape, 5)
    got = threat.project(images + delta, images)
    assert torch.allclose(got, images + eps * delta / delta.flatten(1).norm(dim=1)[:, None, None, None], atol=1e-6)


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_ascent_direction_is_the_steepest_of_unit_size(norm, dual):
    gradient = randn((5, 3, 4, 4), 6)
    gradient[4] = 0
    direction = ThreatModel(norm).ascent_direction(gradient)
    # By duality no unit step gains more than the dual norm.
    assert torch.allclose((direction * gradient).flatten(1).sum(1), gradient.flatten(1).norm(p=dual, dim=1), rtol=1e-5)
    assert not direction[4].any()


def test_contains_sees_one_bit_too_far_one_bit_out_of_range_and_nan():
    threat, images, one = ThreatModel("linf", "8/255"), torch.full((1, 3, 2, 2), 0.5), torch.ones(1, 3, 2, 2)
    edge = threat.project(images + 1, images)
    too_far, odd = edge.clone(), edge.clone()
    too_far[0, 1, 1, 0], odd[0, 1, 1, 0] = torch.nextafter(edge[0, 0, 0, 0], torch.tensor(1.0)), torch.nan
    outside = [(too_far, images), (odd, images), (torch.nextafter(one, one + 1), one), (-1e-30 * one, 0 * one)]
    assert threat.contains(edge, images).item() and not any(threat.contains(*pair).item() for pair in outside)


READ = {" 8 / 255 ": 8 / 255, "0.5/255": 0.5 / 255, "0.03": 0.03, 0.03: 0.03, "1e-2": 0.01, "0": 0.0, 0: 0.0, 1: 1.0}
BAD = ("", "abc", "8/", "1/0", "8/255/2", "nan", "inf", "1e400", "-1/255", -0.1, float("nan"), float("inf"))


def test_eps_is_read_exactly_and_what_is_no_size_or_ball_is_an_error_that_shows_one():
    assert [parse_eps(text) for text in READ] == [*READ.values()]
    assert all(parse_eps(f"{k}/255") == k / 255 for k in range(256))
    for bad in BAD:
        with pytest.raises(ValueError, match="such as '8/255'"):
            ThreatModel("l2", bad)
    for eps in ("8", 8, 8.0):  # where eight 255ths are meant
        with pytest.raises(ValueError, match="8(.0)?/255"):
            ThreatModel("linf", eps)
        assert ThreatModel("l2", eps).radius == 8  # an l-2 ball may be that large
    with pytest.raises(ValueError, match="linf, l2"):
        ThreatModel("l1", "1/255")


@pytest.mark.parametrize("method", ["uniform", "normal"])
def test_noise_is_a_function_of_the_image_not_of_its_batch(method):
    def draw(ids):
        return getattr(Noise(ids, seed=3, round=7), method)((3, 5, 4))

    whole, order = draw(IDS), torch.tensor([4, 0, 6, 2, 5, 1, 3])
    assert torch.equal(draw(IDS[order]), whole[order])
    assert torch.equal(torch.cat([draw(part) for part in IDS.split([1, 2, 4])]), whole)


def test_image_seed_and_round_each_change_all_of_the_noise_and_any_seed_will_do():
    base = Noise(IDS, seed=1, round=1).uniform((3, 8, 8))
    assert len({tuple(r) for r in base.flatten(1).tolist()}) == len(IDS)
    seeds = [(IDS, seed, 1) for seed in (2, 0, -1, 2**31, 2**32 - 1, 2**63)]
    for ids, seed, round in (*seeds, (IDS, 1, 2), (IDS, 1, 0), (IDS + 1, 1, 1)):
        noise = Noise(ids, seed, round).uniform((3, 8, 8))
        assert (noise != base).flatten(1).float().mean(1).min() > 0.99 and abs(noise.mean() - 0.5) < 0.05


VIEWS = {
    "pixels": lambda: Noise(torch.tensor([5]), 1, 1).uniform((20_000,))[0],
    "image ids": lambda: Noise(torch.arange(20_000)).uniform((1,))[:, 0],
    "rounds": lambda: torch.cat([Noise(torch.tensor([5]), 1, d).uniform((1,))[0] for d in range(3000)]),
}


@pytest.mark.parametrize("along", VIEWS)
def test_noise_looks_uniform_and_independent(along):
    """The same noise read along pixels, along neighbouring ids and along steps."""
    u = VIEWS[along]().double()
    n, counts = len(u), torch.histc(u, 50, 0, 1)
    assert 0 <= u.min() < 20 / n and 1 - 20 / n < u.max() < 1
    assert abs(u.mean() - 1 / 2) < 5 * (1 / 12 / n) ** 0.5 and abs(u.var() - 1 / 12) < 5 * (1 / 180 / n) ** 0.5
    assert ((counts - n / 50) ** 2 / (n / 50)).sum() < 49 + 5 * 98**0.5, "chi squared"
    for lag in (1, 2, 64):
        assert abs(torch.corrcoef(torch.stack([u[:-lag], u[lag:]]))[0, 1]) < 5 / n**0.5


def test_normal_noise_has_the_moments_of_a_normal():
    z = Noise(torch.tensor([9])).normal((40_000,)).double()[0]
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - moment) < 5 * (spread / len(z)) ** 0.5


def test_random_start_fills_the_ball_evenly_and_length_and_direction_of_an_l2_start_are_independent():
    """Drawn from one random number, long starts would all lie on one side of the first pixel."""
    ids, threat = torch.arange(4000), ThreatModel("l2", 0.3)
    images = torch.full((len(ids), 3, 2, 2), 0.5)
    delta = (ThreatModel("linf", "8/255").random_start(images, Noise(ids)) - images) / (8 / 255)
    assert abs(delta.mean()) < 0.01 and abs(delta.var() - 1 / 3) < 0.01 and delta.abs().max() > 0.999
    inner = (threat.distance(threat.random_start(images, Noise(ids)), images) / 0.3) ** 12  # share of the ball inside
    assert abs(inner.mean() - 1 / 2) < 0.03 and abs(inner.var() - 1 / 12) < 0.01
    delta = threat.random_start(images[..., :1, :1], Noise(ids)) - images[..., :1, :1]
    length, first = delta.flatten(1).norm(dim=1), delta[:, 0, 0, 0] / delta.flatten(1).norm(dim=1)
    assert abs(torch.corrcoef(torch.stack([length, first.abs()]))[0, 1]) < 0.06

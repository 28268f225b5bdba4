"""Several proxies are one teacher, the mean of their probabilities, and a run with them is as exact as with one."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import (
    CLASSES,
    classifier,
    gpd_schedule,
    largest_difference,
    make_batch,
    make_images,
    make_trainer,
    save_tiny_clip,
    single_schedule,
    weights,
    write_image_folder,
)
from families import save_family

from hpt_hf.commands import train
from hpt_hf.models.ensemble import Ensemble
from hpt_hf.models.zero_shot import ZeroShotClassifier


@pytest.fixture(scope="module")
def proxies(tmp_path_factory, proxy_path) -> list[str]:
    place = tmp_path_factory.mktemp("proxies")
    convolution = save_family("vision-text-dual-encoder", place / "convolution")
    return [proxy_path, save_tiny_clip(place / "third", patch_size=8, width=24, seed=5), convolution]


@pytest.mark.parametrize("shares", [None, [3, 1], [0.2, 0.5, 0.3]])
def test_probabilities_are_the_weighted_mean_of_the_members(proxies, student, shares):
    members = [classifier(path) for path in proxies[: len(shares or "12")]]
    images = make_batch(student, 6)["images"].requires_grad_(True)
    output = Ensemble(members, shares)(images)
    each = torch.stack([m(images).logits.softmax(-1) for m in members])
    share = torch.tensor(shares or [1.0, 1.0], dtype=torch.float).div(sum(shares or [1, 1]))[:, None, None]
    torch.testing.assert_close(output.logits.softmax(-1), (share * each).sum(0))
    torch.testing.assert_close(output.logits.exp().sum(-1), torch.ones(6))
    assert torch.equal(output.members.softmax(-1), each)
    assert torch.autograd.grad(output.logits[:, 0].sum(), images)[0].isfinite().all()


def test_a_run_with_several_resumes_bit_by_bit_and_logs_each_by_name(proxies, student_path, tmp_path):
    def trainer(name):
        options = {
            "proxy": Ensemble([classifier(path) for path in proxies]),
            "save_strategy": "steps",
            "save_steps": 4,
        }
        return make_trainer(tmp_path / name, classifier(student_path), gpd_schedule(), **options)

    whole, again = trainer("whole"), trainer("again")
    untouched = weights(again.proxy)
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert largest_difference(weights(again.model), weights(whole.model)) == 0
    assert largest_difference(untouched, weights(whole.proxy)) == 0, "they stay as they are"
    logged = [row for row in whole.state.log_history if "loss" in row]
    names = {f"agreement_{path.split('/')[-1]}" for path in proxies}
    assert all(names <= row.keys() and all(0 <= row[n] <= 1 for n in names) for row in logged) and len(names) == 3


def test_one_member_teaches_as_it_does_alone_and_a_weight_changes_what_is_learned(proxies, student_path, tmp_path):
    def end(proxy):
        trainer = make_trainer(tmp_path, classifier(student_path), single_schedule("hpt", steps=3), proxy=proxy)
        trainer.train()
        return weights(trainer.model)

    first, second = (classifier(path) for path in proxies[:2])
    alone, one, uneven = end(first), end(Ensemble([first])), end(Ensemble([first, second], [9, 1]))
    assert largest_difference(alone, one) < 1e-6
    assert largest_difference(end(Ensemble([first, second])), uneven) > 1e-6 < largest_difference(uneven, alone)


def test_the_recipe_takes_several_halves_on_clean_images_and_records_them(proxies, student_path, tmp_path):
    data = write_image_folder(tmp_path / "data", make_images(24))
    flags = f"--method hpt_gpd --model {student_path} --dataset {data} --max_steps 4 --use_cpu true --eps 8/255"
    flags += f" --per_device_train_batch_size 8 --disable_tqdm true --proxy {' '.join(proxies)} --proxy_weights 2 1 1"
    train.main([*f"{flags} --proxy_on clean --proxy_dtype bfloat16 --output_dir".split(), str(tmp_path / "out")])
    record = json.loads((tmp_path / "out" / "train.json").read_text())
    assert [p["objective"] for p in record["phases"]] == ["ga", "ga"] and record["recipe"]["proxy"] == proxies
    assert record["decided_by"]["proxy_weights"] == [0.5, 0.25, 0.25]
    assert record["proxy"]["source"] == " + ".join(proxies) and record["proxy"]["fingerprint"].count("+") == 2
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"| proxy | {' + '.join(p.split('/')[-1] for p in proxies)}, weights " in text and str(tmp_path) not in text


def test_half_precision_is_of_the_vision_side_alone(proxy_path, student):
    images = make_batch(student, 8)["images"]
    full, half = classifier(proxy_path), classifier(proxy_path).in_precision(torch.bfloat16)
    a, b = full(images).logits.detach(), half(images).logits.detach()
    assert half.model.logit_scale.dtype == b.dtype == torch.float32 and 0 < (a - b).abs().max() < 0.05 * a.abs().max()


def test_members_that_do_not_fit_are_refused(proxies, student_path, tmp_path):
    one, other = classifier(proxies[0]), ZeroShotClassifier.from_pretrained(proxies[1]).set_classes(CLASSES[::-1])
    with pytest.raises(ValueError, match="have different classes"):
        Ensemble([one, other])
    for shares in ([1], [1, 0], [1, float("nan")]):
        with pytest.raises(ValueError, match="proxy_weights: got .*, expected 2 numbers above 0"):
            Ensemble([one, classifier(proxies[1])], shares)
    data = write_image_folder(tmp_path / "data", make_images(24))
    flags = f"--method hpt --model {student_path} --dataset {data} --proxy {proxies[0]} --proxy_revision a b"
    flags += f" --use_cpu true --per_device_train_batch_size 8 --output_dir {tmp_path / 'out'}"
    with pytest.raises(SystemExit, match="proxy_revision: got 2, expected one for each of 1 proxies"):
        train.main(flags.split())

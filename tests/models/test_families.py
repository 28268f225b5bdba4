"""Every family: logits are its library's own, images cut as by its processor; it is measured, attacked, and teaches."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import CLASSES, classifier, make_images, make_trainer, single_schedule, weights, write_image_folder
from families import FAMILIES as TINY
from families import STUDENTS, save_family
from PIL import Image
from transformers import AutoModelForZeroShotImageClassification, AutoProcessor, pipeline

from hpt_hf.commands import evaluate, train
from hpt_hf.data.collator import Collator, to_images
from hpt_hf.models.families import FAMILIES, patches_of
from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.publishing.export import check

PROMPTS = ("a photo of a {}", "{}")
SIZES = ((32, 32), (64, 64), (80, 61), (45, 97), (33, 32), (20, 28), (150, 40), (98, 49), (49, 147))


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 2, (height, width, 3), np.uint8) * 255)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("families")
    return {family: save_family(family, place / family) for family in TINY}


def test_every_family_is_tested_and_every_student_is_one():
    others = {"open_clip"}  # tests/models/test_open_clip.py
    assert set(TINY) | others == set(FAMILIES)
    assert set(STUDENTS) | others == {name for name, family in FAMILIES.items() if family.student}


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("template", PROMPTS)
def test_logits_are_the_librarys_own_a_short_prompt_beside_a_long_one(family, template, folders):
    ours = ZeroShotClassifier.from_pretrained(folders[family]).set_classes(CLASSES, (template,))
    images = [row["image"].resize((ours.image_size,) * 2) for row in make_images(3)]
    rows = [{"image": image, "label": None} for image in images]
    processor = AutoProcessor.from_pretrained(folders[family], backend="pil")
    padding = {"padding": "max_length", "max_length": 64} if "siglip" in family else {"padding": True}
    tokens = processor.tokenizer([template.format(c) for c in CLASSES], return_tensors="pt", **padding)
    if "siglip" in family:
        tokens = {"input_ids": tokens["input_ids"]}  # as it was trained: no mask
    model = FAMILIES[family].model_class.from_pretrained(folders[family], attn_implementation="eager").eval()
    with torch.no_grad():
        theirs = model(**tokens, **processor.image_processor(images, return_tensors="pt")).logits_per_image
        found = ours(Collator(ours.processor)(rows)["images"]).logits
    assert found.shape == theirs.shape == (3, len(CLASSES)) and (theirs.amax() - theirs.amin()) > 0.01
    torch.testing.assert_close(found, theirs, atol=1e-5 * float(theirs.abs().max().clamp_min(1)), rtol=1e-5)


@pytest.mark.parametrize("family", TINY)
def test_images_are_cut_as_the_processor_does_with_pillow_and_inside_the_model(family, folders):
    """Pillow to the last bit; inside the model within the two roundings to bytes that Pillow makes."""
    ours = classifier(folders[family])
    processor = AutoProcessor.from_pretrained(folders[family], backend="pil").image_processor
    for size in SIZES:
        image = noise(*size)
        theirs = processor([image], return_tensors="pt")["pixel_values"]
        batch = Collator(ours.processor)([{"image": image, "label": None}])["images"]
        native = ours.resize_and_crop(to_images(np.array(image)[None])) if image.size != (32, 32) else batch
        for found, most in ((ours.resize_and_crop(batch), 1e-5), (native, 1.2 / 255)):
            seen = (found - ours.mean) / ours.std
            if family == "siglip2":
                seen = patches_of(ours.model, seen)["pixel_values"]
                theirs = theirs[:, : seen.shape[1]]
            assert seen.shape == theirs.shape, size
            assert float(((seen - theirs) * ours.std.min()).abs().max()) <= most, size


@pytest.mark.parametrize("family", TINY)
def test_pixels_have_gradients_and_training_mode_changes_no_answer(family, folders):
    model = classifier(folders[family])
    images = torch.rand(2, 3, 48, 40, requires_grad=True)
    logits = model.classify(images).logits
    (gradient,) = torch.autograd.grad(logits.square().sum(), images)
    assert torch.isfinite(gradient).all() and (gradient != 0).float().mean() > 0.3
    assert torch.equal(model.train().classify(images).logits, logits), "no dropout, no statistics of the batch"


@pytest.mark.parametrize("family", TINY)
def test_it_is_attacked_and_measured_on_a_folder_of_images_and_teaches(family, folders, student_path, tmp_path):
    data = write_image_folder(tmp_path / "data", make_images(16))
    flags = f"--model {folders[family]} --dataset {data} --attack pgd square --attack_steps 3 --eps 8/255 --probe 1"
    evaluate.main([*flags.split(), "--output_dir", str(tmp_path / "out")])
    results = [json.loads(f.read_text()) for f in (tmp_path / "out" / "results").iterdir()]
    assert len(results) == 2 and all(r["n"] == 16 for r in results)
    flags = f"--method hpt --model {student_path} --proxy {folders[family]} --dataset {data} --max_steps 2 --eps 8/255"
    flags += " --use_cpu true --per_device_train_batch_size 8 --disable_tqdm true --output_dir"
    train.main([*flags.split(), str(tmp_path / "student")])
    assert json.loads((tmp_path / "student" / "train.json").read_text())["steps"] == 2


@pytest.mark.parametrize("family", STUDENTS)
def test_a_student_is_trained_exported_and_opened_by_pipeline_with_our_logits(family, folders, proxy, tmp_path):
    student = classifier(folders[family])
    before = weights(student.model)
    trainer = make_trainer(tmp_path, student, single_schedule("hpt", steps=2), proxy=proxy)
    trainer.train()
    trainer.save_model()
    changed = {n.split(".")[0] for n, t in weights(student.model).items() if not torch.equal(t, before[n])}
    assert changed == set(FAMILIES[family].vision_side) & {n.split(".")[0] for n in before}
    assert check(tmp_path)["difference"] < 1e-4
    stock, info = AutoModelForZeroShotImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(stock) is FAMILIES[family].model_class and not info["missing_keys"]
    image, classify = make_images(1)[0]["image"], pipeline("zero-shot-image-classification", str(tmp_path))
    answers = classify(image, candidate_labels=list(CLASSES), hypothesis_template="This is a photo of a {}")
    said = {answer["label"]: answer["score"] for answer in answers}
    logits = student.classify(Collator(student.processor)([{"image": image, "label": None}])["images"]).logits[0]
    expected = logits.sigmoid() if "siglip" in family else logits.softmax(0)
    assert said == pytest.approx(dict(zip(CLASSES, expected.tolist(), strict=True)), abs=1e-5)
    assert ("do not sum to 1" in (tmp_path / "README.md").read_text()) == ("siglip" in family)
    assert ZeroShotClassifier.from_pretrained(tmp_path).preprocessing == student.preprocessing


@pytest.mark.parametrize("family", sorted(set(TINY) - set(STUDENTS)))
def test_what_can_only_teach_is_no_student(family, folders, proxy, tmp_path):
    with pytest.raises(ValueError, match=f"student: got a model of the family '{family}', expected one of 'clip', "):
        make_trainer(tmp_path, classifier(folders[family]), single_schedule("hpt", steps=2), proxy=proxy)


def test_a_model_that_keeps_the_aspect_takes_no_batch_of_several(folders):
    collate = Collator(classifier(folders["siglip2"]).processor)
    rows = [{"image": Image.new("RGB", size), "label": None} for size in ((32, 32), (64, 32))]
    assert collate(rows[1:])["images"].shape[-2:] != (32, 32)
    with pytest.raises(ValueError, match="got a batch of 2 sizes, .*--protocol native"):
        collate(rows)

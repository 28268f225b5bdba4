"""Proves that the evaluator is plain CLIP: the same logits, the same files on disk, and the text tower read once."""

import copy
import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, save_tiny_clip
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    BertConfig,
    BertModel,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    pipeline,
)

from hpt_hf.data.collator import Collator, to_images
from hpt_hf.models.zero_shot import (
    TEMPLATE,
    ZeroShotClassifier,
    build_zero_shot_head,
    check_classes,
    check_templates,
    fingerprint,
)

TEMPLATES = ("This is a photo of a {}", "a drawing of the {}.", "{}")


def head_of(classifier, classes, templates):
    return build_zero_shot_head(classifier.model, classifier.processor.tokenizer, classes, templates)


def noise_picture(width=45, height=37, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth_picture(width, height):
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = np.stack([np.sin(3 * x + y), np.cos(2 * y - x), x * y], -1)
    return Image.fromarray(np.rint(127.5 + 100 * waves / np.abs(waves).max()).astype(np.uint8))


def as_images(*pictures):
    return to_images(np.stack([np.asarray(p) for p in pictures]))


def stock_logits(path, pictures, templates=(TEMPLATE,)):
    """transformers' own CLIPModel on transformers' own processor, one template."""
    (template,) = templates
    processor = AutoProcessor.from_pretrained(path, backend="pil")
    inputs = processor(text=[template.format(c) for c in CLASSES], images=pictures, padding=True, return_tensors="pt")
    with torch.no_grad():
        return CLIPModel.from_pretrained(path).eval()(**inputs).logits_per_image


# --- equal to CLIPModel


@pytest.mark.parametrize("which", ["student_path", "proxy_path"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_logits_are_clip_models_own(request, which, template):
    path = request.getfixturevalue(which)
    pictures = [noise_picture(45, 37), smooth_picture(80, 64), noise_picture(32, 32, seed=1)]
    model = ZeroShotClassifier.from_pretrained(path).set_classes(CLASSES, (template,))
    batch = Collator(model.processor)([{"image": p, "label": None} for p in pictures])
    with torch.no_grad():
        ours = model(batch["images"]).logits
    theirs = stock_logits(path, pictures, (template,))
    assert ours.shape == (3, len(CLASSES)) and (theirs.max() - theirs.min()) > 1
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_embeds_are_the_projected_image_features_not_normalised(student, student_path):
    pixels = as_images(noise_picture(32, 32))
    with torch.no_grad():
        ours = student(pixels).embeds
        theirs = (
            CLIPModel.from_pretrained(student_path)
            .get_image_features((pixels - student.mean) / student.std)
            .pooler_output
        )
    assert torch.allclose(ours, theirs, atol=1e-6) and (ours.norm(dim=1) - 1).abs().min() > 0.01


def test_an_ensemble_is_the_normalised_mean_of_normalised_prompts(student):
    singles = torch.stack([head_of(student, CLASSES, (t,)) for t in TEMPLATES])
    together = head_of(student, CLASSES, TEMPLATES)
    assert torch.allclose(together, F.normalize(singles.mean(0), dim=1), atol=1e-6)
    assert torch.allclose(together.norm(dim=1), torch.ones(len(CLASSES)), atol=1e-6)
    assert not torch.allclose(together, singles[0], atol=1e-3)


def test_a_class_is_embedded_the_same_whatever_stands_beside_it(student):
    """Padding to the longest prompt, and the chunks of a long list, must not show."""
    alone = head_of(student, ("cat", "dog"), (TEMPLATE,))
    beside = head_of(student, ("a red car beside a house", "cat", "dog"), (TEMPLATE,))[1:]
    assert torch.allclose(alone, beside, atol=1e-6)
    many = tuple(f"cat {i}" for i in range(300))
    some = (0, 255, 256, 299)
    assert torch.allclose(
        head_of(student, many, (TEMPLATE,))[list(some)],
        head_of(student, [many[i] for i in some], (TEMPLATE,)),
        atol=1e-6,
    )


def test_names_and_templates_with_braces_are_taken_as_they_are(student):
    student.set_classes(("{cat}", "{}"), ("a {} {of} sorts",))
    assert torch.isfinite(student.head).all()


# --- names, templates, prompts


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "at least two"),
        (["cat"], "at least two"),
        (["cat", ""], "class 1"),
        (["cat", "  "], "class 1"),
        (["cat", "dog", "cat"], "classes 0 and 2 are both called 'cat'"),
    ],
)
def test_classes_that_cannot_be_told_apart_are_refused(student, classes, message):
    with pytest.raises(ValueError, match=message):
        check_classes(classes)
    with pytest.raises(ValueError, match=message):
        student.set_classes(classes)


@pytest.mark.parametrize("templates", [(), ("a photo",), ("a photo of {} and {}",), ("a photo of {}", "another")])
def test_templates_without_exactly_one_place_are_refused(student, templates):
    with pytest.raises(ValueError, match="{}"):
        check_templates(templates)
    with pytest.raises(ValueError, match="{}"):
        student.set_classes(CLASSES, templates)


def test_a_prompt_too_long_for_the_text_tower_is_named(student):
    context = student.config.text_config.max_position_embeddings
    # Exactly what fits must pass: start, words, end.
    fits = " ".join(["cat"] * (context - 2))
    assert len(student.processor.tokenizer(fits)["input_ids"]) == context
    student.set_classes(("dog", fits), ("{}",))
    with pytest.raises(ValueError, match=f"cat cat.* has {context + 1} tokens.* reads {context}"):
        student.set_classes(("dog", fits + " cat"), ("{}",))


def test_failing_to_set_classes_keeps_the_old_ones(student):
    before = student.head.clone()
    with pytest.raises(ValueError):
        student.set_classes(("cat", "cat"))
    assert student.classes == CLASSES and torch.equal(student.head, before)


def test_no_classes_are_a_clear_error(student_path):
    with pytest.raises(RuntimeError, match="set_classes"):
        ZeroShotClassifier.from_pretrained(student_path)(torch.rand(1, 3, 32, 32))


# --- resizing


@pytest.mark.parametrize(
    "size", [(32, 32), (33, 32), (64, 64), (90, 50), (50, 90), (17, 40), (200, 120), (98, 49), (49, 147)]
)
def test_native_images_are_cut_as_the_processor_cuts_them(student, size):
    picture = smooth_picture(*size)
    ours = student.resize_and_crop(as_images(picture))
    theirs = Collator(student.processor)([{"image": picture, "label": None}])["images"]
    assert ours.shape == theirs.shape == (1, 3, 32, 32)
    # Pillow rounds to bytes after each of its two passes.
    assert (ours - theirs).abs().max() <= 3 / 255
    # One row or column beside the right cut would be farther off than that in the mean.
    assert (ours - theirs).abs().mean() <= 0.6 / 255
    assert ours.min() >= 0 and ours.max() <= 1


@pytest.mark.parametrize("size", [(64, 64), (200, 120), (96, 130)])
def test_fine_detail_is_averaged_as_the_processor_averages_it(student, size):
    """Without antialiasing a shrunken picture is made of a few of its pixels, and an attack need only change those."""
    picture = noise_picture(*size)
    theirs = Collator(student.processor)([{"image": picture, "label": None}])["images"]
    assert (student.resize_and_crop(as_images(picture)) - theirs).abs().max() <= 3 / 255


@pytest.mark.parametrize("size", [32, 224, 336])
def test_the_resized_side_is_the_processor_s_for_every_aspect(student, size):
    """Both sides of the resize before the crop, from the arithmetic alone: size * long / short, cut off."""
    seen = []
    interpolate = F.interpolate
    student.config.vision_config.image_size = size
    try:
        F.interpolate = lambda images, *, size, **_: seen.append(size) or interpolate(images, size=size)
        wanted = []
        for short, factor in ((49, 2), (49, 3), (11, 5), (98, 2), (15, 3), (37, 1), (40, 2)):
            for height, width in ((short, factor * short), (factor * short, short), (short, short + 7)):
                student.resize_and_crop(torch.zeros(1, 3, height, width))
                long = max(height, width)
                target = (size, int(size * long / short))
                wanted.append(target if height <= width else target[::-1])
    finally:
        F.interpolate = interpolate
    assert seen == wanted


def test_images_of_the_tower_s_size_are_not_touched(student):
    images = torch.rand(2, 3, 32, 32)
    assert student.resize_and_crop(images) is images


@pytest.mark.parametrize("size", [(48, 48), (40, 72), (20, 20)])
def test_gradients_flow_through_the_resize_to_every_pixel_that_is_seen(student, size):
    height, width = size
    images = torch.rand(1, 3, height, width, requires_grad=True)
    (gradient,) = torch.autograd.grad(student.classify(images).logits[:, 0].sum(), images)
    middle = (width - height) // 2
    seen = gradient[..., middle : middle + height]
    assert torch.isfinite(gradient).all() and (seen != 0).float().mean() > 0.99
    if width > 1.5 * height:
        assert not gradient[..., :4].any()  # cut off: no attack can work there


# --- what it costs and in which precision


def test_the_text_tower_is_read_once_and_never_by_classify(student):
    calls = []
    handle = student.model.text_model.register_forward_hook(lambda *_: calls.append(1))
    try:
        student.set_classes(CLASSES)
        assert len(calls) == 1
        for _ in range(3):
            student(torch.rand(2, 3, 32, 32))
            student.classify(torch.rand(2, 3, 40, 40))
        assert len(calls) == 1
    finally:
        handle.remove()


def test_under_autocast_the_tower_is_bfloat16_and_the_head_float32(student):
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full = student(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = student(images)
        head = student.model.logit_scale.exp() * F.normalize(half.embeds, dim=-1) @ student.head.T
    assert half.logits.dtype == half.embeds.dtype == torch.float32
    assert not torch.equal(half.embeds, full.embeds)  # the control: autocast did reach the tower
    assert torch.equal(half.logits, head)


def test_class_prompts_are_embedded_in_float32_under_autocast(student):
    before = student.head.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        student.set_classes(CLASSES)
    assert student.head.dtype == torch.float32 and torch.equal(student.head, before)


def test_a_half_precision_checkpoint_is_opened_in_float32(student_path, tmp_path):
    CLIPModel.from_pretrained(student_path).half().save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(student_path).save_pretrained(tmp_path)
    assert {p.dtype for p in ZeroShotClassifier.from_pretrained(tmp_path).parameters()} == {torch.float32}


def test_a_loaded_model_is_in_eval_mode_and_carries_the_processor_s_numbers(student):
    assert not student.training
    image = student.processor.image_processor
    assert torch.allclose(student.mean.flatten(), torch.tensor(image.image_mean))
    assert torch.allclose(student.std.flatten(), torch.tensor(image.image_std))


def test_only_the_vision_side_is_trained(student):
    student.freeze_text()
    asked = {name for name, p in student.model.named_parameters() if p.requires_grad}
    assert asked == {
        n for n, _ in student.model.named_parameters() if n.startswith(("vision_model.", "visual_projection."))
    }
    student(torch.rand(2, 3, 32, 32)).logits.square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in student.parameters())


# --- on disk


@pytest.fixture(scope="module")
def saved(student_path, tmp_path_factory):
    """A student with other weights than it was loaded with, saved by itself."""
    model = ZeroShotClassifier.from_pretrained(student_path).set_classes(CLASSES)
    with torch.no_grad():
        model.model.visual_projection.weight.add_(0.1 * torch.randn_like(model.model.visual_projection.weight))
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return model, str(folder)


def test_the_saved_folder_is_a_plain_clip(saved):
    model, folder = saved
    files = {p.name for p in Path(folder).iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= files and "processor_config.json" in files
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in files)
    config = json.loads((Path(folder) / "config.json").read_text())
    assert config["architectures"] == ["CLIPModel"] and config["model_type"] == "clip"
    assert "auto_map" not in config  # no code of ours is needed to open it
    assert set(model.model.state_dict()) == set(CLIPModel(model.config).state_dict())


@pytest.mark.parametrize("kind", [CLIPModel, AutoModelForZeroShotImageClassification, CLIPVisionModelWithProjection])
def test_the_saved_folder_opens_with_stock_classes_and_answers_alike(saved, kind):
    model, folder = saved
    stock, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    images = as_images(noise_picture(32, 32))
    inputs = (images - model.mean) / model.std
    with torch.no_grad():
        if kind is CLIPVisionModelWithProjection:
            theirs = stock.eval()(pixel_values=inputs).image_embeds
        else:
            assert type(stock) is CLIPModel
            theirs = stock.eval().get_image_features(pixel_values=inputs).pooler_output
        assert torch.allclose(model(images).embeds, theirs, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (57, 41)])
def test_pipeline_gives_the_evaluator_s_probabilities(saved, size):
    model, folder = saved
    picture = smooth_picture(*size)
    classify = pipeline("zero-shot-image-classification", model=folder)
    answers = classify(picture, candidate_labels=list(CLASSES), hypothesis_template=TEMPLATE)
    theirs = torch.tensor([{a["label"]: a["score"] for a in answers}[c] for c in CLASSES])
    with torch.no_grad():
        ours = model(Collator(model.processor)([{"image": picture, "label": None}])["images"]).logits.softmax(1)[0]
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_saved_and_loaded_again_is_the_same_model(saved):
    model, folder = saved
    again = ZeroShotClassifier.from_pretrained(folder)
    assert fingerprint(again) == fingerprint(model)
    with torch.no_grad():
        again.model.visual_projection.weight[0, 0] += 1e-6
    assert fingerprint(again) != fingerprint(model)


def test_a_process_that_is_not_the_main_one_writes_nothing(student, tmp_path):
    student.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./nowhere", "some/where/else"])
def test_a_missing_folder_is_named(source):
    with pytest.raises(ValueError, match=f"no model at {source}: neither a folder"):
        ZeroShotClassifier.from_pretrained(source)


def test_a_hub_id_that_cannot_be_reached_is_an_os_error():
    with pytest.raises(OSError):
        ZeroShotClassifier.from_pretrained("nobody/nothing")


def test_a_folder_that_holds_no_model_says_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="no config.json.*notes.txt"):
        ZeroShotClassifier.from_pretrained(tmp_path)


def test_a_model_that_is_no_clip_is_refused_and_not_filled_with_random_weights(tmp_path):
    size = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 20,
    }
    BertModel(BertConfig(**size)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="type 'bert': expected 'clip'"):
        ZeroShotClassifier.from_pretrained(tmp_path)


def test_two_architectures_share_nothing_but_the_interface(student, proxy, tmp_path):
    images = torch.rand(2, 3, 32, 32)
    assert student(images).logits.shape == proxy(images).logits.shape
    assert not torch.allclose(student(images).logits, proxy(images).logits, atol=0.1)
    twin = save_tiny_clip(tmp_path, patch_size=8, seed=1)
    assert fingerprint(ZeroShotClassifier.from_pretrained(twin)) == fingerprint(student)


@pytest.mark.parametrize("train", [False, True])
def test_the_short_cuts_change_no_gradient(student_path, train):
    """The last layer for the class token alone, patches as a matrix product: the stock model's features and the gradients of pixels and weights."""
    ours, stock = (
        ZeroShotClassifier.from_pretrained(student_path).model.train(train),
        CLIPModel.from_pretrained(student_path).train(train),
    )
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    results = []
    for model in (ours, stock):
        x = images.clone().requires_grad_(True)
        features = model.get_image_features(pixel_values=x).pooler_output
        features.sin().sum().backward()
        grads = {n: p.grad for n, p in model.vision_model.named_parameters()}
        results.append((features.detach(), x.grad, grads))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)
    assert len(results[0][2]) > 30 and results[0][1].abs().max() > 1e-3
    for name, gradient in results[1][2].items():
        torch.testing.assert_close(results[0][2][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_the_short_cuts_survive_a_copy_and_leave_the_checkpoint_plain(student_path, tmp_path):
    model = ZeroShotClassifier.from_pretrained(student_path)
    images = torch.rand(2, 3, 32, 32)
    twin = copy.deepcopy(model)
    assert type(twin.model.vision_model.encoder.layers[-1]).__name__ == "_ClassTokenLayer"
    assert torch.equal(*(m.model.vision_model(pixel_values=images).pooler_output for m in (model, twin)))
    model.save_pretrained(tmp_path)
    stock = CLIPVisionModel.from_pretrained(tmp_path)
    assert stock(pixel_values=images).last_hidden_state.shape[1] == 17
    torch.testing.assert_close(
        stock(pixel_values=images).pooler_output, model.model.vision_model(pixel_values=images).pooler_output
    )


def test_a_model_from_the_hub_knows_its_commit(student_path, tmp_path):
    """From the Hub's own cache, laid out as its client lays it out: a branch is resolved to the commit it stands for."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "models--owner--name"
    shutil.copytree(student_path, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    model = ZeroShotClassifier.from_pretrained("owner/name", cache_dir=tmp_path)
    assert model.revision == commit and ZeroShotClassifier.from_pretrained(student_path).revision is None
    assert fingerprint(model) == fingerprint(ZeroShotClassifier.from_pretrained(student_path))


# --- what cannot be loaded, and is said


@pytest.fixture
def folder(student_path, tmp_path):
    """A copy of the student's folder, to spoil."""
    return shutil.copytree(student_path, tmp_path / "model")


def tensors(change):
    def spoil(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def keep(wanted):
    """Only the tensors with one of these beginnings."""
    return tensors(lambda s: [s.pop(name) for name in list(s) if not name.startswith(wanted)])


def content(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:9000])


def cut_shard(folder):
    ZeroShotClassifier.from_pretrained(folder).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    content(min(folder.glob("model-*")).name, b"x" * 100)(folder)


def config(**changes):
    def spoil(folder):
        said = json.loads((folder / "config.json").read_text())
        said["vision_config"] |= changes
        (folder / "config.json").write_text(json.dumps(said))

    return spoil


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


LACKS = r"lack \d+ tensors, such as .*hpt-hf convert with --base"
DAMAGED, SHAPES = ("the safetensors file is damaged or not one", "do not have the shapes that config.json says")
NO_PROCESSOR, NO_TOKENIZER = (
    "no processor that can be read.*hpt-hf convert with --base",
    "no tokenizer.*hpt-hf convert with --base",
)
BROKEN = {
    "one tensor is missing": (tensors(lambda s: s.pop("logit_scale")), "lack 1 tensors, such as .*logit_scale"),
    "the text tower is missing": (keep(("vision_model.", "visual_projection", "logit_scale")), LACKS),
    "the vision tower is missing": (keep(("text_model.", "text_projection", "logit_scale")), LACKS),
    "a layer is missing": (config(num_hidden_layers=3), "lack 16 tensors, .*vision_model.encoder.layers.2"),
    "names of other code": (tensors(lambda s: [s.update({f"module.{n}": s.pop(n)}) for n in list(s)]), LACKS),
    "a layer too many": (config(num_hidden_layers=1), "vision_model.encoder.layers.1"),
    "another width": (config(hidden_size=64), SHAPES),
    "another patch": (config(patch_size=16), SHAPES),
    "another image size": (config(image_size=64), SHAPES),
    "another space": (tensors(lambda s: s.update({"visual_projection.weight": torch.zeros(12, 32)})), SHAPES),
    "cut off": (cut, DAMAGED),
    "empty": (content("model.safetensors", b""), DAMAGED),
    "noise": (content("model.safetensors", np.random.default_rng(0).bytes(5000)), DAMAGED),
    "a pointer of git-lfs": (
        content("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        DAMAGED,
    ),
    "a pickle under that name": (content("model.safetensors", pickle.dumps({"a": 1})), DAMAGED),
    "a damaged shard": (cut_shard, DAMAGED),
    "no weights": (without("model.safetensors"), "no file named model.safetensors"),
    "no processor": (without("processor_config.json"), NO_PROCESSOR),
    "no processor and no tokenizer": (
        without("processor_config.json", "tokenizer.json", "tokenizer_config.json"),
        NO_PROCESSOR,
    ),
    "a processor of nonsense": (content("processor_config.json", b"{"), NO_PROCESSOR),
    "an empty processor": (content("processor_config.json", b"{}"), NO_PROCESSOR),
    "no tokenizer": (without("tokenizer.json"), NO_TOKENIZER),
    "no tokenizer and no config of it": (without("tokenizer.json", "tokenizer_config.json"), NO_TOKENIZER),
    "an empty tokenizer": (content("tokenizer.json", b""), "tokenizer"),
    "a tokenizer of nonsense": (content("tokenizer.json", b"{}"), "tokenizer"),
    "a config of nonsense": (content("config.json", b"{"), "no model could be loaded"),
    "a config that is empty": (content("config.json", b"{}"), "a model of type None: expected 'clip'"),
    "a config that is a list": (content("config.json", b"[]"), "config"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_folder_that_does_not_hold_a_whole_clip_is_refused(folder, what):
    """Where transformers would fill in random numbers, leave out, or speak of something else."""
    spoil, message = BROKEN[what]
    spoil(folder)
    with pytest.raises((ValueError, OSError), match=message) as raised:
        ZeroShotClassifier.from_pretrained(folder)
    assert str(folder) in str(raised.value)


def pickled(obj, **kwargs) -> bytes:
    file = io.BytesIO()
    torch.save(obj, file, **kwargs)
    return file.getvalue()


NOT_RUN = "a pickle that is damaged or holds more than tensors"
PICKLES = {
    "torch.save": lambda o: pickled(o),
    "torch.save of old": lambda o: pickled(o, _use_new_zipfile_serialization=False),
    "pickle": lambda o: pickle.dumps(o, protocol=2),
    "pickle of old": lambda o: pickle.dumps(o, protocol=0),
    "pickle of today": lambda o: pickle.dumps(o),
}


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "a shard"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_is_never_run(folder, tmp_path, kind, name):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "it-ran",)

    state = load_file(folder / "model.safetensors")
    data = PICKLES[kind]({**state, "evil": Evil()})
    if kind.startswith("pickle"):  # or this would prove nothing
        pickle.loads(data)
        assert (tmp_path / "it-ran").exists()
        (tmp_path / "it-ran").unlink()
    (folder / "model.safetensors").unlink()
    file = "pytorch_model.bin" if name == "pytorch_model.bin" else "pytorch_model-00001-of-00001.bin"
    (folder / file).write_bytes(data)
    if name == "a shard":
        index = {"metadata": {}, "weight_map": dict.fromkeys(state, file)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=NOT_RUN) as raised:
        ZeroShotClassifier.from_pretrained(folder)
    assert not (tmp_path / "it-ran").exists() and str(folder) in str(raised.value)


@pytest.mark.parametrize("what", ["noise", "cut off", "empty", "a list"])
def test_a_damaged_pickle_is_refused(folder, what):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    data = {"noise": b"\x80\x02noise" * 40, "cut off": pickled(state)[:9000], "empty": b"", "a list": pickled([1, 2])}[
        what
    ]
    (folder / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(ValueError, match=f"the weights of {folder} cannot be used"):
        ZeroShotClassifier.from_pretrained(folder)


def test_an_honest_pickle_of_tensors_is_the_same_model(folder, student_path):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickled(state))
    assert fingerprint(ZeroShotClassifier.from_pretrained(folder)) == fingerprint(
        ZeroShotClassifier.from_pretrained(student_path)
    )

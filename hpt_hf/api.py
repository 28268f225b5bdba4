"""From Python, as from the command line: evaluate anything, attack it, train.

hpt_hf.evaluate(model, dataset, attack="standard", eps="4/255", limit=1000)
hpt_hf.attack(model, images, labels, eps="4/255")
hpt_hf.HPTTrainer("openai/clip-vit-base-patch32", proxy="openai/clip-vit-base-patch16", dataset="my_images/").train()
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoProcessor, Pipeline, PreTrainedModel

from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands import train
from hpt_hf.commands.common import ImageArguments, load_model, on_device, open_sets
from hpt_hf.commands.parser import parse
from hpt_hf.data.collator import image_id
from hpt_hf.data.dataset import LabelledImages
from hpt_hf.data.in_memory import fitting, images_of
from hpt_hf.evaluation import evaluator
from hpt_hf.evaluation.tables import Results
from hpt_hf.models.families import FAMILIES
from hpt_hf.models.logits_classifier import Classifier, LogitsClassifier
from hpt_hf.models.zero_shot import TEMPLATE, ZeroShotClassifier
from hpt_hf.training import trainer
from hpt_hf.types import Images, Labels
from hpt_hf.utils import write_json


def classifier_of(model, *, processor=None, image_size: int | None = None) -> Classifier:
    """Whatever classifies images, as a classifier; a model or pipeline that is given is not changed.

    Args:
        model: a folder or Hub id; a zero-shot pipeline; a dual encoder of transformers; a module from images in [0, 1]
            to logits.
        processor: of a dual encoder that does not say where it came from.
        image_size: of a module's input; None: the images' own, if they have one size.

    Raises:
        ValueError, TypeError: nothing that classifies images.
    """
    if isinstance(model, ZeroShotClassifier | LogitsClassifier):
        return model
    if isinstance(model, str | Path):
        return on_device(load_model(str(model)))
    if isinstance(model, Pipeline):
        processor = SimpleNamespace(image_processor=model.image_processor, tokenizer=model.tokenizer)
        model = model.model
    if isinstance(model, PreTrainedModel) and model.config.model_type in FAMILIES:
        processor = processor or AutoProcessor.from_pretrained(model.name_or_path)
        return ZeroShotClassifier(copy.deepcopy(model).float(), processor).eval()
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a folder, Hub id, pipeline, CLIP or a module")
    if image_size is None:
        raise ValueError("image_size: got none for a module, expected the side of its input in pixels")
    return LogitsClassifier(model, image_size).eval()


def evaluate(
    model,
    dataset,
    attack: str | Sequence[str] = "standard",
    eps: str | Sequence[str] = "1/255",
    *,
    norm: str = "linf",
    steps: int | None = None,
    limit: int | None = None,
    classes: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    protocol: str = "input",
    seed: int = 0,
    batch_size: int = 128,
    probe: int = evaluator.PROBE,
    baseline: Any = None,
    save_images: bool = False,
    name: str | None = None,
    output_dir: str | Path | None = None,
    data_dir: str | None = None,
    processor=None,
    image_size: int | None = None,
) -> Results:
    """Clean and robust accuracy, with intervals and sanity checks: one result for each data set, attack and eps.

    Args:
        model, processor, image_size: see `classifier_of`; or several models, a list or name -> model.
        dataset: anything that `hpt-hf evaluate --dataset` takes, one or several; a `datasets.Dataset` or a pair of
            tensors, see `images_of`.
        attack: `standard`, or pgd, cw, apgd-ce, apgd-t, square; `steps`: instead of its own number.
        eps: radius as a fraction of the pixel range, "4/255"; `norm`: linf or l2.
        limit: a fixed random sample of so many images of each set.
        probe: images that the sanity checks look at; 0: none are run.
        baseline: an undefended model, which the attack must break.
        save_images: keep all adversarial images in `output_dir`, under `images/`.
        name: what the results call one model.
        output_dir: for the results, so that a killed evaluation goes on; None: nothing is written.

    Raises:
        ValueError: a model that gives no logits, labels that do not fit, an unknown attack.
    """
    sets = _sets(dataset, data_dir=data_dir, protocol=protocol, limit=limit, classes=classes, templates=templates)
    opening = {"processor": processor, "image_size": image_size or _one_size(sets[0])}
    classifiers = {called: classifier_of(one, **opening) for called, one in _named(model, name).items()}
    undefended = None if baseline is None else classifier_of(baseline, **opening)
    options = {"batch_size": batch_size, "limit": limit}
    if save_images and output_dir is None:
        raise ValueError("save_images: got no output_dir, expected the folder to keep them in")
    options |= {"probe": probe, "baseline": undefended, "folder": output_dir, "save_images": save_images}
    kinds, radii = ([x] if isinstance(x, str) else x for x in (attack, eps))
    attacks = [EvaluationAttack(ThreatModel(norm, r), kind, steps, protocol, seed) for kind in kinds for r in radii]
    results = []
    for (called, classifier), chosen, images in itertools.product(classifiers.items(), attacks, sets):
        model_of = {"name": called, "revision": classifier.revision}
        results.append(result := evaluator.evaluate(classifier, images, chosen, **model_of, **options))
        if output_dir is not None:
            write_json(Path(output_dir) / "results" / result.file_name, result.to_json())
    return Results(tuple(results))


def _named(model, name: str | None) -> dict[str, Any]:
    """Name -> model, of one or of several. Raises ValueError for two of one name."""
    if isinstance(model, Mapping):
        return dict(model)
    models = list(model) if isinstance(model, list | tuple) else [model]
    places = [m if isinstance(m, str | Path) else getattr(m, "name_or_path", "") for m in models]
    names = [str(place or type(m).__name__) for place, m in zip(places, models, strict=True)]
    if len(set(names)) < len(names):
        raise ValueError(f"model: got {', '.join(names)}, expected a name for each. Fix: {{name: model, …}}")
    return dict(zip([name] if name else names, models, strict=True))


def _sets(dataset, *, classes, templates, **where) -> list[LabelledImages]:
    named = list(dataset) if isinstance(dataset, list | tuple) else [dataset]
    if not all(isinstance(name, str | Path) for name in named):
        return [images_of(dataset, classes=classes, templates=templates)]
    asked = {"classes": classes and list(classes), "templates": templates and list(templates), **where}
    return open_sets(ImageArguments("", dataset=[str(name) for name in named], **asked))


def _one_size(images: LabelledImages) -> int | None:
    """The side of the images, if all of a sample are squares of one."""
    sizes = {images[i]["image"].size for i in range(min(len(images), 20))}
    width, height = next(iter(sizes))
    return width if len(sizes) == 1 and width == height else None


def attack(
    model,
    images: Images,
    labels: Labels,
    attack: str = "pgd",
    eps: str = "1/255",
    *,
    norm: str = "linf",
    steps: int | None = None,
    classes: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    seed: int = 0,
    processor=None,
) -> Images:
    """Adversarial images in the ball around each, float32 on the model's device; of those that stand the last tried.

    Args:
        model: see `classifier_of`.
        images: (batch, 3, height, width) in [0, 1].
        labels: (batch,) the right classes.
        classes: names of a zero-shot model's; a module's are its outputs.

    Raises:
        ValueError: images or labels that do not fit, or a zero-shot model without classes.
    """
    classifier = classifier_of(model, processor=processor, image_size=images.shape[-1])
    images, labels = images.to(classifier.device), labels.to(classifier.device)
    if isinstance(classifier, LogitsClassifier) and not classes:
        with torch.no_grad():
            outputs = classifier.model(images[:1])
        classes = [str(i) for i in range(getattr(outputs, "logits", outputs).shape[-1])]
    if classes:
        classifier.set_classes(classes, tuple(templates or (TEMPLATE,)))
    if not classifier.classes:
        raise ValueError("classes: got none, expected the names that a zero-shot model chooses from")
    fitting(labels.tolist(), len(classifier.classes))
    chosen = EvaluationAttack(ThreatModel(norm, eps), attack, steps, seed=seed)
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    ids = torch.tensor([image_id(row) for row in pixels], device=classifier.device)
    return chosen.run(classifier, images, ids, labels)[0].detach()


class HPTTrainer(trainer.HPTTrainer):
    """`hpt_hf.training.trainer.HPTTrainer`; a student given by name takes a recipe's defaults.

    HPTTrainer("openai/clip-vit-base-patch32", proxy="openai/clip-vit-base-patch16", dataset="my_images/")

    Args:
        model: the student: a classifier, as the base class takes it; or a folder or Hub id.
        config: with a name: a recipe, by name or path, whose values the keywords replace.
        dataset: with a name: what `--dataset` takes, or what `images_of` takes.
        settings: with a name: any flags of `hpt-hf train`; `method` is hpt_gpd if it is left out.
    """

    def __init__(self, model, *args, config: str | None = None, dataset=None, **settings):
        if not isinstance(model, str | Path):
            super().__init__(model, *args, **settings)
            return
        given = {"model": str(model), "output_dir": "outputs/my_model", **settings}
        if config is None:
            given.setdefault("method", "hpt_gpd")
        images = None if dataset is None or isinstance(dataset, str | Path) else images_of(dataset)
        given["dataset"] = images.name if images is not None else dataset
        flags = ["--config", config] if config else []
        for key, value in given.items():
            if value is not None:
                flags += [f"--{key}", *map(str, value if isinstance(value, list | tuple) else [value])]
        super().__init__(**train.parts(*parse(train.RECIPE, flags), images=images))

    def save(self) -> Path:
        """Export to `output_dir`: the folder that `pipeline` opens, with record and card. Returns it."""
        train.save(self)
        write_json(Path(self.args.output_dir, train.TRAINED), self.record())
        self.create_model_card()
        return Path(self.args.output_dir)

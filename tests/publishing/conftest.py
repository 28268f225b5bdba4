"""A base to convert with, and another model of its architecture in both forms."""

import copy

import pytest
from openai_clip import random_clip

from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.publishing.convert_checkpoint import write_open_clip


@pytest.fixture(scope="session")
def base(student_path):
    return ZeroShotClassifier.from_pretrained(student_path)


@pytest.fixture(scope="session")
def stock(student_path):
    return random_clip(student_path)


@pytest.fixture(scope="session")
def open_clip_folder(base, stock, tmp_path_factory):
    """Other weights than the base's, written in open_clip's form."""
    folder = tmp_path_factory.mktemp("open_clip") / "model"
    assert write_open_clip(ZeroShotClassifier(copy.deepcopy(stock), base.processor), folder) == 62
    return folder

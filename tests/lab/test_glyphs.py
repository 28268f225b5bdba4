"""Proves that the lab's world is a pure function of its seed, keeps test faces unseen, and asks what has an answer."""

import numpy as np
import pytest

from hpt_hf.lab import glyphs
from hpt_hf.lab.glyphs import (
    COLOURS,
    FACES,
    GROUPS,
    TASKS,
    TEST_FACES,
    GlyphWorld,
    faces_of,
    glyph_name,
    task_classes,
    task_rows,
)

every_task = pytest.mark.parametrize("task", TASKS)


def pixels(image):
    return np.asarray(image).astype(int)


def ink(image, colour):
    """How far the inkiest pixel lies on the way from the ground to a colour, of 1, and beside that way, of 255."""
    shown = pixels(image).reshape(-1, 3)
    way = np.array(COLOURS[colour]) - shown[0]
    off = shown - shown[0]
    most = off[np.abs(off).sum(-1).argmax()]
    share = most @ way / (way @ way)
    return share, np.abs(most - share * way).max()


def equal(a, b):
    return np.array_equal(pixels(a), pixels(b))


# --- a pure function


@pytest.mark.parametrize("faces", ["train", "test"])
def test_a_picture_hangs_on_seed_and_index_alone(faces):
    one, two = GlyphWorld(3, faces=faces), GlyphWorld(3, faces=faces)
    forwards = [one[i] for i in range(12)]
    backwards = [two[i] for i in reversed(range(12))][::-1]  # in another order, by another world
    np.random.seed(0)  # and whatever the global generator says
    for a, b in zip(forwards, backwards, strict=True):
        assert equal(a.image, b.image) and (a.name, a.caption, a.colour) == (b.name, b.caption, b.colour)
    assert len({p.image.tobytes() for p in forwards}) == 12


def test_pictures_are_rgb_squares_with_a_figure_on_a_ground():
    world = GlyphWorld(0)
    for i in range(40):
        picture = world[i]
        assert picture.image.mode == "RGB" and picture.image.size == (32, 32)
        # What it says of its colours is what it shows: the corner is ground, and somewhere lies the ink.
        assert np.abs(pixels(picture.image)[0, 0] - COLOURS[picture.background]).max() <= 10
        share, beside = ink(picture.image, picture.colour)
        assert 0.4 < share < 1.3 and beside < 25 and picture.colour != picture.background


def test_captions_say_only_what_is_true():
    world, named = GlyphWorld(0), 0
    for i in range(300):
        p = world[i]
        named += p.name in p.caption
        for colour in COLOURS:
            if colour in p.caption.replace(p.name, "").split():
                assert colour in (p.colour, p.background)
        for script in glyphs.SCRIPTS:
            if f"{script} script" in p.caption:
                assert p.script == script
        if "typeface" in p.caption:
            assert f"{p.family} typeface" in p.caption
    assert 0.6 < named / 300 < 0.97  # most name the glyph, and some ask for something else


# --- faces


def test_train_and_test_faces_are_disjoint_both_draw_every_glyph_and_a_world_asks_for_its_own(monkeypatch):
    asked = []
    for split in ("train", "test"):
        world = GlyphWorld(0, faces=split)
        monkeypatch.setattr(glyphs, "faces_of", lambda c, faces: asked.append(faces) or faces_of(c, faces))
        assert world[0] and world.of_class("digits", 0, 0) and set(asked) == {split}
        asked.clear()
        monkeypatch.undo()
    for group, characters in GlyphWorld().glyphs.items():
        for character in characters:
            train, test = (set(faces_of(character, split)) for split in ("train", "test"))
            assert train and test and not train & test, (group, character)
            assert test <= set(TEST_FACES)


@pytest.mark.parametrize("face", FACES)
def test_within_a_face_no_two_classes_of_a_task_look_alike(face):
    """A missing glyph would be drawn as the same box as its neighbours, and a question about it have no answer."""
    for group in GROUPS:
        seen = {}
        for character in GlyphWorld(groups=(group,)).glyphs[group]:
            if face in faces_of(character, "test" if face in TEST_FACES else "train"):
                mask = glyphs._mask(character, face)
                key = (mask.size, mask.tobytes())
                assert key not in seen, f"{face} draws {glyph_name(character)} as {glyph_name(seen[key])}"
                seen[key] = character


# --- tasks


@every_task
def test_rows_are_balanced_and_a_longer_list_begins_with_a_shorter(task):
    count = len(task_classes(task))
    longer = task_rows(task, 2 * count + 1)
    labels = [label for _, label in longer]
    for n in (1, count, count + 1, 2 * count + 1):
        counts = np.bincount(labels[:n], minlength=count)
        assert counts.sum() == n and counts.max() - counts.min() <= 1
    shorter = task_rows(task, count - 1)
    assert all(a[1] == b[1] and equal(a[0], b[0]) for a, b in zip(shorter, longer, strict=False))
    assert len({image.tobytes() for image, _ in longer}) == len(longer)
    if task in GROUPS:  # labelled by the glyph that is drawn
        drawn = GlyphWorld(0, faces="test", groups=(task,))
        pictures = [drawn.of_class(task, label, i // count) for i, (_, label) in enumerate(longer)]
        assert [p.name for p in pictures] == [task_classes(task)[label] for label in labels]
        assert all(equal(p.image, image) for p, (image, _) in zip(pictures, longer, strict=True))


@pytest.mark.parametrize("task", ["digits", "text colour", "typeface"])
def test_seeds_and_faces_give_other_rows(task):
    base = {image.tobytes() for image, _ in task_rows(task, 9)}
    for other in ({"seed": 1}, {"faces": "train"}):
        assert not base & {image.tobytes() for image, _ in task_rows(task, 9, **other)}


@pytest.mark.parametrize("task", ["text colour", "background colour"])
def test_colour_tasks_are_labelled_by_the_colour_that_is_seen(task):
    names = list(COLOURS)
    for image, label in task_rows(task, 24):
        assert names[label] in task_classes(task)[label].split()
        if task == "background colour":
            assert np.abs(pixels(image)[0, 0] - COLOURS[names[label]]).max() <= 10
        else:
            share, beside = ink(image, names[label])
            assert 0.4 < share < 1.3 and beside < 25

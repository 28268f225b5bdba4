"""Names are read whole and matched by name, so that no order of a list can shift a label."""

import pytest

from hpt_hf.data.class_names import match_classes, read_classes

NAMES = ("cat", "dog", "house")


@pytest.mark.parametrize(
    ("file", "text", "names"),
    [
        ("a.txt", "cat\ndog's life\ntête-à-tête\nred  car\n\n", ("cat", "dog's life", "tête-à-tête", "red  car")),
        # As Windows writes it. "" is refused when it is used: dropped, it would move the names after it.
        ("a.txt", "\ufeffcat\r\n\r\nhouse\r\n\r\n", ("cat", "", "house")),
        ("a.json", '["cat", "tête"]', ("cat", "tête")),
        ("a.json", '{"n01": "cat"}', {"n01": "cat"}),
    ],
)
def test_names_are_read_from_a_file_whole(tmp_path, file, text, names):
    (tmp_path / file).write_text(text, encoding="utf-8")
    assert read_classes(tmp_path / file) == names
    with pytest.raises(FileNotFoundError, match="no class names"):
        read_classes(tmp_path / "other")


@pytest.mark.parametrize(
    ("own", "given", "classes", "places"),
    [
        (NAMES, None, NAMES, [0, 1, 2]),
        (None, NAMES, NAMES, [0, 1, 2]),
        (NAMES, ("house", "cat", "dog"), ("house", "cat", "dog"), [1, 2, 0]),  # matched by name
        (("dog", "house"), NAMES, NAMES, [1, 2]),  # an empty class folder
        (("red_car", "Te\u0302te"), ("t\u00eate", "Red car"), ("t\u00eate", "Red car"), [1, 0]),  # other spellings
        (("0", "1"), ("cat", "dog"), ("cat", "dog"), [0, 1]),
        (NAMES, ("feline", "hound", "home"), ("feline", "hound", "home"), [0, 1, 2]),  # renamed in order
        (("n2", "n1"), {"n1": "cat", "n2": "dog", "n3": "x"}, ("dog", "cat"), [0, 1]),
        (("cat", "cat"), ("cat", "tom"), ("cat", "tom"), [0, 1]),  # two of one name cannot be matched by it
    ],
)
def test_the_users_names_are_matched_by_name_or_else_in_order(own, given, classes, places):
    assert match_classes(own, given, "set") == (classes, places)


@pytest.mark.parametrize(
    ("own", "given", "message"),
    [
        (None, {"n01": "cat"}, "set names no classes.*--classes"),
        (("n01", "n02"), {"n01": "cat"}, "no entry for 1 classes of set.*n02"),
        (("dog", "house"), ("a", "b", "c"), "set: got 3 class names, expected 2, .*dog, house"),
        (("cat", "cat"), ("cat", "tom", "dog"), "got 3 class names, expected 2"),
        (("cat", "cat"), None, "classes 0 and 1 are both called 'cat'"),
        (("n1", "n2"), {"n1": "cat", "n2": "cat"}, "classes 0 and 1 are both called 'cat'"),
        (("cat", "dog"), ("cat", "dog", "cat"), "classes 0 and 2 are both called 'cat'"),
        (("cat", "dog", "house"), ("house", "dgo", "cat"), "1 of 3 classes of set are not in the list: .'dog'.*dgo"),
        (("Cat", "cat "), None, "got the classes 'Cat' and 'cat ', expected names that differ"),
        (("a", "b"), ("red_car", "Red  car"), "got the classes 'red_car' and 'Red  car'"),
    ],
)
def test_names_that_do_not_fit_or_cannot_be_told_apart_are_refused(own, given, message):
    with pytest.raises(ValueError, match=message):
        match_classes(own, given, "set")


def test_what_is_no_list_of_names_is_refused_by_its_files_name(tmp_path):
    texts = ('"cat dog"', "[1, 2]", "{", '{"a": 1}', "cat\n".encode("utf-16"))
    for text in texts:
        (tmp_path / "names.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match="names.json: got "):
            read_classes(tmp_path / "names.json")

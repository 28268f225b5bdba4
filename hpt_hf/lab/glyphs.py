"""The lab's world of images: glyphs of the fonts that matplotlib ships, captioned with their Unicode names, colours and styles.

Image `i` of a world is a pure function of `(seed, faces, size, i)`: the world is endless, needs no file and no network, and
two machines with the same fonts see the same images. Some faces are held out (`faces="test"`), so every zero-shot task is
asked about shapes of letters that no model was trained on. Typography is real data in the sense that matters here: people
drew it, long before us, and its class names are the Unicode Consortium's.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def _span(first: str, last: str, without: str = "") -> str:
    return "".join(chr(c) for c in range(ord(first), ord(last) + 1) if chr(c) not in without)


# One group of glyphs = one zero-shot task: which of these is it?
GROUPS: dict[str, str] = {
    "digits": _span("0", "9"),
    "latin capitals": _span("A", "Z"),
    "latin smalls": _span("a", "z"),
    "greek capitals": _span("Α", "Ω", without="\u03a2"),
    "greek smalls": _span("α", "ω", without="ς"),
    "cyrillic capitals": _span("А", "Я"),
    "cyrillic smalls": _span("а", "я"),
    "hebrew letters": _span("א", "ת", without="ךםןףץ"),
    "armenian capitals": _span("Ա", "Ֆ"),
    "roman numerals": _span("Ⅰ", "Ⅻ"),
    "currency": "$¢£¥₡₣₤₦₩₪₫€₭₮₱₲₴₵",
    "chess pieces": _span("♔", "♟"),
    "card suits": _span("♠", "♧"),
    "dice": _span("⚀", "⚅"),
    "zodiac": _span("♈", "♓"),
    "planets": "☿♀♁♂♃♄♅♆♇",
    "trigrams": _span("☰", "☷"),
    "arrows": "←↑→↓↔↕↖↗↘↙⇐⇑⇒⇓⇔⇕",
    "shapes": "■□▢▣▲△▶▷▼▽◀◁◆◇◈◉○◎●◐◑◒◓★☆",
    "music": "♩♪♫♬♭♮♯",
    "mathematics": "∀∂∃∅∆∇∈∏∑∓√∞∟∩∪∫≈≠≡≤≥⊂⊃⊕⊗",
}
# Names, sRGB values: different in brightness, so that a figure stays visible on every ground it is paired with.
COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (12, 12, 12),
    "blue": (28, 52, 190),
    "red": (200, 32, 40),
    "green": (36, 150, 70),
    "yellow": (246, 214, 40),
    "white": (245, 245, 245),
}
# face file -> (family, weight, slant), the words of the captions. The cm* faces map only letters and digits to Unicode.
FACES: dict[str, tuple[str, str, str]] = {
    "DejaVuSans": ("sans serif", "regular", "upright"),
    "DejaVuSans-Bold": ("sans serif", "bold", "upright"),
    "DejaVuSans-Oblique": ("sans serif", "regular", "italic"),
    "DejaVuSans-BoldOblique": ("sans serif", "bold", "italic"),
    "DejaVuSansMono": ("monospace", "regular", "upright"),
    "DejaVuSansMono-Bold": ("monospace", "bold", "upright"),
    "DejaVuSansMono-Oblique": ("monospace", "regular", "italic"),
    "DejaVuSansMono-BoldOblique": ("monospace", "bold", "italic"),
    "DejaVuSerif": ("serif", "regular", "upright"),
    "DejaVuSerif-Bold": ("serif", "bold", "upright"),
    "DejaVuSerif-Italic": ("serif", "regular", "italic"),
    "DejaVuSerif-BoldItalic": ("serif", "bold", "italic"),
    "STIXGeneral": ("serif", "regular", "upright"),
    "STIXGeneralBol": ("serif", "bold", "upright"),
    "STIXGeneralItalic": ("serif", "regular", "italic"),
    "STIXGeneralBolIta": ("serif", "bold", "italic"),
    "cmr10": ("serif", "regular", "upright"),
    "cmb10": ("serif", "bold", "upright"),
    "cmti10": ("serif", "regular", "italic"),
    "cmss10": ("sans serif", "regular", "upright"),
    "cmtt10": ("monospace", "regular", "upright"),
}
TEST_FACES = ("DejaVuSans-BoldOblique", "DejaVuSansMono-Oblique", "DejaVuSerif-Italic", "STIXGeneralBol")
SCRIPTS = ("latin", "greek", "cyrillic", "hebrew", "armenian")
TEMPLATE = "This is a photo of {}."  # the pipeline's own default, and the paper's
_TEMPLATES = (("{}", 0.35), (TEMPLATE, 0.45), ("a picture of {}", 0.2))
# Tasks about something other than the glyph's name: task -> what is asked of a image.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "text colour": tuple(f"{c} text" for c in COLOURS),
    "background colour": tuple(f"a {c} background" for c in COLOURS),
    "script": tuple(f"{s} script" for s in SCRIPTS),
    "typeface": ("sans serif typeface", "monospace typeface", "serif typeface"),
}
# An l-inf ball of the usual sizes repaints neither a ground nor a stroke: under PGD-20 at 6/255 the vanilla student still names 83% of the
# text colours right, against 9% of all else. Such tasks measure nothing and stay out of every average.
UNATTACKABLE = ("background colour", "text colour")
TASKS: tuple[str, ...] = (*GROUPS, *ATTRIBUTES)
SIZE = 32  # side of the images in pixels
_EM = 64  # of the cached masks that they are drawn from


def glyph_name(character: str) -> str:
    """The Unicode name in small letters: `"Я"` -> `"cyrillic capital letter ya"`."""
    return unicodedata.name(character).lower()


@functools.cache
def _face_file(face: str) -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"


@functools.cache
def _characters(face: str) -> frozenset[str]:
    """The characters a face really draws: in its Unicode map, and (cm*) only where that map is Unicode's."""
    from matplotlib import ft2font

    known = {chr(c) for c in ft2font.FT2Font(str(_face_file(face))).get_charmap()}
    if face.startswith("cm"):
        known &= set(GROUPS["digits"] + GROUPS["latin capitals"] + GROUPS["latin smalls"])
    return frozenset(known)


@functools.cache
def _mask(character: str, face: str) -> Image.Image | None:
    """The glyph's ink, cropped, its longer side `_EM` pixels, as an `L` image; None if the face draws nothing there."""
    # Basic layout: the default one (raqm) fails on some of these glyphs and differs between Pillow builds.
    font = ImageFont.truetype(str(_face_file(face)), _EM, layout_engine=ImageFont.Layout.BASIC)
    canvas = Image.new("L", (4 * _EM, 4 * _EM))
    ImageDraw.Draw(canvas).text((_EM, _EM), character, font=font, fill=255)
    box = canvas.getbbox()
    if box is None:
        return None
    ink = canvas.crop(box)
    scale = _EM / max(ink.size)
    return ink.resize((max(1, round(ink.width * scale)), max(1, round(ink.height * scale))), Image.Resampling.BILINEAR)


@functools.cache
def faces_of(character: str, faces: str) -> tuple[str, ...]:
    """The faces of a split (`"train"` or `"test"`) that draw `character`, in the order of `FACES`."""
    wanted = [f for f in FACES if (f in TEST_FACES) == (faces == "test")]
    return tuple(f for f in wanted if character in _characters(f) and _mask(character, f) is not None)


@functools.cache
def _pairs() -> tuple[tuple[str, str], ...]:
    """(text, background) colours that differ enough in luminance to be read."""
    luminance = {n: (0.2126 * r + 0.7152 * g + 0.0722 * b) / 255 for n, (r, g, b) in COLOURS.items()}
    return tuple((t, b) for t in COLOURS for b in COLOURS if abs(luminance[t] - luminance[b]) >= 0.3)


@dataclass(frozen=True)
class GlyphImage:
    """One image with everything that is true of it."""

    image: Image.Image
    name: str
    colour: str
    background: str
    family: str
    caption: str

    @property
    def script(self) -> str | None:
        first = self.name.split()[0]
        return first if first in SCRIPTS else None


class GlyphWorld:
    """An endless sequence of captioned images.

    Args:
        seed: of the whole world.
        faces: `"train"` or `"test"`, the typefaces held out for testing.
        groups: which of `GROUPS` to draw from; None for all of them.
    """

    def __init__(self, seed: int = 0, *, faces: str = "train", groups: tuple[str, ...] | None = None):
        groups = tuple(GROUPS) if groups is None else groups
        self.seed, self.faces = seed, faces
        self.glyphs = {g: tuple(c for c in GROUPS[g] if faces_of(c, "train") and faces_of(c, "test")) for g in groups}
        weights = np.array([len(v) ** 0.5 for v in self.glyphs.values()])
        self._weights = weights / weights.sum()

    def __getitem__(self, index: int) -> GlyphImage:
        """Image number `index`: any group, glyph, face and colours."""
        rng = np.random.default_rng([self.seed, len(TEST_FACES) * (self.faces == "test"), index])
        group = list(self.glyphs)[rng.choice(len(self.glyphs), p=self._weights)]
        return self._draw(rng, self.glyphs[group][rng.integers(len(self.glyphs[group]))])

    def of_class(self, group: str, label: int, index: int) -> GlyphImage:
        """Image number `index` of the `label`-th glyph of a group."""
        rng = np.random.default_rng([self.seed, 1000 + list(GROUPS).index(group), label, index, self.faces == "test"])
        return self._draw(rng, self.glyphs[group][label])

    def _draw(self, rng: np.random.Generator, character: str) -> GlyphImage:
        faces = faces_of(character, self.faces)
        face = faces[rng.integers(len(faces))]
        text, ground = _pairs()[rng.integers(len(_pairs()))]
        mask = _mask(character, face)
        if (angle := rng.uniform(-6, 6)) and max(mask.size) > 1:
            mask = mask.rotate(angle, Image.Resampling.BILINEAR, expand=True)
        # The longer side fills 70 to 88% of the image; what room is left is shared out at random.
        scale = SIZE * rng.uniform(0.70, 0.88) / max(mask.size)
        width, height = (max(1, round(side * scale)) for side in mask.size)
        mask = mask.resize((width, height), Image.Resampling.BOX)
        free = (SIZE - width, SIZE - height)
        left, top = (rng.integers(room // 4, (3 * room + 3) // 4 + 1) for room in free)
        ink = np.zeros((SIZE, SIZE, 1), np.float32)
        ink[top : top + height, left : left + width, 0] = np.asarray(mask, np.float32) / 255
        colour, background = (np.clip(np.array(COLOURS[n]) + rng.integers(-10, 11, 3), 0, 255) for n in (text, ground))
        pixels = np.rint(ink * colour + (1 - ink) * background).astype(np.uint8)
        family, weight, slant = FACES[face]
        name = glyph_name(character)
        caption = _caption(rng, name, text, ground, family, weight, slant)
        return GlyphImage(Image.fromarray(pixels), name, text, ground, family, caption)


def _caption(rng: np.random.Generator, name: str, text: str, ground: str, family: str, weight: str, slant: str) -> str:
    """Most captions give the name alone: with colours in all of them a model learns colours at once and shapes hardly."""
    script = name.split()[0] if name.split()[0] in SCRIPTS else "no"
    below = {  # bound of the random number -> what the caption says
        0.60: name,
        0.70: f"{text} {name}",
        0.78: f"{text} {name} on {ground}",
        0.86: f"{name} in {weight} {slant} {family}",
        0.91: f"{text} text",
        0.94: f"a {ground} background",
        0.97: f"{script} script",
        1.00: f"{family} typeface",
    }
    kind = rng.random()
    phrase = next(said for bound, said in below.items() if kind < bound)
    templates, weights = zip(*_TEMPLATES, strict=True)
    return templates[rng.choice(len(templates), p=weights)].format(phrase)


# Task about something other than the glyph's name -> the class of an image, and the groups it is asked of.
_ASKED: dict[str, Callable[[GlyphImage], str]] = {
    "text colour": lambda p: f"{p.colour} text",
    "background colour": lambda p: f"a {p.background} background",
    "script": lambda p: f"{p.script} script",
    "typeface": lambda p: f"{p.family} typeface",
}
_LETTERS = ("latin capitals", "latin smalls", "greek smalls", "cyrillic capitals", "cyrillic smalls")
_LETTERS += ("hebrew letters", "armenian capitals")


def task_classes(task: str) -> tuple[str, ...]:
    """The class names of a task, in label order.

    Raises:
        ValueError: no task of that name.
    """
    if task in ATTRIBUTES:
        return ATTRIBUTES[task]
    if task not in GROUPS:
        raise ValueError(f"the lab has no task {task!r}; it has {', '.join(TASKS)}")
    return tuple(glyph_name(c) for c in GlyphWorld(groups=(task,)).glyphs[task])


def task_rows(task: str, count: int, *, seed: int = 0, faces: str = "test") -> list[tuple[Image.Image, int]]:
    """`count` (image, label) rows of a task, classes in turn, so that any `count` is balanced to within one row.

    The first n rows are the same for every `count` >= n.
    """
    classes = task_classes(task)
    rows: list[tuple[Image.Image, int]] = []
    if task in GROUPS:
        world = GlyphWorld(seed, faces=faces, groups=(task,))
        for i in range(count):
            label = i % len(classes)
            rows.append((world.of_class(task, label, i // len(classes)).image, label))
        return rows
    world = GlyphWorld(seed + 1, faces=faces, groups=None if "colour" in task else _LETTERS)
    waiting: list[list[Image.Image]] = [[] for _ in classes]
    drawn = 0
    while len(rows) < count:
        label = len(rows) % len(classes)
        while not waiting[label]:
            image = world[drawn]
            waiting[classes.index(_ASKED[task](image))].append(image.image)
            drawn += 1
        rows.append((waiting[label].pop(0), label))
    return rows

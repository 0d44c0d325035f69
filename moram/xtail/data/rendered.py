"""Small images drawn from a seed: what the small CLIP is pretrained on, and domains that shift it.

A thing is a letter, a digit, a pictogram, a shape or a texture. The pretraining images are mostly
clean; each domain shows its things in a harder style of its own, and `greek` shows things whose
names no caption mentions. Fonts are those that matplotlib brings along.
"""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 28
# Drawn at twice the size and reduced, which smooths edges.
_BIG = 2 * SIZE

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
# Escaped, for some of them look like Latin letters.
GREEK = {
    "alpha": "\u03b1",
    "beta": "\u03b2",
    "gamma": "\u03b3",
    "delta": "\u03b4",
    "theta": "\u03b8",
    "lambda": "\u03bb",
    "pi": "\u03c0",
    "sigma": "\u03c3",
    "phi": "\u03c6",
    "omega": "\u03c9",
}
SYMBOLS = {
    "heart": "♥",
    "spade": "♠",
    "club": "♣",
    "star": "★",
    "sun": "☀",
    "cloud": "☁",
    "umbrella": "☂",
    "snowman": "☃",
    "telephone": "☎",
    "skull": "☠",
    "anchor": "⚓",
    "scissors": "✂",
    "airplane": "✈",
    "envelope": "✉",
    "pencil": "✏",
    "snowflake": "❄",
    "music note": "♪",
    "chess king": "♚",
    "chess rook": "♜",
    "chess bishop": "♝",
    "chess knight": "♞",
    "chess pawn": "♟",
    "flag": "⚑",
    "moon": "☾",
    "smiling face": "☺",
    "recycling sign": "♻",
    "hammers": "⚒",
    "scales": "⚖",
    "gear": "⚙",
    "lightning": "⚡",
    "check mark": "✓",
    "pointing hand": "☞",
}
SHAPES = (
    "circle",
    "square",
    "triangle",
    "pentagon",
    "hexagon",
    "rectangle",
    "ellipse",
    "plus",
    "arrow",
    "half circle",
)
TEXTURES = (
    "horizontal stripes",
    "vertical stripes",
    "diagonal stripes",
    "checkerboard",
    "polka dots",
    "grid",
    "concentric rings",
    "waves",
    "bricks",
    "zigzag",
)
PLAIN_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono", "cmss10")
ODD_FONTS = ("STIXGeneralItalic", "DejaVuSerif-BoldItalic", "cmti10", "DejaVuSansMono-BoldOblique")


@dataclass(frozen=True)
class Style:
    """How things look; every number is the most that is drawn.

    Args:
        turn: rotation in degrees, either way. stretch: part by which either side may change.
        shift: pixels of the finished image. noise: standard deviation, of 1.
        contrast: (least, most) distance of foreground and background, of 1.
        fonts: names of matplotlib's fonts. outline: draw shapes as lines.
        clutter: strokes behind the thing. grain: noise with neighbours alike, of 1.
        gray: thing and background are black, white or gray (noise and clutter
            are not). side: pixels that the image is reduced to and enlarged
            from again; 0 = it is not.
    """

    turn: float = 8
    stretch: float = 0.12
    shift: float = 2.5
    noise: float = 0.04
    contrast: tuple[float, float] = (0.55, 1.0)
    fonts: tuple[str, ...] = PLAIN_FONTS
    outline: bool = False
    clutter: int = 0
    grain: float = 0.0
    gray: bool = False
    side: int = 0


def world_style(generator: np.random.Generator) -> Style:
    """A style of the pretraining images: mostly clean, each flaw in a part of them."""

    def chance(part: float) -> bool:
        return generator.random() < part

    return Style(
        turn=15,
        stretch=0.15,
        noise=0.1 if chance(0.5) else 0.02,
        contrast=(0.35, 1.0),
        outline=chance(0.35),
        clutter=int(generator.integers(1, 4)) if chance(0.3) else 0,
        grain=0.1 if chance(0.2) else 0.0,
        gray=chance(0.3),
        side=int(generator.integers(7, 15)) if chance(0.3) else 0,
    )


def render(kind: str, thing: str, style: Style, generator: np.random.Generator) -> np.ndarray:
    """One image [28, 28, 3], uint8.

    Args:
        kind: "letter", "digit", "greek", "symbol", "shape" or "texture". thing: its name.
        style: how it looks. generator: of all that is drawn at random.
    """
    mask = _mask(kind, thing, style, generator)
    back = generator.uniform(0, 1, 3)
    if style.gray:
        # Half of them black or white, as scans are.
        back[:] = back[0] if generator.random() < 0.5 else round(back[0])
    front = _away_from(back, style, generator)
    if style.clutter:
        strokes = _strokes(style.clutter, generator)
        shade = back + (generator.uniform(0, 1, 3) - back) * 0.35
        back = back + (shade - back) * strokes[..., None]
    image = back + (front - back) * mask[..., None]
    if style.side:
        image = _coarse(image, style.side)
    if style.noise:
        image = image + generator.normal(0, generator.uniform(0, style.noise), image.shape)
    if style.grain:
        coarse = generator.normal(0, style.grain, (SIZE // 4, SIZE // 4, 1))
        image = image + coarse.repeat(4, 0).repeat(4, 1)
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def _away_from(back: np.ndarray, style: Style, generator: np.random.Generator) -> np.ndarray:
    """A colour whose brightness differs from another's by about as much as was asked."""
    wanted = generator.uniform(*style.contrast)
    target = back.mean() + (wanted if back.mean() < 0.5 else -wanted)
    colour = generator.uniform(0, 1, 3)
    colour = np.full(3, target) if style.gray else colour + (target - colour.mean())
    return colour.clip(0, 1)


def _coarse(image: np.ndarray, side: int) -> np.ndarray:
    small = Image.fromarray((image.clip(0, 1) * 255).astype(np.uint8))
    small = small.resize((side, side), Image.Resampling.BOX)
    return np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float32) / 255


def _mask(kind: str, thing: str, style: Style, generator: np.random.Generator) -> np.ndarray:
    big = Image.new("L", (_BIG, _BIG))
    if kind == "texture":
        values = _texture(thing, generator)
        big = Image.fromarray((values * 255).astype(np.uint8))
    elif kind == "shape":
        _draw_shape(big, thing, style, generator)
    else:
        _draw_glyph(big, kind, thing, style, generator)
    turn = math.radians(generator.uniform(-style.turn, style.turn))
    wide, high = 1 + generator.uniform(-style.stretch, style.stretch, 2)
    dx, dy = generator.uniform(-style.shift, style.shift, 2) * 2
    if kind == "texture":
        dx = dy = 0.0
    c, s, middle = math.cos(turn), math.sin(turn), _BIG / 2
    a, b, d, e = c / wide, s / wide, -s / high, c / high
    matrix = (a, b, middle - a * (middle + dx) - b * (middle + dy))
    matrix += (d, e, middle - d * (middle + dx) - e * (middle + dy))
    moved = big.transform((_BIG, _BIG), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    if kind == "texture" and style.turn:
        # Corners that turned out of the picture are filled by a larger drawing's middle.
        moved = moved.crop((8, 8, _BIG - 8, _BIG - 8))
    return np.asarray(moved.resize((SIZE, SIZE), Image.Resampling.BOX), np.float32) / 255


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / f"{name}.ttf"), size)


def _draw_glyph(
    big: Image.Image, kind: str, thing: str, style: Style, generator: np.random.Generator
) -> None:
    name = "DejaVuSans"
    if kind in ("letter", "digit"):
        name = style.fonts[generator.integers(len(style.fonts))]
    elif kind == "greek":
        name = ("DejaVuSans", "DejaVuSerif", "DejaVuSans-Oblique")[generator.integers(3)]
    signs: dict[str, str] = {"symbol": SYMBOLS, "greek": GREEK}.get(kind, {})
    text = signs.get(thing, thing)
    if kind == "digit":
        text = str(DIGITS.index(thing))
    font = _font(name, int(generator.integers(38, 50)))
    left, top, right, bottom = font.getbbox(text)
    place = ((_BIG - right - left) / 2, (_BIG - bottom - top) / 2)
    ImageDraw.Draw(big).text(place, text, 255, font)


def _draw_shape(big: Image.Image, thing: str, style: Style, generator: np.random.Generator) -> None:
    draw, m = ImageDraw.Draw(big), _BIG / 2
    r = generator.uniform(14, 22)
    how = {"outline": 255, "width": int(generator.integers(2, 5))} if style.outline else {}
    how = how or {"fill": 255}
    box = (m - r, m - r, m + r, m + r)
    if thing == "circle":
        draw.ellipse(box, **how)
    elif thing == "ellipse":
        flat = r * generator.uniform(0.45, 0.65)
        draw.ellipse((m - r, m - flat, m + r, m + flat), **how)
    elif thing == "square":
        draw.rectangle(box, **how)
    elif thing == "rectangle":
        flat = r * generator.uniform(0.4, 0.6)
        draw.rectangle((m - r, m - flat, m + r, m + flat), **how)
    elif thing == "half circle":
        draw.chord((m - r, m - r / 2, m + r, m + 3 * r / 2), 180, 360, **how)
    elif thing in ("triangle", "pentagon", "hexagon"):
        sides = {"triangle": 3, "pentagon": 5, "hexagon": 6}[thing]
        draw.regular_polygon((m, m, r), sides, **how)
    else:
        a, b = r, r * generator.uniform(0.25, 0.4)
        if thing == "plus":
            points = ((-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b))
            points += tuple((-x, -y) for x, y in points)
        else:
            points = ((-a, -b), (0, -b), (0, -a * 0.8), (a, 0), (0, a * 0.8), (0, b), (-a, b))
        draw.polygon([(m + x, m + y) for x, y in points], **how)


def _texture(thing: str, generator: np.random.Generator) -> np.ndarray:
    """Values in 0..1, [56, 56]."""
    y, x = np.mgrid[0:_BIG, 0:_BIG].astype(np.float32)
    period = generator.uniform(10, 18)
    y, x = y + generator.uniform(0, period), x + generator.uniform(0, period)
    u, v = 2 * np.pi * x / period, 2 * np.pi * y / period
    if thing == "horizontal stripes":
        wave = np.sin(v)
    elif thing == "vertical stripes":
        wave = np.sin(u)
    elif thing == "diagonal stripes":
        wave = np.sin((u + v) / math.sqrt(2))
    elif thing == "checkerboard":
        wave = np.sin(u) * np.sin(v)
    elif thing == "polka dots":
        wave = np.sin(u) + np.sin(v) - 1.0
    elif thing == "grid":
        wave = np.maximum(np.cos(u), np.cos(v)) - 0.75
    elif thing == "concentric rings":
        far = np.hypot(x - x.mean(), y - y.mean())
        wave = np.sin(2 * np.pi * far / period)
    elif thing == "waves":
        wave = np.sin(v + 1.6 * np.sin(u))
    elif thing == "zigzag":
        wave = np.sin(v + 3 * np.abs((x / period) % 1 - 0.5) * 2)
    else:
        row = np.floor(2 * y / period)
        wave = np.maximum(np.cos(2 * v), np.cos(u / 1.5 + np.pi * (row % 2))) - 0.8
        return (wave < 0).astype(np.float32)
    return (wave > 0).astype(np.float32)


def _strokes(count: int, generator: np.random.Generator) -> np.ndarray:
    big = Image.new("L", (_BIG, _BIG))
    draw = ImageDraw.Draw(big)
    for _ in range(count):
        draw.line(list(generator.uniform(0, _BIG, 4)), 255, int(generator.integers(1, 4)))
    return np.asarray(big.resize((SIZE, SIZE), Image.Resampling.BOX), np.float32) / 255

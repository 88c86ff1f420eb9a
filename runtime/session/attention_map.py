"""Pictures and films of where the question looks: frames with the similarity laid over them, and a strip that tells when."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.runtime.session.video import Video

TILE, GAP, MAX_TILES = 216, 6, 32  # pixels, pixels, frames
FILM_HEIGHT, STRIP, HEAD = 360, 72, 34  # pixels
SHORTEST, LONGEST = 0.25, 1.5  # seconds that a film shows a frame
FILMS = {".mp4": ("libx264", "mpeg4"), ".mkv": ("libx264", "mpeg4"), ".webm": ("libvpx-vp9", "libvpx")}
_STOPS = np.array(
    [(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)], np.float32
)  # dark to bright
_DARK, _LIGHT, _WARM = (24, 24, 27), (235, 235, 235), (252, 165, 10)


@dataclass
class Attention:
    """What a question looks at. images: RGB uint8; heat (T,rows,columns) in 0…1; shares (T,): of the attention, per frame; times: seconds."""

    question: str
    images: list[np.ndarray]
    heat: np.ndarray
    shares: np.ndarray
    times: list[float]


def attention_of(video: Video, question: str) -> Attention:
    """Similarity and weights of a question, and the frames' pictures. Raises EngineError if the model pools without the question."""
    cosine, weights, indices, times = video.attention(question)
    if video.media == "image":
        cosine, weights, indices, times = (
            cosine[:1],
            weights[:1],
            [0],
            [0.0],
        )  # the whole image; its crops follow
    low, high = np.percentile(cosine, 50), cosine.max()
    heat = np.clip((cosine - low) / max(high - low, 1e-6), 0, 1)
    shares = weights.reshape(len(weights), -1).sum(1).astype(np.float64)
    return Attention(
        question, video.pictures(indices), heat, shares / max(float(shares.sum()), 1e-30), list(times)
    )


def colour(values: np.ndarray) -> np.ndarray:
    """values in 0…1 (…) → RGB float32 (…,3)."""
    at = np.clip(values, 0, 1) * (len(_STOPS) - 1)
    low = np.minimum(at.astype(int), len(_STOPS) - 2)
    mixed: np.ndarray = _STOPS[low] + (_STOPS[low + 1] - _STOPS[low]) * (at - low)[..., None]
    return mixed


def overlay(image: np.ndarray, heat: np.ndarray, tile: int = TILE) -> np.ndarray:
    """RGB uint8 (H,W,3) and heat (rows,columns) in 0…1 → RGB uint8, `tile` pixels high; warm where the heat is high."""
    from PIL import Image

    width = max(1, min(round(tile * image.shape[1] / image.shape[0]), 4 * tile))
    small = np.asarray(Image.fromarray(image).resize((width, tile), Image.Resampling.BICUBIC), np.float32)
    evenly_spaced = Image.fromarray((heat * 255).astype(np.uint8)).resize(
        (width, tile), Image.Resampling.BICUBIC
    )
    strength = np.asarray(evenly_spaced, np.float32)[..., None] / 255
    mixed = small * (1 - 0.15 - 0.55 * strength) + colour(strength[..., 0]) * (0.55 * strength)
    return np.clip(mixed, 0, 255).astype(np.uint8)


def attention_picture(video: Video, question: str) -> np.ndarray:
    """RGB uint8 picture of all sampled frames (at most 32, evenly chosen), the question above them."""
    from PIL import Image, ImageDraw, ImageFont

    found = attention_of(video, question)
    chosen = np.unique(
        np.linspace(0, len(found.images) - 1, min(len(found.images), MAX_TILES)).round().astype(int)
    )
    tiles = [overlay(found.images[i], found.heat[i]) for i in chosen]
    across = min(len(tiles), 4 if len(tiles) > 3 else len(tiles))
    down, width = -(-len(tiles) // across), max(t.shape[1] for t in tiles)
    head = 30
    sheet = Image.new("RGB", (across * (width + GAP) + GAP, head + down * (TILE + GAP) + GAP), _DARK)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    pen.text((GAP + 2, 6), _fit_text(pen, question, font, sheet.width - 2 * GAP), fill=_LIGHT, font=font)
    for k, (i, tile) in enumerate(zip(chosen, tiles)):
        left, top = GAP + (k % across) * (width + GAP), head + (k // across) * (TILE + GAP)
        sheet.paste(Image.fromarray(tile), (left, top))
        pen.text(
            (left + 5, top + 3),
            f"{found.times[i]:.2f} s",
            fill=(255, 255, 255),
            font=ImageFont.load_default(13),
        )
    return np.asarray(sheet)


def attention_film(video: Video, question: str, answer: str = "") -> tuple[list[np.ndarray], float]:
    """RGB uint8 pictures of one size (even sides), one per sampled frame, and how many seconds each is shown.

    The frame with the similarity laid over it; above it the question (and the answer), below it a strip: how much of the attention each frame gets.
    """
    from PIL import Image

    found = attention_of(video, question)
    tiles = [overlay(image, heat, FILM_HEIGHT) for image, heat in zip(found.images, found.heat)]
    width = max(max(tile.shape[1] for tile in tiles), 2 * STRIP) // 2 * 2
    pictures = []
    for i, tile in enumerate(tiles):
        sheet = Image.new("RGB", (width, HEAD + FILM_HEIGHT + STRIP), _DARK)
        sheet.paste(Image.fromarray(tile), ((width - tile.shape[1]) // 2, HEAD))
        _write_head(sheet, f"{question}  >  {answer}" if answer else question)
        _draw_strip(sheet, found.shares, found.times, i)
        pictures.append(np.asarray(sheet))
    span = (found.times[-1] - found.times[0]) / max(len(tiles) - 1, 1)
    return pictures, float(np.clip(span, SHORTEST, LONGEST))


def _write_head(sheet: Any, text: str) -> None:
    from PIL import ImageDraw, ImageFont

    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    pen.text((8, 7), _fit_text(pen, text, font, sheet.width - 16), fill=_LIGHT, font=font)


def _draw_strip(sheet: Any, shares: np.ndarray, times: Sequence[float], now: int) -> None:
    """Bars along the time, the present frame's bright, its time and share beside it."""
    from PIL import ImageDraw, ImageFont

    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    left, right, top, bottom = 8, sheet.width - 8, sheet.height - STRIP + 20, sheet.height - 8
    pen.text(
        (left, sheet.height - STRIP + 3),
        f"{times[now]:.2f} s: {100 * shares[now]:.0f} % of the attention",
        fill=_LIGHT,
        font=font,
    )
    first, span = times[0], max(times[-1] - times[0], 1e-9)
    nearest = min((b - a for a, b in pairwise(times) if b > a), default=span)
    each = max(min((right - left) * nearest / (span + nearest), (right - left) / 8) - 1, 3)
    for i, (share, seconds) in enumerate(zip(shares, times)):
        x = left + (right - left - each) * ((seconds - first) / span if len(times) > 1 else 0)
        height = max((bottom - top) * share / max(float(shares.max()), 1e-9), 1)
        pen.rectangle((x, bottom - height, x + each, bottom), fill=_WARM if i == now else (110, 60, 90))
    pen.line((left, bottom + 1, right, bottom + 1), fill=(90, 90, 95))


def _fit_text(pen: Any, text: str, font: Any, width: int) -> str:
    text = " ".join(text.split())
    while len(text) > 4 and pen.textlength(text, font=font) > width:
        text = text[:-2].rstrip("…") + "…"
    return text


def save_attention(video: Video, question: str, path: str | os.PathLike[str], answer: str = "") -> None:
    """Write a picture (.png) or a film (.mp4, .mkv, .webm, .gif): beside its place first, then renamed. Raises PPLLaVAError if it can't be written."""
    from PIL import Image

    target = Path(path)
    suffix = target.suffix.lower()
    part = target.with_name(f".{target.stem}.part{suffix or '.png'}")
    try:
        if suffix in FILMS:
            _write_film(part, *attention_film(video, question, answer), FILMS[suffix])
        elif suffix == ".gif":
            pictures, seconds = attention_film(video, question, answer)
            first, *others = (Image.fromarray(picture) for picture in pictures)
            first.save(part, save_all=True, append_images=others, duration=round(1000 * seconds), loop=0)
        elif suffix in (".png", ""):
            Image.fromarray(attention_picture(video, question)).save(part, format="PNG")
        else:
            raise PPLLaVAError(f"--save-attention writes .png, .gif, {', '.join(FILMS)}, not {suffix}")
        part.replace(target)
    except OSError as error:
        raise PPLLaVAError(f"can't write {target}: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)


def _write_film(path: Path, pictures: list[np.ndarray], seconds: float, codecs: Sequence[str]) -> None:
    import av

    from ppllava_edge.runtime.media.writing import write_video

    codec = next((name for name in codecs if name in av.codecs_available), codecs[-1])
    write_video(path, pictures, Fraction(round(1000 / seconds), 1000).limit_denominator(1000), codec)

"""Attention maps: pictures and films of frames, overlaid with their similarity to the question."""

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

TILE, GAP, PICTURE_HEAD = 216, 6, 30  # pixels in a picture
MAX_TILES = 32  # frames per picture
FILM_HEIGHT, STRIP, FILM_HEAD = 360, 72, 34  # pixels in a film
MIN_SECONDS, MAX_SECONDS = 0.25, 1.5  # per frame of a film
FILMS = {".mp4": ("libx264", "mpeg4"), ".mkv": ("libx264", "mpeg4"), ".webm": ("libvpx-vp9", "libvpx")}
# The colour map, dark to bright (after matplotlib's inferno).
_STOPS = np.array(
    [(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)], np.float32
)
_DARK, _LIGHT, _WARM = (24, 24, 27), (235, 235, 235), (252, 165, 10)


@dataclass
class Attention:
    """Where a question attends.

    Attributes:
        question: The question.
        images: T small RGB uint8 frames (H, W, 3).
        heat: (T, rows, columns) in 0 to 1: the similarity of the patches with the question, scaled.
        shares: (T,) float64: each frame's share of the pooling weights.
        times: When the frames are shown, seconds.
    """

    question: str
    images: list[np.ndarray]
    heat: np.ndarray
    shares: np.ndarray
    times: list[float]


def attention_of(video: Video, question: str) -> Attention:
    """Compute where a question attends.

    Raises:
        EngineError: If the model pools without the question.
        MediaError: If the frames' pictures can't be read again.
    """
    cosine, weights, indices, times = video.attention(question)
    if video.media == "image":  # the whole image comes first; its crops follow
        cosine, weights = cosine[:1], weights[:1]
        indices, times = [0], [0.0]
    low, high = np.percentile(cosine, 50), cosine.max()
    heat = np.clip((cosine - low) / max(high - low, 1e-6), 0, 1)
    shares = weights.reshape(len(weights), -1).sum(1).astype(np.float64)
    shares /= max(float(shares.sum()), 1e-30)
    return Attention(question, video.pictures(indices), heat, shares, list(times))


def colour(values: np.ndarray) -> np.ndarray:
    """Map values in 0 to 1, of any shape (…), to RGB float32 (…, 3)."""
    position = np.clip(values, 0, 1) * (len(_STOPS) - 1)
    low = np.minimum(position.astype(int), len(_STOPS) - 2)
    mixed: np.ndarray = _STOPS[low] + (_STOPS[low + 1] - _STOPS[low]) * (position - low)[..., None]
    return mixed


def overlay(image: np.ndarray, heat: np.ndarray, tile: int = TILE) -> np.ndarray:
    """Lay the heat over a frame.

    Args:
        image: RGB uint8 (H, W, 3).
        heat: (rows, columns) in 0 to 1.
        tile: Height of the result, pixels.

    Returns:
        RGB uint8 (tile, width, 3), at most four times as wide as high; bright where the heat is high.
    """
    from PIL import Image

    width = max(1, min(round(tile * image.shape[1] / image.shape[0]), 4 * tile))
    small = np.asarray(Image.fromarray(image).resize((width, tile), Image.Resampling.BICUBIC), np.float32)
    smooth = Image.fromarray((heat * 255).astype(np.uint8)).resize((width, tile), Image.Resampling.BICUBIC)
    strength = np.asarray(smooth, np.float32)[..., None] / 255
    mixed = small * (1 - 0.15 - 0.55 * strength) + colour(strength[..., 0]) * (0.55 * strength)
    return np.clip(mixed, 0, 255).astype(np.uint8)


def attention_picture(video: Video, question: str) -> np.ndarray:
    """Draw the frames, overlaid, in a grid with the question above.

    Returns:
        RGB uint8 (height, width, 3). Of more than 32 frames, 32 are chosen evenly.

    Raises:
        EngineError: If the model pools without the question.
        MediaError: If the frames' pictures can't be read again.
    """
    from PIL import Image, ImageDraw, ImageFont

    attention = attention_of(video, question)
    count = len(attention.images)
    chosen = np.unique(np.linspace(0, count - 1, min(count, MAX_TILES)).round().astype(int))
    tiles = [overlay(attention.images[i], attention.heat[i]) for i in chosen]
    columns = min(len(tiles), 4)
    rows = -(-len(tiles) // columns)
    width = max(tile.shape[1] for tile in tiles)
    size = columns * (width + GAP) + GAP, PICTURE_HEAD + rows * (TILE + GAP) + GAP
    sheet = Image.new("RGB", size, _DARK)
    pen, font, small_font = ImageDraw.Draw(sheet), ImageFont.load_default(16), ImageFont.load_default(13)
    pen.text((GAP + 2, 6), _fit_text(pen, question, font, sheet.width - 2 * GAP), fill=_LIGHT, font=font)
    for k, (i, tile) in enumerate(zip(chosen, tiles)):
        left = GAP + (k % columns) * (width + GAP)
        top = PICTURE_HEAD + (k // columns) * (TILE + GAP)
        sheet.paste(Image.fromarray(tile), (left, top))
        seconds = f"{attention.times[i]:.2f} s"
        pen.text((left + 5, top + 3), seconds, fill=(255, 255, 255), font=small_font)
    return np.asarray(sheet)


def attention_film(video: Video, question: str, answer: str = "") -> tuple[list[np.ndarray], float]:
    """Draw a picture per frame: question and answer, the frame, overlaid, and a strip of all frames' shares.

    Returns:
        RGB uint8 pictures of one size with even sides, and the seconds to show each.

    Raises:
        EngineError: If the model pools without the question.
        MediaError: If the frames' pictures can't be read again.
    """
    from PIL import Image

    attention = attention_of(video, question)
    tiles = [overlay(image, heat, FILM_HEIGHT) for image, heat in zip(attention.images, attention.heat)]
    width = max(max(tile.shape[1] for tile in tiles), 2 * STRIP) // 2 * 2
    pictures = []
    for i, tile in enumerate(tiles):
        sheet = Image.new("RGB", (width, FILM_HEAD + FILM_HEIGHT + STRIP), _DARK)
        sheet.paste(Image.fromarray(tile), ((width - tile.shape[1]) // 2, FILM_HEAD))
        _write_head(sheet, f"{question}  >  {answer}" if answer else question)
        _draw_strip(sheet, attention.shares, attention.times, i)
        pictures.append(np.asarray(sheet))
    interval = (attention.times[-1] - attention.times[0]) / max(len(tiles) - 1, 1)
    return pictures, float(np.clip(interval, MIN_SECONDS, MAX_SECONDS))


def _write_head(sheet: Any, text: str) -> None:
    from PIL import ImageDraw, ImageFont

    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    pen.text((8, 7), _fit_text(pen, text, font, sheet.width - 16), fill=_LIGHT, font=font)


def _draw_strip(sheet: Any, shares: np.ndarray, times: Sequence[float], now: int) -> None:
    """Draw the frames' shares as bars over time, the present frame's bar bright, its figures above."""
    from PIL import ImageDraw, ImageFont

    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    left, right, top, bottom = 8, sheet.width - 8, sheet.height - STRIP + 20, sheet.height - 8
    figures = f"{times[now]:.2f} s: {100 * shares[now]:.0f} % of the attention"
    pen.text((left, sheet.height - STRIP + 3), figures, fill=_LIGHT, font=font)
    first, span = times[0], max(times[-1] - times[0], 1e-9)
    nearest = min((b - a for a, b in pairwise(times) if b > a), default=span)
    bar = max(min((right - left) * nearest / (span + nearest), (right - left) / 8) - 1, 3)
    for i, (share, seconds) in enumerate(zip(shares, times)):
        x = left + (right - left - bar) * ((seconds - first) / span if len(times) > 1 else 0)
        height = max((bottom - top) * share / max(float(shares.max()), 1e-9), 1)
        pen.rectangle((x, bottom - height, x + bar, bottom), fill=_WARM if i == now else (110, 60, 90))
    pen.line((left, bottom + 1, right, bottom + 1), fill=(90, 90, 95))


def _fit_text(pen: Any, text: str, font: Any, width: int) -> str:
    text = " ".join(text.split())
    while len(text) > 4 and pen.textlength(text, font=font) > width:
        text = text[:-2].rstrip("…") + "…"
    return text


def save_attention(video: Video, question: str, path: str | os.PathLike[str], answer: str = "") -> None:
    """Write an attention map, through a temporary file beside it.

    Args:
        video: The video.
        question: The question.
        path: Suffix .png (or none) for a picture; .mp4, .mkv, .webm or .gif for a film.
        answer: Shown in a film.

    Raises:
        PPLLaVAError: If it can't be written, or the suffix isn't supported.
        EngineError: If the model pools without the question.
    """
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
            raise PPLLaVAError(
                f"an attention map is a .png, .gif, {', '.join(FILMS)} file, not {suffix}: {target}"
            )
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

"""A picture of where the question looks: the sampled frames with the similarity laid over them as a heat map."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ..engines.errors import PPLLaVAError
from .session import Video

TILE, GAP, MOST_TILES = 216, 6, 32  # pixels, pixels, frames
_STOPS = np.array([(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)], np.float32)  # dark to bright


def colour(values: np.ndarray) -> np.ndarray:
    """values in 0…1 (…) → RGB float32 (…,3)."""
    at = np.clip(values, 0, 1) * (len(_STOPS) - 1)
    low = np.minimum(at.astype(int), len(_STOPS) - 2)
    return _STOPS[low] + (_STOPS[low + 1] - _STOPS[low]) * (at - low)[..., None]


def overlay(image: np.ndarray, heat: np.ndarray, tile: int = TILE) -> np.ndarray:
    """RGB uint8 (H,W,3) and heat (rows,columns) in 0…1 → RGB uint8, `tile` pixels high; warm where the heat is high."""
    from PIL import Image

    width = max(1, min(round(tile * image.shape[1] / image.shape[0]), 4 * tile))
    small = np.asarray(Image.fromarray(image).resize((width, tile), Image.Resampling.BICUBIC), np.float32)
    spread = Image.fromarray((heat * 255).astype(np.uint8)).resize((width, tile), Image.Resampling.BICUBIC)
    strength = np.asarray(spread, np.float32)[..., None] / 255
    mixed = small * (1 - 0.15 - 0.55 * strength) + colour(strength[..., 0]) * (0.55 * strength)
    return np.clip(mixed, 0, 255).astype(np.uint8)


def attention_picture(video: Video, question: str) -> np.ndarray:
    """RGB uint8 picture of all sampled frames (at most 32, evenly chosen), the question above them."""
    from PIL import Image, ImageDraw, ImageFont

    cosine = video.similarity(question)
    if video.media == "image":
        cosine = cosine[:1]  # the whole image; its crops follow
    chosen = np.unique(np.linspace(0, len(cosine) - 1, min(len(cosine), MOST_TILES)).round().astype(int))
    low, high = np.percentile(cosine, 50), cosine.max()
    heat = np.clip((cosine - low) / max(high - low, 1e-6), 0, 1)
    tiles = [overlay(video.frames.images[i], heat[i]) for i in chosen]
    across = min(len(tiles), 4 if len(tiles) > 3 else len(tiles))
    down, width = -(-len(tiles) // across), max(t.shape[1] for t in tiles)
    head = 30
    sheet = Image.new("RGB", (across * (width + GAP) + GAP, head + down * (TILE + GAP) + GAP), (24, 24, 27))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    pen.text((GAP + 2, 6), _fit_text(pen, question, font, sheet.width - 2 * GAP), fill=(235, 235, 235), font=font)
    for k, (i, tile) in enumerate(zip(chosen, tiles)):
        left, top = GAP + (k % across) * (width + GAP), head + (k // across) * (TILE + GAP)
        sheet.paste(Image.fromarray(tile), (left, top))
        pen.text((left + 5, top + 3), f"{video.frames.times[i]:.2f} s", fill=(255, 255, 255), font=ImageFont.load_default(13))
    return np.asarray(sheet)


def _fit_text(pen, text: str, font, width: int) -> str:
    text = " ".join(text.split())
    while len(text) > 4 and pen.textlength(text, font=font) > width:
        text = text[:-2].rstrip("…") + "…"
    return text


def save_attention(video: Video, question: str, path: str | os.PathLike[str]) -> None:
    """Write the picture as PNG: beside its place first, then renamed. Raises PPLLaVAError if it can't be written."""
    from PIL import Image

    target = Path(path)
    part = target.with_name(f".{target.name}.part")
    try:
        Image.fromarray(attention_picture(video, question)).save(part, format="PNG")
        part.replace(target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise PPLLaVAError(f"can't write {target}: {error.strerror or error}") from None

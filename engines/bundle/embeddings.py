"""embed_tokens.safetensors of a bundle, checked against the manifest before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ppllava_edge.engines.bundle.bundle import Bundle
from ppllava_edge.engines.bundle.untrusted import open_inside, printable
from ppllava_edge.engines.errors import BundleError

FILE = "embed_tokens.safetensors"
TABLE, SCALES, NEWLINE = "embed_tokens", "embed_tokens.scale", "image_newline"
LARGEST_HEADER = 1 << 20  # bytes
FLOATS = ("F32", "F16")


def open_embeddings(bundle: Bundle, newline: bool = False) -> Any:
    """Open the file; tensors are mapped, and read when they are asked for.

    Args:
        bundle: The bundle.
        newline: Whether image_newline is needed too.

    Returns:
        A `safetensors.safe_open` reader, which is a context manager. It has "embed_tokens" (V, D) in float32,
        float16 or int8; if int8, "embed_tokens.scale" (V,); and, if needed, "image_newline" (D,).

    Raises:
        BundleError: The file can't be read, or its tensors aren't those that the manifest promises.
    """
    from safetensors import SafetensorError, safe_open

    path, info = bundle.file(FILE), bundle.manifest.decoder
    with open_inside(bundle.path, path) as file:
        size = int.from_bytes(file.read(8), "little")
    if size > LARGEST_HEADER:  # the library allows 100 MB of JSON
        raise BundleError(f"{path} lists too many tensors; the bundle is damaged, export it again")
    try:
        reader = safe_open(path, "np")
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path} can't be read: {printable(error)}") from None
    _check(path, reader, TABLE, [info.vocab, info.hidden_size], (*FLOATS, "I8"))
    if reader.get_slice(TABLE).get_dtype() == "I8":
        _check(path, reader, SCALES, [info.vocab], FLOATS)
    if newline:
        _check(path, reader, NEWLINE, [info.hidden_size], FLOATS)
    return reader


def _check(path: Path, reader: Any, name: str, shape: list[int], types: tuple[str, ...]) -> None:
    """Compare a tensor's header with the manifest. Raises BundleError."""
    damaged = "the bundle is damaged, export it again"
    if name not in reader.keys():  # noqa: SIM118  (not a dict)
        raise BundleError(f"{path} has no {name}; {damaged}")
    found = reader.get_slice(name)
    if found.get_shape() != shape or found.get_dtype() not in types:
        raise BundleError(
            f"{path}: {name} is {found.get_dtype()} {found.get_shape()}, the manifest promises "
            f"{' or '.join(types)} {shape}; {damaged}"
        )

"""Write embed_tokens.safetensors: token embeddings and image_newline.

The runtime memory-maps this file and reads single rows; no graph holds the embeddings.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ppllava_edge.export.quantisation.precision import Precision
from ppllava_edge.export.quantisation.rounding import round_int8
from ppllava_edge.export.sources.source import Source

EMBEDDINGS = "embed_tokens.safetensors"


def write_embeddings(model: Source, precision: Precision, folder: Path) -> int:
    """Write a model's embeddings; INT8 ones have a float16 scale per token.

    Args:
        model: The model.
        precision: Precision of every part; only "embeddings" is used.
        folder: The bundle's staging folder.

    Returns:
        The number of values, scales not counted.

    Raises:
        OSError: The disk is full.
    """
    kind = precision.parts["embeddings"]
    table, newline = model.embeddings()
    dtype = "float32" if kind == "fp32" else "float16"
    arrays = {"image_newline": newline.load().astype(dtype, copy=False)}
    if kind == "int8":
        rounded = round_int8(table.load().T, "float16")
        arrays["embed_tokens"] = rounded.values.T
        arrays["embed_tokens.scale"] = rounded.scales
    else:
        arrays["embed_tokens"] = table.load().astype(dtype, copy=False)
    path = folder / EMBEDDINGS
    try:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device") from None
        raise
    os.chmod(path, 0o644)
    return table.count + newline.count

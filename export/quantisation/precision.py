"""The precision of every part of a model: what --precision says, and the types that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

from ppllava_edge.engines.errors import PPLLaVAError

PARTS = ("vision", "question", "projector", "decoder", "embeddings", "kv")
ALLOWED = {
    "vision": ("fp32", "fp16", "int8"),
    "question": ("fp32", "fp16", "int8"),
    "projector": ("fp32", "fp16", "int8"),
    "decoder": ("fp32", "fp16", "int8", "int4"),
    "embeddings": ("fp32", "fp16", "int8"),
    "kv": ("fp32", "fp16", "int8"),
}
# An INT8 KV cache saves memory and is slower on CPUs, so no preset has one.
PRESETS = {
    "fp32": dict.fromkeys(PARTS, "fp32"),
    "fp16": dict.fromkeys(PARTS, "fp16"),
    "int8": {**dict.fromkeys(PARTS, "int8"), "kv": "fp16"},
    "int4": {**dict.fromkeys(PARTS, "int8"), "decoder": "int4", "kv": "fp16"},
}
STAGE_PART = {
    "trunk": "vision",
    "temporal": "vision",
    "question": "question",
    "similarity": "similarity",
    "pooling": "projector",
    "decoder": "decoder",
}


@dataclass(frozen=True)
class Precision:
    """A precision for every part.

    Attributes:
        parts: One of ALLOWED for each of PARTS.
    """

    parts: dict[str, str]

    def of_stage(self, stage: str) -> str:
        """Return fp32, fp16, int8 or int4; similarity is always fp32."""
        return self.parts.get(STAGE_PART[stage], "fp32")

    def float_type(self, stage: str) -> str:
        """Return the numpy type of a stage's floating-point computation."""
        return "float32" if self.of_stage(stage) == "fp32" else "float16"

    def integer(self, stage: str) -> str | None:
        """Return int8 or int4, or None for a stage that isn't quantised."""
        precision = self.of_stage(stage)
        return precision if precision.startswith("int") else None

    @property
    def quantized(self) -> bool:
        """Whether any stage, or the KV cache, is quantised."""
        return self.parts["kv"] == "int8" or any(self.integer(stage) for stage in STAGE_PART)


def parse_precision(text: str) -> Precision:
    """Parse --precision: a preset, parts, or a preset with changed parts.

    Args:
        text: Like "int8", "fp16,decoder=int4" or "vision=int8,kv=int8". Parts that are not named are fp16.

    Raises:
        PPLLaVAError: A part or precision is unknown, or the KV cache doesn't fit the decoder's type.
    """
    parts = dict(PRESETS["fp16"])
    for piece in text.split(","):
        parts.update(_parse_piece(text, piece.strip(), parts["kv"]))
    floating = "fp32" if parts["decoder"] == "fp32" else "fp16"
    if parts["kv"] not in ("int8", floating):
        raise PPLLaVAError(
            f"--precision {text}: the cache of a decoder that computes in {floating} is {floating} or int8"
        )
    return Precision(parts)


def _parse_piece(text: str, piece: str, kv: str) -> dict[str, str]:
    """The parts that one comma-separated piece sets. kv: the cache's precision so far."""
    part, equals, value = piece.rpartition("=")
    if not equals:
        if value not in PRESETS:
            raise PPLLaVAError(f"--precision {text}: {value!r} is unknown; choose {', '.join(PRESETS)}")
        return PRESETS[value]
    if part not in PARTS:
        raise PPLLaVAError(f"--precision {text}: there is no part {part!r}; the parts are {', '.join(PARTS)}")
    if value not in ALLOWED[part]:
        choices = ", ".join(ALLOWED[part])
        raise PPLLaVAError(f"--precision {text}: {value!r} is unknown; {part} can be {choices}")
    if part != "decoder":
        return {part: value}
    if value == "fp32":
        return {"decoder": "fp32", "kv": "fp32"}
    return {"decoder": value, "kv": "int8" if kv == "int8" else "fp16"}

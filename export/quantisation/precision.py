"""Precision, part by part: what --precision says, and what it means for floating types and quantisation."""

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
PRESETS = {
    "fp32": dict.fromkeys(PARTS, "fp32"),
    "fp16": dict.fromkeys(PARTS, "fp16"),
    "int8": {
        **dict.fromkeys(PARTS, "int8"),
        "kv": "fp16",
    },  # an INT8 cache saves memory and is slower on CPUs: in no preset
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
    """A precision for every part."""

    parts: dict[str, str]

    def of_stage(self, stage: str) -> str:
        """fp32, fp16, int8 or int4; similarity is always fp32."""
        return self.parts.get(STAGE_PART[stage], "fp32")

    def float_type(self, stage: str) -> str:
        """The numpy type in which a stage computes what isn't quantised."""
        return "float32" if self.of_stage(stage) == "fp32" else "float16"

    def integer(self, stage: str) -> str | None:
        """int8, int4, or None for a stage that isn't quantised."""
        precision = self.of_stage(stage)
        return precision if precision.startswith("int") else None

    @property
    def quantized(self) -> bool:
        """Whether any stage is, or the cache."""
        return self.parts["kv"] == "int8" or any(self.integer(stage) for stage in STAGE_PART)


def parse_precision(text: str) -> Precision:
    """ "int8", "fp16,decoder=int4" or "vision=int8,kv=int8" (the rest fp16) → a precision for every part. Raises PPLLaVAError."""
    chosen, known = dict(PRESETS["fp16"]), ", ".join(PRESETS)
    for piece in text.split(","):
        part, equals, value = piece.strip().rpartition("=")
        if equals and part not in PARTS:
            raise PPLLaVAError(
                f"--precision {text}: there is no part {part!r}; the parts are {', '.join(PARTS)}"
            )
        if value not in (ALLOWED[part] if equals else PRESETS):
            choices = f"{part} can be {', '.join(ALLOWED[part])}" if equals else f"choose {known}"
            raise PPLLaVAError(f"--precision {text}: {value!r} is unknown; {choices}")
        chosen.update({part: value} if equals else PRESETS[value])
        if equals and part == "decoder":
            chosen["kv"] = "fp32" if value == "fp32" else "int8" if chosen["kv"] == "int8" else "fp16"
    floating = "fp32" if chosen["decoder"] == "fp32" else "fp16"
    if chosen["kv"] not in ("int8", floating):
        raise PPLLaVAError(
            f"--precision {text}: the cache of a decoder that computes in {floating} is {floating} or int8"
        )
    return Precision(chosen)

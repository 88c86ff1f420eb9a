"""The options of an export."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ppllava_edge.export.config.model import Overrides
from ppllava_edge.export.quantisation.precision import Precision


@dataclass
class Options:
    """The options of one export.

    Attributes:
        checkpoint: A directory, or a hub id like "owner/name"; or a bundle in fp16 or fp32.
        output: Directory of the bundle to write.
        precision: A precision for every part of the model.
        overrides: Settings that replace those of the checkpoint.
        subfolder: Where the checkpoint is inside its directory or repository.
        clip: Directory or hub id of the question tower; None: as the checkpoint says.
        base: Directory or hub id of the decoder's tokenizer; None: as the checkpoint says.
        tokenizer: Whether to write tokenizers.
        force: Whether to replace an existing bundle.
        block: Rows per INT4 scale.
        engine: Whether to write engines/cpu too; None: if anything is quantised.
    """

    checkpoint: str
    output: Path
    precision: Precision
    overrides: Overrides = field(default_factory=Overrides)
    subfolder: str = ""
    clip: str | None = None
    base: str | None = None
    tokenizer: bool = True
    force: bool = False
    block: int = 32
    engine: bool | None = None

    @property
    def writes_cpu_engine(self) -> bool:
        """Whether engines/cpu is part of the bundle."""
        return self.precision.quantized if self.engine is None else self.engine

"""Where a bundle's two tokenizers come from, and how they are made ready for the runtime."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from ppllava_edge.engines.bundle.prompt_template import IMAGE
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.export.checkpoint import locate

_PATTERNS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "config.json",
    "spiece.model",
)


def find_tokenizer(folders: list[Path], told: str | None, option: str, what: str) -> Path:
    """The first of these folders (or the one that was told) that holds a tokenizer. Raises PPLLaVAError naming the option."""
    if told:
        folders = [locate(told, patterns=_PATTERNS)]
    for folder in folders:
        if (folder / "tokenizer.json").is_file() or _slow_files(folder):
            return folder
    looked = ", ".join(str(f) for f in folders) or "nowhere"
    raise PPLLaVAError(
        f"no tokenizer for the {what} (looked in {looked}); name its directory with {option}, or export ids only with --no-tokenizer"
    )


def load_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json as it is; older formats are converted by transformers if it is installed."""
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise PPLLaVAError(
                f"{path} is not a tokenizer that this version of tokenizers reads: {error}"
            ) from None
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise PPLLaVAError(
            f"{folder} has only {_slow_files(folder)[0]}, which transformers converts: pip install 'ppllava-edge[train]', or give a tokenizer.json"
        ) from None
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False).backend_tokenizer
    except Exception as error:
        raise PPLLaVAError(
            f"the tokenizer in {folder} can't be converted: {str(error).splitlines()[0][:200]}"
        ) from None


def language_tokenizer(folder: Path, image_token: int, vocab: int) -> Tokenizer:
    """The decoder's tokenizer, with <image> as one token of its own: the place where the visual tokens go."""
    tokenizer = load_tokenizer(folder)
    if tokenizer.token_to_id(IMAGE) is None:
        tokenizer.add_special_tokens([IMAGE])
    found = tokenizer.token_to_id(IMAGE)
    if (
        found is not None
        and found != image_token
        and found < vocab
        and tokenizer.id_to_token(image_token) not in (None, IMAGE)
    ):
        raise PPLLaVAError(
            f"the tokenizer in {folder} has {IMAGE} at {found}, the checkpoint's image_token_index is {image_token}: not its tokenizer"
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def question_tokenizer(folder: Path) -> Tokenizer:
    """The question tower's tokenizer; padding and truncation are the runtime's business."""
    tokenizer = load_tokenizer(folder)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _slow_files(folder: Path) -> list[str]:
    return [name for name in ("tokenizer.model", "spiece.model", "vocab.json") if (folder / name).is_file()]

"""Find a bundle's two tokenizers and prepare them for the runtime."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from ppllava_edge.engines.bundle.prompt_template import IMAGE
from ppllava_edge.engines.bundle.untrusted import printable
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.export.sources.locate import locate

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
_SLOW_FILES = ("tokenizer.model", "spiece.model", "vocab.json")


def find_tokenizer(folders: list[Path], override: str | None, option: str, part: str) -> Path:
    """Return the first folder that holds a tokenizer.

    Args:
        folders: Where to search.
        override: A directory or hub id to search instead, or None.
        option: The command-line option that sets `override`, for the error.
        part: The part of the model that needs the tokenizer, for the error.

    Raises:
        PPLLaVAError: No folder holds one.
    """
    if override:
        folders = [locate(override, patterns=_PATTERNS)]
    for folder in folders:
        if (folder / "tokenizer.json").is_file() or _slow_files(folder):
            return folder
    searched = ", ".join(str(f) for f in folders) or "nowhere"
    raise PPLLaVAError(
        f"no tokenizer for the {part} (searched {searched}); "
        f"name its directory with {option}, or export ids only with --no-tokenizer"
    )


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load tokenizer.json; older formats are converted by transformers if it is installed.

    Raises:
        PPLLaVAError: The tokenizer can't be read or converted.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return _convert_slow_tokenizer(folder)
    try:
        return Tokenizer.from_file(str(path))
    except BaseException as error:  # bare Exception, and PanicException, which is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise PPLLaVAError(
            f"{path} is not a tokenizer that this version of tokenizers reads: {printable(error)}"
        ) from None


def language_tokenizer(folder: Path, image_token: int, vocab: int) -> Tokenizer:
    """Load the decoder's tokenizer, with <image> as one token: the placeholder of the visual tokens.

    Args:
        folder: Directory of the tokenizer.
        image_token: Id of the image token in the checkpoint's configuration.
        vocab: Size of the embedding table.

    Raises:
        PPLLaVAError: The tokenizer can't be read, or belongs to another model.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer.token_to_id(IMAGE) is None:
        tokenizer.add_special_tokens([IMAGE])
    image_id = tokenizer.token_to_id(IMAGE)
    other_text = tokenizer.id_to_token(image_token) not in (None, IMAGE)
    if image_id is not None and image_id != image_token and image_id < vocab and other_text:
        raise PPLLaVAError(
            f"the tokenizer in {folder} has {IMAGE} at {image_id}, the checkpoint's image_token_index is "
            f"{image_token}: not its tokenizer"
        )
    return _without_padding(tokenizer)


def question_tokenizer(folder: Path) -> Tokenizer:
    """Load the question tower's tokenizer.

    Raises:
        PPLLaVAError: The tokenizer can't be read.
    """
    return _without_padding(load_tokenizer(folder))


def _without_padding(tokenizer: Tokenizer) -> Tokenizer:
    """Switch padding and truncation off: the runtime does both itself."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _convert_slow_tokenizer(folder: Path) -> Tokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise PPLLaVAError(
            f"{folder} has only {_slow_files(folder)[0]}, which transformers converts: "
            "pip install 'ppllava-edge[train]', or give a tokenizer.json"
        ) from None
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False).backend_tokenizer
    except Exception as error:  # transformers raises many kinds
        reason = printable(str(error).strip().partition("\n")[0] or type(error).__name__)
        raise PPLLaVAError(f"the tokenizer in {folder} can't be converted: {reason}") from None


def _slow_files(folder: Path) -> list[str]:
    return [name for name in _SLOW_FILES if (folder / name).is_file()]

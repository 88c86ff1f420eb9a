"""The directory of a new bundle: checked first, built in a staging folder, and renamed when complete."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from ppllava_edge.engines.bundle.manifest_parser import is_bundle
from ppllava_edge.engines.errors import PPLLaVAError
from ppllava_edge.engines.staging import publish, staging_folder
from ppllava_edge.export.options import Options

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def check_output(options: Options) -> Path:
    """Return the bundle's absolute path.

    Raises:
        PPLLaVAError: The path holds something that must not be replaced.
    """
    output = Path(os.path.abspath(options.output))
    if output.exists() and not options.force:
        raise PPLLaVAError(
            f"{options.output} exists already; name another directory, or replace it with --force"
        )
    _check_replaceable(output)
    return output


@contextlib.contextmanager
def bundle_staging(output: Path) -> Iterator[Path]:
    """Create a staging folder beside the output, which is removed on any failure or interrupt.

    Raises:
        PPLLaVAError: The folder can't be created, or the disk is full.
    """
    with contextlib.ExitStack() as stack:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            staging = stack.enter_context(staging_folder(output))
        except OSError as error:
            raise PPLLaVAError(f"can't write beside {output}: {error.strerror}") from None
        try:
            yield staging
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise PPLLaVAError(
                f"the disk that holds {output.parent} is full; nothing was left behind"
            ) from None


def move_into_place(staging: Path, output: Path, force: bool) -> None:
    """Rename a complete bundle to its final path, or exchange it with the bundle that is there.

    Args:
        staging: The complete bundle.
        output: The final path.
        force: Whether to replace an existing bundle.

    Raises:
        PPLLaVAError: The path holds something other than a bundle.
    """

    def check() -> None:
        if os.path.lexists(output) and not force:
            raise PPLLaVAError(f"{output} was written by another command meanwhile; --force replaces it")
        _check_replaceable(output)

    publish(staging, output, check)


def _check_replaceable(output: Path) -> None:
    """Raise PPLLaVAError unless the path is free, an empty folder, or a bundle, damaged or not."""
    if not os.path.lexists(output):
        return
    is_folder = not output.is_symlink() and output.is_dir()
    if not is_folder or (any(output.iterdir()) and not is_bundle(output)):
        raise PPLLaVAError(f"{output} is not a bundle; --force replaces only bundles")

"""Staging folders: a command's output is written beside its target and renamed when complete.

A staging folder is locked (flock) by the process that writes it. The lock ends with the process, even when
the process is killed, so a folder that can be locked was abandoned, and the next command removes it. The name
carries the host: some network file systems keep locks per host, so folders of other hosts are left alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import click

try:
    import fcntl
except ImportError:  # not on Windows: staging folders are not locked there, and never swept
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".part"
REPLACED = ".replaced"  # in a staging folder: the target's old folder, while the new one takes its name
MAX_NAME = 64  # characters of the target's name in the folder's: file names end at 255
MACHINE_ID = Path("/etc/machine-id")
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's renameat2
CANT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)  # an old kernel, or a file system without it


@contextlib.contextmanager
def staging_folder(target: Path, note: Callable[[str], None] | None = None) -> Iterator[Path]:
    """Create a locked folder beside a target, and remove it at the end unless it was renamed.

    Folders that killed commands left beside the target are removed first.

    Args:
        target: The path that the folder will be renamed to. Its parent must exist.
        note: Called with one line if abandoned folders were removed. The default prints it to stderr.

    Yields:
        The folder, with permissions for its owner only.

    Raises:
        OSError: The folder can't be created.
    """
    removed = sweep(target.parent)
    if removed:
        (note or _print_note)(
            f"removed unfinished folders of killed commands from {target.parent}: {', '.join(removed)}"
        )
    folder, lock = _create_locked(target)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def sweep(parent: Path) -> list[str]:
    """Remove the staging folders in `parent` whose process on this host is gone.

    Folders of running processes and of other hosts stay, and so do those that can't be removed.

    Args:
        parent: The folder that holds the targets.

    Returns:
        The names of the removed folders, sorted.
    """
    removed: list[str] = []
    if fcntl is None:
        return removed
    for folder in sorted(parent.glob(f".*.{_host_mark()}-*{SUFFIX}")):
        with contextlib.suppress(OSError):
            lock = _lock(folder, wait=False)
            try:
                _put_back(folder)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
            if not folder.exists():
                removed.append(folder.name)
    return removed


def publish(folder: Path, target: Path, check: Callable[[], None] | None = None) -> None:
    """Rename a complete staging folder to its target, or exchange it with the folder that is there.

    After a kill the target is the old folder or the new one, as a whole. After a power cut too: files and
    names are synced to disk first. Only where folders can't be exchanged (not Linux, some network file
    systems) the target is missing for a moment; after a kill in that moment, sweep puts the old folder back.

    Args:
        folder: The folder of `staging_folder`. If it was exchanged, it holds the old files afterwards.
        target: The final path: nothing, a folder, or a link, which is replaced.
        check: Called after syncing, which may take minutes, and right before the renaming; may raise.

    Raises:
        OSError: It can't be renamed or synced, or the target is a file.
    """
    folder.chmod(0o755)
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)
    if check:
        check()
    if target.is_symlink():
        target.unlink()
    if not target.exists():
        folder.rename(target)
    elif not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
    elif not _exchange(folder, target):
        _replace(folder, target)
    sync_folder(target.parent)


def _replace(folder: Path, target: Path) -> None:
    """Rename a folder to one that exists, in two steps. After a kill between them, sweep puts it back."""
    aside, lock = _create_locked(target)
    try:
        (aside / REPLACED).mkdir()
        try:
            target.rename(aside / REPLACED / target.name)
            folder.rename(target)
        finally:
            _put_back(aside)
            shutil.rmtree(aside, ignore_errors=True)
    finally:
        if lock is not None:
            os.close(lock)


def _put_back(aside: Path) -> None:
    """Give the folder that _replace moved away its name again, unless something has that name."""
    for old in (aside / REPLACED).glob("*"):
        if not os.path.lexists(aside.parent / old.name):
            old.rename(aside.parent / old.name)


def sync_folder(folder: Path) -> None:
    """Sync a folder to disk, so that its new, renamed and removed names survive a power cut.

    File systems and systems that can't sync folders are left as they are.
    """
    with contextlib.suppress(OSError):
        _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders' names at once. Returns False where that isn't possible; raises OSError."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # glibc 2.28, musl 1.2.6
    if renameat2 is None:
        return False
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    if ctypes.get_errno() in CANT_EXCHANGE:
        return False
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))


def _prefix(target: Path) -> str:
    """The beginning of a staging folder's name."""
    return f".{target.name[:MAX_NAME]}.{_host_mark()}-"


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder that one process at a time may use.

    Raises:
        BlockingIOError: Another process holds it.
    """
    lock = None
    try:
        if fcntl is not None:
            lock = _lock(folder, wait=False)
    except BlockingIOError:
        raise
    except OSError:
        pass  # this file system can't lock folders
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _create_locked(target: Path) -> tuple[Path, int | None]:
    """A new staging folder and its open, locked descriptor; None where folders can't be locked."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_prefix(target), suffix=SUFFIX, dir=target.parent))
        if fcntl is None:
            return folder, None
        try:
            lock = _lock(folder, wait=True)
        except FileNotFoundError:  # another command swept it before it was locked
            continue
        except OSError:  # this file system can't lock folders, so no command may sweep it
            return folder, None
        if folder.exists():
            return folder, lock
        os.close(lock)


def _lock(folder: Path, wait: bool) -> int:
    """Lock a folder; OSError if another process holds the lock, or it isn't a folder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _host_mark() -> str:
    """The part of a folder's name that identifies this host."""
    identity = platform.node()  # not unique by itself, and some containers have no machine id
    with contextlib.suppress(OSError):
        identity += MACHINE_ID.read_text()
    return f"ppllava-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def _print_note(text: str) -> None:
    click.echo(f"note: {text}", err=True)

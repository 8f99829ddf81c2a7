"""Files that are complete or absent, whatever happens to the process or the machine. All writing goes through here.

A folder is written under a temporary name beside its own, everything in it is forced to the disk, and it is renamed;
a file likewise. What a killed process leaves behind has ``TEMPORARY`` in its name and is never taken for data.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

TEMPORARY = ".tmp-"


class FileDigest(NamedTuple):
    """What identifies a file's contents."""

    bytes: int
    sha256: str


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileDigest:
    """Write a new file, force it to the disk, and return its size and digest, computed on the way.

    SHA-256 because it also tells a file that somebody changed on purpose; processors that compute it in hardware do
    so faster than most disks write (docs/reliability.md).
    """
    digest, size = hashlib.sha256(), 0
    try:
        with open(path, "wb", buffering=0) as file:
            for chunk in chunks:
                _write_all(file, memoryview(chunk))
                digest.update(chunk)
                size += len(chunk)
            _force_to_disk(file.fileno())
    except OSError as error:
        if error.errno and not error.filename:  # a full disk does not say where
            error.filename = str(path)
        raise
    return FileDigest(size, digest.hexdigest())


def _write_all(file: io.FileIO, rest: memoryview) -> None:
    while rest:
        rest = rest[file.write(rest) :]


def read_digest(path: Path) -> FileDigest:
    """Return the size and digest of a file that is there."""
    with open(path, "rb") as file:
        return FileDigest(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file, or all of it anew: a reader sees the old contents or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mktemp(prefix=path.name + TEMPORARY, dir=path.parent))
    try:
        write_file(temporary, [content.encode("utf-8") if isinstance(content, str) else content])
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def complete_folder(folder: Path, replace: bool = False) -> Iterator[Path]:
    """Give a temporary folder that becomes ``folder`` at the end of the block, and nothing where the block fails.

    What is written inside must be written by ``write_file``.

    Args:
        folder: where it will be; its parents are made.
        replace: delete what is there under that name at the end; otherwise only an empty folder is replaced.

    Raises:
        OSError: where it cannot be written, or is there already and may not be replaced.
    """
    parent = folder.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=folder.name + TEMPORARY, dir=parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp's is for the owner only
        sync_folder(temporary)
        if replace:
            delete_folder(folder)
        elif folder.exists():
            folder.rmdir()  # fails where it is not empty
        os.rename(temporary, folder)
        sync_folder(parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def filled_folder(folder: Path) -> Iterator[Path]:
    """Do the same for a folder that is there and empty, and that may be a mount, a link or the working directory.

    It is filled from a temporary folder inside it. A process killed while the files are moved leaves some of them.

    Raises:
        OSError: where the folder is not empty or cannot be written.
    """
    if any(folder.iterdir()):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(folder))
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder))
    try:
        yield temporary
        for path in sorted(temporary.iterdir()):
            os.rename(path, folder / path.name)
        sync_folder(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def delete_folder(folder: Path) -> None:
    """Delete a folder such that, killed at any instant, it is whole or not found under its name."""
    doomed = Path(tempfile.mktemp(prefix=folder.name + TEMPORARY, dir=folder.absolute().parent))
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def delete_leftovers(parent: Path, prefix: str) -> None:
    """Delete what killed processes left of files and folders whose names begin with ``prefix``.

    Only for a parent that no other process is writing to: hold a lock.
    """
    for path in parent.glob(f"{prefix}*{TEMPORARY}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk; a file of its own is not yet there when only the file is."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            _force_to_disk(descriptor)
        finally:
            os.close(descriptor)


def _force_to_disk(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

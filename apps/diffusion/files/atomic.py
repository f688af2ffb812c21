"""Atomic writing of files and folders, and a lock on a folder.

A file is written into a temporary folder beside its destination, flushed to the disk and renamed. A reader therefore
finds the old or the new content, never a part of it, and several processes may write the same file. A failure to write
is an OSError, also where safetensors or torch.save raise errors of their own classes.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

PARTIAL = ".partial"  # suffix of the temporary folders
LOCK = ".lock"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path, at which the block writes a file or makes a folder. If the block ends without an error, the
    file or folder is renamed to `path`; otherwise it is deleted.

    Raises:
        OSError: the file cannot be written; an earlier file at `path` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent, ignore_cleanup_errors=True
    ) as folder:
        partial = Path(folder) / path.name
        try:
            yield partial
            written = [partial, *partial.rglob("*")]
            weights = [file for file in written if file.suffix == ".safetensors"]
            if weights:
                _set_permissions(weights, Path(folder) / ".new")
            for file in written:
                flush(file)
            os.replace(partial, path)
        except Exception as error:
            _raise_as_os_error(error, path)
            raise


def _set_permissions(files: list[Path], new: Path) -> None:
    """Gives files the permissions of the new file `new`; safetensors makes files that only their owner may read.

    The umask, from which the permissions follow, can only be read by changing it for all threads.
    """
    new.touch()
    for file in files:
        shutil.copymode(new, file)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic_path(path) as partial:
        partial.write_text(text)


def remove_partial(folder: Path) -> None:
    """Deletes temporary folders that killed processes left in `folder`, into which no other process may be writing."""
    for left_over in folder.glob(f".*{PARTIAL}"):
        shutil.rmtree(left_over, ignore_errors=True)


def flush(path: Path) -> None:
    """Writes the system's buffers of a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder. The folder is made, and removed again if nothing was written into it.

    Raises:
        ValueError: another process holds the lock, or the folder cannot be made or written to.
        OSError: the disk is full or fails.
    """
    if os.path.exists(folder) and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; give a folder.")
    # os.path.exists, unlike Path.exists, is false for a name that is too long
    made = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    make_folder(folder)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        _acquire(lock, folder)
        try:
            yield
        finally:
            # after locking, filelock checks that the file still exists, so two processes cannot both hold the lock
            (folder / LOCK).unlink(missing_ok=True)
            lock.release()
    finally:
        for path in made:
            with suppress(OSError):  # not empty
                path.rmdir()


def _acquire(lock: FileLock, folder: Path) -> None:
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"Another process is training into {folder}; wait until it ends, or give another folder with --out."
        ) from None
    except OSError as error:
        remedy = "make it writable, or give another folder with --out; a copy of a run can be resumed"
        raise _other_place(error, f"{folder} cannot be written to", remedy) from None


def _raise_as_os_error(error: Exception, path: Path) -> None:
    """Raises OSError if `error` is the error of a failed write by safetensors or torch.save."""
    from safetensors import SafetensorError

    of_torch = isinstance(error, RuntimeError) and any(
        w in str(error) for w in ("StreamWriter", "inline_container", "iostream")
    )
    if isinstance(error, SafetensorError) or of_torch:
        raise OSError(f"{path} could not be written ({str(error).splitlines()[0]})") from None


def make_folder(folder: Path) -> None:
    """Makes a folder for the output of a command.

    Raises:
        ValueError: the folder cannot be there: a file is in its place, the permission is missing, the file system is
            read-only, or the name is too long.
        OSError: the disk is full or fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _other_place(error, f"{folder} cannot be made", "give another folder with --out") from None


def _other_place(error: OSError, what: str, remedy: str) -> Exception:
    """`error` if the disk is full or fails, else a ValueError that names the reason and the remedy."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        return error
    return ValueError(f"{what} ({error.strerror}); {remedy}.")

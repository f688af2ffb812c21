"""One process at a time in a folder: a lock that ends with its holder, however that ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within the block no other `alone` of this folder begins. The folder is made, and unmade if it stays empty.

    The folder itself is locked (flock), so nothing is left in it. File systems that cannot lock folders give no
    protection.

    Raises:
        ValueError: another process is in the folder, or it is a file.
        OSError: it cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; give a folder.")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, folder)
        yield
    finally:
        for path in made:
            with suppress(OSError):  # it is not empty
                path.rmdir()
        os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"Another process is training into {folder}; wait until it ends, or give another folder with --out."
        ) from None
    except OSError:
        return  # some network file systems lock no folders

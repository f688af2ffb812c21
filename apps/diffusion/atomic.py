"""Files and folders that are written whole or not at all.

Each is written under a name of its own, so that several processes may write the same one, and renamed when it
is complete.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def file_at_once(path: Path) -> Iterator[Path]:
    """A name to write a file under; it becomes `path` when the block ends well, and vanishes otherwise."""
    partial = _partial(path)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def folder_at_once(path: Path) -> Iterator[Path]:
    """A folder to write into; it becomes `path`, which may be an empty folder by then, when the block ends
    well, and vanishes otherwise.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    partial.mkdir()
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")

"""A folder of images: the list of its files and classes, and a dataset of the images.

The classes are the subfolders in alphabetical order, also those without images. Images in a deeper folder belong to the
class of the subfolder. Images in the folder itself have no class. Images are numbered in the sorted list of files.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from apps.diffusion.data import preprocessing
from apps.diffusion.data.dataset import Key, augmentation_generator, index_and_epoch
from apps.diffusion.data.preprocessing import Size, Unusable, height_width, minimal_side
from apps.diffusion.files import hashing
from apps.diffusion.files.names import first_names, printable

Classes = Literal["folders", "none"]
T = TypeVar("T")
# folders of operating systems and archives, with copies or descriptions of images
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


class Skipped(NamedTuple):
    """An image that is skipped: its path below the folder, and the reason."""

    file: str
    reason: str


@cache
def suffixes() -> frozenset[str]:
    """The suffixes of all formats that the installed Pillow reads, in lower case."""
    Image.init()
    read = {*Image.OPEN, "MPO"}  # Pillow opens MPO files as JPEG
    return frozenset(suffix for suffix, kind in Image.EXTENSION.items() if kind in read)


@dataclass(frozen=True)
class Listing:
    """The image files below `root`.

    Attributes:
        root: the folder.
        files: sorted paths of the images below `root`, with "/" between folders.
        labels: class of each image; zeros without classes.
        classes: names of the classes; empty without classes.
        others: paths below `root` of files whose suffix is of no image format.
        loops: paths below `root` of links to a folder that contains the link; these links are not followed.
    """

    root: Path
    files: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    others: tuple[str, ...] = ()
    loops: tuple[str, ...] = ()

    def digest(self) -> str:
        """SHA-256 of the paths and labels."""
        pairs = zip(self.files, self.labels, strict=True)
        return hashing.of_parts(["\n".join(f"{label} {file}" for file, label in pairs)])

    def remarks(self) -> list[str]:
        """Sentences about skipped files and links, classes without images, and classes named like splits (train)."""
        lines = []
        if self.others:
            kinds = Counter(Path(file).suffix.lower() or "no suffix" for file in self.others)
            counts = ", ".join(f"{count} with {kind}" for kind, count in kinds.most_common(8))
            more = f" and {len(kinds) - 8} more suffixes" if len(kinds) > 8 else ""
            lines.append(
                f"{len(self.others)} files are of no image format: {counts}{more}, such as {printable(self.others[0])}."
            )
        if self.loops:
            lines.append(f"{len(self.loops)} links to a folder above them are not followed: {first_names(self.loops)}.")
        empty = [name for i, name in enumerate(self.classes) if i not in set(self.labels)]
        if empty:
            lines.append(f"{len(empty)} classes have no image and keep their numbers: {first_names(empty)}.")
        if self.classes and {name.lower() for name in self.classes} <= SPLITS:
            train = [name for name in self.classes if name.lower().startswith("train")]
            inner = printable(self.root / (train or self.classes)[0])
            lines.append(
                f"The names of the classes, {first_names(self.classes, 9)}, are names of splits; give {inner} if its "
                "subfolders are the classes."
            )
        return lines


def listing(root: Path, classes: Classes = "folders") -> Listing:
    """The image files below `root`; links are followed, and hidden files, hidden folders and `SYSTEM_FOLDERS` left out.

    Args:
        root: a folder.
        classes: "folders": each subfolder is a class, and images in `root` itself have no class; "none": no classes.

    Raises:
        ValueError: the folder does not exist, or holds no images, or images both inside and outside of subfolders.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; give a folder of images.")
    found: list[str] = []
    loops: list[str] = []
    for folder, names in _walk(root, loops):
        below = folder.relative_to(root)
        found += [(below / name).as_posix() for name in names if not name.startswith(".")]
    known = suffixes()
    files = sorted(f for f in found if Path(f).suffix.lower() in known)
    others = sorted(f for f in found if Path(f).suffix.lower() not in known)
    if not files:
        kinds = ", ".join(sorted({Path(f).suffix.lower() or "no suffix" for f in others})[:8])
        held = f"; its {len(others)} files have {kinds}" if others else ""
        raise ValueError(f"{root} holds no images in a format that Pillow reads{held}; give a folder of images.")
    rest = (tuple(others), tuple(sorted(loops)))
    inside = [file for file in files if "/" in file]
    if classes == "none" or not inside:
        return Listing(root, tuple(files), (0,) * len(files), (), *rest)
    if len(inside) < len(files):
        loose = next(file for file in files if "/" not in file)
        raise ValueError(
            f"{root} holds images in subfolders, which are classes, and images without a class, such as "
            f"{printable(loose)}; move the latter into subfolders, or ignore classes (--data.unconditional in train, "
            "--classes none in encode)."
        )
    left_out = SYSTEM_FOLDERS.union(loop for loop in loops if "/" not in loop)
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] != "." and p.name not in left_out)
    number = {name: i for i, name in enumerate(names)}
    return Listing(root, tuple(files), tuple(number[file.split("/", 1)[0]] for file in files), tuple(names), *rest)


def _walk(root: Path, loops: list[str]) -> Iterator[tuple[Path, list[str]]]:
    """Yields each folder below `root` with the names of its files. Links to folders are followed, except a link to a
    folder that contains the link, on the disk or through links followed before; such a link is added to `loops`.
    """
    pending = [(root, frozenset([os.path.realpath(root)]))]
    while pending:
        folder, above = pending.pop()
        here = Path(os.path.realpath(folder))
        names = []
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if not _is_folder(entry):
                names.append(entry.name)
                continue
            target = os.path.realpath(entry.path)
            if target in above or Path(target) in here.parents:
                loops.append((folder.relative_to(root) / entry.name).as_posix())
            elif not entry.name.startswith(".") and entry.name not in SYSTEM_FOLDERS:
                pending.append((folder / entry.name, above | {target}))
        yield folder, names


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to a folder; false for links that form a cycle."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def attempt(listed: Listing, size: Size, least: int, i: int, channels: int = 3) -> np.ndarray | Skipped:
    """The i-th image as (channels, height, width) uint8, or a `Skipped` with the reason why it is unusable."""
    try:
        return preprocessing.read(listed.root / listed.files[i], size, least, channels)
    except Unusable as reason:
        return Skipped(listed.files[i], str(reason))


class ImageFolderDataset:
    """A folder of images as a dataset: `dataset[i] -> (x, label)`, x (C, H, W) float32 in [-1, 1].

    The constructor decodes every file once, and skips damaged files. If the decoded images take at most `memory` bytes,
    they are kept; otherwise a file is read again at every access, so that the folder may be larger than the memory.

    Args:
        path: a folder of images.
        size: side in pixels, or (height, width).
        mirror: whether an image is mirrored in a random half of the epochs (see dataset.py).
        classes: "folders": the subfolders are the classes; "none": there are no classes.
        channels: 1 (gray) or 3 (RGB); None: 1 if all images are gray, else 3.
        least: smallest side in pixels; smaller images are skipped. None: a quarter of `size`.
        seed: random seed of the mirroring.
        memory: largest size in bytes of decoded images that are kept.
        progress: called as progress(done, total) while files are read; None: no progress is reported.

    Attributes:
        files: the path of each image below the folder.
        y: (n,) labels.
        classes: names of the classes.
        skipped: the skipped images.
        listed: all image files, skipped ones included.

    Raises:
        ValueError: the folder does not exist, no image is usable, a size is below 1, or `channels` is not 1 or 3.
    """

    def __init__(
        self,
        path: Path | str,
        size: Size,
        *,
        mirror: bool = False,
        classes: Classes = "folders",
        channels: int | None = None,
        least: int | None = None,
        seed: int = 0,
        memory: int = 2**30,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        height, width = height_width(size)
        if channels not in (None, 1, 3):
            raise ValueError(f"channels={channels} must be 1 or 3; leave it out to take the channels of the files.")
        self.listed = listing(Path(path), classes)
        self.size, self.mirror, self.seed = (height, width), mirror, seed
        self.least = minimal_side(size) if least is None else least
        total = len(self.listed.files)
        heads = list(_parallel(self._header, range(total)))
        gray = all(head == 1 for head in heads if not isinstance(head, Skipped))
        self._channels = channels or (1 if gray else 3)
        self._pixels: np.ndarray | None = None
        if total * self._channels * height * width <= memory:
            self._pixels = np.empty((total, *self.shape), dtype=np.uint8)
        kept, skipped = self._decode(heads, progress)
        if not kept:
            raise ValueError(
                f"None of the {total} images below {path} can be used; reason for the first image: {skipped[0].reason}"
            )
        if self._pixels is not None:
            self._pixels = self._pixels[: len(kept)]
        self.files = tuple(self.listed.files[i] for i in kept)
        self.y = torch.tensor([self.listed.labels[i] for i in kept])
        self.classes, self.skipped = self.listed.classes, tuple(skipped)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without classes."""
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return (self._channels, *self.size)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        """The image and its label.

        Raises:
            ValueError: the file has been damaged or deleted since the dataset was made.
        """
        i, epoch = index_and_epoch(key)
        i = range(len(self))[i]
        x = torch.from_numpy(self._read(i)).float() / 127.5 - 1
        if self.mirror:
            own = augmentation_generator(self.seed, len(self), (i, epoch))
            x = x.flip(2) if torch.rand((), generator=own) < 0.5 else x
        return x, int(self.y[i])

    def fingerprint(self) -> str:
        """SHA-256 of the names and labels of the images."""
        return hashing.of_json([self.files, self.y.tolist()])

    def sizes_digest(self) -> str:
        """SHA-256 of the sizes of the image files in bytes, to detect images that are replaced under the same names.

        The contents are not read, and time stamps are ignored, since copying changes them. An image that is replaced by
        one of the same size is not detected.
        """
        paths = (self.listed.root / file for file in self.files)
        return hashing.of_json([path.stat().st_size if path.exists() else None for path in paths])

    def remarks(self) -> list[str]:
        """Sentences about skipped files and classes without images."""
        lines = self.listed.remarks()
        if self.skipped:
            lines.append(skipped_text(self.skipped, len(self.listed.files)))
            left = set(self.listed.labels) - set(self.y.tolist())
            lost = [name for i, name in enumerate(self.classes) if i in left]
            if lost:
                lines.append(f"{len(lost)} classes have no usable image and keep their numbers: {first_names(lost)}.")
        return lines

    def _read(self, i: int) -> np.ndarray:
        if self._pixels is not None:
            return self._pixels[i]
        file = self.listed.root / self.files[i]
        try:
            return preprocessing.read(file, self.size, self.least, self._channels)
        except Unusable as reason:
            raise ValueError(
                f"{printable(file)} could be read when the dataset was made, and now it is {reason}; delete or restore "
                "the file, and start again."
            ) from None

    def _header(self, i: int) -> int | Skipped:
        try:
            return preprocessing.header(self.listed.root / self.listed.files[i], self.least)
        except Unusable as reason:
            return Skipped(self.listed.files[i], str(reason))

    def _decode(
        self, heads: Sequence[int | Skipped], progress: Callable[[int, int], None] | None
    ) -> tuple[list[int], list[Skipped]]:
        """Decodes every file whose header could be read; returns the numbers of the usable images, and the others."""

        def one(i: int) -> np.ndarray | Skipped:
            head = heads[i]
            return head if isinstance(head, Skipped) else attempt(self.listed, self.size, self.least, i, self._channels)

        kept: list[int] = []
        skipped: list[Skipped] = []
        for i, found in enumerate(_parallel(one, range(len(heads)))):
            if isinstance(found, Skipped):
                skipped.append(found)
            else:
                if self._pixels is not None:
                    self._pixels[len(kept)] = found
                kept.append(i)
            if progress:
                progress(i + 1, len(heads))
        return kept, skipped


def _parallel(call: Callable[[int], T], numbers: Sequence[int], ahead: int = 1024) -> Iterable[T]:
    """Yields the results of `call` in order. Threads run at most `ahead` calls in advance; they run in parallel,
    because Pillow releases the interpreter's lock while it decodes.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(numbers), ahead):
            yield from pool.map(call, numbers[start : start + ahead])


def skipped_text(skipped: Sequence[Skipped], total: int) -> str:
    """A sentence with the number and names of the skipped images; empty if no image is skipped."""
    if not skipped:
        return ""
    named = "; ".join(f"{printable(file)} ({reason})" for file, reason in skipped[:20])
    more = f"; and {len(skipped) - 20} more" if len(skipped) > 20 else ""
    return f"{len(skipped)} of {total} images were skipped: {named}{more}."

"""IDX files: files written byte by byte after the definition of the format are read; damaged files raise."""

import gzip
import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from apps.diffusion import train
from apps.diffusion.config.training import DataConfig
from apps.diffusion.data import build as data
from apps.diffusion.data.idx import has_split, idx, read_idx

FASHION = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist is installed


def encoded(values, shape):
    return bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + bytes(values)


def write(root, prefix, count, *, compress, height=6, width=4):
    pixels = np.random.default_rng(len(prefix)).integers(0, 256, (count, height, width)).astype(np.uint8)
    pixels[0, 0, 0], pixels[0, 0, 1] = 0, 255
    labels = [i % 3 for i in range(count)]
    for name, content in (
        (f"{prefix}-images-idx3-ubyte", encoded(pixels.ravel().tolist(), pixels.shape)),
        (f"{prefix}-labels-idx1-ubyte", encoded(labels, (count,))),
    ):
        file = root / (name + ".gz" if compress else name)
        file.write_bytes(gzip.compress(content) if compress else content)
    return pixels, labels


@pytest.mark.parametrize("compress", [False, True])
def test_what_was_written_is_read(tmp_path, compress):
    pixels, labels = write(tmp_path, "train", 7, compress=compress)
    images = idx(tmp_path)
    assert (len(images), images.shape, images.num_classes) == (7, (1, 6, 4), 3)
    assert images.y.tolist() == labels
    assert torch.equal(images.x[:, 0], torch.from_numpy(pixels).float() / 127.5 - 1)
    assert images.x.min() == -1 and images.x.max() == 1
    assert not has_split(tmp_path, "held-out")
    write(tmp_path, "t10k", 5, compress=compress)
    assert has_split(tmp_path, "held-out") and len(idx(tmp_path, "held-out")) == 5


def test_the_source_idx_gives_the_splits_that_exist(tmp_path):
    write(tmp_path, "train", 7, compress=True)
    assert data.datasets(DataConfig(source="idx", path=tmp_path))[1] is None
    write(tmp_path, "t10k", 5, compress=False)
    train, held_out = data.datasets(DataConfig(source="idx", path=tmp_path, unconditional=True))
    assert held_out is not None and (len(train), len(held_out), train.num_classes) == (7, 5, 0)


def test_checksums_are_those_of_the_stored_files(tmp_path):
    write(tmp_path, "train", 7, compress=True)
    names = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
    right = tuple(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in names)
    assert len(idx(tmp_path, sha256=right)) == 7
    for wrong in (("0" * 64, right[1]), (right[0], "0" * 64)):
        with pytest.raises(ValueError, match="sha256"):
            idx(tmp_path, sha256=wrong)
    with pytest.raises(ValueError, match="sha256"):
        idx(tmp_path, sha256=right[:1])
    with pytest.raises(ValueError, match=r"sha256"):
        data.datasets(DataConfig(source="idx", path=tmp_path, sha256=("0" * 64, right[1])))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        bytes([0, 0, 8, 1]) + struct.pack(">I", 3) + b"abc",  # one dimension, not three
        bytes([0, 0, 13, 3]) + struct.pack(">3I", 1, 1, 1) + b"abcd",  # float32
        bytes([0, 0, 8, 3, 0, 0]),  # no sizes
        encoded([1] * 11, (2, 3, 2)),  # a value too few
        encoded([1] * 13, (2, 3, 2)),  # a value too many
    ],
)
def test_a_damaged_file_is_refused(tmp_path, content):
    file = tmp_path / "images"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="path"):
        read_idx(file, dimensions=3)


def test_a_truncated_gzip_file_is_refused(tmp_path):
    file = tmp_path / "images.gz"
    file.write_bytes(gzip.compress(encoded(range(12), (2, 3, 2)))[:-9])
    with pytest.raises(ValueError, match="path"):
        read_idx(file, dimensions=3)


def test_images_without_their_labels_are_refused(tmp_path):
    write(tmp_path, "train", 7, compress=False)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(encoded([0] * 6, (6,)))
    with pytest.raises(ValueError, match="labels"):
        idx(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="labels-idx1"):
        idx(tmp_path)
    with pytest.raises(ValueError, match="split"):
        idx(tmp_path, "test")


def test_the_configuration_of_idx_files():
    with pytest.raises(ValueError, match="path"):
        DataConfig(source="idx")
    with pytest.raises(ValueError, match="mirror"):
        DataConfig(source="idx", path=Path("files"), mirror=True)
    with pytest.raises(ValueError, match="sha256"):
        DataConfig(source="digits", sha256=("0" * 64, "0" * 64))


@pytest.mark.skipif(not FASHION.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_debian_s_fashion_mnist():
    held_out = idx(FASHION, "held-out")
    assert (len(held_out), held_out.shape, held_out.num_classes) == (10_000, (1, 28, 28), 10)
    assert held_out.y.bincount().tolist() == [1000] * 10


def test_both_splits_have_the_classes_of_the_training_images(tmp_path):
    write(tmp_path, "train", 7, compress=False)
    write(tmp_path, "t10k", 2, compress=False)  # of the classes 0 and 1 only
    images, held_out = data.datasets(DataConfig(source="idx", path=tmp_path))
    assert held_out is not None and images.num_classes == held_out.num_classes == 3
    write(tmp_path, "t10k", 2, compress=False, height=5)
    with pytest.raises(ValueError, match=r"--data\.path.*6 x 4.*5 x 4"):
        data.datasets(DataConfig(source="idx", path=tmp_path))


def test_too_few_held_out_images_are_not_scored(tmp_path, capsys):
    write(tmp_path, "train", 70, compress=False, height=4)
    write(tmp_path, "t10k", 1, compress=False, height=4)
    flags = "--data.source idx --model.hidden 16 --model.heads 2 --optimizer.images 16 --optimizer.batch 8 "
    flags += "--sampling.steps 1 --sampling.iterations 1 --num-samples 4 --track none"
    argv = ["digits", *flags.split(), "--data.path", str(tmp_path), "--out", str(tmp_path / "run")]
    assert train.main(argv) == 0
    assert "no scores" in capsys.readouterr().out
    assert "generated" not in json.loads((tmp_path / "run" / "metrics.json").read_text())

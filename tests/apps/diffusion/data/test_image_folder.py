"""A folder of images: ADM's crop, classes by name, access by index; damaged files are reported and skipped."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from apps.diffusion.data import ImageFolderDataset, preprocessing
from apps.diffusion.data.dataset import all_images
from apps.diffusion.data.image_folder import listing, skipped_text
from tests.apps.diffusion.helpers import image_files


@pytest.mark.parametrize(("width", "height"), [(16, 16), (40, 23), (23, 40), (64, 67), (129, 300), (9, 12), (31, 16)])
def test_crops_are_square_and_centred(width, height):
    size = 16
    ramp = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    found = np.asarray(preprocessing.center_crop(Image.fromarray(ramp.astype(np.uint8)), size), dtype=float)
    assert found.shape == (size, size, 3)
    # the image is a ramp to the right, so that position and scale of the crop can be read off
    middle, slope = found[size // 2, :, 0].mean(), np.diff(found[size // 2, 2:-2, 0]).mean()
    assert abs(middle - 127.5) < 0.6 * 255 * min(width, height) / size / width + 1
    assert slope == pytest.approx(255 / (width - 1) * min(width, height) / size, rel=0.12)


def test_a_large_image_is_halved_by_boxes_first():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    expected = pixels.astype(float)
    for _ in range(2):
        for axis in (1, 0):  # Pillow goes along rows, then columns, and rounds to 8 bits each time
            pairs = [np.take(expected, range(start, expected.shape[axis], 2), axis) for start in (0, 1)]
            expected = np.floor(sum(pairs) / 2 + 0.5)
    found = np.asarray(preprocessing.center_crop(Image.fromarray(pixels), 16), dtype=float)
    assert np.array_equal(found, expected)
    direct = np.asarray(Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC), dtype=float)
    assert np.abs(found - direct).max() > 10


def test_classes_are_the_subfolders_and_pairs_go_by_index(tmp_path):
    total = image_files.tree(tmp_path)
    images = ImageFolderDataset(tmp_path, 16)
    assert (len(images), images.num_classes, images.shape) == (total, 3, (3, 16, 16))
    assert images.classes == ("cat", "dog", "owl") and images.y.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    x, y = all_images(images, [7, 0])
    for row, label, i in zip(x, y, (7, 0), strict=True):
        assert images.files[i].split("/")[0] == images.classes[label]
        with Image.open(tmp_path / images.files[i]) as file:
            image = file.convert("RGBA")
        white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        expected = np.asarray(preprocessing.center_crop(white, 16)) / 127.5 - 1
        assert np.allclose(row.permute(1, 2, 0), expected, atol=1e-6)


def test_images_of_no_class(tmp_path):
    image_files.save(tmp_path / "b.png", image_files.random_image(1))
    image_files.save(tmp_path / "a.png", image_files.random_image(2))
    image_files.save(tmp_path / ".hidden.png", image_files.random_image(3))
    (tmp_path / "notes.txt").write_text("not an image")
    images = ImageFolderDataset(tmp_path, 16)
    assert images.files == ("a.png", "b.png") and images.num_classes == 0 and images.y.tolist() == [0, 0]
    image_files.tree(tmp_path)
    with pytest.raises(ValueError, match=r"a\.png"):
        listing(tmp_path)
    assert len(listing(tmp_path, "none").files) == 17 and listing(tmp_path, "none").classes == ()


def test_deeper_folders_belong_to_their_class(tmp_path):
    image_files.save(tmp_path / "b" / "z" / "1.png", image_files.random_image(1))
    image_files.save(tmp_path / "b" / "2.png", image_files.random_image(2))
    image_files.save(tmp_path / "a" / "x" / "y" / "3.png", image_files.random_image(3))
    found = listing(tmp_path)
    assert found.files == ("a/x/y/3.png", "b/2.png", "b/z/1.png") and found.labels == (0, 1, 1)


def test_bad_files_are_named_counted_and_skipped(tmp_path):
    total = image_files.tree(tmp_path)
    clean = ImageFolderDataset(tmp_path, 16)
    bad = image_files.damage(tmp_path)
    images = ImageFolderDataset(tmp_path, 16)
    assert len(images) == total and all(
        torch.equal(a, b) for a, b in zip(all_images(images), all_images(clean), strict=True)
    )
    assert {image.file for image in images.skipped} == bad
    text = skipped_text(images.skipped, total + 4)
    assert all(name in text for name in [*bad, "4", "19"])
    assert "50 x 3" in text
    assert skipped_text([], 3) == "" and ImageFolderDataset(tmp_path, 16, least=3).files[-1] == "owl/tiny.png"


def test_a_palette_with_transparency_is_read(tmp_path):
    image = image_files.random_image(0).quantize(16)
    image.info["transparency"] = bytes(range(16))
    image.save(tmp_path / "a.png", transparency=bytes(range(16)))
    assert ImageFolderDataset(tmp_path, 16).shape == (3, 16, 16)


def test_gray_images_of_sixteen_bits_keep_their_levels(tmp_path):
    shades = np.linspace(300, 65535, 400).reshape(20, 20).astype(np.uint16)
    Image.fromarray(shades).save(tmp_path / "a.png")
    Image.fromarray(shades).save(tmp_path / "b.tif")
    for name in ("a.png", "b.tif"):
        assert np.array_equal(preprocessing.read(tmp_path / name, 20, 1), np.stack([(shades / 257).round()] * 3)), name
    Image.fromarray(shades.astype(np.float32)).save(tmp_path / "c.tif")
    with pytest.raises(preprocessing.Unusable, match="32"):
        preprocessing.read(tmp_path / "c.tif", 20, 1)


def test_an_epoch_mirrors_about_half_by_seed_epoch_and_number(tmp_path):
    image_files.tree(tmp_path, each=5)
    plain, y = all_images(ImageFolderDataset(tmp_path, 16))
    images, n = ImageFolderDataset(tmp_path, 16, mirror=True, seed=3), len(y)
    epochs = []
    for epoch in range(6):
        pairs = [images[i, epoch] for i in range(n)]
        assert [label for _, label in pairs] == y.tolist()
        mirrored = [torch.equal(a, b.flip(2)) for (a, _), b in zip(pairs, plain, strict=True)]
        assert all(m or torch.equal(a, b) for m, (a, _), b in zip(mirrored, pairs, plain, strict=True))
        epochs.append(mirrored)
    assert 0.3 < np.mean(epochs) < 0.7 and len({tuple(e) for e in epochs}) == 6
    other = ImageFolderDataset(tmp_path, 16, mirror=True, seed=4)
    assert any(not torch.equal(images[i][0], other[i][0]) for i in range(n))


def test_what_is_no_folder_of_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="missing"):
        ImageFolderDataset(tmp_path / "missing", 16)
    with pytest.raises(ValueError, match=tmp_path.name):
        ImageFolderDataset(tmp_path, 16)
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ValueError, match=r"a\.png"):
        ImageFolderDataset(tmp_path, 16)
    with pytest.raises(ValueError, match="size"):
        ImageFolderDataset(tmp_path, 0)


def test_progress_counts_to_the_end(tmp_path):
    total = image_files.tree(tmp_path)
    seen = []
    ImageFolderDataset(tmp_path, 16, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(i + 1, total) for i in range(total)]


def colors(root, *names, mode="RGB"):
    for i, name in enumerate(names):
        image_files.save(root / name, image_files.random_image(i, mode=mode))


@pytest.mark.parametrize("suffix", ["jfif", "avif", "jp2", "tga", "PNG", "JPEG", "qoi", "pcx", "mpo"])
def test_every_suffix_that_pillow_reads_is_an_image(tmp_path, suffix):
    colors(tmp_path, "0.png", f"1.{suffix}")
    assert ImageFolderDataset(tmp_path, 16).files == ("0.png", f"1.{suffix}")


def test_files_of_no_image_format_are_named_and_counted(tmp_path):
    colors(tmp_path, "0.png")
    for name in ("a.heic", "b.heic", "notes.txt", "README"):
        (tmp_path / name).write_text("?")
    said = " ".join(ImageFolderDataset(tmp_path, 16).remarks())
    for part in ("4 files", "2 with .heic", "1 with .txt", "1 with no suffix", "README"):
        assert part in said, part
    (tmp_path / "0.png").unlink()
    with pytest.raises(ValueError, match=r"\.heic"):
        ImageFolderDataset(tmp_path, 16)


@pytest.mark.parametrize("target", ["..", ".", "../..", "../../.."])
def test_a_link_upwards_is_not_followed(tmp_path, target):
    root = tmp_path / "a" / "images"
    colors(root, "cat/cat.png", "dog/dog.png")
    colors(tmp_path, "a/elsewhere/x.png")
    (root / "cat" / "all").symlink_to(target)
    found = listing(root)
    assert found.files == ("cat/cat.png", "dog/dog.png") and found.labels == (0, 1) and found.loops == ("cat/all",)
    assert "cat/all" in " ".join(found.remarks())


def test_links_to_other_folders_are_followed_once(tmp_path):
    root = tmp_path / "images"
    colors(root, "cat/cat.png")
    colors(tmp_path / "shared", "1.png", "2.png")
    for name in ("dog", "owl"):
        (root / name).symlink_to(tmp_path / "shared")
    (tmp_path / "shared" / "back").symlink_to(root)  # by way of which the root contains itself
    found = listing(root)
    assert found.files == ("cat/cat.png", "dog/1.png", "dog/2.png", "owl/1.png", "owl/2.png")
    assert found.labels == (0, 1, 1, 2, 2) and found.loops == ("dog/back", "owl/back")
    (root / "cat" / "to-dog").symlink_to(root / "dog")
    assert "cat/to-dog/1.png" in listing(root).files


def test_a_class_without_images_is_named_and_keeps_its_number(tmp_path):
    colors(tmp_path, "ant/0.png", "cow/0.png")
    (tmp_path / "bee").mkdir()
    (tmp_path / "bee" / "x.heic").write_text("?")
    images = ImageFolderDataset(tmp_path, 16)
    assert images.classes == ("ant", "bee", "cow") and images.y.tolist() == [0, 2] and images.num_classes == 3
    assert "bee" in " ".join(images.remarks())


def test_folders_of_the_operating_system_are_no_classes(tmp_path):
    colors(tmp_path, "ant/0.png", "bee/0.png", "bee/@eaDir/0.png/small.jpg")
    (tmp_path / "__MACOSX" / "ant").mkdir(parents=True)
    (tmp_path / "__MACOSX" / "ant" / "._0.png").write_bytes(b"?")
    found = listing(tmp_path)
    assert found.classes == ("ant", "bee") and found.files == ("ant/0.png", "bee/0.png")


def test_folders_that_are_splits_are_mentioned(tmp_path):
    colors(tmp_path, "test/cat/0.png", "train/cat/0.png", "train/dog/0.png", "val/cat/0.png")
    images = ImageFolderDataset(tmp_path, 16)
    assert images.classes == ("test", "train", "val") and str(tmp_path / "train") in " ".join(images.remarks())
    assert not ImageFolderDataset(tmp_path / "train", 16).remarks()


def test_channels_are_those_of_the_files_unless_given(tmp_path):
    colors(tmp_path, "a.png", "b.png", mode="L")
    gray = ImageFolderDataset(tmp_path, 16)
    assert gray.shape == (1, 16, 16) and gray[0][0].shape == (1, 16, 16)
    color = ImageFolderDataset(tmp_path, 16, channels=3)
    assert color.shape == (3, 16, 16) and torch.equal(color[1][0], gray[1][0].expand(3, -1, -1))
    colors(tmp_path, "c.png")
    assert ImageFolderDataset(tmp_path, 16).shape == (3, 16, 16)
    assert ImageFolderDataset(tmp_path, 16, channels=1).shape == (1, 16, 16)
    with pytest.raises(ValueError, match="channels=2"):
        ImageFolderDataset(tmp_path, 16, channels=2)


def test_images_beyond_the_memory_are_read_on_access(tmp_path):
    total = image_files.tree(tmp_path)
    kept = ImageFolderDataset(tmp_path, (16, 24), mirror=True, seed=1)
    read = ImageFolderDataset(tmp_path, (16, 24), mirror=True, seed=1, memory=0)
    assert read._pixels is None and kept.shape == (3, 16, 24)
    assert all(torch.equal(kept[i, 3][0], read[i, 3][0]) for i in range(total))
    assert kept.fingerprint() == read.fingerprint()
    file = tmp_path / read.files[4]
    image_files.truncate(file)
    with pytest.raises(ValueError, match=file.name):
        read[4]


def test_images_replaced_under_the_same_names_have_other_sizes(tmp_path):
    image_files.tree(tmp_path)
    before = ImageFolderDataset(tmp_path, 16)
    names, sizes = before.fingerprint(), before.sizes_digest()
    file = tmp_path / before.files[2]
    os.utime(file, (0, 0))  # as copying does
    assert ImageFolderDataset(tmp_path, 16).sizes_digest() == sizes
    image_files.save(file, image_files.random_image(77, 40, 41))
    after = ImageFolderDataset(tmp_path, 16)
    assert after.fingerprint() == names and after.sizes_digest() != sizes


def test_links_in_a_circle_and_named_pipes_are_left_out_by_name(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("L", (8, 8), 9).save(tmp_path / "a" / "good.png")
    (tmp_path / "a" / "one.png").symlink_to("two.png")
    (tmp_path / "a" / "two.png").symlink_to("one.png")
    os.mkfifo(tmp_path / "a" / "pipe.png")  # opening it would wait forever
    data = ImageFolderDataset(tmp_path, 8)
    assert data.files == ("a/good.png",)
    assert [skipped.file for skipped in data.skipped] == ["a/one.png", "a/pipe.png", "a/two.png"]


def test_a_class_whose_images_are_all_damaged_is_named(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8), 9).save(tmp_path / name / "x.png")
    (tmp_path / "b" / "x.png").write_bytes(b"damaged")
    data = ImageFolderDataset(tmp_path, 8)
    assert data.y.tolist() == [0, 2] and data.classes == ("a", "b", "c")
    assert any(remark.startswith("1 ") and remark.endswith(": b.") for remark in data.remarks())


@pytest.mark.parametrize("suffix", ["gif", "png"])
def test_a_palette_of_grays_is_gray(tmp_path, suffix):
    ramp = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    ramp.convert("RGB").quantize(64).save(tmp_path / f"gray.{suffix}")
    assert ImageFolderDataset(tmp_path, 8).shape[0] == 1
    Image.new("RGB", (8, 8), (200, 40, 60)).quantize(4).save(tmp_path / f"red.{suffix}")
    assert ImageFolderDataset(tmp_path, 8).shape[0] == 3


def test_names_are_printed_on_one_line_without_terminal_codes(tmp_path):
    name = os.fsdecode(b"a\n\x1b[31m\xff")
    colors(tmp_path, f"{name}/0.png", f"{name}/1.txt.png")
    (tmp_path / name / "1.txt.png").write_bytes(b"no image")
    (tmp_path / name / "2.txt").touch()
    (tmp_path / (name + "empty")).mkdir()
    said = ImageFolderDataset(tmp_path, 16).remarks()
    assert len(said) == 3
    assert all(line.isprintable() for line in said)
    assert r"a\n\x1b[31m\udcff" in said[0]

"""TIFF files of many kinds are read as image viewers show them, or raise."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from apps.diffusion.data import preprocessing
from apps.diffusion.data.preprocessing import Unusable, read
from tests.apps.diffusion.data.test_preprocessing import ORIENTATIONS, wide_gamut_profile


def tiff(width, height, planes, tags, pixels_last=False):
    """A TIFF file, written byte by byte: Pillow writes few of its kinds. All planes of the image have one length."""
    data, size = b"".join(planes), len(planes[0])
    tags = {256: width, 257: height, 259: 1, 262: 1, 277: len(planes), 278: height, 284: 1, 273: 0, 279: 0} | tags
    long = [value for value in tags.values() if isinstance(value, tuple) and len(value) > 1]
    first = 14 + 12 * len(tags) + 4 * sum(map(len, long)) if pixels_last else 8
    tags |= {273: tuple(first + i * size for i in range(len(planes))), 279: (size,) * len(planes)}
    start = 8 if pixels_last else 8 + len(data)
    entries, tail, far = b"", b"", start + 6 + 12 * len(tags)
    for tag, value in sorted(tags.items()):
        values = value if isinstance(value, tuple) else (value,)
        held = struct.pack(f"<{len(values)}I", *values)
        entries += struct.pack("<HHI", tag, 4, len(values)) + (held if len(held) == 4 else struct.pack("<I", far))
        if len(held) > 4:
            far, tail = far + len(held), tail + held
    head, table = b"II*\0" + struct.pack("<I", start), struct.pack("<H", len(tags)) + entries + bytes(4) + tail
    return head + (table + data if pixels_last else data + table)


@pytest.mark.parametrize(("bits", "photometric"), [(1, 0), (1, 1), (8, 0), (8, 1), (12, 1), (16, 0), (16, 1)])
def test_tiff_of_every_depth_with_zero_for_white_or_black(tmp_path, bits, photometric):
    left = np.zeros((8, 8), dtype=np.uint16 if bits == 16 else np.uint8)
    left[:, :4] = 1 if bits == 12 else 2**bits - 1
    data = np.packbits(left, axis=1).tobytes() if bits == 1 else left.tobytes()
    if bits == 12:
        data = np.packbits(np.repeat(left, 12, axis=1), axis=1).tobytes()
    (tmp_path / "a.tif").write_bytes(tiff(8, 8, [data], {258: bits, 262: photometric}))
    rows = preprocessing.read(tmp_path / "a.tif", 8, channels=1)[0]
    assert rows[0].tolist() == ([0] * 4 + [255] * 4 if photometric == 0 else [255] * 4 + [0] * 4)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16"])
def test_uncompressed_tiff_is_turned(tmp_path, orientation, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 7, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    gray = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    image = gray if mode == "I;16" else Image.fromarray(pixels).convert("RGB").convert(mode)
    image.save(tmp_path / "a.tif", tiffinfo={0x0112: orientation})
    upright = np.repeat(pixels[..., :1], 3, 2) if mode == "I;16" else np.asarray(image.convert("RGB"))
    expected = ORIENTATIONS[orientation](upright).transpose(2, 0, 1)
    assert np.array_equal(read(tmp_path / "a.tif", None), expected)


@pytest.mark.parametrize(
    ("planes", "tags"),
    [
        ([bytes([156, 100])], {258: 8, 339: 2}),
        ([b"\0\x80\0\x80", b"\0\x40\0\x40", b"\xff\xff\xff\xff"], {258: (16, 16, 16), 262: 2, 284: 2}),
        ([b"\xff\xff", b"\0\0", b"\0\0"], {258: (8, 8, 8), 262: 8, 284: 2}),
        ([b"\7\0"], {258: 8, 262: 3, 320: (200,) * 768}),
        ([bytes(8)], {258: (8, 8, 8, 8), 262: 5, 277: 4, 332: 2}),
    ],
    ids=["signed", "16 bits in planes", "LAB in planes", "palette of 8 bits", "other inks"],
)
def test_tiff_that_pillow_misreads_is_refused(tmp_path, planes, tags):
    (tmp_path / "a.tif").write_bytes(tiff(2, 1, planes, tags))
    for call in (lambda: read(tmp_path / "a.tif", None), lambda: preprocessing.header(tmp_path / "a.tif", 1)):
        with pytest.raises(Unusable, match="TIFF"):
            call()


@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_tiff_that_is_cut_off_within_the_pixels_is_refused(tmp_path, compression):
    """With a profile, which is applied to pixels; the table of tags comes first, so that only pixels are missing."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8).tobytes()
    data = zlib.compress(pixels) if compression == 8 else pixels
    profile = wide_gamut_profile()
    tags = {258: (8, 8, 8), 259: compression, 262: 2, 277: 3, 34675: (0,) * (-(-len(profile) // 4))}
    content = bytearray(tiff(12, 12, [data], tags, pixels_last=True))
    entry = content.index(struct.pack("<HH", 34675, 4))
    content[entry + 2 : entry + 8] = struct.pack("<HI", 7, len(profile))
    place = struct.unpack_from("<I", content, entry + 8)[0]
    content[place : place + len(profile)] = profile
    (tmp_path / "a.tif").write_bytes(content)
    assert read(tmp_path / "a.tif", None).shape == (3, 12, 12)
    for cut in range(1, len(data), 7):
        (tmp_path / "a.tif").write_bytes(content[:-cut])
        with pytest.raises(Unusable, match="unreadable"):
            read(tmp_path / "a.tif", None)


def test_planes_of_8_bits_are_read(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(2, 1, [b"\1\4", b"\2\5", b"\3\6"], {258: (8, 8, 8), 262: 2, 284: 2}))
    assert read(tmp_path / "a.tif", None)[:, 0].T.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_gray_with_associated_alpha(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(1, 1, [bytes([50, 128])], {258: (8, 8), 277: 2, 338: 1}))
    assert read(tmp_path / "a.tif", None, channels=1)[0, 0].tolist() == [50 + 127]


def test_lab_as_gray(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(1, 1, [bytes([136, 0, 0])], {258: (8, 8, 8), 262: 8, 277: 3}))
    y = ((136 / 2.55 + 16) / 116) ** 3  # of L* = 53.3, without color
    assert abs(read(tmp_path / "a.tif", None, channels=1)[0, 0, 0] - 255 * (1.055 * y ** (1 / 2.4) - 0.055)) < 1.5

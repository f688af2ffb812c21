"""Image files are read as image viewers show them."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from apps.diffusion.data import preprocessing
from apps.diffusion.data.preprocessing import Unusable, center_crop, read

# the eight orientations of the EXIF standard, as what a viewer does to the stored rows and columns
ORIENTATIONS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


def icc(space, tags):
    """An ICC profile of these colors with these tags, a name and the white of D50."""
    name = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"wide\0" + b"\0" * 78
    white = b"".join(struct.pack(">i", round(value * 65536)) for value in (0.9642, 1, 0.8249))
    tags = {b"desc": name + b"\0" * (-len(name) % 4), b"wtpt": b"XYZ \0\0\0\0" + white, **tags}
    start, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for tag, data in tags.items():
        table += tag + struct.pack(">II", start + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", 128 + len(table) + len(body), b"none", 0x02100000, b"mntr", space, b"XYZ ")
    head += b"\x07\xe6\0\1\0\1\0\0\0\0\0\0acsp"
    head += b"\0" * (68 - len(head)) + white
    return head + b"\0" * (128 - len(head)) + table + body


def wide_gamut_profile():
    """A matrix profile with Adobe RGB's primaries and gamma 563/256, written from the ICC specification."""

    def number(value):
        return struct.pack(">i", round(value * 65536))

    def xyz(*values):
        return b"XYZ \0\0\0\0" + b"".join(map(number, values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, 563) + b"\0\0"
    tags = {
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
        b"rXYZ": xyz(0.60974, 0.31111, 0.01947),
        b"gXYZ": xyz(0.20528, 0.62567, 0.06087),
        b"bXYZ": xyz(0.14919, 0.06322, 0.74457),
        b"rTRC": curve,
        b"gTRC": curve,
        b"bTRC": curve,
    }
    return icc(b"RGB ", tags)


def srgb(color):
    """Of a color of that profile, by hand: gamma, matrix to XYZ (D50), Bradford matrix to linear sRGB, its curve."""
    linear = (np.array(color) / 255) ** (563 / 256)
    columns = [[0.60974, 0.31111, 0.01947], [0.20528, 0.62567, 0.06087], [0.14919, 0.06322, 0.74457]]
    xyz = np.array(columns).T @ linear
    to_srgb = [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.0334540],
        [0.0719453, -0.2289914, 1.4052427],
    ]
    value = np.clip(np.array(to_srgb) @ xyz, 0, 1)
    return 255 * np.where(value <= 0.0031308, 12.92 * value, 1.055 * value ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize(
    ("suffix", "mode"), [("png", "RGB"), ("tif", "RGB"), ("webp", "RGB"), ("png", "L"), ("png", "P")]
)
def test_exif_orientation_is_applied(tmp_path, orientation, suffix, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(pixels).convert(mode)
    options = {"lossless": True} if suffix == "webp" else {}
    image.save(tmp_path / f"a.{suffix}", exif=exif, **options)
    expected = ORIENTATIONS[orientation](np.asarray(image.convert("RGB"))).transpose(2, 0, 1)
    assert np.array_equal(read(tmp_path / f"a.{suffix}", None), expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_orientation_of_sixteen_bits_and_damaged_exif(tmp_path):
    levels = np.arange(6, dtype=np.uint16).reshape(2, 3) * 257 * 40
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(levels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read(tmp_path / "a.png", None, channels=1)[0], (levels // 257).T[:, ::-1])
    Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(
        tmp_path / "b.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff rubbish"
    )
    assert read(tmp_path / "b.jpg", None).shape == (3, 2, 3)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("color", [(120, 200, 60), (200, 120, 180), (90, 90, 90)])
def test_colors_go_to_srgb_by_the_profile(tmp_path, mode, color):
    Image.new("RGB", (8, 8), color).convert(mode).save(tmp_path / "a.png", icc_profile=wide_gamut_profile())
    found = read(tmp_path / "a.png", 8)[:, 4, 4].astype(float)
    assert np.abs(found - srgb(color)).max() <= 2
    Image.new("RGB", (8, 8), color).save(tmp_path / "b.png")
    assert read(tmp_path / "b.png", 8)[:, 4, 4].tolist() == list(color)


@pytest.mark.parametrize("profile", [b"rubbish", wide_gamut_profile()[:200], b""])
def test_a_profile_that_does_not_fit_counts_as_none(tmp_path, profile):
    Image.new("RGB", (8, 8), (120, 200, 60)).save(tmp_path / "a.png", icc_profile=profile)
    Image.new("L", (8, 8), 120).save(tmp_path / "b.png", icc_profile=wide_gamut_profile())
    assert read(tmp_path / "a.png", 8)[:, 4, 4].tolist() == [120, 200, 60]
    assert read(tmp_path / "b.png", 8, channels=1)[:, 4, 4].tolist() == [120]


def test_a_profile_of_srgb_changes_nothing(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=profile)
    assert np.abs(read(tmp_path / "a.png", None).transpose(1, 2, 0).astype(int) - pixels).max() <= 1


def transparent(kind):
    """A file of 4 x 4 pixels, blue in the middle and transparent around, with rubbish below."""
    rows = np.random.default_rng(0).integers(0, 256, (4, 4, 4), dtype=np.uint8)
    rows[..., 3] = 0
    rows[1:3, 1:3] = (0, 0, 255, 255)
    image, options = Image.fromarray(rows), {}
    if kind == "LA":
        image = image.convert("LA")
    elif kind == "P":
        flat = Image.new("P", (4, 4), 0)
        flat.putpalette([9, 99, 199, 0, 0, 255])
        flat.paste(1, (1, 1, 3, 3))
        image, options = flat, {"transparency": 0}
    elif kind == "RGB":
        hidden = Image.new("RGB", (4, 4), (9, 99, 199))
        hidden.paste((0, 0, 255), (1, 1, 3, 3))
        image, options = hidden, {"transparency": (9, 99, 199)}
    elif kind == "I;16":
        levels = np.full((4, 4), 1234, np.uint16)
        levels[1:3, 1:3] = 65535 // 4
        image, options = Image.fromarray(levels), {"transparency": 1234}
    stream = io.BytesIO()
    image.save(stream, "PNG", **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "RGB", "I;16"])
def test_transparent_pixels_are_white(tmp_path, kind):
    (tmp_path / "a.png").write_bytes(transparent(kind))
    found = read(tmp_path / "a.png", None)
    middle, around = found[:, 1:3, 1:3], np.delete(found.reshape(3, 16), [5, 6, 9, 10], axis=1)
    assert (around == preprocessing.BACKGROUND).all() and middle.max() - middle.min() in (0, 255) and middle.min() < 100


def test_half_transparent_pixels_are_mixed(tmp_path):
    Image.new("RGBA", (4, 4), (0, 100, 200, 51)).save(tmp_path / "a.png")
    assert np.abs(read(tmp_path / "a.png", None)[:, 0, 0] - (0.2 * np.array([0, 100, 200]) + 0.8 * 255)).max() <= 1


def test_cmyk_palette_bilevel_and_gray_are_right(tmp_path):
    color = (200, 40, 40)
    Image.new("RGB", (16, 16), color).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    Image.new("RGB", (16, 16), color).quantize(4).save(tmp_path / "b.gif")
    Image.new("1", (16, 16), 1).save(tmp_path / "c.png")
    Image.new("L", (16, 16), 77).save(tmp_path / "d.png")
    for name in ("a.jpg", "b.gif"):
        assert np.abs(read(tmp_path / name, 16)[:, 8, 8].astype(int) - color).max() <= 3, name
    assert read(tmp_path / "c.png", 16).min() == 255
    assert read(tmp_path / "d.png", 16).tolist() == np.full((3, 16, 16), 77).tolist()
    assert read(tmp_path / "d.png", 16, channels=1).shape == (1, 16, 16)


@pytest.mark.parametrize(("width", "height"), [(96, 32), (48, 32), (40, 90), (200, 201)])
def test_crops_that_are_not_square_keep_the_middle_and_the_scale(width, height):
    image = Image.fromarray(np.tile(np.linspace(0, 255, width).astype(np.uint8), (height, 1)))
    found = np.asarray(center_crop(image, (32, 48)), dtype=float)
    assert found.shape == (32, 48)
    scale = max(48 / width, 32 / height)
    assert abs(found.mean() - 127.5) < 4
    assert np.diff(found[16, 2:-2]).mean() == pytest.approx(255 / (width - 1) / scale, rel=0.12)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"GIF89a" + b"\xff" * 30])
def test_files_that_cannot_be_decoded_are_unusable(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    for call in (lambda: read(tmp_path / "a.png", 8), lambda: preprocessing.header(tmp_path / "a.png", 1)):
        with pytest.raises(Unusable, match=r"a\.png"):
            call()


@pytest.mark.filterwarnings("ignore")
def test_random_damage_raises_nothing_else(tmp_path):
    draw = np.random.default_rng(0)
    pixels = Image.fromarray(draw.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        stream = io.BytesIO()
        options = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
        pixels.save(stream, kind, icc_profile=wide_gamut_profile(), **options)
        for _ in range(25):
            content = bytearray(stream.getvalue())
            for place in draw.integers(0, len(content), 8):
                content[place] = draw.integers(0, 256)
            (tmp_path / "a").write_bytes(bytes(content))
            try:
                assert read(tmp_path / "a", 8).shape == (3, 8, 8)
            except Unusable:
                pass


CUT = {
    "png": {},
    "jpg": {"quality": 95},
    "gif": {},
    "bmp": {},
    "webp": {"lossless": True},
    "tif": {"compression": "tiff_adobe_deflate"},
    "jp2": {"tile_size": (8, 8)},
    "qoi": {},
}


@pytest.mark.parametrize("suffix", CUT)
def test_a_file_that_is_cut_off_anywhere_is_unusable_or_has_all_its_pixels(tmp_path, suffix):
    """With a profile, whose application loads the pixels; of a JPEG file the marker of the end may be missing."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    profile = {} if suffix in ("gif", "bmp", "jp2", "qoi") else {"icc_profile": wide_gamut_profile()}
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", **CUT[suffix], **profile)
    whole, content = read(tmp_path / f"a.{suffix}", None), (tmp_path / f"a.{suffix}").read_bytes()
    refused = 0
    for length in range(1, len(content)):
        (tmp_path / f"a.{suffix}").write_bytes(content[:length])
        try:
            found = read(tmp_path / f"a.{suffix}", None)
        except Unusable:
            refused += 1
        else:
            assert np.array_equal(found, whole), length
    assert refused > 0.9 * len(content)


def test_a_changed_pixel_of_a_png_file_is_noticed(tmp_path):
    Image.new("RGB", (8, 8), (10, 20, 30)).save(tmp_path / "a.png", compress_level=0)
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[content.index(bytes([10, 20, 30]))] += 1
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(Unusable, match="unreadable"):
        read(tmp_path / "a.png", None)


def test_a_palette_at_the_end_of_the_file_may_be_cut_off(tmp_path):
    image = Image.frombytes("P", (2, 1), b"\0\1")
    image.putpalette(bytes([255, 0, 0, 0, 0, 255] + 762 * [7]))
    image.save(tmp_path / "a.pcx")
    assert read(tmp_path / "a.pcx", None)[:, 0].T.tolist() == [[255, 0, 0], [0, 0, 255]]
    (tmp_path / "a.pcx").write_bytes((tmp_path / "a.pcx").read_bytes()[:-9])
    with pytest.raises(Unusable, match="palette"):
        read(tmp_path / "a.pcx", None)


def test_set_bits_of_xbm_and_psd_are_black(tmp_path):
    (tmp_path / "a.xbm").write_text("#define a_width 8\n#define a_height 1\nstatic char a_bits[] = {\n0x03};\n")
    head = b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 1, 1, 8, 1, 0) + bytes(12)
    (tmp_path / "a.psd").write_bytes(head + b"\0\0\xc0")
    for name in ("a.xbm", "a.psd"):
        assert read(tmp_path / name, None, channels=1)[0, 0].tolist() == [0, 0] + 6 * [255], name


def test_fits_in_sixteen_bits_is_refused(tmp_path):
    cards = {"SIMPLE": "T", "BITPIX": 16, "NAXIS": 2, "NAXIS1": 2, "NAXIS2": 1}
    head = "".join(f"{key:<8}= {value:>20}".ljust(80) for key, value in cards.items()) + "END"
    (tmp_path / "a.fits").write_bytes(head.ljust(2880).encode() + b"\0\1\0\2".ljust(2880, b"\0"))
    with pytest.raises(Unusable, match="FITS"):
        read(tmp_path / "a.fits", None)


def test_exif_agrees_with_pillow(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as file:
        shown = np.asarray(ImageOps.exif_transpose(file))
    assert np.array_equal(read(tmp_path / "a.png", None).transpose(1, 2, 0), shown)


def png(width, depth, kind, row, transparent=None):
    """A PNG file of one row, with a transparent color, as written by hand: Pillow writes few of its kinds."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0))]
    parts += [] if transparent is None else [(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))]
    parts += [(b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


GRAY, RGB, GRAY_ALPHA = 0, 2, 4  # kinds of pixels in the PNG specification


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (png(4, 2, GRAY, bytes([0b00011011]), (2,)), [0, 85, 255, 255]),
        (png(4, 4, GRAY, bytes([0x05, 0xAF]), (5,)), [0, 255, 170, 255]),
        (png(4, 8, GRAY, bytes([0, 5, 160, 255]), (5,)), [0, 255, 160, 255]),
        (png(8, 1, GRAY, bytes([0b01010101]), (0,)), [255] * 8),
        (png(2, 16, GRAY_ALPHA, struct.pack(">4H", 32768, 65535, 32768, 0)), [128, 255]),
    ],
)
def test_gray_of_every_depth_with_transparency(tmp_path, content, shown):
    (tmp_path / "x.png").write_bytes(content)
    assert preprocessing.header(tmp_path / "x.png", 1) == 1
    assert preprocessing.read(tmp_path / "x.png", None, channels=1)[0, 0].tolist() == shown


def test_a_transparent_color_in_16_bits(tmp_path):
    row = struct.pack(">6H", 40000, 10000, 0, 10000, 40000, 0)
    (tmp_path / "x.png").write_bytes(png(2, 16, RGB, row, (40000, 10000, 0)))
    found = preprocessing.read(tmp_path / "x.png", None)
    assert found[:, 0].T.tolist() == [[255, 255, 255], [10000 >> 8, 40000 >> 8, 0]]


def test_a_palette_with_an_alpha_channel_of_its_own(tmp_path):
    """TGA with a color map in 32 bits: blue, green, red, alpha."""
    head = struct.pack("<BBBHHBHHHHBB", 0, 1, 1, 0, 2, 32, 0, 0, 2, 1, 8, 0x28)
    (tmp_path / "a.tga").write_bytes(head + bytes([30, 20, 10, 0, 60, 50, 40, 255, 0, 1]) + bytes(30))
    assert read(tmp_path / "a.tga", None)[:, 0].T.tolist() == [[255, 255, 255], [40, 50, 60]]


def test_a_palette_image_without_its_palette_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(png(2, 8, 3, b"\0\1"))
    with pytest.raises(Unusable, match="palette"):
        read(tmp_path / "a.png", None)


def linear_gray_profile():
    """ICC's kTRC of gamma 1: a level is linear light."""
    tags = {b"kTRC": b"curv\0\0\0\0" + struct.pack(">IH", 1, 256) + b"\0\0", b"cprt": b"text\0\0\0\0none\0\0\0\0"}
    return icc(b"GRAY", tags)


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("depth", [8, 16])
def test_gray_of_every_level_goes_to_srgb_by_the_profile(tmp_path, depth, alpha):
    levels = np.arange(256) * (257 if depth == 16 else 1)
    row = np.stack((levels, np.full(256, 2**depth - 1)), axis=1) if alpha else levels
    data = row.astype(">u2" if depth == 16 else "u1").tobytes()
    profile = b"gray\0\0" + zlib.compress(linear_gray_profile())
    content = png(256, depth, GRAY_ALPHA if alpha else GRAY, data)
    end = content.index(b"IDAT") - 4
    chunk = struct.pack(">I", len(profile)) + b"iCCP" + profile + struct.pack(">I", zlib.crc32(b"iCCP" + profile))
    (tmp_path / "a.png").write_bytes(content[:end] + chunk + content[end:])
    light = np.arange(256) / 255
    expected = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    for channels in (1, 3):
        assert np.abs(read(tmp_path / "a.png", None, channels=channels)[:, 0] - expected).max() < 1.01


def test_a_gray_profile_beside_a_transparent_level(tmp_path):
    profile = linear_gray_profile()
    row = Image.fromarray(np.array([[120, 7]], dtype=np.uint8))
    row.save(tmp_path / "a.png", icc_profile=profile, transparency=7)
    expected = 255 * (1.055 * (120 / 255) ** (1 / 2.4) - 0.055)
    assert np.abs(read(tmp_path / "a.png", None, channels=1)[0, 0] - [expected, 255]).max() <= 2

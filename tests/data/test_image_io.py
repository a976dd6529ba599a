"""Decoding of image files: memory, bit depths, and what is refused."""

import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from alexnet_pl.data import image_io
from alexnet_pl.data.image_io import MAX_PIXELS, Preprocess, has_image_suffix, open_image, read_image, to_rgb
from alexnet_pl.runtime.errors import DataError

# --- memory ---------------------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
from alexnet_pl.data.image_io import Preprocess, read_image
from alexnet_pl.runtime.errors import DataError

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

before = peak()
try:
    image = read_image(sys.argv[1])
    print(image.size)
    Preprocess(50, (0.5,) * 3, (0.5,) * 3).pixels(image)
except DataError as error:
    print(error)
print(peak() - before)
"""

SIDE = 10_900  # a little below the limit

BOMBS = {
    "39.7 megapixels.png": lambda: Image.new("RGBA", (6300, 6300)),
    "largest.png": lambda: Image.new("RGBA", (SIDE, SIDE)),
    "palette.png": lambda: Image.new("P", (SIDE, SIDE)),
    "16 bits.png": lambda: Image.fromarray(np.full((SIDE, SIDE), 30_000, np.uint16)),
    "largest.jpg": lambda: Image.new("RGB", (SIDE, SIDE)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_peak_memory_of_large_images_is_bounded(name, tmp_path):
    """Files of at most 2 MB used to take 3.2 GB. What decoding adds to a process is bounded by 6 bytes per pixel."""
    BOMBS[name]().save(tmp_path / name)
    assert (tmp_path / name).stat().st_size < 2e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / name], capture_output=True, text=True, check=True, timeout=600
    )
    size, added = done.stdout.splitlines()
    assert max(eval(size)) < 4000
    assert int(added) < 6 * MAX_PIXELS / 2**20


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("bomb.png", (11_000, 11_000), "bomb.png has 11000×11000 pixels, above the limit of 120,000,000. Downscale"),
        ("400mp.png", (20_000, 20_000), "400mp.png has 400,000,000 pixels, above the limit of 120,000,000. Downscale"),
        ("web.webp", (7000, 7000), "web.webp has 7000×7000 pixels, above the limit of 40,000,000. Downscale"),
    ],
)
def test_images_above_the_limit_are_refused_before_decoding(name, shape, message, tmp_path):
    Image.new("L", shape).save(tmp_path / name)
    with pytest.raises(DataError, match=message):
        read_image(tmp_path / name)


def gradient(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 90)], 2).astype(np.uint8)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_reduced_images_show_the_same(tmp_path, monkeypatch, suffix, orientation):
    """Decode 300×451 whole and under a limit that reduces by 4, rotated by EXIF or not: the same small image."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(gradient(300, 451)).save(tmp_path / f"a.{suffix}", exif=exif, quality=95)
    preprocess = Preprocess(20, (0.5,) * 3, (0.5,) * 3)
    whole = read_image(tmp_path / f"a.{suffix}")
    monkeypatch.setattr(image_io, "REDUCE_ABOVE", 10_000)
    reduced = read_image(tmp_path / f"a.{suffix}")
    assert whole.size == ((451, 300) if orientation == 1 else (300, 451))
    assert max(reduced.size) < 451 / 3.5
    assert (reduced.width > reduced.height) is (orientation == 1)
    difference = preprocess.pixels(whole).int() - preprocess.pixels(reduced).int()
    assert difference.abs().max() <= 6


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_every_mode_is_reduced_strip_by_strip(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(image_io, "REDUCE_ABOVE", 1000)
    gray = Image.fromarray(gradient(700, 40)[..., 1])
    if mode == "I;16":
        image = Image.fromarray(np.asarray(gray).astype(np.uint16) << 8)
    elif mode == "F":
        image = Image.fromarray(np.asarray(gray) / np.float32(255))
    else:
        image = gray.convert("RGB").convert(mode)
    image.save(tmp_path / "a.tif" if mode in ("CMYK", "F") else tmp_path / "a.png")
    reduced = np.asarray(read_image(next(tmp_path.iterdir()))).astype(int)
    assert reduced.shape == (117, 7, 3)  # 700/6 and 40/6, rounded up
    assert np.abs(reduced.mean((1, 2)) - np.linspace(1, 253, 117)).max() < (128 if mode == "1" else 6)


# --- bit depths -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "shift"), [(8, 0), (12, 4), (16, 8)])
def test_gray_levels_are_scaled_by_their_bit_depth(tmp_path, bits, shift):
    """12-bit sensor data in a 16-bit PNG used to become black."""
    expected = gradient(30, 40)[..., 0]
    expected[0, 0] = 255
    Image.fromarray(expected.astype(np.uint16) << shift).save(tmp_path / "a.png")
    pixels = np.asarray(read_image(tmp_path / "a.png"))
    assert np.array_equal(pixels, np.repeat(expected[..., None], 3, 2))


def write_16_bit_color(path, values: np.ndarray) -> None:
    """Write a 16-bit RGB PNG, which Pillow cannot do."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    signature = b"\x89PNG\r\n\x1a\n"
    path.write_bytes(signature + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_16_bit_color_is_scaled_or_refused(tmp_path):
    """Pillow drops the low byte, so 12-bit color cannot be recovered; black training images would be wrong silently."""
    pixels = gradient(30, 40)
    write_16_bit_color(tmp_path / "full.png", pixels.astype(np.uint16) << 8)
    assert np.array_equal(np.asarray(read_image(tmp_path / "full.png")), pixels)
    write_16_bit_color(tmp_path / "twelve.png", pixels.astype(np.uint16) << 4)
    with pytest.raises(DataError, match="16-bit color with at most 12 bits used would turn black. Save it with 8 bits"):
        read_image(tmp_path / "twelve.png")


@pytest.mark.parametrize("values", [[[-1.0, 0.5]], [[0.0, 300.0]], [[0.0, float("nan")]], [[float("nan"), 0.0]]])
def test_unknown_scales_are_refused(values):
    with pytest.raises(DataError, match="unknown scale|not finite"):
        to_rgb(Image.fromarray(np.array(values, np.float32)))


# --- metadata -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "xmp.png"])
@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_applied_once_as_pillow_does(tmp_path, suffix, orientation):
    exif, info = Image.Exif(), PngInfo()
    if suffix == "xmp.png":
        info.add_itxt("XML:com.adobe.xmp", f'<rdf:Description tiff:Orientation="{orientation}"/>')
    else:
        exif[0x0112] = orientation
    Image.fromarray(gradient(30, 41)).save(tmp_path / f"a.{suffix}", exif=exif, pnginfo=info)
    with Image.open(tmp_path / f"a.{suffix}") as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    found = read_image(tmp_path / f"a.{suffix}")
    assert np.array_equal(np.asarray(found), expected)
    assert np.array_equal(np.asarray(to_rgb(found)), expected)


def exif_of(*entries: bytes) -> bytes:
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


TURNED = struct.pack("<HHII", 0x0112, 3, 1, 6)

ODD_METADATA = {
    "broken header": (b"Exif\0\0XX*\0\x08\0\0\0" + bytes(20), False),
    "short": (b"Exif\0\0II", False),
    "resolution as text": (exif_of(TURNED, struct.pack("<HHI4s", 0x011A, 2, 2, b"a")), True),
    "width as text": (exif_of(struct.pack("<HHI4s", 0x0100, 2, 2, b"a"), TURNED), True),
    "orientation as text": (exif_of(struct.pack("<HHI4s", 0x0112, 2, 2, b"6")), False),
    "fewer entries than stated": (exif_of(TURNED).replace(b"\x01\0", b"\x05\0", 1)[:-4], True),
}


@pytest.mark.parametrize("name", ODD_METADATA)
@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("is_reduced", [False, True])
def test_odd_metadata_does_not_make_an_image_corrupt(tmp_path, monkeypatch, name, suffix, is_reduced):
    exif, is_turned = ODD_METADATA[name]
    if is_reduced:
        monkeypatch.setattr(image_io, "REDUCE_ABOVE", 300)
    Image.fromarray(gradient(32, 48)).save(tmp_path / f"a.{suffix}", exif=exif, dpi=(72, 72))
    Image.fromarray(gradient(32, 48)).save(tmp_path / f"plain.{suffix}")
    expected = read_image(tmp_path / f"plain.{suffix}")
    if is_turned:
        expected = expected.transpose(Image.Transpose.ROTATE_270)
    found = read_image(tmp_path / f"a.{suffix}")
    assert np.array_equal(np.asarray(found), np.asarray(expected))
    assert np.array_equal(np.asarray(to_rgb(found)), np.asarray(expected))


def test_images_opened_in_several_threads_leave_the_warnings_on(tmp_path):
    """Overlapping ``warnings.catch_warnings`` used to restore each other's filters, the last one for good."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    before = list(warnings.filters)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        threads = [(one, open_image(tmp_path / "a.png")), (other, open_image(tmp_path / "a.png"))]
        for thread, opened in threads:
            thread.submit(opened.__enter__).result()
        for thread, opened in threads:
            thread.submit(opened.__exit__, None, None, None).result()
    assert list(warnings.filters) == before


# --- refused files --------------------------------------------------------------------------------------------------


def test_unreadable_files_are_refused_in_one_line(tmp_path):
    Image.fromarray(gradient(60, 60)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:120])
    (tmp_path / "text.jpg").write_text("text")
    for name, message in [
        ("cut.png", "cut.png is corrupt: "),
        ("text.jpg", r"text.jpg is not an image or has an unsupported format\."),
        ("nowhere.png", r"nowhere.png not found\."),
        ("", "is not a regular file"),
    ]:
        with pytest.raises(DataError, match=message) as refusal:
            read_image(tmp_path / name)
        assert "\n" not in str(refusal.value)


def test_icons_are_not_images():
    """An icon's embedded PNG may be larger than its header says, which would bypass the limit."""
    assert not has_image_suffix("favicon.ico")
    assert has_image_suffix("photo.JPG")

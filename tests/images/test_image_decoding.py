"""Decoding: colours as transformers has them, limits, and files that are broken on purpose."""

from __future__ import annotations

import re
import resource
import struct
import subprocess
import sys
import time
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from pictures import checkpoint, encoded, noise, read
from PIL import Image, ImageFile
from transformers.image_utils import load_image

from gllm_engine import EngineUnavailable
from gllm_engine.images.decode import FORMATS, MAX_EXIF_BYTES, MAX_SCANS, _Timed, decode
from gllm_engine.sampling import InvalidField

MEGA = 10**6


def decoded(data: bytes, max_bytes: int = MEGA, max_pixels: int = MEGA) -> np.ndarray:
    image = decode(data, max_bytes, max_pixels, number=2)
    assert image.mode == "RGB"
    return np.asarray(image)


def refused(data: bytes, **limits: int) -> str:
    with pytest.raises(InvalidField, match=r"^image: image 2: it ") as caught:
        decoded(data, **limits)
    assert caught.value.field == "image"
    return str(caught.value)


def deep(dtype: str, width: int = 37, height: int = 29) -> Image.Image:
    """A grey picture of more than 8 bits."""
    return Image.fromarray(np.arange(width * height, dtype=dtype).reshape(height, width) * 61)


SIXTEEN_BITS_RGB = b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    for kind, body in (
        (b"IHDR", struct.pack(">IIBBBBB", 3, 2, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress((b"\0" + bytes(range(40, 58))) * 2)),
        (b"IEND", b""),
    )
)


def turned(orientation: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(noise(40, 23), kind, exif=exif)


OPAQUE = {
    **{f"{mode} PNG": encoded(noise(37, 29, mode)) for mode in ("RGB", "L", "P", "1")},
    **{f"{mode} TIFF": encoded(noise(37, 29, mode), "TIFF") for mode in ("CMYK", "LAB", "YCbCr")},
    **{f"{mode} JPEG": encoded(noise(37, 29, mode), "JPEG") for mode in ("RGB", "L", "CMYK")},
    **{f"{mode} BMP": encoded(noise(37, 29, mode), "BMP") for mode in ("RGB", "L", "P", "1")},
    "progressive JPEG": encoded(noise(37, 29), "JPEG", progressive=True),
    "GIF": encoded(noise(37, 29, "P"), "GIF"),
    "interlaced GIF": encoded(noise(37, 29, "L"), "GIF", interlace=True),
    "WEBP": encoded(noise(37, 29), "WEBP"),
    "lossless WEBP": encoded(noise(37, 29), "WEBP", lossless=True),
    "16 bits, grey PNG": encoded(deep("uint16")),
    "16 bits, grey TIFF": encoded(deep("uint16"), "TIFF"),
    "32 bits TIFF": encoded(deep("int32"), "TIFF"),
    "float TIFF": encoded(deep("float32"), "TIFF"),
    "LZW TIFF": encoded(noise(37, 29), "TIFF", compression="tiff_lzw"),
    "16 bits, RGB PNG": SIXTEEN_BITS_RGB,
    **{f"orientation {i} JPEG": turned(i) for i in range(1, 9)},
    **{f"orientation 6 {kind}": turned(6, kind) for kind in ("PNG", "WEBP", "TIFF")},
}


@pytest.mark.parametrize("name", OPAQUE)
def test_opaque_pictures_are_those_of_transformers(name: str) -> None:
    data = OPAQUE[name]
    with Image.open(BytesIO(data)) as opened:
        expected = np.asarray(load_image(opened))
    assert np.array_equal(decoded(data), expected)
    if "16 bits, RGB" not in name:
        assert len(np.unique(expected)) > 1


def test_orientation_is_applied() -> None:
    assert decoded(turned(1)).shape == (23, 40, 3)
    assert decoded(turned(6)).shape == (40, 23, 3)
    assert np.array_equal(decoded(turned(3)), decoded(turned(1))[::-1, ::-1])


def test_further_pictures_in_a_photograph_are_left_out() -> None:
    first, second = noise(37, 29), noise(37, 29, seed=1)
    file = BytesIO()
    first.save(file, "MPO", save_all=True, append_images=[second])
    assert np.array_equal(decoded(file.getvalue()), decoded(encoded(first, "JPEG")))


def with_clear_colour(mode: str) -> bytes:
    image = Image.new(mode, (9, 5), 1)
    if mode == "P":
        image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((4, 2), (0, 0, 0) if mode == "RGB" else 0)
    return encoded(image, transparency=(0, 0, 0) if mode == "RGB" else 0)


def test_alpha_is_over_white() -> None:
    image = noise(37, 29, "RGBA")
    values = np.asarray(image).astype(float)
    alpha = values[..., 3:] / 255
    expected = values[..., :3] * alpha + 255 * (1 - alpha)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        found = decoded(encoded(image, kind, **options))
        assert np.abs(found - expected).max() <= 1
    clear = Image.new("RGBA", (9, 5), (200, 10, 30, 0))
    assert (decoded(encoded(clear)) == 255).all()
    assert (decoded(encoded(clear.convert("LA"))) == 255).all()
    for mode in ("L", "P", "RGB"):
        found = decoded(with_clear_colour(mode))
        assert (found[2, 4] == 255).all(), mode
        assert (found[0, 0] != 255).any(), mode
    gif = encoded(Image.new("P", (9, 5), 3), "GIF", transparency=3)
    assert (decoded(gif) == 255).all()


# ---------------------------------------------------------------- limits


def png(width: int, height: int) -> bytes:
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + body
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
    data += struct.pack(">I", zlib.crc32(chunk))
    idat = b"IDAT" + zlib.compress(bytes(1000))
    return data + struct.pack(">I", len(idat) - 4) + idat + struct.pack(">I", zlib.crc32(idat))


def resized(kind: str, old: bytes, new: bytes, **options: object) -> bytes:
    data = encoded(Image.new("RGB", (1234, 7)), kind, **options)
    assert old in data
    return data.replace(old, new, 1)


BOMBS = {
    "PNG": png(100_000, 100_000),
    "GIF": b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\2\x44\1\0;",
    "JPEG": resized("JPEG", struct.pack(">HH", 7, 1234), b"\xff\xdc\xff\xdc"),
    "BMP": resized("BMP", struct.pack("<II", 1234, 7), struct.pack("<II", 100_000, 100_000))[:999],
    "WEBP": resized("WEBP", struct.pack("<HH", 1234, 7), b"\xff\x3f\xff\x3f"),
    "TIFF": b"II*\0\x08\0\0\0\x02\0"
    + struct.pack("<HHIIHHII", 256, 4, 1, 100_000, 257, 4, 1, 100_000),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_costs_nothing(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    assert len(BOMBS[kind]) < 2000
    started = time.process_time()
    problem = refused(BOMBS[kind], max_pixels=100 * MEGA)
    assert time.process_time() - started < 0.5
    # Three formats check sizes of their own while they read the header.
    expected = r"(it has \d+ x \d+ pixels, at most 100000000 and 65535 a side|is a broken)"
    assert re.search(expected, problem)


def test_a_side_has_a_limit() -> None:
    data = png(65_536, 1)
    assert "it has 65536 x 1 pixels, at most 1000000 and 65535 a side" in refused(data)


def test_pixels_and_bytes_have_limits() -> None:
    data = encoded(noise(50, 40))
    assert decoded(data, max_bytes=len(data), max_pixels=2000).shape == (40, 50, 3)
    assert "it has 50 x 40 pixels, at most 1999" in refused(data, max_pixels=1999)
    problem = f"it has {len(data)} bytes, at most {len(data) - 1} are allowed"
    assert problem in refused(data, max_bytes=len(data) - 1)


def test_between_pillows_limit_and_ours_nothing_warns() -> None:
    """Pillow warns of images of 90 megapixels, which the default limit allows."""
    data = encoded(Image.new("1", (9500, 9500)))
    assert decode(data, MEGA, 100 * MEGA, 1).size == (9500, 9500)


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    checksum = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


PNG = encoded(noise(8, 8))
JPEG = encoded(noise(8, 8), "JPEG")
FLOODS = {
    "PNG before the pixels": PNG[:33] + chunk(b"prVt") * 100_000 + PNG[33:],
    "PNG after the pixels": PNG[:-12] + chunk(b"prVt") * 100_000 + PNG[-12:],
    "JPEG": JPEG[:2] + b"\xff\xe5\0\2" * 300_000 + JPEG[2:],
}


@pytest.mark.parametrize("kind", FLOODS)
def test_what_surrounds_the_pixels_has_a_limit_of_time(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(_Timed, "seconds", 0.02)
    assert "it takes longer to read than 0.0 s" in refused(FLOODS[kind], max_bytes=2 * MEGA)


def tiff(tag: int, kind: int, length: int) -> bytes:
    """A directory of one entry, with its values, each of one byte, behind it."""
    header = struct.pack("<2sHIHHHII4x", b"II", 42, 8, 1, tag, kind, length, 26)
    return header + bytes(length)


def test_a_tiff_has_a_limit_of_numbers() -> None:
    assert "more than 262144 TIFF numbers" in refused(tiff(273, 4, 262145))
    assert "is a broken" in refused(tiff(273, 4, 262144))
    assert "is a broken" in refused(tiff(700, 1, 262145))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_has_a_limit(kind: str) -> None:
    """Pillow makes an object of each number of a value, wherever the orientation is looked for."""
    exif = tiff(0x0112, 1, MAX_EXIF_BYTES)
    if kind == "JPEG":
        part = b"Exif\0\0" + bytes(65000)
        segment = b"\xff\xe1" + struct.pack(">H", 2 + len(part)) + part
        data = JPEG[:2] + segment * 17 + JPEG[2:]
    elif kind == "PNG":
        data = PNG[:-12] + chunk(b"eXIf", exif) + PNG[-12:]
    else:
        data = encoded(noise(8, 8), kind, exif=exif)
    assert re.search(
        r"more than (1048576 bytes|16 parts) of EXIF", refused(data, max_bytes=2 * MEGA)
    )


def test_wrong_directories_are_not_told() -> None:
    """Pillow warns of each entry; a file may have thousands, each with a text of its own."""
    png = PNG[:-12] + chunk(b"eXIf", tiff(0x0112, 1, 100)[:-1]) + PNG[-12:]
    code = "import sys; from gllm_engine.images.decode import decode; "
    code += "print(decode(sys.stdin.buffer.read(), 10**6, 10**6, 1).size)"
    ran = subprocess.run([sys.executable, "-c", code], input=png, capture_output=True, check=True)
    assert (ran.stdout, ran.stderr) == (b"(8, 8)\n", b"")


def test_a_jpeg_of_many_scans_is_refused() -> None:
    data = encoded(noise(64, 64), "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    scan = data[at:-2]
    assert decoded(data).shape == (64, 64, 3)
    assert "more than 100 scans" in refused(data[:at] + scan * MAX_SCANS + data[-2:])


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_are_refused(kind: str) -> None:
    frames = [noise(20, 20, seed=seed) for seed in range(3)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert "it is animated, only one frame is allowed" in refused(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"%PDF-1.7 and so on",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        encoded(noise(9, 9), "PPM"),
        encoded(noise(9, 9), "ICO"),
        encoded(noise(9, 9), "JPEG2000"),
        encoded(noise(9, 9), "TGA"),
    ],
)
def test_other_formats_are_refused(data: bytes) -> None:
    problem = refused(data)
    assert "it is none of JPEG, PNG, WEBP, GIF, BMP and TIFF, it begins with b" in problem
    assert len(problem) < 200


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files_are_refused(kind: str) -> None:
    data = encoded(noise(60, 50), kind)
    for size in (16, 40, len(data) // 2, len(data) * 9 // 10):
        assert f"it is a broken or truncated {kind} file (" in refused(data[:size])


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch) -> None:
    processor = read(checkpoint(tmp_path, "qwen3_vl"))
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.delitem(sys.modules, "gllm_engine.images.decode")
    with pytest.raises(InvalidField, match="images need Pillow, .* the extra 'images'"):
        processor.prepare(b"")


# ---------------------------------------------------------------- broken files

SEEDS = [
    *(encoded(noise(64, 48), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")),
    encoded(noise(64, 48), "JPEG", progressive=True),
    encoded(noise(64, 48, "RGBA"), "WEBP", lossless=True),
    encoded(noise(64, 48), "TIFF", compression="tiff_deflate"),
    encoded(noise(64, 48, "P"), "PNG", transparency=3),
    turned(6),
]


def broken(data: bytes, random: np.random.Generator) -> bytes:
    """The file with bytes changed, left out or repeated; mostly near its beginning."""
    values = bytearray(data)
    for _ in range(random.integers(1, 6)):
        at = int(len(values) * random.random() ** 3)
        match random.integers(4):
            case 0:
                values[at : at + 1] = bytes([random.integers(256)])
            case 1:
                values[at : at + 4] = random.bytes(4)
            case 2:
                del values[at : at + int(random.integers(1, 40))]
            case 3:
                values[at:at] = values[: int(random.integers(1, 400))]
    return bytes(values)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(len(SEEDS)))
def test_broken_files_give_an_image_or_an_error(tmp_path: Path, seed: int) -> None:
    path = checkpoint(tmp_path, "kimi_k25")
    limits = {"image_max_pixels": 100_000, "max_image_megapixels": 4}
    processor = read(path, **limits)
    random = np.random.default_rng(seed)
    outcomes = {True: 0, False: 0}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(500):
        started = time.process_time()
        try:
            image = processor.prepare(broken(SEEDS[seed], random), 5)
        except InvalidField as error:
            assert re.match("image: image 5: it [ -~]+$", str(error))
            outcomes[False] += 1
        else:
            assert len(image.pixels) == image.height * image.width * 3
            outcomes[True] += 1
        assert time.process_time() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000  # KiB
    assert outcomes[False] > 10


def test_the_formats_are_those_that_errors_name() -> None:
    assert [kind.format for kind in FORMATS.values()] == [
        "JPEG",
        "PNG",
        "WEBP",
        "GIF",
        "BMP",
        "TIFF",
        "TIFF",
    ]


# ---------------------------------------------------------------- memory

PEAK = """
import re, sys
from pathlib import Path
from gllm_engine.images import ImageProcessor
from gllm_engine.images.resize import PixelRange

def kilobytes(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))

few, many = (Path(name).read_bytes() for name in sys.argv[1:3])
pixels = int(sys.argv[3])
processor = ImageProcessor(PixelRange(28, pixels, pixels), 7, None, 1 << 30, 1 << 30)
processor.prepare(few)
Path("/proc/self/clear_refs").write_text("5")
before = kilobytes("VmRSS")
reserved = []
processor.prepare(many, reserve=reserved.append)
print(kilobytes("VmHWM") - before, sum(reserved) >> 10)
"""


@pytest.mark.parametrize(
    ("kind", "mode", "options", "pixels"),
    [
        ("JPEG", "CMYK", {"progressive": True}, 1 << 18),
        ("BMP", "RGB", {}, 1 << 23),
        ("PNG", "RGBA", {"compress_level": 1}, 1 << 18),
        ("WEBP", "RGBA", {"lossless": True, "quality": 0, "method": 0}, 1 << 18),
    ],
)
def test_memory_of_decoding_is_reserved(
    tmp_path: Path, kind: str, mode: str, options: dict[str, object], pixels: int
) -> None:
    files = [tmp_path / "few", tmp_path / "many"]
    for file, side in zip(files, (28, 1400), strict=True):
        file.write_bytes(encoded(noise(side, side, mode), kind, **options))
    command = [sys.executable, "-c", PEAK, *map(str, files), str(pixels)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, reserved = map(int, done.stdout.split())
    assert 0.6 * reserved < peak < 1.05 * reserved


def test_what_there_is_no_room_for_is_not_decoded() -> None:
    def refuse(size: int) -> None:
        assert size == 13 * 64 * 64
        raise EngineUnavailable

    data = encoded(noise(64, 64))
    with pytest.raises(EngineUnavailable):  # it is not a broken file
        decode(data[: len(data) // 2], MEGA, MEGA, 1, refuse)
    with pytest.raises(InvalidField, match="pixels, at most 1000 and"):
        decode(data, MEGA, 1000, 1, refuse)

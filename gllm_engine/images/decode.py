"""Decodes an image file, which is untrusted, to RGB.

Only the decoders of the six formats below are reachable. This module and pixels.py import Pillow,
so they are imported when an image is decoded.
"""

from __future__ import annotations

import warnings
from io import BytesIO
from struct import unpack_from
from time import thread_time

from PIL import Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from gllm_engine.files import shown
from gllm_engine.images.resize import MAX_SIDE
from gllm_engine.images.video import Reserve
from gllm_engine.sampling import InvalidField

# Each wrong entry of a file's directory has a text of its own, which Python would keep for ever.
warnings.filterwarnings("ignore", module=r"PIL\.\w+ImagePlugin")

# Image.open tries every format that it knows, and has a limit of pixels for the whole process.
# A photograph with further pictures in it (MPO) is a JPEG here: the first picture counts.
FORMATS: dict[bytes, type[ImageFile]] = {
    b"\xff\xd8\xff": JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"RIFF": WebPImageFile,
    b"GIF8": GifImageFile,
    b"BM": BmpImageFile,
    b"II*\0": TiffImageFile,
    b"MM\0*": TiffImageFile,
}
# Each scan of a JPEG changes all pixels and may take a few bytes; encoders write about ten.
MAX_SCANS = 100
START_OF_SCAN = b"\xff\xda"
# Pillow reads what surrounds the pixels in Python, and other threads wait meanwhile.
MAX_EXIF_BYTES = 1 << 20
EXIF = b"Exif\0\0"  # begins a part of a JPEG's, of up to 64 KiB; all parts are joined
MAX_TIFF_NUMBERS = 1 << 18  # two for each strip
BYTE_KINDS = (1, 2, 6, 7)  # types of TIFF's values that are not turned into numbers one by one
OPEN_S = 1.0  # a common file takes milliseconds
DECODE_S_PER_PIXEL = 2e-7
# Of memory for a pixel at most, measured with Pillow 13: with transparency, and for WEBP, whose
# decoder keeps four images.
DECODED_BYTES = 13
WEBP_BYTES = 25


class _Timed(BytesIO):
    """A file that may be read until the thread has computed for `seconds`."""

    seconds = OPEN_S

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self._began = thread_time()
        self._name = name

    def read(self, size: int | None = -1, /) -> bytes:
        if thread_time() - self._began > self.seconds:
            problem = f"it takes longer to read than {self.seconds:.1f} s"
            raise InvalidField("image", f"{self._name} {problem}")
        return super().read(size)


def decode(
    data: bytes, max_bytes: int, max_pixels: int, number: int, reserve: Reserve = lambda size: None
) -> Image.Image:
    """The image in a file as an RGB image, upright by its EXIF orientation, on white.

    Colours are converted as transformers does. `number` names the image in errors. Sizes are
    checked, and memory is reserved, before pixels are decoded. Raises InvalidField, and what
    `reserve` raises.
    """
    name = f"image {number}:"
    if len(data) > max_bytes:
        raise InvalidField(
            "image", f"{name} it has {len(data)} bytes, at most {max_bytes} are allowed"
        )
    kind = next((kind for start, kind in FORMATS.items() if data.startswith(start)), None)
    if kind is None:
        raise InvalidField(
            "image",
            f"{name} it is none of JPEG, PNG, WEBP, GIF, BMP and TIFF, it begins with "
            f"{shown(data[:16])}",
        )
    try:
        _check_header(data, kind, name)
        source = _Timed(data, name)
        with kind(source) as file:
            _check(file, data, max_pixels, name)
            pixels = file.width * file.height
            reserve(pixels * (WEBP_BYTES if kind is WebPImageFile else DECODED_BYTES))
            source.seconds += pixels * DECODE_S_PER_PIXEL
            file.load()  # EXIF may follow the pixels
            if len(file.info.get("exif", b"")) > MAX_EXIF_BYTES:
                raise InvalidField(
                    "image", f"{name} it has more than {MAX_EXIF_BYTES} bytes of EXIF"
                )
            ImageOps.exif_transpose(file, in_place=True)  # otherwise it copies upright images too
            return _rgb(file)
    except Exception as error:
        if type(error).__module__.startswith("gllm_engine."):  # ours, not of a broken file
            raise
        raise InvalidField(
            "image", f"{name} it is a broken or truncated {kind.format} file ({shown(str(error))})"
        ) from None


def _check_header(data: bytes, kind: type[ImageFile], name: str) -> None:
    """Raises InvalidField for what Pillow would compute on for long before it knows the size."""
    if kind is JpegImageFile and data.count(EXIF) > MAX_EXIF_BYTES >> 16:
        raise InvalidField("image", f"{name} it has more than {MAX_EXIF_BYTES >> 16} parts of EXIF")
    if kind is TiffImageFile:
        order = "<" if data[:2] == b"II" else ">"
        (start,) = unpack_from(order + "I", data, 4)
        (count,) = unpack_from(order + "H", data, start)
        numbers = 0
        for entry in range(count):
            _, type_, length = unpack_from(order + "HHI", data, start + 2 + 12 * entry)
            numbers += 0 if type_ in BYTE_KINDS else length
        if numbers > MAX_TIFF_NUMBERS:
            raise InvalidField("image", f"{name} it has more than {MAX_TIFF_NUMBERS} TIFF numbers")


def _check(file: ImageFile, data: bytes, max_pixels: int, name: str) -> None:
    """Raises InvalidField for what must not be decoded."""
    width, height = file.size
    if width * height > max_pixels or max(file.size) > MAX_SIDE:
        raise InvalidField(
            "image",
            f"{name} it has {width} x {height} pixels, at most {max_pixels} and {MAX_SIDE} a side "
            "are allowed",
        )
    if getattr(file, "is_animated", False):  # formats without frames do not have it
        raise InvalidField("image", f"{name} it is animated, only one frame is allowed")
    if file.format == "JPEG" and data.count(START_OF_SCAN) > MAX_SCANS:
        raise InvalidField("image", f"{name} it has more than {MAX_SCANS} scans")


def _rgb(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white

"""Decodes an image file, which is untrusted, to RGB.

Only the decoders of the six formats below are reachable. This module is the one that imports
Pillow, so it is imported when an image is decoded.
"""

from __future__ import annotations

from io import BytesIO

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
from gllm_engine.sampling import InvalidField

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


def decode(data: bytes, max_bytes: int, max_pixels: int, number: int) -> Image.Image:
    """The image in a file as an RGB image, upright by its EXIF orientation, on white.

    Colours are converted as transformers does. `number` names the image in errors. Sizes are
    checked before pixels are decoded. Raises InvalidField.
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
        with kind(BytesIO(data)) as file:
            _check(file, data, max_pixels, name)
            ImageOps.exif_transpose(file, in_place=True)  # otherwise it copies upright images too
            return _rgb(file)
    except InvalidField:
        raise
    except Exception as error:  # Pillow raises any error about a broken file
        raise InvalidField(
            "image", f"{name} it is a broken or truncated {kind.format} file ({shown(str(error))})"
        ) from None


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
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white

"""Decoding of images, the same for checks, training and rollouts."""

import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

# Formats of published data, whatever their extensions say; none that starts another program for decoding.
FORMATS = ("WEBP", "JPEG", "PNG", "GIF", "BMP", "TIFF")
LARGEST_PIXELS = 2**26  # 8192 x 8192, 200 MB decoded; published images have one or two million
LARGEST_ASPECT_RATIO = 200  # Qwen2.5-VL's processor refuses more
BACKGROUND = (255, 255, 255)  # behind transparent pixels: white, as on the page that annotators saw


@dataclass(frozen=True)
class Images:
    """Images by name, of which only the sizes need to be in memory."""

    sizes: dict[str, tuple[int, int]]
    """Width and height of each image in pixels."""
    read: Callable[[str], Image.Image]
    """Decode the image of this name to RGB."""


class UnreadableImageError(ValueError):
    """An image that cannot be decoded completely or shown to the policy; says why."""


def decoded(data: bytes) -> Image.Image:
    """Decode an image to RGB: upright by its EXIF orientation, on a white background, 16 bits by their high byte.

    Only the first frame is decoded; colour profiles are not applied.

    Raises:
        UnreadableImageError: the image is empty, cut off, damaged, of no known format, larger than LARGEST_PIXELS, or
            narrower than the policy's processor accepts.
    """
    if not data:
        raise UnreadableImageError("empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_size(*image.size)
                if image.format != "PNG":  # the only format with checksums that verify() reads
                    return _upright_rgb(image)
                image.verify()
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:  # verify() leaves the image unusable
                return _upright_rgb(image)
    except (UnreadableImageError, MemoryError):
        raise
    except Exception as error:  # PIL raises anything at a damaged file: struct.error, TypeError, KeyError, ...
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from None


def in_memory(images: Mapping[str, Image.Image]) -> Images:
    """Decoded images, as engines take them."""
    return Images({name: image.size for name, image in images.items()}, images.__getitem__)


def _check_size(width: int, height: int) -> None:
    if width * height > LARGEST_PIXELS:
        raise UnreadableImageError(f"{width} x {height} pixels are more than {LARGEST_PIXELS}: a decompression bomb")
    if max(width, height) > LARGEST_ASPECT_RATIO * min(width, height):
        raise UnreadableImageError(f"{width} x {height} pixels are narrower than {LARGEST_ASPECT_RATIO}:1")


def _upright_rgb(image: Image.Image) -> Image.Image:
    ImageOps.exif_transpose(image, in_place=True)  # without a copy if it is upright already
    if image.mode.startswith("I;16"):
        # PIL would clip these to 255; of a 16-bit colour image it takes the high byte.
        values = np.asarray(image)
        grey = (values >> 8).astype(np.uint8)
        if "transparency" in image.info:
            grey[values == image.info["transparency"]] = BACKGROUND[0]
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise UnreadableImageError(f"pixels of type {image.mode} have no stated range")
    if image.has_transparency_data:
        return Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")

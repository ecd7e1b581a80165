"""Encoded images become the right pixels, or are refused with a reason; nothing else is ever raised."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from workflow_scripts.preferences.images import (
    LARGEST_ASPECT_RATIO,
    LARGEST_PIXELS,
    UnreadableImageError,
    decoded,
)

RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)  # 9 wide, 6 high
FORMATS = ["WEBP", "JPEG", "PNG"]


def encoded(image: Image.Image, image_format: str, **options: Any) -> bytes:
    """An image file."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def png(values: np.ndarray, colour_type: int, transparent: bytes = b"") -> bytes:
    """A PNG of 16 bits for each channel, written by hand: PIL writes none of colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + (chunk(b"tRNS", transparent) if transparent else b"")
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def pixels(data: bytes) -> np.ndarray:
    """(height, width, 3) as whole numbers that can be subtracted."""
    image = decoded(data)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("image_format", FORMATS)
def test_plain_images_are_what_pil_decodes(image_format: str) -> None:
    """Published images are RGB: not one pixel differs from the plain conversion."""
    data = encoded(Image.fromarray(RGB), image_format)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert (pixels(data) == expected).all() and expected.shape == RGB.shape


@pytest.mark.parametrize("mode", ["L", "1", "P", "YCbCr"])
def test_other_opaque_modes_are_what_pil_converts(mode: str) -> None:
    """Grey, black and white, a palette, JPEG's own colours."""
    image = Image.fromarray(RGB).convert(mode)
    data = encoded(image, "JPEG" if mode == "YCbCr" else "PNG", **({"quality": 100} if mode == "YCbCr" else {}))
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert (pixels(data) == expected).all()


def test_cmyk_is_converted_by_its_definition() -> None:
    """RGB = (255 - CMY) (255 - K) / 255, from a file that stores it as it is and from one that stores it inverted."""
    inks = np.random.default_rng(1).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    expected = (255 - inks[..., :3].astype(int)) * (255 - inks[..., 3:].astype(int)) / 255
    assert np.abs(pixels(encoded(Image.fromarray(inks, "CMYK"), "TIFF")) - expected).max() <= 1
    flat = np.full((8, 8, 4), (10, 200, 90, 40), np.uint8)
    red, green, blue = (255 - np.array((10, 200, 90))) * (255 - 40) / 255
    assert np.abs(pixels(encoded(Image.fromarray(flat, "CMYK"), "JPEG", quality=100)) - (red, green, blue)).max() <= 4


@pytest.mark.parametrize("kind", ["grey", "grey, alpha", "colour", "colour, alpha", "TIFF"])
def test_16_bits_are_scaled_and_not_clipped(kind: str) -> None:
    """A ramp over all 16 bits is a ramp over all 8."""
    ramp = np.linspace(0, 65535, 512).round().astype(np.uint16)[None].repeat(4, 0)
    channels = {"grey": 1, "grey, alpha": 2, "colour": 3, "colour, alpha": 4, "TIFF": 1}[kind]
    values = np.stack([ramp] * channels, -1)
    if "alpha" in kind:
        values[..., -1] = 65535
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    data = encoded(Image.fromarray(ramp), "TIFF") if kind == "TIFF" else png(values, colour_type)
    found = pixels(data)
    assert np.abs(found - (ramp / 257)[..., None]).max() <= 1
    assert found[0, 0].tolist() == [0, 0, 0] and found[0, -1].tolist() == [255, 255, 255]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_stated_range_are_refused(dtype: Any) -> None:
    """32 bits may mean anything."""
    with pytest.raises(UnreadableImageError, match="no stated range"):
        decoded(encoded(Image.fromarray(RGB[..., 0].astype(dtype)), "TIFF"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_is_composed_on_white(mode: str) -> None:
    """Also where the colour under a transparent pixel is something else."""
    alpha = np.random.default_rng(2).integers(0, 256, RGB.shape[:2], dtype=np.uint8)
    alpha[0], alpha[1] = 0, 255
    rgba = Image.fromarray(np.dstack([RGB, alpha]))
    if mode == "PA":
        palette = rgba.quantize(200)
        data = encoded(palette, "PNG")
        assert Image.open(io.BytesIO(data)).mode == "P" and "transparency" in Image.open(io.BytesIO(data)).info
        rgba = palette.convert("RGBA")
    elif mode == "LA":
        data = encoded(rgba.convert("LA"), "PNG")
        rgba = rgba.convert("LA").convert("RGBA")
    else:
        data = encoded(rgba, "PNG")
    shown = np.asarray(rgba).astype(float)
    share = shown[..., 3:] / 255
    expected = shown[..., :3] * share + 255 * (1 - share)
    assert np.abs(pixels(data) - expected).max() <= 1
    assert (pixels(data)[0] == 255).all() or mode == "PA"


def test_an_opaque_alpha_changes_nothing() -> None:
    """As for most PNG and WebP files that have one."""
    image = Image.fromarray(RGB)
    for image_format, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        assert (pixels(encoded(image.convert("RGBA"), image_format, **options)) == RGB).all()


def test_a_transparent_grey_of_16_bits_is_white() -> None:
    """PNG names one value that is transparent; its high byte alone does not make a pixel so."""
    values = np.array([[0, 1000, 1001, 65535]], np.uint16)
    found = pixels(png(values[..., None], 0, transparent=struct.pack(">H", 1000)))
    assert found[0, :, 0].tolist() == [0, 255, 1001 >> 8, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation: int) -> None:
    """As in EXIF's table: where row 0 and column 0 of what is stored stand when it is shown."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(RGB), "PNG", exif=exif)
    upright = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: RGB[::-1].transpose(1, 0, 2),
        7: RGB[::-1, ::-1].transpose(1, 0, 2),
        8: RGB[:, ::-1].transpose(1, 0, 2),
    }[orientation]
    assert np.array_equal(pixels(data), upright)


def test_the_extension_does_not_matter() -> None:
    """A format is known by its content: GIF, BMP and TIFF are read under any name, other formats never."""
    image = Image.fromarray(RGB)
    for image_format in ("BMP", "TIFF"):
        assert (pixels(encoded(image, image_format)) == RGB).all()
    assert pixels(encoded(image.quantize(), "GIF", save_all=True, append_images=[image.quantize()])).shape == RGB.shape
    for image_format in ("PPM", "EPS", "PDF", "ICO"):
        with pytest.raises(UnreadableImageError, match="UnidentifiedImageError"):
            decoded(encoded(image, image_format))


@pytest.mark.parametrize("image_format", FORMATS)
def test_cut_off_images_are_unreadable(image_format: str) -> None:
    """Half an image opens, but does not decode."""
    data = encoded(Image.effect_noise((64, 64), 90).convert("RGB"), image_format)
    with pytest.raises(UnreadableImageError):
        decoded(data[: len(data) // 2])


@pytest.mark.parametrize(("data", "reason"), [(b"", "empty"), (b"not an image", "UnidentifiedImageError")])
def test_reason_is_said(data: bytes, reason: str) -> None:
    """Empty files and other files."""
    with pytest.raises(UnreadableImageError, match=reason):
        decoded(data)


def test_one_pixel_is_an_image() -> None:
    """The processor makes it as large as it needs it."""
    assert pixels(encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")).tolist() == [[[1, 2, 3]]]


def test_the_narrowest_image() -> None:
    """Two hundred to one is read, 201 and 20,000 to one are not, lying or standing."""
    for size in ((200, 1), (1, 200), (2000, 10)):
        assert decoded(encoded(Image.new("RGB", size), "PNG")).size == size
    for width, height in ((201, 1), (1, 201), (20_000, 1), (1, 20_000)):
        with pytest.raises(UnreadableImageError, match=f"{width} x {height} pixels are narrower than 200:1"):
            decoded(encoded(Image.new("RGB", (width, height)), "PNG"))


def bomb(width: int, height: int) -> bytes:
    """The header of a PNG of one bit for each pixel, with some of its data."""
    data = encoded(Image.new("1", (64, 64)), "PNG")
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


@pytest.mark.parametrize("side", [8193, 9000, 12_000, 2**16, 2**31 - 1])
def test_decompression_bombs_are_unreadable(side: int) -> None:
    """Known by the size in the header, below PIL's own limits, at its warning and at its error: never decoded."""
    with pytest.raises(UnreadableImageError, match=r"bomb|Bomb"):
        decoded(bomb(side, side))


def test_the_largest_image_is_read() -> None:
    """8192 x 8192 is not yet a bomb."""
    side = int(LARGEST_PIXELS**0.5)
    assert side * side == LARGEST_PIXELS
    assert decoded(encoded(Image.new("1", (side, side)), "PNG")).size == (side, side)


def samples() -> dict[str, bytes]:
    """One small file of each kind."""
    image = Image.fromarray(RGB)
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        **{image_format: encoded(image, image_format, exif=exif) for image_format in ("WEBP", "JPEG", "PNG", "TIFF")},
        **{
            f"palette {image_format}": encoded(image.quantize(), image_format) for image_format in ("PNG", "GIF", "BMP")
        },
        "CMYK": encoded(image.convert("CMYK"), "JPEG"),
        "alpha": encoded(image.convert("RGBA"), "WEBP"),
        "16 bit": png(RGB[..., :1].astype(np.uint16) * 257, 0, transparent=b"\0\1"),
        "progressive": encoded(image, "JPEG", progressive=True),
    }


SAMPLES = samples()
MUTATIONS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=4)), min_size=1, max_size=6
)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(deadline=None, max_examples=3000)
@given(
    data=st.one_of(
        st.binary(max_size=200),
        st.tuples(st.sampled_from(sorted(SAMPLES)), MUTATIONS, st.none() | st.floats(0, 1)),
    )
)
def test_any_bytes_are_an_image_or_unreadable(data: Any) -> None:
    """Random bytes, and files of every kind with changed bytes and cut ends."""
    if not isinstance(data, bytes):
        kind, changes, cut = data
        content = bytearray(SAMPLES[kind])
        for place, new in changes:
            at = int(place * len(content))
            content[at : at + len(new)] = new
        data = bytes(content[: None if cut is None else int(cut * len(content))])
    try:
        image = decoded(data)
    except UnreadableImageError as error:
        assert str(error)
    else:
        assert image.mode == "RGB" and image.width * image.height <= LARGEST_PIXELS
        assert max(image.size) <= LARGEST_ASPECT_RATIO * min(image.size)

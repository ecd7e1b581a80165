"""Images out of the published archives: streamed, nothing is unpacked to disk, and only wanted images are read."""

import io
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from PIL import Image


class UnreadableImageError(ValueError):
    """An image that cannot be decoded completely; says why."""


def iter_images(archive: Path, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    """Stream wanted images of a .zip or .tar.gz archive, in the order of the archive.

    Args:
        archive: the file.
        wanted: base names of the images; a name that the archive holds twice is read once.

    Yields:
        Base name and encoded bytes; no bytes for a member that the archive holds damaged.
    """
    members = _zip_members(archive, wanted) if archive.suffix == ".zip" else _tar_members(archive, wanted)
    missing = set(wanted)
    for name, data in members:
        if name in missing:
            missing.remove(name)
            yield name, data
        if not missing:
            return


def _zip_members(archive: Path, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            name = PurePosixPath(member.filename).name
            if name in wanted and not member.is_dir():
                try:
                    yield name, file.read(member)
                except (zipfile.BadZipFile, zlib.error):  # checksum or compressed stream of this member only
                    yield name, b""


def _tar_members(archive: Path, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(archive, "r|gz") as file:
        for member in file:
            name = PurePosixPath(member.name).name
            if name in wanted and member.isfile():
                content = file.extractfile(member)
                assert content is not None  # a regular file
                yield name, content.read()
            file.members = []  # type: ignore[attr-defined]  # 400,000 of them must not pile up


def decoded_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels of an image that decodes completely.

    Raises:
        UnreadableImageError: the image is empty, cut off, damaged, of no known format, or too large to be honest.
    """
    if not data:
        raise UnreadableImageError("empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                image.verify()
            with Image.open(io.BytesIO(data)) as image:  # verify() leaves the image unusable
                image.load()
                return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from None

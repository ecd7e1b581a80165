"""Images from the published archives: streamed, without unpacking to disk, and only the wanted ones.

Members are known by their base name, and none is ever written: the folder in a name has no effect.
"""

import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from workflow_scripts.preferences.images import UnreadableImageError

LARGEST_MEMBER = 2**26  # bytes, 64 MiB; a published image has some hundred thousand, a decompression bomb any number

DAMAGE_OF_A_MEMBER = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, struct.error)
DAMAGE = (*DAMAGE_OF_A_MEMBER, OSError, LookupError, OverflowError, TypeError, tarfile.TarError)


class ArchiveError(ValueError):
    """An archive that cannot be read: names the file and the remedy."""


def iter_images(archive: Path, wanted: set[str]) -> Iterator[tuple[str, bytes | UnreadableImageError]]:
    """Stream wanted images of a .zip or .tar.gz archive, in the order of the archive; any other file is one image.

    Args:
        archive: the file.
        wanted: base names of the images; a name that the archive holds twice is read once. For a file that is an image,
            the one name that it goes by.

    Yields:
        Base name and encoded bytes, or the reason why they cannot be read.

    Raises:
        ArchiveError: the file is no such archive, or is damaged before all wanted images were read.
    """
    if archive.suffix == ".zip":
        members = _zip_members(archive, wanted)
    elif archive.suffix == ".gz":
        members = _tar_members(archive, wanted)
    else:
        members = _image_file(archive, wanted)
    missing = set(wanted)
    try:
        for name, data in members:
            if name in missing:
                missing.remove(name)
                yield name, data
            if not missing:
                return
    except DAMAGE as error:
        raise _archive_error(archive, error) from error


def member_names(archive: Path) -> list[str]:
    """Names of the members of a zip archive.

    Raises:
        ArchiveError: the file is no zip archive.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            return file.namelist()
    except DAMAGE as error:
        raise _archive_error(archive, error) from error


def _archive_error(archive: Path, error: Exception) -> ArchiveError:
    return ArchiveError(
        f"{archive} is no complete {'zip' if archive.suffix == '.zip' else 'tar.gz'} archive "
        f"({type(error).__name__}: {error}); delete it and the dataset.json of its data set, and run snakemake again; "
        "if it is published like this, use another revision of the data set"
    )


def _zip_members(archive: Path, wanted: set[str]) -> Iterator[tuple[str, bytes | UnreadableImageError]]:
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            name = PurePosixPath(member.filename).name
            if name in wanted and not member.is_dir():
                try:
                    with file.open(member) as content:
                        yield name, _bounded(content)
                except DAMAGE_OF_A_MEMBER as error:  # checksum, header or compressed stream of this member only
                    yield name, UnreadableImageError(f"{type(error).__name__}: {error}")


def _tar_members(archive: Path, wanted: set[str]) -> Iterator[tuple[str, bytes | UnreadableImageError]]:
    with tarfile.open(archive, "r|gz") as file:
        for member in file:
            name = PurePosixPath(member.name).name
            if name in wanted and member.isfile():
                content = file.extractfile(member)
                assert content is not None  # a regular file
                yield name, _bounded(content, member.size)
            file.members = []  # type: ignore[attr-defined]  # 400,000 members must not pile up


def _image_file(path: Path, wanted: set[str]) -> Iterator[tuple[str, bytes | UnreadableImageError]]:
    (name,) = wanted
    with path.open("rb") as content:
        yield name, _bounded(content)


def _bounded(content: IO[bytes], size: int = LARGEST_MEMBER) -> bytes | UnreadableImageError:
    # The reader of a tar allocates whatever is asked for: without the size, 64 MiB for every image.
    data = content.read(min(size, LARGEST_MEMBER) + 1)
    if len(data) > LARGEST_MEMBER:
        return UnreadableImageError(f"holds more than {LARGEST_MEMBER} bytes")
    return data

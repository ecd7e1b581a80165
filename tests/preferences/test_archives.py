"""Images out of zip and tar.gz: only wanted ones are read, damaged ones never crash."""

import io
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from workflow_scripts.preferences.archives import UnreadableImageError, decoded_size, iter_images

NAMES = ("a.webp", "b.webp", "c.webp")


def image_bytes(image_format: str = "WEBP", size: tuple[int, int] = (6, 4)) -> bytes:
    """Return a plain image."""
    buffer = io.BytesIO()
    Image.effect_noise(size, 90).convert("RGB").save(buffer, image_format)
    return buffer.getvalue()


def write_archive(path: Path, members: dict[str, bytes]) -> Path:
    """Write a zip or a tar.gz."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        return path
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz"])
@pytest.mark.parametrize("folder", ["", "train/"])
def test_wanted_images_by_base_name(name: str, folder: str, tmp_path: Path) -> None:
    """In the order of the archive, wherever the members stand; unknown names are not an error."""
    path = write_archive(tmp_path / name, {folder + image: image.encode() for image in NAMES})
    assert list(iter_images(path, {"c.webp", "a.webp", "unknown"})) == [("a.webp", b"a.webp"), ("c.webp", b"c.webp")]


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz"])
def test_a_name_twice_is_read_once(name: str, tmp_path: Path) -> None:
    """The first one counts."""
    path = write_archive(tmp_path / name, {"one/a.webp": b"first", "two/a.webp": b"second", "b.webp": b""})
    assert list(iter_images(path, {"a.webp", "b.webp"})) == [("a.webp", b"first"), ("b.webp", b"")]


def test_unwanted_zip_members_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the wanted member is opened."""
    path = write_archive(tmp_path / "x.zip", dict.fromkeys(NAMES, b"data"))
    opened: list[str] = []
    plain = zipfile.ZipFile.open

    def counting(self: zipfile.ZipFile, name: zipfile.ZipInfo, *rest: object, **options: object) -> object:
        opened.append(name.filename)
        return plain(self, name, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(zipfile.ZipFile, "open", counting)
    list(iter_images(path, {"b.webp"}))
    assert opened == ["b.webp"]


def test_tar_is_not_read_beyond_the_last_wanted_member(tmp_path: Path) -> None:
    """A tar.gz that is cut off serves what stands before it."""
    noise = {f"{i}": image_bytes("PNG", (200, 200)) for i in range(5)}
    path = write_archive(tmp_path / "x.tar.gz", {"a.webp": b"data", **noise})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert list(iter_images(path, {"a.webp"})) == [("a.webp", b"data")]
    with pytest.raises((EOFError, tarfile.ReadError)):
        list(iter_images(path, {"a.webp", "unknown"}))


def test_links_are_not_followed(tmp_path: Path) -> None:
    """Only regular files are images."""
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        link = tarfile.TarInfo("a.webp")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    assert list(iter_images(tmp_path / "x.tar.gz", {"a.webp"})) == []


def test_member_with_a_wrong_checksum_has_no_bytes(tmp_path: Path) -> None:
    """The other members are still read."""
    path = write_archive(tmp_path / "x.zip", {"a.webp": b"AAAA", "b.webp": b"BBBB"})
    path.write_bytes(path.read_bytes().replace(b"AAAA", b"ACAA"))
    assert list(iter_images(path, {"a.webp", "b.webp"})) == [("a.webp", b""), ("b.webp", b"BBBB")]


@pytest.mark.parametrize("image_format", ["WEBP", "JPEG", "PNG"])
def test_decoded_size(image_format: str) -> None:
    """Width comes first."""
    assert decoded_size(image_bytes(image_format)) == (6, 4)


@pytest.mark.parametrize("image_format", ["WEBP", "JPEG", "PNG"])
def test_cut_off_images_are_unreadable(image_format: str) -> None:
    """Half an image opens, but does not decode."""
    data = image_bytes(image_format, (64, 64))
    with pytest.raises(UnreadableImageError):
        decoded_size(data[: len(data) // 2])


@pytest.mark.parametrize(("data", "reason"), [(b"", "empty"), (b"not an image", "UnidentifiedImageError")])
def test_reason_is_said(data: bytes, reason: str) -> None:
    """Empty files and other files."""
    with pytest.raises(UnreadableImageError, match=reason):
        decoded_size(data)


def test_decompression_bombs_are_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning of PIL's is enough."""
    data = image_bytes("PNG", (20, 20))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with pytest.raises(UnreadableImageError, match="DecompressionBomb"):
        decoded_size(data)

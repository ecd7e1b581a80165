"""Images out of zip and tar.gz: only wanted ones are read, damaged ones never crash."""

import gzip
import io
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from workflow_scripts.preferences.archives import LARGEST_MEMBER, ArchiveError, iter_images, member_names
from workflow_scripts.preferences.images import UnreadableImageError, decoded

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
    with pytest.raises(
        ArchiveError, match=r"x\.tar\.gz is no complete tar\.gz archive .*; delete it and the dataset.json"
    ):
        list(iter_images(path, {"a.webp", "unknown"}))


def test_links_are_not_followed(tmp_path: Path) -> None:
    """Only regular files are images."""
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        link = tarfile.TarInfo("a.webp")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    assert list(iter_images(tmp_path / "x.tar.gz", {"a.webp"})) == []


def told(path: Path, wanted: set[str]) -> dict[str, bytes | str]:
    """Bytes of each wanted image, or the reason why there are none."""
    return {name: data if isinstance(data, bytes) else str(data) for name, data in iter_images(path, wanted)}


def test_member_with_a_wrong_checksum_has_no_bytes(tmp_path: Path) -> None:
    """The other members are still read."""
    path = write_archive(tmp_path / "x.zip", {"a.webp": b"AAAA", "b.webp": b"BBBB"})
    path.write_bytes(path.read_bytes().replace(b"AAAA", b"ACAA"))
    reason = "BadZipFile: Bad CRC-32 for file 'a.webp'"
    assert told(path, {"a.webp", "b.webp"}) == {"a.webp": reason, "b.webp": b"BBBB"}


def test_a_password_or_an_unknown_compression_is_a_reason(tmp_path: Path) -> None:
    """What zipfile cannot open is one unreadable image, not the end of the archive."""
    path = write_archive(tmp_path / "x.zip", {"a.webp": b"AAAA", "b.webp": b"BBBB"})
    plain = path.read_bytes()
    local, central = plain.index(b"PK\x03\x04"), plain.index(b"PK\x01\x02")
    for offset, value, reason in ((2, 1, "encrypted"), (4, 99, "compression")):
        data = bytearray(plain)
        data[local + 4 + offset], data[central + 6 + offset] = value, value
        path.write_bytes(data)
        found = told(path, {"a.webp", "b.webp"})
        assert reason in str(found["a.webp"]) and found["b.webp"] == b"BBBB"


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz"])
def test_names_that_lead_out_of_the_archive_write_nothing(name: str, tmp_path: Path) -> None:
    """Members are known by their base name and read into memory: a path in an archive is only a prefix."""
    names = ["../../a.webp", "/etc/b.webp", "c/../../c.webp", "C:\\d.webp", ".."]
    inside = tmp_path / "archives"
    inside.mkdir()
    path = write_archive(inside / name, {member: member.encode() for member in names})
    found = told(path, {"a.webp", "b.webp", "c.webp", "d.webp", ".."})
    assert found == {"a.webp": b"../../a.webp", "b.webp": b"/etc/b.webp", "c.webp": b"c/../../c.webp", "..": b".."}
    assert [file.name for file in tmp_path.rglob("*")] == ["archives", name]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_only_regular_members_of_a_tar_are_read(kind: bytes, tmp_path: Path) -> None:
    """A link of either kind, a pipe, a device or a folder with the name of an image is a missing image."""
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        member = tarfile.TarInfo("a.webp")
        member.type, member.linkname = kind, "/etc/hostname"
        tar.addfile(member)
    assert told(tmp_path / "x.tar.gz", {"a.webp"}) == {}


def test_a_symbolic_link_of_a_zip_is_its_text(tmp_path: Path) -> None:
    """It is read as the bytes it stands as, never followed."""
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        link = zipfile.ZipInfo("a.webp")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/hostname")
    assert told(tmp_path / "x.zip", {"a.webp"}) == {"a.webp": b"/etc/hostname"}


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz"])
def test_an_archive_in_an_archive_is_not_opened(name: str, tmp_path: Path) -> None:
    """What stands in an inner archive is missing, and an inner archive named like an image is no image."""
    inner = write_archive(tmp_path / "inner.zip", {"a.webp": image_bytes()}).read_bytes()
    path = write_archive(tmp_path / name, {"inner.zip": inner, "b.webp": inner})
    assert told(path, {"a.webp", "b.webp"}) == {"b.webp": inner}
    with pytest.raises(UnreadableImageError, match="UnidentifiedImageError"):
        decoded(inner)


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz"])
def test_the_order_of_the_members_does_not_matter(name: str, tmp_path: Path) -> None:
    """Neither an order other than the metadata's nor folders before, between or after their files."""
    members = {"train/c.webp": b"c", "train/": b"", "a.webp": b"a", "other/b.webp": b"b"}
    backwards = write_archive(tmp_path / name, dict(reversed(members.items())))
    assert told(backwards, set(NAMES)) == {"a.webp": b"a", "b.webp": b"b", "c.webp": b"c"}


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz"])
def test_a_bomb_is_not_unpacked(name: str, tmp_path: Path) -> None:
    """A member of 256 MB packed into one or two is read to the limit and no further; the next one is read whole."""
    path = tmp_path / name
    zeros = b"\0" * 2**20
    if name == "x.zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            with archive.open("a.webp", "w", force_zip64=True) as member:
                for _ in range(256):
                    member.write(zeros)
            archive.writestr("b.webp", b"b")
    else:
        with gzip.open(path, "wb", compresslevel=1) as packed:
            header = tarfile.TarInfo("a.webp")
            header.size = 2**28
            packed.write(header.tobuf())
            for _ in range(256):
                packed.write(zeros)
            header = tarfile.TarInfo("b.webp")
            header.size = 1
            packed.write(header.tobuf() + b"b".ljust(512, b"\0") + bytes(1024))
    assert path.stat().st_size < 2e6
    tracemalloc.start()
    found = told(path, {"a.webp", "b.webp"})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == {"a.webp": f"holds more than {LARGEST_MEMBER} bytes", "b.webp": b"b"}
    assert peak < 2**28


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz"])
@pytest.mark.parametrize(
    "content", [b"", b"no archive", b"\0" * 2000, b"PK\x05\x06", b"\x1f\x8b\x08\0", gzip.compress(b"x" * 999, mtime=0)]
)
def test_what_is_no_archive_is_said(name: str, content: bytes, tmp_path: Path) -> None:
    """The file and the remedy, for reading it and for listing it."""
    path = tmp_path / name
    path.write_bytes(content)
    message = rf"{name} is no complete (zip|tar\.gz) archive .* run snakemake again"
    with pytest.raises(ArchiveError, match=message):
        list(iter_images(path, {"a.webp"}))
    if name == "x.zip":
        with pytest.raises(ArchiveError, match=message):
            member_names(path)


def test_a_cut_zip_is_said(tmp_path: Path) -> None:
    """A zip's list of members stands at its end."""
    path = write_archive(tmp_path / "x.zip", {"a.webp": image_bytes("PNG", (200, 200))})
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ArchiveError, match=r"x\.zip is no complete zip archive"):
        list(iter_images(path, {"a.webp"}))


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["x.zip", "x.tar.gz"]),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.none() | st.floats(0, 1),
)
def test_damaged_archives_give_images_reasons_or_an_error(
    name: str, changes: list[tuple[float, int]], cut: float | None, tmp_path: Path
) -> None:
    """Whatever bytes of an archive are changed, and wherever it is cut: nothing else is ever raised."""
    path = write_archive(tmp_path / name, {image: image.encode() * 20 for image in NAMES})
    data = bytearray(path.read_bytes())
    for place, value in changes:
        data[int(place * len(data))] = value
    path.write_bytes(data[: None if cut is None else int(cut * len(data))])
    try:
        found = list(iter_images(path, set(NAMES)))
    except ArchiveError as error:
        assert str(path) in str(error)
    else:
        assert {name for name, _ in found} <= set(NAMES)
        assert all(isinstance(data, bytes | UnreadableImageError) for _, data in found)

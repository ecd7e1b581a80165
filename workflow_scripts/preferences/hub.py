"""Files of a repository on the Hugging Face Hub: found in the client's cache or downloaded, all checked by digest.

The client compares only the size of what it downloads, and begins a file again that a killed process left half done.
Here a file is written beside its place, goes on from there whatever happened, and gets its name when its digest is the
Hub's. Files that the client's cache holds already are used where they are.
"""

import errno
import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, NamedTuple

from filelock import FileLock
from huggingface_hub import HfApi, hf_hub_url, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential
from tqdm import tqdm

from workflow_scripts.files.records import file_record
from workflow_scripts.files.writing import write_json

log = logging.getLogger("softpref")
logging.getLogger("httpx2").setLevel(logging.WARNING)  # it says every address, and those of contents are signed

ATTEMPTS = 6  # at one request, or at a file that does not grow; the waits between them double from a second to 16
PASSING = (408, 429, 500, 502, 503, 504)  # statuses that are worth another attempt
SECONDS_BETWEEN_LINES = 30  # of progress, where it goes to a log

Kind = Literal["dataset", "model"]


class HubError(RuntimeError):
    """Files cannot be had from the Hub: names repository, file and remedy."""


class Entry(NamedTuple):
    """A file as the Hub lists it."""

    name: str
    size: int
    digest: str
    """SHA-256 of a large file, git's blob id of a small one; empty where nothing says it."""


class Fetched(NamedTuple):
    """Files of a repository at one commit, on this disk."""

    folder: Path
    repository: str
    """Its name now: the Hub leads from a former one to it."""
    commit: str
    files: dict[str, dict[str, Any]]
    """Digest, size and modification time by name."""


def fetch(kind: Kind, repository: str, revision: str, patterns: list[str], target: Path, key: str) -> Fetched:
    """Files of a repository, from the client's cache where it has them all, else downloaded to `target`/commit.

    With HF_HUB_OFFLINE=1 only what the cache or an earlier download to `target` holds.

    Args:
        kind: of the repository.
        repository: "owner/name".
        revision: commit, tag or branch.
        patterns: names of files, all of which must exist, or patterns such as "*.json" for files at the top.
        target: folder to download to; what is there already with the right digest is not fetched again.
        key: section of the configuration that names the repository, for messages.

    Raises:
        HubError: there is no such repository, revision or file, no right to it, no connection, too little disk space,
            or a file's digest is not the Hub's.
    """
    if is_offline_mode():
        there, listing = cached_snapshot(kind, repository, revision, patterns), target / f"{revision}.json"
        if there:
            commit, listed = there.name, entries_of_snapshot(there)
        elif listing.is_file():
            there, commit = target / revision, revision
            listed = [Entry(**entry) for entry in json.loads(listing.read_text(encoding="utf-8"))]
        else:
            raise HubError(
                f"HF_HUB_OFFLINE is set, and neither the cache of the Hub's client nor {target} has all of "
                f"{repository} at {revision}; download it where there is a connection, set HF_HOME to where the cache "
                f"is, or {key}.path to a folder with the files"
            )
        chosen = choose(listed, patterns, repository, commit, key)
    else:
        try:
            info = patiently(
                lambda: HfApi().repo_info(
                    repository, repo_type=kind, revision=revision, files_metadata=True, timeout=30
                )
            )
        except (HTTPError, OSError, ValueError) as error:
            raise _explained(error, repository, revision, key) from error
        if info.id != repository:
            log.warning("%s is called %s now; change %s.repository", repository, info.id, key)
        repository, commit = info.id, info.sha
        listed = [Entry(s.rfilename, s.size, s.lfs.sha256 if s.lfs else s.blob_id) for s in info.siblings]
        chosen = choose(listed, patterns, repository, commit, key)
        there = cached_snapshot(kind, repository, commit, [entry.name for entry in chosen])

    files = {}
    if there:
        for entry in chosen:
            path = there / entry.name
            files[entry.name] = described_if_right(path, entry)
            if not files[entry.name]:
                raise HubError(
                    f"{path} is missing or damaged: the digest of {entry.name} in {repository} is {entry.digest}; "
                    f"delete {path.resolve()} and run snakemake again with a connection to download it"
                )
        log.info("%s at %s is in %s; nothing is downloaded", repository, commit, there)
        return Fetched(there, repository, commit, files)

    write_json(target / f"{commit}.json", [entry._asdict() for entry in listed])  # for runs without a connection
    target = target / commit
    target.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        check_space(chosen, target, repository)
        for number, entry in enumerate(chosen, 1):
            files[entry.name] = described_if_right(target / entry.name, entry)
            if not files[entry.name]:
                url = hf_hub_url(repository, entry.name, repo_type=kind, revision=commit)
                files[entry.name] = download(url, entry, target, repository, key)
            log.info("%d of %d files of %s: %s, %s", number, len(chosen), repository, entry.name, _size(entry.size))
    return Fetched(target, repository, commit, files)


def cached_snapshot(kind: Kind, repository: str, revision: str, patterns: list[str]) -> Path | None:
    """Folder of the client's cache with all these files, None where it lacks any; makes no request."""
    try:
        found = snapshot_download(
            repository, repo_type=kind, revision=revision, allow_patterns=patterns, local_files_only=True
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    names = [pattern for pattern in patterns if "*" not in pattern]
    return Path(found) if all((Path(found) / name).is_file() for name in names) else None


def entries_of_snapshot(folder: Path) -> list[Entry]:
    """Files of a snapshot in the client's cache: links to files that are named by their digests."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    names = {path: path.readlink().name if path.is_symlink() else "" for path in paths}
    return [Entry(str(path.relative_to(folder)), path.stat().st_size, digest) for path, digest in names.items()]


def choose(listed: list[Entry], patterns: list[str], repository: str, commit: str, key: str) -> list[Entry]:
    """Files that are named or, at the top of the repository, match a pattern, in the order of their names.

    Raises:
        HubError: a named file is not there.
    """
    names = {entry.name for entry in listed}
    if missing := [pattern for pattern in patterns if "*" not in pattern and pattern not in names]:
        raise HubError(
            f"{repository} at {commit} has no {missing[0]} ({len(missing)} of {len(patterns)} files are not there); "
            f"check {key}.repository and {key}.revision"
        )
    return sorted(
        entry
        for entry in listed
        if entry.name in patterns or ("/" not in entry.name and any(fnmatch(entry.name, p) for p in patterns))
    )


def described_if_right(path: Path, entry: Entry) -> dict[str, Any]:
    """Digest, size and modification time of a file; empty where it is not there or not as the Hub lists it."""
    if not path.is_file() or path.stat().st_size != entry.size:
        return {}
    record = file_record(path)
    found = record["sha256"]
    if len(entry.digest) == 40:
        data = path.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # as `git hash-object` does
    return record if entry.digest in (found, "") else {}


def check_space(entries: list[Entry], target: Path, repository: str) -> None:
    """See whether what is still to be downloaded fits.

    Raises:
        HubError: it does not.
    """
    there = [[path.stat().st_size for path in (target / e.name, _part(target, e)) if path.is_file()] for e in entries]
    needed = sum(max(0, entry.size - max(sizes, default=0)) for entry, sizes in zip(entries, there, strict=True))
    free = shutil.disk_usage(target).free
    log.info("%s: %s to download, %s free in %s", repository, _size(needed), _size(free), target)
    if needed > free:
        raise HubError(
            f"{repository} takes {_size(needed)} more in {target}, where {_size(free)} are free; free some, or set "
            "downloads to a folder on a larger disk"
        )


def download(url: str, entry: Entry, target: Path, repository: str, key: str) -> dict[str, Any]:
    """Download a file, going on where that was left, and give it its name when its digest is right.

    Raises:
        HubError: it cannot be had, or arrived with another digest twice.
    """
    part = _part(target, entry)
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()

    def transfer() -> None:
        if part.stat().st_size > entry.size:
            part.write_bytes(b"")
        with part.open("ab") as file:
            http_get(
                url,
                file,
                resume_size=file.tell(),
                headers=build_hf_headers(),
                expected_size=entry.size,
                displayed_filename=entry.name,
                tqdm_class=Progress,
            )

    for _ in range(2):
        try:
            patiently(transfer, lambda: part.stat().st_size)
        except (HTTPError, OSError) as error:
            raise _explained(error, f"{repository}, {entry.name}", "", key) from error
        if record := described_if_right(part, entry):
            part.replace(target / entry.name)
            return record
        log.warning("%s of %s arrived with another digest than the Hub's %s", entry.name, repository, entry.digest)
        part.write_bytes(b"")
    raise HubError(
        f"{entry.name} of {repository} arrived twice with another digest than the Hub's {entry.digest}; something on "
        "the way changes it: try another network, or another mirror (HF_ENDPOINT)"
    )


def patiently(call: Callable[[], Any], progress: Callable[[], int] = lambda: 0) -> Any:
    """Result of a call that is made again where it fails for a passing reason: a limit of rate, a broken connection.

    Args:
        call: what to do.
        progress: how far it has come; attempts are counted anew where that has grown.
    """
    while True:
        reached = progress()
        retrying = Retrying(
            retry=retry_if_exception(_passes) & retry_if_exception(lambda _: progress() <= reached),  # noqa: B023
            wait=_wait,
            stop=stop_after_attempt(ATTEMPTS),
            before_sleep=_say_why,
            reraise=True,
        )
        try:
            return retrying(call)
        except (HTTPError, OSError) as error:
            if not _passes(error) or progress() <= reached:
                raise
            log.warning("%s; going on where that stopped", _brief(error))


def _wait(state: RetryCallState) -> float:
    """Seconds that the Hub tells to wait, else twice as many as before the last attempt."""
    assert state.outcome is not None
    told = getattr(getattr(state.outcome.exception(), "response", None), "headers", {}).get("Retry-After", "")
    return int(told) if told.isdigit() else wait_exponential()(state)


def _say_why(state: RetryCallState) -> None:
    assert state.outcome is not None and state.next_action is not None
    error, seconds = state.outcome.exception(), state.next_action.sleep
    log.warning("%s; attempt %d of %d in %d s", _brief(error), state.attempt_number + 1, ATTEMPTS, seconds)


class Progress(tqdm):
    """A bar on a terminal; in a log a line now and then, and none for what is done before the first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what tqdm takes."""
        self.terminal = sys.stderr.isatty()
        if not self.terminal:
            kwargs |= {"delay": SECONDS_BETWEEN_LINES, "mininterval": SECONDS_BETWEEN_LINES}
        super().__init__(*args, **kwargs)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Show how far it is."""
        if self.terminal:
            super().display(msg, pos)
        else:
            log.info("%s", msg or self)


def _part(target: Path, entry: Entry) -> Path:
    return target / f"{entry.name}.part"


def _passes(error: BaseException) -> bool:
    if not isinstance(error, HTTPError | OSError):
        return False
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code in PASSING
    # What comes from the disk has a number; a broken connection, and fewer bytes than there should be, have none.
    return getattr(error, "errno", None) is None


def _explained(error: Exception, what: str, revision: str, key: str) -> HubError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        say = (
            "it is given to those who accept its conditions; accept them on its page with your account, and give that "
            "account's token (HF_TOKEN in the environment, or hf auth login)"
        )
    elif isinstance(error, RevisionNotFoundError):
        say = f"it has no revision {revision}; set {key}.revision to a commit, tag or branch of this repository"
    elif isinstance(error, RepositoryNotFoundError):
        say = f"there is no such repository, or it is private; check {key}.repository, or give a token (HF_TOKEN)"
    elif status in (401, 403):
        say = "the token does not open it; check HF_TOKEN, or hf auth login"
    elif status == 429:
        say = "the Hub limits the rate of requests; wait, or give a token (HF_TOKEN), and run snakemake again"
    elif isinstance(error, ValueError):
        say = f"this is no name of a repository, or what answers is no Hub; check {key}.repository and HF_ENDPOINT"
    elif getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        say = "the disk is full; free some space, or set downloads to a folder on a larger disk"
    else:
        say = (
            "run snakemake again, it goes on with what has arrived; without a connection use a filled cache "
            f"(HF_HUB_OFFLINE=1), or set {key}.path to a folder with the files"
        )
    return HubError(f"{what}: {say} ({_brief(error)})")


def _brief(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _size(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"

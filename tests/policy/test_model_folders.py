"""What a model folder may hold: weights as safetensors, no code that is run, and the files of its manifest."""

import ast
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from workflow_scripts.configuration.model import Configuration, load
from workflow_scripts.configuration.stages import ModelConfig, PrepareBasePolicy
from workflow_scripts.files.paths import ROOT
from workflow_scripts.policy.loading import load_model, load_policy, load_processor
from workflow_scripts.policy.manifest import PolicyError, base_path, bundled_files, model_files, model_records

BUNDLED = ROOT / "models/tiny-qwen2.5-vl"
PAIRWISE = ModelConfig.of(Configuration(), "hpsv2")

CODE = """
from pathlib import Path
Path(__file__).with_name("code_ran").touch()
from transformers import *
from transformers import Qwen2_5_VLConfig as Config
from transformers import Qwen2_5_VLForConditionalGeneration as Model
from transformers import Qwen2_5_VLProcessor as Processor
from transformers import PreTrainedTokenizerFast as Tokenizer
"""


class Touches:
    """A pickle of this creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a copy of the bundled model that may be changed."""
    shutil.copytree(BUNDLED, tmp_path / "model")
    return tmp_path / "model"


def manifest_of(folder: Path) -> Path:
    """Write the manifest of a folder beside it."""
    path = folder.with_name("manifest.json")
    path.write_text(json.dumps({"path": str(folder), "files": model_files(folder)}))
    return path


def edit_json(path: Path, **values: Any) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ---------------------------------------------------------------------------------------------- code, and only its own


def loading_calls() -> list[tuple[str, ast.Call]]:
    """Every call of a method named from_pretrained in the package and the workflow."""
    found = []
    for path in sorted((ROOT / "workflow_scripts").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and "from_pretrained" in node.func.attr
            ):
                found.append((f"{path.name}: {ast.unparse(node.func)}", node))
    return found


def test_every_call_that_loads_a_model_refuses_its_code_and_pickles() -> None:
    calls = loading_calls()
    names = [name for name, _ in calls]
    assert names == [
        "tokens.py: AutoImageProcessor.from_pretrained",
        "tokens.py: AutoImageProcessor.from_pretrained",
        "loading.py: AutoProcessor.from_pretrained",
        "loading.py: AutoModelForImageTextToText.from_pretrained",
        "loading.py: PeftModel.from_pretrained",  # loads no code; its weights are checked to be safetensors before
        "vllm_engine.py: AutoConfig.from_pretrained",
        "vllm_engine.py: GenerationConfig.from_pretrained",  # numbers alone
    ]
    for name, call in (*calls[:4], calls[5]):
        options = {
            keyword.arg: ast.literal_eval(keyword.value)
            for keyword in call.keywords
            if keyword.arg == "trust_remote_code"
        }
        assert options == {"trust_remote_code": False}, name
    (safe,) = [keyword.value for keyword in calls[3][1].keywords if keyword.arg == "use_safetensors"]
    assert ast.literal_eval(safe) is True


def test_nothing_in_the_package_unpickles_or_trusts() -> None:
    for path in sorted((ROOT / "workflow_scripts").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not used & {"torch.load", "pickle.load", "pickle.loads", "eval", "exec", "__import__"}, path
        trusted = [
            k for n in ast.walk(tree) if isinstance(n, ast.Call) for k in n.keywords if k.arg == "trust_remote_code"
        ]
        assert all(ast.literal_eval(keyword.value) is False for keyword in trusted), path


def test_code_beside_a_known_model_is_not_run(folder: Path) -> None:
    (folder / "code.py").write_text(CODE)
    edit_json(
        folder / "config.json", auto_map={"AutoConfig": "code.Config", "AutoModelForImageTextToText": "code.Model"}
    )
    edit_json(folder / "processor_config.json", auto_map={"AutoProcessor": "code.Processor"})
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "code.Tokenizer"]})
    policy = load_policy(manifest_of(folder), None, PAIRWISE)
    assert type(policy.model).__module__.startswith("transformers.models.qwen2_5_vl")
    assert not list(folder.parent.rglob("code_ran"))


def test_a_model_that_is_only_its_own_code_is_refused(folder: Path) -> None:
    (folder / "code.py").write_text(CODE)
    edit_json(
        folder / "config.json",
        model_type="something else",
        auto_map={"AutoConfig": "code.Config", "AutoModelForImageTextToText": "code.Model"},
    )
    with pytest.raises(PolicyError, match=r"model cannot be loaded, and its own code is never run .*; set policy"):
        load_model(manifest_of(folder), PAIRWISE)
    assert not list(folder.parent.rglob("code_ran"))


# ------------------------------------------------------------------------------------------------------------- weights


def prepare(run_main: Callable[..., Any], folder: Path) -> Path:
    """Run prepare_base_policy on a folder; return the manifest."""
    config = PrepareBasePolicy.of(load({"policy": {"bundled": str(folder)}}))
    run_main("prepare_base_policy", config, manifest=folder.with_name("manifest.json"))
    return folder.with_name("manifest.json")


def test_pickled_weights_are_refused(run_main: Any, folder: Path) -> None:
    marker = folder.with_name("unpickled")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touches(marker)))
    with pytest.raises(PolicyError, match=r"holds no \*\.safetensors, only \['pytorch_model\.bin'\], .*; set policy"):
        prepare(run_main, folder)
    assert not marker.exists()


def test_pickles_beside_safetensors_are_not_read(run_main: Any, folder: Path) -> None:
    marker = folder.with_name("unpickled")
    for name in ("pytorch_model.bin", "training_args.bin", "adapter_model.bin", "model.pt"):
        (folder / name).write_bytes(pickle.dumps(Touches(marker)))
    load_policy(prepare(run_main, folder), None, PAIRWISE)
    assert not marker.exists()


def test_an_adapter_is_no_base_policy(run_main: Any, folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somewhere/else"}')
    with pytest.raises(PolicyError, match="holds an adapter, not a base policy; merge it"):
        prepare(run_main, folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, None])
def test_broken_weights_are_named(content: bytes | None, folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000] if content is None else content)
    with pytest.raises(PolicyError, match=r"model cannot be loaded.*; set policy"):
        load_model(manifest_of(folder), PAIRWISE)


def test_an_adapter_must_be_safetensors(base_manifest: Path, adapter: Path, tmp_path: Path) -> None:
    copied, marker = tmp_path / "adapter", tmp_path / "unpickled"
    shutil.copytree(adapter, copied)
    (copied / "adapter_model.bin").write_bytes(pickle.dumps(Touches(marker)))
    expected = load_policy(base_manifest, adapter, PAIRWISE).model.state_dict()
    found = load_policy(base_manifest, copied, PAIRWISE).model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    (copied / "adapter_model.safetensors").unlink()
    with pytest.raises(PolicyError, match=r"holds no adapter_model\.safetensors; train the adapter again"):
        load_policy(base_manifest, copied, PAIRWISE)
    torch.save(load_file(adapter / "adapter_model.safetensors"), copied / "adapter_model.bin")
    with pytest.raises(PolicyError, match=r"holds no adapter_model\.safetensors"):
        load_policy(base_manifest, copied, PAIRWISE)
    assert not marker.exists()


def test_an_adapter_of_other_shapes_is_refused(base_manifest: Path, adapter: Path, tmp_path: Path) -> None:
    copied = tmp_path / "adapter"
    shutil.copytree(adapter, copied)
    edit_json(copied / "adapter_config.json", r=3)
    with pytest.raises(PolicyError, match=r"adapter cannot be loaded.*size mismatch.*; train the adapter again"):
        load_policy(base_manifest, copied, PAIRWISE)


# ------------------------------------------------------------------------------------------- the files of the manifest


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\7")),
        ("chat_template.jinja", lambda path: path.write_text("{{ messages }}")),
        ("tokenizer.json", lambda path: path.unlink()),
        ("generation_config.json", lambda path: path.touch() or path.write_text("{}")),
        ("added_tokens.json", lambda path: path.write_text('{"<answer>": 3}')),
        ("adapter_config.json", lambda path: path.write_text("{}")),
    ],
)
def test_a_file_that_changed_since_the_manifest_is_named(
    name: str, change: Callable[[Path], Any], run_main: Any, folder: Path
) -> None:
    manifest = prepare(run_main, folder)
    change(folder / name)
    message = rf"{name} is not as it was when .*manifest\.json was written; restore it, or delete|holds an adapter"
    for load_from in (lambda: load_model(manifest, PAIRWISE), lambda: load_processor(manifest, PAIRWISE)):
        with pytest.raises(PolicyError, match=message):
            load_from()


def test_touched_and_copied_files_are_the_same(run_main: Any, folder: Path) -> None:
    manifest = prepare(run_main, folder)
    for path in folder.iterdir():
        path.touch()
    (folder / "README.md").write_text("notes")
    assert base_path(manifest) == folder


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that names each file when it is hashed."""
    names: list[str] = []
    plain = hashlib.file_digest

    def counting(file: Any, algorithm: str) -> Any:
        names.append(Path(file.name).name)
        return plain(file, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", counting)
    return names


def jobs(manifest: Path, number: int) -> None:
    """Load model and processor as so many jobs do, each in a process of its own."""
    for _ in range(number):
        base_path.cache_clear()
        load_model(manifest, PAIRWISE)
        load_processor(manifest, PAIRWISE)


def test_the_base_is_hashed_once_and_not_by_the_jobs_that_load_it(
    run_main: Any, folder: Path, hashed: list[str]
) -> None:
    manifest = prepare(run_main, folder)
    names = sorted(model_files(folder))
    assert sorted(name for name in hashed if name in names) == sorted([*names, *names])  # once here, in model_files
    hashed.clear()
    jobs(manifest, 3)
    assert hashed == []
    (folder / "model.safetensors").touch()  # the same content with another time is read
    jobs(manifest, 2)
    assert hashed == ["model.safetensors"] * 2


def test_a_folder_that_moved_with_its_times_is_not_hashed(run_main: Any, folder: Path, hashed: list[str]) -> None:
    """The times stand in the sidecar: the manifest has the same bytes for the same files."""
    manifest = prepare(run_main, folder)
    written = manifest.read_bytes()
    for path in folder.iterdir():
        path.touch()
    assert prepare(run_main, folder).read_bytes() == written and b"mtime" not in written
    moved = folder.with_name("elsewhere")
    shutil.copytree(folder, moved)  # as rsync -a and cp -a do, with times
    manifest.write_text(json.dumps(json.loads(written) | {"path": str(moved)}))
    hashed.clear()
    jobs(manifest, 1)
    assert hashed == []


def test_a_change_that_keeps_size_and_time_is_not_noticed(run_main: Any, folder: Path) -> None:
    """As everywhere in the workflow: such a change takes intent."""
    manifest, path = prepare(run_main, folder), folder / "generation_config.json"
    times, text = path.stat(), path.read_text()
    path.write_text(text.replace("0", "1", 1))
    assert path.read_text() != text
    with pytest.raises(PolicyError, match=r"generation_config\.json is not as it was"):
        base_path(manifest)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert base_path(manifest) == folder


def test_files_that_were_hashed_while_they_arrived_are_not_read_again(folder: Path, hashed: list[str]) -> None:
    known = model_records(folder)
    hashed.clear()
    weights = known.pop("model.safetensors")
    assert model_records(folder, {"model.safetensors": weights}) == known | {"model.safetensors": weights}
    assert "model.safetensors" not in hashed and len(hashed) == len(known)


def test_every_file_of_the_manifest_is_an_input_of_its_rule(folder: Path) -> None:
    inputs = [Path(name).name for name in bundled_files(load({"policy": {"bundled": str(folder)}}).policy)]
    assert sorted(inputs) == sorted(model_files(folder)) and "chat_template.jinja" in inputs
    assert "README.md" not in inputs and not any("provenance" in name for name in inputs)
    assert bundled_files(load({"policy": {"source": "hub"}}).policy) == []


def test_a_changed_template_of_the_bundled_policy_makes_the_manifest_anew(folder: Path) -> None:
    command = [sys.executable, "-m", "snakemake", "results/policies/base/manifest.json", "--cores", "1"]
    command += ["--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder.parent)]
    command += ["--workflow-profile", str(ROOT / "profiles/default")]
    command += ["--config", f"policy={{bundled: {folder}}}", "tracking={enabled: false}"]

    def snakemake(*options: str) -> str:
        done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    snakemake()
    template = folder / "chat_template.jinja"
    template.touch()
    assert "Nothing to be done" in snakemake("-n")
    template.write_text(template.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert "rule prepare_base_policy" in snakemake("-n")

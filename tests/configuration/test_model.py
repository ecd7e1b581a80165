"""The configuration: what is refused and how it is said, what reaches the stages, and the files made from it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import yaml

from workflow_scripts.configuration import stages, targets
from workflow_scripts.configuration.model import (
    Configuration,
    ConfigurationError,
    Dataset,
    PairwiseTraining,
    PointwiseTraining,
    Section,
    Split,
    Track,
    TrainingVllm,
    load,
)
from workflow_scripts.files.digests import canonical_json
from workflow_scripts.files.paths import ROOT
from workflow_scripts.reference.configuration import generated_files

OVERLAYS = sorted((ROOT / "configs").glob("*.yaml"))
# What a user of configs/published-policy.yaml fills in.
FILLED_IN = {
    "policy": {"hub": {"revision": "4" * 40}},
    "prompts": {"pairwise": "First: {image} Second: {image} Which one shows {prompt} better?"},
}


def keys(section: Section, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Path, field and default of every key, sections included."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        yield (*path, name), field, value
        if isinstance(value, Section):
            yield from keys(value, (*path, name))


KEYS = list(keys(Configuration()))


def nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """Raw configuration with one key set."""
    for name in reversed(path):
        value = {name: value}
    return value


def overlay_of(path: Path) -> dict[str, Any]:
    """Return what a file of configs/ changes, with what it leaves to be filled in."""
    raw = yaml.safe_load(path.read_text())
    return overlaid(raw, FILLED_IN) if path.stem == "published-policy" else raw


def overlaid(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge two raw configurations as Snakemake does."""
    both = {
        k: overlaid(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v for k, v in over.items()
    }
    return {**base, **both}


@pytest.mark.parametrize("path", [path for path, _, _ in KEYS], ids=".".join)
def test_a_misspelt_key_is_told_its_right_name(path: tuple[str, ...]) -> None:
    wrong = (*path[:-1], path[-1] + "x")
    with pytest.raises(ConfigurationError) as error:
        load(nested(wrong, 1))
    assert f"{'.'.join(wrong)}: unknown key; did you mean {path[-1]}?" in str(error.value)


def test_a_key_like_no_other_is_told_what_is_valid() -> None:
    with pytest.raises(ConfigurationError, match=r"training\.qqq: unknown key; valid here: imagereward, hpsv2"):
        load({"training": {"qqq": 1}})


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(ConfigurationError) as error:
        load({"numeric_threads": 0, "trainin": {}, "scoring": {"report_k": [3, 1]}})
    assert len(str(error.value).splitlines()) == 4


BOUNDS = [
    (path, outside)
    for path, field, value in KEYS
    for mark in field.metadata
    for name, step in (("ge", -1), ("gt", 0), ("le", 1), ("lt", 0))
    if (limit := getattr(mark, name, None)) is not None
    for outside in [limit + step]
]


@pytest.mark.parametrize(("path", "outside"), BOUNDS, ids=lambda v: ".".join(v) if isinstance(v, tuple) else str(v))
def test_values_out_of_bounds_are_refused_by_name(path: tuple[str, ...], outside: float) -> None:
    with pytest.raises(ConfigurationError, match=rf"{'.'.join(path)}: {outside!r} is not allowed: Input should be "):
        load(nested(path, outside))


def test_numbers_have_bounds() -> None:
    bounded = {path for path, _ in BOUNDS}
    numbers = {path for path, field, _ in KEYS if field.annotation in (int, float, int | None, float | None)}
    assert numbers == bounded


@pytest.mark.parametrize("value", [float("inf"), float("nan"), ".inf", "1e999"])
def test_infinite_numbers_are_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="learning_rate"):
        load(nested(("training", "hpsv2", "learning_rate"), value))


@pytest.mark.parametrize(("text", "number"), [("1e-5", 1e-5), ("1E-5", 1e-5), ("2e-4", 2e-4), ("1.0e-5", 1e-5)])
def test_exponents_of_yaml_are_numbers(text: str, number: float) -> None:
    raw = yaml.safe_load(f"training: {{imagereward: {{learning_rate: {text}}}}}")
    assert load(raw).training.imagereward.learning_rate == number


@pytest.mark.parametrize("text", ["1e-5x", "fast", "[1]", "null", "", "1e2.5"])
def test_what_is_no_number_is_refused(text: str) -> None:
    raw = yaml.safe_load(f"training: {{imagereward: {{learning_rate: {text}}}}}")
    with pytest.raises(ConfigurationError, match=r"training\.imagereward\.learning_rate: .* is not allowed"):
        load(raw)


def test_no_number_stays_text() -> None:
    for path, _, value in KEYS:
        if isinstance(value, int | float) and not isinstance(value, bool):
            loaded: Any = load(nested(path, str(value)))
            for name in path:
                loaded = getattr(loaded, name)
            assert loaded == value and type(loaded) is type(value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"rollouts": {"engine": "transformer"}}, "rollouts.engine: 'transformer' is not allowed: .*'transformers'"),
        ({"policy": {"dtype": "float23"}}, "policy.dtype: 'float23' is not allowed: .*did you mean float32"),
        ({"tracks": ["imagereword"]}, "tracks.0: 'imagereword' is not allowed: .*did you mean imagereward"),
        ({"seeds": []}, "seeds: .* one or more different whole numbers"),
        ({"seeds": [1, 1]}, "seeds: .* one or more different whole numbers"),
        ({"seeds": [-1]}, "seeds: .* one or more different whole numbers"),
        ({"scoring": {"report_k": [3, 1]}}, r"scoring.report_k: \[3, 1\] is not allowed: must be ascending"),
        ({"scoring": {"report_k": [1, 4]}}, "scoring.report_k asks for Mean@4 but rollouts.blocks .* records 3"),
        ({"cross_tests": [{"track": "hpsv2", "test": "hpsv2"}]}, "cross_tests: hpsv2 on hpsv2 needs .* another test"),
        ({"tracks": ["hpsv2"], "cross_tests": [{"track": "imagereward", "test": "hpsv2"}]}, "needs a track of"),
        ({"cross_tests": [{"track": "hpsv2", "tset": "hpsv2"}]}, "cross_tests.0.tset: unknown key; did you mean test"),
        ({"prompts": {"pairwise": "{image} {prompt}"}}, r"prompts.pairwise: .* must contain \{image\} 2 time"),
        ({"prompts": {"pointwise": "{image}"}}, r"prompts.pointwise: .* must contain .* \{prompt\} once"),
        (
            {"training": {"hpsv2": {"num_iterations": 3, "validate_every": 4}}},
            "validate_every must be a multiple of num_iterations",
        ),
        (
            {"training": {"hpsv2": {"gradient_accumulation": 3}}},
            r"gradient_accumulation must divide prompts_per_step \* group_size",
        ),
        (
            {"training": {"hpsv2": {"steps": 80, "epochs": 2}}},
            r"training\.hpsv2: steps \(80\) and epochs \(2\) exclude each other; set one of them to null",
        ),
        ({"training": {"own": {"steps": None}}}, "training.own: steps and epochs are both null; set one of them"),
        ({"training": {"hpsv2": {"rewards": {"approximate": 1}}}}, "rewards.approximate: unknown key"),
        ({"training": 3}, "training: 3 is not allowed"),
        (
            {"policy": {"attention": "flash_attention_2"}},
            "needs device cuda and dtype .* not cpu and float32; set it to",
        ),
    ],
)
def test_wrong_values_are_explained(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load(raw)


ZERO_SHOT = {"policies": ["zeroshot"], "tracks": ["hpsv2"]}


def hub_policy(**keys: Any) -> dict[str, Any]:
    """Return a zero-shot evaluation of a policy of the Hub that is complete, but for these keys of policy.hub."""
    hub = {"repository": "lab/tuned", "revision": "4" * 40}
    return ZERO_SHOT | {"policy": {"source": "hub", "hub": hub | keys}, "prompts": FILLED_IN["prompts"]}


def test_the_published_policy_names_what_is_to_be_filled_in() -> None:
    base = yaml.safe_load((ROOT / "config.yaml").read_text())
    raw = yaml.safe_load((ROOT / "configs/published-policy.yaml").read_text())
    repository = raw["policy"]["hub"]["repository"]
    with pytest.raises(ConfigurationError) as error:
        load(overlaid(base, raw))
    told = str(error.value)
    assert f"policy.hub.revision (a commit of {repository}) and prompts.pairwise (the question" in told
    assert told.endswith(f"must be filled in; see the policy's card, https://huggingface.co/{repository}")
    assert load(overlaid(base, overlaid(raw, FILLED_IN))).policies == ["zeroshot"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            hub_policy(revision=""),
            r"policy\.hub\.revision \(a commit of lab/tuned\) must be filled in; see .*lab/tuned",
        ),
        # The default is a commit of another repository.
        (hub_policy(revision=Configuration().policy.hub.revision), r"policy\.hub\.revision \(a commit of lab/tuned\)"),
        (hub_policy() | {"prompts": {}}, r"prompts\.pairwise \(the question .* must be filled in; see .*lab/tuned"),
        (
            hub_policy(adapter={"repository": "lab/lora"}),
            r"policy\.hub\.adapter\.revision \(a commit of lab/lora\) must",
        ),
        ({"prompts": {"pairwise": ""}}, r"prompts\.pairwise .* must be filled in$"),
        (hub_policy(adapter={"path": "/lora"}) | {"policies": ["grpo"]}, "adapter needs policies: .* merge_and_unload"),
        ({"policies": ["grpo", "zeroshot"]}, r"policies: .* must be \[zeroshot\], \[grpo\] or \[zeroshot, grpo\]"),
        ({"policies": []}, r"policies: .* must be \[zeroshot\]"),
        (
            {"datasets": {"hpsv2": {"hub": {"test_only": True}}}},
            r"hpsv2\.hub\.test_only .* set it to false, or policies",
        ),
        (ZERO_SHOT | {"ranking": {"images": "a.csv"}}, r"ranking\.images .* policies is \[zeroshot\]; add grpo"),
    ],
)
def test_a_policy_that_is_not_complete_is_refused(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load(raw)


def test_a_complete_published_policy_is_accepted() -> None:
    for hub in ({}, {"adapter": {"repository": "lab/lora", "revision": "v1"}}, {"path": "/model", "revision": ""}):
        assert not load(hub_policy(**hub)).trains()
    known = {"policy": {"source": "hub"}, "policies": ["zeroshot"]}
    assert load(known).prompts == Configuration().prompts
    assert load(ZERO_SHOT | {"prompts": {"pointwise": ""}}).prompts.pointwise == ""  # no track asks it


def test_policies_and_adapter_enter_the_stages_only_where_they_are_set() -> None:
    plain, other = load({"policy": {"source": "hub"}}), load(hub_policy(adapter={"path": "/lora"}))
    assert "policies" not in stages.MakeTables.of(plain).model_dump(mode="json")
    assert stages.MakeTables.of(other).model_dump(mode="json")["policies"] == ["zeroshot"]
    small = load(ZERO_SHOT | {"datasets": {"hpsv2": {"hub": {"test_only": True}}}})
    for c, key in ((plain, None), (other, None), (small, True)):  # what is tested reruns no download
        assert stages.DownloadDataset.of(c, "hpsv2").model_dump(mode="json")["hub"].get("test_only") is key
    assert "adapter" not in stages.PrepareBasePolicy.of(plain).model_dump(mode="json")["hub"]
    assert stages.PrepareBasePolicy.of(other).model_dump(mode="json")["hub"]["adapter"]["path"] == "/lora"


def test_root_keys_are_words() -> None:
    # Snakemake refuses `--config k=5`.
    assert all(len(name) > 1 for name in Configuration.model_fields)


def test_every_key_says_what_it_is() -> None:
    for path, field, value in KEYS:
        text = (type(value).__doc__ if isinstance(value, Section) else field.description) or ""
        assert text.endswith("."), path


@pytest.mark.parametrize("name", list(generated_files()))
def test_files_made_from_the_model_are_up_to_date(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8") == generated_files()[name], (
        "python -m workflow_scripts.configuration.model"
    )


def test_the_commented_yaml_is_the_default() -> None:
    assert load(yaml.safe_load((ROOT / "config.yaml").read_text())) == Configuration()


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.name)
def test_overlays_are_valid_and_have_folders_of_their_own(path: Path) -> None:
    raw = overlay_of(path)
    jsonschema.validate(raw, json.loads((ROOT / "config.schema.json").read_text()))
    assert load(overlaid(yaml.safe_load((ROOT / "config.yaml").read_text()), raw)).results != Configuration().results


@pytest.mark.parametrize(
    ("below", "over", "steps", "epochs"),
    [
        ({}, {}, 100, None),
        ({}, {"epochs": 2}, None, 2),
        ({}, {"epochs": "0.5"}, None, 0.5),
        ({}, {"steps": 5}, 5, None),
        ({"steps": 5}, {"steps": None, "epochs": 2}, None, 2),
        ({"epochs": 2}, {"steps": 80, "epochs": None}, 80, None),
    ],
    ids=str,
)
def test_epochs_take_the_place_of_steps(
    below: dict[str, Any], over: dict[str, Any], steps: int | None, epochs: float | None
) -> None:
    raw = yaml.safe_load((ROOT / "config.yaml").read_text())
    for overlay in (below, over):
        raw = overlaid(raw, {"training": {"hpsv2": overlay}})
    c = load(raw)
    assert (c.training.hpsv2.steps, c.training.hpsv2.epochs) == (steps, epochs)
    # `epochs` are in the stage's configuration only where they are given, so that older results do not rerun.
    training = json.loads(stages.TrainGrpo.of(c, "hpsv2", 0).canonical())["training"]
    assert training["steps"] == steps and training.get("epochs") == epochs
    assert ("epochs" in training) == (epochs is not None)


def test_the_schema_catches_a_typo_in_an_editor() -> None:
    schema = json.loads((ROOT / "config.schema.json").read_text())
    for raw in ({"trainin": {}}, {"training": {"imagereward": {"learning_rat": 1}}}, {"numeric_threads": 0}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(raw, schema)


@pytest.mark.parametrize(
    "uri", ["http://me:planted-password@host", "postgresql://host/db?user=me&password=planted-password"]
)
def test_a_password_in_the_configuration_is_refused(uri: str) -> None:
    with pytest.raises(ConfigurationError, match="set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD") as error:
        load({"tracking": {"uri": uri}})
    assert str(error.value).splitlines()[1].startswith("  tracking.uri: ") and "planted" not in str(error.value)
    assert load({"tracking": {"uri": "http://host:5000"}}).tracking.uri == "http://host:5000"


# ------------------------------------------------------------------------------------------------- stage configurations


def configurations() -> Iterator[tuple[str, Configuration]]:
    """The default and every overlay on it."""
    base = yaml.safe_load((ROOT / "config.yaml").read_text())
    yield "default", load(base)
    for path in OVERLAYS:
        yield path.stem, load(overlaid(base, overlay_of(path)))


def instances(c: Configuration) -> Iterator[stages.StageConfig]:
    """The configuration of stages for every track, data set, split, policy."""
    yield from (stages.ColdStartPolicy.of(c), stages.PrepareBasePolicy.of(c), stages.MakeTables.of(c))
    yield from (stages.RecordOwnData.of(c), stages.RankOwnImages.of(c))
    yield from (stages.MakeFigures.of(c), stages.MakeReport.of(c))
    for dataset in get_args(Dataset):
        if dataset != "own":
            yield from (stages.SynthesizeDataset.of(c, dataset), stages.DownloadDataset.of(c, dataset))
        for split in get_args(Split):
            yield from (
                stages.ReadAnnotations.of(c, dataset, split),
                stages.SelectSubset.of(c, dataset, split),
                stages.ReadImages.of(c, dataset, split, 1),
            )
    for track in get_args(Track):
        yield stages.TrainGrpo.of(c, track, 3)
        for policy, test in product(("zeroshot", "grpo"), get_args(Dataset)):
            yield stages.GenerateRollouts.of(c, track, policy, test, 3, 1, 2)  # type: ignore[arg-type]
            yield stages.ScoreRollouts.of(c, track, policy, test, 3)  # type: ignore[arg-type]
            yield stages.MeasureAccuracy.of(c, track, policy, test, 3)  # type: ignore[arg-type]
            yield stages.MakeGallery.of(c, track, policy, test, 3)  # type: ignore[arg-type]


def types(value: Any) -> Any:
    """Types of a configuration and everything in it."""
    if isinstance(value, Section):
        return type(value), {name: types(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, list):
        return [types(item) for item in value]
    return type(value)


@pytest.mark.parametrize(
    ("name", "configuration"), list(configurations()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_stage_reads_back_what_the_rule_wrote(name: str, configuration: Configuration) -> None:
    seen = set()
    for config in instances(configuration):
        text = config.canonical()
        again = type(config).model_validate_json(text)
        assert again == config and types(again) == types(config)
        assert again.canonical() == text == canonical_json(json.loads(text))
        seen.add(text)
    assert len(seen) == len(list(instances(configuration)))
    assert {type(config) for config in instances(configuration)} == set(stages.STAGES.values())


def test_a_key_changes_the_stages_that_use_it_and_no_others() -> None:
    def changed(raw: dict[str, Any]) -> set[str]:
        pairs = zip(instances(load({})), instances(load(raw)), strict=True)
        return {type(a).__name__ for a, b in pairs if a.canonical() != b.canonical()}

    assert changed({"scoring": {"report_k": [1, 2]}}) == {"MeasureAccuracy", "MakeTables", "MakeReport"}
    assert changed({"scoring": {"bootstrap": {"seed": 1}}}) == {"MeasureAccuracy", "MakeTables", "MakeFigures"}
    assert changed({"rollouts": {"sampling": {"temperature": 0.5}}}) == {"GenerateRollouts"}
    assert changed({"rollouts": {"blocks": 2}}) == set()  # more files, and the others stay
    assert changed({"training": {"hpsv2": {"beta": 0}}}) == {"TrainGrpo"}
    assert changed({"datasets": {"hpsv2": {"train_fraction": 0.5}}}) == {"SelectSubset", "MakeTables"}
    assert changed({"datasets": {"own": {"folder": "elsewhere", "test_fraction": 0.3}}}) == {"RecordOwnData"}
    assert changed({"datasets": {"own": {"title": "unused"}}}) == set()
    assert changed({"policy": {"image_processor": {"do_rescale": True}}}) == {"TrainGrpo", "GenerateRollouts"}
    assert changed({"policy": {"attention": "eager"}}) == {"TrainGrpo", "GenerateRollouts"}
    for numeric in ({"numeric_threads": 2}, {"numeric_instructions": "native"}):
        assert changed(numeric) == {"ColdStartPolicy", "TrainGrpo", "GenerateRollouts"}
    assert changed({"prompts": {"pointwise": "{image}{prompt}"}}) == {
        "ColdStartPolicy",
        "TrainGrpo",
        "GenerateRollouts",
    }
    assert changed({"results": "r", "downloads": "d", "seeds": [1, 2]}) == {"MakeTables"}
    assert changed({"tracking": {"enabled": False, "uri": "x", "experiment": "y", "artifact_megabytes": 1}}) == set()


@pytest.mark.parametrize(
    ("raw", "pinned"),
    [
        ({"policy": {"device": "cuda"}}, {"ColdStartPolicy"}),
        ({"rollouts": {"engine": "vllm"}}, {"ColdStartPolicy", "TrainGrpo"}),
    ],
)
def test_instructions_are_no_key_of_a_model_on_cuda_nor_of_vllm(raw: dict[str, Any], pinned: set[str]) -> None:
    pairs = zip(instances(load(raw)), instances(load(raw | {"numeric_instructions": "native"})), strict=True)
    assert {type(a).__name__ for a, b in pairs if a.canonical() != b.canonical()} == pinned


def test_training_of_one_track_ignores_the_keys_of_the_other() -> None:
    one, two = load({}), load({"training": {"hpsv2": {"steps": 7}}, "prompts": {"pairwise": "{image}{image}{prompt}"}})
    assert stages.TrainGrpo.of(one, "imagereward", 0) == stages.TrainGrpo.of(two, "imagereward", 0)
    assert stages.TrainGrpo.of(one, "hpsv2", 0) != stages.TrainGrpo.of(two, "hpsv2", 0)


def test_own_data_are_trained_on_by_their_protocol() -> None:
    one = load({"training": {"own": {"rewards": {"exact": 2}, "steps": 7}}})
    two = load({"datasets": {"own": {"protocol": "pairwise"}}, "training": {"own": {"rewards": {"exact": 2}}}})
    rated, compared = (stages.TrainGrpo.of(c, "own", 0) for c in (one, two))
    weights = {"format": 0.1, "exact": 2}
    assert (rated.model.protocol, dict(rated.training.rewards)) == ("pointwise", weights | {"approximate": 2})
    assert (compared.model.protocol, dict(compared.training.rewards)) == ("pairwise", weights)
    assert (rated.training.steps, compared.training.steps) == (7, 80)
    for c, protocol in ((one, "pointwise"), (two, "pairwise")):
        assert stages.MeasureAccuracy.of(c, "own", "grpo", "imagereward", 0).protocol == protocol
        assert stages.MeasureAccuracy.of(c, "hpsv2", "grpo", "own", 0).protocol == "pairwise"


def test_tables_are_told_of_own_data_only_where_they_are_used() -> None:
    own: dict[str, Any] = {"datasets": {"own": {"title": "shapes"}}}
    assert "own_title" not in json.loads(stages.MakeTables.of(load(own)).canonical())
    for use in ({"tracks": ["own"]}, {"cross_tests": [{"track": "hpsv2", "test": "own"}]}):
        assert stages.MakeTables.of(load(own | use)).own_title == "shapes"


def test_defaults_that_the_canonical_json_omits_are_fixed() -> None:
    """A stage fills in what is omitted, so another default would change results without a rerun."""
    model = stages.ModelConfig.model_fields
    assert (model["attention"].default, model["image_processor"].default) == ("sdpa", {})
    vllm = {"gpu_memory_utilization": 0.3, "max_model_len": 4096, "server_url": "http://127.0.0.1:8000"}
    assert TrainingVllm().model_dump() == vllm
    omitting = {
        (owner.__name__, name)
        for owner in (*stages.STAGES.values(), stages.ModelConfig, PointwiseTraining, PairwiseTraining)
        for name, field in owner.model_fields.items()
        if field.exclude_if and field.default is not None
    }
    classes = (PointwiseTraining, PairwiseTraining)
    fixed = {"weight_decay": 0.0, "adam_beta1": 0.9}
    assert all(training().model_dump(include=set(fixed)) == {} for training in classes)  # omitted at the default
    assert all(getattr(training(), key) == value for training in classes for key, value in fixed.items())
    trainings = {(training.__name__, key) for training in classes for key in ("vllm", *fixed)}
    assert stages.MakeTables.model_fields["policies"].default == ["zeroshot", "grpo"]
    assert Configuration().datasets.hpsv2.hub.test_only is Configuration().datasets.imagereward.hub.test_only is False
    models = {("ModelConfig", "attention"), ("ModelConfig", "image_processor")}
    assert omitting == models | trainings | {("MakeTables", "policies")}


def test_shards_cover_the_test_prompts_once() -> None:
    for prompts, size in ((10, 3), (9, 3), (1, 5), (2000, 500)):
        c = load({"datasets": {"imagereward": {"test_prompts": prompts}}, "rollouts": {"shard_prompts": size}})
        ranges = [c.shard_range("imagereward", shard) for shard in targets.shards(c, "imagereward")]
        assert [position for start, stop in ranges for position in range(start, stop)] == list(range(prompts))


# ------------------------------------------------------------------------------------------------------------ snakemake


def dry_run(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Plan the real workflow in a folder where nothing exists."""
    command = [sys.executable, "-m", "snakemake", "-n", "-p", "--cores", "1", "--nolock", "--directory", str(tmp_path)]
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    command += ["--snakefile", str(ROOT / "Snakefile"), "--workflow-profile", str(ROOT / "profiles/default"), *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_a_misspelt_key_on_the_command_line_stops_before_any_job(tmp_path: Path) -> None:
    done = dry_run(tmp_path, "--config", "training={imagereward: {learning_rat: 1}}")
    assert done.returncode != 0
    message = "training.imagereward.learning_rat: unknown key; did you mean learning_rate?"
    assert message in done.stdout + done.stderr
    assert "rule " not in done.stdout
    assert not (tmp_path / "results").exists()


def test_a_nested_key_on_the_command_line_reaches_the_job(tmp_path: Path) -> None:
    overrides = "training={imagereward: {learning_rate: 1e-5, epochs: 0.5, lora: {rank: 4}}}"
    done = dry_run(
        tmp_path, "--config", overrides, "--", "results/policies/imagereward/seed0/adapter_model.safetensors"
    )
    assert done.returncode == 0, done.stderr
    (command,) = [
        line for line in (done.stdout + done.stderr).splitlines() if "workflow_scripts.stages.train_grpo" in line
    ]
    config = json.loads(command.split("--config '")[1].split("' --code_digest")[0])
    expected = load({"training": {"imagereward": {"learning_rate": 1e-5, "epochs": 0.5, "lora": {"rank": 4}}}})
    assert config == json.loads(stages.TrainGrpo.of(expected, "imagereward", 0).canonical())
    assert config["training"]["learning_rate"] == 1e-5
    assert (config["training"]["steps"], config["training"]["epochs"]) == (None, 0.5)
    assert not (tmp_path / "results").exists()


def test_a_run_without_training_plans_the_test_sets_alone(tmp_path: Path) -> None:
    filled_in = tmp_path / "filled_in.yaml"
    filled_in.write_text(yaml.safe_dump(FILLED_IN))
    done = dry_run(tmp_path, "--configfile", str(ROOT / "configs/published-policy.yaml"), str(filled_in))
    assert done.returncode == 0, done.stderr
    commands = [line.strip() for line in done.stdout.splitlines() if "workflow_scripts.stages." in line]
    ran = {line.split("workflow_scripts.stages.")[1].split()[0] for line in commands}
    assert {"download_dataset", "generate_rollouts", "make_tables", "make_figures", "make_report"} <= ran
    assert "train_grpo" not in ran
    written = re.findall(r"datasets/(?:imagereward|hpsv2)/(\w+)/", "".join(commands))
    assert set(written) == {"test"} and "/zeroshot/" in done.stdout and "/grpo/" not in done.stdout

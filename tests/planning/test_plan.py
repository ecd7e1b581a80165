"""The command: what fits, what it says otherwise, and what it takes from the published facts."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_families import SETTINGS, save

from workflow_scripts.configuration.model import Configuration, ConfigurationError, TrainingVllm
from workflow_scripts.configuration.overlays import parse_changes, read_configuration
from workflow_scripts.configuration.published import PUBLISHED
from workflow_scripts.files.paths import ROOT
from workflow_scripts.planning.costs import Length, decoding_seconds, prefill_flops
from workflow_scripts.planning.devices import FACTS, GIGABYTE, Assumptions, PlanError, data_sheet
from workflow_scripts.planning.memory import VLLM_WORKSPACE
from workflow_scripts.planning.plan import Plan, Stage, completion_length, plan
from workflow_scripts.planning.report import as_json, report
from workflow_scripts.planning.workload import published_totals

PAPER, PAPER_3B = ROOT / "configs/paper.yaml", ROOT / "configs/paper-3b.yaml"
PAPER_LONG = ROOT / "configs/paper-long.yaml"
# The fallback that both files name: no vLLM.
TRANSFORMERS = [
    f"training={json.dumps({track: {'generation': 'transformers'} for track in ('imagereward', 'hpsv2')})}",
    "rollouts={engine: transformers, batch_items: 64}",
]


def configured(files: list[Path], settings: list[str]) -> Configuration:
    """The default with overlays and changes."""
    return read_configuration(files, parse_changes(settings))


def planned(path: Path, gpu: str, *settings: str) -> Plan:
    """The plan of a configuration on a GPU."""
    return plan(configured([path], list(settings)), data_sheet(gpu), Assumptions())


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "workflow_scripts", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is here that a run of the paper's configuration would have made, and no model in the Hub's cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("workflow_scripts.planning.tokens.try_to_load_from_cache", lambda *_, **__: None)


@pytest.mark.parametrize(("path", "gpu"), [(PAPER, "h100-80gb"), (PAPER, "a100-80gb"), (PAPER_3B, "rtx4090")])
def test_the_paper_s_configurations_fit_the_gpu_they_are_for(path: Path, gpu: str) -> None:
    assert planned(path, gpu).warnings == []


def test_a_published_policy_is_planned_as_the_one_that_it_was_tuned_from(tmp_path: Path) -> None:
    """Rollouts alone; of the data the test sets alone; unknown models are named with this remedy."""
    path = ROOT / "configs/published-policy.yaml"
    filled_in = tmp_path / "filled_in.yaml"
    prompt = "First: {image} Second: {image} Which one shows {prompt} better?"
    filled_in.write_text(yaml.safe_dump({"policy": {"hub": {"revision": "main"}}, "prompts": {"pairwise": prompt}}))
    with pytest.raises(
        PlanError, match=r"as in --config 'policy=\{hub: \{repository: Qwen/Qwen2\.5-VL-7B-Instruct\}\}'"
    ):
        plan(configured([path, filled_in], []), data_sheet("h100-80gb"), Assumptions())
    known = "policy={hub: {repository: Qwen/Qwen2.5-VL-7B-Instruct}}"
    made = plan(configured([path, filled_in], [known]), data_sheet("h100-80gb"), Assumptions())
    assert [stage.name for stage in made.stages] == [
        "generate_rollouts hpsv2 zeroshot on hpsv2",
        "generate_rollouts hpsv2 zeroshot on imagereward",
    ]
    files = [PUBLISHED[name]["files"] for name in ("imagereward", "hpsv2")]
    tests = sum(entry["bytes"] for named in files for name, entry in named.items() if "test" in name)
    weights = sum(entry["bytes"] for entry in PUBLISHED["qwen2.5-vl-7b"]["files"].values())
    assert sum(artifact.download for artifact in made.artifacts) == tests + weights
    assert "LoRA" not in report(made) and not any("adapter" in artifact.name for artifact in made.artifacts)


def test_without_vllm_the_paper_s_configurations_fit_as_well() -> None:
    assert planned(PAPER, "h100-80gb", *TRANSFORMERS).warnings == []
    assert planned(PAPER_3B, "rtx4090", "rollouts={engine: transformers, batch_items: 24}").warnings == []


def test_vllm_beside_the_trainer_does_not_fit_24_gb() -> None:
    """As configs/paper-3b.yaml says of both tracks: the least share that starts leaves too little for validation."""
    vllm = {"generation": "vllm_colocate", "vllm": {"gpu_memory_utilization": 0.46}}
    settings = f"training={json.dumps({'imagereward': vllm, 'hpsv2': vllm})}"
    told = planned(PAPER_3B, "rtx4090", settings).warnings
    assert len(told) == 2 and all("generation to transformers" in text for text in told)
    small = planned(PAPER_3B, "rtx4090", settings.replace("0.46", "0.4")).warnings[0]
    assert "vLLM needs 10.8 GB for weights, workspace and one sequence, more than its share of rtx4090; raise" in small
    assert "training.imagereward.vllm.gpu_memory_utilization (0.4)" in small


def test_a_step_s_completions_fit_into_the_cache_that_the_paper_s_shares_leave() -> None:
    """At their full budgets, the questions held once for their group: no row waits for another to end."""
    p = planned(PAPER, "h100-80gb")
    for stage, track in zip(p.stages, ("imagereward", "hpsv2"), strict=False):
        t = getattr(p.configuration.training, track)
        cache = t.vllm.gpu_memory_utilization * p.gpu.memory - p.model.weights - VLLM_WORKSPACE
        tokens = t.prompts_per_step * (stage.asked.longest + t.group_size * t.max_completion_tokens)
        assert 0 < tokens * p.model.kv_bytes < cache
        assert stage.asked.longest + t.max_completion_tokens < t.vllm.max_model_len


def test_the_7b_does_not_fit_24_gb_and_the_plan_says_why() -> None:
    told = planned(PAPER, "rtx4090", *TRANSFORMERS).warnings
    assert any("generation" in text and "prompts_per_step" in text for text in told)
    assert any("generate_rollouts" in text and "batch_items" in text for text in told)
    assert all(" GB do not fit into the 21.6 GB that rtx4090 has to give" in text for text in told)
    (weights, *_) = planned(PAPER, "rtx4090", *TRANSFORMERS, "policy={dtype: float32}").warnings
    assert "the weights alone do not: set policy.hub.repository" in weights


@pytest.mark.parametrize(
    ("phase", "change", "remedy"),
    [
        ("update", {"gradient_checkpointing": False}, {"gradient_checkpointing": True}),
        ("update", {"gradient_accumulation": 1}, {"gradient_accumulation": 16}),
        ("generation", {"prompts_per_step": 64, "generation": "trl"}, {"prompts_per_step": 16}),
    ],
)
def test_the_key_that_is_named_makes_it_fit(phase: str, change: dict[str, Any], remedy: dict[str, Any]) -> None:
    (key,) = remedy
    without_vllm = {"generation": "transformers"}
    change, remedy = without_vllm | change, without_vllm | remedy
    wrong = planned(PAPER, "h100-80gb", f"training={json.dumps({'imagereward': change})}").warnings
    assert any(f"imagereward, {phase}" in text and f"training.imagereward.{key}" in text for text in wrong), wrong
    assert planned(PAPER, "h100-80gb", f"training={json.dumps({'imagereward': change | remedy})}").warnings == []


def test_several_processes_share_the_work_and_what_the_strategy_shares_of_the_memory() -> None:
    own_loop = f"training={json.dumps({track: {'generation': 'trl'} for track in ('imagereward', 'hpsv2')})}"

    def training(processes: int, strategy: str) -> Stage:
        settings = f"distributed={json.dumps({'processes': processes, 'strategy': strategy})}"
        return planned(PAPER, "h100-80gb", settings, own_loop).stages[0]  # the loop that FSDP takes in any case

    one, ddp, fsdp, deepspeed = training(1, "ddp"), training(4, "ddp"), training(4, "fsdp"), training(4, "deepspeed")
    flops = [sum(cost.flops for cost in stage.costs.values()) for stage in (one, ddp, fsdp, deepspeed)]
    assert flops[1] == pytest.approx(flops[0], rel=1e-9) and flops[3] == flops[1]
    again = 3 * one.costs["validation"].flops  # with FSDP each of the four does all of it
    assert flops[2] == pytest.approx(flops[0] + again, rel=1e-9)
    assert one.costs["generation"].seconds < ddp.costs["generation"].seconds <= 4 * one.costs["generation"].seconds
    assert ddp.costs["update"].seconds == pytest.approx(one.costs["update"].seconds, rel=1e-9)

    before, after = one.memory["update"], ddp.memory["update"]
    assert after["activations"] == pytest.approx(before["activations"] / 4, rel=0.02)
    assert after["weights"] == before["weights"]
    assert after["optimizer"] == pytest.approx(before["optimizer"] * 4 / 3)  # DDP's buckets of gradients
    assert deepspeed.memory["update"]["optimizer"] == before["optimizer"] / 4
    assert before["weights"] / 4 < fsdp.memory["update"]["weights"] < before["weights"] / 1.5
    told = report(planned(PAPER, "h100-80gb", "distributed={processes: 4}"))
    assert "GPU-hours (a training runs on 4 GPUs at once: it takes 1/4 of its GPU-hours)" in told


def test_an_expression_that_also_matches_the_vision_tower_is_told() -> None:
    lora = json.dumps({"imagereward": {"lora": {"target_modules": r".*\.(q_proj|gate_proj|up_proj)"}}})
    (told,) = planned(PAPER, "h100-80gb", f"training={lora}").warnings
    assert "matches 148 layers, 64 of them in the vision tower" in told  # 3 x 28 and 2 x 32


def test_published_data_are_planned_from_their_totals() -> None:
    """The whole test sets, all of ImageReward's training set, a quarter of HPDv2's; checked by hand."""
    stages = {stage.name: stage for stage in planned(PAPER, "h100-80gb").stages}
    assert stages["train_grpo imagereward"].asked.items == 49_900
    assert stages["train_grpo hpsv2"].asked.items == pytest.approx(645_090 / 4)
    rated = stages["generate_rollouts imagereward grpo on imagereward"]
    assert (rated.asked.prompts, rated.asked.items, rated.rollouts, rated.jobs) == (466, 2_720, 8_160, 1)
    compared = stages["generate_rollouts hpsv2 grpo on hpsv2"]
    assert (compared.asked.items, compared.rollouts, compared.jobs) == (3_700 - 400, 9_900, 1)
    assert stages["generate_rollouts hpsv2 grpo on imagereward"].asked.items == 2_720 - 466
    assert not rated.asked.counted
    both = planned(PAPER, "h100-80gb", "rollouts={both_orders: true}").stages
    assert next(s for s in both if s.name == compared.name).asked.items == 2 * 3_300


def test_a_fraction_of_pairs_keeps_more_images_than_a_fraction_of_prompts() -> None:
    """Each image is in three of its prompt's six pairs."""
    c = configured([PAPER], ["datasets={hpsv2: {subsample_by: pair}}"])
    prompts, images, pairs = published_totals(c, "hpsv2", "train")
    assert pairs == PUBLISHED["hpsv2"]["counts"]["train"]["pairs"] / 4
    assert images == pytest.approx(430_060 * (1 - 0.75**3))
    assert prompts == pytest.approx(107_515 * (1 - 0.75**6))


def test_downloads_are_the_published_bytes_and_none_for_a_folder_of_the_user() -> None:
    def downloads(*settings: str) -> dict[str, float]:
        return {a.name: a.download for a in planned(PAPER, "h100-80gb", *settings).artifacts if a.download}

    files = PUBLISHED["hpsv2"]["files"]
    assert downloads()["hpsv2, raw"] == sum(file["bytes"] for file in files.values())
    assert downloads()["policy"] == pytest.approx(16.6e9, rel=1e-3)
    one = downloads("datasets={imagereward: {hub: {train_set: 1k}}}")["imagereward, raw"]
    assert downloads()["imagereward, raw"] - one == 20_900_000_000 - 2_700_000_000
    assert "hpsv2, raw" not in downloads("datasets={hpsv2: {hub: {path: /data/hpdv2}}}")


def test_the_24_gb_configuration_differs_in_nothing_but_what_it_says() -> None:
    def leaves(value: Any, key: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {key: value}
        return {k: v for name, inner in value.items() for k, v in leaves(inner, f"{key}.{name}".strip(".")).items()}

    large, small = (leaves(yaml.safe_load(path.read_text(encoding="utf-8"))) for path in (PAPER, PAPER_3B))
    vllm = {f"training.{track}.vllm.{key}" for track in ("imagereward", "hpsv2") for key in TrainingVllm.model_fields}
    assert large.keys() - small.keys() <= vllm and small.keys() <= large.keys()
    differing = {
        key.replace("training.hpsv2", "training.*").replace("training.imagereward", "training.*")
        for key in small
        if large[key] != small[key]
    }
    changed = {"generation", "gradient_accumulation"}
    assert differing == {"results", "policy.hub.repository", "policy.hub.revision"} | {
        f"training.*.{key}" for key in changed
    }
    for track in ("imagereward", "hpsv2"):
        items = [c[f"training.{track}.steps"] * c[f"training.{track}.prompts_per_step"] for c in (large, small)]
        assert items[0] == items[1] == 8000


def test_epochs_cost_the_steps_that_they_take() -> None:
    short = planned(PAPER, "h100-80gb")
    long = plan(configured([PAPER, PAPER_LONG], []), short.gpu, short.assumed)
    for few, many in zip(short.stages[:2], long.stages[:2], strict=True):
        steps = math.ceil(2 * many.asked.items / 16)
        assert many.name.startswith("train_grpo") and many.rollouts == steps * 16 * 8
        for part in ("generation", "reference", "update"):
            assert many.costs[part].seconds == pytest.approx(few.costs[part].seconds * steps / 500)
        # At the beginning, every 500 or 100 steps, and at the end.
        validations = 1 + math.ceil(steps / 500)
        assert many.costs["validation"].seconds == pytest.approx(few.costs["validation"].seconds * validations / 6)


@pytest.mark.parametrize("path", [PAPER, PAPER_3B])
def test_revisions_are_the_published_ones(path: Path) -> None:
    c = configured([path], [])
    (entry,) = (e for e in PUBLISHED.values() if e["repository"] == c.policy.hub.repository)
    assert c.policy.hub.revision == entry["revision"]


def test_time_is_bound_by_what_takes_longest() -> None:
    p = planned(PAPER, "h100-80gb")
    free = Assumptions(kernel_microseconds=0)
    length = Length(1, 1)
    read = p.model.language_bytes / (p.gpu.bandwidth * free.bandwidth_used)
    assert decoding_seconds(p.model, p.gpu, free, 1, 1, 0, length, adapted=False) == pytest.approx(read, rel=1e-4)
    launched = Assumptions(kernel_microseconds=1000)
    alone, beside = (decoding_seconds(p.model, p.gpu, launched, 1, 1, 0, length, adapted=a) for a in (False, True))
    assert alone == pytest.approx(0.001 * p.model.kernels(adapted=False))
    # For each of the 7 adapted matrices of a layer: two products, their sum and its scale, two changes of type.
    assert beside - alone == pytest.approx(0.001 * 28 * 7 * 6)
    graphs = decoding_seconds(p.model, p.gpu, launched, 1, 1, 0, length, adapted=False, launched=False)
    assert graphs == pytest.approx(read, rel=1e-4)
    # 10,000 rows of short sequences are bound by their products: 2 FLOPs for each weight.
    many = decoding_seconds(p.model, p.gpu, free, 10_000, 10_000, 0, length, adapted=False)
    products = 10_000 * 2 * p.model.language_bytes / 2 / (p.gpu.flops * free.flops_used)
    assert many == pytest.approx(products, rel=1e-3)


def test_every_job_loads_the_model_and_vllm_starts_anew() -> None:
    """By hand: 15 seconds and 16.58 GB at 1 GB/s; vLLM's start; in training both models."""
    p, whole = planned(PAPER, "h100-80gb"), 15 + p7b() + 90
    trained, rated = p.stages[0], p.stages[2]
    assert trained.costs["loading"].seconds == pytest.approx(whole + p7b())
    assert rated.costs["loading"].seconds == pytest.approx(whole)
    shards = planned(PAPER, "h100-80gb", "rollouts={shard_prompts: 100}", "seeds=[0, 1]").stages[2]
    assert shards.jobs == 10 and shards.costs["loading"].seconds == pytest.approx(5 * whole)  # of one seed
    eager = planned(PAPER, "h100-80gb", "rollouts={vllm: {enforce_eager: true}}").stages[2]
    assert eager.costs["loading"].seconds == pytest.approx(whole - 90)
    assert eager.costs["rollouts"].seconds > rated.costs["rollouts"].seconds  # its kernels are launched one by one
    transformers = planned(PAPER, "h100-80gb", *TRANSFORMERS).stages
    for stage in (transformers[0], transformers[2]):
        assert stage.costs["loading"].seconds == pytest.approx(15 + p7b())
    free = Assumptions(start_seconds=0, vllm_start_seconds=0, load_gigabytes_per_second=1e9)
    nothing = plan(configured([PAPER], []), data_sheet("h100-80gb"), free).stages[0].costs["loading"]
    assert nothing.seconds == pytest.approx(0, abs=1e-6)


def p7b() -> float:
    """Seconds in which the weights of the 7B model, 2 bytes each, come at 1 GB/s."""
    return 8_292_166_656 * 2 / 1e9


@pytest.mark.parametrize(
    ("generation", "share", "prepared"),
    [
        ("transformers", True, 2),  # for generation, and for the passes over completions
        ("transformers", False, 1 + 8),
        ("trl", True, 2),
        ("trl", False, 16),
        ("vllm_colocate", True, 3),  # TRL's tokens, vLLM, and the passes
    ],
)
def test_images_of_a_step_are_decoded_once_and_prepared_for_each_use(
    generation: str, share: bool, prepared: int
) -> None:
    settings = {"generation": generation, "share_prompts": share, "steps": 100, "validate_every": 100}
    p = planned(PAPER, "h100-80gb", f"training={json.dumps({'hpsv2': settings})}")
    stage, megapixels = p.stages[1], 512 * 512 / 1e6
    decoding, preparing = (
        each["image"] + each["megapixel"] * megapixels for each in FACTS["image_milliseconds"].values()
    )
    pairs = p.configuration.datasets.hpsv2.validation_prompts * 6
    shown = 100 * 16 * 2 * (decoding + prepared * preparing) + 2 * pairs * 2 * (decoding + preparing)
    assert stage.costs["images"].seconds == pytest.approx(shown / 1000, rel=1e-3)


def test_images_of_rollouts_are_prepared_once_an_item() -> None:
    stage = planned(PAPER, "h100-80gb").stages[2]
    each = sum(e["image"] + e["megapixel"] * 512 * 512 / 1e6 for e in FACTS["image_milliseconds"].values())
    assert stage.costs["images"].seconds == pytest.approx(2_720 * each / 1000)
    assert stage.highest.seconds > sum(cost.seconds for cost in stage.costs.values())


def test_vllm_waits_less_where_more_items_come_together() -> None:
    def rollouts(gpu: str, items: int) -> float:
        found = planned(PAPER, gpu, f"rollouts={{batch_items: {items}}}").stages[2].costs["rollouts"]
        return found.seconds

    assert rollouts("h100-80gb", 256) < rollouts("h100-80gb", 32)
    # 32 items, 96 rows at once: 85 batches of 1,032 steps, in each of which half of the rows are left on average.
    p = planned(PAPER, "h100-80gb")
    asked, m = p.stages[2].asked, p.model
    step = (
        decoding_seconds(m, p.gpu, p.assumed, 48, 48, asked.mean, Length(516, 1), adapted=False, launched=False)
        + 48 * 20e-6
    )
    prefill = prefill_flops(m, asked.mean, asked.images, False) * asked.items / (p.gpu.flops * 0.35)
    assert rollouts("h100-80gb", 32) == pytest.approx(85 * 1032 * step + prefill, rel=1e-3)


def test_the_engine_s_loop_and_shared_prompts_cost_less_than_trl_alone() -> None:
    def training(**settings: Any) -> dict[str, Any]:
        return (
            planned(ROOT / "config.yaml", "h100-80gb", f"training={json.dumps({'imagereward': settings})}")
            .stages[0]
            .costs
        )

    ours = training(reward_signal="sampled")
    plain = training(reward_signal="sampled", generation="trl", share_prompts=False)
    for part in ("generation", "reference", "update"):
        assert ours[part].flops < 0.6 * plain[part].flops, part
    assert ours["validation"] == plain["validation"]


def test_completions_are_a_share_of_their_budget_until_they_are_measured() -> None:
    paper, default = configured([PAPER], []), configured([], [])
    assert completion_length(paper, Assumptions(completion_share=0.25), "hpsv2", 1000) == Length(250, 1000)
    known = FACTS["bundled_completions"]["pairwise"]
    assert completion_length(default, Assumptions(), "hpsv2", 64) == Length(known["mean"], known["longest"])


def test_a_model_that_is_not_known_is_refused_with_what_to_do() -> None:
    with pytest.raises(PlanError, match=r"neither on this machine nor known here.*policy\.hub\.path"):
        planned(PAPER, "h100-80gb", "policy={hub: {repository: someone/else, revision: main}}")
    with pytest.raises(ConfigurationError, match="give key=value"):
        configured([PAPER], ["seeds"])


@pytest.mark.parametrize("family", ["qwen3_vl", "smolvlm"])
def test_a_folder_of_another_family_is_planned(family: str, tmp_path: Path) -> None:
    folder, settings = save(family, tmp_path / family), SETTINGS[family]
    hub = {"source": "hub", "hub": {"path": str(folder)}}
    lora = {"lora": {"target_modules": rf".*{settings['language_model']}.*\.(q_proj|v_proj)"}}
    training = {"imagereward": lora, "hpsv2": lora}
    p = plan(
        read_configuration([], {"policy": settings["policy"] | hub, "training": training}),
        data_sheet("l4"),
        Assumptions(),
    )
    assert p.warnings == []
    told = report(p)
    assert f"Policy {folder}: {p.model.architecture.parameters:,} parameters" in told and "on 4 layers" in told
    value = json.loads(as_json(p))
    assert value["model"]["parameters"] == p.model.architecture.parameters
    assert value["model"]["architecture"]["vision"]["depth"] == 2
    costs = [item for stage in value["stages"] for item in stage["costs"].items()]
    assert all(cost["seconds"] > 0 for _, cost in costs)
    assert all((cost["flops"] > 0) == (part not in ("images", "loading")) for part, cost in costs)


def test_the_report_names_every_stage_and_the_sum() -> None:
    text = report(planned(PAPER, "h100-80gb"))
    for stage in planned(PAPER, "h100-80gb").stages:
        assert text.count(stage.name) >= 3
    assert "8,292,166,656 parameters" in text and "196 layers" in text


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["seeds=[0, 1, 2]"],
        ["seeds=[0, 1]", "policy={dtype: float32, hub: {path: a}}", "numeric_threads=2"],
        ["results=a,b", 'prompts={pointwise: "{image} x,y=z, {prompt}"}', "seeds=[1]"],
    ],
    ids=str,
)
def test_settings_of_the_command_line_are_those_of_the_configuration(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from workflow_scripts import __main__
    from workflow_scripts.commands.plan import Plan as PlanCommand

    read: list[list[str]] = []
    monkeypatch.setattr(PlanCommand, "cli_cmd", lambda command: read.append(command.config))
    __main__.main(["plan", *(word for setting in settings for word in ("--config", setting))])
    assert read == [settings]


def test_the_command_line() -> None:
    done = run("--configfile", str(PAPER), "--gpu", "rtx4090", "--format", "json", "--strict")
    assert done.returncode == 1, done.stderr
    value = json.loads(done.stdout)
    assert value["model"]["parameters"] == 8_292_166_656 and value["gpu"]["memory"] == 24 * GIGABYTE
    assert len(value["stages"]) == 7 and value["warnings"]
    wrong = run("--configfile", str(PAPER), "--config", "seed=[1]")
    assert (wrong.returncode, wrong.stdout) == (1, "") and "did you mean seeds?" in wrong.stderr
    unknown = run("--gpu", "h1000")
    assert (unknown.returncode, unknown.stdout) == (2, "") and "known are h200" in unknown.stderr

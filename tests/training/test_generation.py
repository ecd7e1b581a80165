"""Who generates in training, and which engine records rollouts: what the configuration makes of it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from PIL import Image
from transformers import AutoConfig, AutoProcessor
from trl import GRPOTrainer

from workflow_scripts.configuration.jobs import interpreter
from workflow_scripts.configuration.model import ConfigurationError, load
from workflow_scripts.configuration.stages import GenerateRollouts, ModelConfig, TrainGrpo
from workflow_scripts.files.paths import ROOT
from workflow_scripts.policy.loading import load_model, load_processor
from workflow_scripts.policy.manifest import PolicyError
from workflow_scripts.policy.prompts import messages
from workflow_scripts.training.generation import (
    adapter_merged,
    check_generation,
    engine_generates,
    served_folder,
)
from workflow_scripts.training.settings import grpo_config
from workflow_scripts.training.trainer import ValidatingTrainer

# What vLLM is told, all of it other than the default.
TRAINING_VLLM = {"gpu_memory_utilization": 0.4, "max_model_len": 512, "server_url": "http://127.0.0.1:9"}
ROLLOUTS_VLLM = {"gpu_memory_utilization": 0.5, "max_model_len": 512, "enforce_eager": True, "cpu_cache_gigabytes": 2}
GPU = {"policy": {"device": "cuda", "dtype": "bfloat16"}}
# Any engine generates for rewards of the sampled answer; the default, `expected`, needs what transformers records.
SAMPLED = {track: {"reward_signal": "sampled"} for track in ("imagereward", "hpsv2")}


def training(**keys: Any) -> Any:
    """A configuration whose pairwise training has these keys, on a GPU, with rewards of the sampled answer."""
    return load(GPU | {"training": SAMPLED | {"hpsv2": SAMPLED["hpsv2"] | keys}})


def rollouts(c: Any) -> str:
    """Canonical configuration of a rollout job."""
    return GenerateRollouts.of(c, "hpsv2", "grpo", "hpsv2", 0, 0, 0).canonical()


def test_vllm_does_not_exist_for_what_transformers_generates() -> None:
    default = training()
    plain = TrainGrpo.of(default, "hpsv2", 0).canonical()
    assert "vllm" not in plain + rollouts(default)
    assert TrainGrpo.of(training(vllm=TRAINING_VLLM), "hpsv2", 0).canonical() == plain
    told = load({"rollouts": {"vllm": ROLLOUTS_VLLM}, "vllm_python": "/elsewhere"})
    assert rollouts(told) == rollouts(load({}))


def test_where_vllm_generates_each_of_its_keys_counts() -> None:
    chosen = {"engine": "vllm"}
    found = {rollouts(load({"rollouts": chosen | {"vllm": {key: value}}})) for key, value in ROLLOUTS_VLLM.items()}
    plain = rollouts(load({"rollouts": chosen}))
    assert len(found | {plain, rollouts(load({}))}) == len(ROLLOUTS_VLLM) + 2
    assert rollouts(load({"rollouts": chosen, "vllm_python": "/elsewhere"})) == plain
    configs = [training(generation="vllm_colocate", vllm={key: value}) for key, value in TRAINING_VLLM.items()]
    configs += [
        training(generation=generation) for generation in ("transformers", "trl", "vllm_colocate", "vllm_server")
    ]
    assert len({TrainGrpo.of(c, "hpsv2", 0).canonical() for c in configs}) == len(configs)
    for c in configs:  # what a stage reads back is what was configured
        written = TrainGrpo.of(c, "hpsv2", 0)
        assert TrainGrpo.model_validate_json(written.canonical()) == written


@pytest.mark.parametrize("generation", ["transformers", "trl"])
def test_keys_of_vllm_rerun_only_what_vllm_generates(generation: str) -> None:
    given = [training(generation=generation, vllm=vllm) for vllm in ({}, TRAINING_VLLM)]
    assert len({TrainGrpo.of(c, "hpsv2", 0).canonical() for c in given}) == 1


def test_trl_is_told_who_generates(tmp_path: Path) -> None:
    found = {}
    for generation in ("transformers", "vllm_colocate", "vllm_server"):
        c = training(generation=generation, vllm=TRAINING_VLLM)
        config = TrainGrpo.of(c, "hpsv2", 0)
        cpu = config.model_copy(update={"model": config.model.model_copy(update={"device": "cpu"})})
        found[generation] = grpo_config(cpu, tmp_path, resumed=False)
    assert not found["transformers"].use_vllm
    colocate, server = found["vllm_colocate"], found["vllm_server"]
    assert (colocate.use_vllm, colocate.vllm_mode) == (True, "colocate")
    assert (colocate.vllm_gpu_memory_utilization, colocate.vllm_max_model_length) == (0.4, 512)
    assert (server.use_vllm, server.vllm_mode, server.vllm_server_base_url) == (True, "server", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("generation", "keys", "message"),
    [
        ("vllm_server", {"policy": {"dtype": "bfloat16"}}, "is for a GPU but policy.device is cpu"),
        ("vllm_colocate", {"policy": {"dtype": "bfloat16"}}, "is for a GPU but policy.device is cpu"),
        ("vllm_colocate", {"policy": {"device": "cuda"}}, "needs policy.dtype bfloat16 or float16, not float32"),
        (
            "vllm_colocate",
            {
                "policy": {"device": "cuda", "dtype": "bfloat16"},
                "distributed": {"processes": 2, "strategy": "fsdp"},
            },
            "distributed.strategy fsdp does not leave there; set the strategy to ddp",
        ),
    ],
)
def test_generation_by_vllm_is_refused_where_it_would_be_wrong(
    generation: str, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=rf"training\.hpsv2\.generation {generation} .*{re.escape(message)}"):
        load(keys | {"training": SAMPLED | {"hpsv2": SAMPLED["hpsv2"] | {"generation": generation}}})


@pytest.mark.parametrize("generation", ["trl", "vllm_colocate", "vllm_server"])
def test_expected_rewards_are_refused_where_no_distribution_is_recorded(generation: str) -> None:
    track = {"generation": generation}
    message = (
        rf"training\.hpsv2\.reward_signal expected .* training\.hpsv2\.generation {generation} does not record; set it "
        "to transformers, or reward_signal to sampled"
    )
    with pytest.raises(ConfigurationError, match=message):
        load(GPU | {"training": {"hpsv2": track}})
    assert load(GPU | {"training": {"hpsv2": track | {"reward_signal": "sampled"}}})
    assert load(GPU | {"tracks": ["imagereward"], "training": {"hpsv2": track}})


def test_trainings_on_sampled_and_on_expected_answers_are_told_apart() -> None:
    sampled, expected = (TrainGrpo.of(training(reward_signal=signal), "hpsv2", 0) for signal in ("sampled", "expected"))
    for config in (sampled, expected):
        assert TrainGrpo.model_validate_json(config.canonical()) == config
    assert sampled != expected and sampled.canonical() != expected.canonical()


@pytest.mark.parametrize(
    ("key", "value", "needed"),
    [("importance_sampling_level", "sequence", "token"), ("scale_rewards", "batch", "none")],
)
def test_expected_rewards_are_refused_where_the_answer_has_no_advantage_of_its_own(
    key: str, value: str, needed: str
) -> None:
    wanted = f"training.hpsv2: reward_signal expected .* needs {key} {needed}; it is {value}: set it so, or "
    with pytest.raises(ConfigurationError, match=wanted):
        load({"training": {"hpsv2": {key: value}}})


def test_expected_rewards_are_refused_with_fsdp_where_trls_loop_generates() -> None:
    keys = {"policy": {"device": "cuda"}, "tracks": ["hpsv2"]}
    for strategy in ("ddp", "deepspeed"):
        c = load(keys | {"distributed": {"processes": 2, "strategy": strategy}})
        assert engine_generates(TrainGrpo.of(c, "hpsv2", 0))
    message = r"training\.hpsv2\.reward_signal expected .* distributed\.strategy fsdp .*; set the strategy to ddp, or "
    with pytest.raises(ConfigurationError, match=message):
        load(keys | {"distributed": {"processes": 2, "strategy": "fsdp"}})


@pytest.mark.parametrize("generation", ["vllm_colocate", "vllm_server"])
def test_generation_by_vllm_is_refused_where_there_is_none(generation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PolicyError, match=rf"generation is {generation}, but there is no vLLM in .*set vllm_python"):
        check_generation(TrainGrpo.of(training(generation=generation), "hpsv2", 0))
    check_generation(TrainGrpo.of(training(), "hpsv2", 0))


def test_a_temperature_that_vllm_does_not_take_is_refused_where_it_generates() -> None:
    hot = {"sampling": {"temperature": 2.5}}
    assert load({"rollouts": hot})
    with pytest.raises(ConfigurationError, match=r"rollouts\.sampling\.temperature 2\.5 is more than vLLM takes, 2"):
        load({"rollouts": hot | {"engine": "vllm"}})


def test_a_track_that_is_not_run_may_say_anything() -> None:
    assert load({"tracks": ["imagereward"], "training": {"hpsv2": {"generation": "vllm_server"}}})


def test_where_vllm_generates_all_trainings_and_rollouts_run_in_its_environment() -> None:
    path = str(ROOT / ".venv-vllm/bin/python")
    server = {"hpsv2": SAMPLED["hpsv2"] | {"generation": "vllm_server"}}
    found = {
        rule: [
            interpreter(c, rule)
            for c in (
                load({}),
                load({"rollouts": {"engine": "vllm"}}),
                training(generation="vllm_server"),
                training(generation="trl"),
                load({"policies": ["zeroshot"], "training": server}),
            )
        ]
        for rule in ("generate_rollouts", "train_grpo", "score_rollouts")
    }
    assert found == {
        "generate_rollouts": ["python", path, path, "python", "python"],
        "train_grpo": ["python", path, path, "python", "python"],
        "score_rollouts": ["python"] * 5,
    }
    spaced = load({"rollouts": {"engine": "vllm"}, "vllm_python": "/a folder/python"})
    assert interpreter(spaced, "generate_rollouts") == "'/a folder/python'"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_merged_for_the_time_being_where_that_rounds_nothing(base_manifest: Path, dtype: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig.of(load({"policy": {"dtype": dtype}}), "hpsv2")
    lora = LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|down_proj)", init_lora_weights=False)
    model = get_peft_model(load_model(base_manifest, config), lora).eval()
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        beside = model(input_ids=ids).logits
        with pytest.raises(KeyError), adapter_merged(model, dtype):  # whatever happens within
            assert {layer.merged for layer in layers} == {dtype == "float32"}
            torch.testing.assert_close(model(input_ids=ids).logits, beside, rtol=0, atol=1e-4)
            raise KeyError
    assert not any(layer.merged for layer in layers)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]), name


def test_colocated_vllm_finds_the_configured_image_size_and_type(base_manifest: Path, tmp_path: Path) -> None:
    policy = {"min_pixels": 1568, "max_pixels": 3136, "dtype": "bfloat16"}
    config = ModelConfig.of(load({"policy": policy}), "hpsv2")
    base = ROOT / json.loads(base_manifest.read_text())["path"]
    model, processor = load_model(base_manifest, config), load_processor(base_manifest, config)
    served = served_folder(base, model, processor, tmp_path / "served")
    size = AutoProcessor.from_pretrained(served).image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (1568, 3136)
    one, two = (AutoConfig.from_pretrained(folder) for folder in (served, base))
    assert (one.dtype, two.dtype) == (torch.bfloat16, torch.float16)
    for part in ("text_config", "vision_config"):
        assert getattr(one, part).to_dict() | {"dtype": ""} == getattr(two, part).to_dict() | {"dtype": ""}
    assert (served / "model.safetensors").resolve() == (base / "model.safetensors").resolve()
    assert served_folder(base, model, processor, tmp_path / "served") == served  # on resuming


@pytest.mark.parametrize(("mode", "images"), [("colocate", 2), ("server", 13), (None, 13)])
def test_colocated_vllm_is_given_one_token_for_each_image(
    mode: str | None, images: int, base_manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig.of(load({}), "hpsv2")
    trainer = object.__new__(ValidatingTrainer)
    trainer.use_vllm, trainer.vllm_mode = mode is not None, mode
    trainer.processing_class = processor = load_processor(base_manifest, config)
    # As TRL does in these two; its own need an engine.
    monkeypatch.setattr(
        GRPOTrainer,
        "_tokenize_prompts",
        lambda self, prompts: processor.apply_chat_template(
            prompts, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"],
    )
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", lambda self, prompt_ids, shown: (prompt_ids, shown))
    (turn,) = messages(config.template, "a red circle")
    shown = [Image.new("RGB", (84, 84)), Image.new("RGB", (56, 56))]  # 9 and 4 tokens
    waiting = iter(shown)
    turn["content"] = [part | {"image": next(waiting)} if part["type"] == "image" else part for part in turn["content"]]
    expanded = trainer._tokenize_prompts([[turn]])
    (generated,), given = trainer._generate_single_turn(expanded, shown)
    assert generated.count(processor.image_token_id) == images and given is shown
    assert expanded[0].count(processor.image_token_id) == 13
    assert [t for t in generated if t != processor.image_token_id] == [
        t for t in expanded[0] if t != processor.image_token_id
    ]

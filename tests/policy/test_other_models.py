"""Models of other families through the real stages, by configuration only, and what is refused with a reason."""

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_families import FAMILIES, SETTINGS, save
from transformers import LlamaConfig, LlamaForCausalLM

from workflow_scripts.configuration.model import Configuration, ConfigurationError, Sampling, load
from workflow_scripts.configuration.stages import GenerateRollouts, ModelConfig, PrepareBasePolicy, TrainGrpo
from workflow_scripts.files.paths import ROOT
from workflow_scripts.policy.loading import (
    answer_token_ids,
    as_policy,
    check_adapted_layers,
    load_model,
    load_policy,
    load_processor,
)
from workflow_scripts.policy.manifest import PolicyError, base_path, model_files
from workflow_scripts.policy.prompts import messages
from workflow_scripts.preferences.images import decoded, in_memory
from workflow_scripts.preferences.schema import IMAGES, SUBSET, read_table, write_images, write_preferences
from workflow_scripts.rollouts.context import too_long
from workflow_scripts.rollouts.items import Item, pointwise_items
from workflow_scripts.rollouts.record import ROLLOUT
from workflow_scripts.rollouts.transformers_engine import generate
from workflow_scripts.training.rewards import REWARDS

TRACKS = ["imagereward", "hpsv2"]
LAYERS = r".*{}.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Return a family's name."""
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny model of the family."""
    return save(family, tmp_path_factory.mktemp(family) / "model")


def configuration(family: str, folder: Path) -> Configuration:
    """Return what a user writes to use the folder, with short runs."""
    training = {
        "steps": 2,
        "prompts_per_step": 2,
        "group_size": 4,
        "validate_every": 2,
        "warmup_steps": 0,
        "max_completion_tokens": 8,
        "lora": {"target_modules": LAYERS.format(SETTINGS[family]["language_model"])},
    }
    return load(
        {
            "policy": {"bundled": str(folder)} | SETTINGS[family]["policy"],
            "training": {"imagereward": training, "hpsv2": training},
            "scoring": {"report_k": [1]},
            "rollouts": {"sampling": {"max_thinking_tokens": 8}, "block_size": 2, "batch_items": 5},
        }
    )


@pytest.fixture
def inputs(scenes: Any, with_sidecar: Callable[..., Path], tmp_path: Path) -> dict[str, Path]:
    """Return a subset with ranks, ratings and pairs and its images, two of them of other sizes."""
    sizes = {"1-0": (56, 84), "0-2": (140, 84)}
    rows, images = [], []
    for position, (prompt, pictures) in enumerate(scenes[:2]):
        names = list(pictures)
        rows.append(
            dict.fromkeys(SUBSET.names)
            | {"prompt_id": f"p{position}", "prompt": prompt, "image_ids": names, "archives": ["z"] * 4}
            | {"ranks": [1, 2, 3, 4], "ratings": [7, 5, 3, 1], "position": position}
            | {
                "pairs": [
                    {"a": names[0], "b": names[1], "preferred": 0},
                    {"a": names[2], "b": names[3], "preferred": 1},
                ]
            }
        )
        for name, picture in pictures.items():
            data = io.BytesIO()
            shown = picture.resize(sizes.get(name, picture.size))
            shown.save(data, "PNG")
            images.append({"image_id": name, "bytes": data.getvalue(), "width": shown.width, "height": shown.height})
    write_preferences(tmp_path / "subset.parquet", rows, SUBSET)
    write_images(tmp_path / "images.parquet", images)
    return {name: with_sidecar(tmp_path / f"{name}.parquet") for name in ("subset", "images")}


def prepare(run_main: Any, configured: Configuration, folder: Path) -> Path:
    """Run prepare_base_policy and return the manifest."""
    manifest = folder / "manifest.json"
    base_path.cache_clear()
    run_main("prepare_base_policy", PrepareBasePolicy.of(configured), manifest=manifest)
    return manifest


@torch.no_grad()
def teacher_forced(policy: Any, prompt: str, shown: list[Image.Image], row: dict[str, Any]) -> list[float]:
    """Log-probabilities of the answers from one forward over question and recorded tokens, without padding or cache."""
    text = policy.processor.apply_chat_template(messages(policy.template, prompt), add_generation_prompt=True)
    asked = policy.processor(text=[text], images=[shown], return_tensors="pt")
    before = torch.tensor([row["completion_ids"][: row["answer_position"]]])
    whole = torch.cat([asked["input_ids"], before], 1)
    values = dict(asked) | {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
    for kinds in {"mm_token_type_ids", "token_type_ids"} & set(values):
        values[kinds] = torch.cat([values[kinds], torch.zeros_like(before, dtype=values[kinds].dtype)], 1)
    return policy.model(**values).logits[0, -1, policy.answer_token_ids].double().log_softmax(-1).tolist()


@pytest.mark.parametrize("track", TRACKS)
def test_rollouts_are_those_of_a_teacher_forced_forward(
    family: str, folder: Path, track: Any, inputs: dict[str, Path], run_main: Any, tmp_path: Path
) -> None:
    configured = configuration(family, folder)
    manifest = prepare(run_main, configured, tmp_path)
    config = GenerateRollouts.of(configured, track, "zeroshot", track, 0, 0, 0)
    output = tmp_path / "rollouts.parquet"
    sidecar = run_main("generate_rollouts", config, base=manifest, **inputs, rollouts=output)
    rows = read_table(output, ROLLOUT).to_pylist()
    assert len(rows) == sidecar["metrics"]["rollouts"] == 2 * (8 if track == "imagereward" else 6)
    assert any(row["forced"] for row in rows)
    policy = load_policy(manifest, None, config.model)
    prompts = {row["prompt_id"]: row["prompt"] for row in read_table(inputs["subset"], SUBSET).to_pylist()}
    table = read_table(inputs["images"], IMAGES)
    images = {row["image_id"]: decoded(row["bytes"]) for row in table.to_pylist()}
    blank = dict.fromkeys(images, Image.new("RGB", (84, 84), (255, 255, 255)))
    image_token = policy.model.config.image_token_id
    compared = 0
    for row in rows:
        if image_token in row["completion_ids"]:
            continue  # a random model may say it; in one forward it would stand for an image that is not there
        compared += 1
        names = row["item_id"].split("/")[1:]
        prompt = prompts[row["prompt_id"]]
        expected = teacher_forced(policy, prompt, [images[name] for name in names], row)
        assert row["answer_logprobs"] == pytest.approx(expected, abs=1e-5, rel=0)
        unseen = teacher_forced(policy, prompt, [blank[name] for name in names], row)
        assert unseen != pytest.approx(expected, abs=1e-3, rel=0)
    assert compared > len(rows) / 2


def test_answers_tie_in_bfloat16_only_where_the_states_do_not_tell_them_apart(
    family: str, folder: Path, scenes: Any
) -> None:
    short = SETTINGS[family]["policy"] | {"dtype": "bfloat16"}
    policy = load_policy(manifest_of(folder), None, ModelConfig.of(load({"policy": short}), "imagereward"))
    head: Any = policy.model.get_output_embeddings()
    torch.manual_seed(0)
    alike = 4 * torch.randn(head.in_features) + 0.02 * torch.randn(7, head.in_features)
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # no longer the embedding's
    head.weight.data[policy.answer_token_ids] = alike.bfloat16()
    states: list[torch.Tensor] = []
    head.register_forward_pre_hook(lambda module, args: states.append(args[0][0, -1]))
    found, ties = [], 0
    for prompt, pictures in scenes[:2]:
        row = {"prompt_id": "p", "prompt": prompt, "image_ids": list(pictures)}
        for item in pointwise_items([row], set(pictures)):
            states.clear()
            options = {"first_k": 0, "sampling": Sampling(max_thinking_tokens=2), "batch_items": 1, "seed": ""}
            (rollout,) = generate(policy, [item], in_memory(pictures), rollouts=1, **options)
            state = states[rollout["answer_position"]]
            logits = state.double() @ head.weight[policy.answer_token_ids].double().T
            torch.testing.assert_close(
                torch.tensor(rollout["answer_logprobs"], dtype=torch.double), logits.log_softmax(-1), atol=1e-5, rtol=0
            )
            assert len(set(rollout["answer_logprobs"])) == 7
            found.append(rollout["answer_logprobs"])
            ties += len(logits.bfloat16().unique()) < 7
    assert ties > len(found) / 2


@pytest.mark.parametrize("track", TRACKS)
def test_training_moves_the_adapter_of_the_language_model(
    family: str,
    folder: Path,
    track: Any,
    inputs: dict[str, Path],
    run_main: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A random model never earns the real rewards, and without a difference in reward nothing moves.
    monkeypatch.setitem(REWARDS, "format", lambda text, goal, answers: float(len(text) % 5))
    configured = configuration(family, folder)
    manifest = prepare(run_main, configured, tmp_path)
    adapter = tmp_path / "adapter" / "adapter_model.safetensors"
    run_main(
        "train_grpo",
        TrainGrpo.of(configured, track, 0),
        base=manifest,
        train=inputs["subset"],
        train_images=inputs["images"],
        validation=inputs["subset"],
        validation_images=inputs["images"],
        adapter=adapter,
        adapter_config=adapter.with_name("adapter_config.json"),
        record=adapter.with_name("training.json"),
        checkpoints=tmp_path / "checkpoints",
    )
    history = json.loads(adapter.with_name("training.json").read_text())["history"]
    assert any(entry.get("grad_norm", 0) > 0 for entry in history)
    weights = load_file(adapter)
    moved = {name for name, values in weights.items() if "lora_B" in name and values.abs().max() > 0}
    assert moved == {name for name in weights if "lora_B" in name}
    assert len(moved) == 7 * 2
    assert all(f".{SETTINGS[family]['language_model']}." in name for name in weights)
    trained = load_policy(manifest, adapter.parent, ModelConfig.of(configured, track))
    base = load_model(manifest, ModelConfig.of(configured, track)).state_dict()
    changed = {name for name, values in trained.model.state_dict().items() if not torch.equal(values, base[name])}
    assert len(changed) == 7 * 2 and all(f".{SETTINGS[family]['language_model']}." in name for name in changed)


# ----------------------------------------------------------------------------------------------------- image size


def manifest_of(folder: Path) -> Path:
    """Write the manifest of a folder beside it."""
    path = folder.with_name("manifest.json")
    base_path.cache_clear()
    path.write_text(json.dumps({"path": str(folder), "files": model_files(folder)}))
    return path


def model_config(**policy: Any) -> ModelConfig:
    """Return the pairwise model config with these keys of `policy`."""
    return ModelConfig.of(load({"policy": policy}), "hpsv2")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the manifest of a processor that scales to an area."""
    return manifest_of(save("qwen3_vl", tmp_path_factory.mktemp("qwen3") / "model"))


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the manifest of a processor that scales to an edge and cuts tiles."""
    return manifest_of(save("smolvlm", tmp_path_factory.mktemp("smolvlm") / "model"))


def visual_tokens(processor: Any, size: tuple[int, int]) -> int:
    """Return how many tokens stand for an image."""
    text = processor.apply_chat_template(messages("{image}", ""))
    ids = processor(text=[text], images=[[Image.new("RGB", size)]])["input_ids"][0]
    return ids.count(processor.tokenizer.convert_tokens_to_ids(processor.image_token))


def test_an_area_where_the_processor_has_none_is_refused(smolvlm: Path) -> None:
    message = r"SmolVLMImageProcessor\w* of .*model does not scale images to an area \(its own size is {'longest_edge'"
    with pytest.raises(PolicyError, match=message + r": 112}\); set policy\.min_pixels and policy\.max_pixels to null"):
        load_processor(smolvlm, model_config())


def test_without_an_area_the_processor_keeps_its_own_size(qwen3: Path, smolvlm: Path) -> None:
    own = {"min_pixels": None, "max_pixels": None}
    assert visual_tokens(load_processor(qwen3, model_config(**own)), (400, 400)) == 16  # (112 / 28) squared
    assert visual_tokens(load_processor(qwen3, model_config()), (400, 400)) == 9  # the default area, 84 x 84
    assert visual_tokens(load_processor(smolvlm, model_config(**own)), (400, 400)) == (4 + 1) * 4  # tiles and the whole


def test_settings_of_the_image_processor_are_the_users(smolvlm: Path, tmp_path: Path) -> None:
    own = {"min_pixels": None, "max_pixels": None}
    whole = model_config(**own, image_processor={"do_image_splitting": False})
    assert visual_tokens(load_processor(smolvlm, whole), (400, 400)) == 4
    larger = model_config(**own, image_processor={"size": {"longest_edge": 168}})
    assert visual_tokens(load_processor(smolvlm, larger), (400, 400)) == (9 + 1) * 4
    internvl = manifest_of(save("internvl", tmp_path / "model"))  # its processor has a default of its own for tiles
    for settings, tokens in (({}, (4 + 1) * 4), ({"max_patches": 2}, (2 + 1) * 4), ({"crop_to_patches": False}, 4)):
        cut = load_processor(internvl, model_config(**own, image_processor=settings))
        assert visual_tokens(cut, (400, 400) if "max_patches" not in settings else (400, 200)) == tokens
    with pytest.raises(PolicyError, match=r"policy\.image_processor: .* has no setting tiles; it has \['.*do_resize"):
        load_processor(smolvlm, model_config(**own, image_processor={"tiles": 3}))
    with pytest.raises(PolicyError, match=r"no setting trust_remote_code"):
        load_processor(smolvlm, model_config(**own, image_processor={"trust_remote_code": True}))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"min_pixels": None}, "min_pixels and max_pixels are numbers or null together"),
        ({"max_pixels": None}, "min_pixels and max_pixels are numbers or null together"),
        ({"min_pixels": 8000}, "min_pixels, 8000, is more than max_pixels, 7056"),
        ({"image_processor": {"size": {"longest_edge": 5}}}, "image_processor.size needs min_pixels: null"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(policy: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        load({"policy": policy})


def test_settings_enter_the_canonical_configuration_only_where_they_are_set() -> None:
    plain, other = model_config(), model_config(image_processor={"do_rescale": True})
    assert "image_processor" not in plain.model_dump(mode="json")
    assert other.model_dump(mode="json")["image_processor"] == {"do_rescale": True}
    assert ModelConfig.model_validate_json(other.model_dump_json()) == other


def test_the_context_counts_the_tokens_that_an_image_really_takes(smolvlm: Path, qwen3: Path) -> None:
    for manifest, policy in ((smolvlm, {"min_pixels": None, "max_pixels": None}), (qwen3, {})):
        config = model_config(**policy)
        asked = as_policy(load_model(manifest, config), load_processor(manifest, config), config)
        sampling = load({}).rollouts.sampling
        sizes = {"a": (300, 100), "b": (90, 90)}
        item = Item("p", "a red circle", ("a", "b"), "b", "a")
        text = asked.processor.apply_chat_template(messages(asked.template, item.prompt), add_generation_prompt=True)
        shown = [Image.new("RGB", sizes[name]) for name in item.image_ids]
        tokens = len(asked.processor(text=[text], images=[shown])["input_ids"][0])
        needed = tokens + sampling.max_thinking_tokens + 2 + sampling.max_answer_tokens
        for room, expected in ((needed, set()), (needed - 1, {item})):
            asked.model.config.get_text_config().max_position_embeddings = room
            assert too_long(asked, [item], sizes, sampling) == expected


# --------------------------------------------------------------------------------------------------- what cannot work


@pytest.mark.parametrize("names_its_processor", [True, False])
def test_a_model_without_images_is_refused(names_its_processor: bool, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "models/tiny-qwen2.5-vl", tmp_path / "model")
    for name in ("processor_config.json", "chat_template.jinja"):
        (tmp_path / "model" / name).unlink()
    if not names_its_processor:
        path = tmp_path / "model" / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"processor_class": None}))
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=600, **tiny)).save_pretrained(tmp_path / "model")
    manifest = manifest_of(tmp_path / "model")
    with pytest.raises(PolicyError, match=r"(no processor that takes|Can't load image processor).*; set policy\."):
        load_processor(manifest, model_config())
    with pytest.raises(PolicyError, match=r"model cannot be loaded.*; set policy\.source"):
        load_model(manifest, model_config())


def test_answers_that_are_not_single_tokens_are_refused(tmp_path: Path) -> None:
    folder = save("smolvlm", tmp_path / "model")
    path = folder / "tokenizer.json"
    tokens = json.loads(path.read_text())
    # A tokenizer that joins the digit to the tag's end, as byte-pair encodings without split digits do.
    tokens["added_tokens"].append(
        tokens["added_tokens"][-1] | {"id": max(t["id"] for t in tokens["added_tokens"]) + 1, "content": "<answer>1"}
    )
    path.write_text(json.dumps(tokens))
    processor: Any = load_processor(manifest_of(folder), model_config(min_pixels=None, max_pixels=None))
    with pytest.raises(PolicyError, match=r"<answer>1 as .*: the answer must be a single token after the tag; choose"):
        answer_token_ids(processor.tokenizer, (0, 1))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r".*language_model.*\.q_proj", r"matches no layer; the language model of this policy is model\.text_model"),
        (r".*\.(q_proj|v_proj)", r"matches model\.vision_model\.\S+, which is not in it"),
    ],
)
def test_an_adapter_that_misses_the_language_model_is_refused(smolvlm: Path, pattern: str, message: str) -> None:
    model = load_model(smolvlm, model_config(min_pixels=None, max_pixels=None))
    with pytest.raises(PolicyError, match=rf"lora\.target_modules, .*{message}"):
        check_adapted_layers(model, pattern)
    check_adapted_layers(model, LAYERS.format("text_model"))

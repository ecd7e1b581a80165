"""Generation by vLLM in training, as TRL runs it, with vLLM's part played by a stub."""

import gc
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

from workflow_scripts.configuration.model import load
from workflow_scripts.configuration.stages import ModelConfig, TrainGrpo
from workflow_scripts.policy.loading import load_model, load_processor
from workflow_scripts.stages import train_grpo
from workflow_scripts.training.vllm_generation import MergedCopies, merged_weight

Received = dict[str, torch.Tensor]


def adapted(manifest: Path, dtype: str) -> Any:
    """The bundled policy with an adapter in float32 that changes it visibly."""
    torch.manual_seed(0)
    model: Any = load_model(manifest, ModelConfig.of(load({"policy": {"dtype": dtype}}), "hpsv2"))
    lora = LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|down_proj)")
    model = get_peft_model(model, lora)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


def transfer_to(
    receive: Callable[[str, torch.Tensor], None], transfer: type[VLLMGeneration], mode: str
) -> Callable[[Any], None]:
    """TRL's transfer of a model's weights to colocated vLLM, or to the client of its server; both are stubs."""

    def load_weights(weights: list[tuple[str, torch.Tensor]]) -> None:
        for name, weight in weights:
            receive(name, weight)

    def update(metadata: list[tuple[str, str, list[int]]], weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        # As vLLM packs them: it looks at many before it copies the first.
        flat = [weight.contiguous().view(torch.uint8).view(-1) for _, weight in weights]
        for (name, dtype, shape), content in zip(metadata, flat, strict=True):
            receive(name, content.view(getattr(torch, dtype)).view(*shape))

    def run(model: Any) -> None:
        generation = object.__new__(transfer)
        generation.model, generation.mode, generation.enable_sleep_mode = model, mode, False
        generation.accelerator = Accelerator(cpu=True)
        generation._dist, generation._weight_metadata = DistributedBackend(generation.accelerator), None
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=load_weights))
        executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        engine, reset = SimpleNamespace(model_executor=executor), lambda: None
        generation.llm = SimpleNamespace(llm_engine=engine, reset_prefix_cache=reset)
        generation.vllm_client = SimpleNamespace(update_named_params=update, reset_prefix_cache=reset)
        generation.sync_weights()

    return run


def received(model: Any, transfer: type[VLLMGeneration], mode: str = "colocate") -> Received:
    """What arrives of a model's weights, by name."""
    found: Received = {}

    def receive(name: str, weight: torch.Tensor) -> None:
        found[name] = weight.clone()

    transfer_to(receive, transfer, mode)(model)
    return found


def assert_equal(found: Received, expected: Received) -> None:
    assert list(found) == list(expected)
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype and torch.equal(found[name], weight), name


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_vllm_receives_what_trl_and_peft_merge_in_float32(mode: str, base_manifest: Path) -> None:
    found = received(adapted(base_manifest, "float32"), MergedCopies, mode)
    # In server mode TRL's own are unmerged again before vLLM has packed the last of them.
    assert_equal(found, received(adapted(base_manifest, "float32"), VLLMGeneration, "colocate"))
    assert_equal(found, dict(adapted(base_manifest, "float32").merge_and_unload().named_parameters()))
    plain = dict(load_model(base_manifest, ModelConfig.of(load({}), "hpsv2")).named_parameters())
    assert found.keys() == plain.keys()
    for name, weight in found.items():
        changed = "language_model" in name and ("q_proj.weight" in name or "down_proj" in name)
        assert torch.equal(weight, plain[name]) != changed, name


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_in_bfloat16_each_weight_is_rounded_once_and_the_base_keeps_its_bits(mode: str, base_manifest: Path) -> None:
    model, by_trl = adapted(base_manifest, "bfloat16"), adapted(base_manifest, "bfloat16")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for _ in range(3):
        found = received(model, MergedCopies, mode)
        received(by_trl, VLLMGeneration, mode)
    assert_equal({name: weight.data for name, weight in model.named_parameters()}, before)
    drifted = [name for name, weight in by_trl.named_parameters() if not torch.equal(weight, before[name])]
    assert any("q_proj.base_layer" in name for name in drifted)
    exact = adapted(base_manifest, "bfloat16").float().merge_and_unload()
    assert_equal(found, {name: weight.to(torch.bfloat16) for name, weight in exact.named_parameters()})


def test_at_most_one_layer_is_held_twice(base_manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merged copy arrives alone, and is gone before the next one is made."""
    model = adapted(base_manifest, "bfloat16")

    def held() -> dict[int, int]:
        """Bytes by address of all memory that tensors hold."""
        storages = [thing.untyped_storage() for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
        return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}

    before = held()
    at_start, on_arrival, layers = [], [], []

    def beyond() -> int:
        return sum(size for address, size in held().items() if address not in before)

    def make(layer: Any) -> torch.Tensor:
        at_start.append(beyond())
        return merged_weight(layer)

    def receive(name: str, weight: torch.Tensor) -> None:
        if weight.data_ptr() not in before:
            on_arrival.append(beyond())
            layers.append(weight.numel() * weight.element_size())

    monkeypatch.setattr("workflow_scripts.training.vllm_generation.merged_weight", make)
    transfer_to(receive, MergedCopies, "colocate")(model)
    assert len(layers) > 3 and on_arrival == layers
    assert not any(at_start)


class StubVllm:
    """Colocated vLLM as TRL calls it: takes weights, and answers any question with one of a few texts.

    It reports no log-probabilities, for which TRL would correct.
    """

    def __init__(self, tokenizer: Any) -> None:
        texts = ["<think>a red circle</think><answer>7</answer>", "<think>none</think><answer>1</answer>", "blue"]
        self.completions = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
        self.weights: list[Received] = []
        self.asked: list[dict[str, Any]] = []
        self.settings: list[Any] = []
        runner = SimpleNamespace(model=self)
        executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=executor)

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        ((name, weight),) = weights
        if not self.weights or name in self.weights[-1]:
            self.weights.append({})
        self.weights[-1][name] = weight.clone()

    def reset_prefix_cache(self) -> None:
        self.prefix_cache_is_empty = True

    def generate(self, prompts: list[dict[str, Any]], sampling_params: Any, use_tqdm: bool) -> list[Any]:
        self.asked += prompts
        self.settings.append(sampling_params)
        chosen = [self.completions[i % len(self.completions)] for i in range(len(prompts))]
        return [
            SimpleNamespace(
                prompt_token_ids=prompt["prompt_token_ids"],
                outputs=[
                    SimpleNamespace(
                        token_ids=ids, logprobs=[{token: SimpleNamespace(logprob=math.nan, rank=1)} for token in ids]
                    )
                ],
            )
            for prompt, ids in zip(prompts, chosen, strict=True)
        ]


def test_a_training_with_colocated_vllm(
    run_main: Any, training_inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of the stage: what vLLM is asked and given, and how often the vision tower runs."""
    sizes = {"steps": 2, "prompts_per_step": 4, "group_size": 3, "gradient_accumulation": 4, "validate_every": 2}
    # A rate at which one step changes weights in bfloat16.
    training = sizes | {"generation": "vllm_colocate", "reward_signal": "sampled"}
    training |= {"warmup_steps": 0, "learning_rate": 1e-2}
    keys = {"policy": {"dtype": "bfloat16", "device": "cuda"}, "training": {"imagereward": training}}
    config = TrainGrpo.of(load(keys), "imagereward", 0)
    config = config.model_copy(update={"model": config.model.model_copy(update={"device": "cpu"})})
    processor: Any = load_processor(training_inputs["base"], config.model)
    vllm = StubVllm(processor.tokenizer)
    models = []

    def init_vllm(generation: VLLMGeneration) -> None:
        generation.llm = vllm
        models.append(generation.model)

    monkeypatch.setattr(VLLMGeneration, "_init_vllm", init_vllm)
    monkeypatch.setattr("trl.generation.vllm_generation.SamplingParams", SimpleNamespace, raising=False)
    monkeypatch.setattr(train_grpo, "check_generation", lambda config: None)
    passes: list[tuple[int, bool]] = []
    encode = Qwen2_5_VisionTransformerPretrainedModel.forward

    def counted(tower: Any, hidden_states: torch.Tensor, grid_thw: torch.Tensor, **options: Any) -> Any:
        if tower.training:  # not in a validation
            passes.append((len(grid_thw), torch.is_grad_enabled()))
        return encode(tower, hidden_states, grid_thw, **options)

    monkeypatch.setattr(Qwen2_5_VisionTransformerPretrainedModel, "forward", counted)
    files = {"adapter": tmp_path / "adapter.safetensors", "adapter_config": tmp_path / "adapter_config.json"}
    files |= {"record": tmp_path / "training.json", "checkpoints": tmp_path / "checkpoints"}
    run_main("train_grpo", config, **training_inputs, **files)

    (settings, _) = vllm.settings
    assert settings.logit_bias == {processor.image_token_id: -100.0} and settings.temperature == 1
    assert all(row["prompt_token_ids"].count(processor.image_token_id) == 1 for row in vllm.asked)
    shown = [row["multi_modal_data"]["image"].tobytes() for row in vllm.asked]
    assert len(shown) == 24
    assert sum(images for images, _ in passes) == sum(len(set(shown[step : step + 12])) for step in (0, 12))
    assert not any(with_gradient for _, with_gradient in passes)

    first, second = vllm.weights
    base = dict(load_model(training_inputs["base"], config.model).named_parameters())
    assert_equal(first, {name: weight.data for name, weight in base.items()})
    assert any(not torch.equal(second[name], first[name]) for name in first)
    (model,) = models  # after the training, the base is what it was
    assert_equal(
        {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): weight.data
            for name, weight in model.named_parameters()
            if "lora_" not in name
        },
        first,
    )

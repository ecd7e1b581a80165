"""vLLM in training: in vLLM's environment for CPU, by `make test-vllm`.

There vLLM packs the weights of linear layers for its kernels and drops the originals, so it takes no new ones. These
tests let it multiply by torch instead, as it does where its kernels do not support a layer.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not in this environment; make test-vllm runs these in its own")

from accelerate import Accelerator
from peft import PeftModel
from trl.distributed import DistributedBackend

from workflow_scripts.configuration.model import Configuration, RolloutsVllm, Sampling, load
from workflow_scripts.configuration.stages import ModelConfig, TrainGrpo
from workflow_scripts.policy.loading import load_model, load_policy
from workflow_scripts.policy.prompts import messages
from workflow_scripts.preferences.images import in_memory
from workflow_scripts.rollouts import transformers_engine, vllm_engine
from workflow_scripts.rollouts.items import anchor_items
from workflow_scripts.running.environment import stage_environment
from workflow_scripts.training.vllm_generation import MergedCopies

CONFIG = ModelConfig.of(Configuration(), "hpsv2")
STEP = """
from workflow_scripts.stages.train_grpo import main  # as in a run, TRL imports vLLM
from vllm import _custom_ops
from vllm.model_executor.layers import utils
_custom_ops._supports_onednn = False
utils.check_cpu_sgl_kernel = lambda *args: False
main()
"""


@pytest.fixture(scope="module")
def vllm(base_manifest: Path) -> Iterator[Any]:
    """Return the bundled policy in vLLM, in float32 and without an adapter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm._custom_ops._supports_onednn", False)
        patch.setattr("vllm.model_executor.layers.utils.check_cpu_sgl_kernel", lambda *args: False)
        policy: Any = vllm_engine.load_into_vllm(base_manifest, None, CONFIG, RolloutsVllm())
    yield policy
    policy.model.llm.llm_engine.engine_core.shutdown()


def trl_generation(vllm: Any, model: Any, **settings: Any) -> Any:
    """TRL's generation by this vLLM, with the transfer of this repository, for a model in training."""
    generation: Any = object.__new__(MergedCopies)
    defaults: dict[str, Any] = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": None,
        "repetition_penalty": 1.0,
        "logprobs": 0,
    }
    defaults |= {"mode": "colocate", "enable_sleep_mode": False, "tensor_parallel_size": 1}
    defaults |= {"structured_outputs_regex": None, "max_completion_length": 24, "generation_kwargs": {}}
    vars(generation).update(defaults | settings)
    generation.model, generation.llm, generation.accelerator = model, vllm.model.llm, Accelerator(cpu=True)
    generation._dist = DistributedBackend(generation.accelerator)
    return generation


def in_training(base_manifest: Path, adapter: Path) -> Any:
    """The policy with its adapter, which is not merged."""
    return PeftModel.from_pretrained(load_model(base_manifest, CONFIG), adapter, is_trainable=True)


def questions(vllm: Any, scenes: Any) -> tuple[list[list[int]], list[list[Any]]]:
    """Token ids, with one for each image, and images of a few questions, each of them twice."""
    shown = [(prompt, list(pictures.values())[i : i + 2]) for prompt, pictures in scenes for i in (0, 0, 2, 2)]
    chats = [messages(CONFIG.template, prompt) for prompt, _ in shown]
    texts = vllm.processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    return vllm.tokenizer(texts, add_special_tokens=False)["input_ids"], [images for _, images in shown]


def test_transferred_weights_answer_as_the_policy_with_its_adapter(
    vllm: Any, base_manifest: Path, adapter: Path, scenes: Any
) -> None:
    images = {name: picture for _, pictures in scenes for name, picture in pictures.items()}
    rows = [{"prompt_id": f"p{i}", "prompt": prompt, "image_ids": list(p)} for i, (prompt, p) in enumerate(scenes)]
    items = anchor_items(rows, set(images), 0, False)
    options: Any = {"rollouts": 1, "first_k": 0, "sampling": Sampling(temperature=0), "batch_items": 8, "seed": "test"}

    def answers(engine: Any, policy: Any) -> list[list[int]]:
        found = engine.generate(policy, items, in_memory(images), **options)
        return [row["completion_ids"] for row in sorted(found, key=lambda row: str(row["item_id"]))]

    before = answers(vllm_engine, vllm)
    trl_generation(vllm, in_training(base_manifest, adapter)).sync_weights()
    after, expected = (
        answers(vllm_engine, vllm),
        answers(transformers_engine, load_policy(base_manifest, adapter, CONFIG)),
    )
    assert sum(one == two for one, two in zip(after, expected, strict=True)) >= len(expected) - 1  # one tie may differ
    assert after != before


def test_sampled_log_probabilities_are_those_that_the_trainer_scores(
    vllm: Any, base_manifest: Path, adapter: Path, scenes: Any
) -> None:
    model = in_training(base_manifest, adapter).eval()
    generation = trl_generation(vllm, model)
    generation.sync_weights()
    prompts, images = questions(vllm, scenes)
    expanded, completions, logprobs, _ = generation.generate(prompts, images, 2)
    for ids, completion, sampled, pictures in zip(expanded, completions, logprobs, images, strict=True):
        seen = vllm.processor.image_processor(pictures, return_tensors="pt")
        tokens = torch.tensor([[*ids, *completion]])
        kinds = (tokens == vllm.processor.image_token_id).int()
        with torch.no_grad():
            logits = model(input_ids=tokens, mm_token_type_ids=kinds, **seen).logits[0, len(ids) - 1 : -1]
        scored = logits.log_softmax(-1)[torch.arange(len(completion)), torch.tensor(completion)]
        assert [value for (value,) in sampled] == pytest.approx(scored.tolist(), abs=1e-3)


def test_a_policy_that_prefers_the_image_token_does_not_emit_it(
    vllm: Any, base_manifest: Path, adapter: Path, scenes: Any
) -> None:
    model = in_training(base_manifest, adapter)
    image, opening = vllm.processor.image_token_id, vllm.tokenizer.convert_tokens_to_ids("<think>")
    with torch.no_grad():  # wherever a thought is likely to open, the image's token is likelier
        embedding = model.get_input_embeddings().weight
        embedding[image] = 2 * embedding[opening]
    prompts, images = questions(vllm, scenes)
    found = []
    for settings in ({}, {"logit_bias": {image: -100.0}}):
        generation = trl_generation(vllm, model, generation_kwargs=settings)
        generation.sync_weights()
        found.append([image in completion for completion in generation.generate(prompts, images, 2)[1]])
    assert all(found[0]) and not any(found[1])


def test_the_server_reads_the_bias_as_it_is_sent() -> None:
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest

    sent = json.dumps({"token_ids": [1], "sampling_params": {"logit_bias": {5: -100.0}, "output_kind": 2}})
    assert GenerateRequest.model_validate_json(sent).sampling_params.logit_bias == {5: -100.0}


def test_a_training_step_with_colocated_vllm(
    training_inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage in a process of its own, in bfloat16."""
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)  # TRL has set it in this process
    sizes = {"steps": 1, "prompts_per_step": 2, "group_size": 4, "gradient_accumulation": 2, "validate_every": 1}
    told = {"gpu_memory_utilization": 0.05, "max_model_len": 512}  # of the main memory
    training = sizes | {"generation": "vllm_colocate", "vllm": told, "warmup_steps": 0, "reward_signal": "sampled"}
    keys = {"policy": {"dtype": "bfloat16", "device": "cuda"}, "training": {"imagereward": training}}
    config = TrainGrpo.of(load(keys), "imagereward", 0)
    config = config.model_copy(update={"model": config.model.model_copy(update={"device": "cpu"})})
    files = training_inputs | {"adapter": tmp_path / "adapter_model.safetensors"}
    files |= {"adapter_config": tmp_path / "adapter_config.json", "record": tmp_path / "training.json"}
    command = [sys.executable, "-c", STEP, "--config", config.canonical()]
    command += [word for name, path in files.items() for word in (f"--{name}", str(path))]
    command += ["--checkpoints", str(tmp_path / "checkpoints")]
    # vLLM's own switch for tests on a CPU: no compilation.
    environment = os.environ | stage_environment(load({"tracking": {"enabled": False}})) | {"VLLM_CPU_CI_ENV": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    history = json.loads((tmp_path / "training.json").read_text())["history"]
    (step,) = (entry for entry in history if "reward" in entry)
    assert step["sampling/sampling_logp_difference/mean"] < 0.05
    assert step["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=0.2)
    assert step["grad_norm"] > 0
    assert "WARNING" in done.stderr + done.stdout  # vLLM's own

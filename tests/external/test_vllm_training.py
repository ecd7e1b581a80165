"""Training with colocated vLLM on a CPU, as TRL runs it: in vLLM's environment, by `make test-vllm`."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("vllm", reason="vLLM is not in this environment; make test-vllm runs these in its own")

from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

from workflow_scripts.configuration.model import load
from workflow_scripts.configuration.stages import ModelConfig, TrainGrpo
from workflow_scripts.policy.loading import as_policy, load_model, load_processor
from workflow_scripts.policy.prompts import messages
from workflow_scripts.training.vllm_generation import MergedCopies


class Generation(MergedCopies):
    """TRL's generation with vLLM in float32, which TRL cannot ask for."""

    def _init_vllm(self) -> None:
        from vllm import LLM

        folder = self.model.name_or_path
        self.llm = LLM(
            model=folder,
            dtype="float32",
            distributed_executor_backend="external_launcher",
            logprobs_mode="processed_logprobs",
            max_model_len=512,
            limit_mm_per_prompt={"image": 2, "video": 0},
            enforce_eager=True,
            block_size=32,
            enable_chunked_prefill=False,
        )

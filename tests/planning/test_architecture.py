"""Formulas of sizes, FLOPs and bytes against what torch, transformers and PEFT count on real models."""

import contextlib
import json
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from trl.trainer.utils import add_fused_lm_head

from workflow_scripts.commands.plan import FACTS
from workflow_scripts.configuration.model import Configuration
from workflow_scripts.configuration.published import PUBLISHED
from workflow_scripts.files.paths import ROOT
from workflow_scripts.planning.architecture import Architecture, Image, PlanError
from workflow_scripts.policy.fast.enable import share_prompts

TARGETS = Configuration().training.imagereward.lora.target_modules
RANK = 4
TOKENS, SEQUENCES = 96, 2
QWEN_7B = Architecture.of(FACTS["models"]["Qwen/Qwen2.5-VL-7B-Instruct"])
BUNDLED = json.loads((ROOT / "models/tiny-qwen2.5-vl/config.json").read_text())


def built(attention: str = "sdpa", dtype: torch.dtype = torch.float32, **text: int) -> Any:
    """A random model of the bundled one's kind, with an adapter; keyword arguments change its language model."""
    layers = text.get("num_hidden_layers", 3)
    changed = {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers, **text}
    vision = BUNDLED["vision_config"] | {"fullatt_block_indexes": [1], "window_size": 112}
    width = changed.get("hidden_size", 128)
    config = Qwen2_5_VLConfig(
        **{k: v for k, v in BUNDLED.items() if k not in ("architectures", "dtype", "text_config", "vision_config")},
        text_config=BUNDLED["text_config"] | changed,
        vision_config=vision | {"out_hidden_size": width},
    )
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).to(dtype)
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(model, lora).train()


def architecture(model: Any) -> Architecture:
    """Its sizes, by its own config."""
    return Architecture.of(model.get_base_model().config.to_dict())


def checkpointed(model: Any) -> Any:
    """The model with gradient checkpointing as TRL switches it on."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    return model


def batch(rows: int, columns: int, padded: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Sequences that show an image of so many patches each."""
    visual = rows * columns // 4
    ids = torch.randint(20, 400, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, 1 : 1 + visual], ids[:, 1 + visual] = 3, 5, 4
    mask = torch.ones_like(ids)
    if padded:
        mask[0, -10:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(SEQUENCES * rows * columns, 1176).to(dtype),
        "image_grid_thw": torch.tensor([[1, rows, columns]] * SEQUENCES),
        "mm_token_type_ids": (ids == 5).int(),
    }


def autocast(dtype: torch.dtype) -> Any:
    """What TRL runs the forward under."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype=dtype)


# ------------------------------------------------------------------------------------------------------ parameters


@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "qwen2.5-vl-3b"])
def test_published_models_have_their_published_number_of_parameters(name: str) -> None:
    published = PUBLISHED[name]
    planned = Architecture.of(FACTS["models"][published["repository"]])
    assert planned.parameters() == published["parameters"]
    weights = sum(file["bytes"] for file in published["files"].values() if file["bytes"] > 10**8)
    assert 2 * planned.parameters() == pytest.approx(weights, rel=2e-3)  # of the 3B, sizes are known to 10 MB


@pytest.mark.parametrize("config", [BUNDLED, *FACTS["models"].values()], ids=["bundled", *FACTS["models"]])
def test_parameters_and_adapters_are_those_of_torch_and_peft(config: dict[str, Any]) -> None:
    planned = Architecture.of(config)
    text = {k: v for k, v in config.items() if k not in ("vision_config", "model_type", "text_config")}
    half = planned.hidden // planned.heads // 2
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8]}
    torch_config = Qwen2_5_VLConfig(
        text_config=config.get("text_config", text | {"rope_parameters": rope}),
        vision_config=config["vision_config"],
        tie_word_embeddings=config["tie_word_embeddings"],
    )
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(torch_config)
        assert sum(p.numel() for p in model.parameters()) == planned.parameters()
        adapted = get_peft_model(model, LoraConfig(r=16, target_modules=TARGETS, task_type="CAUSAL_LM"))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained == planned.adapter_parameters(16, TARGETS)
    names = {name.partition("base_model.model.")[2] for name, m in adapted.named_modules() if hasattr(m, "lora_A")}
    assert names == {linear.name for linear in planned.adapted(TARGETS)}
    assert len(names) == 7 * planned.layers and not any("visual" in name for name in names)


def test_a_loose_expression_also_adapts_the_vision_tower() -> None:
    """What the restriction to the language model is for."""
    loose = QWEN_7B.adapted(r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)")
    assert sum("visual" in linear.name for linear in loose) == 3 * QWEN_7B.vision.depth


def test_another_family_is_refused() -> None:
    with pytest.raises(PlanError, match="model_type llama is not known here"):
        Architecture.of({"model_type": "llama"})


# ---------------------------------------------------------------------------------------------------------- images


@settings(deadline=None)
@given(width=st.integers(10, 2000), height=st.integers(10, 2000), least=st.integers(1, 64), more=st.integers(0, 1500))
def test_images_are_resized_as_by_qwen(width: int, height: int, least: int, more: int) -> None:
    low, high = least * 784, (least + more) * 784
    image = QWEN_7B.image(width, height, low, high)
    assert (image.rows * 14, image.columns * 14) == smart_resize(height, width, 28, low, high)


@pytest.mark.parametrize(
    ("size", "cap", "tokens"),
    [
        ((256, 256), 16384, 81),
        ((512, 512), 16384, 324),
        ((480, 480), 16384, 289),
        ((512, 768), 16384, 486),
        ((768, 768), 16384, 729),
        ((1024, 1024), 16384, 1369),
        ((1024, 1024), 1280, 1225),
        ((1024, 1024), 512, 484),
        ((1024, 1024), 256, 256),
        ((512, 512), 256, 256),
        ((512, 768), 256, 247),
        ((512, 704), 256, 234),
        ((512, 512), 128, 121),
    ],
)
def test_tokens_of_an_image(size: tuple[int, int], cap: int, tokens: int) -> None:
    assert QWEN_7B.image(*size, 3136, cap * 784).tokens == tokens


# ----------------------------------------------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("grid", [(8, 8), (10, 20)], ids=str)
def test_flops_of_an_update_are_those_that_torch_counts(
    attention: Any, checkpointing: bool, grid: tuple[int, int]
) -> None:
    """Forward and backward, exactly. The counter does not see addmm_, in which TRL's head makes its last product."""
    model = built(attention)
    planned, image = architecture(model), Image(*grid, 4)
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy"))
    if checkpointing:
        checkpointed(model)
    given_batch = batch(*grid)
    with FlopCounterMode(display=False) as forward:
        out = model(**given_batch, labels=given_batch["input_ids"], fused_lm_head=True)
    with FlopCounterMode(display=False) as backward:
        out.log_probs.sum().backward()
    scored = TOKENS - 1  # without Triton the head scores every position
    expected = (
        planned.language_flops(TOKENS)
        + planned.adapter_flops(TOKENS, RANK, TARGETS)
        + planned.vision_flops(image)
        + planned.head_flops(scored)
    )
    assert forward.get_total_flops() == SEQUENCES * expected
    update = planned.update_flops(TOKENS, scored, [image], RANK, TARGETS, checkpointing, attention)
    counted = forward.get_total_flops() + backward.get_total_flops()
    assert counted == SEQUENCES * (update - planned.head_flops(scored))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_flops_of_an_update_that_shares_its_question_are_those_that_torch_counts(attention: Any) -> None:
    model = built(attention)
    share_prompts(model.get_base_model())
    planned, question = architecture(model), 70
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy"))
    given_batch = batch(8, 8)
    ids, patches = given_batch["input_ids"], given_batch["pixel_values"]
    patches[64:] = patches[:64]
    ids[1, :question] = ids[0, :question]
    ids[:, question] = torch.arange(20, 20 + SEQUENCES)
    counted = 0
    for counts in (False, True):  # the second pass finds the image's features
        with FlopCounterMode(display=False) as counter:
            out = model(**given_batch, use_cache=False, labels=ids, fused_lm_head=True)
            out.log_probs.sum().backward()
        counted += counts * counter.get_total_flops()
    scored = TOKENS - 1
    update = planned.shared_update_flops(question, TOKENS - question, scored, SEQUENCES, RANK, TARGETS, attention)
    assert counted == SEQUENCES * (update - planned.head_flops(scored))


def test_flops_of_decoding_are_those_that_torch_counts() -> None:
    model = built().get_base_model().eval()
    planned = Architecture.of(model.config.to_dict())
    with torch.no_grad():
        cache = model(**batch(8, 8), logits_to_keep=1).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(
                input_ids=torch.zeros(SEQUENCES, 1, dtype=torch.long) + 20,
                position_ids=torch.full((3, SEQUENCES, 1), TOKENS),
                past_key_values=cache,
            )
    adapter = planned.adapter_flops(1, RANK, TARGETS)
    assert counter.get_total_flops() == SEQUENCES * (
        planned.language_flops(1, TOKENS + 1) + planned.head_flops(1) + adapter
    )
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == SEQUENCES * (TOKENS + 1) * planned.kv_bytes("float32")


# ---------------------------------------------------------------------------------------------------------- memory


def kept_bytes(model: Any, inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> int:
    """Bytes that a forward saves for its backward, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(dtype):
        model.get_base_model().model(**inputs, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_activations_of_a_layer_are_those_that_autograd_keeps(attention: Any, dtype: torch.dtype, padded: bool) -> None:
    inputs = batch(8, 8, padded, dtype)
    measured = [kept_bytes(built(attention, dtype, num_hidden_layers=n), inputs, dtype) for n in (2, 3)]
    planned = architecture(built(attention, dtype))
    name = str(dtype).removeprefix("torch.")
    formula = planned.layer_activation_bytes(SEQUENCES, TOKENS, name, RANK, TARGETS, attention, padded)
    assert measured[1] - measured[0] == formula


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_with_checkpointing_a_layer_keeps_its_input(dtype: torch.dtype) -> None:
    inputs = batch(8, 8, dtype=dtype)
    measured = [kept_bytes(checkpointed(built(dtype=dtype, num_hidden_layers=n)), inputs, dtype) for n in (2, 3)]
    assert measured[1] - measured[0] == SEQUENCES * TOKENS * 128 * dtype.itemsize


class PeakMemory(TorchDispatchMode):
    """Follows the bytes of all tensors that are made under it, and their most."""

    def __init__(self) -> None:
        """Nothing is held yet."""
        super().__init__()
        self.held = self.most = 0
        self.known: dict[int, int] = {}

    def _follow(self, tensor: torch.Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known[storage._cdata] = size
            self.held += size
            self.most = max(self.most, self.held)
            weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.held -= self.known.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; tensors that were there before count nothing."""
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor, 0)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
def test_the_peak_of_a_prefill_is_near_the_formula(dtype: torch.dtype, adapted: bool) -> None:
    model = built(dtype=dtype, intermediate_size=512).eval()
    planned, inputs = architecture(model), batch(8, 8, True, dtype)
    asked = model if adapted else model.merge_and_unload()
    with torch.no_grad(), PeakMemory() as memory:
        asked(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], logits_to_keep=1)
    name = str(dtype).removeprefix("torch.")
    cache = TOKENS * planned.kv_bytes(name)
    formula = SEQUENCES * (planned.language_workspace_bytes(TOKENS, name, adapted, "sdpa") + cache)
    assert memory.most == pytest.approx(formula, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_peak_of_the_vision_tower_is_near_the_formula(dtype: torch.dtype) -> None:
    tower = built(dtype=dtype).get_base_model().eval().model.visual
    planned, image = Architecture.of(BUNDLED), Image(12, 16, 4)
    pixels = torch.randn(image.patches, 1176).to(dtype)
    with torch.no_grad(), PeakMemory() as memory:
        tower(pixels, grid_thw=torch.tensor([[1, image.rows, image.columns]]))
    name = str(dtype).removeprefix("torch.")
    formula = planned.vision_workspace_bytes(image, name) - image.patches * planned.pixel_bytes(name)
    assert memory.most == pytest.approx(formula, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointed"])
def test_the_peak_of_an_update_is_near_the_formula(dtype: torch.dtype, checkpointing: bool) -> None:
    model = built(dtype=dtype, intermediate_size=512)
    planned, inputs = architecture(model), batch(4, 4, True, dtype)
    if checkpointing:
        checkpointed(model)
    with PeakMemory() as memory:
        with autocast(dtype):
            hidden = model.get_base_model().model(**inputs, use_cache=False).last_hidden_state
        hidden.sum().backward()
    name = str(dtype).removeprefix("torch.")
    layer = planned.layer_activation_bytes(SEQUENCES, TOKENS, name, RANK, TARGETS, "sdpa", True)
    kept = (
        SEQUENCES * TOKENS * 128 * dtype.itemsize * planned.layers + layer if checkpointing else planned.layers * layer
    )
    gradients = 4 * planned.adapter_parameters(RANK, TARGETS)
    formula = kept + gradients + SEQUENCES * TOKENS * planned.update_workspace_bytes(name)
    assert memory.most == pytest.approx(formula, rel=0.1)

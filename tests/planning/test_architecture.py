"""What is counted without weights against real models: parameters, adapters, FLOPs, and the formulas of bytes."""

import contextlib
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_families import FAMILIES, SETTINGS, save
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from trl.trainer.utils import add_fused_lm_head

from workflow_scripts.configuration.model import Configuration
from workflow_scripts.configuration.published import PUBLISHED
from workflow_scripts.files.paths import ROOT
from workflow_scripts.planning.architecture import Architecture, Image, architecture_of
from workflow_scripts.planning.costs import shared_update_flops, update_flops
from workflow_scripts.planning.devices import FACTS, PlanError
from workflow_scripts.planning.memory import (
    Model,
    language_workspace_bytes,
    layer_activation_bytes,
    pixel_bytes,
    update_workspace_bytes,
    vision_workspace_bytes,
)
from workflow_scripts.planning.tokens import Reader, read_policy
from workflow_scripts.policy.fast.enable import share_prompts
from workflow_scripts.policy.prompts import messages
from workflow_scripts.rollouts.decoding import Decoding

TARGETS = Configuration().training.imagereward.lora.target_modules
RANK = 4
TOKENS, SEQUENCES = 96, 2
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
    return architecture_of(model.get_base_model().config.to_dict())


def policy(a: Architecture, dtype: str = "float32", attention: Any = "sdpa") -> Model:
    """The policy as it is run, with the adapter of these tests."""
    return Model(a, dtype, attention, RANK, TARGETS)


def shown(rows: int, columns: int) -> Image:
    """An image of so many patches for Qwen2.5-VL."""
    inputs = {
        "pixel_values": torch.zeros(rows * columns, 1176),
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
    }
    return Image(rows * columns // 4, rows * columns, rows * columns * 14**2, inputs)


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


# -------------------------------------------------------------------------------------- Qwen2.5-VL, by closed formulas


class Formulas:
    """Sizes of Qwen2.5-VL by hand: weights and biases of every layer from config.json as published."""

    def __init__(self, config: dict[str, Any]) -> None:
        """Read the sizes."""
        v, self.h, self.i = config["vision_config"], config["hidden_size"], config["intermediate_size"]
        self.layers, self.kv = config["num_hidden_layers"], self.h // config["num_attention_heads"]
        self.kv *= config["num_key_value_heads"]
        self.vocabulary, self.tied = config["vocab_size"], config["tie_word_embeddings"]
        self.matrices = 2 * self.h * self.h + 2 * self.h * self.kv + 3 * self.h * self.i
        self.v, self.depth, self.full = v["hidden_size"], v["depth"], len(v["fullatt_block_indexes"])
        self.block = 4 * self.v**2 + 3 * self.v * v["intermediate_size"]
        self.block_biases = 5 * self.v + 2 * v["intermediate_size"]
        self.merger = (4 * self.v) ** 2 + 4 * self.v * v["out_hidden_size"]
        self.merger_biases, self.patch = 4 * self.v + v["out_hidden_size"], 3 * 2 * 14**2 * self.v

    def parameters(self) -> int:
        """All, a tied head counted once."""
        layer = self.matrices + self.h + 2 * self.kv + 2 * self.h
        language = self.layers * layer + self.h + self.vocabulary * self.h * (1 if self.tied else 2)
        tower = self.depth * (self.block + self.block_biases + 2 * self.v) + self.v
        return language + tower + self.merger + self.merger_biases + self.patch

    def adapter(self, rank: int) -> int:
        """On all seven matrices of a layer."""
        return self.layers * rank * (8 * self.h + 2 * self.kv - 2 * self.h + 3 * (self.h + self.i))

    def language(self, tokens: int, context: int) -> int:
        """Forward through the layers."""
        return self.layers * (2 * self.matrices * tokens + 4 * self.h * tokens * context)

    def vision(self, rows: int, columns: int) -> int:
        """Forward of an image; most blocks see windows of 8 x 8 patches, cut at the edge."""
        patches = rows * columns
        side = [n // 8 * 64 + (n % 8) ** 2 for n in (rows, columns)]
        seen = self.full * patches**2 + (self.depth - self.full) * side[0] * side[1]
        return 2 * patches * (self.patch + self.depth * self.block) + patches // 2 * self.merger + 4 * self.v * seen


@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "qwen2.5-vl-3b"])
def test_published_models_have_their_published_number_of_parameters(name: str) -> None:
    published = PUBLISHED[name]
    planned = architecture_of(FACTS["models"][published["repository"]])
    assert planned.parameters == published["parameters"]
    weights = sum(file["bytes"] for file in published["files"].values() if file["bytes"] > 10**8)
    assert 2 * planned.parameters == pytest.approx(weights, rel=2e-3)  # of the 3B, sizes are known to 10 MB


@pytest.mark.parametrize("name", list(FACTS["models"]))
def test_published_models_cost_what_closed_formulas_say(name: str) -> None:
    """Exactly: layers, blocks and lengths that were not counted follow from those that were."""
    planned, formulas = architecture_of(FACTS["models"][name]), Formulas(FACTS["models"][name])
    assert planned.parameters == formulas.parameters()
    assert planned.adapter_parameters(16, TARGETS) == formulas.adapter(16)
    adapted = planned.adapted(TARGETS)
    assert len(adapted) == 7 * planned.layers and not any("visual" in layer for layer in adapted)
    assert planned.language_flops(1000) == formulas.language(1000, 1000)
    assert planned.language_flops(10, 77) == formulas.language(10, 77)
    assert planned.vision_flops(shown(20, 36)) == formulas.vision(20, 36)
    assert planned.head_flops(3) == 6 * formulas.vocabulary * formulas.h
    # Gradients of inputs as many as forward, of the adapter twice; nothing for what the first layer's q, k, v read.
    update = planned.language_update_flops(16, TARGETS, False, "sdpa").of(500)
    first = 2 * 500 * (formulas.h * (formulas.h + 2 * formulas.kv) + 3 * 16 * formulas.h)
    attended = formulas.layers * 4 * formulas.h * 500**2
    assert update == 2 * formulas.language(500, 500) + 1.5 * attended + 6 * 500 * formulas.adapter(16) - first


def test_a_loose_expression_also_adapts_the_vision_tower() -> None:
    """What the restriction to the language model is for."""
    planned = architecture_of(FACTS["models"]["Qwen/Qwen2.5-VL-7B-Instruct"])
    loose = planned.adapted(r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)")
    assert sum("visual" in name for name in loose) == 3 * planned.vision.depth


def test_an_adapter_on_some_layers_alone_is_counted_there() -> None:
    model = built()
    planned = architecture(model)
    last = r".*language_model.*layers\.2\.mlp\.(gate_proj|up_proj|down_proj)"
    update = planned.language_update_flops(RANK, last, False, "eager").of(TOKENS)
    adapter = planned.adapter_parameters(RANK, last)
    assert adapter == 3 * RANK * (planned.hidden + planned.intermediate)
    assert planned.language_flops(TOKENS) < update < 1.5 * planned.language_flops(TOKENS) + 6 * TOKENS * adapter


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "llama"}, "here/config.json: model_type llama is not known here"),
        ({"model_type": "a-new-one"}, "here/config.json: model_type a-new-one is not known here"),
        ({}, "model_type None is not known here"),
        ({"model_type": "qwen3_vl"}, "here/config.json has no key vision_config"),
    ],
    ids=str,
)
def test_a_model_that_is_no_vision_language_model_is_refused(config: dict[str, Any], told: str) -> None:
    with pytest.raises(PlanError, match=told):
        architecture_of(config, "here/config.json")


def test_an_expression_that_matches_nothing_is_refused_with_one_that_does() -> None:
    planned = architecture_of(FAMILIES["smolvlm"]()[0].config.to_dict())
    with pytest.raises(PlanError, match=r"matches no layer.* is model\.text_model, such as \.\*model\\\.text_model"):
        planned.adapted(TARGETS)


# ------------------------------------------------------------------------------------------------------ other families


class Family:
    """A tiny model of a family: what is planned of its folder, and the real one."""

    def __init__(self, name: str, folder: Path) -> None:
        """Write the folder and read it."""
        self.folder, settings = save(name, folder), SETTINGS[name]
        self.targets = rf".*{settings['language_model']}.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
        hub = {"source": "hub", "hub": {"path": str(folder)}}
        self.configuration = Configuration.model_validate({"policy": settings["policy"] | hub})
        self.reader = read_policy(self.configuration)

    def real(self, attention: str) -> Any:
        """The real model with an adapter, in training mode."""
        model = AutoModelForImageTextToText.from_pretrained(self.folder, attn_implementation=attention)
        return get_peft_model(model, LoraConfig(r=RANK, target_modules=self.targets, task_type="CAUSAL_LM")).train()


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Return each family."""
    return Family(request.param, tmp_path_factory.mktemp(request.param))


def test_parameters_and_adapters_of_a_family_are_those_of_the_real_model(family: Family) -> None:
    planned, real = family.reader.architecture, family.real("eager")
    trained = sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert planned.adapter_parameters(RANK, family.targets) == trained
    assert planned.parameters == sum(p.numel() for p in real.parameters()) - trained
    names = {name.partition("base_model.model.")[2] for name, m in real.named_modules() if hasattr(m, "lora_A")}
    assert set(planned.adapted(family.targets)) == names


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tokens_and_flops_of_a_family_are_those_of_the_real_model(family: Family, checkpointing: bool) -> None:
    """A question with an image through the processor and the whole model, forward and backward."""
    from PIL import Image as Picture

    reader, template, size = family.reader, "{image} prompt: {prompt}.", (120, 90)
    text = reader.processor.apply_chat_template(messages(template, "a cat"), tokenize=False, add_generation_prompt=True)
    inputs = reader.processor(text=[text], images=[[Picture.new("RGB", size, "gray")]], return_tensors="pt")
    tokens, image = inputs["input_ids"].shape[1], reader.image(*size)
    assert reader.text(template, "a cat") + image.tokens == pytest.approx(tokens, abs=1)  # a beginning, as of Gemma's

    model = family.real("sdpa")
    if checkpointing:
        checkpointed(model)
    with FlopCounterMode(display=False) as counter:
        model(**{k: v for k, v in inputs.items() if k != "num_patches"}).logits.sum().backward()
    m = Model(reader.architecture, "float32", "sdpa", RANK, family.targets)
    head = reader.architecture.head_flops(tokens)  # forward, and backward of its input
    expected = update_flops(m, tokens, 0, (image,), checkpointing) + 2 * head
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_a_configuration_alone_says_how_many_tokens_an_image_is(tmp_path: Path) -> None:
    """Qwen3-VL as its processor does, SmolVLM in 4 x 4 tiles and the whole, as published."""
    whole, alone = Family("qwen3_vl", tmp_path / "whole"), tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_bytes((whole.folder / "config.json").read_bytes())
    hub = {"source": "hub", "hub": {"path": str(alone)}}
    reader = read_policy(Configuration.model_validate({"policy": hub}))
    assert reader.processor is None
    for size in ((84, 84), (500, 300)):
        assert reader.image(*size).tokens == whole.reader.image(*size).tokens
    tiled = Family("smolvlm", tmp_path / "tiled")
    (alone / "config.json").write_bytes((tiled.folder / "config.json").read_bytes())
    no_area = {"min_pixels": None, "max_pixels": None}
    reader = read_policy(Configuration.model_validate({"policy": hub | no_area}))
    assert reader.image(300, 300).tokens == (4 * 4 + 1) * 4


def test_a_folder_without_a_configuration_is_named(tmp_path: Path) -> None:
    hub = {"source": "hub", "hub": {"path": str(tmp_path)}}
    with pytest.raises(PlanError, match=r"config\.json is missing; set policy\.hub\.path"):
        read_policy(Configuration.model_validate({"policy": hub}))


# ---------------------------------------------------------------------------------------------------------- images


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
    """Of Qwen2.5-VL, by hand: sides are whole tokens of 28 pixels, and the area is at most `cap` tokens."""
    hub = {"source": "hub", "min_pixels": 3136, "max_pixels": cap * 784}
    assert published_reader(Configuration.model_validate({"policy": hub})).image(*size).tokens == tokens


def published_reader(c: Configuration) -> Reader:
    """What is known of the published model, whatever is in the Hub's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workflow_scripts.planning.tokens.try_to_load_from_cache", lambda *_, **__: None)
        return read_policy(c)


# ----------------------------------------------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("grid", [(8, 8), (10, 20)], ids=str)
def test_flops_of_an_update_are_those_that_torch_counts(
    attention: Any, checkpointing: bool, grid: tuple[int, int]
) -> None:
    """Forward and backward, exactly. The counter does not see addmm_, in which TRL's head makes its last product."""
    model = built(attention)
    planned, image = architecture(model), shown(*grid)
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
        + 2 * planned.adapter_parameters(RANK, TARGETS) * TOKENS
        + planned.vision_flops(image)
        + planned.head_flops(scored)
    )
    assert forward.get_total_flops() == SEQUENCES * expected
    update = update_flops(policy(planned, attention=attention), TOKENS, scored, (image,), checkpointing)
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
    m = policy(planned, attention=attention)
    update = shared_update_flops(m, question, TOKENS - question, scored, SEQUENCES)
    assert counted == SEQUENCES * (update - planned.head_flops(scored))


def test_flops_of_decoding_are_those_that_torch_counts() -> None:
    model = built().get_base_model().eval()
    planned = architecture_of(model.config.to_dict())
    with torch.no_grad():
        cache = model(**batch(8, 8), logits_to_keep=1).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(
                input_ids=torch.zeros(SEQUENCES, 1, dtype=torch.long) + 20,
                position_ids=torch.full((3, SEQUENCES, 1), TOKENS),
                past_key_values=cache,
            )
    adapter = 2 * planned.adapter_parameters(RANK, TARGETS)
    assert counter.get_total_flops() == SEQUENCES * (
        planned.language_flops(1, TOKENS + 1) + planned.head_flops(1) + adapter
    )
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == SEQUENCES * (TOKENS + 1) * policy(planned).kv_bytes


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
    formula = layer_activation_bytes(policy(planned, name, attention), SEQUENCES, TOKENS, padded)
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
    cache = TOKENS * policy(planned, name).kv_bytes
    formula = SEQUENCES * (language_workspace_bytes(policy(planned, name), TOKENS, adapted) + cache)
    assert memory.most == pytest.approx(formula, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_peak_of_the_vision_tower_is_near_the_formula(dtype: torch.dtype) -> None:
    tower = built(dtype=dtype).get_base_model().eval().model.visual
    planned, image = architecture_of(BUNDLED), shown(12, 16)
    pixels = torch.randn(image.patches, 1176).to(dtype)
    with torch.no_grad(), PeakMemory() as memory:
        tower(pixels, grid_thw=image.inputs["image_grid_thw"])
    name = str(dtype).removeprefix("torch.")
    formula = vision_workspace_bytes(policy(planned, name), image)
    formula -= image.patches * pixel_bytes(planned.vision, name)
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
    layer = layer_activation_bytes(policy(planned, name), SEQUENCES, TOKENS, True)
    kept = (
        SEQUENCES * TOKENS * 128 * dtype.itemsize * planned.layers + layer if checkpointing else planned.layers * layer
    )
    gradients = 4 * planned.adapter_parameters(RANK, TARGETS)
    formula = kept + gradients + SEQUENCES * TOKENS * update_workspace_bytes(policy(planned, name))
    assert memory.most == pytest.approx(formula, rel=0.1)


# ------------------------------------------------------------------------------------------------------------- kernels


class NewMemory(TorchDispatchMode):
    """Counts operations that write: they change an argument, or their result lies in memory that no argument has."""

    def __init__(self) -> None:
        """Start at 0."""
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and compare the memory."""
        given = {tensor.untyped_storage().data_ptr() for tensor in self.tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        made = {tensor.untyped_storage().data_ptr() for tensor in self.tensors(result)}
        self.found += (not made <= given and "empty" not in name) or name.endswith("_")
        return result

    @staticmethod
    def tensors(values: Any) -> list[torch.Tensor]:
        """The tensors in nested values."""
        return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [3, 5])
@pytest.mark.parametrize("adapted", [False, True])
def test_kernels_of_a_decoding_step_are_those_of_a_real_step(dtype: torch.dtype, layers: int, adapted: bool) -> None:
    model = built(dtype=dtype, num_hidden_layers=layers).eval()
    a = architecture(model)
    if not adapted:
        model = model.unload()
    share_prompts(model.get_base_model() if adapted else model)
    question = torch.full((2, 8), 30)
    decoding = Decoding(model, {"input_ids": question, "attention_mask": torch.ones_like(question)}, 2)
    decoding.step([0, 1, 2, 3], [30] * 4)
    with NewMemory() as real:
        decoding.step([0, 1, 2, 3], [30] * 4)
    counted = a.decoding_kernels(RANK if adapted else None, TARGETS, str(dtype).removeprefix("torch."), "sdpa")
    assert counted == pytest.approx(real.found, abs=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_are_counted_for_other_families(family: str, tmp_path: Path) -> None:
    config = json.loads((save(family, tmp_path / family) / "config.json").read_text())
    targets = rf".*{SETTINGS[family]['language_model']}.*\.(q_proj|v_proj)"
    for attention in ("sdpa", "eager"):
        a = architecture_of(config)
        alone, beside = (a.decoding_kernels(rank, targets, "bfloat16", attention) for rank in (None, RANK))
        assert beside - alone == a.layers * 2 * 6 and alone > 40 * a.layers

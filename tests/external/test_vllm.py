"""The vLLM engine against the transformers engine and its model: in vLLM's environment, by `make test-vllm`."""

import gc
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm", reason="vLLM is not in this environment; make test-vllm runs these in its own")

from workflow_scripts.configuration.model import Configuration, RolloutsVllm, Sampling, load
from workflow_scripts.configuration.stages import ModelConfig
from workflow_scripts.policy.loading import load_policy
from workflow_scripts.policy.manifest import PolicyError, base_path, model_files
from workflow_scripts.policy.prompts import messages
from workflow_scripts.preferences.images import in_memory
from workflow_scripts.preferences.schema import read_table
from workflow_scripts.rollouts import transformers_engine, vllm_engine
from workflow_scripts.rollouts.context import too_long
from workflow_scripts.rollouts.decoding import warpers_of
from workflow_scripts.rollouts.items import Item, anchor_items, pointwise_items
from workflow_scripts.rollouts.record import ROLLOUT, write_rollouts

HURRIED = Sampling(max_thinking_tokens=3)
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def images(scenes: Any) -> dict[str, Image.Image]:
    """All pictures by name, two of them of another size so that lengths differ."""
    found = {name: picture for _, pictures in scenes for name, picture in pictures.items()}
    for name in ("1-0", "2-3"):
        found[name] = found[name].resize((56, 84))
    return found


class Pair:
    """One policy in both engines, and what it is asked."""

    def __init__(self, vllm: Any, model: Any, items: list[Item], images: dict[str, Image.Image]) -> None:
        self.vllm, self.model, self.items, self.images = vllm, model, items, images

    def run(self, items: list[Item] | None = None, **options: Any) -> list[dict[str, Any]]:
        """Rollouts of vLLM by item and k."""
        defaults = {"rollouts": 2, "first_k": 0, "sampling": Sampling(), "batch_items": 8, "seed": "test"}
        found = vllm_engine.generate(self.vllm, items or self.items, in_memory(self.images), **(defaults | options))
        return sorted(found, key=lambda row: (row["item_id"], row["k"]))

    def question(self, item: Item) -> Any:
        """Inputs of one item for the model in transformers."""
        text = self.model.processor.apply_chat_template(
            messages(self.model.template, item.prompt), add_generation_prompt=True, tokenize=False
        )
        shown = [self.images[name] for name in item.image_ids]
        return self.model.processor(text=[text], images=shown, return_tensors="pt")

    @torch.no_grad()
    def forward(self, item: Item, ids: list[int]) -> torch.Tensor:
        """Logits of the model in transformers behind an item's question and these tokens: (vocabulary)."""
        inputs = self.question(item)
        before = torch.tensor([ids], dtype=torch.long)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], before], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        kinds = torch.zeros_like(before, dtype=inputs["mm_token_type_ids"].dtype)
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], kinds], 1)
        return self.model.model(**inputs).logits[0, -1].double()


@pytest.fixture(scope="module", params=["imagereward", "hpsv2", "imagereward adapter", "hpsv2 adapter"])
def pair(request: Any, base_manifest: Path, adapter: Path, scenes: Any, images: Any) -> Iterator[Pair]:
    """Return the bundled policy, with and without an adapter, for ratings and for pairs, in both engines."""
    track, *adapted = request.param.split()
    config = ModelConfig.of(Configuration(), track)
    folder = adapter if adapted else None
    rows = [{"prompt_id": f"p{i}", "prompt": prompt, "image_ids": list(p)} for i, (prompt, p) in enumerate(scenes)]
    items = pointwise_items(rows, set(images)) if track == "imagereward" else anchor_items(rows, set(images), 0, False)
    vllm = vllm_engine.load_into_vllm(base_manifest, folder, config, RolloutsVllm())
    yield Pair(vllm, load_policy(base_manifest, folder, config), items, images)
    vllm.model.llm.llm_engine.engine_core.shutdown()
    del vllm
    gc.collect()


@pytest.mark.parametrize("sampling", [Sampling(), HURRIED], ids=["whole", "forced"])
def test_answer_probabilities_of_both_engines_agree_on_the_same_tokens(pair: Pair, sampling: Sampling) -> None:
    by_id = {item.item_id: item for item in pair.items}
    rows = pair.run(sampling=sampling)
    assert len(rows) == 2 * len(pair.items)
    assert all(row["forced"] for row in rows) == (sampling is HURRIED)
    for row in rows:
        logits = pair.forward(by_id[row["item_id"]], row["completion_ids"][: row["answer_position"]])
        expected = logits[pair.model.answer_token_ids].softmax(-1).tolist()
        assert list(map(math.exp, row["answer_logprobs"])) == pytest.approx(expected, abs=1e-4, rel=0)


def test_greedy_rollouts_of_both_engines_are_the_same(pair: Pair) -> None:
    options = {"rollouts": 2, "first_k": 0, "sampling": GREEDY, "batch_items": 8, "seed": "test"}
    other = list(transformers_engine.generate(pair.model, pair.items, in_memory(pair.images), **options))
    other.sort(key=lambda row: (row["item_id"], row["k"]))
    rows = pair.run(sampling=GREEDY)
    given = [name for name in ROLLOUT.names if name not in ("seed", "answer_logprobs")]
    same = [all(a[name] == b[name] for name in given) for a, b in zip(rows, other, strict=True)]
    assert sum(same) >= len(same) - 2  # two tokens of equal probability to the sixth digit may change places
    for one, two, equal in zip(rows, other, same, strict=True):
        if equal:
            assert one["answer_logprobs"] == pytest.approx(two["answer_logprobs"], abs=1e-4, rel=0)


def test_questions_are_the_same_tokens(pair: Pair) -> None:
    from vllm import SamplingParams

    for item in pair.items[:8]:
        text = pair.vllm.processor.apply_chat_template(
            messages(pair.vllm.template, item.prompt), add_generation_prompt=True, tokenize=False
        )
        ids = pair.vllm.tokenizer(text, add_special_tokens=False)["input_ids"]
        request = {"prompt_token_ids": ids, "multi_modal_data": {"image": [pair.images[i] for i in item.image_ids]}}
        (output,) = pair.vllm.model.llm.generate([request], SamplingParams(max_tokens=1), use_tqdm=False)
        expanded = pair.question(item)["input_ids"][0].tolist()
        assert output.prompt_token_ids == expanded != ids
        # Which is why TRL's colocated vLLM, too, must not be given these (training.trainer.ValidatingTrainer).
        (again,) = pair.vllm.model.llm.generate(
            [request | {"prompt_token_ids": expanded}], SamplingParams(max_tokens=1), use_tqdm=False
        )
        assert len(again.prompt_token_ids) > len(expanded)


def test_the_adapter_matters(pair: Pair, base_manifest: Path, request: Any) -> None:
    if "adapter" not in request.node.callspec.params["pair"]:
        pytest.skip("has no adapter")
    item = pair.items[0]
    (row,) = pair.run([item], rollouts=1, sampling=HURRIED)
    ids = row["completion_ids"][: row["answer_position"]]
    base = Pair(None, load_policy(base_manifest, None, _config(pair)), pair.items, pair.images)
    without = base.forward(item, ids)[pair.model.answer_token_ids].log_softmax(-1).tolist()
    assert max(abs(a - b) for a, b in zip(row["answer_logprobs"], without, strict=True)) > 0.01


def _config(pair: Pair) -> ModelConfig:
    return ModelConfig.of(Configuration(), "hpsv2" if pair.items[0].anchor else "imagereward")


@pytest.mark.parametrize("budget", [1, 2, 5])
def test_every_rollout_has_a_score_however_small_the_budget(pair: Pair, budget: int) -> None:
    for row in pair.run(sampling=Sampling(max_thinking_tokens=budget, max_answer_tokens=3)):
        assert row["forced"]
        before = pair.vllm.tokenizer.decode(row["completion_ids"][: row["answer_position"]])
        assert before.endswith("</think><answer>") and before.count("<answer>") == 1
        assert budget + 2 == row["answer_position"] < len(row["completion_ids"]) + 1 <= budget + 6
        assert sum(map(math.exp, row["answer_logprobs"])) == pytest.approx(1, abs=1e-12)


def test_seeds_reproduce_whatever_else_is_asked(pair: Pair) -> None:
    rows = pair.run()
    assert pair.run() == rows
    alone = pair.run(pair.items[5:8])
    ids = {(row["item_id"], row["k"]): row["completion_ids"] for row in rows}
    assert all(row["completion_ids"] == ids[row["item_id"], row["k"]] for row in alone)
    assert pair.run(pair.items[::-1], batch_items=5)[0]["completion_ids"] == rows[0]["completion_ids"]
    later = pair.run(pair.items[:4], first_k=1)
    assert [row["k"] for row in later[:2]] == [1, 2]
    assert later[0]["completion_ids"] == ids[later[0]["item_id"], 1]
    other = pair.run(seed="another")
    assert [row["text"] for row in other] != [row["text"] for row in rows]
    assert len({row["seed"] for row in rows + other}) == 4 * len(pair.items)


def test_answers_are_sampled_as_their_log_probabilities_say(pair: Pair) -> None:
    rows = [row for row in pair.run(pair.items[:4], rollouts=60) if row["sampled_answer"] is not None]
    assert len(rows) > 120
    for place, answer in enumerate(pair.vllm.answers):
        chance = [math.exp(row["answer_logprobs"][place]) for row in rows]
        hits = sum(row["sampled_answer"] == answer for row in rows)
        assert abs(hits - sum(chance)) < 5 * math.sqrt(sum(p * (1 - p) for p in chance)) + 1


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}], ids=str)
def test_thoughts_are_sampled_as_the_model_and_the_settings_say(pair: Pair, options: dict[str, Any]) -> None:
    item = pair.items[0]
    sampling = Sampling(temperature=2, max_thinking_tokens=4, max_answer_tokens=2, **options)
    rows = pair.run([item], rollouts=300, sampling=sampling)
    # The fourth token, how many things there are, where the first three are those of most thoughts.
    ((before, count),) = Counter(tuple(row["completion_ids"][:3]) for row in rows).most_common(1)
    logits = pair.forward(item, list(before))
    warped = warpers_of(sampling)(torch.empty(1, 0), logits[None].float())[0].softmax(-1)  # type: ignore[arg-type]
    # A thought that ends at once and one that begins with its closing tag look the same: the engine closes the former.
    closing = pair.vllm.tokenizer.convert_tokens_to_ids("</think>")
    for end in pair.vllm.model.end_ids:
        warped[closing] += warped[end]
        warped[end] = 0
    drawn = Counter(row["completion_ids"][3] for row in rows if tuple(row["completion_ids"][:3]) == before)
    assert len(drawn) > 1 and all(warped[token] > 0 for token in drawn)
    for token, probability in enumerate(warped.tolist()):
        assert abs(drawn[token] - count * probability) <= 5 * math.sqrt(count * probability) + 3


def test_rows_are_what_the_record_holds(pair: Pair, tmp_path: Path) -> None:
    rows = pair.run()
    write_rollouts(tmp_path / "rollouts.parquet", rows[::-1])
    assert read_table(tmp_path / "rollouts.parquet", ROLLOUT).to_pylist() == rows
    for row in rows:
        assert row["text"] == pair.vllm.tokenizer.decode(row["completion_ids"])
        assert (row["anchor"] is None) == (row["candidate_second"] is None)


def test_the_context_is_the_one_that_vllm_has_room_for(pair: Pair) -> None:
    sizes = {name: image.size for name, image in pair.images.items()}
    assert not too_long(pair.vllm, pair.items, sizes, Sampling())
    context = pair.vllm.model.config.get_text_config().max_position_embeddings
    assert context == pair.model.model.config.get_text_config().max_position_embeddings
    assert too_long(pair.vllm, pair.items, sizes, Sampling(max_thinking_tokens=context - 20)) == set(pair.items)


@pytest.mark.parametrize("adapted", [False, True])
def test_answers_do_not_tie_in_bfloat16(
    adapted: bool, base_manifest: Path, adapter: Path, scenes: Any, images: Any, tmp_path: Path
) -> None:
    """Of a policy whose digits are so alike that a head in bfloat16 gives equal logits."""
    folder = shutil.copytree(base_path(base_manifest), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    ids = load_policy(base_manifest, None, ModelConfig.of(Configuration(), "imagereward")).answer_token_ids
    torch.manual_seed(0)
    head = weights["model.embed_tokens.weight"]  # both in one
    head[ids] = (2 * torch.randn(head.shape[1]) + 0.02 * torch.randn(7, head.shape[1])).to(head.dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"path": str(folder), "files": model_files(folder)}))
    config = ModelConfig.of(load({"policy": {"dtype": "bfloat16"}}), "imagereward")
    chosen = adapter if adapted else None
    rows = [{"prompt_id": f"p{i}", "prompt": prompt, "image_ids": list(p)} for i, (prompt, p) in enumerate(scenes)]
    items = pointwise_items(rows, set(images))
    vllm = vllm_engine.load_into_vllm(manifest, chosen, config, RolloutsVllm())
    both = Pair(vllm, load_policy(manifest, chosen, config), items, images)
    by_id = {item.item_id: item for item in items}
    tied = 0
    for row in both.run(rollouts=1, sampling=HURRIED):
        assert len(set(row["answer_logprobs"])) == 7
        logits = both.forward(by_id[row["item_id"]], row["completion_ids"][: row["answer_position"]])[ids]
        tied += len(logits.bfloat16().unique()) < 7
        assert row["answer_logprobs"] == pytest.approx(logits.log_softmax(-1).tolist(), abs=0.1, rel=0)
    assert tied > len(items) / 2
    vllm.model.llm.llm_engine.engine_core.shutdown()


def test_an_adapter_of_too_high_a_rank_is_refused(base_manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 1024}))
    with pytest.raises(
        PolicyError, match=r"rank 1024, vLLM supports at most 512; set rollouts\.engine to transformers"
    ):
        vllm_engine.load_into_vllm(base_manifest, tmp_path, ModelConfig.of(Configuration(), "hpsv2"), RolloutsVllm())

"""The transformers engine against slower, plainer ways to get the same numbers."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import GenerationConfig

from workflow_scripts.configuration.model import Configuration, Sampling
from workflow_scripts.configuration.stages import ModelConfig
from workflow_scripts.policy.loading import as_policy, load_model, load_policy
from workflow_scripts.policy.prompts import messages, sampled_answer
from workflow_scripts.preferences.images import in_memory
from workflow_scripts.preferences.schema import read_table
from workflow_scripts.rollouts.items import Item, anchor_items, pointwise_items
from workflow_scripts.rollouts.record import ROLLOUT, write_rollouts
from workflow_scripts.rollouts.transformers_engine import generate

TRACKS = ["imagereward", "hpsv2"]
GREEDY = Sampling(temperature=0)
HURRIED = Sampling(max_thinking_tokens=3)


@pytest.fixture(scope="module")
def images(scenes: Any) -> dict[str, Image.Image]:
    """All pictures by name, two of them of another size so that lengths differ."""
    found = {name: picture for _, pictures in scenes for name, picture in pictures.items()}
    for name in ("1-0", "2-3"):
        found[name] = found[name].resize((56, 84))
    return found


@pytest.fixture(scope="module")
def items(scenes: Any, images: dict[str, Image.Image]) -> dict[str, list[Item]]:
    """Items of each track, about all pictures."""
    rows = [{"prompt_id": f"p{i}", "prompt": scenes[i][0], "image_ids": list(scenes[i][1])} for i in range(len(scenes))]
    return {"imagereward": pointwise_items(rows, set(images)), "hpsv2": anchor_items(rows, set(images), 0, False)}


def run(policy: Any, items: list[Item], images: dict[str, Image.Image], **options: Any) -> list[dict[str, Any]]:
    """Rollouts by item and k."""
    defaults = {"rollouts": 2, "first_k": 0, "sampling": Sampling(), "batch_items": 8, "seed": "test"}
    found = generate(policy, items, in_memory(images), **(defaults | options))
    return sorted(found, key=lambda row: (row["item_id"], row["k"]))


def question(policy: Any, item: Item, images: dict[str, Image.Image]) -> Any:
    """Inputs of one item by itself, without padding."""
    text = policy.processor.apply_chat_template(
        messages(policy.template, item.prompt), add_generation_prompt=True, tokenize=False
    )
    return policy.processor(text=[text], images=[images[name] for name in item.image_ids], return_tensors="pt")


@torch.no_grad()
def teacher_forced(policy: Any, item: Item, images: dict[str, Image.Image], row: dict[str, Any]) -> list[float]:
    """Log-probabilities of the answers at the recorded position, from one forward over the recorded tokens."""
    inputs = question(policy, item, images)
    before = torch.tensor([row["completion_ids"][: row["answer_position"]]])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], before], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    kinds = torch.zeros_like(before, dtype=inputs["mm_token_type_ids"].dtype)
    inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], kinds], 1)
    logits = policy.model(**inputs).logits[0, -1, policy.answer_token_ids]
    return logits.double().log_softmax(-1).tolist()


@pytest.mark.parametrize("track", TRACKS)
@pytest.mark.parametrize("sampling", [Sampling(), HURRIED], ids=["whole", "forced"])
def test_answer_logprobs_are_those_of_a_teacher_forced_forward(
    policies: dict[str, Any], items: Any, images: Any, track: str, sampling: Sampling
) -> None:
    policy = policies[track]
    rows = run(policy, items[track], images, sampling=sampling)
    by_id = {item.item_id: item for item in items[track]}
    assert len(rows) == 2 * len(items[track])
    assert all(row["forced"] for row in rows) == (sampling is HURRIED)
    for row in rows:
        expected = teacher_forced(policy, by_id[row["item_id"]], images, row)
        assert row["answer_logprobs"] == pytest.approx(expected, abs=1e-5, rel=0)


@pytest.mark.parametrize("track", TRACKS)
def test_greedy_tokens_are_those_of_generate(policies: dict[str, Any], items: Any, images: Any, track: str) -> None:
    policy = policies[track]
    rows = {row["item_id"]: row for row in run(policy, items[track], images, rollouts=1, sampling=GREEDY)}
    ends = policy.model.generation_config
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=80, eos_token_id=ends.eos_token_id, pad_token_id=ends.pad_token_id
    )
    for item in items[track]:
        inputs = question(policy, item, images)
        ids = policy.model.generate(**inputs, generation_config=settings)[0, inputs["input_ids"].shape[1] :].tolist()
        row = rows[item.item_id]
        assert ids[-1] == policy.tokenizer.eos_token_id
        if not row["forced"]:
            # The record ends with the answer's budget; what the model says after that is not asked for.
            assert ids[: len(row["completion_ids"])] == row["completion_ids"]
            assert row["text"] == policy.tokenizer.decode(row["completion_ids"])
    assert sum(not row["forced"] for row in rows.values()) > len(rows) / 2


@pytest.mark.parametrize("track", TRACKS)
def test_twice_is_the_same_whatever_ran_before(policies: dict[str, Any], items: Any, images: Any, track: str) -> None:
    first, second = items[track][:6], items[track][6:]
    alone = run(policies[track], second, images)
    torch.manual_seed(5)
    run(policies[track], first, images)
    assert run(policies[track], second, images) == alone


def test_two_shards_at_once_do_not_disturb_each_other(policies: dict[str, Any], items: Any, images: Any) -> None:
    policy, halves = policies["imagereward"], (items["imagereward"][:8], items["imagereward"][8:])
    options = {"rollouts": 2, "first_k": 0, "sampling": Sampling(), "batch_items": 3}
    alone = [
        list(generate(policy, half, in_memory(images), seed=f"shard {i}", **options)) for i, half in enumerate(halves)
    ]
    both = [generate(policy, half, in_memory(images), seed=f"shard {i}", **options) for i, half in enumerate(halves)]
    turns = list(itertools.zip_longest(*both))
    assert [[turn[i] for turn in turns if turn[i]] for i in (0, 1)] == alone


def test_the_order_in_which_items_are_given_does_not_matter(policies: dict[str, Any], items: Any, images: Any) -> None:
    policy, given = policies["hpsv2"], items["hpsv2"]
    assert run(policy, given[::-1], images, batch_items=5) == run(policy, given, images, batch_items=5)


def test_blocks_and_seeds_differ(policies: dict[str, Any], items: Any, images: Any) -> None:
    policy, given = policies["imagereward"], items["imagereward"][:4]
    one, two = (run(policy, given, images, seed=f"block {b}", first_k=2 * b) for b in (0, 1))
    assert [row["k"] for row in one[:2] + two[:2]] == [0, 1, 2, 3]
    assert [row["text"] for row in one] != [row["text"] for row in two]
    assert {row["seed"] for row in one}.isdisjoint(row["seed"] for row in two)
    assert any(a["text"] != b["text"] for a, b in zip(one[::2], one[1::2], strict=True))


@pytest.mark.parametrize("track", TRACKS)
@pytest.mark.parametrize("budget", [1, 2, 5])
def test_every_rollout_has_a_score_however_small_the_budget(
    policies: dict[str, Any], items: Any, images: Any, track: str, budget: int
) -> None:
    policy = policies[track]
    for row in run(policy, items[track], images, sampling=Sampling(max_thinking_tokens=budget)):
        assert row["forced"]
        before = policy.tokenizer.decode(row["completion_ids"][: row["answer_position"]])
        assert before.endswith("</think><answer>") and before.count("<answer>") == 1
        assert budget + 2 == row["answer_position"]
        assert len(row["answer_logprobs"]) == len(policy.answers)
        assert sum(map(math.exp, row["answer_logprobs"])) == pytest.approx(1, abs=1e-12)


def test_thinking_that_is_closed_but_not_answered_is_opened_only(
    policies: dict[str, Any], items: Any, images: Any
) -> None:
    policy, given = policies["imagereward"], items["imagereward"]
    close = policy.tokenizer.convert_tokens_to_ids("</think>")
    rows = run(policy, given, images, rollouts=1, sampling=GREEDY)
    closed = {row["item_id"]: row["completion_ids"].index(close) for row in rows}
    length = min(closed.values()) + 1
    cut = run(policy, given, images, rollouts=1, sampling=Sampling(temperature=0, max_thinking_tokens=length))
    seen = 0
    for row, whole in zip(cut, rows, strict=True):
        if closed[row["item_id"]] == length - 1:
            seen += 1
            assert row["forced"] and row["text"].count("</think>") == 1
            assert row["answer_position"] == whole["answer_position"]
            assert row["answer_logprobs"] == pytest.approx(whole["answer_logprobs"], abs=1e-5)
    assert seen


def test_a_rollout_without_a_valid_answer_still_has_a_score(policies: dict[str, Any], items: Any, images: Any) -> None:
    wild = Sampling(temperature=8, max_thinking_tokens=4)
    rows = run(policies["imagereward"], items["imagereward"], images, sampling=wild, rollouts=3)
    missing = [row for row in rows if row["sampled_answer"] is None]
    assert missing
    for row in rows:
        assert row["sampled_answer"] == sampled_answer(row["text"], policies["imagereward"].answers)
        assert sum(map(math.exp, row["answer_logprobs"])) == pytest.approx(1, abs=1e-12)
        assert row["answer_position"] <= len(row["completion_ids"]) <= 4 + 2 + wild.max_answer_tokens


def test_logprobs_are_those_before_temperature(policies: dict[str, Any], items: Any, images: Any) -> None:
    policy, given = policies["imagereward"], items["imagereward"]
    cold, warm = (
        run(policy, given, images, rollouts=1, sampling=Sampling(temperature=t, max_thinking_tokens=1, top_k=k))
        for t, k in ((1e-4, 0), (3.0, 1))
    )
    for one, two in zip(cold, warm, strict=True):
        assert one["completion_ids"][0] == two["completion_ids"][0]
        assert one["answer_logprobs"] == pytest.approx(two["answer_logprobs"], abs=1e-6)


@pytest.mark.parametrize("narrow", [Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(temperature=1e-5)], ids=str)
def test_the_narrowest_sampling_is_greedy(policies: dict[str, Any], items: Any, images: Any, narrow: Sampling) -> None:
    policy, given = policies["hpsv2"], items["hpsv2"][:6]
    greedy = run(policy, given, images, sampling=GREEDY)
    assert [row["text"] for row in run(policy, given, images, sampling=narrow)] == [row["text"] for row in greedy]
    assert greedy[0]["text"] == greedy[1]["text"]


def test_top_k_and_top_p_restrict_what_is_drawn(policies: dict[str, Any], items: Any, images: Any) -> None:
    policy, item = policies["imagereward"], items["imagereward"][0]
    with torch.no_grad():
        probabilities = policy.model(**question(policy, item, images)).logits[0, -1].div(4).softmax(-1)
    ranked = probabilities.argsort(descending=True).tolist()
    nucleus = int((probabilities[ranked].cumsum(0) < 0.5).sum()) + 1
    for options, allowed in (({"top_k": 3}, 3), ({"top_p": 0.5}, nucleus), ({}, len(ranked))):
        sampling = Sampling(temperature=4, max_thinking_tokens=1, **options)
        rows = run(policy, [item], images, sampling=sampling, rollouts=300)
        drawn = {row["completion_ids"][0] for row in rows if row["answer_position"] == 3}
        assert drawn <= set(ranked[:allowed]) and len(drawn) > 1
    assert len(drawn) > max(nucleus, 3)


@pytest.mark.parametrize("track", TRACKS)
def test_neighbours_in_a_batch_do_not_change_a_row(
    policies: dict[str, Any], items: Any, images: Any, track: str
) -> None:
    policy, given = policies[track], items[track][:10]
    results = [run(policy, given, images, rollouts=1, sampling=GREEDY, batch_items=size) for size in (1, 5, len(given))]
    lengths = {len(row["completion_ids"]) for row in results[0]}
    assert len(lengths) > 1  # rows finish at different times
    for others in results[1:]:
        for alone, row in zip(results[0], others, strict=True):
            assert row["completion_ids"] == alone["completion_ids"]
            assert row["answer_logprobs"] == pytest.approx(alone["answer_logprobs"], abs=1e-4, rel=0)


def test_images_are_encoded_and_prompts_prefilled_once_for_all_rollouts(
    policies: dict[str, Any], items: Any, images: Any
) -> None:
    policy, encoded, widths = policies["hpsv2"], [], []
    hooks = [
        policy.model.model.visual.register_forward_pre_hook(lambda *_: encoded.append(1)),
        policy.model.model.language_model.register_forward_pre_hook(
            lambda _, __, kwargs: widths.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
        ),
    ]
    try:
        run(policy, items["hpsv2"], images, rollouts=5, batch_items=6)
    finally:
        for hook in hooks:
            hook.remove()
    batches = -(-len(items["hpsv2"]) // 6)
    prefills = [shape for shape in widths if shape[1] > 1]
    assert len(encoded) == len(prefills) == batches
    assert {shape[0] for shape in prefills} == {6}
    assert max(shape[0] for shape in widths if shape[1] == 1) == 30


def test_the_pictures_and_their_order_matter(policies: dict[str, Any], items: Any, images: Any) -> None:
    for track in TRACKS:
        rows = run(policies[track], items[track], images, rollouts=1, sampling=HURRIED)
        blank = dict.fromkeys(images, Image.new("RGB", (84, 84), (127, 127, 127)))
        unseen = run(policies[track], items[track], blank, rollouts=1, sampling=HURRIED)
        assert all(a["answer_logprobs"] != b["answer_logprobs"] for a, b in zip(rows, unseen, strict=True))
    item = items["hpsv2"][0]
    swapped = Item(item.prompt_id, item.prompt, item.image_ids[::-1], item.candidate, item.anchor)
    one, two = (run(policies["hpsv2"], [i], images, sampling=GREEDY)[0] for i in (item, swapped))
    assert one["candidate_second"] != two["candidate_second"]
    assert one["text"] != two["text"]


def test_an_unmerged_adapter_gives_what_the_merged_one_gives(
    base_manifest: Path, adapter: Path, items: Any, images: Any, policies: dict[str, Any]
) -> None:
    config = ModelConfig.of(Configuration(), "hpsv2")
    merged = load_policy(base_manifest, adapter, config)
    peft = PeftModel.from_pretrained(load_model(base_manifest, config), adapter).eval()
    unmerged = as_policy(peft, merged.processor, config)
    options = {"rollouts": 1, "sampling": HURRIED}
    base, one, two = (run(p, items["hpsv2"], images, **options) for p in (policies["hpsv2"], merged, unmerged))
    for a, b in zip(one, two, strict=True):
        if a["completion_ids"] == b["completion_ids"]:
            assert a["answer_logprobs"] == pytest.approx(b["answer_logprobs"], abs=1e-5)
    assert [row["answer_logprobs"] for row in one] != [row["answer_logprobs"] for row in base]
    assert sum(a["completion_ids"] == b["completion_ids"] for a, b in zip(one, two, strict=True)) > len(one) / 2


def test_rows_are_what_the_record_holds(policies: dict[str, Any], items: Any, images: Any, tmp_path: Path) -> None:
    for track in TRACKS:
        rows = run(policies[track], items[track], images)
        path = tmp_path / f"{track}.parquet"
        write_rollouts(path, rows[::-1])
        assert read_table(path, ROLLOUT).to_pylist() == rows
        for row in rows:
            assert (row["anchor"] is None) == (row["candidate_second"] is None) == (track == "imagereward")
            if track == "hpsv2":
                shown = row["item_id"].split("/")[1:]
                assert shown[row["candidate_second"]] == row["candidate"]
                assert shown[not row["candidate_second"]] == row["anchor"]
        copy = tmp_path / f"{track}-again.parquet"
        write_rollouts(copy, rows)
        assert copy.read_bytes() == path.read_bytes()

"""Decoding against the model's own `generate`, the plain cache and the probabilities that tokens are drawn with."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers.cache_utils import DynamicLayer

from workflow_scripts.configuration.model import Sampling
from workflow_scripts.policy.fast.key_values import RoomyLayer, compaction_order
from workflow_scripts.policy.fast.prompt_attention import PROMPT_ONCE
from workflow_scripts.policy.prompts import messages
from workflow_scripts.rollouts.decoding import (
    LARGE_VOCABULARY,
    AnswerReader,
    Decoding,
    draw,
    look_up,
    sample_completions,
    warpers_of,
)
from workflow_scripts.rollouts.rollout import Completion


def drawn(logits: list[float], count: int, **sampling: Any) -> Counter[int]:
    """How often each token is drawn."""
    chosen = Sampling(**sampling)
    rows = torch.tensor(logits).repeat(count, 1)
    generator = torch.Generator().manual_seed(0)
    return Counter(draw(rows, warpers_of(chosen), chosen.temperature, generator))


def test_tokens_are_drawn_with_their_probabilities() -> None:
    logits = [0.0, 1.0, -2.0, 3.0, 0.5]
    found = drawn(logits, 20_000, temperature=0.7)
    expected = 20_000 * (torch.tensor(logits) / 0.7).softmax(-1).double()
    assert chisquare([found[i] for i in range(5)], (expected / expected.sum() * 20_000).numpy()).pvalue > 0.001


def test_what_the_warpers_leave_out_is_never_drawn() -> None:
    assert set(drawn([0.0, 1.0, 2.0, 3.0], 5000, top_k=2)) == {2, 3}
    assert set(drawn([0.0, 0.0, 5.0, 5.0], 5000, top_p=0.9)) == {2, 3}
    assert set(drawn([float("-inf"), 0.0, float("-inf")], 100)) == {1}


def test_at_temperature_0_the_most_likely_token_is_drawn() -> None:
    assert drawn([0.0, 2.0, 1.9], 10, temperature=0) == {1: 10}


def test_rare_tokens_of_a_large_vocabulary_are_drawn_too() -> None:
    logits = torch.zeros(1, 200_000)
    logits[0, 0] = 12.0  # about half of the mass
    generator = torch.Generator().manual_seed(0)
    found = Counter(draw(logits.expand(400, -1), warpers_of(Sampling()), 1.0, generator))
    share = float(logits.softmax(-1)[0, 0])
    assert abs(found[0] / 400 - share) < 4 * (share * (1 - share) / 400) ** 0.5
    assert len(found) > 150


@given(st.lists(st.sampled_from([0.0, 1e-30, 1e-3, 0.25, 1.0]), min_size=1, max_size=40), st.floats(0, 1))
def test_a_weight_is_found_where_its_share_begins_and_never_one_of_0(weights: list[float], share: float) -> None:
    if not any(weights):
        return
    row = torch.tensor([weights])
    index, rest = look_up(row, torch.tensor([[share]], dtype=torch.double))
    found = int(index)
    assert weights[found] > 0 and 0 <= float(rest) <= 1
    exact = row.double()[0]
    before, whole = exact[:found].sum(), exact.sum()
    assert before <= share * whole * (1 + 1e-12) and share * whole <= (before + exact[found]) * (1 + 1e-12)
    assert abs(float(before + rest * exact[found] - share * whole)) <= 1e-12 * float(whole)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16), st.integers(LARGE_VOCABULARY, LARGE_VOCABULARY + 300))
def test_looking_up_in_blocks_finds_what_looking_up_in_all_finds(seed: int, vocabulary: int) -> None:
    """Where the number is not within rounding of a border between two tokens; left-out tokens are never drawn."""
    made = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(50, vocabulary, generator=made)
    logits[:, torch.rand(vocabulary, generator=made) < 0.5] = float("-inf")
    tokens = draw(logits, warpers_of(Sampling()), 1.0, torch.Generator().manual_seed(seed))
    cumulated = logits.softmax(-1).double().cumsum(-1)
    share = torch.rand(50, 1, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
    reached = share * cumulated[:, -1:]
    rows = torch.arange(50)
    low = torch.where(torch.tensor(tokens) > 0, cumulated[rows, torch.tensor(tokens) - 1], 0.0)
    assert ((low <= reached[:, 0] + 1e-6) & (reached[:, 0] <= cumulated[rows, torch.tensor(tokens)] + 1e-6)).all()
    assert torch.isfinite(logits[rows, torch.tensor(tokens)]).all()


@given(st.sets(st.integers(0, 20)))
def test_closing_up_moves_the_fewest_rows(keep: set[int]) -> None:
    order = compaction_order(sorted(keep))
    assert set(order) == keep and len(order) == len(keep)
    assert sum(row != place for place, row in enumerate(order)) == sum(row >= len(keep) for row in keep)


@given(st.data())
def test_a_layer_with_room_holds_what_the_plain_one_holds(data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    plain, roomy = DynamicLayer(), RoomyLayer()
    rows = data.draw(st.integers(1, 4))

    def grow(tokens: int) -> None:
        keys, values = torch.randn(2, rows, 2, tokens, 3, generator=generator)
        for theirs, ours in zip(plain.update(keys, values), roomy.update(keys, values), strict=True):
            assert torch.equal(theirs, ours)

    grow(data.draw(st.integers(1, 5)))
    for action in data.draw(st.lists(st.sampled_from(["grow", "far", "keep", "repeat"]), max_size=12)):
        if action == "grow":
            grow(1)
        elif action == "far":
            grow(70)
        elif action == "keep":
            keep = compaction_order(sorted(data.draw(st.sets(st.integers(0, rows - 1), min_size=1))))
            for layer in (plain, roomy):
                layer.batch_select_indices(torch.tensor(keep))
            rows = len(keep)
        elif rows < 20:
            for layer in (plain, roomy):
                layer.batch_repeat_interleave(2)
            rows *= 2
    assert torch.equal(plain.keys, roomy.keys) and torch.equal(plain.values, roomy.values)
    assert plain.get_seq_length() == roomy.get_seq_length()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_attend_to_their_prompt_together_as_each_would_alone(policies: Any, scenes: Any, data: Any) -> None:
    policy = policies["imagereward"]
    texts = policy.processor.apply_chat_template(
        [messages(policy.template, prompt * (1 + i % 2)) for i, (prompt, _) in enumerate(scenes)],
        add_generation_prompt=True,
        tokenize=False,
    )
    images = [list(pictures.values())[:1] for _, pictures in scenes]
    inputs = policy.processor(text=texts, images=images, padding=True, return_tensors="pt")
    assert not inputs["attention_mask"].all()  # some are padded
    language_model = policy.model.get_decoder()
    assert language_model.config._attn_implementation == PROMPT_ONCE  # of every policy that is loaded
    rollouts = data.draw(st.integers(1, 3))
    together = Decoding(policy.model, inputs, rollouts)
    language_model.set_attn_implementation("sdpa")
    try:
        alone = Decoding(policy.model, inputs, rollouts)
    finally:
        language_model.set_attn_implementation(PROMPT_ONCE)
    assert together._prompts and not alone._prompts
    rows = rollouts * len(texts)
    for _ in range(data.draw(st.integers(1, 6))):
        torch.testing.assert_close(together.logits, alone.logits, rtol=1e-4, atol=1e-4)
        kept = compaction_order(sorted(data.draw(st.sets(st.integers(0, rows - 1), min_size=1))))
        tokens = data.draw(st.lists(st.integers(3, 400), min_size=len(kept), max_size=len(kept)))
        together.step(kept, tokens)
        alone.step(kept, tokens)
        rows = len(kept)
    torch.testing.assert_close(together.logits, alone.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("track", ["imagereward", "hpsv2"])
def test_greedy_completions_are_those_of_generate(policies: Any, scenes: Any, track: str) -> None:
    policy = policies[track]
    shown = 2 if track == "hpsv2" else 1
    asked = [(prompt, list(pictures.values())[:shown]) for prompt, pictures in scenes]
    texts = [
        policy.processor.apply_chat_template(
            messages(policy.template, prompt), add_generation_prompt=True, tokenize=False
        )
        for prompt, _ in asked
    ]
    ends = [policy.tokenizer.eos_token_id]
    inputs = policy.processor(text=texts, images=[shown for _, shown in asked], padding=True, return_tensors="pt")
    completions, _ = sample_completions(policy.model, inputs, 3, Sampling(temperature=0), 48, ends)
    found = [completion.ids for completion in completions]
    assert len(found) == 3 * len(asked)
    lengths = set()
    for i, (text, (_, pictures)) in enumerate(zip(texts, asked, strict=True)):
        alone = policy.processor(text=[text], images=[pictures], return_tensors="pt")
        ids = policy.model.generate(**alone, do_sample=False, max_new_tokens=48)[0, alone["input_ids"].shape[1] :]
        assert found[3 * i : 3 * i + 3] == [ids.tolist()] * 3
        lengths.add(len(ids))
    assert len(lengths) > 1  # some end before others


def first_question(policies: Any, scenes: Any) -> tuple[Any, Any]:
    """Return the policy of ratings, and the processor's inputs for the first image."""
    policy = policies["imagereward"]
    prompt, pictures = scenes[0]
    text = policy.processor.apply_chat_template(
        messages(policy.template, prompt), add_generation_prompt=True, tokenize=False
    )
    inputs = policy.processor(text=[text], images=[list(pictures.values())[:1]], return_tensors="pt")
    return policy, inputs


def test_a_completion_ends_with_its_end_token_or_has_all_tokens(policies: Any, scenes: Any) -> None:
    policy, inputs = first_question(policies, scenes)
    torch.manual_seed(0)
    end = policy.tokenizer.eos_token_id
    completions, _ = sample_completions(policy.model, inputs, 40, Sampling(), 24, [end])
    found = [completion.ids for completion in completions]
    assert {len(ids) for ids in found if ids[-1] != end} <= {24}
    assert all(end not in ids[:-1] for ids in found)
    assert any(ids[-1] == end for ids in found) and len({tuple(ids) for ids in found}) > 1


def test_tokens_that_must_not_be_sampled_are_not(policies: Any, scenes: Any) -> None:
    policy, inputs = first_question(policies, scenes)
    sampled, _ = sample_completions(policy.model, inputs, 20, Sampling(), 1, [])
    (usual,) = {completion.ids[0] for completion in sampled}
    others, logprobs = sample_completions(policy.model, inputs, 20, Sampling(), 1, [], [usual])
    assert all(completion.ids != [usual] for completion in others)
    scored = Decoding(policy.model, inputs, 1).logits[0].log_softmax(-1)  # with that token, as TRL scores
    assert torch.allclose(torch.tensor(logprobs)[:, 0], scored[[completion.ids[0] for completion in others]], atol=1e-5)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=0.7), Sampling(top_k=2, top_p=0.9)])
def test_sampled_tokens_have_the_log_probabilities_of_a_teacher_forced_pass(
    policies: Any, scenes: Any, sampling: Sampling
) -> None:
    policy, inputs = first_question(policies, scenes)
    asked = inputs["input_ids"]
    ends = [policy.tokenizer.eos_token_id]
    completions, logprobs = sample_completions(policy.model, inputs, 6, sampling, 24, ends)
    found = [completion.ids for completion in completions]
    assert not any(completion.answer_logprobs or completion.text for completion in completions)
    assert [len(ids) for ids in found] == [len(values) for values in logprobs]
    for ids, values in zip(found, logprobs, strict=True):
        whole = dict(inputs) | {"input_ids": torch.cat([asked, torch.tensor([ids])], 1)}
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        text_tokens = torch.zeros(1, len(ids), dtype=inputs["mm_token_type_ids"].dtype)
        whole["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], text_tokens], 1)
        with torch.no_grad():
            logits = policy.model(**whole).logits[0, asked.shape[1] - 1 : -1].double() / (sampling.temperature or 1)
        scored = logits.log_softmax(-1)[range(len(ids)), ids]
        torch.testing.assert_close(torch.tensor(values, dtype=torch.double), scored, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("pieces", "position"),
    [
        (["<think>", "a", "</think>", "<answer>", "5", "</answer>"], 4),
        (["<think>a", "</think", "><", "answer", ">\n", " ", "\n", "no", "5"], 7),
        (["<answer>", "4", "</answer>", "<answer>", "5"], 1),  # the first tag holds the answer
        (["<answer>", " ", "\n"], 2),  # cut before the answer: the last chance for one
        (["<think>", "<answer>"], None),
        (["<answer>5", "</answer>"], None),  # no token follows the open tag
        (["<think>", "a", "<", "answer"], None),
    ],
)
def test_the_answer_is_read_before_its_first_token_that_is_no_white_space(
    pieces: list[str], position: int | None
) -> None:
    reader = AnswerReader(SimpleNamespace(decode=lambda ids: pieces[ids[0]]), [2, 0, 3], torch.device("cpu"))
    logits = torch.randn(len(pieces), 1, 5, generator=torch.Generator().manual_seed(0))
    completion = Completion()
    for token in range(len(pieces)):
        reader.read([completion], logits[token])
        completion.append(token, reader.piece_of(token))
    assert (completion.ids, completion.text) == (list(range(len(pieces))), "".join(pieces))
    assert completion.answer_position == position
    if position is None:
        assert completion.answer_logprobs == []
    else:
        expected = logits[position, 0, [2, 0, 3]].double().softmax(-1)
        assert torch.allclose(torch.tensor(completion.answer_logprobs).exp(), expected.float())


def test_reading_answers_leaves_what_is_sampled_as_it_was(policies: Any, scenes: Any) -> None:
    policy, inputs = first_question(policies, scenes)
    reader = AnswerReader(policy.tokenizer, policy.answer_token_ids, policy.model.device)
    found = []
    for chosen in (None, reader):
        torch.manual_seed(0)
        ends = [policy.tokenizer.eos_token_id]
        found.append(sample_completions(policy.model, inputs, 8, Sampling(), 32, ends, [], chosen))
    (plain, logprobs), (read, others) = found
    assert [completion.ids for completion in plain] == [completion.ids for completion in read] and logprobs == others
    assert not any(completion.answer_logprobs for completion in plain) and any(one.answer_logprobs for one in read)

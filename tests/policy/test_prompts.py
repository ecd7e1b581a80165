"""Prompts: the order of their parts, and that no prompt text can become a control token."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from workflow_scripts.configuration import Configuration
from workflow_scripts.policy.prompts import ANSWERS, messages, plain
from workflow_scripts.policy.tiny_qwen import SPECIAL_TOKENS, TAGS

TEMPLATES = {"imagereward": Configuration().prompts.pointwise, "hpsv2": Configuration().prompts.pairwise}


def test_parts_stand_in_the_order_of_the_template() -> None:
    (message,) = messages("one: {image} two: {image} prompt: {prompt}.", "a cat")
    assert message["role"] == "user"
    assert message["content"] == [
        {"type": "text", "text": "one: "},
        {"type": "image"},
        {"type": "text", "text": " two: "},
        {"type": "image"},
        {"type": "text", "text": " prompt: a cat."},
    ]


def test_a_template_may_begin_and_end_with_an_image() -> None:
    (message,) = messages("{image} {prompt} {image}", "a cat")
    assert [part["type"] for part in message["content"]] == ["image", "text", "image"]


def test_braces_in_a_prompt_are_only_text() -> None:
    for prompt in ("{image}", "{prompt}", "{0}", "{{", "}"):
        (message,) = messages("{image} {prompt}", prompt)
        assert [part["type"] for part in message["content"]] == ["image", "text"]
        assert message["content"][1]["text"] == f" {prompt}"


def test_harmless_text_is_left_alone() -> None:
    for text in ("two red circles on mint", "a < b > c", "3<4", "<3", "très «bien» – 赤い", "", "100 % <<>>"):
        assert plain(text) == text


@pytest.mark.parametrize(
    "text", [*SPECIAL_TOKENS, *TAGS, "<|im_start|>system\n", "<think", "<|", "<Answer>", "<<think>"]
)
def test_control_text_is_taken_apart(text: str) -> None:
    assert not any(token in plain(f"a {text} b") for token in (*SPECIAL_TOKENS, *TAGS))
    assert plain(text).replace("< ", "<") == text


SNIPPETS = st.sampled_from(
    [*SPECIAL_TOKENS, *TAGS, "<answer>7</answer>", "<", "|", ">", "/", " ", "think", "\n", "im_end"]
)
PROMPTS = st.lists(st.one_of(SNIPPETS, st.text(max_size=5)), max_size=10).map("".join)


def control_tokens(policy: Any, prompt: str) -> list[str]:
    """Special tokens and tags of the question with this prompt, in order, as the processor tokenises it."""
    chat = messages(policy.template, prompt)
    text = policy.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    pictures = [Image.new("RGB", (84, 84))] * sum(part["type"] == "image" for part in chat[0]["content"])
    ids = policy.processor(text=[text], images=pictures)["input_ids"][0]
    control = set(policy.tokenizer.convert_tokens_to_ids([*SPECIAL_TOKENS, *TAGS]))
    return policy.tokenizer.convert_ids_to_tokens([token for token in ids if token in control])


@pytest.mark.parametrize("track", ["imagereward", "hpsv2"])
@settings(deadline=None, max_examples=60)
@given(prompt=PROMPTS)
def test_no_prompt_becomes_a_special_token_or_a_tag(policies: dict[str, Any], track: str, prompt: str) -> None:
    policy = policies[track]
    tokens = control_tokens(policy, prompt)
    assert tokens == control_tokens(policy, "a cat")
    assert tokens.count("<|vision_start|>") == {"imagereward": 1, "hpsv2": 2}[track]


def test_control_tokens_would_be_seen(policies: dict[str, Any]) -> None:
    ids = policies["imagereward"].tokenizer("a<|im_end|><think>")["input_ids"]
    assert set(policies["imagereward"].tokenizer.convert_tokens_to_ids(["<|im_end|>", "<think>"])) <= set(ids)


@pytest.mark.parametrize("track", ["imagereward", "hpsv2"])
def test_text_stands_before_each_image_of_a_pair_and_the_answers_fit(policies: dict[str, Any], track: str) -> None:
    (message,) = messages(TEMPLATES[track], "a cat")
    images = [i for i, part in enumerate(message["content"]) if part["type"] == "image"]
    assert len(images) == {"imagereward": 1, "hpsv2": 2}[track]
    if track == "hpsv2":
        assert all(i > 0 and message["content"][i - 1]["text"].strip() for i in images)
    assert policies[track].answers == ANSWERS["pointwise" if track == "imagereward" else "pairwise"]

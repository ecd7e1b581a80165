"""The check that a chat template shows the question of the configuration, with each family's own template."""

import logging
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_families import FAMILIES
from transformers import AutoProcessor

from workflow_scripts.configuration.model import Prompts
from workflow_scripts.configuration.overlays import read_configuration
from workflow_scripts.configuration.stages import ModelConfig
from workflow_scripts.files.paths import ROOT
from workflow_scripts.policy.chat_template import check_chat_template
from workflow_scripts.policy.loading import load_policy
from workflow_scripts.policy.manifest import PolicyError
from workflow_scripts.policy.prompts import messages

BUNDLED = ROOT / "models/tiny-qwen2.5-vl"
PAPER = read_configuration([ROOT / "configs/paper.yaml"]).prompts
PAIRWISE = Prompts().pairwise
PLACES = "{% for p in m['content'] %}{% if p['type'] == 'image' %}<|image_pad|>{% else %}{{ p['text'] }}{% endif %}"
TURN = "{% for m in messages %}" + PLACES + "{% endfor %}{% endfor %}"
ANSWER = "{% if add_generation_prompt %}assistant:{% endif %}"
# A template as published with Qwen2.5-VL: a default system turn where the messages have none.
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@pytest.fixture
def processor() -> Any:
    """Return the bundled processor, for a test to give it another template."""
    return AutoProcessor.from_pretrained(BUNDLED)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompts", [Prompts(), PAPER], ids=["default", "paper"])
def test_what_passes_is_what_the_processor_takes(family: str, prompts: Prompts) -> None:
    """The processor itself counts the images of a text, and refuses other numbers."""
    _, processor = FAMILIES[family]()
    for key, images in (("pointwise", 1), ("pairwise", 2)):
        template = getattr(prompts, key)
        check_chat_template(processor, template, f"prompts.{key}")
        text = processor.apply_chat_template(messages(template, "a prompt"), add_generation_prompt=True, tokenize=False)
        shown = [Image.new("RGB", (84, 84))] * images
        assert len(processor(text=[text], images=[shown])["input_ids"]) == 1


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template that can show an image"),
        ("{{ messages[0]['content'] + 'x' }}", "has no chat template that can show an image"),
        ("{{ raise_exception('only text') }}", "has no chat template that can show an image .only text"),
        (TURN.replace("<|image_pad|>", "") + ANSWER, r"writes 0 of the processor's image token, <\|image_pad\|>, for"),
        (TURN.replace("<|image_pad|>", "<image>") + ANSWER, r"writes 0 of the processor's image token"),
        (TURN.replace("<|image_pad|>", "<|image_pad|>" * 2) + ANSWER, r"writes 4 .* for the 2 of prompts\.pairwise"),
        (TURN.replace("{{ p['text'] }}", "") + ANSWER, r"drops or changes the text 'one:' of prompts\.pairwise"),
        (TURN.replace("p['text']", "p['text'] | upper") + ANSWER, "drops or changes the text 'one:'"),
        (
            "{% for m in messages %}{% for p in m['content'] if p['type'] == 'image' %}<|image_pad|>{% endfor %}"
            "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}{% endfor %}" + ANSWER,
            r"does not show the images where prompts\.pairwise has them",
        ),
        (TURN + "assistant:", r"has no turn of the assistant that add_generation_prompt opens"),
        (TURN, r"has no turn of the assistant that add_generation_prompt opens"),
        (TURN + ANSWER.replace("assistant:", "assistant: <think>\n"), "opens the thought itself"),
    ],
)
def test_a_chat_template_that_shows_something_else_is_refused(
    processor: Any, template: str | None, message: str
) -> None:
    processor.chat_template = TURN + ANSWER
    check_chat_template(processor, PAIRWISE, "prompts.pairwise")
    processor.chat_template = template
    with pytest.raises(PolicyError, match=message) as error:
        check_chat_template(processor, PAIRWISE, "prompts.pairwise")
    assert str(error.value).startswith(f"{BUNDLED}/chat_template.jinja: ")
    assert str(error.value).endswith(
        "; correct chat_template.jinja in a copy of its folder, or choose another base policy"
    )


@pytest.mark.parametrize("special", ["<|im_end|>", "<|image_pad|>"])
def test_a_prompt_with_a_special_token_is_refused(processor: Any, special: str) -> None:
    with pytest.raises(PolicyError) as error:
        check_chat_template(processor, PAIRWISE + f" not {special}", "prompts.pairwise")
    assert f"prompts.pairwise holds {special}, a special token of {BUNDLED}; word it otherwise" in str(error.value)


def test_what_the_template_writes_around_the_question_is_logged(processor: Any, caplog: Any) -> None:
    processor.chat_template = SYSTEM + "user: " + TURN + "\n" + ANSWER
    with caplog.at_level(logging.INFO, logger="softpref"):
        for template in (Prompts().pointwise, PAIRWISE):
            check_chat_template(processor, template, "prompts.x")
    for line in caplog.messages:
        assert f"before prompts.x the chat template writes {SYSTEM + 'user: '!r}, after it 'assistant:'" in line
    assert len(caplog.messages) == 2


def test_the_template_is_checked_before_anything_is_generated(base_manifest: Path) -> None:
    config = ModelConfig.of(read_configuration(), "hpsv2")
    wrong = config.model_copy(update={"template": "<|im_end|>" + PAIRWISE})
    with pytest.raises(PolicyError, match=r"prompts\.pairwise holds <\|im_end\|>"):
        load_policy(base_manifest, None, wrong)

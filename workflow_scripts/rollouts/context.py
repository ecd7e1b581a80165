"""Which questions fit into the policy's context: the longest prompt of a data set is nobody's choice."""

from collections.abc import Iterable, Mapping
from functools import cache

from PIL import Image

from workflow_scripts.configuration.model import Sampling
from workflow_scripts.policy.loading import Policy
from workflow_scripts.policy.prompts import CLOSE_THINKING, OPEN_ANSWER, messages
from workflow_scripts.rollouts.items import Item


def too_long(
    policy: Policy, items: Iterable[Item], sizes: Mapping[str, tuple[int, int]], sampling: Sampling
) -> set[Item]:
    """Items whose question and longest completion are more tokens than the policy has positions.

    Args:
        policy: its processor counts the tokens, its model has the positions.
        items: questions.
        sizes: width and height in pixels of each image.
        sampling: budgets of thinking and answer.
    """
    processor, tokenizer = policy.processor, policy.tokenizer
    closing = len(tokenizer.encode(CLOSE_THINKING + OPEN_ANSWER, add_special_tokens=False))
    completion = sampling.max_thinking_tokens + closing + sampling.max_answer_tokens
    room = policy.model.config.get_text_config().max_position_embeddings - completion
    alone = processor.apply_chat_template(messages("{image}", ""), tokenize=False)

    @cache  # images of a data set have few sizes
    def visual(size: tuple[int, int]) -> int:
        """Tokens that an image of this width and height adds to the one that stands for it in the text."""
        shown = processor(text=[alone], images=[[Image.new("RGB", size)]])["input_ids"][0]
        return len(shown) - len(tokenizer(alone, add_special_tokens=False)["input_ids"])

    words: dict[str, int] = {}  # tokens of the question with one for each image, by prompt text
    found = set()
    for item in items:
        if item.prompt not in words:
            chat = messages(policy.template, item.prompt)
            question = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            words[item.prompt] = len(tokenizer(question, add_special_tokens=False)["input_ids"])
        if words[item.prompt] + sum(visual(sizes[name]) for name in item.image_ids) > room:
            found.add(item)
    return found

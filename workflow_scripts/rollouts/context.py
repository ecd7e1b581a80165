"""Questions that exceed the policy's context: a data set may hold prompts of any length."""

from collections.abc import Callable, Iterable, Mapping
from functools import cache

from PIL import Image

from workflow_scripts.configuration.model import Sampling
from workflow_scripts.policy.loading import Policy
from workflow_scripts.policy.prompts import CLOSE_THINKING, OPEN_ANSWER, messages
from workflow_scripts.rollouts.items import Item


def within_context(
    policy: Policy,
    items: list[Item],
    sizes: Mapping[str, tuple[int, int]],
    sampling: Sampling,
    warn: Callable[[str], None],
    called: str = "questions",
) -> list[Item]:
    """Items that are not `too_long`; a warning counts the others, under the name `called`."""
    long = too_long(policy, items, sizes, sampling)
    if long:
        warn(
            f"{len(long)} of {len(items)} {called} are longer than the policy's context and are left out, such as "
            f"{min(item.prompt_id for item in long)}"
        )
    return [item for item in items if item not in long]


def too_long(
    policy: Policy, items: Iterable[Item], sizes: Mapping[str, tuple[int, int]], sampling: Sampling
) -> set[Item]:
    """Items whose question and longest completion need more tokens than the policy has positions.

    Args:
        policy: its processor counts the tokens; its model has the positions.
        items: questions.
        sizes: width and height of each image in pixels.
        sampling: token budgets of thinking and answer.
    """
    processor, tokenizer = policy.processor, policy.tokenizer
    closing = len(tokenizer.encode(CLOSE_THINKING + OPEN_ANSWER, add_special_tokens=False))
    completion = sampling.max_thinking_tokens + closing + sampling.max_answer_tokens
    room = policy.model.config.get_text_config().max_position_embeddings - completion
    placeholder = processor.apply_chat_template(messages("{image}", ""), tokenize=False)
    placeholder_tokens = len(tokenizer(placeholder, add_special_tokens=False)["input_ids"])

    @cache  # the images of a data set have few sizes
    def added_by(size: tuple[int, int]) -> int:
        """Tokens that an image of this width and height adds to its placeholder token."""
        shown = processor(text=[placeholder], images=[[Image.new("RGB", size)]])["input_ids"][0]
        return len(shown) - placeholder_tokens

    @cache
    def question_tokens(prompt: str) -> int:
        """Tokens of the question, with one placeholder token for each image."""
        chat = messages(policy.template, prompt)
        question = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return len(tokenizer(question, add_special_tokens=False)["input_ids"])

    return {
        item
        for item in items
        if question_tokens(item.prompt) + sum(added_by(sizes[name]) for name in item.image_ids) > room
    }

"""Which questions fit into the policy's context: the longest prompt of a data set is nobody's choice."""

from collections.abc import Iterable, Mapping

from workflow_scripts.configuration import Sampling
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
    image_processor = processor.image_processor
    words: dict[str, int] = {}  # tokens of the question with one for each image, by prompt text
    found = set()
    for item in items:
        if item.prompt not in words:
            chat = messages(policy.template, item.prompt)
            question = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            words[item.prompt] = len(tokenizer(question, add_special_tokens=False)["input_ids"])
        patches = [image_processor.get_number_of_image_patches(*sizes[name][::-1]) for name in item.image_ids]
        visual = sum(patches) // image_processor.merge_size**2
        if words[item.prompt] - len(patches) + visual > room:
            found.add(item)
    return found

"""Whether the chat template of a model shows a question as the configuration words it: texts, images, places."""

import logging
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from workflow_scripts.policy.manifest import PolicyError
from workflow_scripts.policy.prompts import OPEN_THINKING, messages

log = logging.getLogger("softpref")

PROMPT = "a prompt"


def check_chat_template(processor: Any, template: str, key: str) -> None:
    """Check that the chat template shows the question with its images, then asks for an answer, and nothing else.

    What it writes around the question, a default system turn for example, is logged.

    Args:
        processor: of the model, with tokenizer and chat template.
        template: the question, with `{prompt}` and one `{image}` per image.
        key: of the template in the configuration, for messages.

    Raises:
        PolicyError: there is no chat template for images; it changes or drops a text, drops or moves an image, or
            shows it by another token than the processor's; it does not open the answer, or opens the thought that the
            model has to generate; or the tokenizer reads a special token in a text.
    """
    file = template_file(processor)
    remedy = f"correct {file.name} in a copy of its folder, or choose another base policy"
    chat = messages(template, PROMPT)
    try:
        without, shown = (
            processor.apply_chat_template(chat, add_generation_prompt=add, tokenize=False) for add in (False, True)
        )
    except (ValueError, TypeError, TemplateError) as error:
        raise PolicyError(
            f"{file}: the base policy has no chat template that can show an image ({error}); {remedy}"
        ) from error

    def refuse(problem: str) -> PolicyError:
        return PolicyError(f"{file}: the chat template {problem}; it writes {shown!r}; {remedy}")

    texts = [text.replace("{prompt}", PROMPT).strip() for text in template.split("{image}")]  # some templates strip it
    check_special_tokens(processor.tokenizer, texts, key)
    token, images = processor.image_token, len(texts) - 1
    if shown.count(token) != images:
        raise refuse(f"writes {shown.count(token)} of the processor's image token, {token}, for the {images} of {key}")
    for text in texts:
        if text not in shown:
            raise refuse(f"drops or changes the text {text!r} of {key}")
    # Every image token stands between its own two texts.
    place = 0
    for number, text in enumerate(texts):
        start = shown.find(text, place if number == 0 else shown.find(token, place) + len(token))
        if start < 0 or shown.count(token, 0, start) != number:
            raise refuse(f"does not show the images where {key} has them")
        if number == 0:
            before = shown[: start if text else shown.find(token)]
        place = start + len(text)
    after = shown[place:]
    if not shown.startswith(without) or shown == without:
        raise refuse(f"has no turn of the assistant that add_generation_prompt opens after {key}")
    if OPEN_THINKING in after:
        raise refuse(f"opens the thought itself ({after!r}) after {key}")
    log.info("%s: before %s the chat template writes %r, after it %r", file, key, before, after)


def check_special_tokens(tokenizer: Any, texts: list[str], key: str) -> None:
    """Check that the tokenizer reads the texts of a question as words.

    Raises:
        PolicyError: a text holds a special token, such as one that ends a turn or stands for an image.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    for text in texts:
        if found := sorted(name for name in special if name in text):
            raise PolicyError(f"{key} holds {found[0]}, a special token of {tokenizer.name_or_path}; word it otherwise")


def template_file(processor: Any) -> Path:
    """File of a model folder with the chat template."""
    folder = Path(processor.tokenizer.name_or_path)
    files = [folder / name for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")]
    return next((file for file in files if file.is_file()), files[0])

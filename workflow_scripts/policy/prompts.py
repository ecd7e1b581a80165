"""The question put to the policy, and the parsing of its answer.

A template is plain text with `{prompt}` and one `{image}` per image, in the order in which the images are shown. The
answer has the form `<think>…</think><answer>N</answer>`, as in DeepSeek-R1 (paper §4, formatting reward).
"""

import re
from typing import Any

RATINGS = (1, 2, 3, 4, 5, 6, 7)
PREFERENCES = (0, 1)  # 1: the second image shown is preferred
ANSWERS = {"pointwise": RATINGS, "pairwise": PREFERENCES}

OPEN_THINKING = "<think>"
CLOSE_THINKING = "</think>"
OPEN_ANSWER = "<answer>"

_FORMAT = re.compile(r"<think>(?P<thinking>.+?)</think>\s*<answer>\s*(?P<answer>\S+?)\s*</answer>", re.DOTALL)
_ANSWER = re.compile(r"\s*(\S+?)\s*</answer>")
_TAG = re.compile(r"</?(?:think|answer)>")
_CONTROL = re.compile(r"<(?=[|/A-Za-z])")


def plain(text: str) -> str:
    """Break up special tokens and answer tags in a prompt text: "<think>" becomes "< think>"."""
    return _CONTROL.sub("< ", text)


def messages(template: str, prompt: str) -> list[dict[str, Any]]:
    """One user turn in chat format, with an image part for each `{image}` of the template."""
    parts: list[dict[str, Any]] = []
    for index, text in enumerate(template.split("{image}")):
        if index:
            parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text.replace("{prompt}", plain(prompt))})
    return [{"role": "user", "content": parts}]


def well_formed(completion: str, answers: tuple[int, ...]) -> bool:
    """Whether the completion is exactly one thought and one valid answer, each in its tags, and nothing else."""
    match = _FORMAT.fullmatch(completion.strip())
    return match is not None and not _TAG.search(match["thinking"]) and match["answer"] in map(str, answers)


def sampled_answer(completion: str, answers: tuple[int, ...]) -> int | None:
    """The answer in the first answer tag; None if there is no such tag or no valid answer in it."""
    match = _ANSWER.match(completion.partition(OPEN_ANSWER)[2])
    return int(match[1]) if match and match[1] in map(str, answers) else None

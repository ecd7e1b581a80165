"""A completion in the making, a rollout, which is one of an item, and the row that records it."""

from dataclasses import dataclass, field
from typing import Any

from workflow_scripts.policy.prompts import CLOSE_THINKING, OPEN_ANSWER, sampled_answer
from workflow_scripts.rollouts.items import Item


@dataclass(kw_only=True)
class Completion:
    """Tokens that a policy generates. It thinks until `<answer>` opens the answer."""

    ids: list[int] = field(default_factory=list)  # tokens so far
    text: str = ""  # the tokens, decoded one by one
    answer_start: int | None = None  # number of tokens up to and including `<answer>`; None while it thinks
    answering: bool = False  # the next token that is not white space is the answer
    answer_position: int | None = None  # index of the token whose logits are recorded
    answer_logprobs: list[float] = field(default_factory=list)  # of each answer there, renormalised over the answers

    @property
    def opens_answer(self) -> bool:
        """Whether the text ends with `<answer>`, white space aside."""
        return self.text.rstrip().endswith(OPEN_ANSWER)

    def append(self, token: int, piece: str) -> None:
        """Append a token, which `piece` is the text of; it may open the answer, or be the answer."""
        self.ids.append(token)
        self.text += piece
        if self.answer_start is None:
            if self.opens_answer:
                self.answer_start, self.answering = len(self.ids), True
        elif piece.strip():
            self.answering = False


@dataclass
class Rollout(Completion):
    """One completion of an item. The engine opens its answer if it has to."""

    item: Item
    k: int  # index among the rollouts of the item
    seed: int  # of the random generator that draws the tokens
    forced: bool = False  # the engine closed the thinking

    def forced_tokens(self, tokenizer: Any) -> list[int]:
        """Mark the rollout as forced; return the tokens that open its answer."""
        self.forced = True
        tags = OPEN_ANSWER if CLOSE_THINKING in self.text else CLOSE_THINKING + OPEN_ANSWER
        return list(tokenizer.encode(tags, add_special_tokens=False))

    def row(self, tokenizer: Any, answers: tuple[int, ...]) -> dict[str, Any]:
        """Row of `rollouts.record.ROLLOUT`."""
        text = tokenizer.decode(self.ids, skip_special_tokens=False)
        return self.item.columns() | {
            "k": self.k,
            "seed": self.seed,
            "completion_ids": self.ids,
            "text": text,
            "answer_position": self.answer_position,
            "forced": self.forced,
            "sampled_answer": sampled_answer(text, answers),
            "answer_logprobs": self.answer_logprobs,
        }

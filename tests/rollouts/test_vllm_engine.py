"""What the vLLM engine makes of vLLM's completions, with scripted ones; vLLM itself: tests/external."""

import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from workflow_scripts.configuration.model import Configuration, RolloutsVllm, Sampling
from workflow_scripts.configuration.stages import ModelConfig
from workflow_scripts.policy.loading import Policy
from workflow_scripts.policy.manifest import PolicyError
from workflow_scripts.preferences.images import in_memory
from workflow_scripts.rollouts.items import Item
from workflow_scripts.rollouts.vllm_engine import VllmModel, generate, load_into_vllm

PIECES = ["<end>", "question", "<think>", "a", "b", "</think>", "<", "answer", ">", ">b", " ", "1", "2", "</answer>"]
END, QUESTION = 0, 1
OPEN = [6, 7, 8]  # <answer>, as Qwen's tokenizer has it
ITEM = Item("p", "a cat", ("i",), "i")


class Tokenizer:
    """Of the pieces above."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(PIECES[token] for token in ids)

    def encode(self, text: str, **_: Any) -> list[int]:
        return {"<answer>": OPEN, "</think><answer>": [5, *OPEN]}[text]

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[QUESTION] for _ in texts]}


class Script:
    """Stands in for vLLM: says the next token of a script by what it has so far, and stops as vLLM does."""

    def __init__(self, script: dict[tuple[int, ...], int]) -> None:
        self.script = script
        self.requests: list[tuple[Any, Any]] = []

    def generate(self, requests: list[Any], params: list[Any], **_: Any) -> list[Any]:
        self.requests += zip(requests, params, strict=True)
        return [SimpleNamespace(outputs=[self.complete(*each)]) for each in zip(requests, params, strict=True)]

    def complete(self, request: Any, params: Any) -> Any:
        so_far = request["prompt_token_ids"][1:]
        new: list[int] = []
        logprobs = []
        stop = getattr(params, "stop", [])
        while len(new) < params.max_tokens:
            # The reported log-probabilities say where they are from: the answer 1 gets one tenth for each token before.
            tenths = len(so_far + new) / 100
            wanted = getattr(params, "logprob_token_ids", [])
            logprobs.append(
                {t: SimpleNamespace(logprob=math.log(p)) for t, p in zip(wanted, (tenths, 0.5 - tenths), strict=False)}
            )
            new.append(self.script[tuple(so_far + new)])
            text = "".join(PIECES[token] for token in new)
            if new[-1] in params.stop_token_ids or any(word in text for word in stop):
                break
        return SimpleNamespace(token_ids=new, logprobs=logprobs)


def says(*completions: list[int]) -> dict[tuple[int, ...], int]:
    """The script of these completions; where they differ behind the same tokens, of the first."""
    return {tuple(ids[:n]): ids[n] for ids in reversed(completions) for n in range(len(ids))}


@pytest.fixture
def rollout(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that gives the one rollout of a script."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))

    def run(script: dict[tuple[int, ...], int], **options: Any) -> dict[str, Any]:
        llm = Script(script)
        model: Any = VllmModel(llm, None, {END}, None)  # type: ignore[arg-type]
        chat = SimpleNamespace(tokenizer=Tokenizer(), apply_chat_template=lambda chats, **_: ["question"] * len(chats))
        policy = Policy(model, chat, "{image} {prompt}", (1, 2), [11, 12])  # type: ignore[arg-type]
        sampling = Sampling(**({"max_thinking_tokens": 8, "max_answer_tokens": 3} | options))
        images = in_memory({"i": Image.new("RGB", (28, 28))})
        (row,) = generate(policy, [ITEM], images, rollouts=1, first_k=5, sampling=sampling, batch_items=4, seed="s")
        return row | {"requests": llm.requests}

    return run


def test_a_thought_with_its_answer(rollout: Any) -> None:
    row = rollout(says([2, 3, 5, *OPEN, 11, 13, END]))
    assert row["completion_ids"] == [2, 3, 5, *OPEN, 11, 13]
    assert row["text"] == "<think>a</think><answer>1</answer>"
    assert (row["answer_position"], row["forced"], row["sampled_answer"], row["k"]) == (6, False, 1, 5)
    assert list(map(math.exp, row["answer_logprobs"])) == pytest.approx([0.06 / 0.5, 0.44 / 0.5])


@pytest.mark.parametrize(
    ("thought", "closed"),
    [
        ([2, 3, END], [2, 3, 5, *OPEN]),
        ([2, 5, END], [2, 5, *OPEN]),
        ([2, *[3] * 7], [2, *[3] * 7, 5, *OPEN]),
        ([2, 5, *[3] * 6], [2, 5, *[3] * 6, *OPEN]),
    ],
    ids=["ended", "ended, closed", "budget", "budget, closed"],
)
def test_the_engine_opens_the_answer(rollout: Any, thought: list[int], closed: list[int]) -> None:
    row = rollout(says(thought, [*closed, 12, 13, END]))
    assert row["completion_ids"] == [*closed, 12, 13]
    assert (row["answer_position"], row["forced"], row["sampled_answer"]) == (len(closed), True, 2)


def test_an_answer_opened_with_the_last_token_of_the_budget_is_not_forced(rollout: Any) -> None:
    thought = [2, 3, 3, 3, 5, *OPEN]
    row = rollout(says([*thought, 11, 13, END]))
    assert (row["answer_position"], row["forced"]) == (8, False)


def test_a_tag_inside_a_longer_token_opens_nothing(rollout: Any) -> None:
    row = rollout(says([2, 6, 7, 9, 5, *OPEN, 12, 13, END]))
    assert row["completion_ids"] == [2, 6, 7, 9, 5, *OPEN, 12, 13]
    assert (row["answer_position"], row["forced"]) == (8, False)
    assert [params.max_tokens for _, params in row["requests"]] == [8, 4, 3]


def test_white_space_before_the_answer_is_passed_over(rollout: Any) -> None:
    row = rollout(says([2, 5, *OPEN, 10, 11, 13]))
    assert row["completion_ids"] == [2, 5, *OPEN, 10, 11, 13]
    assert (row["answer_position"], row["sampled_answer"]) == (6, 1)
    assert math.exp(row["answer_logprobs"][0]) == pytest.approx(0.06 / 0.5)


@pytest.mark.parametrize(("answer", "position"), [([END], 5), ([10, END], 6), ([10, 10, 10], 7), ([3, 3, END], 5)])
def test_no_answer_is_no_valid_one(rollout: Any, answer: list[int], position: int) -> None:
    row = rollout(says([2, 5, *OPEN, *answer]))
    assert row["completion_ids"] == [2, 5, *OPEN, *(token for token in answer if token != END)]
    assert (row["answer_position"], row["sampled_answer"], row["forced"]) == (position, None, False)


def test_vllm_is_asked_for_what_is_configured(rollout: Any) -> None:
    row = rollout(says([2, 5, *OPEN, 11, 13, END]), temperature=0.5, top_p=0.9, top_k=7)
    (question, thinking), (continued, answering) = row["requests"]
    for params in (thinking, answering):
        assert (params.temperature, params.top_p, params.top_k) == (0.5, 0.9, 7)
        assert params.stop_token_ids == [END] and not params.skip_special_tokens
    assert thinking.stop == ["<answer>"] and not hasattr(thinking, "logprob_token_ids")
    assert answering.logprob_token_ids == [11, 12] and not hasattr(answering, "stop")
    assert thinking.seed != answering.seed and 0 <= min(thinking.seed, answering.seed, row["seed"]) < 2**63
    assert continued["prompt_token_ids"] == [*question["prompt_token_ids"], 2, 5, *OPEN]
    assert continued["multi_modal_data"] is question["multi_modal_data"]


def test_an_environment_without_vllm_says_what_to_do(base_manifest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(PolicyError, match=r"vLLM cannot be imported here .*set vllm_python .*docs/vllm\.md"):
        load_into_vllm(base_manifest, None, ModelConfig.of(Configuration(), "hpsv2"), RolloutsVllm())

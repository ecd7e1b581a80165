"""What the trainer logs about its sampled tokens and its rewards, in real steps of TRL."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from workflow_scripts.configuration.model import Track, load
from workflow_scripts.configuration.stages import TrainGrpo
from workflow_scripts.policy.fast.enable import enable_faster_passes
from workflow_scripts.policy.loading import as_policy, load_model, load_processor
from workflow_scripts.preferences.images import in_memory
from workflow_scripts.rollouts.items import anchor_items, pointwise_items
from workflow_scripts.training.assembly import grpo_trainer
from workflow_scripts.training.generation import engine_completions
from workflow_scripts.training.items import trl_dataset
from workflow_scripts.training.rewards import REWARDS
from workflow_scripts.training.sampling import as_in_training
from workflow_scripts.training.settings import grpo_config, lora_config
from workflow_scripts.training.trainer import ValidatingTrainer
from workflow_scripts.training.validation import Validation

GROUP, TOKENS, STEPS = 4, 8, 2  # the bundled policy thinks for longer than that
Output = dict[str, Any]


@pytest.fixture
def trained(base_manifest: Path, scenes: Any, tmp_path: Path) -> Callable[..., tuple[list[Output], Any]]:
    """Return a function that trains with changed outputs of the generator, and returns the log and the adapter."""
    images = {name: picture for _, pictures in scenes for name, picture in pictures.items()}
    rows = [{"prompt_id": f"p{i}", "prompt": text, "image_ids": list(shown)} for i, (text, shown) in enumerate(scenes)]
    items = [(item, 1 + i % 7) for i, item in enumerate(pointwise_items(rows, set(images)))]

    def train(change: Callable[[Output], Output], dtype: str = "float32", **keys: Any) -> tuple[list[Output], Any]:
        keys |= {"steps": STEPS, "group_size": GROUP, "prompts_per_step": 2, "warmup_steps": 0, "validate_every": STEPS}
        keys = {"max_completion_tokens": TOKENS, "temperature": 2} | keys  # hot, so that completions differ
        keys |= {"reward_signal": "sampled", "scale_rewards": "group", "importance_sampling_level": "sequence"}
        config = TrainGrpo.of(load({"policy": {"dtype": dtype}, "training": {"imagereward": keys}}), "imagereward", 0)
        processor, model = load_processor(base_manifest, config.model), load_model(base_manifest, config.model)
        enable_faster_passes(model, processor)
        generate = engine_completions(config, processor, as_in_training(config.training.temperature, TOKENS))
        settings = grpo_config(config, tmp_path / "checkpoints", resumed=True)
        settings.reward_weights = None
        dataset = trl_dataset(items, in_memory(images), config.model.template, 2)
        trainer = ValidatingTrainer(
            model=model,
            processing_class=processor,
            reward_funcs=[lambda completion_ids, **_: [float(sum(ids) % 5) for ids in completion_ids]],
            args=settings,
            train_dataset=dataset,
            eval_dataset=dataset.select([0]),
            peft_config=lora_config(config.training.lora),
            rollout_func=lambda prompts, trainer: change(generate(prompts, trainer)),
            validate=lambda model, untrained: ({"eval_soft_pair_accuracy": 0.0}, [[1.0, 2.0]]),
            answer_of={},
        )
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "reward" in entry]
        return log, {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}

    return train


def differences(log: list[Output]) -> list[tuple[float, float]]:
    """The logged mean and maximum of each step."""
    name = "sampling/sampling_logp_difference"
    return [(step[f"{name}/mean"], step[f"{name}/max"]) for step in log]


@pytest.mark.parametrize("keys", [{"gradient_accumulation": 2}, {"num_iterations": 2}])
def test_sampled_and_scored_tokens_are_compared_without_changing_the_training(
    trained: Callable[..., Any], keys: dict[str, Any]
) -> None:
    def shifted(output: Output) -> Output:
        """Other by 0.25, and by 2 more in the third token of the last completion."""
        logprobs = [[value + 0.25 for value in values] for values in output["logprobs"]]
        logprobs[-1][2] += 2
        return output | {"logprobs": logprobs}

    log, adapter = trained(shifted, **keys)
    assert all(step["completions/min_length"] == TOKENS for step in log)
    for mean, largest in differences(log):
        assert mean == pytest.approx(0.25 + 2 / (2 * GROUP * TOKENS), abs=1e-5)
        assert largest == pytest.approx(2.25, abs=1e-4)
    without, plain = trained(lambda output: output | {"logprobs": None}, **keys)
    assert all("sampling" not in name for step in without for name in step)
    assert [step["loss"] for step in log] == [step["loss"] for step in without]
    assert any(weight.abs().max() > 0 for name, weight in adapter.items() if "lora_B" in name)
    for name, weight in adapter.items():
        assert torch.equal(weight, plain[name])


def test_in_bfloat16_they_differ_by_rounding(trained: Callable[..., Any]) -> None:
    log, _ = trained(lambda output: output, dtype="bfloat16")
    assert all(1e-5 < mean < 0.02 for mean, _ in differences(log))


class Rewarded(ValidatingTrainer):
    """A trainer that keeps what it rewards, p(answer) in each completion by a plain pass, and the advantages."""

    answer_ids: list[int]
    kept: list[list[tuple[int, str, list[float]]]]
    credited: list[tuple[list[list[int]], list[list[float]]]]

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        """Keep tokens and advantages of the completions of a step, without padding."""
        outputs = super()._generate_and_score_completions(inputs)
        masks = outputs["completion_mask"].bool()
        parts = [
            [values[mask].tolist() for values, mask in zip(outputs[name], masks, strict=True)]
            for name in ("completion_ids", "advantages")
        ]
        self.credited.append((parts[0], parts[1]))
        return outputs

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        """Keep target, text and p(answer) of the completions of a step."""
        texts = [completion[0]["content"] for completion in completions]
        probabilities = [
            self.answer_probabilities(row["prompt"], row["images"], ids)
            for row, ids in zip(inputs, completion_ids_list, strict=True)
        ]
        self.kept.append(list(zip([row["target"] for row in inputs], texts, probabilities, strict=True)))
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    @torch.no_grad()
    def answer_probabilities(self, chat: Any, images: Any, ids: list[int]) -> list[float]:
        """Softmax over the answers' logits after the completion's `<answer>`, a token; 0 if none follows it."""
        processor: Any = self.processing_class
        opening = processor.tokenizer.convert_tokens_to_ids("<answer>")
        if opening not in ids[:-1]:
            return [0.0] * len(self.answer_ids)
        text = processor.apply_chat_template([chat], add_generation_prompt=True, tokenize=False)
        inputs = processor(text=text, images=[images], return_tensors="pt")
        before = torch.tensor([ids[: ids.index(opening) + 1]])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], before], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        kinds = torch.zeros_like(before, dtype=inputs["mm_token_type_ids"].dtype)
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], kinds], 1)
        model: Any = self.model
        model.eval()
        logits = model(**inputs).logits[0, -1, self.answer_ids]
        model.train()
        return list(logits.double().softmax(-1).tolist())


@pytest.mark.parametrize("track", ["imagereward", "hpsv2"])
def test_expected_rewards_reach_trl_and_credit_thought_and_answer(
    base_manifest: Path, scenes: Any, tmp_path: Path, track: Track
) -> None:
    """In hot rollouts of 30 tokens, some of which end before their answer; the second step has an adapter.

    Every token has the reward's difference to the mean of its group. The first token after `<answer>` has its own part:
    what its answer earns, less a baseline that makes the part's mean over the answers' probabilities, weighted by the
    squared norm of the score function, 0.
    """
    images = {name: picture for _, pictures in scenes for name, picture in pictures.items()}
    rows = [{"prompt_id": f"p{i}", "prompt": text, "image_ids": list(shown)} for i, (text, shown) in enumerate(scenes)]
    rated = [(item, 1 + i % 7) for i, item in enumerate(pointwise_items(rows, set(images)))]
    compared = [(item, i % 2) for i, item in enumerate(anchor_items(rows, set(images), 0, False))]
    names = ["exact", "approximate"] if track == "imagereward" else ["exact"]
    keys: dict[str, Any] = {"steps": STEPS, "group_size": GROUP, "prompts_per_step": 4, "gradient_accumulation": 2}
    keys |= {"rewards": {"format": 0.1} | dict.fromkeys(names, 1.0)}
    keys |= {"warmup_steps": 0, "validate_every": STEPS, "max_completion_tokens": 30, "temperature": 1.5}
    config = TrainGrpo.of(load({"training": {track: keys}}), track, 0)
    processor, model = load_processor(base_manifest, config.model), load_model(base_manifest, config.model)
    policy, unused = as_policy(model, processor, config.model), Any
    validation = Validation(config, policy, unused, [], as_in_training(1.5, 30), 0)  # type: ignore[arg-type]
    settings = grpo_config(config, tmp_path / "checkpoints", resumed=True)
    items = rated if track == "imagereward" else compared
    trainer = grpo_trainer(Rewarded, settings, items, in_memory(images), validation)
    trainer.answer_ids, trainer.kept, trainer.credited = policy.answer_token_ids, [], []
    trainer.validate = lambda model, untrained: ({"eval_soft_pair_accuracy": 0.0}, [[1.0, 2.0]])
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(logged) == len(trainer.kept) == len(trainer.credited) == STEPS
    credit = {"exact": [1.0], "approximate": [1, 0.75, 0.5]}
    opening = policy.tokenizer.convert_tokens_to_ids("<answer>")
    answer_of = dict(zip(policy.answer_token_ids, policy.answers, strict=True))
    valid = 0

    def earned(name: str, answer: int | None, target: int) -> float:
        return 0.0 if answer is None else dict(enumerate(credit[name])).get(abs(answer - target), 0.0)

    for entry, kept, (completions, advantages) in zip(logged, trainer.kept, trainer.credited, strict=True):
        assert len(kept) == 4 * GROUP and 0 < sum(any(p) for _, _, p in kept) < len(kept)
        rewards = torch.tensor([0.1 * REWARDS["format"](text, 0, policy.answers) for _, text, _ in kept])
        assert entry["rewards/format/mean"] == pytest.approx(10 * rewards.mean().item())
        for name in names:
            each = [
                sum(q * earned(name, a, target) for a, q in zip(policy.answers, p, strict=True))
                for target, _, p in kept
            ]
            rewards += torch.tensor(each)
            assert entry[f"rewards/{name}/mean"] == pytest.approx(sum(each) / len(each), abs=1e-5), name
        shared = (rewards.view(-1, GROUP) - rewards.view(-1, GROUP).mean(1, keepdim=True)).flatten()
        for (target, _, p), ids, found, of_all in zip(kept, completions, advantages, shared.tolist(), strict=True):
            place = ids.index(opening) + 1 if opening in ids[:-1] else None
            assert [x for i, x in enumerate(found) if i != place] == pytest.approx(
                [of_all] * (len(ids) - bool(place)), abs=1e-4
            )
            if place is not None:
                pay = [sum(earned(name, a, target) for name in names) for a in policy.answers]
                weights = [q * (1 - 2 * q + sum(other**2 for other in p)) for q in p]
                baseline = sum(w * r for w, r in zip(weights, pay, strict=True)) / sum(weights)
                sampled = answer_of.get(ids[place])
                valid += sampled is not None
                own = (0.0 if sampled is None else pay[policy.answers.index(sampled)]) - baseline
                assert found[place] == pytest.approx(of_all + own, abs=2e-3)
    assert valid > 2

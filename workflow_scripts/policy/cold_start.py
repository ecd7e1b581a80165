"""Cold start of the tiny policy: supervised reasoning traces teach it both tracks from scratch.

The teacher describes each image correctly but judges by its own taste, as a general vision-language model does that has
not seen human preferences. It weighs picture quality far above faithfulness to the prompt, favours the second of two
images, rates with noise and sometimes forgets a tag. GRPO has to close this gap.
"""

import io
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from workflow_scripts.configuration.model import ColdStart
from workflow_scripts.policy.prompts import messages
from workflow_scripts.preferences.synthetic_scenes import QUALITIES, Scene, Taste, draw, sample_prompt, sample_scene

TEACHER = Taste(count=0.25, colour=0.3, shape=0.25, blurry=0.9, noisy=1.2, faded=1.6)
TEACHER_NOISE = 1.0  # standard deviation of the teacher's judgement, in units of utility
TEACHER_SECOND_BIAS = 0.4  # utility that the second of two images gains by its position
MALFORMED = 0.1  # share of traces that lack a tag
CAPTION_TEMPLATE = "{image} describe the image."
IMAGES_PER_PROMPT = 4


@dataclass(frozen=True)
class Example:
    """One supervised example: the prompt as chat messages, its images, and the completion to learn."""

    messages: list
    images: list[Image.Image]
    completion: str


def rating(utility: float) -> int:
    """Map a utility between -3.5 and 0 to a rating from 1 to 7."""
    return min(max(round(7 + 1.9 * utility), 1), 7)


def _trace(thinking: str, answer: int, rng: random.Random) -> str:
    completion = f"<think>{thinking}</think><answer>{answer}</answer>"
    if rng.random() < MALFORMED:
        return completion.replace(rng.choice(["</think>", "</answer>"]), "")
    return completion


def caption_example(scenes: list[Scene], template: str, rng: random.Random) -> Example:
    """Describe one image."""
    return Example(messages(CAPTION_TEMPLATE, ""), [published(scenes[0], rng)], scenes[0].caption)


def rating_example(scenes: list[Scene], template: str, rng: random.Random) -> Example:
    """Rate one image 1..7 by the teacher's taste."""
    scene = scenes[0]
    answer = rating(TEACHER.utility(scene) + rng.gauss(0, TEACHER_NOISE))
    completion = _trace(f"i see {scene.caption} {scene.verdict}", answer, rng)
    return Example(messages(template, scene.prompt), [published(scene, rng)], completion)


def pair_example(scenes: list[Scene], template: str, rng: random.Random) -> Example:
    """Say which of two images the teacher prefers: 1 for the second."""
    one, two = scenes[:2]
    margin = TEACHER.utility(two) + TEACHER_SECOND_BIAS - TEACHER.utility(one)
    answer = int(margin + rng.gauss(0, TEACHER_NOISE * 2**0.5) > 0)
    thinking = f"one: {one.caption} {one.verdict} two: {two.caption} {two.verdict}"
    return Example(
        messages(template, one.prompt), [published(s, rng) for s in (one, two)], _trace(thinking, answer, rng)
    )


def published(scene: Scene, rng: random.Random) -> Image.Image:
    """The image as a reader decodes it: unchanged (lossless WebP) or after JPEG, with equal probability."""
    image = draw(scene)
    if rng.random() < 0.5:
        return image
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return Image.open(buffer)


def scenes_of_prompt(rng: random.Random) -> list[Scene]:
    """Sample the images of one prompt from the world's training prompts."""
    asked, background = sample_prompt(rng, test=False)
    return [sample_scene(rng, asked, background) for _ in range(IMAGES_PER_PROMPT)]


def corpus(templates: dict[str, str], prompts: int) -> Iterator[str]:
    """Texts to train the tokenizer on, without tags."""
    rng = random.Random("tokenizer")
    for _ in range(prompts):
        scenes = scenes_of_prompt(rng)
        for scene in scenes:
            yield scene.caption.replace(scene.quality, rng.choice(QUALITIES))
            yield f"i see {scene.caption} {scene.verdict} {rng.randint(0, 9)}"
        yield f"one: {scenes[0].caption} {scenes[0].verdict} two: {scenes[1].caption} {scenes[1].verdict}"
        for template in (CAPTION_TEMPLATE, *templates.values()):
            yield template.replace("{image}", "").replace("{prompt}", scenes[0].prompt)
    yield from ["user\n", "assistant\n", "system\n"] * 50


def collate(
    examples: list[Example], processor: Qwen2_5_VLProcessor, tokenizer: PreTrainedTokenizerFast
) -> dict[str, torch.Tensor]:
    """Make a right-padded batch with labels on completions only (-100 elsewhere); tensors are (examples, tokens)."""
    prompts = processor(
        text=[processor.apply_chat_template(e.messages, add_generation_prompt=True) for e in examples],
        images=[image for e in examples for image in e.images],
    )
    end = [tokenizer.eos_token_id]
    completions = [tokenizer(e.completion, add_special_tokens=False)["input_ids"] + end for e in examples]
    lengths = [len(p) + len(c) for p, c in zip(prompts["input_ids"], completions, strict=True)]
    shape = (len(examples), max(lengths))
    input_ids = torch.full(shape, tokenizer.pad_token_id)
    labels = torch.full(shape, -100)
    for row, (prompt, completion) in enumerate(zip(prompts["input_ids"], completions, strict=True)):
        input_ids[row, : lengths[row]] = torch.tensor(list(prompt) + completion)
        labels[row, len(prompt) : lengths[row]] = torch.tensor(completion)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "attention_mask": (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long(),
        # Without these the model silently uses one-dimensional positions.
        "mm_token_type_ids": (input_ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int(),  # type: ignore[attr-defined]
        "pixel_values": torch.as_tensor(prompts["pixel_values"]),
        "image_grid_thw": torch.as_tensor(prompts["image_grid_thw"]),
    }


def train(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    templates: dict[str, str],
    settings: ColdStart,
    log: Callable[[dict[str, float], int], None],
) -> None:
    """Train in place: captions first, then ratings and pairs together under a cosine schedule.

    Muon trains the weight matrices, and AdamW the embedding, the norms and the patch convolution. With AdamW alone,
    half of the captions are wrong after the same time.
    """
    tokenizer = processor.tokenizer
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=settings.muon_learning_rate, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=settings.adamw_learning_rate, weight_decay=0.01, betas=(0.9, 0.98)),
    ]

    def learning_rate_factor(step: int) -> float:
        warm = min(1.0, (step + 1) / 20)
        progress = max(0, step - settings.caption_steps) / max(1, settings.trace_steps)
        return warm * float(0.03 + 0.97 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress))))

    schedules = [torch.optim.lr_scheduler.LambdaLR(o, learning_rate_factor) for o in optimizers]
    model.train()
    for step in range(settings.caption_steps + settings.trace_steps):
        rng = random.Random(f"cold start {settings.seed} {step}")
        makers = [caption_example] if step < settings.caption_steps else [rating_example, pair_example]
        losses = []
        for maker in makers:
            template = templates["pairwise" if maker is pair_example else "pointwise"]
            examples = [maker(scenes_of_prompt(rng), template, rng) for _ in range(settings.batch)]
            loss = model(**collate(examples, processor, tokenizer)).loss
            loss.backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        names = ["loss/caption"] if step < settings.caption_steps else ["loss/rating", "loss/pair"]
        log(dict(zip(names, losses, strict=True)), step + 1)
    model.eval()

"""Rows of a gallery as MLflow traces: what was asked, the thoughts, the answers, and what people said."""

import hashlib
from collections.abc import Iterable
from functools import partial
from typing import Any

from workflow_scripts.policy.prompts import ANSWERS, CLOSE_THINKING

BANDS = ("low", "middle", "high")  # thirds of the range of a confidence


def sampled(rows: Iterable[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """So many rows of a gallery that have rollouts, by the hash of their names: the same images for every policy."""
    thought = [row for row in rows if row["rollouts"]]
    return sorted(thought, key=lambda row: hashlib.sha256(f"{row['prompt_id']}/{row['image_id']}".encode()).digest())[
        :number
    ]


def log_gallery(run: Any, rows: list[dict[str, Any]], number: int) -> None:
    """Log `number` images of a gallery (rows of `reporting.gallery.GALLERY`) as traces of an MLflow run.

    `run` is the `tracking.run.Run` of the stage.
    """
    anchors = {row["prompt_id"]: row for row in rows if row["anchor"]}
    for row in sampled(rows, number):
        run.send("a trace", partial(log_trace, row=row, anchor=anchors.get(row["prompt_id"])))


def tags(row: dict[str, Any]) -> dict[str, str]:
    """What the traces can be filtered by."""
    return {
        "dataset": row["dataset"],
        "track": row["track"],
        "policy": row["policy"],
        "seed": str(row["seed"]),
        "right": "unknown" if row["right"] is None else str(row["right"]).lower(),
        "confidence": BANDS[min(2, int(3 * row["confidence"]))],
        "prompt_id": row["prompt_id"],
        "image_id": row["image_id"],
    }


def log_trace(client: Any, experiment_id: str, run_id: str, row: dict[str, Any], anchor: dict[str, Any] | None) -> str:
    """Log an image of a gallery as a trace of a run; `anchor` is the row of the image it was compared with.

    Returns:
        Id of the trace.

    Raises:
        MlflowException: the store did not take it.
    """
    import mlflow
    from mlflow.entities import AssessmentSource, SpanType
    from mlflow.tracing.attachments import Attachment

    def picture(shown: dict[str, Any]) -> Attachment:
        return Attachment(content_type="image/webp", content_bytes=shown["image"])

    answers = ANSWERS["pointwise" if anchor is None else "pairwise"]
    seen = {"image": picture(row)} | ({"compared_with": picture(anchor)} if anchor else {})
    root = client.start_trace(
        f"{row['policy']} · {row['dataset']} · {row['image_id']}",
        span_type=SpanType.CHAIN,
        inputs={"prompt": row["prompt"], **seen},
        tags=tags(row),
        experiment_id=experiment_id,
        run_id=run_id,
    )
    for rollout in row["rollouts"]:
        order = {} if anchor is None else {"shown": "second" if rollout["second"] else "first"}
        span = client.start_span(
            f"rollout {rollout['k']}",
            root.trace_id,
            root.span_id,
            span_type=SpanType.LLM,
            inputs={"prompt": row["prompt"], "image": row["image_id"], **order},
        )
        thinking, close, answer = rollout["text"].partition(CLOSE_THINKING)
        chances = zip(answers, rollout["answer_probabilities"], strict=True)
        outputs = {
            "thinking": thinking + close,
            "answer": answer,
            "answer_probabilities": {str(number): round(chance, 4) for number, chance in chances},
            "soft_score": rollout["soft"],
            "sampled_answer": rollout["sampled_answer"],
            "forced": rollout["forced"],
        }
        client.end_span(root.trace_id, span.span_id, outputs=outputs)
    told = ("score", "score_se", "confidence", "predicted_rank", "human_rank", "human_rating", "right")
    outputs = {name: row[name] for name in told} | {"pairs_right": f"{row['pairs_right']:g} of {row['pairs']}"}
    client.end_trace(root.trace_id, outputs={"thinking": row["rollouts"][0]["text"], **outputs})
    client.get_trace(root.trace_id, display=False)  # MLflow only warns of a trace that it lost
    human = AssessmentSource("HUMAN", "annotators")
    for name in ("human_rank", "human_rating"):
        if row[name] is not None:
            mlflow.log_expectation(trace_id=root.trace_id, name=name, value=row[name], source=human)
    if row["right"] is not None:
        by_order = AssessmentSource("CODE", "order of the images")
        why = f"{outputs['pairs_right']} pairs with this image are in the human order"
        mlflow.log_feedback(trace_id=root.trace_id, name="right", value=row["right"], source=by_order, rationale=why)
    return root.trace_id

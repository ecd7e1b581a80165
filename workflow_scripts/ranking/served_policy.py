"""A trained policy as MLflow loads and serves it: a prompt and its images in, scores, ranks and reasoning out.

MLflow keeps this file, not a pickle, and runs it to load the model ("models from code"); `register_policy` puts it into
a model together with the package, the adapter and, if it is small, the base policy.
"""

import base64
import binascii
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from mlflow.pyfunc.model import PythonModelContext


class ServedPolicy(PythonModel):
    """The judge behind MLflow's interface. Each row is asked by itself, so that no row changes another's result."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load policy and adapter."""
        from workflow_scripts.ranking.judge import Judge

        policies = Path(context.artifacts["policies"])
        (adapter,) = policies.glob("*/seed*")
        elsewhere = policies / "base" / "path.txt"
        base = Path(elsewhere.read_text(encoding="utf-8")) if elsewhere.is_file() else policies / "base" / "model"
        self.judge = Judge.load(adapter, base=base)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Score the images of each row.

        Args:
            context: of MLflow.
            model_input: columns prompt and images, a list of image files in base64.
            params: k and seed.

        Returns:
            Columns scores, ranks (1 is the best) and reasoning (a list of k texts for each image), each in the order of
            the images.

        Raises:
            MlflowException: an image is no base64 or cannot be shown, or the images cannot be judged as asked.
        """
        from workflow_scripts.preferences.images import UnreadableImageError, decoded
        from workflow_scripts.ranking.judge import JudgeError

        asked = params or {}
        rows = []
        for number, (prompt, images) in enumerate(zip(model_input["prompt"], model_input["images"], strict=True)):
            try:
                pictures = [decoded(base64.b64decode(text, validate=True)) for text in images]
                ranked = self.judge.rank(prompt, pictures, k=asked.get("k"), seed=asked.get("seed"))
            except (binascii.Error, UnreadableImageError, JudgeError) as error:
                raise MlflowException.invalid_parameter_value(f"row {number}: {error}") from None
            ranked.sort(key=lambda row: row.index)
            rows.append(
                {
                    "scores": [row.score for row in ranked],
                    "ranks": [row.rank for row in ranked],
                    "reasoning": [[thought.reasoning for thought in row.judgement.thoughts] for row in ranked],
                }
            )
        return pd.DataFrame(rows, columns=["scores", "ranks", "reasoning"])


set_model(ServedPolicy())

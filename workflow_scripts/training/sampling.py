"""How a trained policy is sampled, in validation and by the judge."""

from workflow_scripts.configuration.model import Sampling


def as_in_training(temperature: float, max_completion_tokens: int) -> Sampling:
    """Sampling with the temperature and the budget of a training.

    Every key is given, because a changed default must not change which adapter is kept.
    """
    return Sampling(
        temperature=temperature,
        top_p=1.0,
        top_k=0,
        max_thinking_tokens=max_completion_tokens,
        max_answer_tokens=4,
    )

"""Every setting of a training reaches TRL."""

from pathlib import Path

from workflow_scripts.configuration.model import load
from workflow_scripts.configuration.stages import TrainGrpo
from workflow_scripts.training.settings import grpo_config


def test_every_setting_of_the_paper_reaches_trl(tmp_path: Path) -> None:
    changed = {
        "learning_rate": 3e-5, "beta": 0.07, "epsilon": 0.3, "loss_type": "dr_grpo", "scale_rewards": "none",
        "importance_sampling_level": "token", "num_iterations": 2, "temperature": 0.9, "warmup_steps": 3,
        "max_grad_norm": 0.5, "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.95,
        "gradient_checkpointing": True,
    }  # fmt: skip
    sizes = {"steps": 6, "validate_every": 2, "prompts_per_step": 4, "group_size": 6, "gradient_accumulation": 3}
    training = changed | sizes | {"rewards": {"format": 0.5, "exact": 2, "approximate": 0.25}}
    config = TrainGrpo.of(load({"training": {"imagereward": training}}), "imagereward", 3)
    given = grpo_config(config, tmp_path, resumed=False)
    for name, value in changed.items():
        assert getattr(given, name) == value, name
    assert given.num_generations == 6 and given.max_steps == 6 and given.seed == given.data_seed == 3
    assert given.per_device_train_batch_size * given.gradient_accumulation_steps == 4 * 6
    assert given.reward_weights == [0.5, 2, 0.25]
    assert (given.eval_steps, given.save_steps, given.eval_on_start) == (2, 2, True)
    assert not grpo_config(config, tmp_path, resumed=True).eval_on_start  # its checkpoint was validated
    assert given.metric_for_best_model == "eval_soft_pair_accuracy" and given.greater_is_better

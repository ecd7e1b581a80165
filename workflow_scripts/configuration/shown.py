"""Shown in the MLflow pages: parameters, names of training curves, the description of the experiment."""

from workflow_scripts.files.instances import INSTANCE_KEYS

# What makes runs comparable, in the order of interest; all other keys stand in the provenance file beside it.
PARAMS = (
    *INSTANCE_KEYS,
    *("source", "hub.repository", "hub.revision", "bundled", "world.train_prompts", "world.test_prompts"),
    *("fraction", "by", "prompts", "drop_overlap"),
    *("protocol", "model.protocol", "model.max_pixels", "model.dtype"),
    *("training.steps", "training.epochs", "training.prompts_per_step", "training.group_size"),
    *("training.learning_rate", "training.beta"),
    *("training.temperature", "training.loss_type", "training.scale_rewards", "training.lora.rank"),
    "training.reward_signal",
    *("training.rewards.format", "training.rewards.exact", "training.rewards.approximate"),
    *("engine", "rollouts", "both_orders", "sampling.temperature", "sampling.max_thinking_tokens"),
    *("tracks", "policies", "seeds", "report_k", "missing_answer", "bootstrap.resamples"),
)
# Where the trainer's words are not the field's; the other curves only get their group.
CURVES = {
    "eval_soft_pair_accuracy": "validation/accuracy",
    "eval_soft_pair_accuracy_se": "validation/accuracy_se",
    "eval_soft_pair_accuracy_gain": "validation/gain",
    "eval_soft_pair_accuracy_gain_se": "validation/gain_se",
    "completions/mean_length": "train/completion_length",
    "completions/clipped_ratio": "train/completion_clipped_share",
    "frac_reward_zero_std": "train/share_of_groups_without_signal",
    "sampling/sampling_logp_difference/mean": "train/sampling_difference",
    "sampling/sampling_logp_difference/max": "train/largest_sampling_difference",
    "num_tokens": "train/tokens",
    "step_time": "train/seconds_per_step",
    "total_flos": "trainer/total_flos",
}
EXPERIMENT_NOTE = """Preference reasoning with soft rewards: every job of the workflow is one run.

| look at | |
|---|---|
| [the tables](#/experiments/{id}/runs?searchFilter=tags.stage%20%3D%20%27make_tables%27) | both tables of the paper, \
with the runs that they come from |
| [trainings](#/experiments/{id}/runs?searchFilter=tags.stage%20%3D%20%27train_grpo%27) | curves: `train/reward`, \
`train/kl`, `validation/accuracy`, `validation/answer_share/…` |
| [accuracies](#/experiments/{id}/runs?searchFilter=tags.stage%20%3D%20%27measure_accuracy%27) | of every policy on \
every test set |
| [traces](#/experiments/{id}/traces) | images with the thoughts about them, right or wrong |

Useful filters of runs: `tags.stage = 'train_grpo'`, `tags.track = 'hpsv2'`, `tags.policy = 'grpo'`,
`attributes.status = 'FAILED'`. Of traces: `tags.right`, `tags.confidence`, `tags.dataset`, `tags.policy`.
"""

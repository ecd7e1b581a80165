"""GRPO training: items, rewards, TRL's settings, the validating trainer and its checkpoints."""

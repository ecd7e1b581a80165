"""Rollouts: the items to judge, the rollout record and the engines that generate it."""

"""Checks before a run that costs money: the machine, and one measured step of each phase at the configured sizes."""

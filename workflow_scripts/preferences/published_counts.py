"""Comparison of what was read with what is published: another revision, or files cut short, would go unnoticed."""

from collections.abc import Mapping

from workflow_scripts.configuration.data_stages import PublishedSplit


def differences(published: PublishedSplit, counts: Mapping[str, int]) -> list[str]:
    """Describe each count that differs from the published one by more than its rounding.

    Args:
        published: the counts as published, and how far they are rounded.
        counts: prompts, images and pairs (ties included) that were read.
    """
    return [
        f"{number:,} {name}, published are {published.counts[name]:,}"
        for name, number in counts.items()
        if abs(number - published.counts[name]) > published.within[name]
    ]

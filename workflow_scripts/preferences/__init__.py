"""Preference data: the canonical tables, readers of the published layouts, subsampling and the synthetic world."""

"""Ranking images that are not a data set: the judge in memory, files by the thousand, the model that MLflow serves."""

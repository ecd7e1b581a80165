"""Ranking images that are not a data set: the judge in memory, and files by the thousand."""

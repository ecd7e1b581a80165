"""Stages of the workflow, one file for each rule: parse, load, do, write."""

"""Faster passes through the model with the same results."""

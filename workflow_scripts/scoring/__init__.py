"""Scores and accuracies as pure functions of the recorded answer probabilities: no model, no file, no state."""

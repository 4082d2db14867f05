"""Scoring: the log-probability of every packed instance under a model, once."""

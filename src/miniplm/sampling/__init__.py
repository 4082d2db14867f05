"""Sampling: from scores to the rows that are kept."""

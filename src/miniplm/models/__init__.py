"""Transformers models as scoring and training need them: loaded safely, split into backbone and head."""

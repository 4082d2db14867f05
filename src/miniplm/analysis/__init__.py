"""Analysis: figures about scores, selections and what they cost, from numbers alone."""

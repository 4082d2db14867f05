"""Analysis: figures about scores, selections, their texts, loss curves, seeds, and what all of it costs."""

"""The whole method: a recipe becomes stages, stages become artifacts in a run directory."""

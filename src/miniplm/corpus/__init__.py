"""Documents in: any source that `datasets` reads, and the corpus that every Python installation carries."""

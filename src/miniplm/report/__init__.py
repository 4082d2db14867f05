"""The report: what a run found, as one HTML page and as JSON."""

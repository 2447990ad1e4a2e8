"""Benchmarks: `python -m pipeline.bench NAME`. Each prints its figures as a table and, if asked, as JSON lines."""

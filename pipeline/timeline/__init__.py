"""The timeline of an engine: recorded to a Chrome trace by its launcher, drawn by `python -m pipeline.timeline`."""

"""Reads the text of a model: its reasoning, its calls of tools and its answer, while the text arrives."""

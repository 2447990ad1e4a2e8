"""Endpoints about the engine itself: its state, its tokenizer, and what the page at / shows."""

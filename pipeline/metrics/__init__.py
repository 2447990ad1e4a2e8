"""Turns a running engine's counters into figures, and shows them live."""

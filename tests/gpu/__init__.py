"""Tests on a CUDA device: skipped, and saying so, where there is none."""

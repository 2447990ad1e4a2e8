"""Tests on a CUDA device. Without one they are skipped, with a message."""

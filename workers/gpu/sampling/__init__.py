"""Sampling: computes tokens from logits, with parameters per row, in plain torch and in Triton kernels."""

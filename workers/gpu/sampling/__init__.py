"""Sampling: from logits to tokens, with every parameter per row, in torch and in Triton kernels."""

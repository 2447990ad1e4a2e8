"""Attention over the paged KV cache: how it enters the models of transformers, and the backends that compute it."""

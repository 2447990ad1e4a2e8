"""transformers' models, unchanged, on paged attention: loading, the gate that refuses some models, and the call of a
step."""

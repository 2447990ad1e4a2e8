"""Models of transformers, unchanged, on paged attention: loading, the gate that refuses some, the call of a step."""

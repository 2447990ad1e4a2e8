"""The device's memory: the KV cache, the account of what takes memory, and what to do when it runs out."""

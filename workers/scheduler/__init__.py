"""The scheduler: decides which sequences run next. Owns rows, KV blocks, the waiting queue and the prompt rings.

Begin with `scheduler.py`. `admission/`, `planning/`, `kv_cache/` and `results/` are the stages of a sequence's life.
"""

"""The scheduler: decides which sequences run next, and owns rows, KV blocks, the queue and the prompt rings."""

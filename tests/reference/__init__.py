"""References for tests: tiny random models, the tokens that plain transformers generates, and hand-built steps."""

"""What tests compare with: tiny random models, the tokens plain transformers generates, hand-built steps."""

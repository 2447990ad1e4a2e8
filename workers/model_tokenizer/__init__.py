"""The tokenizer of a model's folder, as both the tokenizers and the detokenizer load it."""

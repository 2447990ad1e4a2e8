"""Anthropic's Messages API: its requests in the terms of chat completions, and answers in its own form."""

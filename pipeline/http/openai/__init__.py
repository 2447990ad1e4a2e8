"""OpenAI's API: models, completions, chat completions and responses."""

"""The HTTP server: the engine for clients of OpenAI's and Anthropic's APIs. A supervised role of the engine."""

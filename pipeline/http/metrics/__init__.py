"""The engine's statistics for Prometheus."""

"""Recordings of steps: what the GPU process writes with `--record`, and running it again."""

"""`python -m pipeline.metrics`: see `watch.py`."""

from pipeline.metrics.watch import main
from pipeline.terminal.reporting import run_command

if __name__ == "__main__":
    run_command(main)

"""`python -m pipeline.metrics`: see `watch.py`."""

import sys

from pipeline.metrics.watch import main

if __name__ == "__main__":
    sys.exit(main())

"""The `ringfeed` program. It finds our packages by itself: a user's `pipeline.py` may come first on `sys.path`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def main() -> int:
    """Run `pipeline.cli`. Returns the exit status."""
    try:
        return _main()
    except KeyboardInterrupt:  # while the modules are imported
        return 130


def _main() -> int:
    folder = Path(__file__).resolve().parent / "pipeline"
    spec = importlib.util.spec_from_file_location(
        "pipeline", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None, "the package lies beside this file"
    assert spec.loader is not None, "the package is a folder of Python files"
    sys.modules["pipeline"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from pipeline.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())

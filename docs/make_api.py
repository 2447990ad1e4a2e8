"""Makes the API reference from the docstrings of the public names: `make docs`, or

python docs/make_api.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import pdoc

import pipeline


def main() -> int:
    """Write FOLDER/index.html and what it links to. Exit status 1, with the names, if a public name is missing."""
    folder = Path(sys.argv[1])
    for name in pipeline.__all__:
        getattr(pipeline, name)  # pdoc does not see names that are loaded at first use
    pdoc.render.configure(docformat="google", include_undocumented=False)
    pdoc.pdoc("pipeline", r"!pipeline\.", output_directory=folder)
    page = (folder / "pipeline.html").read_text(encoding="utf-8")
    if missing := [name for name in pipeline.__all__ if f'<section id="{name}">' not in page]:
        print(f"error: the API reference lacks {', '.join(missing)}", file=sys.stderr)
        return 1
    print(f"{folder / 'index.html'}: {len(pipeline.__all__)} public names")
    return 0


if __name__ == "__main__":
    sys.exit(main())

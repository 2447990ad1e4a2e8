"""Start an engine on the shipped model, and run the tests of this folder in the clients' own environment.

    .venv/bin/python -m tests.clients.run PYTHON NODE_FOLDER [pytest's arguments]

PYTHON is that of the environment; NODE_FOLDER holds `node_modules`. The exit status is pytest's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pipeline import Pipeline
from pipeline.engine.small_model import CONFIG

FOLDER = Path(__file__).parent
MODEL = "tiny-model"


def main() -> int:
    """Returns the exit status."""
    python, node_folder, *arguments = sys.argv[1:]
    with Pipeline(CONFIG, {"scheduler.max_model_len": 1024, "http.served_model_names": [MODEL]}) as pipeline:
        environment = {
            **os.environ,
            "RINGFEED_CLIENTS_URL": str(pipeline.http_url),
            "RINGFEED_CLIENTS_MODEL": MODEL,
            "RINGFEED_CLIENTS_TOKENIZER": str(Path(CONFIG).parent / MODEL),
            "RINGFEED_CLIENTS_NODE": str(Path(node_folder).resolve()),
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # LiteLLM downloads its prices otherwise
            "OPENAI_AGENTS_DISABLE_TRACING": "1",
        }
        command = [str(Path(python).absolute()), "-m", "pytest", "-c", "pytest.ini", "--confcutdir", ".", *arguments]
        return subprocess.run(command, cwd=FOLDER, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())

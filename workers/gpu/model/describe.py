"""`python -m workers.gpu.model.describe FOLDER`: how transformers reads a model's config.json, as a line of JSON.

For the launcher, which does not import transformers, for models whose file alone does not say enough. Prints an object
with the text model's configuration, its defaults filled in, as `text_config`, or with an `error`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from ipc.errors import RingfeedError
from workers.gpu.model.loader import load_config
from workers.gpu.model.quantization import check_quantization


def describe(folder: str) -> dict[str, Any]:
    transformers_logging.set_verbosity_error()
    try:
        config = load_config(folder)
        check_quantization(folder, Path(folder), config)
    except RingfeedError as error:
        return {"error": str(error)}
    return {"text_config": json.loads(config.get_text_config().to_json_string(use_diff=False))}


if __name__ == "__main__":
    print(json.dumps(describe(sys.argv[1])))

"""`python -m workers.gpu.model.describe FOLDER`: prints how transformers reads a model's config.json, as a line of
JSON.

The launcher does not import transformers. It runs this program for models whose config.json leaves values to
transformers' defaults. The output is an object with `text_config`, the text model's configuration including defaults,
or with `error`.
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

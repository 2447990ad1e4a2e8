"""Values of sampling parameters that a request leaves out: the model's own, then OpenAI's defaults."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Final, Self

from ipc.errors import InvalidRequest
from ipc.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

# Names in generation_config.json, and ours. vLLM reads the same ones (`ModelConfig.get_diff_sampling_param`).
_NAMES: Final = {
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
    "repetition_penalty": "repetition_penalty", "max_new_tokens": "max_tokens",
}  # fmt: skip
_OPENAI: Final = {"temperature": 1.0, "top_p": 1.0}


class SamplingDefaults:
    """The defaults of one model. `values` are keyword arguments of SamplingParams."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = {**_OPENAI, **values}

    @classmethod
    def of_model(cls, folder: str) -> Self:
        """Read the model's generation_config.json. A value that no request could have is left out, with a warning.

        `do_sample` false stands for greedy sampling, as in transformers, unless the file names a temperature.
        """
        try:
            plain = json.loads((Path(folder) / "generation_config.json").read_bytes())
        except FileNotFoundError:
            return cls({})
        if not isinstance(plain, dict):
            return cls({})
        values: dict[str, Any] = {}
        for theirs, ours in _NAMES.items():
            value = plain.get(theirs)
            if value is None:
                continue
            try:
                SamplingParams(**{ours: value})
            except (InvalidRequest, TypeError) as error:
                logger.warning("generation_config.json: %s; the value is ignored", error)
                continue
            values[ours] = value
        if plain.get("do_sample") is False and "temperature" not in values:
            values["temperature"] = 0.0
        return cls(values)

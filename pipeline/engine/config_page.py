"""Writes docs/configuration.md from the configuration's structs: `make configuration`.

The descriptions of keys are in the structs (`workers/*/config.py`), so that page and code cannot disagree. This
module adds only the text around them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

import msgspec

from pipeline.engine.config import SECTIONS, Config, to_toml
from pipeline.engine.config_fields import ConfigField, describe_type, fields_of, toml_value
from pipeline.http.config import HttpConfig
from workers.gpu.config import ModelConfig

_HEAD: Final = """\
# Configuration

<!-- Made by `make configuration` from the structs in workers/*/config.py and pipeline/http/config.py: edit those. -->

An engine reads one TOML file. Only `model.path` is required:

```toml
[model]
path = "HuggingFaceTB/SmolLM2-135M-Instruct"  # a hub id, or a folder
```

- `python -m pipeline.launch --config FILE` starts an engine. `--config -` reads standard input.
- `--set section.key=value` overrides a value, as often as you like. The value is TOML, or else a plain string.
- `--check` validates the configuration and prints all keys with their values. It starts nothing.
- In Python, `Pipeline` takes a file or a dictionary: `Pipeline({"model": {"path": "my-model"}})`.

An engine without the section `[http]` has no HTTP server. Every other section has its defaults without being named.

An unknown key, a value of a wrong type or out of range, or an impossible combination is one error. It names the file
(or the `--set` option), the key, the value and the cure.

"Default: not set" means that the key has no value unless you give it one. Names of keys end in their units: `_s` is
seconds, `_ms` milliseconds, `_bytes` bytes.
"""

_COMBINATIONS: Final = """
## Combinations

Some values are valid on their own and cannot work together. The engine refuses them at start:

- `scheduler.max_num_batched_tokens` must not be smaller than `scheduler.max_num_seqs`.
- The KV cache must hold one sequence of `scheduler.max_model_len` tokens: `cache.num_blocks` times `cache.block_size`,
  or what `cache.memory_share` allows.
- `scheduler.max_model_len` must not be larger than the model's own limit. It is required if the model's `config.json`
  names no limit.
- `model.null_step_ms` needs `model.load_format = "null"`.
- `model.attention = "varlen"` needs a `cache.block_size` of 256 or a multiple of it, and `cache.dtype = "auto"`.
- `http.tls_cert` and `http.tls_key` belong together.

## All keys with their defaults

```toml
"""


def page() -> str:
    """The whole page, as Markdown."""
    lines = [_HEAD]
    for section, struct in SECTIONS.items():
        lines += [f"## [{section}]", "", (struct.__doc__ or "").strip(), ""]
        for field in fields_of(struct).values():
            lines += [f"### {section}.{field.key}", "", f"*{_facts(field)}*", "", field.description, ""]
    example = to_toml(Config(model=ModelConfig(path="PATH"), http=HttpConfig()))
    return "\n".join(lines).rstrip() + "\n" + _COMBINATIONS + example + "```\n"


def _facts(field: ConfigField) -> str:
    facts = describe_type(field.kind)
    facts = facts[0].upper() + facts[1:]
    if (number := field.number) is not None:
        low = f" from {number.ge:,}" if number.gt is None else f" above {number.gt:,}, up"
        facts += f"{low} to {number.le:,.0f}"
    return f"{facts}. {_default(field.default)}"


def _default(value: Any) -> str:
    if value is msgspec.NODEFAULT:
        return "Required."
    return "Default: not set." if value is None else f"Default: `{toml_value(value)}`."


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")

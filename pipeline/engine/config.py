"""The configuration: TOML in, checked structs out, and one clear error for each fault.

Owns the sections and the combinations of values. The structs in `workers/*/config.py` declare type, range and meaning
of each key; `config_fields.py` reads them. `model_files.py` finds out whether the model and the machine fit the
configuration.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

import pipeline.environment.own_workers  # noqa: F401
from ipc.errors import ConfigError
from pipeline.client.endpoint import check_endpoint
from pipeline.engine.config_combinations import COMBINED, check_combinations
from pipeline.engine.config_fields import fields_of, toml_value
from pipeline.engine.config_paths import file_path, folder_path, model_path
from pipeline.engine.supervisor_config import SupervisorConfig
from pipeline.http.config import HttpConfig
from workers.gateway.config import FrontendConfig
from workers.gpu.config import CacheConfig, ModelConfig
from workers.grammar.config import GrammarConfig
from workers.scheduler.config import RingConfig, SchedulerConfig
from workers.tokenizer.config import TokenizerConfig

STANDARD_INPUT: Final = "-"
BAD_CONFIG_STATUS: Final = 2  # of the launcher, for a configuration that cannot work
_BAD_TOML: Final = (ValueError, RecursionError)  # tomllib's own is a ValueError; so is that of an integer too long


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The configuration of one engine, immutable. Only `model.path` has no default.

    Each attribute is a section of the file: `model`, `scheduler`, `cache`, `ring`, `tokenizer`, `grammar`, `frontend`,
    `supervisor`, `http`. `http` is None if the file does not have it: the engine then has no HTTP server. Make one with
    `Config.load` or `Config.from_dict`, which check it.
    """

    model: ModelConfig
    scheduler: SchedulerConfig = SchedulerConfig()
    cache: CacheConfig = CacheConfig()
    ring: RingConfig = RingConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    grammar: GrammarConfig = GrammarConfig()
    frontend: FrontendConfig = FrontendConfig()
    supervisor: SupervisorConfig = SupervisorConfig()
    http: HttpConfig | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: Iterable[str] | Mapping[str, Any] = ()) -> Config:
        """Read and check a TOML file.

        Args:
            path: the file. A relative `model.path` or `tokenizer.chat_template` in it starts at the file's folder.
            overrides: "section.key=value" strings, or {"section.key": value}. A relative `model.path` among them
                starts at the current folder.

        Raises ConfigError, naming the source of the value, the key, the value and the cure.
        """
        return load_config(path, override_strings(overrides))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], overrides: Iterable[str] | Mapping[str, Any] = ()) -> Config:
        """Check nested plain values, {"model": {"path": "..."}, ...}. Arguments and errors are those of `load`.

        A relative `model.path` starts at the current folder.
        """
        return config_from_dict(values, overrides=override_strings(overrides))


SECTIONS: Final[dict[str, type[msgspec.Struct]]] = {
    field.name: HttpConfig if field.name == "http" else field.type for field in msgspec.structs.fields(Config)
}
_OPTIONAL: Final = ("http",)  # sections that have no effect unless they are given


def load_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Config:
    """Read a TOML file ("-" = standard input), then apply `overrides`: "section.key=value", a TOML value or a string.

    A relative `model.path` is looked for beside the file, or in the current folder if an override gives it.
    Raises ConfigError, naming where the value came from, the key, the value and the cure.
    """
    is_piped = os.fspath(path) == STANDARD_INPUT
    source = name_source(path)
    try:
        with open(0 if is_piped else path, "rb", closefd=not is_piped) as file:
            text = file.read().decode("utf-8-sig")  # some editors put a byte order mark first
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: is not UTF-8 text (byte {error.start}), so it is not TOML") from None
    return config_from_toml(text, source, Path.cwd() if is_piped else Path(path).resolve().parent, overrides)


def name_source(path: str | os.PathLike[str]) -> str:
    """The name of a configuration's file in errors."""
    return "standard input" if os.fspath(path) == STANDARD_INPUT else str(Path(path))


def find_origin(message: str, path: str | os.PathLike[str], overrides: Iterable[str]) -> str:
    """The origin of the value that a ConfigError's message begins with: the last override of that key, or the file."""
    given = [override for override in overrides if message.startswith(f"{override.partition('=')[0].strip()} ")]
    return f"--set {given[-1]}" if given else name_source(path)


def config_from_toml(text: str, source: str, folder: Path, overrides: Iterable[str] = ()) -> Config:
    """Like `load_config`, for TOML text. Errors call it `source`; a relative `model.path` starts at `folder`."""
    try:
        plain = tomllib.loads(text)
    except _BAD_TOML as error:
        raise ConfigError(f"{source}: is not TOML: {error}") from None
    return config_from_dict(plain, source, folder, overrides)


def config_from_dict(
    plain: Mapping[str, Any], source: str = "config", folder: Path | None = None, overrides: Iterable[str] = ()
) -> Config:
    """The same for nested plain values: {"model": {"path": ...}, ...}."""
    builder = _Builder(source)
    for section, values in plain.items():
        if not isinstance(values, Mapping):
            builder.check_section(section, source)
            raise ConfigError(f"{source}: {section} ({values!r}) must be a section: [{section}] and keys below it")
        builder.check_section(section, source)
        for key, value in values.items():
            builder.set(section, key, value, source)
    for section, key in _PATHS:
        builder.find_path(section, key, folder or Path.cwd())
    for override in overrides:
        section, key, value = _parse_override(override)
        builder.set(section, key, value, f"--set {override}")
        builder.find_path(section, key, Path.cwd())
    return builder.build()


def override_strings(overrides: Iterable[str] | Mapping[str, Any]) -> list[str]:
    """Overrides in any form that users may give, as the strings that `load_config` takes. Raises ConfigError."""
    if isinstance(overrides, Mapping):
        return [f"{key}={toml_value(value)}" for key, value in overrides.items()]
    if isinstance(overrides, str):
        return [overrides]
    if not isinstance(overrides, Iterable):
        raise ConfigError(f'overrides ({overrides!r}) must be "section.key=value", a list of them, or a mapping')
    overrides = list(overrides)
    for override in overrides:
        if not isinstance(override, str):
            raise ConfigError(f'override ({override!r}) must be "section.key=value"')
    return overrides


def to_toml(config: Config) -> str:
    """The whole configuration, defaults included, as TOML that `load_config` reads back; unset keys are comments."""
    lines: list[str] = []
    for section in SECTIONS:
        values = getattr(config, section)
        if values is None:
            lines += ["", f"# [{section}] is not set"]
            continue
        lines += ["", f"[{section}]"]
        for key, value in msgspec.structs.asdict(values).items():
            lines.append(f"# {key} is not set" if value is None else f"{key} = {toml_value(value)}")
    return "\n".join(lines[1:]) + "\n"


_PATHS: Final = {
    ("model", "path"): model_path, ("tokenizer", "chat_template"): file_path, ("http", "api_key_file"): file_path,
    ("http", "tls_cert"): file_path, ("http", "tls_key"): file_path, ("frontend", "server_key_file"): file_path,
    ("frontend", "client_keys_folder"): folder_path,
}  # fmt: skip


class _Builder:
    """Collects values, remembers where each came from, and checks them one by one and then together."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS if section not in _OPTIONAL}
        self._origins: dict[str, str] = {}

    def check_section(self, section: str, origin: str) -> None:
        if section not in SECTIONS:
            raise ConfigError(f"{origin}: there is no section [{section}]{_suggest(section, SECTIONS)}")
        self._values.setdefault(section, {})

    def set(self, section: str, key: str, value: Any, origin: str) -> None:
        self.check_section(section, origin)
        fields = fields_of(SECTIONS[section])
        if key not in fields:
            raise ConfigError(f"{origin}: there is no key {section}.{key}{_suggest(key, fields)}")
        name = f"{section}.{key}"
        try:
            value = fields[key].check(value)
        except ValueError as error:
            raise ConfigError(f"{origin}: {name} {error}") from None
        if name == "frontend.endpoint" and value is not None:
            try:
                check_endpoint(value)
            except ConfigError as error:
                raise ConfigError(f"{origin}: {name} ({value!r}) {error}") from None
        self._values[section][key] = value
        self._origins[name] = origin

    def find_path(self, section: str, key: str, folder: Path) -> None:
        """Make this value absolute, seen from `folder`, if it is a path."""
        absolute, path = _PATHS.get((section, key)), self._values.get(section, {}).get(key)
        if absolute is None or path is None:
            return
        try:
            self._values[section][key] = absolute(path, folder)
        except ValueError as error:
            raise ConfigError(f"{self._origins[f'{section}.{key}']}: {section}.{key} {error}") from None

    def build(self) -> Config:
        if "path" not in self._values["model"]:
            raise ConfigError(
                f"{self._source}: model.path is missing: a folder with config.json, weights and tokenizer, or a hub id"
            )
        for name, origin in self._origins.items():
            section, _, key = name.partition(".")
            value = self._values[section][key]
            if not _is_utf8(str(value)):
                raise ConfigError(f"{origin}: {name} ({value!r}) is not UTF-8 text")
        sections: dict[str, Any] = {section: SECTIONS[section](**values) for section, values in self._values.items()}
        config = Config(**sections)
        try:
            check_combinations(
                scheduler=config.scheduler, cache=config.cache, model=config.model, frontend=config.frontend,
                http=config.http,
            )  # fmt: skip
        except ConfigError as error:
            # One value of the combination that came from the command line is the one to name.
            origins = {self._origins.get(name, self._source) for name in COMBINED if name in str(error)}
            origin = next((o for o in sorted(origins) if o != self._source), self._source)
            raise ConfigError(f"{origin}: {error}") from None
        return config


def _parse_override(override: str) -> tuple[str, str, Any]:
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise ConfigError(f"--set {override}: must have the form section.key=value")
    try:
        parsed = tomllib.loads(f"value = {text}")
    except _BAD_TOML:
        return section, key, text  # a bare string
    return section, key, parsed["value"] if len(parsed) == 1 else text


def _is_utf8(text: str) -> bool:
    """False for a path of undecodable bytes: TOML and the workers' messages cannot hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _suggest(name: str, valid: Iterable[str]) -> str:
    valid = list(valid)
    nearest = difflib.get_close_matches(name, valid, n=1)
    return f": did you mean {nearest[0]}?" if nearest else f": it must be one of {', '.join(valid)}"

"""Configurations that work, and one clear line for each that cannot."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ipc.errors import ConfigError
from pipeline import Pipeline
from pipeline.client.endpoint import (
    EndpointClaim,
    check_client_endpoint,
    check_endpoint,
    default_endpoint,
    runtime_folder,
)
from pipeline.engine import model_files
from pipeline.engine.config import Config, config_from_dict, config_from_toml, load_config, override_strings, to_toml
from pipeline.engine.model_files import ModelNotHere, find_model
from pipeline.environment.module_search import module_environment
from pipeline.launch import main
from workers.gpu.model.weight_files import weight_files

ROOT = Path(__file__).parents[4]
MODEL = {"vocab_size": 32, "max_position_embeddings": 64, "eos_token_id": 1}


def make_model(folder: Path, config: dict[str, Any] | None = None, **files: Any) -> Path:
    """A model's folder without weights; `files` by name, "__" for the dot."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODEL if config is None else config))
    for name, content in {"tokenizer__json": {}, **files}.items():
        (folder / name.replace("__", ".")).write_text(json.dumps(content))
    return folder


def configure(model: Path | str, *overrides: str) -> Config:
    return config_from_dict({"model": {"path": str(model), "load_format": "dummy"}}, overrides=overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("scheduler.max_num_seq=4", "no key scheduler.max_num_seq: did you mean max_num_seqs?"),
        ("schedular.max_num_seqs=4", "no section [schedular]: did you mean scheduler?"),
        ("ring.zzz=1", "no key ring.zzz: it must be one of depth"),
        ("ring.depth=abc", "ring.depth ('abc') must be an integer"),
        ("ring.depth=true", "ring.depth (True) must be an integer"),
        ("ring.depth=9", "ring.depth (9) must lie in [1, 8]"),
        ("model.dtype=int8", 'model.dtype (\'int8\') must be one of "auto", "float32"'),
        ("tokenizer.num_workers=65", "tokenizer.num_workers (65) must lie in [1, 64]"),
        ("cache.memory_share=0", "cache.memory_share (0.0) must lie in (0, 1]"),
        ("cache.memory_share=nan", "cache.memory_share (nan) must lie in (0, 1]"),
        ("cache.block_size=0", "cache.block_size (0) must lie in [1, 1024]"),
        ("frontend.drain_timeout_s=inf", "frontend.drain_timeout_s (inf) must be a number of seconds in (0, 1e+06]"),
        ("frontend.drain_timeout_s=3000000", "frontend.drain_timeout_s (3000000.0) must be a number of seconds"),
        ("scheduler.queue_timeout_s=1e308", "scheduler.queue_timeout_s (1e+308) must be a number of seconds"),
        ("frontend.endpoint=udp://x", "frontend.endpoint ('udp://x') must have the form"),
        (
            "model.attention=varlen",
            'model.attention ("varlen") reads KV blocks of 256 tokens or a multiple of that, not of cache.block_size',
        ),
        ("model.null_step_ms=4", 'model.null_step_ms (4.0) has no effect with model.load_format ("dummy")'),
        (
            "tokenizer.chat_template=none.jinja",
            "tokenizer.chat_template ('none.jinja') must be a file; there is none at",
        ),
        ("tokenizer.chat_template=.", "tokenizer.chat_template ('.') must be a file; there is none at "),
        ('tokenizer.chat_template="a\\u0000b"', "tokenizer.chat_template ('a\\x00b') cannot be a file: "),
        ("tokenizer.template_timeout_s=0", "tokenizer.template_timeout_s (0.0) must be a number of seconds in (0, 60]"),
        ("ring", "must have the form section.key=value"),
        ("model.path=", "model.path ('') must be a folder or a hub id"),
        ("model.path=~nouser/x", "model.path ('~nouser/x') cannot be a folder: "),
        ('model.path="a\\u0000b"', "model.path ('a\\x00b') cannot be a folder: "),
        (f"model.path={'x' * 5000}", "cannot be a folder: File name too long"),
        ("model.path=/\udcff", "model.path ('/\\udcff') is not UTF-8 text"),
        ("frontend.endpoint=ipc:///\udcff", "frontend.endpoint ('ipc:///\\udcff') must name a file"),
        (f"ring.depth={'9' * 5000}", "must be an integer"),
        (f"ring.depth={'[' * 3000}", "must be an integer"),
    ],
)
def test_an_override_that_cannot_work_is_named_with_its_cure(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configure("/nowhere", override)
    assert str(caught.value).startswith(f"--set {override}: ")
    assert message in str(caught.value)


def test_values_that_do_not_fit_together_are_refused_with_both_names() -> None:
    with pytest.raises(ConfigError) as caught:
        configure("/nowhere", "scheduler.max_num_seqs=9000", "scheduler.max_num_batched_tokens=8192")
    assert (
        "scheduler.max_num_batched_tokens (8192) is smaller than scheduler.max_num_seqs (9000): "
        "a full decode step would not fit" in str(caught.value)
    )
    with pytest.raises(ConfigError, match="cannot hold one sequence"):
        configure("/nowhere", "cache.num_blocks=3", "scheduler.max_model_len=49")
    assert configure("/nowhere", "cache.num_blocks=3", "scheduler.max_model_len=48").cache.num_blocks == 3
    varlen = ("model.attention=varlen", "cache.block_size=256")
    assert configure("/nowhere", *varlen).cache.dtype == "auto"
    with pytest.raises(
        ConfigError, match=r'"varlen"\) reads .* not as cache\.dtype \("fp8_e4m3"\): set model\.attention'
    ):
        configure("/nowhere", *varlen, "cache.dtype=fp8_e4m3")


def test_a_template_file_is_looked_for_beside_the_configuration_or_where_the_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, here = tmp_path / "beside", tmp_path / "here"
    for folder in (beside, here):
        folder.mkdir()
        (folder / "chat.jinja").write_text("x")
    (here / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(here)
    file = beside / "engine.toml"
    file.write_text('[model]\npath = "org/model"\n[tokenizer]\nchat_template = "chat.jinja"\n')
    assert load_config(file).tokenizer.chat_template == str(beside / "chat.jinja")
    config = load_config(file, ["tokenizer.chat_template=chat.jinja"])
    assert config.tokenizer.chat_template == str(here / "chat.jinja")
    assert config.model.path == "org/model", "it is no folder beside the file, so it is a hub id"
    assert config_from_toml(to_toml(config), "again", tmp_path).tokenizer == config.tokenizer


def test_errors_of_a_file_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "engine.toml"
    for text, message in (
        ("[model\n", "is not TOML: "),
        ("[ring]\ndepth = 2\n", "model.path is missing"),
        ("model = 3\n", "model (3) must be a section"),
        (f"a = {'9' * 5000}", "is not TOML: "),
        (f"a = {'[' * 3000}", "is not TOML: "),
        ('[model]\npath = "x"\n[ring]\ndepth = 0\n', "ring.depth (0) must lie in [1, 8]"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_config(file)
        assert str(caught.value).startswith(f"{file}: "), caught.value
        assert message in str(caught.value)
    file.write_text("a = 1\nb = = 2\n")
    with pytest.raises(ConfigError, match="line 2"):
        load_config(file)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_config(tmp_path / "missing.toml")
    (tmp_path / "loop.toml").symlink_to("loop.toml")
    with pytest.raises(ConfigError, match="cannot be read: Too many levels"):
        load_config(tmp_path / "loop.toml")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(file)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "engine.toml"
    file.write_text('[model]\npath = "/m"\n', encoding="utf-8-sig")
    assert load_config(file).model.path == "/m"


@pytest.mark.parametrize(
    ("text", "end"),
    [
        (b"[ring]\ndepth = 0\n", "ring.depth (0) must lie in [1, 8]"),
        (b"\xff", "is not UTF-8 text (byte 0), so it is not TOML"),
        (b'[model]\npath = "/none"\n', "there is no such folder"),
        (None, "model.path is missing"),
    ],
)
def test_errors_of_standard_input_name_it(text: bytes | None, end: str) -> None:
    command = [sys.executable, "-m", "pipeline.launch", "--check", "--config", "-"]
    close = "" if text is not None else " <&-"
    done = subprocess.run(
        ["sh", "-c", f'"$@"{close}', "sh", *command], env=module_environment(), input=text, capture_output=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("error: standard input: ")
    assert end in line


def test_a_relative_model_path_starts_where_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("file", "here"):
        (tmp_path / name / "m").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    file = tmp_path / "file" / "engine.toml"
    file.write_text('[model]\npath = "m"\n')
    assert load_config(file).model.path == str(tmp_path / "file" / "m")
    assert load_config(file, ["model.path=m"]).model.path == str(tmp_path / "here" / "m")
    file.write_text('[model]\npath = "organization/name"\n')
    assert load_config(file).model.path == "organization/name"


def test_the_resolved_text_reads_back_as_the_same_configuration() -> None:
    overrides = {"frontend.endpoint": 'ipc:///a "quoted" \\ path', "ring.depth": 3, "cache.memory_share": 0.5}
    config = configure("/nowhere", *override_strings(overrides))
    assert config.ring.depth == 3
    assert config_from_toml(to_toml(config), "text", Path("/")) == config


@pytest.mark.parametrize("name", ["tiny", "8b"])
def test_shipped_configurations_are_valid(name: str) -> None:
    config = load_config(ROOT / "configs" / f"{name}.toml")
    assert config.ring.depth == 2


@pytest.mark.parametrize(
    "endpoint",
    ["", "ipc://relative.sock", "ipc:///folder/", "ipc://@abstract", "ipc:///a\nb", f"ipc:///{'x' * 107}", "tcp://127.0.0.1",
     "tcp://127.0.0.1:0", "tcp://127.0.0.1:65536", "tcp://127.0.0.1:٥٥٥٥", "tcp://no-such-host.example:80", "http://127.0.0.1:80"],
)  # fmt: skip
def test_impossible_endpoints_are_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError):
        check_endpoint(endpoint)


@pytest.mark.parametrize(
    "endpoint", ["ipc:///tmp/x.sock", "tcp://127.0.0.1:80", "tcp://*:80", "tcp://[::1]:80", "tcp://lo:80"]
)
def test_usual_endpoints_are_taken(endpoint: str) -> None:
    check_endpoint(endpoint)


@pytest.mark.parametrize("kind", ["a file", "of two lines", "not of text", "too long", "not there"])
def test_a_runtime_folder_in_which_no_socket_can_be_is_not_taken(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    names = {"of two lines": "a\nb", "not of text": os.fsdecode(b"\xff"), "too long": "x" * 99}
    folder = tmp_path_factory.mktemp("f") / names.get(kind, "x")
    if kind == "a file":
        folder.touch()
    elif kind != "not there":
        folder.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    check_client_endpoint(default_endpoint())
    assert runtime_folder() == Path("/tmp")


def test_the_default_endpoints_folder_is_private_and_removed(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path = tmp_path_factory.mktemp("f")  # a short path: sockets' are bounded
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = Path(default_endpoint().removeprefix("ipc://")).parent
    claim = EndpointClaim(default_endpoint())
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    claim.close()
    assert not folder.exists()
    folder.mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="must be a private folder"):
        EndpointClaim(default_endpoint())


def test_a_refused_claim_leaves_the_holders_folder_alone(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("f")))
    folder = Path(default_endpoint().removeprefix("ipc://")).parent
    claim = EndpointClaim(default_endpoint())  # its socket comes later: the folder is empty
    with pytest.raises(ConfigError, match="in use by another engine"):
        EndpointClaim(default_endpoint())
    assert folder.is_dir()
    claim.close()
    assert not folder.exists()


def test_a_claim_waits_for_the_endpoint_that_a_dying_engine_still_holds(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("f")))
    dying = EndpointClaim(default_endpoint())
    monkeypatch.setattr("pipeline.client.endpoint.time.sleep", lambda _: dying.close())  # with its folder
    claim = EndpointClaim(default_endpoint(), patience_s=60.0)
    assert Path(default_endpoint().removeprefix("ipc://")).parent.is_dir()
    claim.close()


@pytest.mark.parametrize(
    ("endpoint", "reached_at"),
    [
        ("tcp://*:5601", "tcp://127.0.0.1:5601"),
        ("tcp://0.0.0.0:5601", "tcp://127.0.0.1:5601"),
        ("tcp://[::]:5601", "tcp://[::1]:5601"),
        ("tcp://[::1]:5601", "tcp://[::1]:5601"),
        ("ipc:///tmp/*:1/s", "ipc:///tmp/*:1/s"),
    ],
)
def test_a_pipelines_endpoint_for_clients_is_the_loopback_of_a_wildcard(
    endpoint: str, reached_at: str, tmp_path: Path
) -> None:
    (tmp_path / "server.key_secret").touch()
    keys = {"server_key_file": str(tmp_path / "server.key_secret"), "client_keys_folder": str(tmp_path)}
    frontend = {"endpoint": endpoint} | (keys if endpoint.startswith("tcp") else {})
    assert Pipeline({"model": {"path": "/m"}, "frontend": frontend}).endpoint == reached_at


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "[::]", "192.0.2.7", "[2001:db8::7]", "lo", "[::ffff:192.0.2.7]"])
def test_an_endpoint_that_other_machines_reach_is_refused_without_keys(host: str) -> None:
    with pytest.raises(ConfigError, match=r"^config: frontend\.endpoint \(tcp://.*\) .*run `ringfeed keys` and set"):
        config_from_dict({"model": {"path": "/m"}, "frontend": {"endpoint": f"tcp://{host}:5601"}})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "[::1]", "[::ffff:127.0.0.1]"])
def test_an_endpoint_of_this_machine_needs_no_keys(host: str) -> None:
    assert config_from_dict({"model": {"path": "/m"}, "frontend": {"endpoint": f"tcp://{host}:5601"}})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"endpoint": "tcp://*:1", "server_key_file": "f"},
            "server_key_file is given without frontend.client_keys_folder",
        ),
        (
            {"endpoint": "tcp://*:1", "client_keys_folder": "."},
            "client_keys_folder is given without frontend.server_key",
        ),
        ({"server_key_file": "f", "client_keys_folder": "."}, "has no effect with frontend.endpoint (not set)"),
        ({"server_key_file": "g"}, "frontend.server_key_file ('g') must be a file; there is none at"),
        ({"client_keys_folder": "f"}, "frontend.client_keys_folder ('f') must be a folder; there is none at"),
    ],
)
def test_keys_that_would_protect_nothing_are_refused(given: dict[str, str], expected: str, tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(ConfigError) as raised:
        config_from_dict({"model": {"path": "/m"}, "frontend": given}, folder=tmp_path)
    assert expected in str(raised.value)


def test_an_endpoint_is_not_taken_from_a_file_or_a_stranger(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="is a file and not a socket"):
        EndpointClaim(f"ipc://{path}")
    assert path.read_text() == "precious"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(str(path))
        stranger.listen()
        with pytest.raises(ConfigError, match="in use by another process"):
            EndpointClaim(f"ipc://{path}")
    claim = EndpointClaim(f"ipc://{path}")  # a dead engine's leftovers do not disturb the next engine
    with pytest.raises(ConfigError, match="in use by another engine"):
        EndpointClaim(f"ipc://{tmp_path}/../{tmp_path.name}/s")
    claim.close()
    assert not path.exists()


def test_a_models_facts_are_read_from_its_json(tmp_path: Path) -> None:
    nested = {"text_config": {"vocab_size": 7, "max_position_embeddings": 9}, "eos_token_id": 3}
    facts = find_model(configure(make_model(tmp_path / "m", nested)))
    assert (facts.vocab_size, facts.max_model_len, facts.eos_token_ids, facts.name) == (7, 9, [3], "m")
    make_model(tmp_path / "m", nested, generation_config__json={"eos_token_id": [4, 5]})
    facts = find_model(configure(tmp_path / "m", "scheduler.max_model_len=5"))
    assert (facts.eos_token_ids, facts.max_model_len) == ([4, 5], 5)


@pytest.mark.parametrize(
    ("content", "packages"), [(b"\n\x0e\n\x05<unk>", "sentencepiece protobuf"), (b"IQ== 0\nIg== 1\n", "tiktoken")]
)
def test_a_tokenizer_that_takes_more_packages_names_them_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, packages: str
) -> None:
    folder = make_model(tmp_path / "m")
    (folder / "tokenizer.model").write_bytes(content)
    find_model(configure(folder))  # tokenizer.json will do
    (folder / "tokenizer.json").unlink()
    monkeypatch.setattr("pipeline.engine.model_files._is_installed", lambda package: False)
    with pytest.raises(ConfigError) as caught:
        find_model(configure(folder))
    assert f"tokenizer.model needs packages that are not installed: pip install {packages}, or" in str(caught.value)
    monkeypatch.setattr("pipeline.engine.model_files._is_installed", lambda package: True)
    find_model(configure(folder))


@pytest.mark.parametrize("name", ["vocab.json", "tekken.json"])
def test_files_of_which_transformers_makes_a_tokenizer_do_without_tokenizer_json(tmp_path: Path, name: str) -> None:
    folder = make_model(tmp_path / "m")
    (folder / "tokenizer.json").rename(folder / name)
    find_model(configure(folder))


def test_a_model_that_cannot_be_run_is_refused_before_anything_starts(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")

    def refusal(*overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            find_model(configure(folder, *overrides))
        return str(caught.value)

    assert "than the model allows (64 positions)" in refusal("scheduler.max_model_len=65")
    assert "lacks weights (model.safetensors)" in refusal("model.load_format=safetensors")
    assert "cannot hold one sequence" in refusal("cache.num_blocks=3")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    (folder / "1.safetensors").touch()
    assert "lacks weights (2.safetensors)" in refusal("model.load_format=safetensors")
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer" in refusal()
    (folder / "config.json").write_text("{")
    assert "cannot be read" in refusal()
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal()
    folder = tmp_path / "missing"
    assert "there is no such folder" in refusal()
    make_model(folder := tmp_path / "many", {**MODEL, "eos_token_id": list(range(9))})
    assert "lists 9 ids" in refusal()
    make_model(folder, {**MODEL, "eos_token_id": 10**20})
    assert "eos_token_id (100000000000000000000) must be a token id" in refusal()
    (folder / "config.json").write_text('{"a": ' + "[" * 100_000)
    assert "cannot be read" in refusal()


@pytest.mark.parametrize("value", [0, -1, "12", 1.5, True, {}, 10**30])
@pytest.mark.parametrize("key", ["vocab_size", "num_hidden_layers", "n_head", "head_dim", "max_position_embeddings"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_size_that_no_model_can_have_is_named_with_its_value(
    key: str, value: Any, nested: bool, tmp_path: Path
) -> None:
    config = {**MODEL, key: value}
    folder = make_model(tmp_path / "m", {"text_config": config} if nested else config)
    with pytest.raises(ConfigError) as caught:
        find_model(configure(folder))
    assert str(caught.value) == (
        f"model.path ({str(folder)!r}): {key} ({value!r}) in config.json must be an integer from 1 to 2147483647"
    )


def test_sizes_that_a_model_leaves_open_or_has_for_each_layer_are_taken(tmp_path: Path) -> None:
    config = {**MODEL, "head_dim": None, "intermediate_size": [8, 16], "num_hidden_layers": 2}
    assert find_model(configure(make_model(tmp_path / "m", config))).vocab_size == 32


LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48}


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 256),
        ({"rope_scaling": {"type": "linear", "factor": 1.5}}, 96),
        ({"rope_parameters": {"rope_theta": 1e4, **LINEAR}}, 256),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 256),
        ({"rope_scaling": YARN}, 192),
        ({"rope_scaling": {**YARN, "rope_type": "llama3"}}, 192),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 16}}, 64),  # the factor is in the length already
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 8}}, 64),  # as in Llama 3.1: 8 x 8192 in 131072
        ({"rope_parameters": {"sliding_attention": {"rope_type": "default"}, "full_attention": LINEAR}}, 64),
        ({"rope_parameters": {"sliding_attention": LINEAR, "full_attention": YARN}}, 192),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, 64),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, 64),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4}}, 256),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, 64),
        ({"rope_scaling": {"rope_type": "default", "factor": "4"}}, 64),  # not read
        ({"rope_scaling": None}, 64),
        ({"rope_scaling": "linear"}, 64),
    ],
)
def test_a_rope_factor_multiplies_the_length_that_a_model_was_trained_for(
    rope: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "m", {**MODEL, **rope})
    assert find_model(configure(folder)).max_model_len == expected
    assert find_model(configure(folder, f"scheduler.max_model_len={expected}")).max_model_len == expected
    with pytest.raises(ConfigError, match=rf"larger than the model allows \({expected} positions\)"):
        find_model(configure(folder, f"scheduler.max_model_len={expected + 1}"))


@pytest.mark.parametrize("value", [0, -2, "4", True, float("nan"), float("inf"), 10**400], ids=lambda v: f"{v}"[:9])
@pytest.mark.parametrize("key", ["factor", "original_max_position_embeddings"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_rope_value_that_no_model_can_compute_with_is_named(
    key: str, value: Any, nested: bool, tmp_path: Path
) -> None:
    rope = {**YARN, key: value}
    declared = {"rope_parameters": {"full_attention": rope}} if nested else {"rope_scaling": rope}
    with pytest.raises(ConfigError, match=rf"{key} \(.*\) of RoPE in config\.json must be a number above 0"):
        find_model(configure(make_model(tmp_path / "m", {**MODEL, **declared})))


@pytest.mark.parametrize(
    "declared", [{"max_position_embeddings": 2**31 - 1}, {"rope_scaling": {"rope_type": "linear", "factor": 1e8}}]
)
def test_a_model_of_more_positions_than_any_sequence_can_have_needs_a_length(
    declared: dict[str, Any], tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "m", {**MODEL, **declared})
    with pytest.raises(ConfigError, match=r"max_model_len is missing, and .* gives 2147483647 positions"):
        find_model(configure(folder))
    assert find_model(configure(folder, "scheduler.max_model_len=100")).max_model_len == 100


GEMMA_3 = {  # a published config.json, its numbers made small: the text part leaves much to transformers' defaults
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "text_config": {
        "model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "sliding_window": 16, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 32, "num_hidden_layers": 1},
}  # fmt: skip


def test_what_config_json_leaves_to_transformers_defaults_is_asked_of_transformers(tmp_path: Path) -> None:
    facts = find_model(configure(make_model(tmp_path / "m", GEMMA_3)))
    assert (facts.vocab_size, facts.max_model_len, facts.eos_token_ids) == (262_208, 131_072, [1, 106])


def test_quantised_weights_are_refused_before_anything_starts(tmp_path: Path) -> None:
    declared = {**MODEL, "model_type": "llama", "quantization_config": {"quant_method": "modelopt"}}  # unknown to it
    folder = make_model(tmp_path / "m", declared)
    (folder / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"quant_method 'modelopt'\), which transformers .* does not know"):
        find_model(configure(folder, "model.load_format=safetensors"))
    assert find_model(configure(folder)).vocab_size == 32  # random weights are not quantised


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "it holds an adapter: merge that into its base model"),
        (["model.Q4_K_M.gguf"], "it holds GGUF files, which are not read"),
        (["model-00001-of-00002.safetensors"], "parts of the weights without their index: download model.safet"),
        (["model.fp16.safetensors"], "only model.safetensors, or the files that"),
        (["consolidated.safetensors"], "only model.safetensors, or the files that"),
        (["pytorch_model.bin"], "it holds PyTorch's .bin files, which are not read: save the model as safetensors"),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], "it holds PyTorch's .bin files"),
        (["snapshots/abc/config.json"], "it is a folder of the hub's cache: give the hub id, or the folder in its"),
        (["checkpoint-500/config.json"], "give the folder in it that holds the model"),
    ],
)
@pytest.mark.parametrize("has_config", [True, False])
def test_a_folder_without_what_is_read_is_told_by_what_it_holds_instead(
    held: list[str], said: str, has_config: bool, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "m")
    for name in held:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    if not has_config:
        (folder / "config.json").unlink()
    with pytest.raises(ConfigError) as caught:
        find_model(configure(folder, "model.load_format=safetensors"))
    assert said in str(caught.value)
    assert ("the folder lacks weights (model.safetensors)" if has_config else "has no config.json") in str(caught.value)


def test_weights_whose_link_leads_nowhere_are_to_be_downloaded_again(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("../../blobs/gone")
    with pytest.raises(ConfigError, match=r"lacks weights \(model\.safetensors\): download the model again$"):
        weight_files(tmp_path)


def test_a_path_to_a_file_is_refused_as_that(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(ConfigError, match=r"model\.gguf'\) is a file: give the folder"):
        find_model(configure(file))


@pytest.mark.parametrize(
    ("method", "name"), [("iterdir", "m"), ("is_file", "tokenizer.json"), ("read_bytes", "tokenizer.model")]
)
def test_a_part_of_the_folder_that_may_not_be_looked_at_is_named(
    method: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(tmp_path / "m")
    config = configure(folder)
    if name == "tokenizer.model":
        (folder / "tokenizer.json").rename(folder / name)
    permitted = getattr(Path, method)

    def refuse(path: Path) -> Any:
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return permitted(path)

    monkeypatch.setattr(Path, method, refuse)
    with pytest.raises(ConfigError, match=rf"model\.path: '\S*/{name}' cannot be read: Permission denied"):
        find_model(config)


@pytest.mark.parametrize("names", [[""], [5], ["a\nb"], [None, "a"]])
def test_an_index_that_lists_no_files_is_refused(names: list[Any], tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {str(i): name for i, name in enumerate(names)}}))
    with pytest.raises(ConfigError, match=r"index\.json has no weight_map that lists files$"):
        weight_files(tmp_path)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1234\n"


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
     "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model", "tekken.json",
     "tiktoken.model", "model.safetensors", "model.safetensors.index.json", "model-00002-of-00002.safetensors",
     "hf_quant_config.json"],
)  # fmt: skip
def test_a_file_that_is_only_a_git_lfs_pointer_is_named_with_the_cure(name: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    shards = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    if name == "model.safetensors":
        (folder / name).touch()
    else:
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": dict(zip("ab", shards, strict=True))})
        )
        for shard in shards:
            (folder / shard).touch()
    find_model(configure(folder, "model.load_format=safetensors"))
    (folder / name).write_text(POINTER)
    with pytest.raises(ConfigError) as caught:
        find_model(configure(folder, "model.load_format=safetensors"))
    assert f"{name} is only a Git LFS pointer to the file: run `git lfs pull` in that folder" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pointer_to_what_is_not_read_does_no_harm(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "picture.png"):
        (folder / name).write_text(POINTER)
    (folder / "model.safetensors").touch()
    find_model(configure(folder, "model.load_format=safetensors"))
    (folder / "model.safetensors").write_text(POINTER)
    find_model(configure(folder))  # random weights, without files


def test_whole_weights_are_read_whatever_an_index_beside_them_says(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    index = folder / "model.safetensors.index.json"
    (folder / "model.safetensors").touch()
    for content in ('{"weight_map": {"a": "gone.safetensors"}}', "{", POINTER):
        index.write_text(content)
        find_model(configure(folder, "model.load_format=safetensors"))
        assert weight_files(folder) == [folder / "model.safetensors"]


@pytest.mark.parametrize("value", ["llama", [1], 5])
def test_a_text_config_that_is_none_is_refused(value: Any, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", {**MODEL, "text_config": value})
    with pytest.raises(ConfigError, match=r"text_config \(.*\) in config\.json must be an object"):
        find_model(configure(folder))


def test_a_hub_id_that_is_not_here_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def nothing(*_: Any, **kwargs: Any) -> str:
        raise LocalEntryNotFoundError("no\nnetwork") if kwargs.get("local_files_only") else OSError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing)
    for download in (False, True):
        with pytest.raises(ModelNotHere) as caught:
            find_model(configure("organization/name"), download=download)
        assert "('organization/name') is neither a folder nor in the local Hugging Face cache" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_missing_cuda_is_said_before_the_model_is_looked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model_files, "_cuda_missing", lambda: "no CUDA driver is installed here")
    config, said = ["--config", str(ROOT / "configs" / "8b.toml")], 'model.device ("cuda"): no CUDA driver is installed'
    assert main(config) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
    assert main([*config, "--check"]) == 0
    assert f"note: {said}" in capsys.readouterr().err


def test_check_prints_what_would_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "engine.toml"
    make_model(tmp_path / "m")
    file.write_text('[model]\npath = "m"\nload_format = "dummy"\n')
    assert main(["--config", str(file), "--set", "ring.depth=4", "--check"]) == 0
    resolved = config_from_toml(capsys.readouterr().out, "output", Path("/"))
    assert resolved.scheduler.max_model_len == 64
    assert resolved.ring.depth == 4
    assert resolved.frontend.endpoint == default_endpoint()


@pytest.mark.parametrize(
    ("output", "error"),
    [("/dev/full", "error: the output cannot be written: No space left on device\n"), ("a closed pipe", "")],
)
def test_output_that_nobody_takes_is_no_traceback(output: str, error: str) -> None:
    if output == "/dev/full":
        target = os.open(output, os.O_WRONLY)
    else:
        reader, target = os.pipe()
        os.close(reader)
    command = [sys.executable, "-m", "pipeline.launch", "--config", str(ROOT / "configs" / "tiny.toml"), "--check"]
    done = subprocess.run(
        command, env=module_environment(), stdout=target, stderr=subprocess.PIPE, text=True, timeout=60, check=False
    )
    os.close(target)
    assert (done.returncode, done.stderr) == (1, error)


def test_the_command_line_answers_a_bad_configuration_with_status_2_and_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.launch", "--config", str(tmp_path / "none.toml")]
    done = subprocess.run(command, env=module_environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}/none.toml: cannot be read: No such file or directory\n"


@pytest.mark.parametrize("source", ["the file", "the command line"])
def test_a_model_that_is_not_there_is_put_down_to_whoever_named_it(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, missing, overridden = tmp_path / "engine.toml", tmp_path / "missing", source == "the command line"
    make_model(tmp_path / "m")
    file.write_text(f'[model]\npath = "{"m" if overridden else "./missing"}"\nload_format = "dummy"\n')
    override = f"model.path={missing}"
    assert main(["--config", str(file), "--check", *(["--set", override] if overridden else [])]) == 2
    origin = f"--set {override}" if overridden else str(file)
    assert capsys.readouterr().err.startswith(f"error: {origin}: model.path ('{missing}'): there is no such folder")


@pytest.mark.parametrize("is_overridden", [False, True])
def test_a_pipeline_names_the_origin_of_what_only_the_launcher_finds_wrong(is_overridden: bool, tmp_path: Path) -> None:
    file = tmp_path / "engine.toml"
    file.write_text('[model]\npath = "./missing"\n')
    override = f"model.path={tmp_path}/missing"
    with pytest.raises(ConfigError) as caught:
        Pipeline(file, override if is_overridden else ()).start()
    origin = f"--set {override}" if is_overridden else str(file)
    assert str(caught.value).startswith(f"{origin}: model.path ('{tmp_path}/missing'): there is no such folder")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("overrides", ["ring.depth=3", ["ring.depth=3"], {"ring.depth": 3}])
def test_a_pipeline_takes_one_override_or_several(overrides: Any) -> None:
    assert Pipeline({"model": {"path": "/m"}}, overrides).config.ring.depth == 3


def test_every_key_has_a_value_of_its_declared_type() -> None:
    config = configure("/nowhere")
    assert msgspec.convert(msgspec.to_builtins(config), Config) == config

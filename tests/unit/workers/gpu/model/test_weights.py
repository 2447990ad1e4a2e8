"""Weights go to their device tensor by tensor, and arrive as plain transformers would have them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from ipc.errors import ConfigError
from tests.reference.tiny_models import FAMILIES, make_tiny_config, make_tiny_model
from workers.gpu.model.weight_files import weight_files
from workers.gpu.model.weights import LoadReport, make_blank, read_weights

ROOT = Path(__file__).parents[5]
CPU = torch.device("cpu")
MIB = 1 << 20


def read(folder: Path, dtype: str = "auto", device: torch.device = CPU) -> tuple[Any, LoadReport]:
    blank = make_blank(AutoConfig.from_pretrained(folder))
    return read_weights(weight_files(folder), blank, dtype, device, lambda *_: None)


def tensors(model: Any) -> dict[str, torch.Tensor]:
    """All of them, by every name that they have, with the buffers that no file holds."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return named | dict(model.named_buffers(remove_duplicate=False))


def assert_as_transformers_loads_it(folder: Path, dtype: str = "auto") -> Any:
    model, report = read(folder, dtype)
    expected = tensors(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True))
    found = tensors(model)
    assert report == LoadReport(report.read, missing=[], unexpected=[], mismatched=[], narrow={})
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_and_buffer_is_as_transformers_loads_it(family: str, tmp_path: Path) -> None:
    assert_as_transformers_loads_it(make_tiny_model(family, tmp_path))


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "qwen3_moe"])
def test_weights_are_converted_to_the_dtype_that_is_asked_for(family: str, tmp_path: Path) -> None:
    model = assert_as_transformers_loads_it(make_tiny_model(family, tmp_path), "bfloat16")
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_without_a_declared_dtype_it_is_that_of_the_file(tmp_path: Path) -> None:
    config = make_tiny_config("llama")
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(tmp_path)
    plain = json.loads((tmp_path / "config.json").read_text())
    del plain["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(plain))
    assert assert_as_transformers_loads_it(tmp_path).dtype == torch.float16


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_checkpoint_in_shards_is_read_from_all_of_them(family: str, tmp_path: Path) -> None:
    whole = make_tiny_model(family, tmp_path / "whole")
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(weight_files(tmp_path / "sharded")) > 3
    model = assert_as_transformers_loads_it(tmp_path / "sharded")
    assert all(torch.equal(tensor, tensors(model)[name]) for name, tensor in tensors(read(whole)[0]).items())


def test_tied_embeddings_stay_one_tensor(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path, tie_word_embeddings=True)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    model = assert_as_transformers_loads_it(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_weights_outlive_their_file(tmp_path: Path) -> None:
    """A mapping would not notice it: on the CPU a cut file would end the process."""
    folder = make_tiny_model("llama", tmp_path)
    model, _ = read(folder)
    before = {name: tensor.clone() for name, tensor in tensors(model).items()}
    (folder / "model.safetensors").write_bytes(b"")
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(model).items())


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    make_tiny_config("llama").save_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "1.safetensors"}}')
    with pytest.raises(ConfigError, match=r"lacks weights \(1\.safetensors\)"):
        weight_files(tmp_path)
    index.write_text("[]")
    with pytest.raises(ConfigError, match="has no weight_map"):
        weight_files(tmp_path)


HOLD_NOTHING_BACK = {"MALLOC_MMAP_THRESHOLD_": str(MIB)}  # else glibc keeps freed tensors for later ones
MEASURE = """
import sys, torch
from pathlib import Path
from transformers import AutoConfig
from workers.gpu.model.weights import _StoredTensor, make_blank, read_weights
from workers.gpu.model.weight_files import weight_files
from tests.reference.tiny_models import make_tiny_config, make_tiny_model

def resident(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))

def load(folder, dtype, device):
    blank = make_blank(AutoConfig.from_pretrained(folder))
    read_weights(weight_files(Path(folder)), blank, dtype, torch.device(device), lambda *_: None)

def send(self, device=None, dtype=None):
    self._device = torch.device("cpu")
    return on_host(self, device, dtype).to("meta")

torch.set_num_threads(1)
small, folder, dtype, device = sys.argv[1:]
if device == "meta":  # a copy to it reads nothing: make it read, as one to a device with memory does
    on_host, _StoredTensor.to = _StoredTensor.to, send
load(small, dtype, device)  # what the first load costs beside the weights
before = resident("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins here
load(folder, dtype, device)
print(resident("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """A small model, one of some hundred MiB in tensors of up to 16, and the bytes of the latter's weights."""
    folder = tmp_path_factory.mktemp("models")
    big = make_tiny_model(
        "llama", folder / "big", vocab_size=4096, hidden_size=1024, intermediate_size=4096, num_hidden_layers=5,
        num_attention_heads=8, num_key_value_heads=8, initializer_range=0.02,
    )  # fmt: skip
    yield make_tiny_model("llama", folder / "small"), big, (big / "model.safetensors").stat().st_size
    (big / "model.safetensors").unlink()


@pytest.mark.parametrize(("dtype", "device", "share"), [("float32", "cpu", 1.0), ("bfloat16", "cpu", 0.5),
                                                        ("float32", "meta", 0.0)])  # fmt: skip
def test_the_host_holds_no_more_than_a_few_tensors_besides_what_stays_there(
    dtype: str, device: str, share: float, models: tuple[Path, Path, int]
) -> None:
    """`share`: of the file, what the device's tensors take of the host. The meta device stands for one with its own."""
    small, big, file_bytes = models
    assert file_bytes > 300 * MIB
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(big), dtype, device],
        cwd=ROOT, env=os.environ | HOLD_NOTHING_BACK, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    growth = int(done.stdout)
    # Four threads with a tensor of 16 MiB each, as it is in the file and as it is asked for; and slack.
    assert share * file_bytes - 20 * MIB < growth < share * file_bytes + 128 * MIB, f"{growth / MIB:.0f} MiB"

"""Weights straight to the GPU, what the memory is counted to hold, and what is said when it does not suffice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from ipc.records import StepShape
from pipeline.environment.module_search import module_environment
from tests.reference.executor_engine import executor_engine
from tests.reference.quantised_checkpoints import make_pair, mxfp4
from tests.reference.tiny_models import make_tiny_model
from tests.unit.workers.gpu.model.formats.test_formats import IN_4_BITS, KEPT, PLAIN
from tests.unit.workers.gpu.model.test_weights import HOLD_NOTHING_BACK, MEASURE, MIB
from workers.gpu.config import CacheConfig, ModelConfig
from workers.gpu.execution.buckets import Buckets
from workers.gpu.memory.account import bytes_taken, reserved_bytes
from workers.gpu.model.loader import load_config, load_model, load_weights
from workers.gpu.model.weight_files import weight_files
from workers.gpu.model.weights import make_blank, read_weights
from workers.gpu.products.int4 import from_int4
from workers.gpu.products.product import Product, replace_linears

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
TINY_CONFIG = ROOT / "configs" / "tiny.toml"

RUN = """
import sys, torch
from ipc.records import StepShape
from tests.reference.gpu_process import gpu_process
from workers.gpu.config import ModelConfig
from workers.gpu.worker import run

torch.cuda.set_per_process_memory_fraction(int(sys.argv[2]) / torch.cuda.mem_get_info()[1])
shape = StepShape(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64, block_size=16)
with gpu_process(ModelConfig(path=sys.argv[1], device="cuda"), shape) as engine:
    run(engine.process, engine.bootstrap)
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 600 MiB of float32 weights, in tensors of up to 32 MiB."""
    return make_tiny_model(
        "llama", tmp_path_factory.mktemp("model") / "big", vocab_size=4096, hidden_size=1024, intermediate_size=8192,
        num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=8, head_dim=128, initializer_range=0.02,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_pass_through_a_few_tensors_of_host_memory(dtype: str, big: Path, tmp_path: Path) -> None:
    small = make_tiny_model("llama", tmp_path)
    file_bytes = (big / "model.safetensors").stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(big), dtype, "cuda"],
        cwd=ROOT, env=os.environ | HOLD_NOTHING_BACK, capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    growth = int(done.stdout)
    assert growth < 256 * MIB < file_bytes / 2, f"{growth / MIB:.0f} of {file_bytes / MIB:.0f} MiB"


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_weights_on_the_gpu_are_those_on_the_cpu(dtype: str, tmp_path: Path) -> None:
    for family in ("llama", "qwen3_moe", "gpt_oss"):
        folder = make_tiny_model(family, tmp_path / family)
        files, config = weight_files(folder), AutoConfig.from_pretrained(folder)
        on_cpu, on_gpu = (
            read_weights(files, make_blank(config), dtype, torch.device(device), lambda *_: None)[0]
            for device in ("cpu", "cuda")
        )
        tensors = {**dict(on_gpu.named_parameters()), **dict(on_gpu.named_buffers())}
        for name, tensor in {**dict(on_cpu.named_parameters()), **dict(on_cpu.named_buffers())}.items():
            assert tensors[name].is_cuda, name
            assert torch.equal(tensors[name].cpu(), tensor), name


@pytest.mark.parametrize("name", [*KEPT, *PLAIN, "mxfp4"])
def test_quantised_weights_are_dequantised_on_the_gpu_as_on_the_cpu(name: str, tmp_path: Path) -> None:
    if name == "mxfp4":
        stored, plain = make_pair(tmp_path, mxfp4, {"quant_method": "mxfp4"}, "gpt_oss", "_proj")
    else:
        stored, plain = make_pair(tmp_path, *(KEPT | PLAIN)[name])
    models = [
        load_weights(
            ModelConfig(path=str(folder), device=str(device), dtype="bfloat16"), load_config(str(folder)), device,
            lambda *_: None,
        )
        for folder, device in ((stored, torch.device("cuda", 0)), (plain, torch.device("cpu")))
    ]  # fmt: skip
    on_gpu, expected = (model.state_dict() for model in models)
    for each, tensor in expected.items():
        assert on_gpu[each].is_cuda, each
        assert torch.equal(on_gpu[each].cpu(), tensor), each
    if name in IN_4_BITS:
        replace_linears([models[0]])
        products = {each: module for each, module in models[0].named_modules() if isinstance(module, Product)}
        assert any(product.scale is not None for product in products.values())
        for each, product in products.items():
            if product.scale is not None:
                wide = from_int4(product.weight, product.scale, torch.bfloat16)
                assert torch.equal(wide.cpu(), expected[f"{each}.weight"])
    if name in KEPT:
        file = load_file(stored / "model.safetensors")
        replace_linears([models[0]])
        for each, product in models[0].named_modules():
            if isinstance(product, Product) and product.scale is not None:
                assert torch.equal(product.weight.cpu().view(torch.uint8), file[f"{each}.weight"].view(torch.uint8))


@pytest.mark.parametrize(("limit_mib", "stage"), [(200, "loading weights"), (2000, "allocating the KV cache")])
def test_a_gpu_process_that_runs_out_of_memory_says_where_and_with_what_numbers(
    limit_mib: int, stage: str, big: Path
) -> None:
    """The limit is torch's own: the GPU says that more is free, which is why the cache is sized for all of it."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(big), str(limit_mib * MIB)],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ipc.errors.ConfigError: out of memory while {stage}"), last
    assert "GiB are free on cuda" in last
    assert "tried to allocate" in last


def test_more_blocks_than_the_gpu_holds_end_the_launcher_with_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.launch", "--config", str(TINY_CONFIG), "--set", "model.device=cuda",
         "--set", "cache.num_blocks=100000000"],
        env=module_environment(), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "ERROR launcher" in line]
    assert "cache.num_blocks (100000000) blocks of" in line
    assert "at most" in line


def test_graphs_take_no_more_than_is_left_for_them(big: Path) -> None:
    from workers.gpu.device.cuda import CudaDevice

    shape = StepShape(max_num_seqs=32, max_num_batched_tokens=2048, max_model_len=256, block_size=16)
    device = CudaDevice()
    with torch.inference_mode():
        loaded = load_model(
            ModelConfig(path=str(big), dtype="bfloat16"), CacheConfig(num_blocks=256), shape, device.torch_device,
            lambda *_: None,
        )  # fmt: skip
    left = reserved_bytes(
        shape, 5, loaded.runner.vocab_size, loaded.memory.largest_step, device.torch_device, captures=True
    )
    with executor_engine(device, loaded.runner, shape, 2, 256, Buckets(shape)) as engine:
        taken = bytes_taken(device.torch_device, lambda: engine.executor.warm_up(lambda _: None))
    assert 0 < taken < left, f"{taken / MIB:.0f} MiB taken, {left / MIB:.0f} left"

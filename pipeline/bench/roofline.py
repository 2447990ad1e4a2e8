"""Computes lower bounds of a step's time, from the bytes it reads and the products it computes, over measured rates.

Arithmetic only; the rates come from `workers/gpu/profiling/device_rates.py`. No step can be faster than two bounds (the
roofline model of Williams, Waterman and Patterson, 2009):

- the floor: all weights that the step uses and the KV of its sequences, read once each;
- the roofline: the same operation by operation (projections, attention, head), each of them the longer of its bytes
  over the read rate and its floating-point operations over the matrix rate. It is the bound for large batches.

The bytes are those of the formats: the decoder layers' weights (`model.quantization`) and the KV cache (`cache.dtype`)
may be smaller than the head's values. A product of few rows multiplies at the 16-bit rate, because it converts its
weights; a product of many rows with fp8 weights multiplies at the fp8 rate. Attention multiplies at the 16-bit rate.

Activations are left out, because they may stay in the device's caches, and so is the row of the embedding that each
token looks up. Both would raise the bounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from ipc.errors import ConfigError
from workers.gpu.products.plan import MAX_ROWS

_FAMILIES: Final = ("llama", "mistral", "qwen2", "qwen3")  # families with the same projections and full attention
_BYTES_PER_VALUE: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
_FP8_SPEED: Final = 2.0  # times the 16-bit matrix rate, on devices whose fp8 rate was not measured


@dataclass(frozen=True)
class Rates:
    """The device's measured rates: bytes per second read from memory, floating-point operations per second in
    products of 16 bits (32 on the CPU) and of fp8. `fp8_flops_per_s` None: taken as twice the other."""

    read_bytes_per_s: float
    matrix_flops_per_s: float
    fp8_flops_per_s: float | None = None

    @staticmethod
    def of(measured: Mapping[str, Any]) -> Rates:
        """Read the report of `workers/gpu/profiling/device_rates.py`."""
        return Rates(
            measured["read_bytes_per_s"], measured["matrix_flops_per_s"], measured.get("fp8_matrix_flops_per_s")
        )

    def flops_per_s(self, in_fp8: bool) -> float:
        """Return the matrix rate of products whose both sides are fp8, or of 16-bit ones."""
        if not in_fp8:
            return self.matrix_flops_per_s
        return self.fp8_flops_per_s or _FP8_SPEED * self.matrix_flops_per_s


@dataclass(frozen=True)
class WeightFormat:
    """How the weights of a layer's products are stored.

    Args:
        bits: of one weight.
        scale_bytes_per_output: of the scales that belong to an output channel.
        multiplies_in_fp8: whether products of many rows do.
    """

    bits: int
    scale_bytes_per_output: int = 0
    multiplies_in_fp8: bool = False

    def num_bytes(self, num_inputs: int, num_outputs: int) -> int:
        """Return the bytes of the weights and scales of one product."""
        return num_inputs * num_outputs * self.bits // 8 + num_outputs * self.scale_bytes_per_output


_QUANTIZED: Final = {"fp8": WeightFormat(bits=8, scale_bytes_per_output=4, multiplies_in_fp8=True)}
_KV_BYTES: Final = {"fp8_e4m3": 1}


@dataclass(frozen=True)
class StepWork:
    """The numbers that determine the cost of one step.

    Args:
        num_tokens: tokens that run through the layers.
        num_outputs: sequences whose next token is sampled: only theirs run through the head.
        num_kv_read: KV entries that attention reads: the lengths of all sequences after the step, summed.
        num_attended: pairs of a token and a KV entry that it attends to, itself included.
    """

    num_tokens: int
    num_outputs: int
    num_kv_read: int
    num_attended: int

    @staticmethod
    def decode(num_seqs: int, length: int) -> StepWork:
        """Return a step with one token of each sequence; all sequences have `length` tokens after it."""
        return StepWork(num_seqs, num_seqs, num_seqs * length, num_seqs * length)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder of the llama family."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    bytes_per_value: int  # of the head's weights
    layer_weights: WeightFormat  # of the products in the decoder layers
    bytes_per_kv_value: int

    @staticmethod
    def from_config(
        config: Mapping[str, Any], dtype: str = "auto", quantization: str = "none", cache_dtype: str = "auto"
    ) -> ModelShape:
        """Read the sizes from a model's config.json. The others are as `model.dtype`, `model.quantization` and
        `cache.dtype`.

        Raises ConfigError for a model that does not read all its weights and all its KV in every step, or that these
        few numbers do not describe.
        """
        text = config.get("text_config") or config
        family = text.get("model_type")
        if family not in _FAMILIES:
            raise ConfigError(f"no floor is known for models of type {family!r}: only for {', '.join(_FAMILIES)}")
        if text.get("sliding_window") and text.get("use_sliding_window", True):
            raise ConfigError(f"no floor is known for {family} models with a sliding window: not all KV is read")
        if dtype == "auto":
            dtype = str(text.get("dtype") or text.get("torch_dtype") or "float32")
        if dtype not in _BYTES_PER_VALUE:
            raise ConfigError(f"no floor is known for weights of dtype {dtype!r}")
        if config.get("quantization_config") or text.get("quantization_config"):
            raise ConfigError("no floor is known for weights that the model's own config.json declares as quantised")
        if quantization not in ("none", *_QUANTIZED):
            raise ConfigError(f"no floor is known for model.quantization = {quantization!r}")
        if cache_dtype not in ("auto", *_KV_BYTES):
            raise ConfigError(f"no floor is known for cache.dtype = {cache_dtype!r}")
        bytes_per_value = _BYTES_PER_VALUE[dtype]
        weights = _QUANTIZED.get(quantization, WeightFormat(bits=8 * bytes_per_value))
        if dtype != "bfloat16":  # the engine multiplies in fp8 only for bfloat16 activations
            weights = replace(weights, multiplies_in_fp8=False)
        num_heads = text["num_attention_heads"]
        return ModelShape(
            hidden_size=text["hidden_size"],
            intermediate_size=text["intermediate_size"],
            num_layers=text["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=text.get("num_key_value_heads") or num_heads,
            head_dim=text.get("head_dim") or text["hidden_size"] // num_heads,
            vocab_size=text["vocab_size"],
            bytes_per_value=bytes_per_value,
            layer_weights=weights,
            bytes_per_kv_value=_KV_BYTES.get(cache_dtype, bytes_per_value),
        )

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of the weights that every step uses: all projections, and the head (read once, tied or
        not)."""
        return self.num_layers * sum(self.product_bytes().values()) + self.head_bytes

    @property
    def head_bytes(self) -> int:
        return self.bytes_per_value * self.hidden_size * self.vocab_size

    @property
    def kv_bytes_per_token(self) -> int:
        return self.bytes_per_kv_value * 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def product_bytes(self) -> dict[str, int]:
        """Return the bytes of weights and scales of one layer's products by name, in the order of their computation."""
        return {name: self.layer_weights.num_bytes(*sizes) for name, sizes in self._projections().items()}

    def flops(self, work: StepWork) -> int:
        """Return the floating-point operations of a step's products: two per multiply-add."""
        return sum(operation.flops for operation in self._operations(work))

    def matrix_s(self, work: StepWork, rates: Rates) -> float:
        """Return the seconds to compute a step's products, each at the matrix rate of its format."""
        return sum(operation.matrix_s(rates) for operation in self._operations(work))

    def floor_s(self, work: StepWork, rates: Rates) -> float:
        """Return the seconds to read the weights and the KV once."""
        return (self.weight_bytes + self.kv_bytes_per_token * work.num_kv_read) / rates.read_bytes_per_s

    def roofline_s(self, work: StepWork, rates: Rates) -> float:
        """Return the sum over operations of the longer of reading and computing, in seconds."""
        return sum(
            max(operation.num_bytes / rates.read_bytes_per_s, operation.matrix_s(rates))
            for operation in self._operations(work)
        )

    def _operations(self, work: StepWork) -> Iterator[_Operation]:
        """Return the operations of a step. One operation stands for the same one in all layers."""
        in_fp8 = self.layer_weights.multiplies_in_fp8 and work.num_tokens > MAX_ROWS
        for num_inputs, num_outputs in self._projections().values():
            num_bytes = self.layer_weights.num_bytes(num_inputs, num_outputs)
            flops = 2 * work.num_tokens * num_inputs * num_outputs
            yield _Operation(self.num_layers * num_bytes, self.num_layers * flops, in_fp8)
        attention_flops = 4 * self.num_heads * self.head_dim * work.num_attended  # scores, weighted sum
        yield _Operation(self.kv_bytes_per_token * work.num_kv_read, self.num_layers * attention_flops)
        yield _Operation(self.head_bytes, 2 * work.num_outputs * self.hidden_size * self.vocab_size)

    def _projections(self) -> dict[str, tuple[int, int]]:
        """Return the weights of one layer, as (inputs, outputs) of each product."""
        return {
            "query, key, value": (self.hidden_size, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim),
            "output": (self.num_heads * self.head_dim, self.hidden_size),
            "gate, up": (self.hidden_size, 2 * self.intermediate_size),
            "down": (self.intermediate_size, self.hidden_size),
        }


@dataclass(frozen=True)
class _Operation:
    """A product, or attention: the bytes that it reads and the floating-point operations that it computes."""

    num_bytes: int
    flops: int
    in_fp8: bool = False

    def matrix_s(self, rates: Rates) -> float:
        return self.flops / rates.flops_per_s(self.in_fp8)


def prefill_steps(num_requests: int, prompt_len: int, max_tokens: int) -> Iterator[StepWork]:
    """Return the steps of prompts that are computed one after another, `max_tokens` tokens per step."""
    left, request, done = max_tokens, 0, 0
    tokens = outputs = read = attended = 0
    while request < num_requests:
        chunk = min(left, prompt_len - done)
        left -= chunk
        tokens += chunk
        read += done + chunk
        attended += chunk * done + chunk * (chunk + 1) // 2
        done += chunk
        if done == prompt_len:
            request, done, outputs = request + 1, 0, outputs + 1
        if left == 0 or request == num_requests:
            yield StepWork(tokens, outputs, read, attended)
            left, tokens, outputs, read, attended = max_tokens, 0, 0, 0, 0


def decode_steps(num_seqs: int, first_len: int, last_len: int) -> Iterator[StepWork]:
    """Return the steps that bring all sequences from `first_len` to `last_len` tokens of KV, both included."""
    return (StepWork.decode(num_seqs, length) for length in range(first_len, last_len + 1))


def run_steps(num_requests: int, prompt_len: int, output_len: int, max_tokens: int) -> Iterator[StepWork]:
    """Return the steps of a whole run in which all requests arrive first and run concurrently.

    The step that finishes a request's prompt produces its first token. The KV of its last token is never computed.
    """
    yield from prefill_steps(num_requests, prompt_len, max_tokens)
    yield from decode_steps(num_requests, prompt_len + 1, prompt_len + output_len - 1)


@dataclass(frozen=True)
class Bounds:
    """Both bounds, summed over several steps, in seconds. `matrix_s`: of the products alone."""

    num_steps: int
    floor_s: float
    roofline_s: float
    matrix_s: float
    flops: int


def bounds(shape: ModelShape, steps: Iterable[StepWork], rates: Rates) -> Bounds:
    """Sum the bounds over steps. So growing contexts are integrated, not replaced by their mean."""
    num_steps, floor_s, roofline_s, matrix_s, flops = 0, 0.0, 0.0, 0.0, 0
    for work in steps:
        num_steps += 1
        floor_s += shape.floor_s(work, rates)
        roofline_s += shape.roofline_s(work, rates)
        matrix_s += shape.matrix_s(work, rates)
        flops += shape.flops(work)
    return Bounds(num_steps, floor_s, roofline_s, matrix_s, flops)

"""Measures the perplexity of a model in the engine's formats, beside plain transformers on the same weights.

    python -m tests.reference.perplexity MODEL_FOLDER --set model.quantization=fp8 --set cache.dtype=fp8_e4m3

The text is the help topics of `pydoc_data.topics`, a part of Python. It is cut into chunks; each chunk is a sequence of
its own. The model runs as the engine runs it, by `workers.gpu.model.loader`, but without scheduler and executor.
Transformers runs in float32, once with the stored weights, and once with weights, activations and KV rounded as the
settings say (`tests/reference/dequantized.py`).

The differences of log-probabilities say more than perplexity does where only weights are rounded. Rounded KV or
activations amplify the least difference, because it moves values to the next number of the format; in a deep model,
two right results can differ by half as much as either differs from exact values (SmolLM2-135M in float32 and float64:
0.054, and 0.10 from exact values). Their perplexities then differ by less than 1 %.

`--rows N` computes a chunk in steps of N tokens: products of few rows may run by other kernels than those of many.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Final

import torch
import transformers
from msgspec import structs
from tokenizers import Tokenizer

from ipc.errors import RingfeedError
from ipc.records import StepShape
from pipeline.engine.config import Config, config_from_dict
from tests.reference.dequantized import Round, fp8_per_row, round_activations, round_kv, round_weights, through_e4m3
from tests.reference.packed_steps import PackedSequence, make_batch
from workers.gpu.device.choose import make_device
from workers.gpu.model.loader import load_model

CHUNK: Final = 1024  # tokens
WEIGHTS: Final[dict[str, Round | None]] = {"none": None, "fp8": fp8_per_row}  # by model.quantization
KV: Final[dict[str, Round | None]] = {"auto": None, "fp8_e4m3": through_e4m3}  # by cache.dtype
_BLOCK_SIZE: Final = 16
_MAX_LOGITS: Final = 256  # rows of logits at a time, because a vocabulary may be large

Chunks = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Scores:
    """What a model makes of a text. `log_probs`: [tokens] float64, of each token after those before it in its chunk,
    natural."""

    log_probs: torch.Tensor
    seconds: float = 0.0

    @property
    def perplexity(self) -> float:
        return float((-self.log_probs.mean()).exp())

    def distance(self, other: Scores) -> float:
        """Return the mean of the absolute differences of log-probabilities. It shows errors that a mean hides."""
        return float((self.log_probs - other.log_probs).abs().mean())


def documentation(folder: Path, num_tokens: int, chunk: int = CHUNK) -> list[list[int]]:
    """Return the first tokens of Python's help topics, by the tokenizer of a model's folder, in chunks."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids[:num_tokens]
    return [ids[start : start + chunk] for start in range(0, len(ids), chunk) if len(ids) > start + 1]


def score_ours(config: Config, chunks: Chunks, rows: int | None = None) -> Scores:
    """Score the chunks by the model of `config`, in steps of `rows` tokens; None = a chunk in a step."""
    length = max(map(len, chunks))
    shape = StepShape(1, min(rows or length, length), length, _BLOCK_SIZE)
    cache = structs.replace(config.cache, num_blocks=config.cache.num_blocks or shape.max_blocks_per_seq)
    device = make_device(config.model.device).torch_device
    loaded = load_model(config.model, cache, shape, device, lambda *_: None)
    with device:
        table = torch.arange(2 * shape.max_blocks_per_seq, dtype=torch.int32).reshape(2, -1)
        table[1] = loaded.num_blocks  # the trash block

        def logits_of(chunk: Sequence[int]) -> Iterator[torch.Tensor]:
            sequence = PackedSequence(0, list(chunk), len(chunk), [])
            while sequence.num_computed_tokens < len(chunk):
                count = min(shape.max_num_batched_tokens, len(chunk) - sequence.num_computed_tokens)
                batch = make_batch([(sequence, count)], table, _BLOCK_SIZE)
                yield from loaded.runner.prompt_logits(batch, torch.arange(count), _MAX_LOGITS)
                sequence.num_computed_tokens += count

        return _scores(logits_of, chunks)


def score_reference(model: Any, chunks: Chunks) -> Scores:
    """Score the chunks by a plain model of transformers."""

    def logits_of(chunk: Sequence[int]) -> Iterator[torch.Tensor]:
        logits = model(input_ids=torch.tensor([chunk], device=model.device), use_cache=False).logits[0]
        yield from torch.split(logits, _MAX_LOGITS)

    return _scores(logits_of, chunks)


def plain_model(folder: Path, device: torch.device | None = None) -> Any:
    """Return transformers' own model with the stored weights, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.to(device).eval().requires_grad_(False)


def round_as(model: Any, config: Config, *, activations: bool = False, unlike: Sequence[str] = ()) -> bool:
    """Round a plain model as `config` says. Returns whether anything is rounded.

    Args:
        activations: round those of the products with rounded weights too.
        unlike: linear layers whose weights stay as they are, by the last part of their names.
    """
    weights, kv = WEIGHTS[config.model.quantization], KV[config.cache.dtype]
    if weights is not None:
        round_weights(model, weights, unlike)
        if activations:
            round_activations(model, unlike=unlike)
    if kv is not None:
        round_kv(model, kv)
    return weights is not None or kv is not None


@torch.inference_mode()
def _scores(logits_of: Callable[[Sequence[int]], Iterator[torch.Tensor]], chunks: Chunks) -> Scores:
    start, log_probs = time.perf_counter(), []
    for chunk in chunks:
        position = 1
        for logits in logits_of(chunk):
            targets = torch.tensor(chunk[position : position + len(logits)], device=logits.device)
            known = logits[: len(targets)].float().log_softmax(-1)  # nothing follows the last token
            log_probs.append(known.gather(-1, targets[:, None])[:, 0].double().cpu())
            position += len(logits)
    return Scores(torch.cat(log_probs), time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="MODEL_FOLDER")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE")
    parser.add_argument(
        "--tokens", type=int, default=2048, help="of the text; 2,048 take a minute with a model of 135M on two cores"
    )
    parser.add_argument("--rows", type=int, help="tokens of a step; default: a whole chunk")
    parser.add_argument(
        "--round-activations", action="store_true",
        help="round activations in the reference, as products of many rows with fp8 weights do on CUDA",
    )  # fmt: skip
    arguments = parser.parse_args()
    try:
        config = config_from_dict({"model": {"path": str(arguments.folder)}}, overrides=arguments.overrides)
        chunks = documentation(arguments.folder, arguments.tokens)
        print(f"{sum(map(len, chunks)):,} tokens in {len(chunks)} chunks")
        print(f"{'':32} perplexity  |difference| of ours   seconds")
        ours = score_ours(config, chunks, arguments.rows)
    except RingfeedError as error:
        sys.exit(f"error: {error}")
    _print("ringfeed", ours, ours)
    model = plain_model(arguments.folder, make_device(config.model.device).torch_device)
    _print("transformers, float32", score_reference(model, chunks), ours)
    if round_as(model, config, activations=arguments.round_activations):
        _print("transformers, float32, rounded", score_reference(model, chunks), ours)


def _print(name: str, scores: Scores, ours: Scores) -> None:
    print(f"{name:32} {scores.perplexity:10.4f} {scores.distance(ours):21.5f} {scores.seconds:9.1f}", flush=True)


if __name__ == "__main__":
    main()

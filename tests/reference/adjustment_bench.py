"""Random steps whose sequences ask for adjustments, and what these do by their definitions, one row at a time."""

from __future__ import annotations

import math
from itertools import product
from random import Random
from typing import Any

import numpy as np
import torch

from ipc.long_values import BAD_WORDS, BIAS_IDS, BIAS_VALUES, LOGPROB_IDS, TOKEN_MASK
from ipc.record_layout import field_names
from ipc.records import AdmittedColumns, StepShape, step_layout
from tests.reference.plain_adjustments import by_definition
from workers.gpu.device.base import Device
from workers.gpu.device.cpu import CpuDevice
from workers.gpu.execution.row_tables import RowTables
from workers.gpu.execution.step_batch import BatchBuffers
from workers.gpu.execution.tensor_views import StepTensors, tensor_views
from workers.gpu.sampling.adjustments import adjust

MAX_LEN = 96
THINK_START, THINK_END = 5, 6


class AdjustmentBench:
    """A step of `num_seqs` sequences in rows other than their place, the last of them padding.

    Ids come from a small part of the vocabulary, so that they repeat. `expected` are the rows by the definitions.
    """

    def __init__(
        self, num_seqs: int, vocab_size: int, seed: int, device: Device[Any, Any] | None = None,
        dtype: torch.dtype = torch.float32, max_len: int = MAX_LEN,
    ) -> None:  # fmt: skip
        device = device or CpuDevice()
        self.random = Random(seed)
        self.vocab_size = vocab_size
        shape = StepShape(2 * num_seqs, 64, max_len, 4, vocab_size)
        self.tables = RowTables(device, shape, num_blocks=8, vocab_size=vocab_size)
        layout = step_layout(shape)
        self.step = tensor_views(StepTensors, layout, device.zeros("step", (layout.num_bytes,), torch.uint8))
        batches = BatchBuffers(
            shape, lambda size: device.zeros("batch", (size,), torch.uint8), self.tables.block_table, {}
        )
        self.batch = batches.batch(num_seqs, num_seqs)
        self.masks = device.zeros("masks", (shape.max_num_seqs, shape.mask_words), torch.int32)
        self.out = device.zeros("adjusted", (num_seqs, vocab_size), torch.float32)
        x = torch.randn(num_seqs, vocab_size + 3, generator=torch.Generator().manual_seed(seed)) * 4
        if num_seqs > 4:  # logits of a model that fails, and of one that excludes tokens itself
            x[1, self.random.randrange(vocab_size)] = math.nan
            x[2, self.random.randrange(vocab_size)] = math.inf
            x[3, : vocab_size // 2] = -math.inf
        self.logits = x.to(dtype).to(device.torch_device)[:, :vocab_size]
        rows = self.random.sample(range(2 * num_seqs), num_seqs)
        self.expected = [self._make_row(i, row) for i, row in enumerate(rows)]

    def run(self) -> torch.Tensor:
        """[num_seqs, vocab_size] float32, on the CPU."""
        self.out.fill_(7.0)  # what the stage leaves out would show
        adjust(self.logits, self.batch, self.tables, self.step, self.masks, self.out)
        return self.out.cpu()

    def _make_row(self, i: int, row: int) -> list[float]:
        random, tables = self.random, self.tables
        ids_in_use = random.choice([8, 20, min(self.vocab_size, 500)])
        length = random.choice([1, 2, 7, 33, MAX_LEN - 1])
        ids = [random.randrange(min(ids_in_use, self.vocab_size)) for _ in range(length)]
        prompt_len = random.randint(1, length)
        is_padding = i == len(self.batch.seq_row) - 1
        is_sampled = not is_padding and random.random() < 0.9
        self.batch.seq_row[i] = row
        self.batch.seq_lens[i] = 0 if is_padding else length
        self.step.seq_sample[i] = int(is_sampled or (is_padding and random.random() < 0.5))
        tables.token_ids[row] = 1
        tables.token_ids[row, :length] = torch.tensor(ids, dtype=torch.int32)
        tables.prompt_len[row] = prompt_len
        asked = {name for name in _KINDS if random.random() < 0.35}
        values = self._ask(asked, i, row, ids[prompt_len:])
        row_logits = self.logits[i].float().cpu().tolist()
        if not is_sampled:
            return row_logits
        adjusted = by_definition(list(row_logits), ids, prompt_len, **values)
        return [x if math.isnan(x) or x == math.inf else y for x, y in zip(row_logits, adjusted, strict=True)]

    def _ask(self, asked: set[str], i: int, row: int, output: list[int]) -> dict[str, Any]:
        """Set the row's columns. Returns them as `by_definition` takes them."""
        random, tables, vocab_size = self.random, self.tables, self.vocab_size
        values: dict[str, Any] = {}
        columns = 0
        for name in field_names(AdmittedColumns):  # a former owner's
            if name in ("repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens"):
                getattr(tables, name)[row] = 1.0 if name == "repetition_penalty" else 0
        for name, column in vars(tables.long_values).items():
            column[row] = 3 if name != "bias_values" else 50.0
        for name, low, high in _PENALTIES:
            if name in asked:
                values[name] = float(np.float32(random.uniform(low, high)))
                getattr(tables, name)[row] = values[name]
        if "min_tokens" in asked:
            values["min_tokens"] = tables.min_tokens[row] = random.randrange(40)
            values["end_ids"] = random.sample(range(vocab_size), 3)
            tables.end_ids[row] = torch.tensor([*values["end_ids"], *[-1] * (tables.end_ids.shape[1] - 3)])
        if "thinking" in asked:
            tables.think_start[row], tables.think_end[row] = THINK_START, THINK_END
            tables.think_budget[row] = budget = random.choice([0, 1, 5, 30])
            values["thinking"] = THINK_START, THINK_END, budget
        if "token_mask" in asked:
            columns |= TOKEN_MASK
            values["allowed"] = self._mask(tables.long_values.token_mask[row])
        if "bias" in asked:
            columns |= BIAS_IDS | BIAS_VALUES
            tokens = random.sample(range(vocab_size), min(vocab_size, random.choice([1, 30, 1024])))
            values["bias"] = {token: float(np.float32(random.uniform(-20, 20))) for token in tokens}
            tables.long_values.bias_ids[row] = -1
            tables.long_values.bias_ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
            tables.long_values.bias_values[row, : len(tokens)] = torch.tensor(list(values["bias"].values()))
        if "bad_words" in asked:
            columns |= BAD_WORDS
            values["bad_words"] = words = self._words(output)
            flat = [token for word in words for token in (*word, -1)]
            tables.long_values.bad_words[row] = -1
            tables.long_values.bad_words[row, : len(flat)] = torch.tensor(flat, dtype=torch.int32)
        if random.random() < 0.3:
            columns |= LOGPROB_IDS
        tables.long_columns[row] = columns
        self.step.seq_mask[i] = -1
        if "grammar" in asked:
            self.step.seq_mask[i] = i
            values["grammar"] = self._mask(self.masks[i])
        return values

    def _mask(self, words: torch.Tensor) -> set[int]:
        share = self.random.choice([0.0, 0.02, 0.5, 1.0])
        allowed = {token for token in range(self.vocab_size) if self.random.random() < share}
        bits = np.zeros(32 * len(words), np.uint8)
        bits[list(allowed)] = 1
        words.copy_(torch.from_numpy(np.packbits(bits, bitorder="little").view(np.int32).copy()))
        return allowed

    def _words(self, output: list[int]) -> list[list[int]]:
        """Some words whose beginning is the newest output, some that are nearly so, some others."""
        words = []
        for _ in range(self.random.choice([1, 5, 60])):
            size = self.random.randint(1, 6)
            beginning = output[len(output) - size :] if len(output) >= size else output
            if self.random.random() < 0.4 or not beginning:
                beginning = [self.random.randrange(self.vocab_size) for _ in range(size)]
            words.append([*beginning, self.random.randrange(self.vocab_size)])
        return words


_PENALTIES = (("repetition_penalty", 0.3, 3.0), ("presence_penalty", -2.0, 2.0), ("frequency_penalty", -2.0, 2.0))
_KINDS = (*(name for name, _, _ in _PENALTIES), "min_tokens", "thinking", "token_mask", "bias", "bad_words", "grammar")


def assert_adjusted(bench: AdjustmentBench) -> None:
    """That every sequence that samples has the logits of the definitions, and every other one those of the model."""
    found = bench.run()
    expected = torch.tensor(bench.expected, dtype=torch.float32)
    torch.testing.assert_close(found[:-1], expected[:-1], rtol=1e-5, atol=1e-4, equal_nan=True)
    assert torch.equal(found[-1].isnan(), bench.logits[-1].cpu().float().isnan()), "padding"


def check_tiny_repetition_penalty(device: Device[Any, Any] | None = None) -> None:
    """That a tiny penalty makes a logit as large as float32 holds, which is no failure of the model."""
    bench = AdjustmentBench(2, 40, 0, device)
    tables, row = bench.tables, int(bench.batch.seq_row[0])
    bench.step.seq_sample[0], bench.step.seq_mask[0], bench.logits[0] = 1, -1, 1.0
    tables.long_columns[row], tables.min_tokens[row], tables.think_budget[row] = 0, 0, -1
    tables.token_ids[row], tables.prompt_len[row], bench.batch.seq_lens[0] = 7, 1, 1
    tables.repetition_penalty[row], tables.presence_penalty[row], tables.frequency_penalty[row] = 1e-39, 0, 0
    found = bench.run()[0]
    assert found[7] == torch.finfo(torch.float32).max
    assert (found != 1.0).sum() == 1


def check_long_thinking(device: Device[Any, Any] | None = None) -> None:
    """That the budget is right wherever thinking began, also if that is more ids back than kernels read at a time."""
    bench = AdjustmentBench(2, 40, 0, device, max_len=3000)
    tables, row = bench.tables, int(bench.batch.seq_row[0])
    bench.step.seq_sample[0], bench.step.seq_mask[0], bench.logits[0] = 1, -1, 1.0
    tables.long_columns[row], tables.min_tokens[row], tables.prompt_len[row] = 0, 0, 0
    tables.repetition_penalty[row], tables.presence_penalty[row], tables.frequency_penalty[row] = 1, 0, 0
    tables.think_start[row], tables.think_end[row] = THINK_START, THINK_END
    all_but_end = [token for token in range(40) if token != THINK_END]
    is_open = {(THINK_START,): True, (THINK_START, THINK_END): False, (THINK_END, THINK_START): True, (3,): False}
    for num_behind, before, budget_left in product((1, 1022, 1023, 1024, 1025, 2047, 2600), is_open, (0, 1)):
        ids = [*before, *[9] * num_behind]
        tables.token_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
        bench.batch.seq_lens[0], tables.think_budget[row] = len(ids), num_behind + budget_left
        excluded = (bench.run()[0] == -math.inf).nonzero()[:, 0].tolist()
        assert excluded == (all_but_end if is_open[before] and not budget_left else []), (before, num_behind)

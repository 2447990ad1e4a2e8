"""Generation written from the definitions of the parameters: one sequence, one token at a time, in float32.

Nothing of the engine is used except its random numbers, which are a part of the definition of a sampled token. Every
step runs the whole sequence through plain transformers. A parameter's effect is a few lines of Python over one row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer

from ipc.sampling_params import SamplingParams
from tests.reference.plain_adjustments import by_definition
from tests.reference.tiny_models import reference_logits, reference_model
from workers.gpu.sampling.random_bits import exponential

Logprobs = list[float]  # by token id


@dataclass
class PlainOutput:
    """One sample. `logprobs` has a list over the vocabulary for each token, raw or processed as the request asks."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    logprobs: list[Logprobs] = field(default_factory=list)


class PlainEngine:
    """Args: folder: of a model. thinking: ids of the tokens that begin and end thinking."""

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, eos_token_ids: Sequence[int], thinking: tuple[int, int] | None = None
    ) -> None:
        self._model = reference_model(folder)
        self._tokenizer = tokenizer
        self._eos_token_ids = list(eos_token_ids)
        self._thinking = thinking

    def samples(self, prompt: Sequence[int], params: SamplingParams) -> list[PlainOutput]:
        """All samples of a request. `params.seed` is set if the request is sampled."""
        if params.temperature == 0:
            return [self.generate(prompt, params)] * params.n
        return [self.generate(prompt, params.of_sample(i)) for i in range(params.n)]

    def generate(self, prompt: Sequence[int], params: SamplingParams) -> PlainOutput:
        assert params.max_tokens is not None, "the reference has no model length"
        ids, output = self._truncated(prompt, params), PlainOutput()
        num_prompt = len(ids)
        end_ids = [*([] if params.ignore_eos else self._eos_token_ids), *params.stop_token_ids]
        while not output.finish_reason:
            logits = reference_logits(self._model, ids)[-1].tolist()
            adjusted = self._adjust(list(logits), ids, num_prompt, params, end_ids)
            if max(adjusted) == -math.inf:
                output.finish_reason = "error"
                break
            token, processed = _choose(adjusted, params, position=len(ids))
            raw = torch.tensor(logits).log_softmax(-1).tolist()
            output.logprobs.append(processed if params.logprobs_mode == "processed_logprobs" else raw)
            output.token_ids.append(token)
            ids.append(token)
            if token in end_ids:
                output.finish_reason = "stop"
            elif len(output.token_ids) == params.max_tokens:
                output.finish_reason = "length"
        return output

    def prompt_logprobs(self, prompt: Sequence[int], params: SamplingParams) -> list[Logprobs | None]:
        """Log-probabilities over the vocabulary at each position of the prompt; None at the first."""
        ids = self._truncated(prompt, params)
        rows = reference_logits(self._model, ids).log_softmax(-1).tolist()
        return [None, *rows[:-1]]

    @staticmethod
    def _truncated(prompt: Sequence[int], params: SamplingParams) -> list[int]:
        return list(prompt)[-(params.truncate_prompt_tokens or len(prompt)) :]

    def _adjust(
        self, x: list[float], ids: list[int], num_prompt: int, params: SamplingParams, end_ids: list[int]
    ) -> list[float]:
        """Everything in front of the temperature."""
        budget, allowed, structured = params.thinking_token_budget, params.allowed_token_ids, params.structured_outputs
        return by_definition(
            x,
            ids,
            num_prompt,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            min_tokens=params.min_tokens,
            end_ids=end_ids,
            thinking=None if budget is None or self._thinking is None else (*self._thinking, budget),
            allowed=None if allowed is None else set(allowed),
            bias=params.logit_bias,
            bad_words=self._bad_words(params.bad_words),
            grammar=None if structured is None else self._of_choices(structured.choice or [], ids[num_prompt:], len(x)),
        )

    def _bad_words(self, words: Sequence[str]) -> list[list[int]]:
        """A word's tokens at the beginning of a text, and within it if these are as many and others."""
        found = []
        for word in words:
            plain, inner = (
                self._tokenizer.encode(prefix + word.lstrip(), add_special_tokens=False).ids for prefix in ("", " ")
            )
            found.append(plain)
            if len(inner) == len(plain) and inner[0] != plain[0]:
                found.append(inner)
        return found

    def _of_choices(self, choices: Sequence[str], output: list[int], vocab_size: int) -> set[int]:
        """The tokens after which the text is still a beginning of a choice, and the end behind a whole choice."""
        texts = [choice.encode() for choice in choices]
        so_far = b"".join(map(self._bytes_of, output))
        allowed = set(self._eos_token_ids if so_far in texts else [])
        for token in set(range(vocab_size)) - set(self._eos_token_ids):
            piece = self._bytes_of(token)
            if piece and any(text.startswith(so_far + piece) for text in texts):
                allowed.add(token)
        return allowed

    def _bytes_of(self, token: int) -> bytes:
        """Of a byte-level vocabulary whose single characters are ASCII."""
        return self._tokenizer.decode([token], skip_special_tokens=True).encode()


def _choose(adjusted: list[float], params: SamplingParams, position: int) -> tuple[int, Logprobs]:
    """The sampled token, and the log-probabilities of what was sampled from."""
    if params.temperature == 0:
        return adjusted.index(max(adjusted)), torch.tensor(adjusted).log_softmax(-1).tolist()
    scaled = [value / params.temperature for value in adjusted]
    kept = filtered(scaled, params)
    noise = exponential(torch.tensor([params.seed]), torch.tensor([position]), len(kept))[0].log().tolist()
    scores = [value - e for value, e in zip(kept, noise, strict=True)]
    return scores.index(max(scores)), torch.tensor(kept).log_softmax(-1).tolist()


def filtered(scaled: list[float], params: SamplingParams) -> list[float]:
    """top_k, then top_p of what is left, then min_p; dropped tokens are -inf."""
    order = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    kept = order[: params.top_k] if params.top_k else order
    weights = [math.exp(scaled[token] - scaled[order[0]]) for token in kept]
    if params.top_p < 1:
        total, mass, count = sum(weights), 0.0, 0
        while mass < params.top_p * total:
            mass += weights[count]
            count += 1
        kept, weights = kept[:count], weights[:count]
    kept = [token for token, weight in zip(kept, weights, strict=True) if weight >= params.min_p]
    is_kept = set(kept)
    return [value if token in is_kept else -math.inf for token, value in enumerate(scaled)]

"""The prompts of `/v1/completions`: as the engine gets them, and as an answer repeats them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ipc.errors import InvalidRequest
from pipeline.client.outputs import TokenLogprob
from pipeline.http.generation.sampling_fields import max_prompt_tokens
from pipeline.http.openai.completion_body import CompletionRequest, Prompt
from pipeline.http.service import Service

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PreparedPrompt:
    """One prompt of a request.

    Args:
        source: what the engine gets: the text, or the token ids if the answer says something about them.
        token_ids: the ids of the prompt; empty if the answer does not show them.
        text: what an answer with `echo` begins with; "" without `echo`.
        num_hidden_chars: so many characters of the tokens stand before `text`: names of special tokens.
        first_token: the name of the first token, which has no log-probability; None if the answer does not show it.
    """

    source: Prompt
    token_ids: Sequence[int] = ()
    text: str = ""
    num_hidden_chars: int = 0
    first_token: TokenLogprob | None = None


async def prepare(service: Service, request: CompletionRequest, prompt: Prompt) -> PreparedPrompt:
    """Find out what the answer says about the prompt. Raises InvalidRequest, and what `AsyncClient.tokenize` raises.

    A prompt whose tokens the answer shows is tokenized here, and the engine gets these tokens, so both are the same.
    """
    is_text = isinstance(prompt, str)
    num_kept = max_prompt_tokens(request.params, service.max_model_len)
    needs_tokens = request.shows_token_ids or (is_text and not request.add_special_tokens)
    if request.echo:
        needs_tokens |= not is_text or request.logprobs is not None or num_kept is not None
    if not needs_tokens:
        return PreparedPrompt(source=prompt, text=prompt if request.echo and isinstance(prompt, str) else "")
    found = await service.client.tokenize(prompt, add_special_tokens=request.add_special_tokens)
    ids, texts = found.token_ids, found.token_bytes
    if not ids:
        raise InvalidRequest("the prompt has no tokens")
    is_cut = num_kept is not None and len(ids) > num_kept
    if is_cut and num_kept is not None:
        num_leading = await _num_leading(service, prompt, ids) if is_text and request.add_special_tokens else 0
        ids, texts = _end_of(ids, num_kept, num_leading), _end_of(texts, num_kept, num_leading)
    text = whole = b"".join(texts).decode("utf-8", "replace")
    if isinstance(prompt, str) and not is_cut:
        text = prompt
    return PreparedPrompt(
        source=ids,
        token_ids=ids if request.shows_token_ids else (),
        text=text if request.echo else "",
        num_hidden_chars=len(whole) - len(text) if whole.endswith(text) else 0,
        first_token=TokenLogprob(ids[0], 0.0, {}, token_bytes={ids[0]: texts[0]}),
    )


async def _num_leading(service: Service, text: Prompt, ids: list[int]) -> int:
    """How many special tokens the tokenizer has written in front of a text. They stay if the text is cut."""
    own = (await service.client.tokenize(text, add_special_tokens=False)).token_ids
    return next((at for at in range(len(ids) - len(own) + 1) if ids[at : at + len(own)] == own), 0)


def _end_of(items: list[T], num_kept: int, num_leading: int) -> list[T]:
    if num_kept <= num_leading:
        num_leading = 0
    return items[:num_leading] + items[len(items) - num_kept + num_leading :]

"""Token ids, texts and kept values from a running engine, through the SDK, on the shipped model."""

from __future__ import annotations

import asyncio

import pytest
from transformers import AutoTokenizer

from ipc.errors import InvalidRequest
from pipeline import AsyncClient, Chat, Client, Pipeline, SamplingParams
from tests.integration.conftest import TINY_CONFIG

pytestmark = pytest.mark.slow

FOLDER = TINY_CONFIG.parent / "tiny-model"
TEXTS = ["A for statement is", "  Grüße 🙂 \n\n今天 <|im_start|>user", "def f(x):\n\treturn x\n", ""]
MESSAGES = [{"role": "user", "content": "What is the for statement?"}]


def test_tokens_and_texts_are_those_of_the_models_tokenizer_and_of_requests(client: Client) -> None:
    reference = AutoTokenizer.from_pretrained(FOLDER)
    num_steps = client.stats()["scheduler"]["num_steps"]
    for text in TEXTS:
        for adds in (True, False):
            found = client.tokenize(text, add_special_tokens=adds)
            assert found.token_ids == reference(text, add_special_tokens=adds)["input_ids"]
            for skips in (True, False):
                expected = reference.decode(found.token_ids, skip_special_tokens=skips)
                assert client.detokenize(found.token_ids, skip_special_tokens=skips) == expected
        assert b"".join(client.tokenize(text, add_special_tokens=False).token_bytes) == text.encode()
    chat = client.tokenize(Chat(MESSAGES))
    assert chat.token_ids == reference.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert client.stats()["scheduler"]["num_steps"] == num_steps, "a query reached the scheduler"

    output = client.generate(MESSAGES, SamplingParams(max_tokens=8, skip_special_tokens=False))
    assert output.usage is not None
    assert output.usage.prompt_tokens == chat.num_tokens
    assert client.detokenize(output.token_ids) == output.text
    with pytest.raises(InvalidRequest, match="holds 1000000"):
        client.detokenize([1, 1_000_000])


def test_many_clients_count_and_keep_at_the_same_time(engine: Pipeline, client: Client) -> None:
    async def use(number: int) -> None:
        async with AsyncClient(client.endpoint) as own:
            counts = await asyncio.gather(*(own.tokenize([1] * (1 + count)) for count in range(50)))
            assert [count.num_tokens for count in counts] == list(range(1, 51))
            await own.keep(f"key{number}", bytes([number]) * 1_000)

    async def use_all() -> None:
        await asyncio.gather(*map(use, range(8)))

    num_kept_bytes = client.stats()["gateway"]["num_kept_bytes"]  # other tests keep responses
    asyncio.run(use_all())
    for number in range(8):
        assert client.recall(f"key{number}") == bytes([number]) * 1_000
        assert client.forget(f"key{number}")
        assert client.recall(f"key{number}") is None
    stats = client.stats()["gateway"]
    assert (stats["num_kept_bytes"], stats["num_open"]) == (num_kept_bytes, 0)

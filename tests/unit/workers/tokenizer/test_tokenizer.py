"""The tokenizer's core, held against transformers' own."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ipc.errors import InvalidRequest, ModelUnsupported, RequestFailed
from ipc.messages import Route, Tokenize
from ipc.records import StepShape
from ipc.sampling_params import SamplingParams
from tests.simulation.scheduled_engine import resume_with
from tests.unit.workers.text.tools import CORPUS, byte_fallback_tokenizer, byte_level_tokenizer, encoded_chat
from workers.model_tokenizer.loading import load_tokenizer
from workers.tokenizer.chat_template import ChatTemplates
from workers.tokenizer.core import MAX_TRUNCATED_CHARS, Encoded, PromptEncoder

MESSAGES = [{"role": "system", "content": "Be brief & <clear>."}, {"role": "user", "content": "  今天 hi\n"}]
CHAT = encoded_chat(MESSAGES)

# Features that templates on the hub use: loops with controls, whitespace trimming, filters, raise_exception, tools,
# namespaces.
TEMPLATE = """{{- bos_token }}
{%- set ns = namespace(count=0) %}
{%- if tools %}
    {{- raise_exception('no tools here') }}
{%- endif %}
{% for message in messages %}
    {% if message['role'] == 'nobody' %}
        {{ raise_exception('role ' + message.role + ' is unknown') }}
    {% elif message['role'] == 'skip' %}
        {% continue %}
    {% endif %}
    {%- set ns.count = ns.count + 1 %}
{{ '<|' + message.role + '|>' }}
{% generation %}
{{ message['content'] | trim | tojson }}{{ eos_token }}
{% endgeneration %}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{{ ns.count }} {{ strftime_now('%Y') | length }}{% endif %}"""


def save(folder: Path, tokenizer: Any = None, **config: Any) -> str:
    tokenizer = tokenizer or byte_level_tokenizer()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return str(folder)


def encoder(folder: str, *, max_model_len: int = 200, vocab_size: int = 500) -> PromptEncoder:
    loaded = load_tokenizer(folder)
    return PromptEncoder(loaded.tokenizer, chat_templates(folder), shape(vocab_size, max_model_len))


def shape(vocab_size: int, max_model_len: int) -> StepShape:
    return StepShape(4, 16, max_model_len, 4, vocab_size)


def chat_templates(folder: str) -> ChatTemplates:
    return ChatTemplates.load(folder, load_tokenizer(folder).special_tokens)


def request(params: SamplingParams | None = None, **source: Any) -> Tokenize:
    return Tokenize(
        key=1, route=Route(b"c", "r", False), params=params or SamplingParams(max_tokens=1), arrived_ns=5, **source
    )


def failure(encoded: Encoded) -> str:
    assert isinstance(encoded.error, InvalidRequest), encoded
    assert encoded.token_ids.size == 0
    return str(encoded.error)


@pytest.mark.parametrize("make", [byte_level_tokenizer, byte_fallback_tokenizer])
@pytest.mark.parametrize(
    "config", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}]
)
def test_prompts_are_encoded_as_auto_tokenizer_does(tmp_path: Path, make: Any, config: dict[str, Any]) -> None:
    folder = save(tmp_path, make(), **config)
    reference = AutoTokenizer.from_pretrained(folder)
    encode = encoder(folder).encode
    for text in (*CORPUS, "<s> a special token in the text </s>", " leading and trailing  "):
        assert encode(request(prompt=text)).token_ids.tolist() == reference(text)["input_ids"]


def test_chats_are_rendered_and_encoded_as_transformers_does(tmp_path: Path) -> None:
    folder = save(tmp_path, chat_template=TEMPLATE)
    reference = AutoTokenizer.from_pretrained(folder)
    plain = [*MESSAGES, {"role": "skip", "content": "not shown"}]
    chat = encoded_chat(plain)
    expected = reference.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    assert chat_templates(folder).render(chat) == expected
    token_ids = reference.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    assert encoder(folder).encode(request(chat=chat)).token_ids.tolist() == token_ids


def test_a_template_file_outranks_the_configuration(tmp_path: Path) -> None:
    folder = save(tmp_path, chat_template="of the configuration")
    assert chat_templates(folder).render(CHAT) == "of the configuration"
    (tmp_path / "chat_template.jinja").write_text("of the file")
    assert chat_templates(folder).render(CHAT) == "of the file"


NAMED = {"rag": "x", "default": "it: {{ messages[0].role }}"}


@pytest.mark.parametrize("value", [NAMED, [{"name": name, "template": text} for name, text in NAMED.items()]])
def test_a_named_default_template_is_found(tmp_path: Path, value: Any) -> None:
    assert chat_templates(save(tmp_path, chat_template=value)).render(CHAT) == "it: system"


def test_templates_in_files_are_named_by_them_and_outrank_the_configuration(tmp_path: Path) -> None:
    folder = save(tmp_path, chat_template=NAMED)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    with pytest.raises(InvalidRequest, match="'tool_use' and none named 'default'"):
        chat_templates(folder).render(CHAT)
    with pytest.raises(ValueError, match=r"no default specified.*tool_use"):
        AutoTokenizer.from_pretrained(folder).get_chat_template()
    (tmp_path / "chat_template.jinja").write_text("of the file")
    assert chat_templates(folder).render(CHAT) == "of the file"


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("tokenizer_config.json", b"{", "cannot be read: Expecting property name"),
        ("tokenizer_config.json", b"[" * 100_000, "cannot be read: maximum recursion depth"),
        ("tokenizer_config.json", b"[]", "must hold a JSON object"),
        ("special_tokens_map.json", b"[]", "must hold a JSON object"),
        ("added_tokens.json", b"{", "cannot be read: Expecting property name"),
    ],
)
def test_a_broken_file_of_the_tokenizer_is_named(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    folder = save(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelUnsupported) as caught:
        load_tokenizer(folder)
    assert f"{tmp_path / name}" in str(caught.value)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("tokenizer_config.json", b'{"chat_template": 5}', "chat_template (5) in"),
        ("tokenizer_config.json", b'{"chat_template": [{"x": 1}]}', "chat_template ({None: None}) in"),
        ("tokenizer_config.json", b'{"chat_template": {"tools": "x", "rag": "y"}}', "templates named 'rag', 'tools'"),
        ("tokenizer_config.json", b'{"chat_template": "{% for %}"}', "cannot be compiled"),
        ("chat_template.jinja", b"\xff", "cannot be read: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_broken_template_refuses_chats_and_nothing_else(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_bytes(content)
    encode = encoder(str(tmp_path)).encode
    assert text in failure(encode(request(chat=CHAT)))
    assert encode(request(prompt="the fox")).error is None


def test_control_tokens_of_the_template_that_are_no_tokens_are_noted_and_do_not_stop_the_start(tmp_path: Path) -> None:
    template = "{{ '<s>' }}<tool call>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    notes = list(encoder(save(tmp_path, chat_template=template)).split_control_tokens())
    assert len(notes) == 1
    assert "'<|end|>', which is not a token: the tokenizer makes" in notes[0]
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["<|end|>"])
    assert list(encoder(save(tmp_path, tokenizer, chat_template=template)).split_control_tokens()) == []


def test_templates_see_the_special_tokens_of_every_file(tmp_path: Path) -> None:
    folder = save(tmp_path, chat_template="{{ bos_token }}{{ image_token }}{{ eos_token }}{{ sep_token }}")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    kept = {"tokenizer_class": config["tokenizer_class"], "chat_template": config["chat_template"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(kept))
    special = {"bos_token": "<s>", "eos_token": {"content": "<|end|>"}, "image_token": "<image>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    reference = AutoTokenizer.from_pretrained(folder)
    expected = reference.apply_chat_template(MESSAGES, tokenize=False)
    assert chat_templates(folder).render(CHAT) == expected == "<s><image><|end|>"


def test_a_chat_without_a_template_says_what_to_do(tmp_path: Path) -> None:
    text = failure(encoder(save(tmp_path)).encode(request(chat=CHAT)))
    assert "no chat template" in text
    assert "send a prompt" in text


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (TEMPLATE, "role nobody is unknown"),
        ("{% for %}", "cannot be compiled"),
        ("{{ messages.append(1) }}", "refuses this chat"),
        ("{{ ''.__class__.__mro__ }}", "refuses this chat"),
        ("{{ 1 // 0 }}", "refuses this chat"),
    ],
)
def test_what_a_template_raises_is_that_requests_error(tmp_path: Path, template: str, text: str) -> None:
    encode = encoder(save(tmp_path, chat_template=template)).encode
    assert text in failure(encode(request(chat=encoded_chat([{"role": "nobody", "content": "x"}]))))
    assert encode(request(prompt="the fox")).error is None


def test_lengths_are_checked_with_the_numbers_in_the_text(tmp_path: Path) -> None:
    encode = encoder(save(tmp_path), max_model_len=10).encode
    nine = np.arange(9, dtype="<i4").tobytes()
    assert encode(request(token_ids=nine, params=SamplingParams(max_tokens=1))).error is None
    assert encode(request(token_ids=nine, params=SamplingParams(max_tokens=None))).error is None
    text = failure(encode(request(token_ids=nine, params=SamplingParams(max_tokens=2))))
    assert "9 tokens" in text
    assert "max_tokens (2)" in text
    assert "10 tokens" in text


@pytest.mark.parametrize("num_tokens", [10, 11])
def test_a_prompt_that_leaves_no_room_is_told_so_and_not_of_a_max_tokens_that_nobody_gave(
    num_tokens: int, tmp_path: Path
) -> None:
    encode = encoder(save(tmp_path), max_model_len=10).encode
    token_ids = np.arange(num_tokens, dtype="<i4").tobytes()
    text = failure(encode(request(token_ids=token_ids, params=SamplingParams(max_tokens=None))))
    assert f"{num_tokens} tokens" in text
    assert "10 tokens" in text
    assert "max_tokens" not in text
    text = failure(encode(request(token_ids=token_ids, params=SamplingParams(max_tokens=1))))
    assert "max_tokens (1)" in text


@pytest.mark.parametrize("bad", [-1, 500, 2**31 - 1, -(2**31)])
def test_token_ids_out_of_range_are_named(tmp_path: Path, bad: int) -> None:
    token_ids = np.array([1, bad, 2], "<i4").tobytes()
    assert f"holds {bad}" in failure(encoder(save(tmp_path)).encode(request(token_ids=token_ids)))


def test_stop_token_ids_out_of_range_are_named(tmp_path: Path) -> None:
    encode = encoder(save(tmp_path)).encode
    assert encode(request(prompt="x", params=SamplingParams(max_tokens=1, stop_token_ids=[499]))).error is None
    text = failure(encode(request(prompt="x", params=SamplingParams(max_tokens=1, stop_token_ids=[1, 500]))))
    assert "stop_token_ids holds 500" in text


def test_a_prompt_that_encodes_to_nothing_is_refused(tmp_path: Path) -> None:
    encode = encoder(save(tmp_path, chat_template="{{ '' }}")).encode
    assert "no tokens" in failure(encode(request(chat=CHAT)))


def test_a_token_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    encode = encoder(save(tmp_path), vocab_size=20).encode
    assert "the model does not have" in failure(encode(request(prompt="the fox")))


def test_a_huge_prompt_is_refused_before_it_is_encoded(tmp_path: Path) -> None:
    text = failure(encoder(save(tmp_path)).encode(request(prompt="x" * 10_000_000)))
    assert "10000000 characters" in text


TEXT = "<s> the quick brown fox 🙂 jumps"


@pytest.mark.parametrize("make", [byte_level_tokenizer, byte_fallback_tokenizer])
@pytest.mark.parametrize("num_kept", [1, 2, 5, 60])
def test_a_truncated_text_has_the_tokens_of_transformers_truncation(tmp_path: Path, make: Any, num_kept: int) -> None:
    folder = save(tmp_path, make(), add_bos_token=True)
    reference = AutoTokenizer.from_pretrained(folder, truncation_side="left")
    expected = reference(TEXT, truncation=True, max_length=num_kept)["input_ids"]
    whole = reference(TEXT)["input_ids"]
    params = SamplingParams(max_tokens=1, truncate_prompt_tokens=num_kept)
    token_ids = encoder(folder).encode(request(params, prompt=TEXT)).token_ids.tolist()
    # With room for nothing else, transformers keeps the special token alone. A prompt's last token is worth more.
    assert token_ids == (whole[-1:] if num_kept == 1 else expected)


def test_chats_and_ids_keep_their_last_tokens(tmp_path: Path) -> None:
    encode = encoder(save(tmp_path, chat_template=TEMPLATE)).encode
    whole = encode(request(chat=CHAT)).token_ids
    for source in ({"chat": CHAT}, {"token_ids": whole.tobytes()}):
        for num_kept in (1, 4, whole.size, 150):
            params = SamplingParams(max_tokens=1, truncate_prompt_tokens=num_kept)
            assert encode(request(params, **source)).token_ids.tolist() == whole[-num_kept:].tolist()


@pytest.mark.parametrize(("max_tokens", "room"), [(None, 19), (1, 19), (12, 8), (19, 1)])
def test_a_prompt_is_truncated_to_what_the_models_length_leaves(
    tmp_path: Path, max_tokens: int | None, room: int
) -> None:
    encode = encoder(save(tmp_path), max_model_len=20).encode
    token_ids = np.arange(1, 100, dtype="<i4")
    params = SamplingParams(max_tokens=max_tokens, truncate_prompt_tokens=-1)
    assert encode(request(params, token_ids=token_ids.tobytes())).token_ids.tolist() == token_ids[-room:].tolist()
    assert encode(request(params, token_ids=token_ids[:1].tobytes())).token_ids.tolist() == [1]


def test_truncation_to_more_than_fits_is_refused_with_the_numbers(tmp_path: Path) -> None:
    encode = encoder(save(tmp_path), max_model_len=20).encode
    for params in (
        SamplingParams(max_tokens=5, truncate_prompt_tokens=16),
        SamplingParams(max_tokens=20, truncate_prompt_tokens=-1),
    ):
        text = failure(encode(request(params, token_ids=np.arange(1, 100, dtype="<i4").tobytes())))
        assert f"max_tokens ({params.max_tokens}) exceed" in text


def test_a_text_that_is_truncated_may_be_long_within_a_bound(tmp_path: Path) -> None:
    encode = encoder(save(tmp_path), max_model_len=20).encode
    text, keep = "the fox " * 5_000, SamplingParams(max_tokens=1, truncate_prompt_tokens=4)
    assert "40000 characters" in failure(encode(request(prompt=text)))
    kept = encode(request(keep, prompt=text)).token_ids.tolist()
    assert kept == encode(request(keep, prompt="the fox the fox the fox ")).token_ids.tolist()
    text = failure(encode(request(keep, prompt="x" * (MAX_TRUNCATED_CHARS + 1))))
    assert f"({MAX_TRUNCATED_CHARS + 1} characters)" in text
    assert "send only its end" in text


def test_more_min_tokens_than_fit_are_accepted(tmp_path: Path) -> None:
    encode = encoder(save(tmp_path), max_model_len=20).encode
    assert encode(request(SamplingParams(min_tokens=1_000), prompt="the fox")).error is None


def test_a_request_that_names_an_unknown_token_is_refused(tmp_path: Path) -> None:
    encode = encoder(save(tmp_path)).encode
    encoded = encode(request(SamplingParams(logit_bias={500: 1}), prompt="the fox"))
    assert "logit_bias holds 500" in failure(encoded)
    encoded = encode(request(SamplingParams(logit_bias={499: 1}), prompt="the fox"))
    assert encoded.error is None
    assert encoded.asked.long_values


def test_any_other_exception_is_that_requests_error(tmp_path: Path) -> None:
    class Panicking:
        def get_vocab(self) -> dict[str, int]:
            return {"long token": 0}

        def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> Any:
            raise type("PanicException", (BaseException,), {})("a Rust panic")

    template = ChatTemplates({}, {})
    encoded = PromptEncoder(Panicking(), template, shape(500, 100)).encode(request(prompt="x"))
    assert isinstance(encoded.error, RequestFailed)
    assert "a Rust panic" in str(encoded.error)


def test_truncation_and_padding_of_the_file_do_not_apply(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "the quick brown fox"
    assert load_tokenizer(str(tmp_path)).tokenizer.encode(text).ids == byte_level_tokenizer().encode(text).ids


def test_a_folder_without_a_usable_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelUnsupported, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelUnsupported, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))


# Resumed requests


def test_a_chats_present_time_is_the_clock_of_the_first_attempt(tmp_path: Path) -> None:
    template = "{% macro date() %}{{ strftime_now('%Y-%m-%d %H:%M') }}{% endmacro %}{{ date() }}"
    encode = encoder(save(tmp_path, chat_template=template))
    clock_s = datetime.datetime(2021, 3, 4, 5, 6).timestamp()
    at_first, as_text = request(chat=CHAT, clock_s=clock_s), request(prompt="2021-03-04 05:06")
    _bos, *expected = encode.encode(as_text).token_ids.tolist()
    assert encode.encode(at_first).token_ids.tolist() == expected
    assert encode.encode(request(chat=CHAT)).token_ids.tolist() != expected


def test_ids_that_the_model_does_not_have_are_refused_also_in_what_a_client_has_received(tmp_path: Path) -> None:
    encode = encoder(save(tmp_path), vocab_size=500)
    for bad in (-1, 500):
        resume = resume_with([[0, 499], None, [7, bad]])
        refused = failure(encode.encode(request(prompt="x", resume=resume)))
        assert refused == f"resume.samples[2].token_ids holds {bad}; the model's ids are 0 to 499"
    assert encode.encode(request(prompt="x", resume=resume_with([[0, 499], None]))).error is None

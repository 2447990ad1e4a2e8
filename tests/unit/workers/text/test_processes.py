"""Gateway, tokenizer and detokenizer as processes, over their real sockets and ring."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import zmq

from ipc.channels import send
from ipc.long_values import BAD_WORDS, BIAS_IDS, BIAS_VALUES, LOGPROB_IDS, long_columns_of
from ipc.messages import (
    EOS_TOKEN_ID,
    Abort,
    Alive,
    Cancel,
    DetokenizeQuery,
    Drain,
    Drained,
    Health,
    Keep,
    Opened,
    Query,
    Ready,
    Recall,
    Route,
    Stats,
    StepOutputs,
    TextOptions,
    TokenizeQuery,
)
from ipc.records import FinishCode
from ipc.sampling_params import SamplingParams
from ipc.scheduling_params import SchedulingParams
from ipc.stats_page import StatsPage
from tests.unit.workers.gateway.gateway_tools import generate
from tests.unit.workers.text.frames import bad_frame
from tests.unit.workers.text.processes import ROOT, TextClient, TextEngine, wait_until
from tests.unit.workers.text.tools import CORPUS, byte_level_tokenizer, encoded_chat, user_chat

TOKENIZER = byte_level_tokenizer()
ONE = SamplingParams(max_tokens=1)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rf-", dir="/tmp", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (tmp_path / "additional_chat_templates").mkdir()
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (tmp_path / "additional_chat_templates" / "endless.jinja").write_text(endless)
    return tmp_path


@pytest.fixture
def engine(folder: Path, model: Path) -> Iterator[TextEngine]:
    engine = TextEngine(folder, model, TOKENIZER.get_vocab_size())
    try:
        engine.start()
        yield engine
    finally:
        engine.stop()


def test_texts_go_round_through_all_three(engine: TextEngine) -> None:
    client, sent_ns = engine.client(), time.monotonic_ns()
    long_text = "the quick brown fox " * 1_500  # several records of a ring that has three
    prompts = {f"p{i}": text for i, text in enumerate([*CORPUS, *CORPUS, *CORPUS])}
    for request_id, prompt in prompts.items():
        client.say(generate(request_id, prompt=prompt, params=ONE, stream=len(request_id) % 2 == 0))
    for number in range(6):
        client.say(generate(f"long{number}", prompt=long_text, params=ONE))
    token_ids = np.array([TOKENIZER.token_to_id("the") or 70, 71], "<i4")
    client.say(generate("ids", token_ids=token_ids.tobytes(), params=ONE))
    client.say(
        generate("endless", chat=encoded_chat([{"role": "user", "content": "x"}], template="endless"), params=ONE)
    )
    client.say(generate("chat", chat=user_chat("fox ", "dog"), params=ONE))
    client.say(generate("stop", prompt="the fox jumps", params=SamplingParams(max_tokens=1, stop=["x j"])))
    end = TOKENIZER.token_to_id("</s>")
    named = SamplingParams(
        max_tokens=1, skip_special_tokens=False, truncate_prompt_tokens=3, logit_bias={end: -5}, bad_words=["the fox"],
        logprob_token_ids=[end],
    )  # fmt: skip
    client.say(generate("named", prompt="quick</s> brown</s>", params=named))
    client.say(generate("budget", prompt="fox", params=SamplingParams(thinking_token_budget=5)))
    client.finish(*prompts, *(f"long{i}" for i in range(6)), "ids", "endless", "chat", "stop", "named", "budget")
    for request_id, prompt in prompts.items():
        assert client.texts[request_id] == prompt
        assert client.finals[request_id].finish_reason == "length"
    num_tokens = len(TOKENIZER.encode(long_text).ids)
    assert num_tokens > 4_096
    assert client.finals["long0"].num_prompt_tokens == num_tokens
    assert client.texts["ids"] == TOKENIZER.decode(token_ids.tolist())
    assert client.texts["chat"] == "fox dog"
    assert client.finals["endless"].error_code == "invalid_request"
    assert "takes more than 0.2 s of processor time" in client.finals["endless"].error_message
    assert (client.texts["stop"], client.finals["stop"].finish_reason) == ("the fo", "stop")
    assert client.texts["named"] == "<s> brown</s>"
    asked = engine.scheduler.tokenized["named"]
    assert sent_ns < asked.arrived_ns < asked.tokenized_ns < time.monotonic_ns()
    assert asked.params == named.without_long_values().with_seed(asked.params.seed or 0)
    assert asked.params.bad_words == []
    bits = long_columns_of(np.frombuffer(asked.long_values, "<i4"))
    assert bits == BIAS_IDS | BIAS_VALUES | BAD_WORDS | LOGPROB_IDS
    assert "names none" in client.finals["budget"].error_message


def test_tokens_that_are_declared_beside_the_file_hold_for_prompts_answers_and_the_scheduler(
    folder: Path, model: Path
) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "extra_special_tokens": ["<|turn|>"],
    }
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    engine = TextEngine(folder, model, TOKENIZER.get_vocab_size() + 2)
    try:
        engine.start()
        ready = {message.role: message.info for message in engine.said if isinstance(message, Ready) and message.info}
        assert ready == {"tokenizer.0": {EOS_TOKEN_ID: TOKENIZER.get_vocab_size()}}
        client = engine.client()
        text = "the<|turn|> fox<|end|> jumps"
        client.say(generate("whole", prompt=text, params=ONE))
        client.say(generate("stop", prompt=text, params=SamplingParams(max_tokens=1, stop=["<|end|>"])))
        client.finish("whole", "stop")
        assert client.texts == {"whole": "the fox jumps", "stop": "the fox"}
        assert client.finals["whole"].num_prompt_tokens == len(TOKENIZER.encode("the fox jumps").ids) + 2
        assert client.finals["stop"].finish_reason == "stop"
    finally:
        engine.stop()


def test_a_request_that_cannot_be_encoded_fails_alone(engine: TextEngine) -> None:
    client = engine.client()
    client.say(generate("long", prompt="x y " * 2_500_000, params=ONE))
    client.say(generate("range", token_ids=np.array([1_000_000], "<i4").tobytes(), params=ONE))
    client.say(generate("good", prompt="the fox", params=ONE))
    client.finish("long", "range", "good")
    assert client.finals["long"].error_code == "invalid_request"
    assert "12000 tokens" in client.finals["long"].error_message
    assert "1000000" in client.finals["range"].error_message
    assert client.texts["good"] == "the fox"


def test_stats_and_health_cover_all_workers(engine: TextEngine) -> None:
    client = engine.client()
    client.say(generate("r", prompt="the fox", params=ONE))
    client.finish("r")
    client.say(Query(query_id=1, what="health"))
    client.say(Query(query_id=2, what="stats"))

    def have_both() -> bool:
        client.read()
        return len(client.others) == 2

    wait_until(have_both, "health and stats")
    health, stats = client.others
    assert isinstance(health, Health)
    assert isinstance(stats, Stats)
    assert health.state == "ready"
    assert stats.roles["tokenizer.0"]["num_requests"] == 1
    assert set(stats.roles) == {"gateway", "tokenizer.0", "detokenizer"}


def test_the_tokenizers_counter_says_what_its_ring_holds_until_the_scheduler_has_released_it(
    engine: TextEngine,
) -> None:
    client, counters = engine.client(), StatsPage(engine.stats["tokenizer.0"])
    engine.scheduler.may_release.clear()
    client.say(generate("r", prompt="the quick brown fox " * 1_500, params=ONE))  # more than one record
    wait_until(lambda: counters.snapshot()["num_prompt_records"] > 1, "the records to be counted")
    engine.scheduler.may_release.set()
    client.finish("r")
    wait_until(lambda: counters.snapshot()["num_prompt_records"] == 0, "the tokenizer to hear of their release")


def test_queries_are_answered_while_a_prompt_waits_for_the_scheduler_to_release_records(engine: TextEngine) -> None:
    client, counters = engine.client(), StatsPage(engine.stats["tokenizer.0"])
    engine.scheduler.may_release.clear()
    for number in range(2):  # together they need one record more than the ring has
        client.say(generate(f"long{number}", prompt="the quick brown fox " * 1_500, params=ONE))
    wait_until(lambda: counters.snapshot()["num_requests"] == 2, "the second prompt to be encoded")
    token_ids = np.array(TOKENIZER.encode(CORPUS[4]).ids, "<i4").tobytes()
    endless = encoded_chat([{"role": "user", "content": "x"}], template="endless")
    client.say(TokenizeQuery(request_id="endless", chat=endless))
    client.say(TokenizeQuery(request_id="unknown", token_ids=b"\xff\xff\xff\xff"))
    client.say(Keep(request_id="keep", key="k", value=b"v"))
    client.say(TokenizeQuery(request_id="tokens", prompt=CORPUS[4]))
    client.say(DetokenizeQuery(request_id="text", token_ids=token_ids))
    client.finish("endless", "unknown")

    def answers() -> dict[str, Any]:
        client.read()
        return {answer.request_id: answer for answer in client.others if not isinstance(answer, Alive)}

    wait_until(lambda: len(answers()) == 3, "the answers")
    assert answers()["tokens"].token_ids == token_ids
    assert answers()["text"].text == "<s>" + CORPUS[4]
    assert not answers()["keep"].found
    assert "takes more than 0.2 s of processor time" in client.finals["endless"].error_message
    assert "token_ids holds -1" in client.finals["unknown"].error_message
    assert (counters.snapshot()["num_queries"], counters.snapshot()["num_rejected"]) == (4, 2)
    assert engine.count("num_kept_bytes") > 0
    engine.scheduler.may_release.set()
    client.finish("long0", "long1")


@pytest.mark.slow
def test_a_client_that_asks_for_large_answers_and_never_reads_costs_little_memory(engine: TextEngine) -> None:
    flooding, good = engine.client(read_ahead=1), engine.client()
    gateway = psutil.Process(engine.workers["gateway"].pid)
    flooding.say(Keep(request_id="keep", key="k", value=bytes(8 << 20)))
    wait_until(lambda: engine.count("num_kept_bytes") > 0, "the value to be kept")
    before = gateway.memory_info().rss
    for number in range(500):
        flooding.say(Recall(request_id=f"r{number}", key="k"))
        flooding.say(TokenizeQuery(request_id=f"t{number}", prompt="the quick brown fox " * 2_000))
    wait_until(lambda: engine.count("num_received") == 1_001, "the flood to pass")
    wait_until(lambda: engine.count("num_open") == 0, "the queries to be answered")
    assert gateway.memory_info().rss - before < 128 << 20  # the answers are 4 GB
    assert engine.count("num_queue_full") > 400
    good.say(Recall(request_id="r", key="k"))
    wait_until(lambda: good.read() or good.others, "the other client's answer")
    assert len(good.others[0].value) == 8 << 20


def test_a_vanished_clients_requests_are_cancelled_within_seconds(engine: TextEngine) -> None:
    stays, leaves = engine.client(), engine.client()
    stays.say(generate("hold0", prompt="the fox", params=ONE))
    leaves.say(generate("hold1", prompt="the fox", params=ONE))
    wait_until(lambda: len(engine.scheduler.held) == 2, "both requests to run")
    leaves.socket.close(0)
    wait_until(lambda: engine.scheduler.cancelled, "the cancellation")
    stays.say(Cancel(request_id="hold0"))
    stays.finish("hold0")
    assert stays.finals["hold0"].finish_reason == "cancelled"
    assert len(engine.scheduler.cancelled) == 2


def test_time_and_cancellations_hold_while_a_tokenizer_makes_no_progress(engine: TextEngine) -> None:
    client = engine.client()
    tokenizer = engine.workers["tokenizer.0"]
    os.kill(tokenizer.pid, signal.SIGSTOP)
    try:
        scheduling = SchedulingParams(deadline_s=0.3)
        names = [f"late{number}" for number in range(6)]  # some of them with the tokenizer, and some behind
        for name in names:
            client.say(generate(name, prompt="the fox", params=ONE, scheduling=scheduling))
        client.finish(*names)
        assert {client.finals[name].finish_reason for name in names} == {"deadline"}
        for number in range(2):  # which wait in the others' places: the tokenizer still holds those
            client.say(generate(f"cancelled{number}", prompt="the fox", params=ONE))
            client.say(Cancel(request_id=f"cancelled{number}"))
        client.finish("cancelled0", "cancelled1")
        wait_until(lambda: engine.count("num_open") == engine.count("num_waiting") == 0, "nothing to be left")
        assert engine.count("num_deadline") == len(names)
        client.say(generate("good", prompt="the fox", params=ONE))
    finally:
        os.kill(tokenizer.pid, signal.SIGCONT)
    client.finish("good")
    assert client.texts["good"] == "the fox"
    assert len(engine.scheduler.echoed) == 1


def test_a_client_that_floods_and_never_reads_costs_little_memory_and_disturbs_nobody(engine: TextEngine) -> None:
    flooding, good = engine.client(read_ahead=1), engine.client()
    gateway = psutil.Process(engine.workers["gateway"].pid)
    flooding.say(generate("hold", prompt="the fox", params=ONE))
    wait_until(lambda: engine.scheduler.held, "the request to run")
    before = gateway.memory_info().rss
    for number in range(20):
        for _ in range(2_500):
            flooding.say(Query(query_id=1, what="stats"))
        good.say(generate(f"good{number}", prompt="the fox", params=ONE))
        good.finish(f"good{number}")
    wait_until(lambda: engine.count("num_received") > 50_000, "the flood to pass")
    assert gateway.memory_info().rss - before < 32 << 20  # the answers are 200 MB
    wait_until(lambda: engine.scheduler.cancelled, "the cancellation")
    assert good.refused == []
    flooding.finish("hold")  # it reads at last
    assert flooding.finals["hold"].error_code == "request_failed"
    assert len(flooding.others) < 5_000
    flooding.say(generate("again", prompt="the fox", params=ONE))
    flooding.finish("again")


def test_a_slow_client_loses_no_answer_though_it_has_all_that_it_may_open(folder: Path, model: Path) -> None:
    names = [f"r{number}" for number in range(16_384)]
    engine = TextEngine(folder, model, TOKENIZER.get_vocab_size(), max_open_requests=len(names))
    try:
        engine.start()
        client = engine.client(read_ahead=1)
        client.say(generate("hold", prompt="the fox", params=ONE))
        wait_until(lambda: engine.scheduler.held, "the request to run")
        engine.tell(Drain())
        engine.client().say(generate("late"))
        wait_until(lambda: engine.count("num_refused"), "draining")
        for name in names:
            client.say(generate(name))
        wait_until(lambda: engine.count("num_refused") == 1 + len(names), "refusals of all")
        engine.tell(Abort(error_message="over"))
        wait_until(lambda: any(isinstance(message, Drained) for message in engine.hear()), "Drained")
        client.finish("hold")
        assert client.finals["hold"].error_message == "over"
        assert [refused.request_id for refused in client.refused] == names
    finally:
        engine.stop()


def test_bad_frames_disturb_no_good_request(engine: TextEngine) -> None:
    good, bad = engine.client(), engine.client()
    draw = random.Random(5)
    names = []
    for number in range(3_000):
        bad.say(bad_frame(draw))
        if number % 100 == 0:
            names.append(f"good{number}")
            good.say(generate(names[-1], prompt=f"the fox {number}", params=ONE, stream=True))
            good.read()
            bad.read()
    good.finish(*names)
    assert all(good.texts[name] == f"the fox {name[4:]}" for name in names)
    assert good.refused == []
    assert all(worker.poll() is None for worker in engine.workers.values())


def test_stop_strings_that_end_more_sequences_than_a_message_holds_cancel_them_all(engine: TextEngine) -> None:
    keys = np.arange(1, 20_001, dtype="<i8")
    token_id = TOKENIZER.token_to_id("x")
    scheduler = engine.sockets.connect(engine.context, "detokenize")
    for some in np.split(keys, 2):
        opened = [Opened(int(key), Route(b"nobody", str(key), False), 1, TextOptions(stop=["x"])) for key in some]
        send(scheduler, StepOutputs(opened=opened))
    token_ids = np.full(len(keys), token_id, "<i4").tobytes()
    finish = bytes([FinishCode.RUNNING]) * len(keys)
    send(scheduler, StepOutputs(keys=keys.tobytes(), token_ids=token_ids, finish=finish))
    wait_until(lambda: len(engine.scheduler.cancelled) >= len(keys), "cancellations of all")
    assert engine.scheduler.cancelled == keys.tolist()


def test_only_the_user_may_connect_and_nothing_is_left_after_stop(folder: Path, model: Path) -> None:
    engine = TextEngine(folder, model, TOKENIZER.get_vocab_size())
    engine.start()
    client = engine.client()
    socket_file = folder / "front" / "client.sock"
    assert stat.S_IMODE(socket_file.stat().st_mode) == 0o600
    client.say(generate("hold", prompt="the fox", params=ONE))
    wait_until(lambda: engine.scheduler.held, "the request to run")
    engine.tell(Abort(error_message="the GPU process died"))
    client.finish("hold")
    assert client.finals["hold"].error_message == "the GPU process died"
    wait_until(lambda: any(isinstance(message, Drained) for message in engine.hear()), "Drained")
    assert set(engine.stop().values()) == {0}
    assert not socket_file.exists()


def test_draining_waits_for_open_requests(engine: TextEngine) -> None:
    client = engine.client()
    client.say(generate("hold", prompt="the fox", params=ONE))
    wait_until(lambda: engine.scheduler.held, "the request to run")
    engine.tell(Drain())

    def is_refused() -> bool:
        client.say(generate("late", prompt="the fox", params=ONE))
        client.read()
        return bool(client.refused)

    wait_until(is_refused, "a refusal")
    assert not any(isinstance(message, Drained) for message in engine.hear())
    client.say(Cancel(request_id="hold"))
    client.finish("hold")
    wait_until(lambda: any(isinstance(message, Drained) for message in engine.hear()), "Drained")


_LAUNCHER = """
import sys, time
from pathlib import Path
from tests.unit.workers.text.processes import TextEngine
engine = TextEngine(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
engine.start()
print(engine.workers["gateway"].pid, flush=True)
while True:
    time.sleep(1)
"""


def test_the_death_of_the_launcher_is_told_to_clients_and_nothing_is_left(folder: Path, model: Path) -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", _LAUNCHER, str(folder), str(model), str(TOKENIZER.get_vocab_size())],
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert launcher.stdout is not None
    gateway = os.pidfd_open(int(launcher.stdout.readline()))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    client = TextClient(context, f"ipc://{folder}/front/client.sock")
    client.say(generate("hold", prompt="the fox", params=ONE, stream=True))

    def has_text() -> bool:
        client.read()
        return bool(client.texts.get("hold"))

    wait_until(has_text, "the request to run")
    launcher.send_signal(signal.SIGKILL)
    client.finish("hold")
    assert client.finals["hold"].error_message == "the engine's launcher died"
    poller = zmq.Poller()
    poller.register(gateway, zmq.POLLIN)
    assert poller.poll(20_000), "the gateway is still there"
    assert not (folder / "front" / "client.sock").exists()
    launcher.wait()
    context.destroy(0)

"""lm-evaluation-harness on tasks made here: their right answers are what the model itself answers greedily."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

QUESTIONS = ["What is the for statement?", "What does str.join do?", "What is the json module?", "What is a class?"]
PROMPTS = ["The for statement", "The json module", "A list is", "The if statement"]
MAX_TOKENS = 24
DATASET = "dataset_path: json\ndataset_kwargs:\n  data_files: {path}\ntest_split: train\noutput_type: {kind}\n"
GREEDY = f'generation_kwargs:\n  until: ["\\n"]\n  do_sample: false\n  temperature: 0\n  max_gen_toks: {MAX_TOKENS}\n'


def metric(name: str, aggregation: str, *, higher: bool) -> str:
    is_better = str(higher).lower()
    return f"metric_list:\n  - metric: {name}\n    aggregation: {aggregation}\n    higher_is_better: {is_better}\n"


def evaluate(folder: Path, task: str, kind: str, rest: str, rows: list[dict[str, Any]], *arguments: str) -> Any:
    """Run one task. Returns its results."""
    data = folder / f"{task}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{task}.yaml").write_text(f"task: {task}\n" + DATASET.format(path=data, kind=kind) + rest)
    command = [
        sys.executable, "-m", "lm_eval", "run", "--tasks", task, "--include_path", str(folder),
        "--output_path", str(folder / "out"), *arguments,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-4_000:] + done.stderr[-4_000:]
    newest = max((folder / "out").rglob("results_*.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(newest.read_text())["results"][task]


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none")


@pytest.fixture(scope="module")
def completions(url: str, model: str, tokenizer: str) -> tuple[str, ...]:
    return (
        "--model", "local-completions",
        "--model_args", f"model={model},base_url={url}/v1/completions,tokenizer={tokenizer},max_length=1024",
    )  # fmt: skip


def greedy_texts(client: openai.OpenAI, model: str, stop: list[str] | None = None) -> list[str]:
    choices = client.completions.create(
        model=model, prompt=PROMPTS, temperature=0, max_tokens=MAX_TOKENS, stop=stop
    ).choices
    return [choice.text for choice in choices]


def test_the_choice_that_the_model_would_write_is_the_most_likely(
    client: openai.OpenAI, model: str, completions: tuple[str, ...], tmp_path: Path
) -> None:
    rows = [
        {"prompt": prompt, "choices": [" zebra violin 77 quartz", text, " orange Tuesday"]}
        for prompt, text in zip(PROMPTS, greedy_texts(client, model), strict=True)
    ]
    rest = 'doc_to_text: prompt\ndoc_to_choice: choices\ndoc_to_target: 1\ntarget_delimiter: ""\n'
    results = evaluate(
        tmp_path, "choices", "multiple_choice", rest + metric("acc", "mean", higher=True), rows, *completions
    )
    assert results["acc,none"] == 1.0


def test_the_models_own_text_is_less_surprising_than_the_same_words_backwards(
    client: openai.OpenAI, model: str, completions: tuple[str, ...], tmp_path: Path
) -> None:
    texts = [prompt + text for prompt, text in zip(PROMPTS, greedy_texts(client, model), strict=True)]
    rest = 'doc_to_text: ""\ndoc_to_target: text\n' + metric("byte_perplexity", "weighted_perplexity", higher=False)
    found = [
        evaluate(tmp_path, name, "loglikelihood_rolling", rest, [{"text": text} for text in each], *completions)
        for name, each in (("forwards", texts), ("backwards", [" ".join(text.split()[::-1]) for text in texts]))
    ]
    forwards, backwards = (results["byte_perplexity,none"] for results in found)
    assert 1 < forwards < backwards / 1.5


def test_generated_text_is_the_models(
    client: openai.OpenAI, model: str, completions: tuple[str, ...], tmp_path: Path
) -> None:
    answers = greedy_texts(client, model, stop=["\n"])
    assert any(answers)
    rows = [{"prompt": prompt, "answer": text} for prompt, text in zip(PROMPTS, answers, strict=True)]
    rest = "doc_to_text: prompt\ndoc_to_target: answer\n" + GREEDY + metric("exact_match", "mean", higher=True)
    assert evaluate(tmp_path, "texts", "generate_until", rest, rows, *completions)["exact_match,none"] == 1.0


def test_chats_are_answered_as_the_client_sees_them(
    client: openai.OpenAI, url: str, model: str, tmp_path: Path
) -> None:
    def ask(question: str) -> str | None:
        messages: Any = [{"role": "user", "content": question}]
        chat = client.chat.completions.create(
            model=model, messages=messages, temperature=0, max_tokens=MAX_TOKENS, stop=["\n"]
        )
        return chat.choices[0].message.content

    rows = [{"prompt": question, "answer": ask(question)} for question in QUESTIONS]
    rest = "doc_to_text: prompt\ndoc_to_target: answer\n" + GREEDY + metric("exact_match", "mean", higher=True)
    results = evaluate(
        tmp_path, "chats", "generate_until", rest, rows, "--apply_chat_template", "--model", "local-chat-completions",
        "--model_args", f"model={model},base_url={url}/v1/chat/completions",
    )  # fmt: skip
    assert results["exact_match,none"] == 1.0

"""Makes the tiny model of this directory: its text, its tokenizer, its weights and their config files.

The text comes from the running CPython: the help topics of `pydoc_data.topics`, and the docstrings of the public
standard library, which is parsed and not imported. Files with a notice of another licence are left out; the rest may be
redistributed under the PSF licence. The first pass reads the whole text, the second only the topics and the chats about
them and the modules. The same CPython, libraries, seed and processor give the same weights. It takes about 50 minutes
on one core.
"""

import argparse
import ast
import json
import math
import random
import re
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

PAD, END, SYSTEM, USER, ASSISTANT = SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TURNS = "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] | trim }}<|end|>{% endfor %}"
CHAT_TEMPLATE = TURNS + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", "vocab_size": 4096,
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 64,
    "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
SKIP = r"(site|dist)-packages|tests?|idlelib|lib2to3|turtledemo|encodings|distutils|tkinter|ensurepip|_(?!_init__$).*"
OTHER_LICENCE = re.compile(r"permission (to use|is (hereby )?granted)|apache license|mit license", re.I)
COPYRIGHT = re.compile(r"^.*(?:copyright\b.*\d{4}|\(c\) ).*$", re.I | re.M)
Chat = tuple[list[str], str, int]  # (ways to ask, answer, copies per epoch)
SYSTEM_PROMPTS = ["You are a helpful assistant.", "You answer questions about Python.", "Be brief."]
GREETINGS = {
    "Hello": "Hello! Ask me about a Python statement, a built-in type or a module of the standard library.",
    "Who are you?": "I am a tiny language model that has read the Python documentation and nothing else.",
    "Thank you": "You are welcome.",
}


def tidy(text: str) -> str:
    """Return text with plain quotes and each prose paragraph on one line. Code, grammar and tables stay as they are."""
    text = text.translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2014: "-", 0x2013: "-"})
    paragraphs = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = block.rstrip().split("\n")
        indents = {len(line) - len(line.lstrip()) for line in lines}
        code = re.search(r"::=|>>>| = |^\s*(\.\.\.|#|\+-|def |class |import |for \w+ in )|[=(]$|\w   +\w", block, re.M)
        if len(indents) == 1 and not code and len(block.split()) > 4:
            prose = " ".join(block.split())
            for mark in (r'"([^"]{1,40})"', r"``?([^`]+)``?", r"(?<!\w)\*(\w[\w -]*)\*"):
                prose = re.sub(mark, r"\1", prose)
            lines = [" " * indents.pop() + prose]
        paragraphs.append("\n".join(line.rstrip() for line in lines))
    return "\n\n".join(paragraphs)


def summary(text: str, limit: int = 420) -> str | None:
    """Return the first prose paragraph among the first three, cut at a sentence, as an answer; None without such a
    paragraph."""
    for first in map(str.strip, text.strip().split("\n\n")[:3]):
        if first[:1].isalpha() and len(first) >= 24 and first.count(" ") >= 4 and not re.search("\n|::=", first):
            first = re.sub(r"\. Syntax:$|:$", ".", first)
            first = first if len(first) <= limit else first[: first.rfind(". ", 0, limit) + 1]
            return first if first[-1:] in tuple(".!?)") else f"{first}." if first else None
    return None


def docstrings() -> Iterator[tuple[bool, str, str]]:
    """Yield (is a module, dotted name, text) of the public docstrings of the standard library, in a fixed order."""
    for path in sorted((root := Path(sysconfig.get_paths()["stdlib"])).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if any(re.fullmatch(SKIP, part) for part in parts):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        foreign = any("Python Software Foundation" not in line for line in COPYRIGHT.findall(source))
        if OTHER_LICENCE.search(source) or (foreign and not re.search(r"licensed to (the )?psf", source, re.I)):
            continue
        pending: list[tuple[str, Any]] = [(".".join(parts).removesuffix(".__init__"), ast.parse(source))]
        for name, node in pending:  # grows during the loop
            if len(text := ast.get_docstring(node) or "") >= 60:
                yield isinstance(node, ast.Module), name, tidy(text)
            for child in [] if isinstance(node, ast.FunctionDef) else node.body:
                if isinstance(child, (ast.ClassDef, ast.FunctionDef)) and not child.name.startswith("_"):
                    pending.append((f"{name}.{child.name}", child))


def load_text() -> tuple[list[str], list[str], list[str], list[Chat]]:
    """Return topic documents, docstring documents, the docstrings held out, and chats."""
    topic_docs, string_docs, held_out, chats = [], [], [], []
    sections: dict[
        tuple[str, str], None
    ] = {}  # in order and without duplicates, because several topics share a section
    for name in sorted(topics):
        parts = re.split(r"^(\S.*)\n[*=\-~^]{3,}\n", topics[name], flags=re.M)  # pydoc underlines its headings
        pairs = zip(parts[1::2], parts[2::2], strict=True)
        sections |= {(tidy(heading).replace('"', ""), tidy(body)): None for heading, body in pairs if body.strip()}
    for heading, body in sections:
        topic_docs.append(f"{heading}\n\n{body}")
        subject = heading if heading[:2].isupper() else heading[0].lower() + heading[1:]
        verb = "are" if re.search(r"[^s]s$", subject) else "is"
        asks = [f"What {verb} {subject}?", f"Explain {subject}.", f"Tell me about {subject}.", f"Describe {subject}."]
        if word := re.fullmatch(r"the (\w+) statement", subject):
            asks += [f"What does {subject} do?", f"How does {subject} work?"]
            asks += [form % word[1] for form in ("What is `%s`?", "What is %s?", "Explain %s.")]
        if answer := summary(body):
            chats.append((asks, answer, 4))
        for name, text in re.findall(r"^([a-z_]\w*(?:\.\w+)+)\(.*\)\n\n   (\S.*)$", body, flags=re.M):
            if answer := summary(text):
                chats.append(([f"What does {name} do?", f"What does {name}() do?", f"Explain {name}."], answer, 2))
    for number, (is_module, name, text) in enumerate(docstrings()):
        (string_docs if number % 40 else held_out).append(f"{name}\n\n{text}")
        subject = f"the {name} module" if is_module else name
        if number % 40 and (answer := summary(text)):
            asks = [f"What is {subject}?", f"What does {subject} do?", f"Explain {subject}."]
            chats.append((asks, answer, 1 + is_module))
    return topic_docs, string_docs, held_out, chats + [([ask, ask.lower()], text, 6) for ask, text in GREETINGS.items()]


def train_tokenizer(docs: list[str]) -> Tokenizer:
    """Train a byte-level BPE. Any text round-trips, even characters that the training text lacks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    signs = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=SPECIAL, initial_alphabet=signs, show_progress=False)
    tokenizer.train_from_iterator(docs, trainer)
    return tokenizer


def pieces(doc: str, tokenizer: Tokenizer, limit: int = 384) -> Iterator[torch.Tensor]:
    """Return a document's tokens in pieces. A long document is cut between paragraphs, and each later piece repeats the
    heading."""
    heading, *blocks = doc.split("\n\n")
    held = top = tokenizer.encode(heading).ids
    for block in blocks:
        ids = tokenizer.encode("\n\n" + block).ids
        if held is not top and len(held) + len(ids) > limit:
            yield torch.tensor([*held, SPECIAL.index(END)])
            held = top
        held = held + ids
    yield torch.tensor([*held, SPECIAL.index(END)])


def endless(docs: list[torch.Tensor], chats: list[Chat], tokenizer: Tokenizer, seed: int) -> Iterator[torch.Tensor]:
    """Yield every document and chat in random order, epoch after epoch. Each epoch words the questions again."""
    rng = random.Random(seed)
    while True:
        turns = []
        for asks, answer in (chat[:2] for chat in chats for _ in range(chat[2])):
            system = f"{SYSTEM}{rng.choice(SYSTEM_PROMPTS)}{END}" if rng.random() < 0.2 else ""
            turns.append(f"{system}{USER}{rng.choice(asks)}{END}{ASSISTANT}{answer}{END}")
        epoch = docs + [torch.tensor(encoding.ids) for encoding in tokenizer.encode_batch(turns)]
        rng.shuffle(epoch)
        yield from reversed(epoch)


def packed(source: Iterator[torch.Tensor], length: int) -> torch.Tensor:
    """Return a row of `length` tokens that starts where a piece starts. Its last piece is cut."""
    row = next(source)
    while len(row) < length:
        row = torch.cat([row, next(source)])
    return row[:length]


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the directory that an engine loads. Weights are stored as bfloat16, and meant to be run in float32."""
    weights = {name: weight.detach().bfloat16() for name, weight in model.named_parameters()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": PAD}
    tokens |= {"model_max_length": CONFIG["max_position_embeddings"], "chat_template": CHAT_TEMPLATE}
    ending = {"do_sample": False, "eos_token_id": CONFIG["eos_token_id"], "pad_token_id": CONFIG["pad_token_id"]}
    files = {"config.json": CONFIG, "generation_config.json": ending, "tokenizer_config.json": tokens}
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def learn(model: LlamaForCausalLM, source: Iterator[torch.Tensor], steps: int, peak: float, minutes: float) -> None:
    """Train one pass with AdamW, 1024 tokens per step, for at most `minutes`. The rate warms up and then falls along a
    cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    began, step, average = time.monotonic(), 0, math.log(CONFIG["vocab_size"])
    while (progress := max(step / steps, (time.monotonic() - began) / 60 / minutes)) < 1:
        cosine = 0.02 + 0.49 * (1 + math.cos(math.pi * progress))
        optimizer.param_groups[0]["lr"] = peak * min((step + 1) / 100, cosine)
        length = 1024 if step % 8 == 7 else 512
        batch = torch.stack([packed(source, length) for _ in range(1024 // length)])
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, average = step + 1, 0.98 * average + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"step {step} of {steps}, {100 * progress:.0f} %, loss {average:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny model of this directory.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write the model into")
    parser.add_argument("--steps", type=int, default=3200, help="steps of the first pass; the second has half as many")
    parser.add_argument("--minutes", type=float, default=math.inf, help="shorten each pass to this long at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    args.out.mkdir(parents=True, exist_ok=True)
    topic_docs, string_docs, held_out, chats = load_text()
    tokenizer = train_tokenizer(topic_docs * 2 + string_docs)
    topic_pieces = [ids for doc in topic_docs for ids in pieces(doc, tokenizer)]
    all_pieces = topic_pieces * 2 + [ids for doc in string_docs for ids in pieces(doc, tokenizer)]
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    learn(model, endless(all_pieces, chats, tokenizer, args.seed), args.steps, 3e-3, args.minutes)
    save(model, tokenizer, args.out)
    model = LlamaForCausalLM.from_pretrained(args.out)  # the second pass starts from the rounded weights
    source = endless(topic_pieces, [chat for chat in chats if chat[2] > 1], tokenizer, args.seed + 1)
    learn(model, source, args.steps // 2, 1e-3, args.minutes)
    save(model, tokenizer, args.out)
    losses = [model(input_ids=x[None], labels=x[None]).loss.item() for d in held_out for x in pieces(d, tokenizer)]
    print(f"mean loss over the docstrings held out: {sum(losses) / len(losses):.3f}")


if __name__ == "__main__":
    main()

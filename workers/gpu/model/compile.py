"""Compiles a model's decoder layers with torch.compile, which fuses what lies between its products and its attention.

Layer by layer: all layers of a kind are one graph, for any number of tokens but 1, so that start-up does not grow with
the model's depth. The small modules beside them, a last norm and rotary angles, are a graph each. What was compiled is
kept on disk for the next start.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import torch.fx.experimental._config
from torch import nn

from workers.gpu.attention.interface import layer_index, set_layer_indices
from workers.gpu.model.head import Head

logger = logging.getLogger(__name__)

_MAX_GRAPHS: Final = 16  # of one layer's code: kinds of layers, and batches of one token


def compile_layers(model: nn.Module, run: Callable[[], object], *, backend: Any = "inductor") -> bool:
    """Compile the layers in place by one of torch.compile's backends, and have `run`, a step, show that it works.

    A model that torch cannot compile is left as it was, which is said in the log. Returns whether it is compiled.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder()))
    dynamo = torch._dynamo
    torch.fx.experimental._config.use_duck_shape = False  # as many tokens as the model is wide is a coincidence
    dynamo.config.specialize_float = (
        True  # scales and epsilons are constants; tried as inputs, they cost a second trace
    )
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, _MAX_GRAPHS)
    layers = decoder_layers(model)
    if not layers:
        logger.warning("the model's layers run without torch.compile: they are in no list that it could be told by")
        return False
    set_layer_indices(model)
    failure = _compile(layers, run, backend)
    if failure is not None:
        logger.warning("the model's layers run without torch.compile, which fails: %s", failure)
        return False
    failure = _compile(neighbours(model, layers), run, backend)
    if failure is not None:
        logger.info("what is beside the model's layers runs without torch.compile, which fails: %s", failure)
    return True


def _compile(modules: Sequence[nn.Module], run: Callable[[], object], backend: Any) -> str | None:
    """Compile the modules if all of them can be; otherwise, say why not."""
    for module in modules:
        module.compile(fullgraph=True, dynamic=True, backend=backend)
    try:
        run()
    except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
        for module in modules:
            module._compiled_call_impl = None
        return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return None


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The members of the longest list of modules with attention of ours in them; empty if there is no such list."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    with_attention = [each for each in lists if any(layer_index(module) is not None for module in each.modules())]
    return list(max(with_attention, key=len, default=()))


def neighbours(model: nn.Module, layers: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules beside the list of layers, but for torch's own, which are an operator each, and embeddings."""
    owner = next(
        module for module in model.modules() if any(layers[0] in part.children() for part in module.children())
    )
    return [
        child
        for child in owner.children()
        if not type(child).__module__.startswith("torch.nn.") and not isinstance(child, nn.Embedding | Head)
    ]


def cache_folder() -> Path:
    """Where compiled code is kept, unless TORCHINDUCTOR_CACHE_DIR says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ringfeed" / "inductor"

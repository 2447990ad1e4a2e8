"""Compiles a model's decoder layers with torch.compile, which fuses the operations between matrix products and
attention.

Each layer is compiled alone. All layers of a kind share one graph for any number of tokens except 1, so that start-up
does not take longer for deeper models. The small modules beside the layers, a last norm and rotary angles, get a graph
each. The compiled code is kept on disk for the next start.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import torch.fx.experimental._config
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

from ipc.errors import ConfigError
from workers.gpu.attention.interface import layer_index, set_layer_indices
from workers.gpu.device.dependent_launch import is_dependent_launch_possible
from workers.gpu.model.epilogues import Epilogues
from workers.gpu.model.head import Head
from workers.gpu.products.multiply import Shape

logger = logging.getLogger(__name__)

_MAX_GRAPHS: Final = 16  # graphs of one layer's code: one per kind of layer, and more for batches of one token


def compile_layers(
    model: nn.Module, run: Callable[[], object], *, backend: Any = "inductor"
) -> Collection[Shape] | None:
    """Compile the layers in place with torch.compile's `backend`, and call `run`, which runs a step, to check that it
    works.

    Returns the shapes of the weights whose products apply gates. If torch cannot compile the model, logs a warning,
    leaves it as it was, and returns None.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder("inductor")))
    dynamo = torch._dynamo
    torch.fx.experimental._config.use_duck_shape = False  # equal sizes are a coincidence, not a constraint
    dynamo.config.specialize_float = True  # scales and epsilons are constants; as inputs they would cost a second trace
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, _MAX_GRAPHS)
    layers = decoder_layers(model)
    if not layers:
        logger.warning("the model runs without torch.compile: cannot find the list of decoder layers in this model")
        return None
    torch.compiler.config.cache_key_tag = _operators()
    if is_dependent_launch_possible(next(layers[0].parameters()).device):
        from workers.gpu.device.compiled_launch import let_compiled_kernels_start_early  # takes a second

        let_compiled_kernels_start_early()
    set_layer_indices(model)
    epilogues = Epilogues()
    failure = _compile(layers, run, epilogues.before(lookup_backend(backend)))
    if failure is not None:
        logger.warning("the model runs without torch.compile, which fails on its layers: %s", failure)
        return None
    failure = _compile(neighbours(model, layers), run, backend)
    if failure is not None:
        logger.info("the modules beside the model's layers run without torch.compile, which fails on them: %s", failure)
    return epilogues.gated


def _operators() -> str:
    """The signatures of our operators. Compiled code calls them, and torch's cache on disk would serve it to another
    version of this engine, whose operators take other arguments."""
    schemas = torch._C._jit_get_all_schemas()
    return " ".join(sorted(str(schema) for schema in schemas if schema.name.startswith("ringfeed::")))


def _compile(modules: Sequence[nn.Module], run: Callable[[], object], backend: Any) -> str | None:
    """Compile the modules. If one of them fails, leave all uncompiled and return the reason."""
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
    """Return the modules of the longest list that contains our attention; empty if the model has no such list."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    with_attention = [each for each in lists if any(layer_index(module) is not None for module in each.modules())]
    return list(max(with_attention, key=len, default=()))


def owner_of(model: nn.Module, layers: Sequence[nn.Module]) -> nn.Module:
    """Return the module that owns the list of decoder layers."""
    return next(module for module in model.modules() if any(layers[0] in part.children() for part in module.children()))


def neighbours(model: nn.Module, layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the modules beside the list of layers, except embeddings and torch's own modules, which are one operator
    each."""
    return [
        child
        for child in owner_of(model, layers).children()
        if not type(child).__module__.startswith("torch.nn.") and not isinstance(child, nn.Embedding | Head)
    ]


def cache_folder(name: str) -> Path:
    """Return the folder for what one start keeps for the next: "inductor" (TORCHINDUCTOR_CACHE_DIR overrides it), or
    "products". Raises ConfigError if this user has no home folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    if not base:
        try:
            base = str(Path.home() / ".cache")
        except RuntimeError:
            raise ConfigError(
                "this user has no home folder for what is kept between starts: set HOME or XDG_CACHE_HOME"
            ) from None
    return Path(base) / "ringfeed" / name

"""Computes a loaded model's linear layers as our products, in 8 bits if that is configured, or as the checkpoint does.

The layers are found by their type inside the decoder layers, never by a family's names. Each product is checked against
its own dequantised weights in float32, and so is each plan that is chosen for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Final

import torch
from torch import nn

from ipc.errors import ConfigError, ModelUnsupported
from workers.gpu.config import ModelConfig
from workers.gpu.e4m3 import E4M3
from workers.gpu.model.compile import cache_folder, decoder_layers
from workers.gpu.model.head import replace_head
from workers.gpu.model.weights import Progress
from workers.gpu.products.multiply import Shape, can_scale
from workers.gpu.products.plan import MAX_ROWS
from workers.gpu.products.product import ROUTER_OUTPUTS, Product, find_read, quantizable, replace_linears, stored_scale
from workers.gpu.products.tuning import choose_plans, error_of

logger = logging.getLogger(__name__)

_TOLERANCE: Final = 0.1  # of a product in fp8 whose activations are rounded to fp8 too, about 0.04


def use_products(
    model: nn.Module, config: ModelConfig, dtype: torch.dtype, device: torch.device, forward: Callable[[], object]
) -> list[Product]:
    """Replace the linear layers of a checked model that computes in `dtype`. Returns the products.

    Layers whose checkpoint stores fp8, or groups of 4 bits, compute in this format with the checkpoint's scales. Layers
    whose weights `forward`, one forward of the model, reads in another way than by calling the layer stay as they are.
    Frees the 16-bit weights layer by layer; until then, all of them are in memory.

    Raises ConfigError if `quantization` finds nothing to round, and ModelUnsupported if a rounded product is not what
    its weights say.
    """
    is_fp8 = config.quantization == "fp8"
    layers = decoder_layers(model)
    is_stored = any(stored_scale(module) is not None for layer in layers for module in layer.modules())
    if device.type != "cuda" and not is_fp8 and not is_stored:
        return []  # torch's own products serve
    read = find_read(layers, forward) if is_fp8 or is_stored else ()
    products = replace_linears(layers, read)
    if is_fp8:
        rounded = quantizable(products)
        if not rounded:
            raise ConfigError(
                f'model.quantization ("fp8") finds no linear layers of more than {ROUTER_OUTPUTS} outputs in this '
                "model's decoder layers, and rounds no smaller ones: leave it out"
            )
        for product in rounded:
            product.to_fp8()
    for product in products:
        if product.scale is not None:
            _check(product, config, dtype)
    _tell_of_slow_prompts(products, dtype, device)
    return products


def _tell_of_slow_prompts(products: list[Product], dtype: torch.dtype, device: torch.device) -> None:
    """Log a warning if a GPU has no product in fp8 for products that hold fp8."""
    held = [(each.weight, each.scale) for each in products if each.scale is not None and each.weight.dtype == E4M3]
    if device.type == "cuda" and not all(can_scale(weight, scale, dtype, device) for weight, scale in held):
        logger.warning(
            "weights in fp8 are dequantised in each step of more than %d tokens, which makes prompts slower: products "
            "in fp8 need a GPU of compute capability 8.9, model.dtype bfloat16, and layers of multiples of 16",
            MAX_ROWS,
        )


def _check(product: Product, config: ModelConfig, dtype: torch.dtype) -> None:
    """Raise ModelUnsupported if a product in fewer than 16 bits is not what its weights say."""
    error = error_of(None, product, dtype, MAX_ROWS + 1)
    if error > _TOLERANCE:
        cure = "use an unquantised checkpoint" if config.quantization == "none" else "leave model.quantization out"
        raise ModelUnsupported(
            f"model.path ({config.path!r}): a product of {product.out_features} x {product.in_features} weights in "
            f"{4 if product.scale is not None and product.scale.ndim == 3 else 8} bits differs by {error:.2g} from "
            f"what its weights say: {cure}"
        )


def tune_products(
    model: nn.Module,
    products: list[Product],
    gated: Collection[Shape],
    dtype: torch.dtype,
    max_rows: int,
    device: torch.device,
    progress: Progress,
) -> None:
    """Choose how steps of up to `max_rows` tokens compute these products and the head; see `tuning`."""
    if device.type == "cuda":
        head = replace_head(model)
        choose_plans(
            products if head is None else [*products, head], dtype, max_rows, device, cache_folder("products"),
            lambda share: progress("tuning products", share), gated,
        )  # fmt: skip

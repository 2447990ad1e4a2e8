"""Computes a loaded model's linear layers as our products, in 8 bits if that is configured.

The layers are found by their type inside the decoder layers, never by a family's names. What changes their results is
checked: each plan against its product in float32, and the model in 8 bits against its own dequantised weights.
"""

from __future__ import annotations

from torch import nn

from ipc.errors import ConfigError, ModelUnsupported
from workers.gpu.config import ModelConfig
from workers.gpu.model.compile import cache_folder, decoder_layers
from workers.gpu.model.gate import is_near, probe_logits
from workers.gpu.model.head import replace_head
from workers.gpu.model.probed_model import ProbedModel
from workers.gpu.model.weights import Progress
from workers.gpu.products.multiply import computing_plainly
from workers.gpu.products.product import quantizable, replace_linears, stored_scale
from workers.gpu.products.tuning import choose_plans


def use_products(
    model: nn.Module, config: ModelConfig, facts: ProbedModel, max_model_len: int, max_rows: int, progress: Progress
) -> None:
    """Replace the linear layers of a checked model, for steps of up to `max_rows` tokens.

    Layers whose checkpoint stores fp8 compute in fp8 with the checkpoint's scales, whatever `quantization` is.
    Frees the 16-bit weights layer by layer. Raises ConfigError if `quantization` finds nothing to round, and
    ModelUnsupported if the rounded model does not compute what its dequantised weights say.
    """
    device = next(model.parameters()).device
    is_fp8 = config.quantization == "fp8"
    layers = decoder_layers(model)
    is_stored = any(stored_scale(module) is not None for layer in layers for module in layer.modules())
    if device.type != "cuda" and not is_fp8 and not is_stored:
        return  # torch's own products serve
    products = replace_linears(layers)
    if is_fp8:
        rounded = quantizable(products)
        if not rounded:
            raise ConfigError(
                'model.quantization ("fp8") finds no linear layers in this model\'s decoder layers: leave it out'
            )
        for product in rounded:
            product.to_fp8()
    if device.type == "cuda":
        head = replace_head(model)
        choose_plans(
            products if head is None else [*products, head], facts.cache_dtype, max_rows, device,
            cache_folder("products"), lambda share: progress("tuning products", share),
        )  # fmt: skip
    with computing_plainly():
        expected = probe_logits(model, max_model_len, device)
    if not is_near(probe_logits(model, max_model_len, device), expected, facts.cache_dtype):
        cure = "leave model.quantization out" if is_fp8 else "use an unquantised checkpoint of the model"
        raise ModelUnsupported(
            f"model.path ({config.path!r}): its products in 8 bits do not give what the weights say: {cure}"
        )

"""Norms go into the products of real layers, the sums into products as residuals, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import GraphModule
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from workers.gpu.attention.interface import ATTENTION_NAME, handling_attention, set_layer_indices
from workers.gpu.model.epilogues import Epilogues
from workers.gpu.model.norm_pattern import PRODUCT
from workers.gpu.products.product import replace_linears

WIDTH = 64
GATED = PRODUCT[2:]


class Copied:
    """Attention that uses all that it gets, each token alone."""

    def attend(self, _: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **__: Any) -> torch.Tensor:
        return query + (key * value).mean(1, keepdim=True)


def fused_layer(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
    """What a layer of this family computes as it is, and with its patterns fused, and its nodes then."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](
        vocab_size=128, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION_NAME).eval()
    set_layer_indices(model)
    layer, seen = model.model.layers[0], []
    replace_linears([layer])
    for name, parameter in layer.named_parameters():
        if "norm" in name:
            parameter.data.normal_(1.0, 0.3)

    def backend(graph: GraphModule, _: Any) -> Any:
        seen.extend(graph.graph.nodes)
        return graph

    x, positions = torch.randn(1, 5, WIDTH).to(dtype), torch.arange(5)[None]
    rest = {"position_ids": positions, "attention_mask": None}
    rest["position_embeddings"] = model.model.rotary_emb(x, positions)
    monkeypatch.setattr("workers.gpu.attention.interface._paged_attention", _attend)
    with torch.inference_mode(), handling_attention(Copied()), torch._dynamo.config.patch(specialize_float=True):
        expected = layer(x, **rest)
        layer.compile(fullgraph=True, dynamic=True, backend=Epilogues().before(backend))
        return expected, layer(x, **rest), seen


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return Copied().attend(None, query, key, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "norms", "residuals"),
    [
        ("llama", 5, 2),  # of each of q, k, v, gate and up, which only fusing makes one product
        ("qwen3", 5, 2),
        ("mistral", 5, 2),
        ("phi3", 2, 2),
        ("gemma2", 0, 0),  # multiplies by 1 + weight, and norms what it adds
        ("olmo2", 0, 0),  # norms after its products
    ],
)
def test_norms_of_products_and_sums_go_into_them(
    kind: str, norms: int, residuals: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, result, nodes = fused_layer(kind, dtype, monkeypatch)
    first = [each[0] if isinstance(each, tuple) else each for each in (expected, result)]
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.03}
    torch.testing.assert_close(first[1], first[0], **tolerance)
    products = [node for node in nodes if node.target in PRODUCT]
    normed = [node for node in products if len(node.args) == (6 if node.target in GATED else 7)]
    assert len(normed) == norms
    assert sum(node.args[4] is not None for node in products if node.target not in GATED) == residuals
    if norms:
        assert not any(node.target == "pow" for node in nodes if kind != "qwen3"), "a norm is computed twice"

"""The experts of gpt-oss in mxfp4: float4 e2m1 in blocks of 32, each with a power of two as its scale.

    <experts>_blocks  [E, N, K / 32, 16] uint8: two numbers in a byte, the first in the low bits
    <experts>_scales  [E, N, K / 32] uint8: the exponent of the scale, plus 127

transformers dequantises them to [E, K, N], as its GptOssExperts holds them. Source: transformers
(integrations/mxfp4.py: convert_moe_packed_tensors).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from workers.gpu.model.formats.stored_format import MalformedWeights, StoredWeight, check_dtype, check_shape

_BLOCKS: Final = "_blocks"
_SCALES: Final = "_scales"
_BLOCK_BYTES: Final = 16


class Mxfp4:
    def find(self, dtypes: Mapping[str, str]) -> Iterator[StoredWeight]:
        for name in dtypes:
            if not name.endswith(_BLOCKS):
                continue
            weight = name.removesuffix(_BLOCKS)
            if weight + _SCALES not in dtypes:
                raise MalformedWeights(f"the files lack {weight}{_SCALES}, a part of the quantised weight {name}")
            yield StoredWeight(weight, {"blocks": name, "scales": weight + _SCALES})

    def dequantise(
        self, weight: StoredWeight, parts: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> tuple[torch.Tensor, None]:
        blocks, scales = parts["blocks"], parts["scales"]
        check_dtype(weight, parts, "blocks", torch.uint8)
        check_dtype(weight, parts, "scales", torch.uint8)
        if blocks.ndim != 4 or blocks.shape[3] != _BLOCK_BYTES:
            stored = list(blocks.shape)
            raise MalformedWeights(f"{weight.parts['blocks']} is {stored}, and not [experts, N, K / 32, 16]")
        check_shape(weight, parts, "scales", blocks.shape[:3])
        return convert_moe_packed_tensors(blocks, scales, dtype=dtype), None

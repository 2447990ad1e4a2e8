"""Decides at load whether a model of transformers computes the same on paged attention, and refuses it if not.

A packed step is right for a model whose tokens affect each other only in the attention function, which knows the tokens
that each token may see. Three checks decide. The configuration shows what a family declares. The modules of the built
model show how it embeds positions. A probe runs the model's forward a few times, with an attention in which tokens do
not see each other. It records the attention calls of each layer, and compares their masks with their arguments. It also
finds other parts that carry information from token to token (state-space layers, convolutions, linear attention) or
count positions themselves.
"""

from __future__ import annotations

import inspect
from typing import Any, Final

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from ipc.errors import ConfigError, ModelUnsupported
from workers.gpu.attention.interface import ATTENTION_NAME, handling_attention
from workers.gpu.model.decoder_output import DecoderOutput
from workers.gpu.model.masks import building_masks
from workers.gpu.model.max_length import num_positions
from workers.gpu.model.probe import Call, MaskProbe, Probe, unsupported
from workers.gpu.model.probed_model import ProbedModel

_LAYER_TYPES: Final = ("full_attention", "sliding_attention", "chunked_attention")
_WITHOUT_TOKENS: Final = ("mlp", "moe")  # layers that treat each token separately
_PROBE_TOKENS: Final = 8
# As a share of the largest logit.
_PROBE_TOLERANCE: Final = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def check_config(config: Any, max_model_len: int) -> None:
    """Check a transformers configuration, before any weight is read.

    Raises ModelUnsupported for a declared trait that paged attention does not cover, ConfigError if sequences of
    `max_model_len` are longer than the model's positions.
    """
    text = config.get_text_config()
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelUnsupported(
            f"transformers has no causal language model for model_type {config.model_type!r} (AutoModelForCausalLM "
            "does not list it): use a checkpoint of its text model, or another model"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise unsupported(config, "it is an encoder-decoder model")
    if not getattr(text, "is_causal", True):
        raise unsupported(config, "its attention is not causal")
    num_layers = getattr(text, "num_hidden_layers", None)
    if isinstance(num_layers, int) and num_layers < 1:
        raise unsupported(config, f"num_hidden_layers ({num_layers}) gives it no layers")
    if getattr(text, "num_kv_shared_layers", None):
        raise unsupported(config, f"its last {text.num_kv_shared_layers} layers share the KV of earlier ones")
    layer_types = set(getattr(text, "layer_types", None) or ())
    others = sorted(layer_types - {*_LAYER_TYPES, *_WITHOUT_TOKENS})
    if others:
        raise unsupported(config, f"it has layers of type {', '.join(others)}; known are {', '.join(_LAYER_TYPES)}")
    chunk = getattr(text, "attention_chunk_size", None)
    if chunk and max_model_len > chunk and "chunked_attention" in layer_types:
        raise ConfigError(
            f"scheduler.max_model_len ({max_model_len}) is more than {chunk}: beyond {chunk} tokens, this "
            f"{config.model_type} model attends in chunks, which paged attention does not support; set it to "
            f"{chunk} or less"
        )
    limit = num_positions(text.to_dict())
    if limit is not None and max_model_len > limit:
        raise ConfigError(
            f"scheduler.max_model_len ({max_model_len}) is more than the {limit} positions of this {config.model_type} "
            f"model: set it to {limit} or less"
        )


def prepare_model(model: nn.Module, max_model_len: int) -> None:
    """Set a loaded model to paged attention, and fix the parts that would depend on a step's longest sequence.

    Raises ModelUnsupported if either is impossible, ConfigError if it is impossible with this `max_model_len`.
    """
    config: Any = model.config
    text = config.get_text_config()
    model.set_attn_implementation(ATTENTION_NAME)  # type: ignore[operator]
    if text._attn_implementation != ATTENTION_NAME:  # transformers keeps the old one without an error
        raise unsupported(config, "its attention does not go through transformers' attention interface")
    for module in model.modules():
        if isinstance(module, PreTrainedModel):  # it would search every input for padding, which waits for the device
            module.warn_if_padding_and_no_attention_mask = lambda *_, **__: None
        if getattr(module, "rope_type", None) is not None:
            _freeze_rope(config, module, max_model_len)


def _freeze_rope(config: Any, module: Any, max_model_len: int) -> None:
    """Replace RoPE that depends on the longest position of the batch by its form for short sequences.

    Up to the original length the model computes exactly this. Beyond it, one long sequence would change the others.
    """
    by_layer_type = isinstance(module.rope_type, dict)
    for layer_type, rope_type in list(module.rope_type.items()) if by_layer_type else [(None, module.rope_type)]:
        if rope_type != "longrope" and "dynamic" not in rope_type:
            continue
        parameters = module.config.rope_parameters[layer_type] if by_layer_type else module.config.rope_parameters
        limit = parameters.get("original_max_position_embeddings") or module.config.max_position_embeddings
        if max_model_len > limit:
            raise ConfigError(
                f"scheduler.max_model_len ({max_model_len}) is more than {limit}: beyond it the {rope_type} RoPE of "
                f"this {config.model_type} model depends on the longest sequence of a batch; set it to {limit} or less"
            )
        if by_layer_type:
            module.rope_type[layer_type] = "default"
        else:
            module.rope_type = "default"


@torch.inference_mode()
def probe_model(model: nn.Module, max_model_len: int, device: torch.device) -> ProbedModel:
    """Run a prepared model on a few tokens. Raises ModelUnsupported if its tokens affect each other outside of
    attention."""
    config: Any = model.config
    text = config.get_text_config()
    input_ids, positions, wanted = _probe_inputs(model, max_model_len, device)
    num_tokens = len(input_ids)
    probe = Probe(config)
    logits = _call(model, probe, input_ids, positions, wanted)
    _check_calls(config, text, probe.calls)
    with building_masks(model):
        _call(model, MaskProbe(config, max_model_len), input_ids, positions, wanted)
    if logits.ndim != 3 or logits.shape[:2] != (1, num_tokens):
        raise unsupported(config, f"its logits for {num_tokens} tokens have the shape {list(logits.shape)}")
    if not logits.amax(dim=-1).isfinite().all():  # -inf excludes a token; NaN, +inf, or only -inf is a fault
        raise ModelUnsupported(_why_not_finite(model))
    if num_tokens > 1 and (logits == logits[:, :1]).all():
        raise ModelUnsupported(
            f"the logits of this {config.model_type} model are the same for different tokens: the files of its weights "
            "are damaged (all zero?), or config.json is of another model"
        )
    if torch.equal(logits, _call(model, Probe(config), input_ids, positions, wanted.flip(0))) and num_tokens > 1:
        raise unsupported(config, "its logits_to_keep does not select tokens by index")

    # If tokens affect each other only in attention, their order in the input does not change the logits.
    turned = _call(model, Probe(config), input_ids.flip(0), positions.flip(0), wanted.flip(0))
    first = probe.calls[0]
    if not is_near(turned, logits, first.dtype):
        raise unsupported(
            config,
            "its tokens affect each other outside of attention, or it counts positions by itself "
            f"(the same tokens in another order change the logits by {_difference(turned, logits):.0%})",
        )
    return ProbedModel(
        layers=[call.shape for call in probe.calls],
        cache_dtype=first.dtype,
        vocab_size=logits.shape[-1],
        logits_dtype=logits.dtype,
        has_softcap=any(call.has_softcap for call in probe.calls),
        has_sinks=any(call.has_sinks for call in probe.calls),
        replays_decoder=_replays_decoder(model, input_ids, positions, wanted, logits),
    )


def _replays_decoder(
    model: nn.Module, input_ids: torch.Tensor, positions: torch.Tensor, wanted: torch.Tensor, logits: torch.Tensor
) -> bool:
    """Return whether the forward, with its decoder's last output in place of the decoder, gives the logits of any
    tokens."""
    kept = DecoderOutput.of(model)
    if kept is None:
        return False
    with kept.kept() as outputs:
        _call(model, Probe(model.config), input_ids, positions, wanted)
    if len(outputs) != 1:
        return False
    with kept.replayed(outputs):
        turned = _call(model, Probe(model.config), input_ids, positions, wanted.flip(0))
    return turned.shape == logits.shape and is_near(turned.flip(1), logits, logits.dtype)


def _why_not_finite(model: Any) -> str:
    """Return the reason why a model's logits are NaN or infinite, as an error message."""
    of_model = f"of this {model.config.model_type} model"
    dtype = str(model.dtype).removeprefix("torch.")
    for name, weight in model.named_parameters():
        if weight.itemsize > 1 and not weight.isfinite().all():
            return (
                f"the weights {of_model} hold NaN or infinity ({name}): either the files are damaged, or their numbers "
                f"are too large for {dtype}"
            )
    return (
        f"the logits {of_model} are not finite in {dtype}, though its weights are: set model.dtype to bfloat16 or "
        "float32, or check that config.json belongs to these weights"
    )


@torch.inference_mode()
def probe_logits(model: nn.Module, max_model_len: int, device: torch.device) -> torch.Tensor:
    """Run a model that has passed on the probe's tokens. Returns its logits, [num_tokens, vocab_size]."""
    return _call(model, Probe(model.config), *_probe_inputs(model, max_model_len, device))[0]


def is_near(logits: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether a probe's logits are the expected ones, up to roundings of the `dtype` that the model computes
    in."""
    return _difference(logits, expected) <= _PROBE_TOLERANCE.get(dtype, 1e-3)


def _difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the median token's largest error, divided by the largest logit. The median, because a rounding may route
    one token to other experts."""
    error = torch.where(logits == expected, 0, (logits - expected).abs()).amax(dim=-1).flatten()  # -inf equals -inf
    error /= expected.abs().masked_fill(expected.isinf(), 0).max().clamp(min=1e-6)
    return float(error.median())


def _probe_inputs(
    model: nn.Module, max_model_len: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, positions, and the indices of the wanted logits: all tokens, the last one first."""
    config: Any = model.config
    num_tokens = min(_PROBE_TOKENS, max_model_len)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, config.get_text_config().vocab_size, (num_tokens,), generator=generator)
    wanted = torch.arange(num_tokens - 1, -1, -1, device=device)
    return input_ids.to(device), torch.arange(num_tokens, device=device), wanted


def _call(
    model: nn.Module, probe: Probe, input_ids: torch.Tensor, positions: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    parameters = inspect.signature(model.forward).parameters
    for name in ("position_ids", "logits_to_keep"):
        if name not in parameters:
            raise unsupported(model.config, f"its forward has no parameter {name}")
    with handling_attention(probe):
        output = model(
            input_ids=input_ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=wanted,
        )
    logits: torch.Tensor = output.logits
    return logits


def _check_calls(config: Any, text: Any, calls: list[Call]) -> None:
    num_layers = text.num_hidden_layers
    indices = [call.layer_idx for call in calls]
    if indices != list(range(num_layers)):
        missing = sorted(set(range(num_layers)) - {index for index in indices if index is not None})
        if not calls:
            detail = "none of its layers calls transformers' attention interface"
        elif len(set(indices)) < len(indices):
            detail = f"its layers attend more than once in a forward ({len(calls)} calls of {len(set(indices))} layers)"
        elif missing:
            detail = f"its layers {', '.join(map(str, missing))} have no attention"
        else:
            detail = f"its {num_layers} layers call attention {len(calls)} times, as layers {indices}"
        raise unsupported(config, detail)
    if len({call.dtype for call in calls}) > 1:
        raise unsupported(config, "its layers have KV of different dtypes")

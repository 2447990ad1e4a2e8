"""Lets a model compute logits of more tokens of a step without running its layers again.

The model's own forward turns its decoder's output into logits; scales and caps may be part of that. It is called again
with the decoder's last output in place of the decoder. So the logits of a long prompt are computed in pieces, and never
lie in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from torch import nn

from workers.gpu.model.compile import decoder_layers, owner_of


class DecoderOutput:
    """The output of a model's decoder, the module that owns its layers."""

    def __init__(self, decoder: nn.Module) -> None:
        self._decoder = decoder

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        """None: the model has no list of layers, or owns it itself, so that nothing stands between decoder and head."""
        layers = decoder_layers(model)
        decoder = owner_of(model, layers) if layers else model
        return None if decoder is model else cls(decoder)

    @contextmanager
    def kept(self) -> Iterator[list[Any]]:
        """Yields a list that gets the output of each call of the decoder."""
        outputs: list[Any] = []
        forward = self._decoder.forward

        def keep(*args: Any, **kwargs: Any) -> Any:
            outputs.append(forward(*args, **kwargs))
            return outputs[-1]

        with self._replaced(keep):
            yield outputs

    @contextmanager
    def replayed(self, outputs: list[Any]) -> Iterator[None]:
        """Let the decoder return what `kept` has collected, instead of computing."""
        assert len(outputs) == 1, f"the model called its decoder {len(outputs)} times in a forward"
        with self._replaced(lambda *_, **__: outputs[0]):
            yield

    @contextmanager
    def _replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        own = vars(self._decoder).get("forward")
        vars(self._decoder)["forward"] = forward
        try:
            yield
        finally:
            if own is None:
                del vars(self._decoder)["forward"]
            else:
                vars(self._decoder)["forward"] = own

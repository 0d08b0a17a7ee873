"""What a loop asks of a model."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int32

from ._batch import RaggedBatch


@runtime_checkable
class Model(Protocol):
    """What `generate` asks of a model."""

    def __call__(
        self, tokens: Int32[Array, " num_tokens"], cache: Any, batch: RaggedBatch
    ) -> tuple[Float[Array, "num_tokens hidden_size"], Any]:
        """The hidden state of each token, and the cache with their keys and values."""
        ...

    def unembed(
        self, hidden: Float[Array, "num_tokens hidden_size"]
    ) -> Float[Array, "num_tokens vocab_size"]:
        """The logits of the token after each."""
        ...

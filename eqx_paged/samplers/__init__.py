"""How the next token is chosen: steps from logits to logits, and a draw."""

from ._chain import (
    categorical as categorical,
    Chain as Chain,
    chain as chain,
    greedy as greedy,
)
from ._history import History as History
from ._processor import Processor as Processor
from ._processors import (
    frequency_penalty as frequency_penalty,
    logit_bias as logit_bias,
    min_p as min_p,
    presence_penalty as presence_penalty,
    repetition_penalty as repetition_penalty,
    temperature as temperature,
    top_k as top_k,
    top_p as top_p,
)

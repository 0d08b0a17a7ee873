"""levanter's inference engine: `python -m scripts._suites.peers.levanter_side`, by a Python
that has it."""

# pyright: reportMissingImports=false
# It is not among what is installed for development.

import importlib.metadata

import haliax
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
import transformers
from levanter.inference.engine import InferenceEngine, InferenceEngineConfig, Request
from levanter.inference.jit_scheduler import SeqDecodingParams
from levanter.models.llama import LlamaConfig

from ..protocol import Memory, serve, timed
from .common import cut


PAGE_SIZE = 64
MAX_STOPS = 8


class Levanter(Memory):
    """An engine a shape of batch, each made before the clock starts. It shares pages among
    the answers to one prompt, but not a prefix among prompts."""

    def __init__(self):
        self._engines = {}

    def versions(self):
        return {
            "levanter": importlib.metadata.version("levanter"),
            "jax of levanter": jax.__version__,
        }

    def load(self, checkpoint, dtype):
        # It asks for a tokenizer, but no text goes through it here.
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
        self._tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
        self._dtype = jnp.dtype(dtype)
        converter = LlamaConfig(tokenizer=self._tokenizer).hf_checkpoint_converter()
        converter = converter.replaced(
            reference_checkpoint=checkpoint, tokenizer=self._tokenizer
        )
        self._model = converter.load_pretrained(
            LlamaConfig().model_type,
            ref=checkpoint,
            resize_vocab_to_match_tokenizer=False,
            dtype=self._dtype,
        )
        return {}

    def run(self, prefix, prompts, max_new_tokens, stops):
        whole = [prefix + prompt for prompt in prompts]
        engine = self._engine(whole, max_new_tokens)
        tokens, seconds = self._generate(engine, whole, max_new_tokens, stops)
        return {"tokens": [cut(row, stops) for row in tokens], "seconds": seconds}

    def first(self, prompt):
        self.run([], [prompt], 1, [])
        return {}

    def _engine(self, prompts, max_new_tokens):
        longest = max(map(len, prompts)) + max_new_tokens
        pages = sum(-(-(len(x) + max_new_tokens) // PAGE_SIZE) for x in prompts)
        num_tokens = sum(map(len, prompts))
        shape = (len(prompts), longest, pages, num_tokens)
        if shape not in self._engines:
            config = InferenceEngineConfig(
                max_seq_len=longest,
                page_size=PAGE_SIZE,
                max_seqs=len(prompts),
                max_pages=pages,
                max_stop_seqs=MAX_STOPS,
                max_stop_tokens=1,
                max_seqs_in_prefill=len(prompts),
                max_prefill_size=num_tokens,
                compute_dtype=self._dtype,
            )
            self._engines[shape] = InferenceEngine.from_model_with_config(
                model=self._model, tokenizer=self._tokenizer, config=config
            )
        return self._engines[shape]

    @timed
    def _generate(self, engine, prompts, max_new_tokens, stops):
        stop_tokens = None
        if stops:
            ids = jnp.asarray(stops, jnp.int32)[:, None]
            stop_tokens = haliax.named(ids, ("stop_seq", "position"))
        requests = [
            Request(
                prompt_tokens=prompt,
                request_id=i,
                decode_params=SeqDecodingParams(
                    max_num_tokens=jnp.array(len(prompt) + max_new_tokens, jnp.int32),
                    stop_tokens=stop_tokens,
                    temperature=jnp.array(0.0, jnp.float32),
                    key=jax.random.PRNGKey(i),
                ),
                n_generations=1,
            )
            for i, prompt in enumerate(prompts)
        ]
        return [list(map(int, row)) for row in engine.generate(requests).tokens]


if __name__ == "__main__":
    devices = np.array(jax.devices()[:1]).reshape(1, 1)
    mesh = haliax.partitioning.set_mesh(jax.sharding.Mesh(devices, ("data", "model")))
    with mesh, haliax.axis_mapping({}):
        serve(Levanter())

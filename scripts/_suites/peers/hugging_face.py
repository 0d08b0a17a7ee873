"""Hugging Face transformers: `python -m scripts._suites.peers.hugging_face MODE`, with MODE
"dynamic" or "static" for `generate` with that cache, or "continuous" for its continuous
batching over a paged cache, as `generate_batch` does it."""

# pyright: reportMissingImports=false
# Neither is among what is installed for development.

import sys

import torch
import transformers

from ..protocol import Memory, serve, timed
from .common import cut


PAGE_SIZE = 64
MAX_BATCH_TOKENS = 512  # as many as ours reads of prompts at one time


class HuggingFace(Memory):
    def __init__(self, mode):
        self._mode = mode

    def versions(self):
        return {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "torch_threads": torch.get_num_threads(),
        }

    def load(self, checkpoint, dtype):
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=getattr(torch, dtype)
        ).eval()
        return {}

    def run(self, prefix, prompts, max_new_tokens, stops):
        run = self._continuous if self._mode == "continuous" else self._generate
        tokens, seconds = run(prefix, prompts, max_new_tokens, stops)
        return {"tokens": [cut(row, stops) for row in tokens], "seconds": seconds}

    def serve(self, prompts, limits, num_rows):
        """By continuous batching, in the memory of `num_rows` of the longest rows."""
        lens = [len(prompt) + x for prompt, x in zip(prompts, limits, strict=True)]
        num_blocks = num_rows * -(-max(lens) // PAGE_SIZE)
        with self._manager(max(limits), [], num_blocks) as manager:
            tokens, seconds = _served(manager, prompts, limits)
        return {"tokens": tokens, "seconds": seconds}

    def first(self, prompt):
        self.run([], [prompt], 1, [])
        return {}

    @timed
    def _generate(self, prefix, prompts, max_new_tokens, stops):
        whole = [prefix + prompt for prompt in prompts]
        longest = max(map(len, whole))
        ids, mask = padded(whole, longest)
        options = {}
        if self._mode == "static":
            options["cache_implementation"] = "static"
        elif prefix and len(set(map(len, prompts))) == 1:
            options["past_key_values"] = self._cache_of(prefix, len(prompts))
        out = self._model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=stops or None,
            pad_token_id=0,
            **options,
        )
        return out[:, longest:].tolist()

    def _cache_of(self, prefix, num_rows):
        """The keys and values of the prefix, computed once, as its guide shows."""
        cache = transformers.DynamicCache(config=self._model.config)
        self._model(torch.tensor([prefix]), past_key_values=cache, logits_to_keep=1)
        cache.batch_repeat_interleave(num_rows)
        return cache

    def _continuous(self, prefix, prompts, max_new_tokens, stops):
        whole = [prefix + prompt for prompt in prompts]
        lens = [len(prompt) + max_new_tokens for prompt in whole]
        num_blocks = sum(-(-length // PAGE_SIZE) + 1 for length in lens)
        with self._manager(max_new_tokens, stops, num_blocks) as manager:
            return _served(manager, whole, [max_new_tokens] * len(whole))

    def _manager(self, max_new_tokens, stops, num_blocks):
        """A new one each time, since one that lives on knows the prompts of earlier runs.
        It is made, and made ready, before the clock starts."""
        return self._model.continuous_batching_context_manager(
            generation_config=transformers.GenerationConfig(
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=stops or -1,
                pad_token_id=0,
            ),
            # Otherwise the cache takes a share of all memory.
            continuous_batching_config=transformers.ContinuousBatchingConfig(
                page_size=PAGE_SIZE,
                num_blocks=num_blocks,
                max_batch_tokens=MAX_BATCH_TOKENS,
            ),
        )


@timed
def _served(manager, prompts, limits):
    made = {}
    names = [
        manager.add_request(prompt, max_new_tokens=limit)
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    while len(made) < len(prompts):
        result = manager.get_result(timeout=1)
        if result is None and not manager.is_running():
            raise RuntimeError("continuous batching ended early")
        if result is not None and result.is_finished():
            if result.error is not None:
                raise RuntimeError(f"continuous batching: {result.error}")
            made[result.request_id] = list(result.generated_tokens)
    return [made[name] for name in names]


def padded(prompts, longest):
    """On the left, and which tokens are none."""
    rows = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(rows), torch.tensor(mask)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    serve(HuggingFace(sys.argv[1]))

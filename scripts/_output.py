"""What `python -m scripts.generate` shows: texts as they are made, and a report."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import models

from ._draw_pages import held_pages
from ._engine import Progress
from ._options import Options
from ._text import Codec


def results_of(
    texts: tuple[str, ...],
    codec: Codec,
    prompts: tuple[tuple[int, ...], ...],
    progress: Progress,
) -> list[dict[str, Any]]:
    """What was made of each prompt, given as text and as tokens."""
    pages = held_pages(progress.held.cache.table)
    results = []
    for row, (prompt, tokens) in enumerate(zip(prompts, progress.tokens, strict=True)):
        results.append(
            {
                **result_of(texts[row], codec, prompt, tokens),
                "num_cached_tokens": progress.cached[row],
                "pages": pages[row],
            }
        )
    return results


def result_of(
    text: str, codec: Codec, prompt: tuple[int, ...], tokens: tuple[int, ...]
) -> dict[str, Any]:
    """What was made of a prompt."""
    ended = tokens[-1] in codec.stop_tokens or codec.keep(prompt, tokens) is not None
    return {
        "prompt": text,
        "text": codec.decode(prompt, tokens),
        "tokens": list(tokens),
        "num_prompt_tokens": len(prompt),
        "num_new_tokens": len(tokens),
        "finish_reason": "stop" if ended else "length",
    }


def report_of(
    options: Options,
    model: models.Decoder,
    results: list[dict[str, Any]],
    progress: Progress,
) -> dict[str, Any]:
    """What `--json` prints."""
    table = progress.held.cache.table
    return {
        "model": str(options.model),
        "dtype": str(model.embed_tokens.weight.dtype),
        "device": jax.devices()[0].device_kind,
        "temperature": options.temperature,
        "seed": options.seed,
        "results": results,
        "num_prompt_tokens": sum(result["num_prompt_tokens"] for result in results),
        "num_cached_tokens": sum(result["num_cached_tokens"] for result in results),
        "num_new_tokens": sum(result["num_new_tokens"] for result in results),
        "prefill_tokens_per_second": progress.prefill.tokens_per_second,
        "decode_tokens_per_second": progress.decode.tokens_per_second,
        "page_size": table.page_size,
        "num_pages": table.num_pages,
        "pages_used": table.num_pages - int(table.num_free_pages),
        "cache_bytes": progress.held.cache.num_bytes,
        "peak_bytes": progress.peak_bytes,
    }


def summary_of(progress: Progress) -> str:
    table = progress.held.cache.table
    speeds = [
        f"{name} {clock.tokens_per_second:,.0f} tokens/s"
        for name, clock in (("prefill", progress.prefill), ("decode", progress.decode))
        if clock.tokens_per_second is not None
    ]
    used = table.num_pages - int(table.num_free_pages)
    return ", ".join([*speeds, f"{used} pages of {table.page_size} tokens used"])


def heading(text: str, row: int) -> str:
    """A line that tells one of several prompts from the others."""
    last_line = text.strip().split("\n")[-1]
    return f"[{row}] {last_line[-70:]}\n"


class Stream:
    """Shows one continuation after the other, each as far as it is certain.

    A later one is held back until those before it are complete.
    """

    def __init__(
        self,
        codec: Codec,
        prompts: tuple[tuple[int, ...], ...],
        headings: tuple[str, ...],
        write: Callable[[str], None],
    ):
        self.headings = headings
        self.codec = codec
        self.prompts = prompts
        self.write = write
        self.row = 0
        self.shown = ""

    def show(self, progress: Progress) -> None:
        while self.row < len(self.prompts):
            finished = progress.finished[self.row]
            self._show(self._text(progress.tokens[self.row], finished))
            if not finished:
                return
            self.write("\n")
            self.row, self.shown = self.row + 1, ""

    def _text(self, tokens: tuple[int, ...], finished: bool) -> str:
        decode = self.codec.decode if finished else self.codec.certain
        return self.headings[self.row] + decode(self.prompts[self.row], tokens)

    def _show(self, text: str) -> None:
        self.write(text.removeprefix(self.shown))
        self.shown = text


def last_progress(run: Iterator[Progress], stream: Stream | None) -> Progress:
    """Runs to the end, and shows on the way what is made."""
    progress = None
    for progress in run:
        if stream is not None:
            stream.show(progress)
    assert progress is not None, "a job has at least one prompt"
    return progress

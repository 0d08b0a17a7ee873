"""Continues prompts with a model: `python -m scripts.generate --help`."""

import functools
import io
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import eqx_paged
import jax
import jax.numpy as jnp
import models

from ._draw_pages import draw_pages, held_pages
from ._engine import Job, Progress, run, Temperature
from ._options import Options, parse_options, refuse
from ._text import Codec


# Tokens between two looks at a continuation, where nobody waits for each. A look costs a
# call of the program.
BURST = 8


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line `arguments`, the process's own if None."""
    options = parse_options(arguments)
    model, codec = _load(options)
    prompts = _encode(options, codec)
    job = _job(options, codec, prompts)
    _check_memory(model, job)
    side = sys.stderr if options.json else sys.stdout
    write = functools.partial(print, end="", file=side, flush=True)
    stream = _Stream(options, codec, prompts, write) if options.stream else None
    if sys.stderr.isatty():
        print("compiling ...", file=sys.stderr)
    progress = None
    for progress in run(model, job):
        if stream is not None:
            stream.show(progress)
    assert progress is not None, "a job has at least one prompt"
    results = _results(options, codec, prompts, progress)
    if options.json:
        print(json.dumps(_report(options, model, results, progress), indent=2))
    else:
        if stream is None:
            _print_texts(options, results)
        print(_summary(progress), file=sys.stderr)
    if options.show_pages:
        print(draw_pages(progress.cache.table, len(prompts)), file=side)


def _load(options: Options) -> tuple[models.Decoder, Codec]:
    dtype = None if options.dtype is None else jnp.dtype(options.dtype)
    try:
        model = models.load_checkpoint(options.model, dtype=dtype)
        tokenizer = models.load_tokenizer(options.model)
    except (ValueError, OSError) as error:
        refuse(f"argument --model: {error}")
    return model, Codec(tokenizer, model.config, options.stops)


def _encode(options: Options, codec: Codec) -> tuple[tuple[int, ...], ...]:
    """The prompts' tokens, all within what the model can read."""
    longest = codec.config.max_position_embeddings
    room = longest - options.max_new_tokens
    if room < 1:
        refuse(
            f"argument --max-new-tokens: must be below {longest}, the most tokens that"
            f" the model reads, not {options.max_new_tokens}"
        )
    prompts = tuple(codec.encode(prompt) for prompt in options.prompts)
    for number, tokens in enumerate(prompts, start=1):
        if not tokens:
            refuse(f"prompt {number} has no tokens: the tokenizer leaves nothing of it")
        if len(tokens) > room:
            refuse(
                f"prompt {number} has {len(tokens)} tokens; with --max-new-tokens"
                f" {options.max_new_tokens} it may have at most {room}, since the model"
                f" reads {longest}"
            )
        if max(tokens) >= codec.config.vocab_size:
            refuse(
                f"argument --model: the tokenizer gives token {max(tokens)}, the model"
                f" has only {codec.config.vocab_size}"
            )
    return prompts


def _job(options: Options, codec: Codec, prompts: tuple[tuple[int, ...], ...]) -> Job:
    temperature = jnp.float32(options.temperature)
    return Job(
        prompts=prompts,
        max_new_tokens=options.max_new_tokens,
        page_size=options.page_size,
        burst=1 if options.stream else BURST,
        stop_tokens=codec.stop_tokens,
        keep=codec.keep,
        sampler=Temperature(temperature) if options.temperature else eqx_paged.greedy,
        seed=options.seed,
    )


def _check_memory(model: models.Decoder, job: Job) -> None:
    shape = job.cache_shape(model.config)
    itemsize = model.embed_tokens.weight.dtype.itemsize
    num_tokens = shape["num_pages"] * shape["page_size"]
    width = 2 * shape["num_layers"] * shape["num_kv_heads"] * shape["head_dim"]
    needed, limit = num_tokens * width * itemsize, _memory_limit()
    if needed > limit:
        refuse(
            f"the cache for {len(job.prompts)} prompts would take {needed / 2**30:.1f}"
            f" GiB, this machine has {limit / 2**30:.1f} GiB: give fewer prompts or a"
            " smaller --max-new-tokens"
        )


def _memory_limit() -> int:
    stats = jax.devices()[0].memory_stats()
    if stats is not None and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _results(
    options: Options,
    codec: Codec,
    prompts: tuple[tuple[int, ...], ...],
    progress: Progress,
) -> list[dict[str, Any]]:
    """What was made of each prompt."""
    pages = held_pages(progress.cache.table)
    results = []
    for row, (prompt, tokens) in enumerate(zip(prompts, progress.tokens, strict=True)):
        ended = tokens[-1] in codec.stop_tokens or codec.keep(prompt, tokens) is not None
        results.append(
            {
                "prompt": options.prompts[row],
                "text": codec.decode(prompt, tokens),
                "tokens": list(tokens),
                "num_prompt_tokens": len(prompt),
                "num_new_tokens": len(tokens),
                "finish_reason": "stop" if ended else "length",
                "pages": pages[row],
            }
        )
    return results


def _report(
    options: Options,
    model: models.Decoder,
    results: list[dict[str, Any]],
    progress: Progress,
) -> dict[str, Any]:
    """What `--json` prints."""
    table = progress.cache.table
    return {
        "model": str(options.model),
        "dtype": str(model.embed_tokens.weight.dtype),
        "device": jax.devices()[0].device_kind,
        "temperature": options.temperature,
        "seed": options.seed,
        "results": results,
        "num_prompt_tokens": sum(result["num_prompt_tokens"] for result in results),
        "num_new_tokens": sum(result["num_new_tokens"] for result in results),
        "prefill_tokens_per_second": progress.prefill.tokens_per_second,
        "decode_tokens_per_second": progress.decode.tokens_per_second,
        "page_size": table.page_size,
        "num_pages": table.num_pages,
        "pages_used": table.num_pages - int(table.num_free_pages),
        "cache_bytes": progress.cache.num_bytes,
        "peak_bytes": progress.peak_bytes,
    }


def _summary(progress: Progress) -> str:
    table = progress.cache.table
    speeds = [
        f"{name} {clock.tokens_per_second:,.0f} tokens/s"
        for name, clock in (("prefill", progress.prefill), ("decode", progress.decode))
        if clock.tokens_per_second is not None
    ]
    used = table.num_pages - int(table.num_free_pages)
    return ", ".join([*speeds, f"{used} pages of {table.page_size} tokens used"])


def _heading(options: Options, row: int) -> str:
    """A line that tells one of several prompts from the others."""
    last_line = options.prompts[row].strip().split("\n")[-1]
    return f"[{row}] {last_line[-70:]}\n"


def _print_texts(options: Options, results: list[dict[str, Any]]) -> None:
    for row, result in enumerate(results):
        heading = _heading(options, row) if len(results) > 1 else ""
        print(heading + result["text"])


class _Stream:
    """Shows one continuation after the other, each as far as it is certain.

    A later one is held back until those before it are complete.
    """

    def __init__(
        self,
        options: Options,
        codec: Codec,
        prompts: tuple[tuple[int, ...], ...],
        write: Callable[[str], None],
    ):
        self.headings = [_heading(options, row) for row in range(len(prompts))]
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
        heading = self.headings[self.row] if len(self.prompts) > 1 else ""
        return heading + decode(self.prompts[self.row], tokens)

    def _show(self, text: str) -> None:
        self.write(text.removeprefix(self.shown))
        self.shown = text


def _ready_streams() -> None:
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:
        refuse("stdout is closed")
    for stream in (sys.stdout, sys.stderr):
        # A character that the stream's encoding lacks is shown as an escape.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _silence_stdout() -> None:
    """What it still holds would fail again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    _ready_streams()
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader has gone; nothing more can be said.
        _silence_stdout()
        raise SystemExit(141) from None
    except OSError as error:
        # Of reading, `main` has told itself.
        _silence_stdout()
        print(f"generate: cannot write: {error.strerror}", file=sys.stderr)
        raise SystemExit(1) from None

"""Continues prompts with a model: `python -m scripts.generate --help`."""

import functools
import io
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import models
from eqx_paged import Sampler, samplers

from ._chat import chat, whole_chat
from ._draw_pages import draw_pages
from ._engine import GREEDY, Job, Progress, run
from ._memory import check_memory
from ._open_model import open_model
from ._options import Options, parse_options, refuse
from ._output import (
    heading,
    last_progress,
    report_of,
    results_of,
    Stream,
    summary_of,
)
from ._programs import keep_programs
from ._text import Codec


# Tokens between two looks at a continuation, where nobody waits for each. A look costs a
# call of the program.
BURST = 8
# A chat's cache is made for its whole length at once.
MAX_CHAT_LEN = 4096


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line `arguments`, the process's own if None."""
    options = parse_options(arguments)
    directory, checkpoint, codec = open_model("generate", options.model, options.stops)
    template = _chat_template(directory) if options.chat else None
    max_len = _max_len(options, codec)
    prompts = ((),) if options.chat else _encode(options, codec, max_len)
    job = _job(options, codec, prompts, max_len)
    check_memory(checkpoint, whole_chat(job) if options.chat else job, options)
    model = checkpoint.load(options.dtype)
    side = sys.stderr if options.json else sys.stdout
    write = functools.partial(print, end="", file=side, flush=True)
    if sys.stderr.isatty():
        print("compiling ...", file=sys.stderr)
    if template is None:
        results, progress = _continue(model, codec, job, options, write)
    else:
        results, progress = chat(model, codec, template, job, options, write)
    if options.json:
        print(json.dumps(report_of(options, model, results, progress), indent=2))
    else:
        print(summary_of(progress), file=sys.stderr)
    if options.show_pages:
        print(draw_pages(progress.held.cache.table, len(prompts)), file=side)


def _chat_template(directory: pathlib.Path) -> models.ChatTemplate:
    try:
        return models.load_chat_template(directory)
    except (ValueError, OSError) as error:
        refuse(f"argument --chat: {error}")


def _max_len(options: Options, codec: Codec) -> int:
    """How long a row may become."""
    longest = codec.config.max_position_embeddings
    if options.max_len is None:
        return min(longest, MAX_CHAT_LEN) if options.chat else longest
    if options.max_len > longest:
        refuse(
            f"argument --max-len: must be at most {longest}, the most tokens that the"
            f" model reads, not {options.max_len}"
        )
    return options.max_len


def _encode(options: Options, codec: Codec, max_len: int) -> tuple[tuple[int, ...], ...]:
    """The prompts' tokens, all within what the model can read."""
    given = f"--max-new-tokens {options.max_new_tokens}"
    # A length that is asked for cuts continuations short; that of the model does not.
    if options.max_len is None:
        room = max_len - options.max_new_tokens
    else:
        room, given = max_len - 1, f"--max-len {max_len}"
    if room < 1:
        refuse(
            f"argument --max-new-tokens: must be below {max_len}, the most tokens that"
            f" the model reads, not {options.max_new_tokens}"
        )
    prompts = tuple(codec.encode(prompt) for prompt in options.prompts)
    for number, tokens in enumerate(prompts, start=1):
        if not tokens:
            refuse(f"prompt {number} has no tokens: the tokenizer leaves nothing of it")
        if len(tokens) > room:
            longest = codec.config.max_position_embeddings
            refuse(
                f"prompt {number} has {len(tokens)} tokens; with {given} it may have at"
                f" most {room}, since the model reads {longest}"
            )
        try:
            codec.check(tokens)
        except ValueError as error:
            refuse(f"argument --model: {error}")
    return prompts


def _job(
    options: Options,
    codec: Codec,
    prompts: tuple[tuple[int, ...], ...],
    max_len: int,
) -> Job:
    return Job(
        prompts=prompts,
        max_new_tokens=options.max_new_tokens,
        max_len=max_len,
        page_size=options.page_size,
        burst=1 if options.stream else BURST,
        stop_tokens=codec.stop_tokens,
        keep=codec.keep,
        sampler=_sampler(options.temperature),
        seed=options.seed,
    )


def _sampler(temperature: float) -> Sampler:
    if temperature == 0:
        return GREEDY
    return samplers.chain(samplers.temperature(temperature), samplers.categorical)


def _continue(
    model: models.Decoder,
    codec: Codec,
    job: Job,
    options: Options,
    write: Callable[[str], None],
) -> tuple[list[dict[str, Any]], Progress]:
    """Continues all prompts in one batch."""
    headings = tuple(
        heading(text, row) if len(options.prompts) > 1 else ""
        for row, text in enumerate(options.prompts)
    )
    stream = Stream(codec, job.prompts, headings, write) if options.stream else None
    progress = last_progress(run(model, job), stream)
    results = results_of(options.prompts, codec, job.prompts, progress)
    if not (options.stream or options.json):
        for title, result in zip(headings, results, strict=True):
            write(title + result["text"] + "\n")
    return results, progress


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
    keep_programs()
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

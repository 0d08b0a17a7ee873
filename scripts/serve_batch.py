"""Continues a file of prompts, of any number: `python -m scripts.serve_batch --help`."""

import contextlib
import dataclasses
import json
import pathlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import models
from eqx_paged import Stream
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from ._command_line import make_directory
from ._engine import bytes_of
from ._free_memory import free_memory
from ._memory import Need, size_text
from ._open_model import open_model
from ._output import result_of
from ._programs import keep_programs
from ._serve_options import Options, parse_options, PROGRAM, refuse
from ._serve_output import draw_pool, Results
from ._serving import Batch, begin, Burst, serve
from ._text import Codec
from ._whole_file import write_whole


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line `arguments`, the process's own if None."""
    options = parse_options(arguments)
    make_directory(PROGRAM, options.out)
    _, checkpoint, codec = open_model(PROGRAM, options.model, options.stops)
    batch = _batch(options, codec, checkpoint)
    shape = batch.cache_shape(checkpoint.config)
    need = Need.of(checkpoint, shape, options.dtype)
    _check_memory(need, shape["num_pages"])
    model = checkpoint.load(options.dtype)
    if sys.stderr.isatty():
        print("compiling ...", file=sys.stderr)
    bursts = begin(model, batch)
    peak_bytes = bytes_of(bursts.compile())
    seen, num_finished = _run(bursts, batch, codec, shape["num_pages"], options.out)
    summary = {
        "model": options.model,
        "dtype": str(model.embed_tokens.weight.dtype),
        "device": jax.devices()[0].device_kind,
        **_figures(seen, num_finished, len(batch.prompts)),
        "rows": shape["num_seqs"],
        "page_size": shape["page_size"],
        "num_pages": shape["num_pages"],
        "most_pages_used": max(burst.pages_used for burst in seen),
        "cache_bytes": need.cache,
        "peak_bytes": peak_bytes,
    }
    draw_pool(seen, shape["num_pages"], options.out / "pages.png")
    text = json.dumps(summary, indent=2) + "\n"
    write_whole(options.out / "summary.json", lambda path: path.write_text(text))
    print(_line_of(summary, options.out), file=sys.stderr)
    if summary["interrupted"]:
        raise KeyboardInterrupt


def _batch(options: Options, codec: Codec, checkpoint: models.Checkpoint) -> Batch:
    """The prompts as tokens, each of which the model can read and the pool can hold."""
    batch = Batch(
        requests=options.requests,
        prompts=tuple(codec.encode(request.text) for request in options.requests),
        max_rows=options.rows,
        page_size=options.page_size,
        burst=options.burst,
        stop_tokens=codec.stop_tokens,
        keep=codec.keep,
        seed=options.seed,
        num_pages=options.num_pages,
    )
    _check_prompts(batch, codec)
    if options.memory is not None:
        one = {**batch.cache_shape(checkpoint.config), "num_pages": 1}
        page_bytes = Need.of(checkpoint, one, options.dtype).cache
        if page_bytes > options.memory:
            refuse(
                f"argument --memory: a page takes {size_text(page_bytes)}, more than"
                f" {size_text(options.memory)}"
            )
        batch = dataclasses.replace(batch, num_pages=options.memory // page_bytes)
    _check_pages(batch)
    return batch


def _check_prompts(batch: Batch, codec: Codec) -> None:
    longest = codec.config.max_position_embeddings
    for request, tokens in zip(batch.requests, batch.prompts, strict=True):
        if not tokens:
            refuse(f"line {request.line} has no tokens: the tokenizer leaves nothing of it")
        if len(tokens) + request.max_new_tokens > longest:
            refuse(
                f"the prompt of line {request.line} has {len(tokens)} tokens; with"
                f" {request.max_new_tokens} new ones they are more than the {longest} that"
                " the model reads"
            )
        try:
            codec.check(tokens)
        except ValueError as error:
            refuse(f"argument --model: {error}")


def _check_pages(batch: Batch) -> None:
    if batch.num_pages is None:
        return
    for i, (request, tokens) in enumerate(zip(batch.requests, batch.prompts, strict=True)):
        if batch.pages_of(i) > batch.num_pages:
            refuse(
                f"the prompt of line {request.line} has {len(tokens)} tokens; with"
                f" {request.max_new_tokens} new ones it needs {batch.pages_of(i)} pages of"
                f" {batch.page_size}, but the pool has {batch.num_pages}"
            )


def _check_memory(need: Need, num_pages: int) -> None:
    free = free_memory()
    if need.total <= free:
        return
    fitting = max(0, free - need.weights) * num_pages // need.cache
    refuse(
        f"the weights would take {size_text(need.weights)} and {num_pages} pages"
        f" {size_text(need.cache)}, but {size_text(free)} of memory are free: there is room"
        f" for {fitting} pages"
    )


def _run(
    bursts: Stream, batch: Batch, codec: Codec, num_pages: int, out: pathlib.Path
) -> tuple[list[Burst], int]:
    """Continues the prompts until all are finished, or SIGINT; writes the results.

    **Returns:**

    Where the run stood after each burst, and how many prompts are finished.
    """
    seen = []
    # Of an earlier run.
    for name in ("summary.json", "pages.png"):
        (out / name).unlink(missing_ok=True)
    with (
        Results(out / "results.jsonl") as results,
        _progress_bar() as bar,
        _until_interrupted() as interrupted,
    ):
        task = bar.add_task("", total=len(batch.prompts), note="")
        for burst in serve(bursts, batch, num_pages):
            for i, tokens in burst.finished.items():
                text, prompt = batch.requests[i].text, batch.prompts[i]
                results.add(i, result_of(text, codec, prompt, tokens))
            seen.append(dataclasses.replace(burst, finished={}))
            speed = burst.num_new_tokens / burst.seconds
            note = f"{speed:,.0f} tokens/s, {burst.pages_used} of {num_pages} pages"
            bar.update(task, completed=len(results), note=note)
            if interrupted.is_set():
                break
    return seen, len(results)


def _progress_bar() -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True, highlight=False, soft_wrap=True),
    )


@contextlib.contextmanager
def _until_interrupted() -> Iterator[threading.Event]:
    """What SIGINT sets, so that a burst is not cut off; a second one is as ever."""
    asked = threading.Event()

    def ask(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    before = signal.getsignal(signal.SIGINT)
    # Where it is ignored, as behind a shell's `&`, it stays so.
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _figures(seen: list[Burst], num_finished: int, num_prompts: int) -> dict[str, Any]:
    last = seen[-1]
    return {
        "num_prompts": num_prompts,
        "num_finished": num_finished,
        "interrupted": num_finished < num_prompts,
        "num_prompt_tokens": last.num_prompt_tokens,
        "num_new_tokens": last.num_new_tokens,
        "seconds": last.seconds,
        "prompt_tokens_per_second": last.num_prompt_tokens / last.seconds,
        "new_tokens_per_second": last.num_new_tokens / last.seconds,
    }


def _line_of(summary: dict[str, Any], out: pathlib.Path) -> str:
    return (
        f"{summary['num_finished']} of {summary['num_prompts']} prompts,"
        f" {summary['prompt_tokens_per_second']:,.0f} prompt tokens/s,"
        f" {summary['new_tokens_per_second']:,.0f} new tokens/s, at most"
        f" {summary['most_pages_used']} of {summary['num_pages']} pages in use: {out}"
    )


if __name__ == "__main__":
    keep_programs()
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except OSError as error:
        # Of reading, `main` has told itself.
        print(f"{PROGRAM}: cannot write: {error.strerror}", file=sys.stderr)
        raise SystemExit(1) from None

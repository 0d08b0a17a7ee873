"""Trains the embedded decoder, or one like it on any text.

    python -m scripts.train --out DIR
    python -m scripts.train --out DIR --text FILE

The result is a checkpoint that `python -m scripts.generate --model DIR` reads, and a
drawing of the loss.
"""

import json
import math
import pathlib
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from models import Decoder, DecoderConfig, save_checkpoint
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from ._circuit import with_lookup_circuit
from ._corpus import BOS, EOS, Rows, Stage, TaskCorpus, TextCorpus
from ._evaluation import report
from ._train_options import Options, parse_options, prepare_out, refuse, STATE_FILE
from ._training import (
    load_notes,
    load_state,
    mean_loss,
    save_state,
    Schedule,
    Targets,
    train_step,
    TrainState,
)
from ._whole_file import write_whole


_REPORT_EVERY = 20


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line `arguments`, the process's own if None."""
    options = parse_options(arguments)
    corpus = _corpus(options)
    prepare_out(options)
    console = Console(highlight=False, soft_wrap=True)
    path = options.out / STATE_FILE
    losses = _saved_losses(path, corpus, options) if options.resume else []
    schedule = Schedule(options.steps, options.learning_rate)
    state = schedule.start(_untrained(corpus, options))
    if options.resume:
        state = load_state(path, state)
        console.print(f"resuming after {len(losses)} of {options.steps} steps")
    console.print(f"{_num_weights(state.decoder):,} weights on {jax.devices()[0]}")
    state = _train(state, schedule, corpus, options, losses, console)
    decoder = _as_dtype(state.decoder, jnp.dtype(options.dtype))
    _write_checkpoint(decoder, corpus, options.out)
    _draw(losses, options.out / "loss.png")
    path.unlink(missing_ok=True)
    # What the written weights can do, whatever they were rounded to.
    decoder = _as_dtype(decoder, jnp.float32)
    for name, value in _examine(decoder, corpus, options):
        console.print(f"{name}: {value}")
    console.print(f"written to {options.out}")


# --- The run


def _corpus(options: Options) -> TaskCorpus | TextCorpus:
    if options.text is None:
        return TaskCorpus()
    try:
        text = options.text.read_text(encoding="utf-8")
        return TextCorpus(text, options.context)
    except OSError as error:
        refuse(f"--text {options.text}: {error.strerror}")
    except UnicodeDecodeError:
        refuse(f"--text {options.text}: is not UTF-8 text")
    except ValueError as error:
        refuse(f"--text {options.text}: {error}")


def _fixed(corpus: TaskCorpus | TextCorpus, options: Options) -> dict[str, Any]:
    """What must not change between the parts of one run."""
    text = "not given"
    if isinstance(corpus, TextCorpus):
        text = f"a text of SHA-256 {corpus.sha256}"
    return {
        "--text": text,
        "--steps": options.steps,
        "--seed": options.seed,
        "--context": options.context,
        "--learning-rate": options.learning_rate,
    }


def _notes(
    corpus: TaskCorpus | TextCorpus, options: Options, losses: list[float]
) -> dict[str, Any]:
    """What is saved beside a state."""
    return {"options": _fixed(corpus, options), "losses": losses}


def _saved_losses(
    path: pathlib.Path, corpus: TaskCorpus | TextCorpus, options: Options
) -> list[float]:
    try:
        notes = load_notes(path)
    except OSError as error:
        refuse(f"--resume: {path}: {error.strerror}")
    except ValueError:
        refuse(f"--resume: {path} is not what an interrupted run leaves")
    expected = _notes(corpus, options, [])
    if not (
        _same_names(notes, expected) and _same_names(notes["options"], expected["options"])
    ):
        refuse(f"--resume: {path} is of another version of this program")
    for name, value in expected["options"].items():
        had = notes["options"][name]
        if had != value:
            refuse(f"{name} is {value}, but was {had} in the interrupted run")
    return notes["losses"]


def _same_names(found: Any, expected: dict[str, Any]) -> bool:
    return isinstance(found, dict) and found.keys() == expected.keys()


def _untrained(corpus: TaskCorpus | TextCorpus, options: Options) -> Decoder:
    tokens = corpus.tokenizer.get_vocab()
    # The byte-level alphabet writes a newline, which ends each answer, as "Ċ".
    ends = [EOS] if isinstance(corpus, TextCorpus) else [EOS, "Ċ"]
    config = DecoderConfig(
        vocab_size=len(tokens),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        rms_norm_eps=1e-5,
        # A look-up compares over the whole context, which only those channels can do
        # that turn little within it: half of 64 at this base.
        rope_theta=1e6,
        max_position_embeddings=options.context,
        bos_token_id=tokens[BOS],
        eos_token_id=tuple(tokens[end] for end in ends),
    )
    decoder = Decoder(config, key=jax.random.key(options.seed))
    return with_lookup_circuit(decoder, seed=options.seed)


def _stage_of_steps(stages: tuple[Stage, ...], options: Options) -> list[Stage]:
    stages = tuple(stage for stage in stages if stage.length <= options.context)
    total = sum(stage.share for stage in stages)
    ends = np.cumsum([stage.share / total for stage in stages])
    middles = (np.arange(options.steps) + 0.5) / options.steps
    chosen = np.minimum(np.searchsorted(ends, middles), len(stages) - 1)
    return [stages[index] for index in chosen]


def _batches(
    corpus: TaskCorpus | TextCorpus, options: Options, first_step: int
) -> Iterator[tuple[Rows, ...]]:
    """Makes each batch while the one before is being learnt."""
    stages = _stage_of_steps(corpus.stages, options)
    with ThreadPoolExecutor(1) as pool:
        coming = None
        for step in range(first_step, options.steps):
            ready = coming or pool.submit(corpus.batch, options.seed, step, stages[step])
            if step + 1 < options.steps:
                coming = pool.submit(corpus.batch, options.seed, step + 1, stages[step + 1])
            yield ready.result()


def _train(
    state: TrainState,
    schedule: Schedule,
    corpus: TaskCorpus | TextCorpus,
    options: Options,
    losses: list[float],
    console: Console,
) -> TrainState:
    path = options.out / STATE_FILE

    def save() -> None:
        save_state(path, state, _notes(corpus, options, losses))

    with _Interruption() as interruption, _progress(console) as progress:
        bar = progress.add_task("training", total=options.steps, note="compiling")
        progress.update(bar, completed=len(losses))
        meter = _Meter(progress, bar, options.steps)
        for batch in _batches(corpus, options, len(losses)):
            state, loss = train_step(tuple(map(Targets.of, batch)), state, schedule)
            losses.append(float(loss))
            if not math.isfinite(losses[-1]):
                raise SystemExit(f"train: the loss is {losses[-1]}")
            meter.advance(losses, batch)
            if interruption.asked or len(losses) % options.save_every == 0:
                save()
            if interruption.asked:
                break
    if interruption.asked:
        console.print(f"interrupted: --resume goes on after step {len(losses)}")
        raise SystemExit(128 + interruption.asked)
    return state


class _Interruption:
    """Lets a step end before the program does: in the middle of one, the old state is
    used up and the new one not yet there. A second signal ends it at once."""

    def __init__(self):
        self.asked = 0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "_Interruption":
        signals = (signal.SIGINT, signal.SIGTERM)
        self._handlers = {number: signal.signal(number, self._note) for number in signals}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        self.asked = number
        signal.signal(number, self._handlers[number])


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
    )


class _Meter:
    """Tells loss and speed: in the bar, or line by line where there is no terminal."""

    def __init__(self, progress: Progress, bar: Any, num_steps: int):
        self._progress, self._bar, self._num_steps = progress, bar, num_steps
        self._num_tokens, self._since = 0, time.perf_counter()

    def advance(self, losses: list[float], batch: tuple[Rows, ...]) -> None:
        self._progress.advance(self._bar)
        self._num_tokens += sum(rows.tokens.size for rows in batch)
        num_steps = len(losses)
        if num_steps % _REPORT_EVERY and num_steps != self._num_steps:
            return
        now = time.perf_counter()
        speed = self._num_tokens / (now - self._since)
        loss = sum(losses[-_REPORT_EVERY:]) / len(losses[-_REPORT_EVERY:])
        note = f"loss {loss:.4f}, {speed:,.0f} tokens/s"
        self._progress.update(self._bar, note=note)
        if not self._progress.console.is_terminal:
            self._progress.console.print(f"step {num_steps}/{self._num_steps}: {note}")
        self._num_tokens, self._since = 0, now


# --- The result


def _examine(
    decoder: Decoder, corpus: TaskCorpus | TextCorpus, options: Options
) -> Iterator[tuple[str, str]]:
    if isinstance(corpus, TextCorpus):
        loss = float(mean_loss(decoder, Targets.of(corpus.held_out())))
        yield "held-out loss a token", f"{loss:.4f}"
        return
    figures = report(decoder, corpus.tokenizer, options.context, sample=options.sample)
    for name, share in figures:
        yield name, f"{100 * share:.1f} % right"


def _write_checkpoint(
    decoder: Decoder, corpus: TaskCorpus | TextCorpus, out: pathlib.Path
) -> None:
    save_checkpoint(decoder, out)
    config = decoder.config
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_id),
        "do_sample": False,
    }
    text = json.dumps(generation, indent=2) + "\n"
    _write(out / "generation_config.json", text)
    _write(out / "tokenizer.json", corpus.tokenizer.to_str(pretty=False))


def _write(path: pathlib.Path, text: str) -> None:
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def _draw(losses: list[float], path: pathlib.Path) -> None:
    # Slow to import, and only needed here.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color="0.8", linewidth=0.8, label="each step")
    width = max(1, len(losses) // 50)
    means = np.convolve(losses, np.full(width, 1 / width), mode="valid")
    axes.plot(steps[width - 1 :], means, label=f"mean of {width}")
    axes.set(xlabel="step", ylabel="loss (nats a token)", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _as_dtype(decoder: Decoder, dtype: Any) -> Decoder:
    return jax.tree.map(
        lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, decoder
    )


def _num_weights(decoder: Decoder) -> int:
    return sum(x.size for x in jax.tree.leaves(eqx.filter(decoder, eqx.is_array)))


if __name__ == "__main__":
    main()

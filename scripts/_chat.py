"""A conversation with a model. Its cache is kept from turn to turn."""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import models

from ._engine import Clock, Job, nothing_held, Progress, run
from ._options import check_text, Options, refuse
from ._output import last_progress, results_of, Stream
from ._text import Codec


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What was said so far.

    **Arguments:**

    - `messages`: each with its role and content.
    - `text`: how the template wrote them, up to the end of the last answer; empty if the
        answer's tokens are not that text alone.
    - `tokens`: those of `text`.
    """

    messages: tuple[dict[str, str], ...]
    text: str = ""
    tokens: tuple[int, ...] = ()

    @classmethod
    def begin(cls, system: str | None) -> "Conversation":
        """A conversation in which at most the system has said something."""
        return cls(() if system is None else ({"role": "system", "content": system},))

    def ask(self, text: str) -> "Conversation":
        """With what the user says next."""
        return dataclasses.replace(
            self, messages=(*self.messages, {"role": "user", "content": text})
        )

    def prompt(self, template: models.ChatTemplate, codec: Codec) -> "Conversation":
        """With the text and the tokens that the model continues.

        An answer's tokens stay those that were made, which may be others than its text
        would be cut into: only what follows it is cut anew. A template that rewrites
        what was said has it all cut anew.
        """
        text = template.render(self.messages)
        if self.text and text.startswith(self.text):
            tokens = (*self.tokens, *codec.encode_rendered(text[len(self.text) :]))
        else:
            tokens = codec.encode_rendered(text)
        return dataclasses.replace(self, text=text, tokens=tokens)

    def answer(self, codec: Codec, made: tuple[int, ...]) -> "Conversation":
        """With the tokens that continued its prompt."""
        content = codec.decode(self.tokens, made)
        # The template writes the end of an answer itself.
        kept = made[:-1] if made[-1] in codec.stop_tokens else made
        whole = codec.added(self.tokens, kept) == content
        return Conversation(
            (*self.messages, {"role": "assistant", "content": content}),
            self.text + content if whole else "",
            (*self.tokens, *kept) if whole else (),
        )


def whole_chat(job: Job) -> Job:
    """A job as long as the conversation may become, of which `job` makes the turns."""
    return dataclasses.replace(job, max_new_tokens=job.max_len)


def turn_of(job: Job, prompt: tuple[int, ...], number: int) -> Job:
    """The job of one turn, whose cache is that of `whole_chat`."""
    # Each turn has draws of its own.
    return dataclasses.replace(job, prompts=(prompt,), seed=(job.seed + number) % 2**32)


def chat(
    model: models.Decoder,
    codec: Codec,
    template: models.ChatTemplate,
    job: Job,
    options: Options,
    write: Callable[[str], None],
) -> tuple[list[dict[str, Any]], Progress]:
    """Answers turns until there are no more.

    **Arguments:**

    - `model`, `codec`, `template`: of the checkpoint.
    - `job`: how to continue the conversation, with one empty prompt in its place.
    - `options`: the command line.
    - `write`: shows text as it is made if `options.stream`, else whole answers.

    **Returns:**

    What was made in each turn, and where the last one ended, with the speeds of all.
    """
    conversation = Conversation.begin(options.system)
    held = nothing_held(model, whole_chat(job))
    results: list[dict[str, Any]] = []
    turns: list[Progress] = []
    for text in _turns(options):
        conversation = _prompted(conversation.ask(text), template, codec, job)
        turn = turn_of(job, conversation.tokens, len(turns))
        stream = Stream(codec, turn.prompts, ("",), write) if options.stream else None
        progress = last_progress(run(model, turn, held), stream)
        results += results_of((text,), codec, turn.prompts, progress)
        if not (options.stream or options.json):
            write(results[-1]["text"] + "\n")
        conversation = conversation.answer(codec, progress.tokens[0])
        held = progress.held
        turns.append(progress)
    if not turns:
        refuse("stdin has no turn to answer")
    return results, _summed(turns)


def _prompted(
    conversation: Conversation, template: models.ChatTemplate, codec: Codec, job: Job
) -> Conversation:
    try:
        prompted = conversation.prompt(template, codec)
        if not prompted.tokens:
            refuse("the chat template and the tokenizer leave nothing of this turn")
        codec.check(prompted.tokens)
    except ValueError as error:
        refuse(str(error))
    num_tokens = len(prompted.tokens)
    if num_tokens >= job.max_len:
        refuse(
            f"with this turn the conversation has {num_tokens} tokens; with --max-len"
            f" {job.max_len} it may have at most {job.max_len - 1} before the answer"
        )
    return prompted


def _turns(options: Options) -> Iterator[str]:
    if options.prompts:
        yield from options.prompts
        return
    if sys.stdin is None:
        refuse("stdin is closed")
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        print(prompt, end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            refuse(f"stdin is not UTF-8 (byte {error.start})")
        if not line:
            return
        if line.strip():
            yield check_text(line.removesuffix("\n").removesuffix("\r"), "stdin")


def _summed(turns: list[Progress]) -> Progress:
    """The last turn's, with the speeds of all turns together."""
    return dataclasses.replace(
        turns[-1],
        prefill=sum((turn.prefill for turn in turns), Clock()),
        decode=sum((turn.decode for turn in turns), Clock()),
        peak_bytes=max(turn.peak_bytes for turn in turns),
    )

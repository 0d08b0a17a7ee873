"""Opens a model for the command line that names it."""

import pathlib

import models

from ._command_line import refuse
from ._text import Codec


def open_model(
    program: str, name: str, stops: tuple[str, ...]
) -> tuple[pathlib.Path, models.Checkpoint, Codec]:
    """Everything of the model but its weights; refuses what cannot be read.

    **Arguments:**

    - `program`: whose command line it is.
    - `name`: a folder, or the name of a model on the hub.
    - `stops`: the texts that end a continuation.
    """
    try:
        directory = models.find_checkpoint(name)
        checkpoint = models.Checkpoint.open(directory)
        tokenizer = models.load_tokenizer(directory)
        ends = models.load_stop_tokens(directory, checkpoint.config)
    except (ValueError, OSError) as error:
        refuse(program, f"argument --model: {error}")
    return directory, checkpoint, Codec(tokenizer, checkpoint.config, ends, stops)

"""A checkpoint's tokenizer, and the tokens that end what it is asked for."""

import os

from tokenizers import Tokenizer

from ._checks import check_token
from ._config import DecoderConfig
from ._files import existing_directory, existing_file, read_object


def load_tokenizer(directory: str | os.PathLike) -> Tokenizer:
    """Loads the tokenizer of a checkpoint.

    **Arguments:**

    - `directory`: holds `tokenizer.json`.

    **Returns:**

    The tokenizer, without the cutting and filling up to a length that a file may ask
    for, which is of training. A missing file is a `FileNotFoundError`, one that is broken a
    `ValueError`.
    """
    path = existing_file(existing_directory(directory), "tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises nothing narrower.
        raise ValueError(f"{path}: not a tokenizer ({error})") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def load_stop_tokens(
    directory: str | os.PathLike, config: DecoderConfig
) -> tuple[int, ...]:
    """Loads the tokens that end an answer.

    **Arguments:**

    - `directory`: may hold `generation_config.json`, whose `eos_token_id` is a token or
        a list of them.
    - `config`: says which they are where that file does not.

    **Returns:**

    The tokens, possibly none. A broken file, or a token that the decoder does not have,
    is a `ValueError`.
    """
    path = existing_directory(directory) / "generation_config.json"
    if not path.is_file():
        return config.eos_token_id
    given = read_object(path).get("eos_token_id")
    if given is None:
        return config.eos_token_id
    tokens = tuple(given) if isinstance(given, list) else (given,)
    try:
        for token in tokens:
            check_token("eos_token_id", token, config.vocab_size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return tokens

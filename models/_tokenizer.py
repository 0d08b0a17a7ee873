"""A checkpoint's tokenizer, and the tokens that end what it is asked for."""

import os
import pathlib

from tokenizers import Tokenizer

from ._checks import check_token
from ._config import DecoderConfig
from ._files import existing_directory, existing_file, optional_object


TOKENIZER_CONFIG = "tokenizer_config.json"
# What older files of a tokenizer keep apart.
_SPECIAL_TOKENS = "special_tokens_map.json"


def load_tokenizer(directory: str | os.PathLike) -> Tokenizer:
    """Loads the tokenizer of a checkpoint.

    **Arguments:**

    - `directory`: holds `tokenizer.json`.

    **Returns:**

    The tokenizer, without the cutting and filling up to a length that a file may ask
    for, which is of training; and with the tokens of `special_tokens`, so that `decode`
    leaves them out. A missing file is a `FileNotFoundError`, one that is broken a
    `ValueError`.
    """
    root = existing_directory(directory)
    path = existing_file(root, "tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises nothing narrower.
        raise ValueError(f"{path}: not a tokenizer ({error})") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    named = special_tokens(root).values()
    tokenizer.add_special_tokens([text for text in named if text not in known])
    return tokenizer


def special_tokens(root: pathlib.Path) -> dict[str, str]:
    """The special tokens that a checkpoint names.

    **Arguments:**

    - `root`: may hold `tokenizer_config.json` and `special_tokens_map.json`.

    **Returns:**

    Their texts, by names such as `bos_token`. A broken file is a `ValueError`.
    """
    older, newer = (optional_object(root / x) for x in (_SPECIAL_TOKENS, TOKENIZER_CONFIG))
    tokens = {}
    for name, value in (older | newer).items():
        if name.endswith("_token"):
            # Older files say more of a token than its text.
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                tokens[name] = content
    return tokens


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
    given = optional_object(path).get("eos_token_id")
    if given is None:
        return config.eos_token_id
    tokens = tuple(given) if isinstance(given, list) else (given,)
    try:
        for token in tokens:
            check_token("eos_token_id", token, config.vocab_size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return tokens

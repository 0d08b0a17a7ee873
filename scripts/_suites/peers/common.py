"""What peers share."""


def cut(tokens, stops):
    """Without what follows the first of `stops`."""
    ends = [i + 1 for i, token in enumerate(tokens) if token in stops]
    return tokens[: ends[0]] if ends else tokens

"""What an operation on a cache has to say for itself."""

import equinox as eqx


class RESULTS(eqx.Enumeration):
    """Whether an operation was carried out, and if not, why.

    Each member but `successful` is its own message. Where several apply the first in the
    order below is told. A failed operation has changed nothing. Compare with `==`: a
    member has no truth value of its own.
    """

    successful = ""
    invalid_argument = (
        "A row does not exist, or a number of tokens is negative or more than was given."
    )
    too_many_tokens = (
        "More tokens were given than the step has room for: `num_tokens` in all, or one a "
        "row in a decode step."
    )
    sequence_too_long = "A sequence would be longer than a row can hold."
    out_of_pages = "There are not enough free pages."
    row_in_use = "A row that must be empty is in use."

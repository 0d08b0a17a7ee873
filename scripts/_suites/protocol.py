"""The end of a side of a benchmark that lies in a process of its own.

Uses nothing but the standard library: peers run it in environments without ours.
"""

import functools
import json
import os
import sys
import time


def serve(side):
    """Answers requests, a line of JSON each, by the methods of `side`: `{"do": method,
    **arguments}`. What a method gives is the answer. Ends when there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What libraries print is no answer.

    def say(answer):
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    say({})
    for line in sys.stdin:
        request = json.loads(line)
        say(getattr(side, request.pop("do"))(**request))


class Memory:
    """The most memory that this process held at one time."""

    @staticmethod
    def peak_bytes():
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return 1024 * int(line.split()[1])
        raise OSError("the system does not tell a process's peak of memory")


def timed(run):
    """Makes `run` give the seconds that it took as well: `(result, seconds)`."""

    @functools.wraps(run)
    def timed_run(*args):
        start = time.perf_counter()
        result = run(*args)
        return result, time.perf_counter() - start

    return timed_run

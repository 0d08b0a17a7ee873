"""What `python -m scripts.serve_batch` writes: results as they finish, and a chart."""

import json
import pathlib
from types import TracebackType
from typing import Any

from ._serving import Burst
from ._whole_file import write_whole


class Results:
    """`results.jsonl`: a line a prompt, as soon as it is finished; by index in the end."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._lines: dict[int, str] = {}
        self._file = path.open("w", encoding="utf-8")

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, index: int, result: dict[str, Any]) -> None:
        line = json.dumps({"index": index, **result}) + "\n"
        self._file.write(line)
        self._file.flush()
        self._lines[index] = line

    def __enter__(self) -> "Results":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        # What an error has cut off is as good as it was: a line a finished prompt.
        if error is None:
            text = "".join(self._lines[index] for index in sorted(self._lines))
            write_whole(self._path, lambda path: path.write_text(text, encoding="utf-8"))


def draw_pool(bursts: list[Burst], num_pages: int, path: pathlib.Path) -> None:
    """The pages in use after each burst, against the seconds since the first one began."""
    # Without pyplot, which would look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    seconds = [0.0, *(burst.seconds for burst in bursts)]
    used = [0, *(burst.pages_used for burst in bursts)]
    axes.fill_between(seconds, used, step="post", alpha=0.3)
    axes.step(seconds, used, where="post", linewidth=1, label="in use")
    axes.axhline(num_pages, color="black", linestyle=":", label="in the pool")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds")
    axes.set_ylabel("pages")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    write_whole(path, lambda part: figure.savefig(part, dpi=150, format="png"))

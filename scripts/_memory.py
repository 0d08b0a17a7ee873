"""Whether a model's weights and its cache fit into memory, told before they are made."""

import dataclasses
import functools

import jax
import models
from eqx_paged import PagedKVCache

from ._engine import Job
from ._free_memory import free_memory
from ._options import Options, PAGE_SIZES, refuse


@dataclasses.dataclass(frozen=True)
class Need:
    """What a job needs: the bytes of the weights and of the cache."""

    weights: int
    cache: int

    @classmethod
    def of(
        cls, checkpoint: models.Checkpoint, shape: dict[str, int], dtype: str | None
    ) -> "Need":
        """**Arguments:**

        - `checkpoint`: the model.
        - `shape`: the sizes of the cache, as `PagedKVCache.empty` takes them.
        - `dtype`: of the weights and the cache; as stored if None.
        """
        make = functools.partial(
            PagedKVCache.empty,
            **shape,
            dtype=checkpoint.dtype(dtype),
        )
        layers = jax.eval_shape(make).layers
        cache = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(layers))
        return cls(checkpoint.num_bytes(dtype), cache)

    @property
    def total(self) -> int:
        return self.weights + self.cache


def check_memory(checkpoint: models.Checkpoint, job: Job, options: Options) -> None:
    """Refuses a job for which the memory is too small, and says what would fit.

    **Arguments:**

    - `checkpoint`: the model, not yet loaded.
    - `job`: what its cache has to have room for.
    - `options`: the command line.
    """
    free = free_memory()
    need = _need(checkpoint, job, options.dtype)
    if need.total <= free:
        return
    fitting = _fitting(checkpoint, job, options.dtype, free)
    refuse(
        f"the weights would take {size_text(need.weights)} and the cache"
        f" {size_text(need.cache)},"
        f" but {size_text(free)} of memory are free: {fitting}"
    )


def _need(checkpoint: models.Checkpoint, job: Job, dtype: str | None) -> Need:
    return Need.of(checkpoint, job.cache_shape(checkpoint.config), dtype)


def _fitting(checkpoint: models.Checkpoint, job: Job, dtype: str | None, free: int) -> str:
    """The changes of options with which it would fit, one each, or else two together."""
    smaller = "bfloat16" if checkpoint.dtype(dtype).itemsize > 2 else None
    found = [
        *_with_dtype(checkpoint, job, smaller, free),
        *_with_page_size(checkpoint, job, dtype, free),
        *_with_max_len(checkpoint, job, dtype, free),
    ]
    if not found and smaller is not None:
        shorter = _with_max_len(checkpoint, job, smaller, free)
        found = [f"--dtype {smaller} {text}" for text in shorter]
    if not found:
        return "no --max-len, --page-size or --dtype would make it fit"
    return f"with {', or with '.join(found)} it would fit"


def _with_dtype(
    checkpoint: models.Checkpoint, job: Job, dtype: str | None, free: int
) -> list[str]:
    if dtype is None or _need(checkpoint, job, dtype).total > free:
        return []
    return [f"--dtype {dtype}"]


def _with_page_size(
    checkpoint: models.Checkpoint, job: Job, dtype: str | None, free: int
) -> list[str]:
    """The largest of the smaller pages: short rows waste the rest of a large one."""
    for page_size in sorted(PAGE_SIZES, reverse=True):
        other = dataclasses.replace(job, page_size=page_size)
        smaller = page_size < job.page_size
        if smaller and _need(checkpoint, other, dtype).total <= free:
            return [f"--page-size {page_size}"]
    return []


def _with_max_len(
    checkpoint: models.Checkpoint, job: Job, dtype: str | None, free: int
) -> list[str]:
    """The greatest length that fits, if each prompt can get a token within it."""

    def fits(max_len: int) -> bool:
        other = dataclasses.replace(job, max_len=max_len)
        return _need(checkpoint, other, dtype).total <= free

    shortest = max(2, 1 + max(map(len, job.prompts)))
    longest = max(len(prompt) + job.room(prompt) for prompt in job.prompts)
    if not fits(shortest):
        return []
    # `shortest` fits, `longest` does not.
    while longest - shortest > 1:
        middle = (shortest + longest) // 2
        shortest, longest = (middle, longest) if fits(middle) else (shortest, middle)
    return [f"--max-len {shortest}"]


def size_text(num_bytes: int) -> str:
    """Of memory, in the unit that suits it."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:,.1f} {unit}"
    return f"{num_bytes / 1024:,.1f} KiB"

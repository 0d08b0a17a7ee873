"""What the TPU kernels share: the generations of TPU, and copies of many pages at once."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ._pages import LANES


# Rows of a tile, of float32 and of int8.
SUBLANES = 8
INT8_SUBLANES = 32
SMEM_BYTES = 2**20  # of every generation
# Pages whose copies are started in a turn of a loop.
PAGES_PER_TURN = 8


@dataclasses.dataclass(frozen=True)
class TPUConfig:
    """How a Pallas kernel for the TPU divides its work, for measuring.

    Without one, all of it is chosen by the shapes, the dtype and the TPU. With one, only
    what is None is.

    **Arguments:**

    - `pages_per_compute_block`: how many pages of a row are fetched and worked on at a
        time, which must make a multiple of 128 stored rows of lanes. For `ragged_mha`,
        `ragged_mqa` and `ragged_gqa`, blocks of `block_size`; for `write_kv`, tiles that
        are read or written together.
    - `num_queries_per_block`: how many tokens of the longer rows of
        `ragged_paged_attention` are worked on together, a multiple of 16.
    - `inline_seq_dim`: whether one step of the grid of a decode kernel works off as many
        rows as fit; if not, each group of rows that is worked on together is a step.
    - `megacore_mode`: what the two cores of a TPU v4 or v5p share out: the rows
        (`"batch"`), the kv heads (`"kv_head"`, not for contiguous caches), or nothing
        (None: one core works). Nothing to `write_kv`.

    **Raises:**

    `ValueError` for what is no such number or mode, and, when a program with it is lowered,
    for what does not fit the TPU.
    """

    pages_per_compute_block: int | None = None
    num_queries_per_block: int | None = None
    inline_seq_dim: bool = True
    megacore_mode: Literal["batch", "kv_head"] | None = None

    def __post_init__(self) -> None:
        for name in ("pages_per_compute_block", "num_queries_per_block"):
            number = getattr(self, name)
            if number is not None and (type(number) is not int or number < 1):
                raise ValueError(f"{name} must be a positive int, but is {number!r}.")
        if self.megacore_mode not in (None, "batch", "kv_head"):
            raise ValueError(
                "megacore_mode must be None, 'batch' or 'kv_head', but is "
                f"{self.megacore_mode!r}."
            )


class Generation(NamedTuple):
    """What a kernel's shape depends on. All figures are of one core."""

    name: str
    vmem_bytes: int
    num_cores: int  # that one program runs on, sharing their memory
    mxu_size: int
    int8: Literal["multiplies", "unpacks"] | None  # the most it has an instruction for

    @property
    def usable_vmem_bytes(self) -> int:
        """What a kernel may plan with; the compiler has the rest for itself."""
        return self.vmem_bytes * 7 // 8


_MIB = 2**20
GENERATIONS = {
    generation.name: generation
    for generation in (
        Generation("v4", 16 * _MIB, num_cores=2, mxu_size=128, int8=None),
        Generation("v5e", 128 * _MIB, num_cores=1, mxu_size=128, int8="multiplies"),
        Generation("v5p", 64 * _MIB, num_cores=2, mxu_size=128, int8="multiplies"),
        Generation("v6e", 128 * _MIB, num_cores=1, mxu_size=256, int8="multiplies"),
        Generation("7x", 64 * _MIB, num_cores=1, mxu_size=256, int8="unpacks"),
    )
}
# As `device_kind` says it.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "7x",
    "TPU v7x": "7x",
}


def generation() -> Generation:
    """The TPU that is compiled for: that of the mesh in scope, or else of the default
    device. Where there is none (a program compiled elsewhere, or interpreted) the one
    with the least memory, whose choices run on all."""
    mesh_device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    kind = (mesh_device or jax.devices()[0]).device_kind
    return GENERATIONS[_KINDS.get(kind, "v4")]


def rows_on_all_cores(chip: Generation) -> TPUConfig:
    """All cores of a chip share the rows."""
    return TPUConfig(megacore_mode="batch" if chip.num_cores > 1 else None)


def compiler_params(vmem_bytes: int, **options: Any) -> pltpu.CompilerParams:
    """Without checks at each copy: that these stay within bounds is the kernels' care."""
    return pltpu.CompilerParams(
        disable_bounds_checks=True,
        disable_semaphore_checks=True,
        vmem_limit_bytes=vmem_bytes,
        **options,
    )


@dataclasses.dataclass(frozen=True)
class PageFetch:
    """Copies of some heads of pages from a pool to a buffer, waited for together.

    Every start adds to one semaphore, and a wait takes off as much as all of them added.
    """

    pool: Any  # [num_pages, num_kv_heads, page_rows, lanes]
    heads: Any
    buffer: Any  # [pages, heads, page_rows, lanes]
    semaphore: Any

    def start(self, page: Any, i: Any) -> None:
        source = self.pool.at[page, self.heads]
        pltpu.make_async_copy(source, self.buffer.at[i], self.semaphore).start()

    def wait_all(self) -> None:
        _wait(self.buffer, self.semaphore)

    def wait(self, count: Any) -> None:
        wait_for(self.buffer, self.semaphore, count)


def fetches_of(
    k_hbm: Any, v_hbm: Any, heads: Any, slots: Any, semaphores: Any
) -> list[tuple[PageFetch, PageFetch]]:
    """For each slot, a pair of buffers, the fetches of its keys and of its values."""
    return [
        (
            PageFetch(k_hbm, heads, k, semaphores.at[slot, 0]),
            PageFetch(v_hbm, heads, v, semaphores.at[slot, 1]),
        )
        for slot, (k, v) in enumerate(slots)
    ]


def wait_for(buffer: Any, semaphore: Any, count: Any) -> None:
    """Waits for copies of `count <= buffer.shape[0]` entries of a buffer, to it or from it;
    in pieces of a power of two, since a copy's size must be static."""
    piece = 1
    while piece <= buffer.shape[0]:

        @pl.when(count & piece != 0)
        def _(piece=piece):
            _wait(buffer.at[pl.ds(0, piece)], semaphore)

        piece *= 2


def _wait(ref: Any, semaphore: Any) -> None:
    # Only the size of a copy that is waited for matters.
    pltpu.make_async_copy(ref, ref, semaphore).wait()


def rolled(count: Any, step: Callable[[Any], None], unroll: int) -> None:
    """`step(i)` for each `i < count`, several a turn."""

    def turn(t, _):
        for u in range(unroll):
            step(t * unroll + u)
        return 0

    def single(i, _):
        step(i)
        return 0

    whole = count // unroll
    jax.lax.fori_loop(0, whole, turn, 0)
    jax.lax.fori_loop(whole * unroll, count, single, 0)


def lane_tiles(x: jax.Array) -> list[jax.Array]:
    """The registers of `[rows, n * 128]`, side by side."""
    return [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)]


def whole_tiles(rows: int) -> int:
    """So many rows, rounded up to tiles of float32."""
    return -(-rows // SUBLANES) * SUBLANES


def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)

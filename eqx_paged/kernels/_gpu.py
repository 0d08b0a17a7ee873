"""What the GPU kernels share: which GPU it is, and who works on what.

Lengths are known on the device only, so the work is shared out there, by a few operations
on small arrays whose sizes are static. They depend on the lengths alone: the layers of a
model ask for the same, and XLA computes it once a step.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32


# --- Configs


@dataclasses.dataclass(frozen=True)
class TritonConfig:
    """How a Pallas-Triton kernel for a GPU divides its work, for measuring.

    What is None is chosen by the shapes, the dtype and the GPU.

    **Arguments:**

    - `block_size`: how many keys are worked on at a time, a power of two from 16 to 1024.
    - `num_queries_per_block`: how many queries, of the tokens and heads that share a kv
        head, are worked on together, a power of two from 16 to 1024. Of a decode step,
        those of one token, so that more are no use than there are heads a kv head.
    - `num_splits`: into how many parts all rows of a decode step together are cut at most,
        beyond one a row, so that a few long rows keep the whole GPU busy. 0 leaves them
        whole, and 65536 is the most.
    - `num_warps`, `num_stages`: of a program, a power of two up to 32, and how many steps
        of its loop overlap, up to 32. Up to 4 stages, loads were seen in the compiled code
        to wait for each other.

    **Raises:**

    `ValueError` for what is no such number.
    """

    block_size: int | None = None
    num_queries_per_block: int | None = None
    num_splits: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None

    def __post_init__(self) -> None:
        block = (16, 1024)
        powers = dict(block_size=block, num_queries_per_block=block, num_warps=(1, 32))
        _check(self, powers_of_two=powers, num_splits=_SPLITS, num_stages=(1, 32))


@dataclasses.dataclass(frozen=True)
class MosaicGPUConfig:
    """How a Mosaic GPU kernel, for Hopper, divides its work; it also chooses these kernels,
    which do not run without one.

    What is None is chosen by the shapes.

    **Arguments:**

    - `block_size`: how many keys are worked on at a time, a power of two from 64 to 1024.
    - `num_splits`: as in [`eqx_paged.TritonConfig`][].
    - `num_stages`: how many blocks of keys and of values there is memory for, those that
        are worked on included, from 2 to 32.

    **Raises:**

    `ValueError` for what is no such number, and, when a program with it is lowered, for
    what does not fit the memory of a core.
    """

    block_size: int | None = None
    num_splits: int | None = None
    num_stages: int | None = None

    def __post_init__(self) -> None:
        # So that a page divides a block, or a block a page.
        powers = dict(block_size=(64, 1024))
        _check(self, powers_of_two=powers, num_splits=_SPLITS, num_stages=(2, 32))


# Least and most.
_SPLITS = (0, 2**16)


def _check(
    config: Any, *, powers_of_two: Mapping[str, tuple[int, int]], **ints: tuple[int, int]
) -> None:
    """Refuses what is given and is not one, or not within its bounds."""
    for name, (least, most) in {**powers_of_two, **ints}.items():
        number = getattr(config, name)
        if number is None:
            continue
        is_one, of = type(number) is int and least <= number <= most, "an int"
        if name in powers_of_two:
            is_one, of = is_one and number & (number - 1) == 0, "a power of two"
        if not is_one:
            raise ValueError(
                f"{name} must be {of} from {least} to {most}, but is {number!r}."
            )


# --- Which GPU


class GPU(NamedTuple):
    """What a kernel's shape depends on."""

    name: str
    capability: int  # 90 is compute capability 9.0
    num_cores: int  # streaming multiprocessors


# As the device of an abstract mesh is called, for a GPU that is not there.
_KINDS = {
    gpu.name: gpu
    for gpu in (
        GPU("NVIDIA A100", 80, 108),
        GPU("NVIDIA H100", 90, 132),
        GPU("NVIDIA H200", 90, 132),
        GPU("NVIDIA GH200", 90, 132),
        GPU("NVIDIA B200", 100, 148),
        GPU("NVIDIA GB200", 100, 148),
        GPU("NVIDIA L40", 89, 142),
        GPU("NVIDIA L4", 89, 58),
        GPU("NVIDIA A10", 86, 72),
        GPU("Tesla T4", 75, 40),
    )
}


def named_kind() -> str | None:
    """The kind of device that the mesh in scope is of, if not of the default one's."""
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is None or abstract.device_kind == jax.devices()[0].device_kind:
        return None
    return abstract.device_kind


def gpu() -> GPU | None:
    """The GPU that is compiled for: that of the mesh in scope, or else the default device;
    None if that is no NVIDIA GPU or one that is not known."""
    if (kind := named_kind()) is not None:
        # Whole words: an L40 is no L40S.
        found = (gpu for name, gpu in _KINDS.items() if re.search(rf"{name}\b", kind))
        return next(found, None)
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or not str(capability).replace(".", "").isdigit():
        return None
    return GPU(device.device_kind, int(str(capability).replace(".", "")), device.core_count)


def chip_or_default() -> GPU:
    return gpu() or _KINDS["NVIDIA H100"]


def dotted(chip: GPU) -> str:
    """Its compute capability."""
    return f"{chip.capability // 10}.{chip.capability % 10}"


# --- Who works on what


# Of a row's tokens in a part: enough that what it takes to merge parts is little.
_MIN_PART = 256


def cdiv(x: Any, y: Any) -> Any:
    """Rounded up, and of the dtype of `x` where 64 bits are enabled too."""
    return -(-x // y)


class Splits(NamedTuple):
    """Parts of rows: of each, its row and which positions it works on; those of a row are
    consecutive. A part that does not exist is of row `num_seqs`."""

    rows: Int32[Array, " num_parts"]
    starts: Int32[Array, " num_parts"]  # a multiple of the block size
    ends: Int32[Array, " num_parts"]
    first_parts: Int32[Array, " num_seqs"]
    counts: Int32[Array, " num_seqs"]  # at least 1


def num_splits_of(
    config: TritonConfig | MosaicGPUConfig, *, programs_per_core: int, num_groups: int
) -> int:
    """Where the config does not say how many: so that all rows together are so many
    programs a core, each for a part and a group of heads."""
    if config.num_splits is not None:
        return config.num_splits
    return cdiv(programs_per_core * chip_or_default().num_cores, num_groups)


def splits_of(
    kv_lens: Int32[Array, " num_seqs"],
    *,
    block_size: int,
    num_splits: int,
    min_part: int = _MIN_PART,
    sliding_window: int | None,
) -> Splits:
    """Cuts rows into `num_splits + num_seqs` parts at most, of about one length.

    A row longer than all rows together divided by `num_splits`, and than `min_part` tokens,
    is cut into as few equal parts as are not. So there are places for all parts, and a long
    row has more of them than a short one.
    """
    num_seqs = kv_lens.shape[0]
    first_blocks = jnp.zeros_like(kv_lens)
    if sliding_window is not None:
        first_blocks = jnp.maximum(kv_lens - sliding_window, 0) // block_size
    blocks = cdiv(kv_lens, block_size) - first_blocks
    counts = jnp.ones_like(kv_lens)
    if num_splits > 0:
        total = jnp.sum(blocks, dtype=jnp.int32)
        min_blocks = cdiv(min_part, block_size)
        counts = cdiv(blocks, jnp.maximum(cdiv(total, num_splits), min_blocks))
        counts = jnp.maximum(counts, 1)
    rows, place = work_list(counts, num_splits + num_seqs)
    row = jnp.minimum(rows, num_seqs - 1)
    # The first `longer` parts of a row have a block more than the others.
    each, longer = jnp.divmod(blocks, counts)

    def end_of(place):
        passed = first_blocks + place * each + jnp.minimum(place, longer)
        return passed * block_size

    first_blocks, each, longer = first_blocks[row], each[row], longer[row]
    starts, ends = end_of(place), jnp.minimum(end_of(place + 1), kv_lens[row])
    first_parts = jnp.cumsum(counts, dtype=jnp.int32) - counts
    return Splits(rows, starts, ends, first_parts, counts)


def work_list(
    counts: Int32[Array, " num_seqs"], capacity: int
) -> tuple[Int32[Array, " capacity"], Int32[Array, " capacity"]]:
    """`counts[i]` items of row `i`, row after row: the row of each item, and which of its
    row's it is. Items past the last are of row `num_seqs`."""
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    item = jnp.arange(capacity, dtype=jnp.int32)
    rows = jnp.sum(item[:, None] >= ends[None], axis=1, dtype=jnp.int32)
    before = jnp.concatenate([jnp.zeros_like(ends[:1]), ends])
    return rows, item - before[rows]

"""Writing keys and values into pages: the public function."""

import functools

import jax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32, Real

from ..._types import Implementation
from .. import _arguments as arguments
from .._choose import check_implementation, choose
from .._gradient import differentiable
from .._tpu import TPUConfig
from . import pallas_tpu, xla


def write_kv(
    k_pages: Real[Array, "num_pages num_kv_heads rows lanes"],
    v_pages: Real[Array, "num_pages num_kv_heads rows lanes"],
    k: Float[Array, "num_tokens num_kv_heads head_dim"],
    v: Float[Array, "num_tokens num_kv_heads head_dim"],
    slots: Int32[Array, " num_tokens"],
    *,
    implementation: Implementation | None = None,
    interpret: bool | pltpu.InterpretParams = False,
    config: TPUConfig | None = None,
) -> tuple[
    Real[Array, "num_pages num_kv_heads rows lanes"],
    Real[Array, "num_pages num_kv_heads rows lanes"],
]:
    """Stores one key and one value a token.

    In place where the pages were donated to the program, or are the program's own.
    Differentiable (reverse mode), but not through uint16, which is the bits of numbers and
    not numbers.

    **Arguments:**

    - `k_pages`, `v_pages`: the stored keys and values, in any form of
        [`eqx_paged.paged_attention`][], of a floating-point dtype or uint16 for the bits
        of bfloat16. Where `head_dim` is stored rounded up to a multiple of 128, the lanes
        beyond it become 0.
    - `k`, `v`: the new entries, in token order; rounded to the stored dtype.
    - `slots`: where each one goes, as `page * page_size + offset`. A slot past the last
        page is padding and is dropped. Negative slots, and two tokens for one slot, are
        not allowed.
    - `implementation`: `"xla"`, `"pallas_tpu"` (which has no gradient), or None to let the
        platform decide.
    - `interpret`: runs the Pallas kernel that `implementation` names on a CPU, slowly:
        True, or `pltpu.InterpretParams`, which can look for races.
    - `config`: how a Pallas kernel for the TPU divides its work; None chooses.

    **Returns:**

    The new `(k_pages, v_pages)`.

    **Raises:**

    `ValueError` for shapes and dtypes that do not fit together; `NotImplementedError`,
    when the program is lowered, for an implementation that cannot run.
    """
    arguments.check_rank("k", k, 3)
    arguments.check_rank("v", v, 3)
    arguments.check_rank("slots", slots, 1)
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, but have {k.shape} and {v.shape}.")
    arguments.check_pages(k_pages, v_pages, k.shape[2])
    arguments.check_equal("num_kv_heads of k", k.shape[1], "of k_pages", k_pages.shape[1])
    arguments.check_equal("num_tokens of k", k.shape[0], "of slots", slots.shape[0])
    arguments.check_indices(slots=slots)
    arguments.check_floating(k=k, v=v)
    arguments.check_writable(k_pages=k_pages, v_pages=v_pages)
    check_implementation(implementation, interpret)
    operands = dict(k_pages=k_pages, v_pages=v_pages, k=k, v=v, slots=slots)
    return _traced_once(
        operands, implementation=implementation, interpret=interpret, config=config
    )


# Behind one `jit`, so that a model of equal layers traces it once.
@functools.partial(jax.jit, static_argnames=("implementation", "interpret", "config"))
def _traced_once(operands, *, implementation, interpret, config):
    k_pages, v_pages = operands["k_pages"], operands["v_pages"]
    head_dim = operands["k"].shape[2]

    def by_xla(operands):
        return xla.write_kv(**operands)

    if implementation == "xla":  # which has a gradient of its own, forward mode too
        return by_xla(operands)
    kernel = choose(
        "write_kv",
        implementation,
        {
            "xla": by_xla,
            "pallas_tpu": lambda operands: pallas_tpu.write_kv(
                **operands, interpret=interpret, config=config
            ),
        },
        results=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_pages, v_pages)],
        unsupported={"pallas_tpu": pallas_tpu.unsupported(k_pages, v_pages, head_dim)},
        interpret=interpret,
    )
    return differentiable("write_kv", implementation, kernel, by_xla)(operands)

"""The one place that picks an implementation.

The choice is made when a program is lowered, since only then its platform is known: a
program can be traced here and compiled for another machine. Only what is chosen is
traced; `jax.lax.platform_dependent` would trace, on a CPU too, the Pallas kernels that it
then drops.

Under `jax.shard_map` a kernel sees its shard alone: it is traced without the mesh axes over
which its arguments vary, and its results vary over all of them.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import jax
import jax.core
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import ManualAxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

from .._types import Implementation


# Takes the arrays of a call as one mapping, and gives a tuple of arrays.
Kernel = Callable[[dict[str, Any]], Any]

# Where each Pallas implementation runs.
PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "cuda"}


def check_implementation(implementation: str | None, interpret: Any = False) -> None:
    known = get_args(Implementation)
    if implementation is not None and implementation not in known:
        raise ValueError(
            f"implementation must be None or one of {known}, but is {implementation!r}."
        )
    if interpret and implementation not in PLATFORMS:
        raise ValueError(
            f"interpret is for one of {tuple(PLATFORMS)}, but implementation is "
            f"{implementation!r}."
        )
    if implementation == "pallas_gpu" and not isinstance(interpret, bool):
        raise ValueError(
            f"interpret must be True or False for 'pallas_gpu', but is {interpret!r}."
        )


def choose(
    op: str,
    implementation: Implementation | None,
    kernels: Mapping[str, Kernel],
    *,
    results: Sequence[jax.ShapeDtypeStruct],
    unsupported: Mapping[str, str | None] | None = None,
    interpret: Any = False,
) -> Kernel:
    """The kernel that runs.

    Without a wish, that is the Pallas kernel of the platform that the program is lowered
    for, where there is one and `unsupported` has no reason against it, and else "xla". A
    named one that cannot run is refused when the program is lowered.
    """
    unsupported = unsupported or {}
    if implementation is None:
        able = {
            platform: kernels[name]
            for name, platform in PLATFORMS.items()
            if name in kernels and unsupported.get(name) is None
        }
        return _by_platform(able, kernels["xla"], results)
    has = f"it has {', '.join(repr(name) for name in kernels)}."
    if implementation not in kernels:
        reason = f"{op} has no implementation {implementation!r}; {has}"
        return _by_platform({}, _refusal(reason), results)
    if (why := unsupported.get(implementation)) is not None:
        reason = f"{op} cannot run as {implementation!r}: {why}; {has}"
        return _by_platform({}, _refusal(reason), results)
    if implementation == "xla" or interpret is True:
        return _by_platform({}, kernels[implementation], results)
    if interpret:  # by callbacks to the host, which must be known when it is traced
        return kernels[implementation]
    platform = PLATFORMS[implementation]
    reason = f"{implementation!r} runs on {platform!r}, or with interpret=True; {op}: {has}"
    return _by_platform({platform: kernels[implementation]}, _refusal(reason), results)


def attention_results(q: Array, num_results: int = 3) -> list[jax.ShapeDtypeStruct]:
    """Output, largest logit and denominator, or the first of these."""
    per_query = jax.ShapeDtypeStruct(q.shape[:2], jnp.float32)
    return [jax.ShapeDtypeStruct(q.shape, q.dtype), per_query, per_query][:num_results]


def _refusal(reason: str) -> Kernel:
    def refuse(operands):
        raise NotImplementedError(reason)

    return refuse


def _by_platform(able, default, results):
    def run(operands):
        flat, treedef = jax.tree.flatten(operands)

        def on_flat(kernel):
            return lambda *flat: kernel(treedef.unflatten(flat))

        return tuple(
            _by_platform_p.bind(
                *flat,
                able=tuple(
                    (platform, on_flat(kernel)) for platform, kernel in able.items()
                ),
                default=on_flat(default),
                results=tuple(jax.core.ShapedArray(x.shape, x.dtype) for x in results),
            )
        )

    return run


# A primitive, since nothing else of JAX runs code of ours when a program is lowered. It is
# defined once, here, and only this file knows of it.
_by_platform_p = Primitive("eqx_paged_by_platform")
_by_platform_p.multiple_results = True


@_by_platform_p.def_impl
def _run(*flat, **parameters):  # with `jax.disable_jit`
    with jax.disable_jit(False):
        return jax.jit(functools.partial(_by_platform_p.bind, **parameters))(*flat)


@_by_platform_p.def_abstract_eval
def _results(*flat, able, default, results):
    axes = frozenset[Any]().union(*(x.manual_axis_type.varying for x in flat))
    if not axes:
        return list(results)
    sharding = NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec())
    kind = ManualAxisType(varying=axes)
    return [x.update(sharding=sharding, manual_axis_type=kind) for x in results]


def _lower(ctx, *flat, able, default, results, platform=None):
    kernel = dict(able).get(platform, default)
    of_shard = [jax.core.ShapedArray(x.shape, x.dtype) for x in ctx.avals_in]
    ctx = ctx.replace(avals_in=of_shard)
    return mlir.lower_fun(kernel, multiple_results=True)(ctx, *flat)


mlir.register_lowering(_by_platform_p, _lower)
for _platform in PLATFORMS.values():
    mlir.register_lowering(
        _by_platform_p, functools.partial(_lower, platform=_platform), platform=_platform
    )


def _batch(flat, axes, *, able, default, results):
    (size,) = {x.shape[a] for x, a in zip(flat, axes, strict=True) if a is not None}
    batched = functools.partial(jax.vmap, in_axes=axes, out_axes=0)
    out = _by_platform_p.bind(
        *flat,
        able=tuple((platform, batched(kernel)) for platform, kernel in able),
        default=batched(default),
        results=tuple(jax.core.ShapedArray((size, *x.shape), x.dtype) for x in results),
    )
    return out, [0] * len(out)


batching.primitive_batchers[_by_platform_p] = _batch

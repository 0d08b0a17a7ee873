"""Static misuse: a `ValueError` that names both values, without the typing hook."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from ..helpers import fails_naming


pytestmark = pytest.mark.usefixtures("no_type_hook")

f32, bf16, i32, c64 = jnp.float32, jnp.bfloat16, jnp.int32, jnp.complex64


def decode_args(**changed):
    args = dict(
        q=((3, 4, 64), f32),
        k_pages=((9, 2, 16, 64), f32),
        v_pages=((9, 2, 16, 64), f32),
        kv_lens=((3,), i32),
        page_indices=((3, 5), i32),
    )
    return shapes(args, changed)


def mixed_args(**changed):
    args = decode_args()
    args = {n: (x.shape, x.dtype) for n, x in args.items()}
    args |= dict(q=((10, 4, 64), f32), cu_q_lens=((4,), i32), num_seqs=((), i32))
    return shapes(args, changed)


def write_args(**changed):
    args = dict(
        k_pages=((9, 2, 16, 64), f32),
        v_pages=((9, 2, 16, 64), f32),
        k=((5, 2, 64), f32),
        v=((5, 2, 64), f32),
        slots=((5,), i32),
    )
    return shapes(args, changed)


def ragged_args(**changed):
    args = dict(
        q=((3, 4, 64), f32),
        k=((3, 40, 2, 64), f32),
        v=((3, 40, 2, 64), f32),
        lengths=((3,), i32),
        starts=((3,), i32),
    )
    return shapes(args, changed)


def shapes(args, changed):
    return {n: jax.ShapeDtypeStruct(*x) for n, x in (args | changed).items()}


def trace(name, args, **options):
    import eqx_paged

    function = getattr(eqx_paged, name)
    return jax.eval_shape(lambda *args: function(*args, **options), *args.values())


def test_the_unchanged_arguments_are_accepted():
    trace("paged_attention", decode_args())
    trace("ragged_paged_attention", mixed_args())
    trace("write_kv", write_args())
    trace("ragged_gqa", ragged_args())


# What is changed, and what the message must say.
PAGES = [
    (dict(q=((3, 5, 64), f32)), ("5", "2")),
    (dict(q=((3, 1, 64), f32)), ("1", "2")),
    (dict(q=((3, 4, 80), f32)), ("80", "64")),
    (dict(q=((3, 4, 128), f32)), ("128", "64")),
    (dict(v_pages=((9, 2, 16, 32), f32)), ("64", "32")),
    (dict(v_pages=((9, 4, 16, 64), f32)), ("2", "4")),
    (dict(v_pages=((8, 2, 16, 64), f32)), ("9", "8")),
    (dict(v_pages=((9, 2, 8, 64), f32)), ("16", "8")),
    (dict(page_indices=((2, 5), i32)), ("3", "2")),
    (dict(kv_lens=((3,), jnp.int16)), ("int16", "int32")),
    (dict(kv_lens=((3,), f32)), ("float32", "int32")),
    (dict(page_indices=((3, 5), jnp.uint32)), ("uint32", "int32")),
    (dict(q=((3, 4, 64), i32)), ("int32",)),
    (dict(k_pages=((9, 2, 64), f32)), ("4", "(9, 2, 64)")),
    # head_dim 80 is stored as it is or rounded up to 128.
    (
        dict(
            q=((3, 4, 80), f32),
            k_pages=((9, 2, 10, 256), f32),
            v_pages=((9, 2, 10, 256), f32),
        ),
        ("80", "256"),
    ),
]


@pytest.mark.parametrize("changed, words", PAGES, ids=lambda x: str(x))
@pytest.mark.parametrize("name", ("paged_attention", "ragged_paged_attention"))
def test_attention_over_pages(name, changed, words):
    args = decode_args if name == "paged_attention" else mixed_args
    with fails_naming(words):
        trace(name, args(**changed))


@pytest.mark.parametrize(
    "changed, word",
    [
        (dict(k_pages=((9, 2, 16, 64), c64)), "complex64"),
        (dict(v_pages=((9, 2, 16, 64), bool)), "bool"),
        (dict(k_pages=((0, 2, 8, 128), f32), v_pages=((0, 2, 8, 128), f32)), "num_pages"),
        (dict(k_pages=((9, 2, 0, 64), f32), v_pages=((9, 2, 0, 64), f32)), "rows"),
        (dict(q=((3, 0, 64), f32)), "0 and 2"),
        (dict(page_indices=((3, 0), i32)), "(3, 0)"),
    ],
    ids=str,
)
def test_pages_of_no_size_or_of_no_numbers_are_refused(changed, word):
    with pytest.raises(ValueError, match=re.escape(word)):
        trace("paged_attention", decode_args(**changed))


def test_there_must_be_a_row():
    none = dict(q=((0, 4, 64), f32), kv_lens=((0,), i32), page_indices=((0, 5), i32))
    with pytest.raises(ValueError, match=re.escape("(0, 4, 64)")):
        trace("paged_attention", decode_args(**none))
    with pytest.raises(ValueError, match=re.escape("(3, 0, 2, 64)")):
        trace("ragged_gqa", ragged_args(k=((3, 0, 2, 64), f32), v=((3, 0, 2, 64), f32)))


def test_decode_needs_one_query_a_row():
    with fails_naming(("2", "3")):
        trace("paged_attention", decode_args(q=((2, 4, 64), f32)))


@pytest.mark.parametrize(
    "changed, words",
    [
        (dict(cu_q_lens=((3,), i32)), ("3", "4")),
        (dict(cu_q_lens=((4,), jnp.int16)), ("int16", "int32")),
        (dict(num_seqs=((), f32)), ("float32", "int32")),
        (dict(num_seqs=((1,), i32)), ("num_seqs",)),
    ],
    ids=str,
)
def test_mixed_attention(changed, words):
    with fails_naming(words):
        trace("ragged_paged_attention", mixed_args(**changed))


OPTIONS = [
    (dict(soft_cap=0.0), ("0.0",)),
    (dict(soft_cap=-2.0), ("-2.0",)),
    (dict(soft_cap=math.inf), ("inf",)),
    (dict(soft_cap=math.nan), ("nan",)),
    (dict(sliding_window=0), ("0",)),
    (dict(sliding_window=-3), ("-3",)),
    (dict(sliding_window=2.5), ("2.5",)),
    (dict(sliding_window=True), ("True",)),
    (dict(sliding_window=2**31), (str(2**31),)),
    (dict(sm_scale=math.nan), ("nan",)),
    (dict(soft_cap=jnp.float32(3)), ("Python number",)),
    (dict(sinks=[1.0] * 4), ("array", "sinks")),
    (dict(mask_value=0.0), ("0.0",)),
    (dict(mask_value=-math.inf), ("-inf",)),
    (dict(mask_value=math.nan), ("nan",)),
    (dict(sinks=jnp.zeros(3)), ("(4,)", "(3,)")),
    (dict(k_scale=jnp.ones(4)), ("(2,)", "(4,)")),
    (dict(v_scale=jnp.ones(3)), ("(2,)", "(3,)")),
    (dict(implementation="triton"), ("triton", "xla", "pallas_tpu", "pallas_gpu")),
]


@pytest.mark.parametrize("options, words", OPTIONS, ids=lambda x: str(x))
@pytest.mark.parametrize(
    "name, args",
    [
        ("paged_attention", decode_args),
        ("ragged_paged_attention", mixed_args),
        ("ragged_gqa", ragged_args),
    ],
)
def test_options(name, args, options, words):
    with fails_naming(words):
        trace(name, args(), **options)


@pytest.mark.parametrize(
    "name, args",
    [("paged_attention", decode_args), ("ragged_paged_attention", mixed_args)],
)
def test_residuals_exclude_sinks(name, args):
    with fails_naming(("return_residuals", "sinks")):
        trace(name, args(), sinks=jnp.zeros(4), return_residuals=True)


@pytest.mark.parametrize(
    "changed, words",
    [
        (dict(v=((4, 2, 64), f32)), ("5", "4")),
        (dict(k=((5, 4, 64), f32), v=((5, 4, 64), f32)), ("4", "2")),
        (dict(k=((5, 2, 80), f32), v=((5, 2, 80), f32)), ("80", "64")),
        (dict(slots=((4,), i32)), ("5", "4")),
        (dict(slots=((5,), f32)), ("float32", "int32")),
        (dict(v_pages=((9, 2, 8, 64), f32)), ("16", "8")),
        (dict(k_pages=((9, 2, 16, 64), jnp.int8)), ("int8",)),
    ],
    ids=str,
)
def test_write_kv(changed, words):
    with fails_naming(words):
        trace("write_kv", write_args(**changed))


def test_write_kv_refuses_an_unknown_implementation():
    with fails_naming(("triton", "xla")):
        trace("write_kv", write_args(), implementation="triton")


@pytest.mark.parametrize(
    "changed, words",
    [
        (dict(q=((3, 5, 64), f32)), ("5", "2")),
        (dict(q=((2, 4, 64), f32)), ("2", "3")),
        (dict(q=((3, 4, 80), f32)), ("80", "64")),
        (dict(v=((3, 41, 2, 64), f32)), ("40", "41")),
        (dict(lengths=((2,), i32)), ("2", "3")),
        (dict(starts=((4,), i32)), ("4", "3")),
        (dict(lengths=((3,), f32)), ("float32", "int32")),
        (dict(starts=((3,), f32)), ("float32", "int32")),
    ],
    ids=str,
)
def test_contiguous_attention(changed, words):
    with fails_naming(words):
        trace("ragged_gqa", ragged_args(**changed))


def test_contiguous_block_size_is_positive():
    with fails_naming(("0",)):
        trace("ragged_gqa", ragged_args(), block_size=0)


def test_mha_needs_as_many_kv_heads_as_heads():
    with fails_naming(("4", "2")):
        trace("ragged_mha", ragged_args())


def test_mqa_takes_keys_without_a_head_axis():
    with pytest.raises(ValueError, match=re.escape("(3, 40, 2, 64)")):
        trace("ragged_mqa", ragged_args())
    with fails_naming(("80", "64")):
        k = ((3, 40, 80), f32)
        trace("ragged_mqa", ragged_args(k=k, v=k))


def test_merging_needs_matching_parts():
    import eqx_paged

    out, m = jnp.zeros((2, 3, 4, 64)), jnp.zeros((2, 3, 4))
    with fails_naming(("(2, 3, 4)", "(2, 3, 5)")):
        eqx_paged.merge_residuals(out, m, jnp.zeros((2, 3, 5)))
    with fails_naming(("2", "3")):
        eqx_paged.merge_residuals([out[0]] * 2, [m[0]] * 3, [m[0]] * 2)

"""Cases, comparisons and counters shared by the tests. No library code is used here,
except to look a public function up by its name."""

import contextlib
import dataclasses
import functools as ft
import inspect
import math
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from . import oracle


# float32: sums of some thousand products of values near 1 lose about 1e-6 a step, and the
# softmax multiplies the error of a logit by its size; 2e-5 leaves a factor of five.
# bfloat16: the inputs are exact for the oracle too, so that only the rounding of the result
# (2**-9 of values up to 3) and of the probabilities before the second product is left.
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2}


def assert_close(actual, expected, dtype="float32"):
    tolerance = TOLERANCE[str(jnp.dtype(dtype))]
    actual = np.asarray(actual)
    assert actual.shape == np.shape(expected), (actual.shape, np.shape(expected))
    np.testing.assert_allclose(
        actual.astype(np.float64), expected, rtol=tolerance, atol=tolerance
    )


def assert_trees_identical(a, b):
    """Bit for bit, NaN included."""
    leaves_a, structure_a = jax.tree.flatten(a)
    leaves_b, structure_b = jax.tree.flatten(b)
    assert structure_a == structure_b
    for x, y in zip(leaves_a, leaves_b):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def entry(tree, i):
    """One of a batch of trees."""
    return jax.tree.map(lambda x: x[i], tree)


def stacked(trees):
    """Trees of one structure as a batch."""
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def rng_of(key):
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def normal(rng, shape, dtype="float32"):
    return rng.standard_normal(shape).astype(np.float32).astype(jnp.dtype(dtype))


def array_function(name, implementation):
    """A public array function with its implementation chosen."""
    import eqx_paged

    if implementation == "reference":
        return getattr(eqx_paged.reference, name)
    return ft.partial(getattr(eqx_paged, name), implementation=implementation)


# Half the time of a compilation goes into optimising code that is run once.
quick_jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@ft.partial(quick_jit, static_argnames="num_tokens")
def append(cache, q_lens, num_tokens=None):
    """`append` of a cache as one program, which is much quicker than op by op."""
    return cache.append(q_lens, num_tokens)


def run(name, implementation, args, **options):
    """Calls an array function as one compiled program."""
    arrays = {n: x for n, x in options.items() if isinstance(x, (jax.Array, np.ndarray))}
    arrays = {n: jnp.asarray(x) for n, x in arrays.items()}
    static = {n: x for n, x in options.items() if n not in arrays}
    function = ft.partial(array_function(name, implementation), **static)
    return quick_jit(function)(*args, **arrays)


# --- Stored pages

# How a pool is stored: the dtype of its values, and whether as bits, and in which form.
STORAGE = {
    "f32": ("float32", "plain"),
    "f32-rows": ("float32", "rows"),
    "bf16": ("bfloat16", "plain"),
    "bf16-rows": ("bfloat16", "rows"),
    "u16": ("uint16", "plain"),
    "u16-rows": ("uint16", "rows"),
    "f32-padded": ("float32", "padded"),
    "bf16-padded": ("bfloat16", "padded"),
}


def value_dtype(storage):
    dtype, _ = STORAGE[storage]
    return "bfloat16" if dtype == "uint16" else dtype


def store(pool, storage):
    """A plain pool of values, in the form in which a cache may store it."""
    dtype, form = STORAGE[storage]
    pool = np.ascontiguousarray(pool.astype(jnp.dtype(value_dtype(storage))))
    if form == "rows":
        pool = pool.reshape(*pool.shape[:2], -1, 128)
    if form == "padded":
        # Zeros, but in a slot that was never written anything.
        beyond = np.where(np.isnan(pool[..., :1]), pool[..., :1], 0).astype(pool.dtype)
        pool = np.concatenate([pool, *[beyond] * (-pool.shape[3] % 128)], axis=3)
    if dtype == "uint16":
        pool = pool.view(np.uint16)
    return jnp.asarray(pool)


def unstore(pages, head_dim):
    """The plain float32 pool, `[num_pages, num_kv_heads, page_size, head_dim]`."""
    pages = np.ascontiguousarray(pages)
    if pages.dtype == np.uint16:
        pages = pages.view(ml_dtypes.bfloat16)
    if 128 % head_dim != 0:  # which may be rounded up
        pages = pages[..., :head_dim]
    return pages.astype(np.float32).reshape(*pages.shape[:2], -1, head_dim)


@contextlib.contextmanager
def stored_as_on(platform):
    """New caches are stored as on another platform."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: platform)
        yield


def layer_pools(cache):
    """The plain key and value pools of each layer of a cache."""
    return [
        (unstore(x.k_pages, x.head_dim), unstore(x.v_pages, x.head_dim))
        for x in cache.layers
    ]


def row_tokens(pool, page_indices, length):
    """The tokens of one row, `[length, num_kv_heads, head_dim]`, gathered one by one."""
    page_size = pool.shape[2]
    tokens = [pool[page_indices[t // page_size], :, t % page_size] for t in range(length)]
    return np.stack(tokens) if tokens else np.zeros((0, pool.shape[1], pool.shape[3]))


def poison_free_pages(cache):
    """The cache with NaN in every page that no row holds. May be traced."""
    free = cache.table.ref_counts == 0

    def poison(pages):
        nan = np.array(0x7FC0, np.uint16) if pages.dtype == jnp.uint16 else np.nan
        return jnp.where(free[:, None, None, None], jnp.asarray(nan, pages.dtype), pages)

    layers = tuple(
        dataclasses.replace(x, k_pages=poison(x.k_pages), v_pages=poison(x.v_pages))
        for x in cache.layers
    )
    return dataclasses.replace(cache, layers=layers)


# --- Cases for the array functions

every_implementation = pytest.mark.parametrize("implementation", ("reference", "xla"))


def head_values(num):
    """One value a head, all different."""
    return np.linspace(0.5, 1.5, num, dtype=np.float32)


# Every option alone and the combinations that interact, as functions of the numbers of
# heads and kv heads. A soft cap of 2 bends logits of size 1; a sink of 3 outweighs them.
OPTIONS = {
    "plain": lambda h, k: {},
    "scale": lambda h, k: dict(sm_scale=0.37),
    "soft cap": lambda h, k: dict(soft_cap=2.0),
    "window": lambda h, k: dict(sliding_window=11),
    "sinks": lambda h, k: dict(sinks=3 * head_values(h)),
    "mask value": lambda h, k: dict(mask_value=-1e4),
    "k scale": lambda h, k: dict(k_scale=0.25),
    "v scale": lambda h, k: dict(v_scale=3.0),
    "scales by head": lambda h, k: dict(k_scale=head_values(k), v_scale=-head_values(k)),
    "window, soft cap": lambda h, k: dict(sliding_window=11, soft_cap=2.0),
    "window, soft cap, sinks": lambda h, k: dict(
        sliding_window=11, soft_cap=2.0, sinks=3 * head_values(h)
    ),
    "everything": lambda h, k: dict(
        sm_scale=0.37,
        sliding_window=9,
        soft_cap=1.5,
        sinks=-head_values(h),
        k_scale=head_values(k),
        v_scale=head_values(k),
        mask_value=-1e5,
    ),
    "residuals": lambda h, k: dict(return_residuals=True),
    "residuals, window": lambda h, k: dict(return_residuals=True, sliding_window=11),
    "residuals, window, soft cap, scales": lambda h, k: dict(
        return_residuals=True,
        sliding_window=11,
        soft_cap=2.0,
        sm_scale=0.37,
        k_scale=head_values(k),
        v_scale=0.5,
    ),
    # Above every logit: it is nothing to a query that has keys.
    "residuals, high mask value": lambda h, k: dict(
        return_residuals=True, mask_value=-1e-3, sm_scale=0.01
    ),
}


@dataclasses.dataclass
class PagedCase:
    """Arguments of paged attention, and the same numbers row by row for the oracle."""

    q: jax.Array
    k_pages: jax.Array
    v_pages: jax.Array
    kv_lens: jax.Array
    page_indices: jax.Array
    cu_q_lens: jax.Array
    num_seqs: jax.Array
    qs: list
    ks: list
    vs: list
    dtype: str

    @property
    def decode_args(self):
        return self.q, self.k_pages, self.v_pages, self.kv_lens, self.page_indices

    @property
    def mixed_args(self):
        return *self.decode_args, self.cu_q_lens, self.num_seqs


def paged_case(
    key,
    *,
    kv_lens,
    q_lens=None,  # None: decode
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    page_size=16,
    storage="f32",
    q_dtype=None,
    sliding_window=None,
    num_tokens=None,  # padded tokens of a mixed case
    capacity=None,  # rows of a mixed case, more than there are sequences
    padding=math.nan,  # what the queries of idle rows and padding tokens hold
):
    """A pool full of NaN in which only positions that some query attends to are written.

    Pages are shuffled. Absent page ids are garbage, in range and out of it, and so is
    everything about rows past `num_seqs`.
    """
    rng = rng_of(key)
    dtype = value_dtype(storage)
    q_dtype = dtype if q_dtype is None else q_dtype
    decode = q_lens is None
    q_lens = [1] * len(kv_lens) if decode else list(q_lens)
    held = [math.ceil(n / page_size) for n in kv_lens]
    num_pages = sum(held) + 3
    pages_per_seq = max(held) + 1
    capacity = len(kv_lens) if capacity is None else capacity

    qs = [normal(rng, (n, num_heads, head_dim), q_dtype) for n in q_lens]
    ks = [normal(rng, (n, num_kv_heads, head_dim), dtype) for n in kv_lens]
    vs = [normal(rng, (n, num_kv_heads, head_dim), dtype) for n in kv_lens]

    k_pool = np.full((num_pages, num_kv_heads, page_size, head_dim), np.nan, np.float32)
    v_pool = k_pool.copy()
    garbage = (0, 1, num_pages - 1, num_pages, num_pages + 5, 2**31 - 1)
    page_indices = rng.choice(np.array(garbage), (capacity, pages_per_seq))
    order = iter(rng.permutation(num_pages))
    for i, (kv_len, q_len) in enumerate(zip(kv_lens, q_lens)):
        page_indices[i, : held[i]] = [next(order) for _ in range(held[i])]
        first = 0
        if sliding_window is not None:
            first = max(0, kv_len - q_len - sliding_window + 1)
        for t in range(first, kv_len):
            page = page_indices[i, t // page_size]
            k_pool[page, :, t % page_size] = ks[i][t]
            v_pool[page, :, t % page_size] = vs[i][t]

    total = sum(q_lens)
    num_tokens = total if num_tokens is None else num_tokens
    q = np.full((num_tokens, num_heads, head_dim), padding, np.float32)
    q = q.astype(jnp.dtype(q_dtype))
    q[:total] = np.concatenate(qs)
    if decode:
        q[np.asarray(kv_lens) == 0] = padding
    unused = capacity - len(kv_lens)
    return PagedCase(
        q=jnp.asarray(q),
        k_pages=store(k_pool, storage),
        v_pages=store(v_pool, storage),
        kv_lens=jnp.asarray([*kv_lens, *[page_size + 1] * unused], jnp.int32),
        page_indices=jnp.asarray(page_indices, jnp.int32),
        cu_q_lens=jnp.asarray([0, *np.cumsum(q_lens), *[total + 2] * unused], jnp.int32),
        num_seqs=jnp.asarray(len(kv_lens), jnp.int32),
        qs=qs,
        ks=ks,
        vs=vs,
        dtype=str(jnp.dtype(q_dtype)),
    )


def expected_paged(case, *, return_residuals=False, mask_value=None, **options):
    """`(out, m, l)` of a case. Padding gives 0 and has attended to nothing."""
    del return_residuals
    if mask_value is None:
        mask_value = default_mask_value("paged_attention")
    results = oracle.attention_rows(
        case.qs, case.ks, case.vs, mask_value=mask_value, **options
    )
    padding = case.q.shape[0] - results[0].shape[0]
    return tuple(
        np.concatenate([x, np.full((padding, *x.shape[1:]), fill)])
        for x, fill in zip(results, (0.0, mask_value, 0.0))
    )


def default_mask_value(name):
    import eqx_paged

    return inspect.signature(getattr(eqx_paged, name)).parameters["mask_value"].default


def check_paged(name, case, implementation, *, how=None, **options):
    """An array function over pages against the oracle, whatever options say `how`."""
    args = case.decode_args if name == "paged_attention" else case.mixed_args
    out = run(name, implementation, args, **options, **(how or {}))
    wanted = expected_paged(case, **options)
    if options.get("return_residuals"):
        out, m, l = out  # noqa: E741
        assert m.dtype == l.dtype == jnp.float32
        assert_close(m, wanted[1], case.dtype)
        assert_close(l, wanted[2], case.dtype)
    assert out.dtype == jnp.dtype(case.dtype)
    assert_close(out, wanted[0], case.dtype)


@dataclasses.dataclass
class RaggedCase:
    """Arguments of contiguous attention, and the same numbers for the oracle."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    lengths: jax.Array
    starts: jax.Array
    dtype: str

    @property
    def args(self):
        return self.q, self.k, self.v, self.lengths, self.starts


def ragged_case(
    key,
    *,
    windows,  # (start, length) of each row
    size,  # of the buffers
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    dtype="float32",
    sliding_window=None,
):
    """Buffers that hold NaN wherever a row does not attend."""
    rng = rng_of(key)
    q = normal(rng, (len(windows), num_heads, head_dim), dtype)
    k = normal(rng, (len(windows), size, num_kv_heads, head_dim), dtype)
    v = normal(rng, (len(windows), size, num_kv_heads, head_dim), dtype)
    for i, (start, length) in enumerate(windows):
        if sliding_window is not None:
            start = max(start, length - sliding_window)
        k[i, :start] = v[i, :start] = np.nan
        k[i, length:] = v[i, length:] = np.nan
    starts, lengths = zip(*windows)
    return RaggedCase(
        q=jnp.asarray(q),
        k=jnp.asarray(k),
        v=jnp.asarray(v),
        lengths=jnp.asarray(lengths, jnp.int32),
        starts=jnp.asarray(starts, jnp.int32),
        dtype=dtype,
    )


# --- Compiled programs


@contextlib.contextmanager
def count_compilations():
    """Counts the programs that XLA compiles inside the block; yields a list of them."""
    seen = []

    def listener(event, duration, **kwargs):
        del duration, kwargs
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


_ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_ITEM_BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
_MOVES = ("copy", "copy-start", "convert", "bitcast-convert", "transpose", "select")
_INSTRUCTION = re.compile(r"= \(?(\w+)\[([\d,]*)\][^ ]* ([\w-]+)\(")


def large_moves(compiled, min_bytes):
    """The instructions of a compiled program, inside fusions too, that copy, convert,
    reorder or mask at least `min_bytes`."""
    found = []
    for line in compiled.as_text().splitlines():
        match = _INSTRUCTION.search(line)
        if match is None:
            continue
        dtype, shape, name = match.groups()
        size = math.prod(int(n) for n in shape.split(",") if n)
        if name in _MOVES and size * _ITEM_BYTES.get(dtype, 4) >= min_bytes:
            found.append(line.strip())
    return found


# --- The page table


def ints(values):
    return jnp.asarray(values, jnp.int32)


RESULT_NAMES = (
    *("successful", "invalid_argument", "too_many_tokens", "sequence_too_long"),
    *("out_of_pages", "row_in_use"),
)


def fails_naming(words):
    """A `ValueError` that says each of the words, as a word of its own, in any order."""
    pattern = "".join(rf"(?=.*(?<!\w){re.escape(word)}(?!\w))" for word in words)
    return pytest.raises(ValueError, match=f"(?s){pattern}")


def told(result):
    """The name of a `RESULTS` member."""
    from eqx_paged import RESULTS

    names = [n for n in RESULT_NAMES if bool(result == getattr(RESULTS, n))]
    (name,) = names
    return name


def check_table(table, model):
    """A page table against its model, and the invariants that hold at any time."""
    page_size, num_pages = table.page_size, table.num_pages
    indices = np.asarray(table.page_indices)
    assert table.kv_lens.tolist() == model.lengths

    # Each row holds the pages of its length and nothing else, but for those it dropped.
    firsts = [row.pages.count(None) for row in model.rows]
    assert table.starts.tolist() == [n * page_size for n in firsts]
    held = [math.ceil(n / page_size) for n in model.lengths]
    ref_counts = np.zeros(num_pages, int)
    for row, first, n in zip(indices, firsts, held):
        pages = row[first:n]
        assert len(set(pages)) == n - first
        assert np.all(row < num_pages) and np.all(row >= 0)
        np.testing.assert_array_equal(np.delete(row, np.s_[first:n]), 0)
        np.add.at(ref_counts, pages, 1)
    number_of = {
        id(page): int(number)
        for numbers, row in zip(indices, model.rows)
        for number, page in zip(numbers, row.pages)
        if page is not None
    }
    # Which page it is that no row holds, the model cannot tell.
    only_retained = {}
    for page in model.retained:
        if id(page) in number_of:
            ref_counts[number_of[id(page)]] += 1
        else:
            only_retained[id(page)] = only_retained.get(id(page), 0) + 1
    others = np.asarray(table.ref_counts) - ref_counts
    assert sorted(others[others != 0]) == sorted(only_retained.values())
    ref_counts += others

    # Each page is free or held, and not both.
    num_free = int(table.num_free_pages)
    assert num_free == model.num_free_pages
    free = np.asarray(table.free_pages)[:num_free]
    assert sorted(free) == np.flatnonzero(ref_counts == 0).tolist()

    # Pages are shared where the model shares them, and nowhere else.
    real, modelled = {}, {}
    for i, (row, first, n) in enumerate(zip(indices, firsts, held)):
        assert len(model.rows[i].pages) == n
        for j in range(first, n):
            real.setdefault(int(row[j]), []).append((i, j))
            modelled.setdefault(id(model.rows[i].pages[j]), []).append((i, j))
    assert sorted(real.values()) == sorted(modelled.values())


# --- One step's addresses


def check_batch(batch, table, q_lens, *, kind, ok=True, num_tokens=None):
    """A batch against the table after its append, token by token."""
    num_seqs, page_size = table.num_seqs, table.page_size
    num_tokens = num_seqs if kind == "decode" else num_tokens
    end = table.num_pages * page_size
    q_lens = q_lens if ok else [0] * num_seqs
    kv_lens = table.kv_lens.tolist()
    indices = np.asarray(table.page_indices)

    positions, slots = [0] * num_tokens, [end] * num_tokens
    last_tokens, cu_q_lens = [0] * num_seqs, [0]
    for i, n in enumerate(q_lens):
        first = i if kind == "decode" else cu_q_lens[-1]
        for j in range(n):
            position = kv_lens[i] - n + j
            page = indices[i, position // page_size]
            positions[first + j] = position
            slots[first + j] = int(page) * page_size + position % page_size
            last_tokens[i] = first + j
        cu_q_lens.append(first + 1 if kind == "decode" else first + n)

    assert batch.kind == kind
    assert batch.positions.tolist() == positions
    assert batch.slots.tolist() == slots
    assert batch.last_tokens.tolist() == last_tokens
    assert batch.cu_q_lens.tolist() == cu_q_lens
    assert batch.starts.tolist() == [0] * num_seqs
    busy = [i for i, n in enumerate(q_lens) if n > 0]
    assert [batch.kv_lens.tolist()[i] for i in busy] == [kv_lens[i] for i in busy]
    if kind == "decode":
        assert all(batch.kv_lens[i] == 0 for i in range(num_seqs) if i not in busy)
    if ok:
        np.testing.assert_array_equal(np.asarray(batch.page_indices), indices)
        assert all(i < int(batch.num_seqs) <= num_seqs for i in busy)
    for x in jax.tree.leaves(batch):
        assert x.dtype == jnp.int32

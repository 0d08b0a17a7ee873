import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from ..helpers import paged_case, ragged_case


def calls(key):
    """Every array function that has implementations, with arguments that fit."""
    import eqx_paged

    case = paged_case(key, kv_lens=(3, 20), q_lens=(1, 1))
    ragged = ragged_case(key, windows=((0, 3), (2, 20)), size=20)
    mha = ragged_case(key, windows=((0, 3),), size=20, num_kv_heads=4)
    new = jnp.ones((2, 2, 64))
    return {
        "paged_attention": (eqx_paged.paged_attention, case.decode_args),
        "ragged_paged_attention": (eqx_paged.ragged_paged_attention, case.mixed_args),
        "ragged_gqa": (eqx_paged.ragged_gqa, ragged.args),
        "ragged_mha": (eqx_paged.ragged_mha, mha.args),
        "ragged_mqa": (
            eqx_paged.ragged_mqa,
            (*mha.args[:1], *(x[:, :, 0] for x in mha.args[1:3]), *mha.args[3:]),
        ),
        "write_kv": (
            eqx_paged.write_kv,
            (case.k_pages, case.v_pages, new, new, jnp.array([0, 17], jnp.int32)),
        ),
    }


NAMES = (
    *("paged_attention", "ragged_paged_attention", "write_kv"),
    *("ragged_gqa", "ragged_mha", "ragged_mqa"),
)
every_function = pytest.mark.parametrize("name", NAMES)


@every_function
@pytest.mark.parametrize("implementation", ("pallas_tpu", "pallas_gpu"))
def test_a_kernel_of_another_platform_fails_when_lowered_and_not_when_traced(
    getkey, name, implementation
):
    function, args = calls(getkey())[name]

    def call(*args):
        return function(*args, implementation=implementation)

    jaxpr = jax.make_jaxpr(call)(*args)
    default = jax.eval_shape(function, *args)
    assert jax.tree.leaves(jaxpr.out_avals) == jax.tree.leaves(
        jax.make_jaxpr(function)(*args).out_avals
    )
    assert jax.tree.structure(jax.eval_shape(call, *args)) == jax.tree.structure(default)
    traced = jax.jit(call).trace(*args)
    # The message names what was asked for and what could run.
    with pytest.raises(NotImplementedError, match=f"(?s)(?=.*{implementation})(?=.*xla)"):
        traced.lower()
    with pytest.raises(NotImplementedError, match=implementation):
        call(*args)


@every_function
def test_unknown_implementation_is_a_value_error(getkey, name, no_type_hook):
    function, args = calls(getkey())[name]
    with pytest.raises(ValueError, match="cuda"):
        function(*args, implementation="cuda")


@every_function
def test_the_default_is_xla_on_a_cpu(getkey, name):
    function, args = calls(getkey())[name]
    wanted = jax.jit(lambda *args: function(*args, implementation="xla"))(*args)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(function)(*args), wanted)


@every_function
@pytest.mark.parametrize("platform", ("cpu", "tpu", "cuda"))
def test_the_default_is_chosen_for_the_platform_it_is_lowered_for(getkey, name, platform):
    function, args = calls(getkey())[name]
    lowered = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,))
    assert lowered.as_text()


@every_function
def test_a_program_for_several_platforms_can_be_exported(getkey, name):
    function, args = calls(getkey())[name]
    exported = jax.export.export(jax.jit(function), platforms=("cpu", "tpu"))(*args)
    wanted = jax.jit(function)(*args)
    jax.tree.map(np.testing.assert_array_equal, exported.call(*args), wanted)


@every_function
def test_the_reference_has_the_same_name(getkey, name):
    import eqx_paged

    function, args = calls(getkey())[name]
    wanted = jax.tree.leaves(function(*args))
    actual = jax.tree.leaves(getattr(eqx_paged.reference, name)(*args))
    for x, y in zip(actual, wanted, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)

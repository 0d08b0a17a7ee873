"""Settings and fixtures that every test shares.

The package under test is imported nowhere here: the jaxtyping hook must be able to act
on its first import.
"""

import os
import zlib


# The TPU's compiler is installed with the tests; its chips are not to be looked for.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402


# For the tests of sharding; other programs run on the first.
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    # `-m "slow or not slow"` runs everything.
    if not config.option.markexpr:
        config.option.markexpr = "not slow and not gpu_aot and not peers"


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_module():
    """Lets go of a module's programs when its tests are done: each takes a few mappings of
    memory, of which a process may have some 65,000, and compiling aborts without one."""
    yield
    jax.clear_caches()


@pytest.fixture
def fresh_traces():
    """For a test that changes what is traced: no trace from before it is used in it, and
    none of it after."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture
def getkey(request):
    """A function that gives a new random key at each call, the same in every run."""
    key = jax.random.key(zlib.crc32(request.node.nodeid.encode()))

    def _getkey():
        nonlocal key
        key, out = jax.random.split(key)
        return out

    return _getkey


@pytest.fixture
def no_type_hook():
    """Switches the jaxtyping hook off, so that a static misuse meets the library's own
    check, as it does outside the tests."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)

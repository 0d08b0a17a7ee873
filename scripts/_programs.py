"""Compiled programs, kept for later processes."""

import os
import pathlib

import jax


# Shorter ones are compiled again in less time than it takes to find them.
MIN_COMPILE_SECONDS = 0.2


def keep_programs() -> None:
    """Lets this process find the programs that earlier ones compiled, in
    `~/.cache/eqx_paged/programs`, unless JAX has been told where to keep them."""
    if jax.config.jax_compilation_cache_dir is None:
        root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        folder = pathlib.Path(root) / "eqx_paged" / "programs"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)

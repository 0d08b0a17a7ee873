"""Mosaic GPU kernels without a GPU: interpreted, which needs jax 0.11, and lowered.

The interpreter runs each warpgroup in a thread of XLA's, of which there must be as many:
with the four CPU devices of `conftest.py` there are.
"""

import re

import jax
import pytest

from .triton import lower


needs_interpreter = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="needs jax 0.11: the interpreter of Mosaic GPU"
)


def mosaic_config(**options):
    import eqx_paged

    return eqx_paged.MosaicGPUConfig(**options)


def how(**options):
    return dict(interpret=True, config=mosaic_config(**options))


def kernels_in(function, *args):
    """The names of the Mosaic GPU kernels in a lowered program."""
    lowered = lower(function, *args)
    return re.findall(r"@(mosaic_gpu_v2|mosaic_gpu)\b", lowered)

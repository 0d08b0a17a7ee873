"""The generations of TPU that the kernels are compiled for, one core of each."""

from typing import NamedTuple


class Chip(NamedTuple):
    """What a count of cycles is set against.

    `hbm_gb_per_s` is the peak that Google Cloud's pages on each TPU state, shared evenly
    by the cores of a chip (two on v4, v5p and 7x).

    `clock_ghz` is stated only for v4 (arXiv 2304.01433). That of the others is inferred:
    the stated bfloat16 peak divided by what the matrix units do in a cycle. On v5e and v5p
    they are four of 128 x 128 a core. On v6e four of 256 x 256 are assumed, since the pages
    name two or four, and on 7x as many, which nothing public confirms.
    """

    topology: str  # as libtpu names the smallest that can be compiled for
    hbm_gb_per_s: float
    clock_ghz: float
    num_cores: int = 1  # that one program runs on

    def floor_cycles(self, num_bytes: int) -> float:
        """Cycles in which the memory moves so many bytes at its peak."""
        return num_bytes * self.clock_ghz / self.hbm_gb_per_s


CHIPS = {
    "v4": Chip("v4:2x2x1", hbm_gb_per_s=1228 / 2, clock_ghz=1.05, num_cores=2),
    "v5e": Chip("v5e:2x2", hbm_gb_per_s=819, clock_ghz=1.5),
    "v5p": Chip("v5p:2x2x1", hbm_gb_per_s=2765 / 2, clock_ghz=1.75, num_cores=2),
    "v6e": Chip("v6e:2x2", hbm_gb_per_s=1640, clock_ghz=1.75),
    "7x": Chip("tpu7x:2x2x1", hbm_gb_per_s=7380 / 2, clock_ghz=2.2),
}

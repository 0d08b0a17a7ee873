"""The GPUs that the kernels are compiled for, where there is none."""

from typing import NamedTuple


class Target(NamedTuple):
    """What XLA's compiler asks about a GPU.

    The figures are those of NVIDIA's data sheets and of the CUDA programming guide's table
    of compute capabilities.
    """

    name: str  # as the device calls itself
    architecture: str  # as ptxas calls it
    major: int  # of the compute capability, whose minor part is 0
    num_cores: int  # streaming multiprocessors
    fpus_per_core: int
    clock_ghz: float
    memory_bytes: int
    memory_bytes_per_s: int
    l2_bytes: int
    shared_bytes_per_core: int
    shared_bytes_per_block: int  # the most that a block may ask for

    def config(self) -> str:
        """XLA's `GpuTargetConfig`, as text."""
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024
              threads_per_warp: 32
              threads_per_core_limit: 2048
              shared_memory_per_block: 49152
              shared_memory_per_block_optin: {self.shared_bytes_per_block}
              shared_memory_per_core: {self.shared_bytes_per_core}
              registers_per_block_limit: 65536
              registers_per_core_limit: 65536
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              core_count: {self.num_cores}
              fpus_per_core: {self.fpus_per_core}
              clock_rate_ghz: {self.clock_ghz}
              memory_bandwidth: {self.memory_bytes_per_s}
              device_memory_size: {self.memory_bytes}
              l2_cache_size: {self.l2_bytes}
              cuda_compute_capability {{ major: {self.major} }}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
            runtime_version {{ major: 13 }}
            device_description_str: "{self.name}"
        """


TARGETS = {
    target.architecture: target
    for target in (
        Target(
            name="NVIDIA H100 80GB HBM3",
            architecture="sm_90a",
            major=9,
            num_cores=132,
            fpus_per_core=128,
            clock_ghz=1.98,
            memory_bytes=85 * 10**9,
            memory_bytes_per_s=3352 * 10**9,
            l2_bytes=50 * 2**20,
            shared_bytes_per_core=228 * 2**10,
            shared_bytes_per_block=227 * 2**10,
        ),
        Target(
            name="NVIDIA A100-SXM4-80GB",
            architecture="sm_80",
            major=8,
            num_cores=108,
            fpus_per_core=64,
            clock_ghz=1.41,
            memory_bytes=85 * 10**9,
            memory_bytes_per_s=2039 * 10**9,
            l2_bytes=40 * 2**20,
            shared_bytes_per_core=164 * 2**10,
            shared_bytes_per_block=163 * 2**10,
        ),
    )
}

"""XLA's descriptions of NVIDIA GPUs, for which its compiler otherwise asks the device.

The figures are those of XLA's own descriptions, openxla/xla,
xla/backends/gpu/target_config/specs/{a100_sxm_80,h100_sxm,h200,b200}.txtpb. Its units of bandwidth
are bytes/s, and what all of them share is in `text`.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class GpuTarget:
    """The properties by which a compiler chooses kernels: sizes in bytes."""

    device: str  # jax's `device_kind`
    capability: int  # the major number of the compute capability: 9 of sm_90
    cores: int  # streaming multiprocessors
    fpus_per_core: int
    shared_memory_per_core: int
    shared_memory_per_block: int  # at most, by opting in
    memory_bandwidth: int
    memory: int
    l2_cache: int
    clock_ghz: float

    def text(self) -> str:
        """Return a GpuTargetConfig, as a text proto, with the cuDNN of the CUDA wheels."""
        # Kernels for one architecture (sm_90a), which has instructions that the next one lacks.
        accelerated = " feature_extension: ACCELERATED_FEATURES" if self.capability >= 9 else ""
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: {self.cores} fpus_per_core: {self.fpus_per_core}
  shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_memory_per_core}
  shared_memory_per_block_optin: {self.shared_memory_per_block}
  memory_bandwidth: {self.memory_bandwidth} device_memory_size: {self.memory}
  l2_cache_size: {self.l2_cache} clock_rate_ghz: {self.clock_ghz}
  cuda_compute_capability {{ major: {self.capability}{accelerated} }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{self.device}"
"""


_H100 = GpuTarget(
    device="NVIDIA H100 80GB HBM3",
    capability=9,
    cores=132,
    fpus_per_core=128,
    shared_memory_per_core=233472,
    shared_memory_per_block=232448,
    memory_bandwidth=3352320000000,
    memory=84942979072,
    l2_cache=52428800,
    clock_ghz=1.98,
)
GPU_TARGETS = {  # by the name of the chip
    "a100-80gb": GpuTarget(
        device="NVIDIA A100-SXM4-80GB",
        capability=8,
        cores=108,
        fpus_per_core=64,
        shared_memory_per_core=167936,
        shared_memory_per_block=166912,
        memory_bandwidth=2039040000000,
        memory=85100068864,
        l2_cache=41943040,
        clock_ghz=1.41,
    ),
    "h100": _H100,
    "h200": dataclasses.replace(
        _H100,
        device="NVIDIA H200 141GB HBM3e",
        memory_bandwidth=4800000000000,
        memory=151397597184,
    ),
    "b200": dataclasses.replace(
        _H100,
        device="NVIDIA B200",
        capability=10,
        cores=148,
        memory_bandwidth=7672320000000,
        memory=191514411008,
        l2_cache=132644864,
        clock_ghz=1.965,
    ),
}

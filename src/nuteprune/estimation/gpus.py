"""GPUs by name, and whether and how fast a run would go on one; computed, never measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nuteprune.balance import TRIES
from nuteprune.config import PruneConfig
from nuteprune.errors import ConfigError
from nuteprune.estimation.costs import StepCost, Work
from nuteprune.recipes import DERIVATIVES

PRODUCTS = 0.6  # share of the peak of matrix products that a run is taken to reach
BANDWIDTH = 0.8  # share of the memory bandwidth
LAUNCH = 8e-6  # seconds that Python and the driver take for an operation
CONTEXT = 0.6e9  # bytes of the CUDA context and its libraries
SLACK = 1.05  # what the allocator holds over what is used
TIGHT = 0.95  # share of the memory above which a run that fits may still fail


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: as given to --gpu.
        memory: bytes that programs can use: the number on the box times 1e9, but for cards whose error correction takes some.
        tflops: dense bfloat16 matrix products with float32 sums, 1e12 operations a second.
        bandwidth: of its memory, bytes a second.
    """

    name: str
    memory: float
    tflops: float
    bandwidth: float


# NVIDIA's data sheets and architecture papers. Where a sheet gives figures with sparsity, half of them is the dense one.
# Data-centre cards are the SXM versions where there are several. T4 and older are absent: they have no bfloat16.
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40gb", 40e9, 312.0, 1.555e12),
        Gpu("a100-80gb", 80e9, 312.0, 2.039e12),
        Gpu("h100-80gb", 80e9, 989.0, 3.35e12),
        Gpu("h200-141gb", 141e9, 989.0, 4.8e12),
        Gpu("l4-24gb", 23.6e9, 121.0, 0.3e12),
        Gpu("l40s-48gb", 47.7e9, 362.0, 0.864e12),
        Gpu("rtx3090-24gb", 24e9, 71.0, 0.936e12),
        Gpu("rtx4090-24gb", 24e9, 165.0, 1.008e12),
        Gpu("rtx5090-32gb", 32e9, 209.5, 1.792e12),
    )
}


def find_gpus(names: tuple[str, ...]) -> list[Gpu]:
    """GPUs by name, comma separated or one by one; `all` is every one.

    Raises:
        ConfigError: a name that is not known.
    """
    found: list[Gpu] = []
    for name in (part.strip().lower() for given in names for part in given.split(",")):
        if name != "all" and name not in GPUS:
            raise ConfigError(f"--gpu got {name!r}; allowed are {', '.join(GPUS)}, and all.")
        found += [gpu for gpu in (GPUS.values() if name == "all" else [GPUS[name]]) if gpu not in found]
    return found


@dataclass(frozen=True)
class GpuEstimate:
    """What a run would take on a GPU.

    Attributes:
        gpu: which.
        peak: GPU memory, bytes.
        step_seconds: of a step.
        seconds: of all steps and of importance.
    """

    gpu: Gpu
    peak: float
    step_seconds: float
    seconds: float

    @property
    def fits(self) -> str:
        """yes, tight or no."""
        share = self.peak / self.gpu.memory
        return "no" if share > 1 else "tight" if share > TIGHT else "yes"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "gpu": self.gpu.name,
            "fits": self.fits,
            "peak_bytes": round(self.peak),
            "memory_bytes": round(self.gpu.memory),
            "step_seconds": self.step_seconds,
            "seconds": self.seconds,
        }


def on_gpu(gpu: Gpu, cost: StepCost, config: PruneConfig) -> GpuEstimate:
    """A run on a GPU.

    A step takes the sum over its operations of arithmetic or memory traffic, whichever is longer, or the time to launch
    them all if that is more.
    """
    step = seconds(gpu, cost.work)
    forward = cost.student + cost.heads
    measured = forward + cost.backward if config.gate_init in DERIVATIVES else cost.student

    def each(work: Work) -> float:  # a sequence alone
        return max(seconds(gpu, work, launch=0.0) / config.batch_size, LAUNCH * len(work.operations))

    importance = config.passes * (config.calibration * each(measured) + TRIES * config.balance_sequences * each(forward))
    return GpuEstimate(gpu, cost.peak * SLACK + CONTEXT, step, importance + config.total_steps * step)


def seconds(gpu: Gpu, work: Work, launch: float = LAUNCH) -> float:
    """Time of some work on a GPU."""
    arithmetic, traffic = gpu.tflops * 1e12 * PRODUCTS, gpu.bandwidth * BANDWIDTH
    busy = sum(max(flops / arithmetic, moved / traffic) for flops, moved in work.operations)
    return max(busy, launch * len(work.operations))


def assumptions() -> str:
    """What the computed figures rest on, in a sentence."""
    return (
        f"assumed: {100 * PRODUCTS:.0f} % of the peak of bfloat16 products, {100 * BANDWIDTH:.0f} % of the bandwidth, "
        f"{LAUNCH * 1e6:.0f} us an operation, {CONTEXT / 1e9:.1f} GB of CUDA context, {100 * (SLACK - 1):.0f} % held by the "
        "allocator; all steps at full width and none as a CUDA graph (those of recovery are cheaper); gates, the cuts of "
        "--gate-init taylor-path, optimisers, "
        "hidden-state terms, snapshots, "
        "checkpoints, loading, repair, reading the codes of --load-in, export and evaluation are not in the time, sampling "
        "for --data self neither in the time nor in the memory"
    )

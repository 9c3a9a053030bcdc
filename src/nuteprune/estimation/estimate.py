"""What a run will take, before it: size of the result, memory and time on this machine, and on GPUs by name.

Sizes follow from the configuration. Memory and time of this machine are measured in a rehearsal of the job
(`rehearsal`); those of named GPUs are computed (`costs`, `gpus`).
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from nuteprune.arch import Arch
from nuteprune.config import PruneConfig
from nuteprune.errors import ConfigError, ExportError, MeasurementError, TrainingError
from nuteprune.estimation.costs import StepCost, repair_peak, step_cost
from nuteprune.estimation.gpus import Gpu, GpuEstimate, assumptions, find_gpus, on_gpu
from nuteprune.estimation.rehearsal import RunTime, miniature, rehearse, run_time
from nuteprune.export.hf import compact_shapes
from nuteprune.job import check_model, pick_save_dtype
from nuteprune.measuring import in_fresh_process
from nuteprune.models import Source, describe, pick_device, pick_dtype
from nuteprune.plan import make_discretiser
from nuteprune.progress import Reporter, duration
from nuteprune.size import BlockSize

NOT_COUNTED = "reading and tokenising text, and sampling it for --data self"
LAGRANGIAN = (
    "with --control lagrangian sparsity lags behind its target by an amount that cannot be known, so the shares of the phases "
    "are those of a run that follows it"
)
HEADER = 200  # bytes a tensor in the head of a safetensors file, at most

Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class Size:
    """Parameters before and after, and the size of the file.

    Which units go decides the exact number; the size taken is the nearest that is not above the one asked, so what is
    said of after is the most that there can be.

    Attributes:
        blocks_before, blocks_after: parameters of the decoder blocks.
        total_before, total_after: all parameters.
        file_bytes: weights in the precision of the export.
        dtype: that precision.
    """

    blocks_before: int
    blocks_after: int
    total_before: int
    total_after: int
    file_bytes: int
    dtype: str

    @classmethod
    def of(cls, config: PruneConfig, dense: PretrainedConfig, arch: Arch) -> Size:
        """The sizes of a run."""
        full = BlockSize.of(arch).full
        after = int(full * (1 - config.sparsity) * (1 + 1e-12))  # as Discretiser rounds it
        dtype = pick_save_dtype(config.save_dtype, dense)
        total = arch.total - full + after
        tensors = arch.dims.layers * len(arch.parameters) + 3
        discretiser = make_discretiser(config, arch)
        if discretiser.shape is not None:  # every width is known
            shapes = compact_shapes(arch, discretiser.allowed.uniform_counts(discretiser.shape.units))
            total, tensors = sum(map(math.prod, shapes.values())), len(shapes)
        return cls(full, after, arch.total, total, total * dtype.itemsize + HEADER * tensors, str(dtype).removeprefix("torch."))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "blocks": {"before": self.blocks_before, "after_at_most": self.blocks_after},
            "model": {"before": self.total_before, "after_at_most": self.total_after},
            "file_bytes_at_most": self.file_bytes,
            "save_dtype": self.dtype,
        }


@dataclass(frozen=True)
class Measured:
    """Memory and time on this machine.

    Attributes:
        device: where the rehearsal ran.
        steps: its steps.
        peak: resident memory of the process, bytes.
        device_allocated, device_reserved: GPU memory used, and held by torch's allocator, bytes; None on a CPU.
        time: of the run.
        seconds: that the rehearsal itself took.
    """

    device: str
    steps: int
    peak: int
    device_allocated: int | None
    device_reserved: int | None
    time: RunTime
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        t = self.time
        return {
            "device": self.device,
            "rehearsed_steps": self.steps,
            "rehearsal_seconds": self.seconds,
            "peak_bytes": self.peak,
            "device_allocated_bytes": self.device_allocated,
            "device_reserved_bytes": self.device_reserved,
            "seconds": {
                "start": t.start,
                "importance": t.importance,
                "training": t.training,
                "between_steps": t.between,
                "end": t.end,
                "total": t.total,
            },
            "steps": [
                {"phase": p.phase, "teacher": p.teacher, "steps": count, "step_seconds": seconds}
                for p, (count, seconds) in t.steps.items()
            ],
            "not_counted": NOT_COUNTED,
        }


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        config: its options.
        size: parameters and file, from the configuration.
        measured: memory and time on this machine; None if nothing was measured.
        cost: memory and work of a step on a GPU, computed; None if no GPU was asked for.
        gpus: the run on each GPU asked for, computed.
    """

    config: PruneConfig
    size: Size
    measured: Measured | None
    cost: StepCost | None
    gpus: tuple[GpuEstimate, ...]

    def lines(self) -> list[str]:
        """The figures in words, one line each, without the tables."""
        s, c = self.size, self.config
        total = f"{c.total_steps:,} steps of {c.batch_size} x {c.seq_len} tokens"
        file = f"{s.file_bytes / 1e6:.1f} MB in {s.dtype}"
        lines = [
            f"{c.model}, {100 * c.sparsity:g} % of the blocks, {total}",
            f"blocks (computed): {s.blocks_before:,} -> at most {s.blocks_after:,} parameters",
            f"all (computed): {s.total_before:,} -> at most {s.total_after:,} parameters, {file}",
        ]
        if (m := self.measured) is not None:
            where = f"on {m.device}, measured in a rehearsal of {m.steps} steps"
            lines.append(f"peak memory of the process ({where}): {m.peak / 1e6:,.0f} MB; not in it: {NOT_COUNTED}")
            if m.device_allocated is not None and m.device_reserved is not None:
                used, held = m.device_allocated / 1e6, m.device_reserved / 1e6
                lines.append(f"peak GPU memory ({where}): {used:,.0f} MB used, {held:,.0f} MB held by the allocator")
            lines.append(f"time ({where}): {duration(m.time.total)}; not in it: {NOT_COUNTED}")
            if c.control == "lagrangian":
                lines.append(LAGRANGIAN)
        return lines

    def tables(self) -> list[tuple[str, tuple[str, ...], Rows]]:
        """Title, columns and rows of each table."""
        tables: list[tuple[str, tuple[str, ...], Rows]] = []
        if self.measured is not None:
            t = self.measured.time
            rows: Rows = [("start, reading the weights", "", "", duration(t.start))]
            rows.append(("importance, first checkpoint", "", "", duration(t.importance)))
            rows += [
                (f"{point}", f"{count:,}", f"{each:.3f}", duration(count * each)) for point, (count, each) in t.steps.items()
            ]
            rows.append(("snapshots, checkpoints, first steps", "", "", duration(t.between)))
            rows.append(("comparison, export, evaluation", "", "", duration(t.end)))
            tables.append(("time on this machine (measured)", ("part", "steps", "s a step", "time"), rows))
        if self.cost is not None:
            rows = [
                (
                    g.gpu.name,
                    g.fits,
                    f"{g.peak / 1e9:.1f} of {g.gpu.memory / 1e9:.0f} GB",
                    f"{g.step_seconds:.3f}",
                    f"{g.seconds / 3600:.2f}",
                )
                for g in self.gpus
            ]
            tables.append(("on GPUs (computed, not measured)", ("GPU", "fits", "peak memory", "s a step", "hours"), rows))
        return tables

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        cost = None
        if (c := self.cost) is not None:
            cost = {
                "weights_bytes": c.weights,
                "lora_parameters": c.lora,
                "kept_activation_bytes": c.kept,
                "logit_chunk_bytes": c.head,
                "peak_bytes": c.peak,
                "step_flops": c.work.flops,
                "step_bytes_moved": c.work.bytes,
                "assumptions": assumptions(),
            }
        return {
            "model": self.config.model,
            "config": self.config.to_dict(),
            "steps": self.config.total_steps,
            "size": self.size.to_dict(),
            "measured": self.measured.to_dict() if self.measured else None,
            "computed": {"step": cost, "gpus": [g.to_dict() for g in self.gpus]} if cost else None,
        }


def estimate(config: PruneConfig, gpus: Sequence[str] = (), measure: bool = True, reporter: Reporter | None = None) -> Estimate:
    """Says what a run will take, before it.

    Args:
        config: the run's options; `data` and `out` are not used.
        gpus: names of GPUs to compute memory and time for (`gpus.GPUS`), or "all".
        measure: rehearse the run on this machine; without it no weights are read.
        reporter: shows progress; a console on stderr by default.

    Raises:
        ConfigError: bad input, or a model without weights that should be measured; found before any long work.
        ArchitectureError: the family is not supported.
        MeasurementError: the rehearsal ran out of memory.
    """
    reporter = reporter or Reporter()
    wanted: list[Gpu] = find_gpus(tuple(gpus))
    if wanted and config.dtype == "float32":
        raise ConfigError("--gpu computes runs in bfloat16, but --dtype got 'float32'; leave --dtype at auto or give bfloat16.")
    source = Source.find(config.model)
    config, dense, arch = check_model(config, source)
    size = Size.of(config, dense, arch)
    if measure:
        check_weights(source)
        source.tokenizer(arch.dims.vocab)
    device = pick_device(config.device) if measure else None
    cost = None
    if wanted:
        cost = step_cost(config, dense, arch, torch.bfloat16)
    on_gpus = tuple(on_gpu(gpu, cost, config) for gpu in wanted) if cost is not None else ()
    measured = measure_run(config, str(device), reporter) if measure else None
    return Estimate(config, size, measured, cost, on_gpus)


def check_weights(source: Source) -> None:
    """Refuses a local model that has no weights to measure.

    Raises:
        ConfigError: it has none.
    """
    folder = Path(source.where)
    if source.gguf_file or not folder.is_dir():
        return
    if not any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir()):
        raise ConfigError(f"model {source.name}: the folder has no weights to measure with; give --no-measure and --gpu NAME.")


def measure_run(config: PruneConfig, device: str, reporter: Reporter) -> Measured:
    """Rehearses a run in a fresh process and a temporary folder.

    Raises:
        NutePruneError: as `prune` does.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="nuteprune-estimate-", ignore_cleanup_errors=True) as folder:
        mini = miniature(config, os.path.join(folder, "run"))
        reporter.say(f"rehearsing the run on {device}: {mini.total_steps} of its {config.total_steps} steps")
        with reporter.counter("rehearsal") as progress:
            advice = "lower --batch-size or --seq-len, or give --gradient-checkpointing"
            try:
                rehearsed, peak = in_fresh_process(rehearse, mini, progress=progress, advice=advice)
            except (TrainingError, ExportError) as error:  # what they advise is for a run that is there to go on with
                cause = str(error).partition("; ")[0].partition(". ")[0].rstrip(".")
                raise MeasurementError(f"the rehearsal failed: {cause}; if memory is full, {advice}.") from error
    seconds = time.perf_counter() - began
    when = run_time(config, rehearsed, max(seconds - rehearsed.ended, 0.0))
    held = repair_holds(config)  # the rehearsal's repair read next to nothing
    on_gpu = rehearsed.device_allocated is not None
    if rehearsed.before_repair is not None and not on_gpu:
        peak = max(peak, rehearsed.before_repair + held)
    allocated, reserved = rehearsed.device_allocated, rehearsed.device_reserved
    if allocated is not None and reserved is not None and rehearsed.device_before_repair is not None:
        more = max(0, rehearsed.device_before_repair + held - allocated)
        allocated, reserved = allocated + more, reserved + more
    return Measured(device, mini.total_steps, peak, allocated, reserved, when, seconds)


def repair_holds(config: PruneConfig) -> int:
    """Bytes that the repair of a run on this machine holds at most beside the model; 0 without one."""
    _, arch = describe(Source.find(config.model))
    return repair_peak(config, arch.dims, pick_dtype(config.dtype, pick_device(config.device)))

"""All of a run's state, into a checkpoint and back."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from nuteprune.checkpoint import (
    checkpoint_path,
    load_optimizer,
    optimizer_tensors,
    pick_checkpoint,
    read_checkpoint,
    remove_later,
    save_checkpoint,
    step_of,
    within,
)  # fmt: skip
from nuteprune.masks import Masks
from nuteprune.report.facts import ENVIRONMENT
from nuteprune.teachers import REPAIRED

if TYPE_CHECKING:
    from nuteprune.trainer import Trainer


@dataclass
class TrainState:
    """Where a run stands; with the tensors of a checkpoint, all of its state.

    Attributes:
        step: steps done, the number of the next one.
        records: snapshots in the teacher bank.
        reached: first step at the target sparsity, or None.
        walk_from: records in the bank when the target was reached.
        tokens: tokens trained on.
        skipped: steps left out because loss or gradients were not finite.
        skipped_in_a_row: how many of them came right before the next step.
        norms: norms of the LoRA gradient of the last steps, newest last (`stability`).
        jumps: steps whose norm stood far above them.
        seconds: time spent in steps, without what happens between them (importance, freezing, repair).
        head_bias: standard deviations by which heads were favoured when gates started by importance (`balance`); None
            where importance has no such balance.
        recovery_losses: when the masks became hard, by the share of the repair taken (`recovery_start`); the lowest goes on.
            Empty where nothing was compared.
    """

    step: int = 0
    records: int = 0
    reached: int | None = None
    walk_from: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    norms: list[float] = field(default_factory=list)
    jumps: int = 0
    seconds: float = 0.0
    head_bias: float | None = None
    recovery_losses: dict[str, float] = field(default_factory=dict)


def write_checkpoint(trainer: Trainer) -> Path:
    """Writes the state of a run, in its main process; LoRA weights in their whole shape, zero where the masks took a unit away.

    Returns:
        The checkpoint's folder.

    Raises:
        TrainingError: a weight is not finite; nothing is written.
    """
    masked, gates, state, bank = trainer.masked, trainer.gates, trainer.state, trainer.bank
    if not all(bool(p.isfinite().all()) for p in (*masked.lora.values(), *gates.parameters())):
        raise trainer.not_finite(f"value of a weight after step {state.step - 1}")
    widths = masked.widths
    tensors = {f"lora.{name}": masked.spread_lora(name, p.data, widths) for name, p in masked.lora.items()}
    for key, value in optimizer_tensors(trainer.lora_optimizer, "lora_optimizer").items():
        name = trainer.lora_names[int(key.split(".")[1])]
        tensors[key] = masked.spread_lora(name, value, widths) if value.dim() > 0 else value
    tensors |= {f"gates.{k}": p for k, p in gates.log_alpha.items()}
    tensors |= optimizer_tensors(trainer.gate_optimizer, "gate_optimizer")
    tensors |= {f"control.{k}": t for k, t in trainer.control.state().items()}
    tensors |= {"generator.state": trainer.generator.get_state()}
    if trainer.masks is not None:
        tensors |= {f"masks.{k}": t for k, t in trainer.masks.tensors().items()}
    needs = [trainer.blocks.path, *(bank.path(record) for record in range(1, len(bank) + 1))]
    if trainer.masks is not None and trainer.config.repair:
        needs.append(trainer.folder / REPAIRED)
    if (environment := trainer.folder / ENVIRONMENT).is_file():  # options, precision and fingerprint of the base
        needs.append(environment)
    folder = trainer.folder / "checkpoints"
    return save_checkpoint(folder, state.step, tensors, dataclasses.asdict(state), trainer.config.keep_checkpoints, needs)


@torch.no_grad()
def load_checkpoint(trainer: Trainer) -> None:
    """Puts a run back to the newest undamaged checkpoint of its folder; all processes call it.

    What the run will make anew, later checkpoints (which are damaged) and later records, is removed.

    Raises:
        ConfigError: there is none.
    """
    folder, shared = trainer.folder / "checkpoints", trainer.processes
    found = shared.on_main(lambda: pick_checkpoint(folder, trainer.warn))
    path = checkpoint_path(folder, shared.tell(0 if found is None else step_of(found)))
    tensors, state = shared.together(lambda: read_checkpoint(path))
    trainer.state = TrainState(**state)
    trainer.masked.load_lora(within(tensors, "lora"))
    for kind, value in within(tensors, "gates").items():
        trainer.gates.log_alpha[kind].copy_(value)
    load_optimizer(trainer.lora_optimizer, tensors, "lora_optimizer")
    load_optimizer(trainer.gate_optimizer, tensors, "gate_optimizer")
    trainer.control.load(within(tensors, "control"))
    trainer.generator.set_state(tensors["generator.state"])
    trainer.bank.count = trainer.state.records
    shared.wait()  # until all have read it
    shared.on_main(lambda: _tidy(trainer, path))
    if masks := within(tensors, "masks"):
        if trainer.config.repair:
            trainer.masked.repair(load_file(trainer.folder / REPAIRED))
        trainer.freeze_at(Masks.from_tensors(masks))


def _tidy(trainer: Trainer, path: Path) -> None:
    remove_later(path)
    trainer.bank.forget_later()

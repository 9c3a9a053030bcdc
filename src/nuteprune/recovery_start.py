"""Where recovery starts: under hard masks, with repaired weights where they help.

The repair (`repair`) is solved without the student's LoRA weights, which come back on top of it: it mends what the masks took
from the intact weights, as it does for a student that was never trained, and LoRA has learned the rest. Solved with LoRA in
place, it bends the student's stream, which training has led elsewhere, back to the intact model's, and undoes more than it
mends: on SmolLM2-135M at 50 % perplexity rose by 9 % where it falls by 6 % now (docs/results.md). Whether it helps is
measured, since a student that trained long enough needs no repair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from nuteprune.files import save_tensors
from nuteprune.masks import Masks
from nuteprune.repair import STAGE, repair
from nuteprune.teachers import REPAIRED

if TYPE_CHECKING:
    from nuteprune.trainer import Trainer

COMPARED = 16  # steps' batches, the next to be trained on, by which the student with and without repair are compared


def start_recovery(trainer: Trainer, masks: Masks) -> None:
    """Repairs the student's weights under hard masks, unless it is better without.

    A student that was never trained is repaired in any case. `REPAIRED` in the run folder holds the weights, none where there
    was no gain; `TrainState.recovery_losses` says what was measured. All processes call it.

    Args:
        trainer: at its whole widths, masks not fixed yet; its config asks for a repair.
        masks: the student's discrete masks.
    """
    file = trainer.folder / REPAIRED
    trainer.processes.on_main(lambda: save_tensors(file, repaired(trainer, masks.to(trainer.masked.device))))
    trainer.masked.repair(load_file(file))


def repaired(trainer: Trainer, masks: Masks) -> dict[str, Tensor]:
    """The repaired weights by stock name if they are better than the intact ones, else none; the model stays as it was."""
    masked, trained = trainer.masked, trainer.masked.lora_copy()
    before = loss_ahead(trainer, masks) if trainer.state.step > 0 else None
    masked.load_lora({name: torch.zeros_like(t) if ".lora_B." in name else t for name, t in trained.items()})
    text = trainer.blocks.sample(trainer.config.repair_sequences)
    with trainer.counter(STAGE) as progress:
        weights = repair(masked, masks, text, trainer.config.repair_damping, progress)
    masked.load_lora(trained)
    if before is not None:
        after = loss_ahead(trainer, masks)
        trainer.state.recovery_losses = [before, after]
        if not after < before:
            weights = {}
    masked.forget_repair()
    return weights


@torch.no_grad()
def loss_ahead(trainer: Trainer, masks: Masks) -> float:
    """Mean loss of the student under masks, taught by the intact model, in the steps that come next; none is trained on."""
    config, masked, total = trainer.config, trainer.masked, 0.0
    with masked.uncompiled():
        for step in range(trainer.state.step, trainer.state.step + COMPARED):
            batch = trainer.blocks.batch(step, config.batch_size, config.seed).to(masked.device)
            taught = None
            if config.teachers != "none":
                with masked.playing(masked.prepare(None, None)):
                    taught = masked.forward(batch)
            masked.set_masks(masks)
            total += float(trainer.head_loss(masked.forward(batch), taught, batch).total)
    return total / COMPARED

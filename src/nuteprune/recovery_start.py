"""Where recovery starts: under hard masks, with weights that are repaired as far as it helps.

The repair (`repair`) is solved without the student's LoRA weights, which come back on top of it: it mends what the masks took
from the intact weights, as it does for a student that was never trained. Solved with LoRA in place it bends the student's
stream, which training has led elsewhere, back to the intact model's, and undoes more than it mends (docs/experiments.md has the
figures). LoRA has made up for a part already, so how much of the change is taken is measured: all of it, less, or nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from nuteprune.files import save_tensors
from nuteprune.masks import Masks
from nuteprune.repair import STAGE, repair
from nuteprune.teachers import INTACT, REPAIRED

if TYPE_CHECKING:
    from nuteprune.trainer import Trainer

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the change by repair, tried under LoRA that was trained
SHARE = "how much of the repair helps"  # shown
COMPARED = 16  # steps' batches, the next to be trained on, that they are compared on; at most an eighth of the steps


def start_recovery(trainer: Trainer, masks: Masks) -> None:
    """Repairs the student's weights under hard masks, as far as it helps.

    A student that was never trained is repaired in full. `REPAIRED` in the run folder holds the weights, none where there was
    no gain; `TrainState.recovery_losses` says what was measured. All processes call it.

    Args:
        trainer: at its whole widths, masks not fixed yet; its config asks for a repair.
        masks: the student's discrete masks.
    """
    file = trainer.folder / REPAIRED

    def write() -> dict[str, Tensor]:
        weights = repaired(trainer, masks.to(trainer.masked.device))
        save_tensors(file, weights)
        return weights

    weights = trainer.processes.on_main(write)
    trainer.masked.repair(load_file(file) if weights is None else weights)


def repaired(trainer: Trainer, masks: Masks) -> dict[str, Tensor]:
    """The weights by stock name that are best to go on with, none if they are the intact ones; the model stays as it was."""
    masked, trained = trainer.masked, trainer.masked.lora_copy()
    masked.load_lora({name: torch.zeros_like(t) if ".lora_B." in name else t for name, t in trained.items()})
    text = trainer.blocks.sample(trainer.config.repair_sequences)
    with trainer.counter(STAGE) as progress:
        solved = repair(masked, masks, text, trainer.config.repair_damping, progress)
    masked.load_lora(trained)
    masked.forget_repair()
    return solved if trainer.state.step == 0 else best_share(trainer, masks, solved)


def best_share(trainer: Trainer, masks: Masks, solved: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of `SHARES` of the way from the intact to the solved weights, those with the lowest loss; none for nothing of it.

    The loss is what the options make of logits, without hidden states; the KL where they weigh nothing of logits.
    """
    masked, config = trainer.masked, trainer.config
    weighed = config.kl_weight or config.lm_weight or config.teachers == "none"  # else hidden states alone teach
    tried: dict[float, float] = {}
    with masked.uncompiled(), trainer.counter(SHARE) as progress, torch.no_grad():
        ahead = list(_ahead(trainer))
        for share in SHARES:
            masked.repair(solved, share)
            masked.set_masks(masks)
            losses = [trainer.head_loss(masked.forward(batch), taught, batch) for batch, taught in ahead]
            tried[share] = sum(float(loss.total if weighed else loss.kl) for loss in losses) / len(losses)
            progress(len(tried), len(SHARES))
    trainer.state.recovery_losses = {f"{share:g}": loss for share, loss in tried.items()}
    best = min(tried, key=lambda share: tried[share])
    masked.repair(solved, best)
    taken = masked.repaired_weights() if best else {}
    masked.forget_repair()
    return taken


def compared(steps: int) -> int:
    """Batches that shares of the repair are compared on in a run of this many steps."""
    return min(COMPARED, max(1, steps // 8))


def _ahead(trainer: Trainer) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The batches that come next and, where there are teachers, the intact model's hidden states on them."""
    config, first = trainer.config, trainer.state.step
    for step in range(first, first + compared(trainer.total)):
        batch = trainer.blocks.batch(step, config.batch_size, config.seed).to(trainer.masked.device)
        yield batch, None if config.teachers == "none" else trainer.teach(INTACT, batch, None)

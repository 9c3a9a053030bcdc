"""Where gates start: at the importance of their units, cut to the asked sparsity in the balance that text predicts best."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nuteprune.balance import favoured, measured_bias
from nuteprune.importance import Cut, unit_scores
from nuteprune.size import Unit

if TYPE_CHECKING:
    from nuteprune.trainer import Trainer

OUTLIER = 5.0  # standard deviations of importance above which gates start alike
PATH_BIAS = 0.75  # of cuts on the way, whose balance is not known yet; most of those measured are 0.5 to 1
IMPORTANCE, BALANCE = "importance of units", "balance of heads and channels"  # shown


def start_gates(trainer: Trainer) -> None:
    """Gives a trainer's gates their start by importance."""
    config, text = trainer.config, trainer.blocks.sample(trainer.config.calibration)
    kept: Unit | None = None
    for number in range(1, config.passes + 1):  # each on what the one before it left
        sparsity = config.sparsity * number / config.passes
        with trainer.counter(IMPORTANCE) as progress:
            scores = unit_scores(
                config.gate_init, trainer.masked, trainer.gates, text, progress, kept, partly(trainer), config.seed
            )
        if config.balanced:
            trainer.state.head_bias = head_bias(trainer, scores, sparsity)
            scores = favoured(scores, trainer.state.head_bias)
        if not config.one_shot:  # an outlier, as flap has, would start beyond what training can move
            scores = {kind: score.clamp(max=OUTLIER) for kind, score in scores.items()}
        trainer.gates.start_from(scores)
        if number < config.passes:
            kept = trainer.gates.units(trainer.hard_masks(scores, sparsity))


def partly(trainer: Trainer) -> Cut:
    """The units that scores leave of a share of the asked sparsity, favoured as asked or by `PATH_BIAS`."""
    config = trainer.config
    bias = PATH_BIAS if config.head_bias is None else config.head_bias  # nothing to kinds that need no balance

    def cut(scores: Unit, share: float) -> Unit:
        return trainer.gates.units(trainer.hard_masks(favoured(scores, bias), config.sparsity * share))

    return cut


def head_bias(trainer: Trainer, scores: Unit, sparsity: float) -> float:
    """How much heads and whole blocks are favoured in a cut to a sparsity: as asked, or measured."""
    config = trainer.config
    if config.head_bias is not None:
        return config.head_bias
    text = trainer.blocks.sample(config.balance_sequences, beside=config.calibration)  # importance is too sure of its own
    with trainer.counter(BALANCE) as progress:
        return measured_bias(trainer.masked, scores, lambda tried: trainer.hard_masks(tried, sparsity), text, progress)

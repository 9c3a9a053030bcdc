"""Sets of defaults: recipes, and what a target shape or a one-shot method decides."""

from __future__ import annotations

from typing import Any

DERIVATIVES = ("taylor-path", "taylor")  # criteria that a backward pass measures
CRITERIA = (*DERIVATIVES, "magnitude", "wanda", "flap")  # of importance (`importance.py`)
PASSED = ("taylor", "wanda", "flap")  # those that say something else of a model that is cut, and do not look there anyway
CHANNELS = ("intermediate", "hidden")  # the kinds that heads and whole blocks are weighed against (`balance.py`)
SHAPE_DECIDES = ("sparsity", "prune", "uniform")  # options that a target shape decides
METHOD_DECIDES = (  # options of learned gates and their teachers, which a one-shot method has not
    "warmup", "recovery", "gates", "gate_lr", "gate_moment", "gate_width", "control", "control_lr", "teacher_lag",
    "snapshot_every", "ramp_shape", "walk_back",
)  # fmt: skip

RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    # Values of the original's cotrain script and argument defaults (github.com/Lucius-lsr/NutePrune); see docs/design.md.
    "paper": {
        "teachers": "numerous",
        "teacher_lag": 10,
        "walk_back": True,
        "ramp_shape": "linear",
        "repair": False,
        "lora_plus": 1.0,
        "jump_limit": 0.0,
        "gates": "hard-concrete",
        "gate_init": "open",
        "gate_lr": 0.1,
        "gate_moment": "own",
        "control": "lagrangian",
        "prune": ("heads", "intermediate", "hidden"),
        "lora_rank": 8,
        "lora_alpha": 8.0,
        "lora_targets": ("q_proj", "v_proj"),
        "lr": 1e-3,
        "lr_schedule": "linear",
        "warmup": 1 / 7,
        "recovery": 0.1,
        "kl_weight": 0.1,
        "lm_weight": 0.0,
        "temperature": 2 / 3,
        "hidden_loss": "plain",
        "hidden_weight": 0.9,
    },
}

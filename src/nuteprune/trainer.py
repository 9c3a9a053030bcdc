"""The one training loop of NutePrune, from top to bottom.

A step: the teacher of the moment runs first and without gradients; then the student with its present masks; the loss
moves LoRA weights and gates; the controller holds the expected size on its schedule. Each per cent of sparsity leaves a
teacher. When the gates' time is over the masks are made discrete at exactly the asked size and LoRA goes on alone.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function
from transformers import PreTrainedModel

from nuteprune.arch import Arch
from nuteprune.arrangement import Arrangement
from nuteprune.config import PruneConfig
from nuteprune.control import Controller, LagrangianControl, ProjectionControl, schedule
from nuteprune.data import Blocks
from nuteprune.errors import TrainingError
from nuteprune.gate_optimizer import gate_optimizer, gate_rate
from nuteprune.gate_start import start_gates
from nuteprune.gates import GateSet, gate_of
from nuteprune.graphed import Recorder
from nuteprune.learning_rate import lr_factor
from nuteprune.losses import HeadLoss, HiddenLoss, head_loss
from nuteprune.masking import MaskedModel
from nuteprune.masks import Masks, mask_shapes
from nuteprune.plan import last_record, make_discretiser
from nuteprune.processes import Processes
from nuteprune.recovery_start import start_recovery
from nuteprune.roles import LoraOptions, Role
from nuteprune.size import BlockSize, Unit
from nuteprune.stability import JUMP, MANY, jump
from nuteprune.state import TrainState, load_checkpoint, write_checkpoint
from nuteprune.teachers import INTACT, Snapshot, TeacherBank, TeacherPolicy, teacher_name

REACHED = 0.005  # the original's sparsity_epsilon: how near counts as at the target
FIRST_CHECKPOINT = "first checkpoint"  # shown
FORCED = 0.02  # sparsity still missing when masks freeze that deserves a warning

Metrics = dict[str, Any]
Log = Callable[[Metrics], None]
Progress = Callable[[int, int], None]


class Trainer:
    """A run in memory.

    Args:
        config: the options.
        model: the intact model; it gets LoRA and hooks in place, no copy is made.
        arch: its description.
        blocks: training text.
        folder: run folder; `checkpoints/` and `teachers/` are written there.
        warn: called with what the user should know.
        counter: shows the progress of what takes long between steps: a context that gives a function of done and total.
        processes: those that share the run. All call the same methods at the same time; the main one writes.
        fast: False takes peft's own layers and full widths throughout: the same run, slower, for comparison.
    """

    def __init__(
        self,
        config: PruneConfig,
        model: PreTrainedModel,
        arch: Arch,
        blocks: Blocks,
        folder: Path,
        warn: Callable[[str], None] = warnings.warn,
        fast: bool = True,
        counter: Callable[[str], AbstractContextManager[Progress]] = lambda what: nullcontext(lambda done, total: None),
        processes: Processes = Processes(),  # noqa: B008  # frozen
    ) -> None:
        self.config, self.blocks, self.folder, self.warn, self.fast, self.counter = config, blocks, folder, warn, fast, counter
        self.processes = processes
        self.total, self.freeze_step, self.ramp = config.total_steps, config.freeze_step, config.ramp_steps

        self.lora_options = LoraOptions(config.lora_rank, config.alpha, config.lora_targets, config.seed)
        self.masked = MaskedModel(model, arch, config.prune, self.lora_options, fused=fast)
        if processes.sharded:
            self.masked.shard(processes.device or torch.device("cpu"))
        if config.gradient_checkpointing:
            self.masked.enable_checkpointing()
        if config.compile:
            self.masked.compile()
        self.size = BlockSize.of(arch)
        self.discretiser = make_discretiser(config, arch)

        self.generator = torch.Generator().manual_seed(config.seed)  # gate noise, on the CPU for every device
        self.gates = GateSet(arch, config.prune, gate_of(config), self.generator, config.head_unit).to(self.masked.device)
        self.control: Controller = (
            LagrangianControl(config.control_lr, self.masked.device)
            if config.control == "lagrangian"
            else ProjectionControl(self.size)
        )
        self.lora_names = sorted(self.masked.lora, key=lambda name: ".lora_B." in name)  # in the optimiser's order
        self.lora_optimizer = torch.optim.AdamW(
            [
                {"params": [self.masked.lora[n] for n in self.lora_names if (".lora_B." in n) == b], "ratio": ratio}
                for b, ratio in ((False, 1.0), (True, config.lora_plus))
            ],
            lr=config.lr,
            weight_decay=config.weight_decay,
        )
        self.gate_optimizer = gate_optimizer(config.gate_moment, self.gates.parameters(), gate_rate(config))

        self.policy = TeacherPolicy(config.teachers, config.teacher_lag, self.total, config.walk_back)
        self.bank = TeacherBank(folder / "teachers")
        self.teacher: tuple[int, Role] | None = None  # the record that teaches now, ready to be played
        self.masks: Masks | None = None  # discrete masks, once frozen
        self.recorder = Recorder(self.recordable, self.masked.lora, warn)
        self.state = TrainState()
        self.part: Callable[[str], AbstractContextManager[Any]] = record_function  # names the parts of a step for profilers

    # -- the loop -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """What happens before step 0: gates start from importance, if asked, and a checkpoint is written."""
        if self.policy.keeps_records and self.last_record <= self.config.teacher_lag:
            self.warn(
                f"--teacher-lag {self.config.teacher_lag} is not below the {self.last_record} records that a sparsity of "
                f"{self.config.sparsity:g} leaves, so only the intact model will teach; lower it for numerous teachers"
            )
        if self.config.gate_init != "open":
            if self.processes.sharded:  # a forward pass needs all of them
                start_gates(self)
            else:
                self.processes.on_main(lambda: start_gates(self))
            self.processes.spread(self.gates.parameters())
        with self.counter(FIRST_CHECKPOINT):
            self.save()

    def run(self, log: Log, stop: Callable[[], bool] = lambda: False) -> bool:
        """Trains to the end.

        Args:
            log: called with the metrics of each step.
            stop: asked before each step; True writes a checkpoint and ends.

        Returns:
            Whether the run is complete.

        Raises:
            TrainingError: loss, gradients or weights are no longer finite; the last good checkpoint is kept.
        """
        try:
            while self.state.step < self.total:
                if self.processes.any(stop()):
                    self.save()
                    return False
                line = self.step()
                self.processes.on_main(lambda: log(line))  # noqa: B023  # done before the next one
                if self.state.step % self.config.checkpoint_every == 0 and self.state.step < self.total:
                    self.save()
        finally:
            self.recorder.forget()
        if self.masks is None:
            self.freeze()
        self.save()
        self.restore()
        return True

    def step(self) -> Metrics:
        """One step; returns its metrics. One that is left out counts in the schedule, so that student and teacher keep pace."""
        step, config = self.state.step, self.config
        if step >= self.freeze_step and self.masks is None:
            self.freeze()
        began = time.perf_counter()
        target = schedule(step, self.ramp, config.sparsity, config.ramp_shape)
        whole = self.blocks.batch(step, config.batch_size, config.seed)
        batch = self.processes.share(whole).to(self.masked.device)

        records = len(self.bank) if self.state.reached is None else self.state.walk_from
        record = self.policy.record(step, records, self.state.reached)
        final = self.masks is not None and record in (None, INTACT)  # masks and teacher stay as they are
        recorded = self.recorder.of(lambda batch: self.forward(record, batch, target), batch) if final else None
        if recorded is None:
            loss, *others = self.forward(record, batch, target)
        else:
            with self.part("recorded passes"):
                loss, *others = recorded(batch)
        told = self.processes.averages([float(loss.detach()), *(float(other) for other in others)])
        gradient_norm = self.update(loss if recorded is None else None, told[0], step)

        tokens, seconds = whole.numel(), time.perf_counter() - began
        self.state.tokens += tokens
        self.state.seconds += seconds
        self.state.step += 1
        sparsity = told[4]  # the same in all, to the last bit, for what it decides
        metrics: Metrics = {
            "step": step,
            "phase": self.phase(step),
            "loss": told[0],
            "kl": told[1],
            "lm_loss": told[2],
            "hidden_loss": told[3],
            "target_sparsity": target,
            "expected_sparsity": sparsity,
            "teacher": teacher_name(record),
            "records": len(self.bank),
            "lr": self.lora_optimizer.param_groups[0]["lr"],
            "gradient_norm": gradient_norm,
            "gradient_jumps": self.state.jumps,
            "skipped": self.state.skipped,
            "tokens": self.state.tokens,
            "tokens_per_s": tokens / seconds,
            "seconds": self.state.seconds,
        }
        if self.masks is None:
            metrics |= {"gate_lr": self.gate_optimizer.param_groups[0]["lr"]} | self.control.metrics()
            self.after_step(step, sparsity)
        return metrics

    def forward(self, record: int | None, batch: Tensor, target: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The forward passes of teacher and student.

        Args:
            record: who teaches; None for nobody.
            batch: token ids [batch, tokens], int64.
            target: sparsity of the student.

        Returns:
            The loss, with gradients; then, for the metrics, KL, cross entropy, hidden-state term and expected sparsity. All are
            scalars; terms that the loss has not are nan.
        """
        config = self.config
        layer_states = config.hidden_loss != "none" and config.teachers != "none"
        states: list[Tensor] = []  # the teacher's hidden states
        taught = None if record is None else self.teach(record, batch, states if layer_states else None)

        with self.part("gates and control"):
            masks, expected = self.student_masks(target)
            hidden = HiddenLoss(states, masks.hidden, config.hidden_loss) if states else None
        with self.part("student forward"):
            student = self.masked.forward(batch, None if hidden is None else hidden.add)
        with self.part("heads and losses"):
            head = self.head_loss(student, taught, batch)
            loss = head.total if hidden is None else head.total + config.hidden_weight * hidden.total
        if self.masks is None:
            loss = loss + self.control.penalty(expected, target)
        hidden_loss = torch.full_like(head.lm, math.nan) if hidden is None else hidden.total.detach()
        return loss, head.kl, head.lm, hidden_loss, expected.detach()

    def head_loss(self, student: Tensor, taught: Tensor | None, batch: Tensor) -> HeadLoss:
        """KL and cross entropy of hidden states [batch, tokens, hidden] as the head takes them, as the options weigh them."""
        config, head = self.config, self.masked.head
        return head_loss(
            student,
            taught,
            batch,
            head.weight,
            head.bias,
            temperature=config.temperature,
            kl_weight=config.kl_weight,
            lm_weight=1.0 if taught is None else config.lm_weight,
            softcap=self.masked.arch.softcap,
        )

    @property
    def recordable(self) -> bool:
        """Whether the passes of a step can become a CUDA graph."""
        apart = self.masked.rigid or self.config.compile or self.config.gradient_checkpointing  # these wait for the device
        return self.masked.device.type == "cuda" and self.fast and not apart

    def teach(self, record: int, batch: Tensor, states: list[Tensor] | None) -> Tensor:
        """The teacher's forward pass, without gradients; its hidden states after each layer but the last go to `states`."""
        with torch.no_grad(), ExitStack() as stack:
            with self.part("teacher swap"):
                if self.teacher is None or self.teacher[0] != record:
                    snapshot = None if record == INTACT else self.bank[record]
                    masks, lora = (None, None) if snapshot is None else (snapshot.masks, snapshot.lora)
                    self.teacher = record, self.masked.prepare(masks, lora)
                stack.enter_context(self.masked.playing(self.teacher[1]))
            with self.part("teacher forward"):
                return self.masked.forward(batch, None if states is None else lambda _, state: states.append(state))

    def gate_scores(self, target: float) -> tuple[Unit, Tensor]:
        """The gates at this point of the run, shifted by the controller for a target, and their expected sparsity."""
        self.gates.gate.anneal(self.state.step / max(self.freeze_step, 1))
        if (shape := self.discretiser.shape) is not None:  # every width has its own way; together they are the target
            scores = self.gates.alike(self.gates.scores(), shape.units_at(target))
        else:
            scores = self.gates.scores(self.control.offset(self.gates.scores(), self.gates.keep, target))
            if self.config.uniform or self.config.head_unit == "query":
                scores = self.gates.alike(scores, layers=self.config.uniform)
        return scores, self.size.expected_sparsity(self.gates.keep(scores))

    def student_masks(self, target: float) -> tuple[Masks, Tensor]:
        """Installs the student's masks of a step; returns them and their expected sparsity."""
        if self.masks is not None:
            return self.masks, self.frozen_sparsity
        scores, expected = self.gate_scores(target)
        masks = self.gates.sample(scores, self.generator)
        self.masked.set_masks(masks)
        return masks, expected

    def update(self, loss: Tensor | None, average: float, step: int) -> float:
        """Backward pass and optimisers.

        Args:
            loss: with gradients, of this process's part of the batch; None if recorded passes have left theirs already.
            average: the loss over all processes.
            step: number of the step.

        Returns:
            The norm of the LoRA gradient over all processes before clipping; nan if it or the loss is not finite.

        Raises:
            TrainingError: loss or gradients were not finite too often in a row; no weight has been changed.
        """
        if not math.isfinite(average):
            return self.skip("loss", step)
        with self.part("backward"):
            if loss is not None:
                loss.backward()
            trained = (*self.masked.lora.values(), *self.gates.parameters(), *self.control.parameters())
            self.processes.average(p.grad for p in trained if p.grad is not None)
        with self.part("optimisers"):
            limit = self.config.grad_clip or math.inf
            norm = float(torch.nn.utils.clip_grad_norm_(self.masked.lora.values(), limit))
            gates = [p.grad for p in self.gates.parameters() if p.grad is not None]
            if not (math.isfinite(norm) and math.isfinite(float(torch.nn.utils.get_total_norm(gates)))):
                return self.skip("gradient", step)
            self.state.skipped_in_a_row = 0
            if self.out_of_line(norm, step):
                self.leave_out()
                return norm
            for group in self.lora_optimizer.param_groups:
                group["lr"] = self.config.lr * lr_factor(self.config.lr_schedule, step, self.total) * group["ratio"]
            self.lora_optimizer.step()
            self.lora_optimizer.zero_grad()
        if self.masks is None:
            with self.part("gates and control"):
                self.gate_optimizer.step()
                self.gate_optimizer.zero_grad()
                self.gates.clamp_()
                self.control.step()
        return norm

    def out_of_line(self, norm: float, step: int) -> bool:
        """Whether a step's update is left out because its gradient's norm jumped; counts jumps, and tells once of them."""
        limit = self.config.jump_limit
        times = jump(self.state.norms, norm, limit or JUMP)
        if times is None:
            return False
        self.state.jumps += 1
        if self.state.jumps == (MANY if limit else 1):
            count = f", {MANY} updates left out so far" if limit else ""
            self.warn(
                f"the gradient's norm jumped to {norm:.3g} in step {step}, {times:.0f} times its median{count}: training is "
                f"unstable, which costs quality; a run at a lower --lr (now {self.config.lr:g}) may end better. All jumps are "
                "counted as gradient_jumps"
            )
        return limit > 0

    def skip(self, what: str, step: int) -> float:
        """Leaves out the update of a step whose loss or gradient is not finite; returns nan, its gradient's norm.

        Raises:
            TrainingError: it is one too many in a row.
        """
        self.state.skipped += 1
        self.state.skipped_in_a_row += 1
        if (row := self.state.skipped_in_a_row) > self.config.max_skipped:
            raise self.not_finite(f"{what} of step {step}", "" if row == 1 else f" ({row} steps in a row)")
        self.warn(f"step {step} is left out, because its {what} is not a finite number")
        self.leave_out()
        return math.nan

    def leave_out(self) -> None:
        """Forgets the gradients of a step that moves nothing."""
        self.lora_optimizer.zero_grad()
        self.gate_optimizer.zero_grad()
        self.control.drop()

    def not_finite(self, what: str, row: str = "") -> TrainingError:
        """The error of a run that cannot go on."""
        return TrainingError(
            f"the {what} is not a finite number{row}; the last good checkpoint is kept in "
            f"{self.folder / 'checkpoints'}. Try a lower --lr (now {self.config.lr:g}) or --gate-lr (now "
            f"{gate_rate(self.config):g}), or --dtype float32, in a new run."
        )

    # -- sparsity and teachers ----------------------------------------------------------------------------------------

    def phase(self, step: int) -> str:
        """ramp, walk-back (hold, where no teacher walks) or recovery."""
        if step >= self.freeze_step:
            return "recovery"
        if self.state.reached is None or step < self.state.reached:
            return "ramp"
        return "walk-back" if self.policy.walks else "hold"

    @property
    def last_record(self) -> int:
        """Number of the record at the target sparsity."""
        return last_record(self.config)

    def after_step(self, step: int, sparsity: float) -> None:
        """Takes the snapshots that this step's sparsity passed, and notes that the target is reached."""
        every = self.config.snapshot_every
        while (
            self.policy.keeps_records and len(self.bank) < self.last_record and sparsity >= (len(self.bank) + 1) * every - 1e-4
        ):
            record = len(self.bank) + 1
            masks, _ = self.discrete(record * every)
            snapshot = Snapshot(record, self.size.sparsity(masks), step, masks, self.masked.lora_copy())
            self.processes.on_main(lambda: self.bank.write(snapshot))  # noqa: B023  # done before the next one
            self.bank.count = record
        self.state.records = len(self.bank)
        if self.state.reached is None and step + 1 >= self.ramp and abs(sparsity - self.config.sparsity) <= REACHED:
            self.mark_reached(step + 1)

    @torch.no_grad()
    def discrete(self, sparsity: float) -> tuple[Masks, float]:
        """The gates as discrete masks of a sparsity, and the expected sparsity that they stood at."""
        if self.config.one_shot:  # the gates were never soft
            return self.hard_masks(self.gates.scores(), sparsity), sparsity
        scores, expected = self.gate_scores(sparsity)
        if self.gates.gate.hard:  # what multiples keep beyond the open gates is whole as well
            return self.hard_masks(scores, sparsity), float(expected)
        return self.discretiser.masks(scores, self.gates.values(scores), sparsity), float(expected)

    def hard_masks(self, scores: Unit, sparsity: float) -> Masks:
        """Masks of ones and zeros by scores."""
        whole = {kind: torch.ones(shape) for kind, shape in mask_shapes(self.masked.arch.dims).items()}
        return self.discretiser.masks(scores, whole, sparsity)

    def freeze(self) -> None:
        """Makes the masks discrete at exactly the asked sparsity, repairs if that helps; from here on only LoRA trains."""
        masks, reached = self.discrete(self.config.sparsity)
        if self.config.sparsity - reached > FORCED:
            self.warn(
                f"the gates stood at {100 * reached:.1f} % when the masks were frozen at {100 * self.config.sparsity:.1f} %, "
                "so many units were cut without training; give more --steps or --control projection"
            )
        if self.state.reached is None:
            self.mark_reached(self.state.step)
        if self.config.repair:
            start_recovery(self, masks)
        self.freeze_at(masks)

    def freeze_at(self, masks: Masks) -> None:
        """Fixes the masks; the student, and where they can its teachers, run at the width that is left."""
        self.recorder.forget()
        self.masks = masks.to(self.masked.device)
        self.frozen_sparsity = torch.tensor(self.size.sparsity(masks))
        self.gates.requires_grad_(False)
        if self.fast and not self.masked.rigid:
            newest = self.policy.record(self.freeze_step, self.state.walk_from, self.state.reached) or INTACT
            teachers = [self.bank.masks(record) for record in range(1, newest + 1)]
            arch = self.masked.arch
            self.masked.arrange(Arrangement.of(arch.dims, arch.spec.narrow, self.masks, teachers))
        self.masked.set_masks(self.masks)
        self.teacher = None
        widths = self.masked.widths
        self.each_lora_weight(lambda name, tensor: self.masked.cut_lora(name, tensor, widths))

    @torch.no_grad()
    def each_lora_weight(self, change: Callable[[str, Tensor], Tensor]) -> None:
        """Changes the shape of the student's LoRA weights and of what the optimiser keeps for them."""
        for name, parameter in self.masked.lora.items():
            parameter.data = change(name, parameter.data)
            parameter.grad = None
            for key, value in self.lora_optimizer.state.get(parameter, {}).items():
                if value.dim() > 0:  # not the step counter
                    self.lora_optimizer.state[parameter][key] = change(name, value)

    def restore(self) -> None:
        """Gives the model its intact weights back, and LoRA its whole shape, for compaction."""
        widths = self.masked.widths
        self.each_lora_weight(lambda name, tensor: self.masked.spread_lora(name, tensor, widths))
        self.masked.restore()
        self.masked.set_masks(self.masks)

    def mark_reached(self, step: int) -> None:
        """From this step on teachers walk back, or the intact model teaches."""
        self.state.reached, self.state.walk_from = step, len(self.bank)

    # -- state --------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes a checkpoint of everything.

        Raises:
            TrainingError: a weight is not finite; nothing is written.
        """
        self.processes.on_main(lambda: write_checkpoint(self))

    def load(self) -> None:
        """Goes back to the newest undamaged checkpoint of the run folder.

        Raises:
            ConfigError: there is none.
        """
        load_checkpoint(self)

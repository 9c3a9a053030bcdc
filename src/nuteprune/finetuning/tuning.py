"""The training of a fine-tuning: LoRA weights, the loss on answers, and everything needed to go on."""

from __future__ import annotations

import gc
import math
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from nuteprune.checkpoint import (
    load_optimizer,
    optimizer_tensors,
    pick_checkpoint,
    read_checkpoint,
    remove_later,
    save_checkpoint,
    within,
)  # fmt: skip
from nuteprune.errors import ConfigError, TrainingError
from nuteprune.finetuning.instructions import EXAMPLES, IGNORED, Examples
from nuteprune.finetuning.loss import Answers, answer_loss, answer_tokens
from nuteprune.finetuning.options import FinetuneOptions
from nuteprune.job import interruptible
from nuteprune.learning_rate import lr_factor
from nuteprune.precision import half_autocast
from nuteprune.progress import MetricsFile, Reporter

ALPHA = 2  # LoRA alpha over the rank: the scale of what LoRA adds
GROUP = 16  # batches whose examples are put in order of length, so that little is padded


class Tuning:
    """The training of the LoRA weights; its state is the step, the weights and their moments.

    Args:
        options: the options.
        folder: where checkpoints go.
        model: the pruned model; it gets LoRA weights.
        teacher: the model to distil from, or None.
        examples: all examples; those from `training` on are held out.
        training: number of examples to learn from.
        pad: token to fill batches with.
        files: the model's weight files (`weight_files`).
    """

    def __init__(
        self,
        options: FinetuneOptions,
        folder: Path,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None,
        examples: Examples,
        training: int,
        pad: int,
        files: dict[Path, list[str]] | None = None,
    ) -> None:
        self.files = files or {}
        self.options, self.folder, self.teacher, self.examples = options, folder, teacher, examples
        self.training, self.pad, self.device, self.dtype = training, pad, model.device, model.dtype
        self.total = options.total_steps(training)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            config = LoraConfig(
                r=options.lora_rank, lora_alpha=ALPHA * options.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a name that it is renaming
                self.model: Any = get_peft_model(model, config).eval()  # no dropout is used
        self.lora = {name: p for name, p in sorted(self.model.named_parameters()) if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.lora.values(), lr=options.lr, weight_decay=0.0)
        self.step = self.tokens = 0
        self.seconds = 0.0
        self.before: float | None = None
        self._epoch: tuple[int, list[list[int]]] | None = None

    def run(self, reporter: Reporter) -> bool:
        """The steps; whether they are complete."""
        metrics = MetricsFile(self.folder / "metrics.jsonl", self.step)
        with interruptible(reporter) as stop, reporter.counter("fine-tuning") as progress:
            while self.step < self.total:
                if stop():
                    self.save()
                    return False
                metrics.add(self.one())
                progress(self.step, self.total)
                if self.step % self.options.checkpoint_every == 0:
                    self.save()
        self.save()
        return True

    @torch.no_grad()
    def check_heads(self) -> None:
        """Compares logits at answers with the models' own, on one example.

        Raises:
            ConfigError: a model that computes its logits in a way of its own.
        """
        ids, labels, mask = self._to(self.examples.batch([0], self.pad))
        for model in (self.model, *([self.teacher] if self.teacher is not None else [])):
            with half_autocast(self.device, self.dtype):
                wanted = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
                found = Answers.of(model, ids, mask, labels).logits(slice(None))
            wanted = wanted[:, :-1][labels[:, 1:] != IGNORED]
            if not torch.allclose(found, wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max())):
                raise ConfigError(
                    f"model {self.options.model} or its teacher makes logits in a way that fine-tuning here does not know; "
                    "fine-tune its model folder with another trainer."
                )

    @torch.no_grad()
    def changes(self) -> dict[str, Tensor]:
        """What LoRA adds to each weight, by stock name, float32 on the CPU."""
        found = {}
        for name, a in self.lora.items():
            if ".lora_A." in name:
                b = self.lora[name.replace(".lora_A.", ".lora_B.")]
                path = name.removeprefix("base_model.model.").partition(".lora_A.")[0]
                found[f"{path}.weight"] = ALPHA * (b.float() @ a.float()).cpu()
        return found

    def release(self) -> None:
        """Gives the memory of the models and of the optimiser back."""
        self.model = self.teacher = None
        self.lora.clear()
        del self.optimizer
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def one(self) -> dict[str, Any]:
        """One step; returns its metrics.

        Raises:
            TrainingError: loss or gradient is not finite; no weight has been changed.
        """
        began = time.perf_counter()
        ids, labels, mask = self._to(self.examples.batch(self.rows(self.step), self.pad))
        teacher = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher = Answers.of(self.teacher, ids, mask, labels)
        targets = answer_tokens(labels)
        with half_autocast(self.device, self.dtype):
            student = Answers.of(self.model, ids, mask, labels)
            loss, lm, kl = answer_loss(student, teacher, targets, self.options.distill)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(torch.nn.utils.clip_grad_norm_(self.lora.values(), 1.0))
        if not (math.isfinite(norm) and math.isfinite(float(loss.detach()))):
            raise TrainingError(
                f"the loss or gradient of step {self.step} is not a finite number; the last good checkpoint is kept in "
                f"{self.folder / 'checkpoints'}. Try a lower --lr (now {self.options.lr:g}) in a new fine-tuning."
            )
        rate = self.options.lr * lr_factor(self.options.lr_schedule, self.step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - began
        self.step, self.tokens, self.seconds = self.step + 1, self.tokens + len(targets), self.seconds + seconds
        return {
            "step": self.step - 1, "loss": float(loss.detach()), "lm_loss": lm, "kl": kl, "lr": rate, "gradient_norm": norm,
            "answer_tokens": self.tokens, "seconds": self.seconds,
        }  # fmt: skip

    def rows(self, step: int) -> list[int]:
        """The examples of a step, a function of its number and the seed; each pass has its own order."""
        epoch, place = divmod(step, -(-self.training // self.options.batch_size))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._order(epoch)
        return self._epoch[1][place]

    def _order(self, epoch: int) -> list[list[int]]:
        """The batches of a pass."""
        size = self.options.batch_size
        shuffler = random.Random(f"{self.options.seed}-{epoch}")
        order = list(range(self.training))
        shuffler.shuffle(order)
        made = []
        for start in range(0, self.training, size * GROUP):
            pool = sorted(order[start : start + size * GROUP], key=lambda row: len(self.examples.ids[row]))
            some = [pool[first : first + size] for first in range(0, len(pool), size)]
            shuffler.shuffle(some)
            made += some
        return made

    @torch.no_grad()
    def held_out(self, model: Any, progress: Callable[[int, int], None]) -> float | None:
        """Cross entropy of the held-out answers, nats a token."""
        total = count = 0.0
        rows = list(range(self.training, len(self.examples)))
        for start in range(0, len(rows), self.options.batch_size):
            ids, labels, mask = self._to(self.examples.batch(rows[start : start + self.options.batch_size], self.pad))
            targets = answer_tokens(labels)
            with half_autocast(self.device, self.dtype):
                _, lm, _ = answer_loss(Answers.of(model, ids, mask, labels), None, targets, 0.0)
            total, count = total + lm * len(targets), count + len(targets)
            progress(min(start + self.options.batch_size, len(rows)), len(rows))
        return total / count if count else None

    @torch.no_grad()
    def logits(self, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits of a model at the tokens of a batch, [tokens, vocab], on the CPU."""
        with half_autocast(self.device, self.dtype):
            found = model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device), use_cache=False).logits
        return found.float().cpu()[mask.bool()]  # type: ignore[no-any-return]

    def save(self) -> None:
        """Writes a checkpoint of everything."""
        tensors = {f"lora.{name}": p.data for name, p in self.lora.items()}
        tensors |= optimizer_tensors(self.optimizer, "optimizer")
        state = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "before": self.before}
        save_checkpoint(self.folder / "checkpoints", self.step, tensors, state, keep=2, needs=[self.folder / EXAMPLES])

    @torch.no_grad()
    def load(self, warn: Callable[[str], None]) -> None:
        """Goes back to the newest undamaged checkpoint.

        Raises:
            ConfigError: there is none.
        """
        path = pick_checkpoint(self.folder / "checkpoints", warn)
        tensors, state = read_checkpoint(path)
        remove_later(path)
        for name, value in within(tensors, "lora").items():
            self.lora[name].copy_(value)
        load_optimizer(self.optimizer, tensors, "optimizer")
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.before = state["before"]

    def _to(self, tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        ids, labels, mask = tensors
        return ids.to(self.device), labels.to(self.device), mask.to(self.device)

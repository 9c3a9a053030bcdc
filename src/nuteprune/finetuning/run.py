"""A fine-tuning from start to end: check, tokenise, train LoRA weights on answers, merge, compare, write.

The folder holds finetune.yaml, env.json, data/, metrics.jsonl, checkpoints/, model/ and result.json.
"""

from __future__ import annotations

import math
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.checkpoint import checkpoints, load_checkpoint, load_optimizer, optimizer_tensors, save_checkpoint, within
from nuteprune.config import PruneConfig
from nuteprune.environment import environment
from nuteprune.errors import ConfigError, ExportError, TrainingError
from nuteprune.evaluation.record import run_folder
from nuteprune.export.hf import watched
from nuteprune.export.provenance import FILE as PROVENANCE
from nuteprune.files import atomic_folder, save_json, save_tensors, save_text, stream_tensors
from nuteprune.finetuning.instructions import IGNORED, Examples, read_examples
from nuteprune.finetuning.loss import Answers, answer_loss
from nuteprune.finetuning.options import FinetuneOptions
from nuteprune.job import TUNING, check_folder, interruptible
from nuteprune.models import Source, pick_device, pick_dtype
from nuteprune.progress import MetricsFile, Reporter, duration

EXAMPLES, RESULT, MODEL = "data/examples.safetensors", "result.json", "model"
HELD_OUT = 64  # most examples kept apart, for the loss before and after; a twentieth of them if that is less
WARMUP = 0.03
TOLERANCE = 1e-2  # largest difference in logits of the merged and the unmerged model, relative to the largest logit
GROUP = 16  # batches whose examples are put in order of length, so that little is padded


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tuning leaves.

    Attributes:
        folder: where it is.
        complete: False if it was stopped and can be resumed.
        examples: that were learned from.
        tokens: answer tokens learned from, in all passes.
        before: cross entropy of held-out answers before, nats a token; None if there were too few examples.
        after: the same of the merged model that was written.
        difference: largest difference in logits between the merged and the unmerged model.
        seconds: time spent in steps.
    """

    folder: Path
    complete: bool
    examples: int = 0
    tokens: int = 0
    before: float | None = None
    after: float | None = None
    difference: float = 0.0
    seconds: float = 0.0

    @property
    def model(self) -> Path:
        """The merged model folder."""
        return self.folder / MODEL


def finetune(options: FinetuneOptions, reporter: Reporter | None = None) -> FinetuneResult:
    """Fine-tunes a pruned model on instructions and merges what it learned.

    Args:
        options: the options.
        reporter: shows progress.

    Raises:
        ConfigError, DataError: bad input, found before any weights are read; nothing is written.
        TrainingError: the loss is not finite; the last good checkpoint is kept.
    """
    reporter = reporter or Reporter()
    check_folder(options.folder)
    job = _Job.check(options)
    examples = read_examples(options.data, job.tokenizer, options.template, options.seq_len, options.rows, options.seed)
    if examples.cut or examples.left_out:
        reporter.say(f"{examples.cut:,} answers are cut at {options.seq_len} tokens, {examples.left_out:,} do not fit at all")
    with atomic_folder(options.folder) as temporary:
        save_text(temporary / TUNING, options.to_yaml())
        save_json(temporary / "env.json", environment(job.device))
        save_tensors(temporary / EXAMPLES, examples.tensors())
    return job.train_and_finish(reporter)


def resume_finetune(folder: str | Path, reporter: Reporter | None = None) -> FinetuneResult:
    """Goes on with a fine-tuning from its last checkpoint, to the same weights as if it had never stopped.

    Raises:
        ConfigError: the folder is none, or it is complete.
    """
    folder = Path(folder)
    options = FinetuneOptions.read(folder / TUNING)
    if (folder / RESULT).is_file():
        raise ConfigError(f"fine-tuning {folder} is complete; its model is in {folder / MODEL}.")
    job = _Job.check(options, folder)
    return job.train_and_finish(reporter or Reporter())


def is_finetuning(folder: Path) -> bool:
    """Whether a folder is one of `finetune`."""
    return (folder / TUNING).is_file()


@dataclass(frozen=True)
class _Job:
    """A checked fine-tuning; no weights are read yet."""

    options: FinetuneOptions
    folder: Path
    source: Source
    teacher: Source | None
    tokenizer: PreTrainedTokenizerBase
    device: torch.device

    @classmethod
    def check(cls, options: FinetuneOptions, folder: Path | None = None) -> _Job:
        """Every check that needs no weights."""
        device = pick_device(options.device)
        source = Source.find(options.model)
        if source.gguf_file or not source.local:
            raise ConfigError(f"MODEL got {options.model!r}; allowed is a run of nuteprune prune or a local model folder.")
        config = source.config()
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and options.seq_len > longest:
            raise ConfigError(f"--seq-len got {options.seq_len}; this model reads at most {longest} tokens.")
        teacher = None
        if options.distill > 0:
            run = run_folder(options.model)
            if options.teacher is None and run is None:
                raise ConfigError(
                    f"--distill: {options.model} is no run, so its intact model is not known; name it by --teacher."
                )
            teacher = Source.find(options.teacher or PruneConfig.of_run(run / "config.yaml").model)  # type: ignore[operator]
            if (size := teacher.config().vocab_size) != config.vocab_size:
                raise ConfigError(
                    f"--teacher {teacher.name} has {size} tokens, the model {config.vocab_size}; they must be alike."
                )
        return cls(options, folder or options.folder, source, teacher, source.tokenizer(config.vocab_size), device)

    def train_and_finish(self, reporter: Reporter) -> FinetuneResult:
        """Trains from where the folder stands, then merges and writes."""
        options = self.options
        examples = Examples.from_tensors(load_file(self.folder / EXAMPLES))
        apart = min(HELD_OUT, len(examples) // 20)  # the last ones; their order is random
        training = len(examples) - apart
        reporter.say(f"loading {self.source.name} on {self.device}")
        dtype = pick_dtype(options.dtype, self.device)
        model = self.source.model(self.device, dtype)
        teacher = None if self.teacher is None else self.teacher.model(self.device, dtype).requires_grad_(False)
        tuning = _Tuning(options, self.folder, model, teacher, examples, training, self._pad)
        try:
            if checkpoints(self.folder / "checkpoints"):
                tuning.load()
                reporter.say(f"going on from step {tuning.step} of {tuning.total}")
            else:
                with reporter.counter("loss of held-out answers") as progress:
                    tuning.before = tuning.held_out(tuning.model, progress)
                tuning.save()
            if tuning.run(reporter):
                return self.finish(tuning, reporter)
        except KeyboardInterrupt:  # the second Ctrl-C: the last checkpoint stands
            pass
        reporter.say(f"stopped at step {tuning.step}; go on with: nuteprune resume {self.folder}")
        return FinetuneResult(self.folder, complete=False)

    @property
    def _pad(self) -> int:
        """A token to fill batches with; attention does not see it."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(i for i in ids if isinstance(i, int))

    def finish(self, tuning: _Tuning, reporter: Reporter) -> FinetuneResult:
        """Merges, writes model/ and compares it with what was trained."""
        ids, _, mask = tuning.examples.batch(list(range(min(4, len(tuning.examples)))), self._pad)
        wanted = tuning.logits(tuning.model, ids, mask)
        merged: Any = tuning.model.merge_and_unload()
        with atomic_folder(self.folder / MODEL) as folder:
            with reporter.counter("writing the merged model") as progress:
                write_like(Path(self.source.where), folder, merged, progress)
            del merged
            written = Source.find(str(folder)).model(self.device, tuning.dtype)
            found = tuning.logits(written, ids, mask)
            difference, largest = float((found - wanted).abs().max()), float(wanted.abs().max())
            if not difference <= TOLERANCE * max(largest, 1.0) * (8 if tuning.dtype == torch.bfloat16 else 1):
                raise ExportError(
                    f"the merged model differs from the trained one by up to {difference:.2e} in its logits (the largest is "
                    f"{largest:.1f}); nothing was written. Please report this with {self.folder / TUNING}."
                )
            with reporter.counter("loss of held-out answers") as progress:
                after = tuning.held_out(written, progress)
            about = (
                f"Fine-tuned on instructions by `nuteprune finetune` ({tuning.training:,} examples, {tuning.total:,} steps)."
            )
            card = folder / "README.md"
            before = card.read_text(encoding="utf-8") if card.is_file() else ""
            save_text(card, f"{before.rstrip()}\n\n## Instruction fine-tuning\n\n{about}\n" if before else f"{about}\n")
        result = FinetuneResult(
            self.folder, True, tuning.training, tuning.tokens, tuning.before, after, difference, tuning.seconds
        )
        figures = {k: v for k, v in asdict(result).items() if k not in ("folder", "complete")}
        save_json(self.folder / RESULT, figures)
        return result


class _Tuning:
    """The training of the LoRA weights; its state is the step, the weights and their moments.

    Args:
        options: the options.
        folder: where checkpoints go.
        model: the pruned model; it gets LoRA weights.
        teacher: the model to distil from, or None.
        examples: all examples; those from `training` on are held out.
        training: number of examples to learn from.
        pad: token to fill batches with.
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
    ) -> None:
        self.options, self.folder, self.teacher, self.examples = options, folder, teacher, examples
        self.training, self.pad, self.device, self.dtype = training, pad, model.device, model.dtype
        self.total = options.total_steps(training)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            config = LoraConfig(
                r=options.lora_rank, lora_alpha=2 * options.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
            )
            self.model: Any = get_peft_model(model, config).eval()  # no dropout is used
        self.lora = {name: p for name, p in sorted(self.model.named_parameters()) if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.lora.values(), lr=options.lr, weight_decay=0.0)
        self.step = self.tokens = 0
        self.seconds = 0.0
        self.before: float | None = None

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
        targets = labels[:, 1:][labels[:, 1:] != IGNORED]
        with self._half():
            student = Answers.of(self.model, ids, mask, labels)
            loss, lm, kl = answer_loss(student, teacher, targets, self.options.distill)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(torch.nn.utils.clip_grad_norm_(self.lora.values(), 1.0))
        if not (math.isfinite(norm) and math.isfinite(float(loss.detach()))):
            raise TrainingError(
                f"the loss or gradient of step {self.step} is not a finite number; the last good checkpoint is kept in "
                f"{self.folder / 'checkpoints'}. Try a lower --lr (now {self.options.lr:g}) in a new fine-tuning."
            )
        rate = self.options.lr * self.factor(self.step)
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

    def factor(self, step: int) -> float:
        """Factor on the peak learning rate."""
        warm = max(1, round(WARMUP * self.total))
        if step < warm:
            return (step + 1) / warm
        progress = (step - warm) / max(self.total - warm, 1)
        kind = self.options.lr_schedule
        return {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}[kind]

    def rows(self, step: int) -> list[int]:
        """The examples of a step, a function of its number and the seed; each pass has its own order."""
        size, seed = self.options.batch_size, self.options.seed
        batches = -(-self.training // size)
        epoch, place = divmod(step, batches)
        shuffler = random.Random(f"{seed}-{epoch}")
        order = list(range(self.training))
        shuffler.shuffle(order)
        pools = [order[start : start + size * GROUP] for start in range(0, self.training, size * GROUP)]
        made = []
        for pool in pools:
            pool.sort(key=lambda row: len(self.examples.ids[row]))
            some = [pool[start : start + size] for start in range(0, len(pool), size)]
            shuffler.shuffle(some)
            made += some
        return made[place]

    @torch.no_grad()
    def held_out(self, model: Any, progress: Callable[[int, int], None]) -> float | None:
        """Cross entropy of the held-out answers, nats a token."""
        total = count = 0.0
        rows = list(range(self.training, len(self.examples)))
        for start in range(0, len(rows), self.options.batch_size):
            ids, labels, mask = self._to(self.examples.batch(rows[start : start + self.options.batch_size], self.pad))
            targets = labels[:, 1:][labels[:, 1:] != IGNORED]
            with self._half():
                _, lm, _ = answer_loss(Answers.of(model, ids, mask, labels), None, targets, 0.0)
            total, count = total + lm * len(targets), count + len(targets)
            progress(min(start + self.options.batch_size, len(rows)), len(rows))
        return total / count if count else None

    @torch.no_grad()
    def logits(self, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits of a model at the tokens of a batch, [tokens, vocab], on the CPU."""
        with self._half():
            found = model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device), use_cache=False).logits
        return found.float().cpu()[mask.bool()]  # type: ignore[no-any-return]

    def save(self) -> None:
        """Writes a checkpoint of everything."""
        tensors = {f"lora.{name}": p.data for name, p in self.lora.items()}
        tensors |= optimizer_tensors(self.optimizer, "optimizer")
        state = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "before": self.before}
        save_checkpoint(self.folder / "checkpoints", self.step, tensors, state, keep=2)

    @torch.no_grad()
    def load(self) -> None:
        """Goes back to the newest checkpoint."""
        tensors, state = load_checkpoint(self.folder / "checkpoints")
        for name, value in within(tensors, "lora").items():
            self.lora[name].copy_(value)
        load_optimizer(self.optimizer, tensors, "optimizer")
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.before = state["before"]

    def _to(self, tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        ids, labels, mask = tensors
        return ids.to(self.device), labels.to(self.device), mask.to(self.device)

    def _half(self) -> torch.autocast:
        half = self.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.device.type, self.dtype if half else None, enabled=half)


def write_like(source: Path, folder: Path, model: PreTrainedModel, progress: Callable[[int, int], None]) -> None:
    """Writes a model folder with other weights: same files, names, shards and precision.

    Args:
        source: the model folder that `model` was loaded from.
        folder: where to write.
        model: has the weights, by the same names.
        progress: called with tensors written and their number.
    """
    weights = model.state_dict()
    files = sorted(source.glob("*.safetensors"))
    done, total = 0, 0
    for path in source.iterdir():
        if path.is_file() and path not in files and path.name != PROVENANCE:
            shutil.copyfile(path, folder / path.name)
    names: dict[Path, list[str]] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            names[path] = list(file.keys())
        total += len(names[path])
    for path in files:
        with safe_open(path, framework="pt") as file:
            dtype = file.get_tensor(names[path][0]).dtype
        made = ((name, weights[name].detach().to("cpu", dtype)) for name in names[path])

        def told(count: int, _: int, before: int = done) -> None:
            progress(before + count, total)

        shapes = {name: weights[name].shape for name in names[path]}
        stream_tensors(folder / path.name, shapes, dtype, watched(made, len(shapes), told))
        done += len(shapes)


def summary(result: FinetuneResult) -> list[str]:
    """What a complete fine-tuning says of itself."""
    lines = [f"model: {result.model}"]
    if result.before is not None and result.after is not None:
        lines.append(
            f"loss of held-out answers: {result.before:.4f} -> {result.after:.4f} nats a token "
            f"(perplexity {math.exp(result.before):.3f} -> {math.exp(result.after):.3f})"
        )
    lines.append(
        f"{result.examples:,} examples, {result.tokens:,} answer tokens in {duration(result.seconds)}; largest logit "
        f"difference of the merged to the trained model: {result.difference:.2e}"
    )
    return lines

"""A fine-tuning from start to end: check, tokenise, train LoRA weights on answers, merge, compare, write.

The folder holds finetune.yaml, env.json, data/, metrics.jsonl, checkpoints/, model/ and result.json.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from nuteprune.checkpoint import checkpoints
from nuteprune.config import PruneConfig
from nuteprune.data import check_there
from nuteprune.environment import environment
from nuteprune.errors import ConfigError, DataError, ExportError, reason
from nuteprune.evaluation.record import run_folder
from nuteprune.files import atomic_folder, save_json, save_tensors, save_text
from nuteprune.finetuning.instructions import EXAMPLES, NAMED, Examples, pick_template, read_examples
from nuteprune.finetuning.merge import precisions, weight_files, write_like
from nuteprune.finetuning.options import FinetuneOptions
from nuteprune.finetuning.tuning import Tuning
from nuteprune.job import TUNING, check_folder
from nuteprune.models import Source, pick_device, pick_dtype
from nuteprune.option_values import check_unchanged
from nuteprune.progress import Reporter, duration
from nuteprune.report.facts import read_object

ENVIRONMENT, RESULT, MODEL = "env.json", "result.json", "model"
HELD_OUT = 64  # most examples kept apart, for the loss before and after; a twentieth of them if that is less
# Largest difference in logits of the merged and the unmerged model, relative to the largest logit.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # by the coarser of computation and file


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tuning leaves.

    Attributes:
        folder: where it is.
        complete: False if it was stopped and can be resumed.
        examples: that were learned from.
        held_out: examples kept apart.
        steps: of the training.
        tokens: answer tokens learned from, in all passes.
        before: cross entropy of held-out answers before, nats a token; None if there were too few examples.
        after: the same of the merged model that was written.
        difference: largest difference in logits between the merged and the unmerged model.
        seconds: time spent in steps.
    """

    folder: Path
    complete: bool
    examples: int = 0
    held_out: int = 0
    steps: int = 0
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
        ConfigError, DataError: bad input, found before training; nothing is left.
        TrainingError: the loss is not finite; the last good checkpoint is kept.
    """
    reporter = reporter or Reporter()
    check_folder(options.folder)
    job = _Job.check(options)
    template = pick_template(job.tokenizer, options.template)
    for source in options.data:
        if source not in NAMED:
            check_there(source, f"a file, a hub id (owner/name) or {', '.join(NAMED)}")
    with reporter.counter("tokenising") as progress:
        examples = read_examples(options.data, job.tokenizer, template, options.seq_len, options.rows, options.seed, progress)
    told = ", ".join(f"{count:,} {what}" for what, count in examples.about.items() if count)
    reporter.say(f"{len(examples):,} examples by the {template} template ({told})")
    with atomic_folder(options.folder) as temporary:
        save_text(temporary / TUNING, options.absolute().to_yaml())
        about = environment(job.device) | {"options": options.absolute().to_dict()} | job.base() | {"template": template}
        save_json(temporary / ENVIRONMENT, about | examples.about)
        save_tensors(temporary / EXAMPLES, examples.tensors())
    try:
        return job.train_and_finish(reporter)
    except ConfigError:  # what only the weights show, before training
        if not checkpoints(options.folder / "checkpoints"):
            shutil.rmtree(options.folder)
        raise


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
    began = read_object(folder / ENVIRONMENT)
    check_unchanged(folder / TUNING, began.get("options", {}), options.to_dict())
    if changed := [name for name, value in job.base().items() if began.get(name) != value]:
        raise ConfigError(
            f"fine-tuning {folder} began with another {changed[0]} ({began.get(changed[0])}, now {job.base()[changed[0]]}), so "
            "it cannot be gone on with; put it back, or start a new one."
        )
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
        tokenizer = source.tokenizer(config.vocab_size)
        if teacher is not None:
            size = teacher.config().vocab_size
            if size != config.vocab_size or teacher.tokenizer(size).get_vocab() != tokenizer.get_vocab():
                raise ConfigError(f"--teacher {teacher.name} has other tokens than the model; give one of the same tokenizer.")
        return cls(options, folder or options.folder, source, teacher, tokenizer, device)

    @property
    def dtype(self) -> torch.dtype:
        """The precision in use."""
        return pick_dtype(self.options.dtype, self.device)

    def base(self) -> dict[str, str]:
        """What a resumed fine-tuning must find as it was: weights and precision."""
        found = {"model": self.source.fingerprint(), "dtype": str(self.dtype).removeprefix("torch.")}
        return found if self.teacher is None else found | {"teacher": self.teacher.fingerprint()}

    def train_and_finish(self, reporter: Reporter) -> FinetuneResult:
        """Trains from where the folder stands, then merges and writes."""
        try:
            examples = Examples.from_tensors(load_file(self.folder / EXAMPLES))
        except (OSError, SafetensorError, LookupError, ValueError) as error:
            raise DataError(f"{self.folder / EXAMPLES} is damaged ({reason(error)}); start the fine-tuning again.") from error
        apart = min(HELD_OUT, len(examples) // 20)  # the last ones; their order is random
        training = len(examples) - apart
        reporter.say(f"loading {self.source.name} on {self.device}")
        tuning = self.begin(examples, training)
        files = tuning.files
        try:
            if checkpoints(self.folder / "checkpoints"):
                tuning.load(reporter.warn)
                reporter.say(f"going on from step {tuning.step} of {tuning.total}")
            else:
                with reporter.counter("loss of held-out answers") as progress:
                    tuning.before = tuning.held_out(tuning.model, progress)
                tuning.save()
            if tuning.run(reporter):
                return self.finish(tuning, files, reporter)
        except KeyboardInterrupt:  # the second Ctrl-C: the last checkpoint stands
            pass
        kept = checkpoints(self.folder / "checkpoints")
        at = int(kept[-1].name.removeprefix("step-")) if kept else 0
        reporter.say(f"stopped; the checkpoint of step {at} is kept. Go on with: nuteprune resume {self.folder}")
        return FinetuneResult(self.folder, complete=False)

    def begin(self, examples: Examples, training: int) -> Tuning:
        """Loads the models and checks them; nothing but the result holds them.

        Raises:
            ConfigError: a model that cannot be fine-tuned here.
        """
        model = self.source.model(self.device, self.dtype)
        files = weight_files(Path(self.source.where), model)
        teacher = None if self.teacher is None else self.teacher.model(self.device, self.dtype).requires_grad_(False)
        tuning = Tuning(self.options, self.folder, model, teacher, examples, training, self._pad, files)
        tuning.check_heads()
        return tuning

    @property
    def _pad(self) -> int:
        """A token to fill batches with; attention does not see it."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(i for i in ids if isinstance(i, int))

    def finish(self, tuning: Tuning, files: dict[Path, list[str]], reporter: Reporter) -> FinetuneResult:
        """Merges, writes model/ and compares it with what was trained."""
        ids, _, mask = tuning.examples.batch(list(range(min(4, len(tuning.examples)))), self._pad)
        wanted, changes = tuning.logits(tuning.model, ids, mask), tuning.changes()
        tuning.release()
        with atomic_folder(self.folder / MODEL) as folder:
            with reporter.counter("writing the merged model") as progress:
                write_like(Path(self.source.where), files, folder, changes, progress)
            written = Source.find(str(folder)).model(self.device, self.dtype)
            found = tuning.logits(written, ids, mask)
            difference, largest = float((found - wanted).abs().max()), float(wanted.abs().max())
            allowed = max(TOLERANCE.get(kind, 0.0) for kind in {self.dtype, *precisions(files)}) * max(largest, 1.0)
            if not difference <= allowed:
                raise ExportError(
                    f"the merged model differs from the trained one by up to {difference:.2e} in its logits (the largest is "
                    f"{largest:.1f}, allowed is {allowed:.2e}); nothing was written. Please report this with "
                    f"{self.folder / TUNING}."
                )
            with reporter.counter("loss of held-out answers") as progress:
                after = tuning.held_out(written, progress)
            result = FinetuneResult(
                self.folder, True, tuning.training, len(tuning.examples) - tuning.training, tuning.total, tuning.tokens,
                tuning.before, after, difference, tuning.seconds,
            )  # fmt: skip
            self.write_card(folder / "README.md", result)
        figures = {k: v for k, v in asdict(result).items() if k not in ("folder", "complete")}
        save_json(self.folder / RESULT, figures | {"dtype": str(self.dtype).removeprefix("torch.")})
        return result

    def write_card(self, path: Path, result: FinetuneResult) -> None:
        """Says in the model card what was done, and that the figures before it are older."""
        before = path.read_text(encoding="utf-8").rstrip() if path.is_file() else ""
        names = ", ".join(f"`{Path(name).name}`" for name in self.options.data)
        template = json.loads((self.folder / ENVIRONMENT).read_text(encoding="utf-8"))["template"]
        text = [
            "## Instruction fine-tuning",
            f"Fine-tuned by `nuteprune finetune` on {names}: {result.examples:,} examples by the {template} template, "
            f"{result.steps:,} steps of {self.options.batch_size}, loss on answers only"
            + (f", {100 * self.options.distill:g} % of it KL to `{self.teacher.name}`" if self.teacher else "")
            + ". Figures of quality above are those of the model before it.",
        ]
        if result.before is not None and result.after is not None:
            text.append(
                f"Cross entropy of {result.held_out:,} held-out answers: {result.before:.4f} before, {result.after:.4f} after "
                "(nats a token)."
            )
        save_text(path, "\n\n".join([*([before] if before else []), *text]) + "\n")


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

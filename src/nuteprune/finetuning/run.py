"""A fine-tuning from start to end: check, tokenise, train LoRA weights on answers, merge, compare, write.

The folder holds finetune.yaml, env.json, data/, metrics.jsonl, checkpoints/, model/ and result.json.
"""

from __future__ import annotations

import gc
import json
import math
import random
import shutil
import time
import warnings
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
from nuteprune.data import check_there
from nuteprune.environment import environment
from nuteprune.errors import ConfigError, ExportError, TrainingError
from nuteprune.evaluation.record import run_folder
from nuteprune.export.provenance import FILE as PROVENANCE
from nuteprune.files import atomic_folder, save_json, save_tensors, save_text
from nuteprune.finetuning.instructions import IGNORED, NAMED, Examples, pick_template, read_examples
from nuteprune.finetuning.loss import Answers, answer_loss
from nuteprune.finetuning.options import FinetuneOptions
from nuteprune.job import TUNING, check_folder, interruptible
from nuteprune.models import Source, pick_device, pick_dtype
from nuteprune.progress import MetricsFile, Reporter, duration

EXAMPLES, ENVIRONMENT, RESULT, MODEL = "data/examples.safetensors", "env.json", "result.json", "model"
HELD_OUT = 64  # most examples kept apart, for the loss before and after; a twentieth of them if that is less
WARMUP = 0.03
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf")  # endings of weight files
_PRECISIONS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Largest difference in logits of the merged and the unmerged model, relative to the largest logit.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # by the coarser of computation and file
GROUP = 16  # batches whose examples are put in order of length, so that little is padded


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
        save_json(temporary / ENVIRONMENT, environment(job.device) | job.base() | {"template": template} | examples.about)
        save_tensors(temporary / EXAMPLES, examples.tensors())
    try:
        return job.train_and_finish(reporter)
    except ConfigError:  # what only the weights show
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
    began = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    if changed := [name for name, value in job.base().items() if began[name] != value]:
        raise ConfigError(
            f"fine-tuning {folder} began with another {changed[0]} ({began[changed[0]]}, now {job.base()[changed[0]]}), so it "
            "cannot be gone on with; put it back, or start a new one."
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
        examples = Examples.from_tensors(load_file(self.folder / EXAMPLES))
        apart = min(HELD_OUT, len(examples) // 20)  # the last ones; their order is random
        training = len(examples) - apart
        reporter.say(f"loading {self.source.name} on {self.device}")
        tuning = self.begin(examples, training)
        files = tuning.files
        try:
            if checkpoints(self.folder / "checkpoints"):
                tuning.load()
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

    def begin(self, examples: Examples, training: int) -> _Tuning:
        """Loads the models and checks them; nothing but the result holds them.

        Raises:
            ConfigError: a model that cannot be fine-tuned here.
        """
        model = self.source.model(self.device, self.dtype)
        files = weight_files(Path(self.source.where), model)
        teacher = None if self.teacher is None else self.teacher.model(self.device, self.dtype).requires_grad_(False)
        tuning = _Tuning(self.options, self.folder, model, teacher, examples, training, self._pad, files)
        tuning.check_heads()
        return tuning

    @property
    def _pad(self) -> int:
        """A token to fill batches with; attention does not see it."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(i for i in ids if isinstance(i, int))

    def finish(self, tuning: _Tuning, files: dict[Path, list[str]], reporter: Reporter) -> FinetuneResult:
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
                r=options.lora_rank, lora_alpha=2 * options.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
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
            with self._half():
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
                found[f"{path}.weight"] = 2.0 * (b.float() @ a.float()).cpu()  # alpha is twice the rank
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


def weight_files(source: Path, model: PreTrainedModel) -> dict[Path, list[str]]:
    """The safetensors files of a model folder and the tensors in each, checked against the model.

    Raises:
        ConfigError: there are none, or they name other tensors than the model.
    """
    index = source / "model.safetensors.index.json"
    listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values() if index.is_file() else ["model.safetensors"]
    files: dict[Path, list[str]] = {}
    for path in (source / name for name in sorted(set(listed))):
        if not path.is_file():
            raise ConfigError(f"model {source} has no {path.name}; save its weights as safetensors.")
        with safe_open(path, framework="pt") as file:
            files[path] = list(file.keys())
    named = {name for names in files.values() for name in names}
    missing = {name for name, _ in model.named_parameters()} - named
    if other := sorted(named - set(model.state_dict())) or sorted(missing):
        raise ConfigError(
            f"model {source}: {other[0]} is not both in its files and in the model as transformers loads it; save it with this "
            "transformers version first."
        )
    return files


def precisions(files: dict[Path, list[str]]) -> set[torch.dtype]:
    """The precisions of the weights in files."""
    found = set()
    for path, names in files.items():
        with safe_open(path, framework="pt") as file:
            found |= {_PRECISIONS[file.get_slice(name).get_dtype()] for name in names}
    return found


def write_like(
    source: Path,
    files: dict[Path, list[str]],
    folder: Path,
    changes: dict[str, Tensor],
    progress: Callable[[int, int], None],
) -> None:
    """Writes a model folder again with changes to some weights: same files, names, shards and precision.

    Args:
        source: the model folder.
        files: its weight files (`weight_files`).
        folder: where to write.
        changes: what is added, by name, float32; the sum is rounded once. Other weights are copied as they are.
        progress: called with files written and their number.

    Raises:
        ExportError: a weight that is not finite.
    """
    for path in source.iterdir():
        other = path.suffix in _WEIGHTS or path.name.endswith(tuple(f"{s}.index.json" for s in _WEIGHTS if s != ".safetensors"))
        if path.is_file() and not other and path.name != PROVENANCE:
            shutil.copyfile(path, folder / path.name)
    for done, path in enumerate(files, 1):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in files[path]}
        for name in tensors.keys() & changes.keys():
            changed = (tensors[name].float() + changes[name]).to(tensors[name].dtype)
            if not bool(changed.isfinite().all()):
                raise ExportError(f"{name} has values that {changed.dtype} cannot hold; nothing was written.")
            tensors[name] = changed
        save_tensors(folder / path.name, tensors, metadata)
        progress(done, len(files))


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

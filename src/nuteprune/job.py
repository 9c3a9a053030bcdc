"""A whole pruning job: check, prepare the run folder, train, discretise, compact, check equality, write, evaluate.

Several processes can share a job (`processes`): all train, the main one does the rest.

The run folder holds config.yaml, env.json, data/, metrics.jsonl, checkpoints/, teachers/, masks.safetensors, model/,
result.json, and repaired.safetensors where weights were repaired.
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.arch import Arch
from nuteprune.checkpoint import checkpoints
from nuteprune.compact import Compactor
from nuteprune.config import PruneConfig
from nuteprune.data import SELF, Blocks, build_blocks, check_sources
from nuteprune.discretise import Discretiser
from nuteprune.environment import environment
from nuteprune.errors import ConfigError, TrainingError
from nuteprune.evaluation.perplexity import Perplexity, blocks_perplexity
from nuteprune.export.equality import check_equal
from nuteprune.export.hf import compact_config, is_stock, stock_config, write_folder
from nuteprune.files import atomic_folder, save_json, save_tensors, save_text, sweep, unwritable_parent
from nuteprune.masking import MaskedModel
from nuteprune.models import DTYPES, Source, describe, pick_device, pick_dtype, run_dtype
from nuteprune.option_values import check_unchanged, flag
from nuteprune.plan import make_discretiser, settled
from nuteprune.processes import Processes
from nuteprune.progress import MetricsFile, Reporter
from nuteprune.quantised import BITS, check_available, quantise
from nuteprune.repair import STAGE
from nuteprune.report.card import model_card
from nuteprune.report.facts import CONFIG, ENVIRONMENT, MASKS, METRICS, MODEL, RESULT, Figures, RunFacts, origin, read_object
from nuteprune.roles import LoraOptions
from nuteprune.sample import model_sampler
from nuteprune.tracking import Trackers, check_trackers
from nuteprune.trainer import Trainer

BLOCKS = "data/blocks.safetensors"
TUNING = "finetune.yaml"  # in the folder of a fine-tuning
HELD_OUT = 32  # most blocks set apart for perplexity before and after
HELD_OUT_NAME = "held-out blocks of the training text"
COMPARED = 2048  # most tokens on which the compact model is compared with the masked one, in up to 4 blocks


@dataclass(frozen=True)
class PruneResult:
    """What a job leaves.

    Attributes:
        run: the run folder.
        complete: False if the run was stopped and can be resumed.
        figures: what was measured; None while not complete, and in processes that are not the main one.
    """

    run: Path
    complete: bool
    figures: Figures | None = None

    @property
    def model(self) -> Path:
        """The exported model folder."""
        return self.run / MODEL


def prune(config: PruneConfig, reporter: Reporter | None = None) -> PruneResult:
    """Prunes a model from start to end.

    Args:
        config: the options.
        reporter: shows progress; a console on stderr by default.

    Returns:
        The run folder and the figures. On Ctrl-C a checkpoint is written and `complete` is False.

    Raises:
        ConfigError, DataError, ArchitectureError: bad input, found before any model work; nothing is written.
        TrainingError: the loss is not finite; the last good checkpoint is kept.
        ExportError: the compact model does not equal the masked one.
        DiskFullError: no room; what was written before is whole.
    """
    run = Path(config.out)
    with Processes.joined(config.device) as processes:
        reporter = _voice(reporter, processes)
        processes.on_main(lambda: check_folder(run))
        job = processes.together(lambda: _Job.check(config, processes))

        def begin() -> PreTrainedModel:
            with atomic_folder(run) as temporary:
                model = job.prepare(temporary, reporter) or job.load(reporter)
                check_folder(run)  # another run may have taken the place meanwhile
            return model

        with _memory_errors(config):
            begun = processes.on_main(begin)
            model = processes.together(lambda: begun or job.load(reporter))
            return job.train_and_finish(run, model, reporter)


def resume(run: str | Path, reporter: Reporter | None = None) -> PruneResult:
    """Goes on with a run from its last checkpoint, to the same weights as if it had never stopped.

    Args:
        run: the run folder.
        reporter: shows progress.

    Raises:
        ConfigError: the folder is not a run, or it is complete.
    """
    run = Path(run)
    if not (run / CONFIG).is_file() or not (run / BLOCKS).is_file():
        raise ConfigError(f"run {run} has no {CONFIG} or {BLOCKS}; give the folder that nuteprune prune --out wrote.")
    sweep(run)  # a kill in the last moment leaves something that nothing else comes to remove
    if (run / RESULT).is_file() and (run / MODEL).is_dir():
        raise ConfigError(f"run {run} is complete; its model is in {run / MODEL}.")
    config = PruneConfig.of_run(run / CONFIG)
    began = read_object(run / ENVIRONMENT) if (run / ENVIRONMENT).is_file() else {}  # a rehearsal has none
    if (parent := unwritable_parent(run / RESULT)) is not None:
        raise ConfigError(f"run {run} cannot be gone on with: {parent} is not a folder that can be written to.")
    if began:  # the precision that it had, also on another machine
        check_unchanged(run / CONFIG, began.get("options", {}), config.to_dict())
        config = config.replace(dtype=str(run_dtype(config, began)).removeprefix("torch."))
    with Processes.joined(config.device) as processes, _memory_errors(config):
        reporter = _voice(reporter, processes)
        job = processes.together(lambda: _Job.check(config, processes, data=False))
        if (was := began.get("fingerprint")) not in (None, now := job.source.fingerprint()):
            raise ConfigError(
                f"run {run} began with another model in {job.source.name} (fingerprint {was}, now {now}), so it cannot be gone "
                "on with; put it back, or start a new run."
            )
        model = processes.together(lambda: job.load(reporter))
        return job.train_and_finish(run, model, reporter)


def _voice(reporter: Reporter | None, processes: Processes) -> Reporter:
    """The reporter of this process: only the main one speaks."""
    return reporter or Reporter() if processes.main else Reporter(Console(quiet=True))


def check_folder(run: Path) -> None:
    """Refuses an output folder that holds something.

    Raises:
        ConfigError: it does, or it is a file.
    """
    if run.is_file():
        raise ConfigError(f"--out {run} is a file; give a folder that does not exist yet.")
    if run.absolute() == Path.cwd():
        raise ConfigError(f"--out {run} is the current folder; give a folder in it.")
    if run.is_dir() and any(run.iterdir()):
        hint = (
            f"go on with it by nuteprune resume {run}, or " if any((run / name).exists() for name in (CONFIG, TUNING)) else ""
        )
        raise ConfigError(f"--out {run} is not empty; {hint}give another folder.")
    if (parent := unwritable_parent(run)) is not None:
        raise ConfigError(f"--out {run} cannot be made: {parent} is not a folder that can be written to.")


def check_model(config: PruneConfig, source: Source) -> tuple[PruneConfig, PretrainedConfig, Arch]:
    """The options as this model settles them, its configuration and its description; no weights are read.

    Raises:
        ConfigError: an option that this model does not allow, or the model cannot be found.
        ArchitectureError: the family is not supported.
    """
    dense, arch = describe(source)
    config = settled(config, arch)
    discretiser = make_discretiser(config, arch)
    discretiser.check(config.sparsity)
    if config.uniform:
        check_stock(config, discretiser, dense)
    LoraOptions(config.lora_rank, config.alpha, config.lora_targets).modules(arch)
    longest = getattr(dense, "max_position_embeddings", None)
    if longest is not None and config.seq_len > longest:
        raise ConfigError(f"{flag('seq_len')} got {config.seq_len}; this model reads at most {longest} tokens.")
    return config, dense, arch


def check_stock(config: PruneConfig, discretiser: Discretiser, dense: PretrainedConfig) -> None:
    """Refuses uniform widths that no stock class can have.

    Raises:
        ConfigError: names the widths, or the kind of unit of which a stock class cannot have fewer.
    """
    allowed, shape = discretiser.allowed, discretiser.shape
    family = allowed.arch.spec.model_type
    if shape is not None:
        widths = allowed.uniform_counts(shape.units)
        if stock_config(dense, allowed.arch, widths) is None:
            raise ConfigError(
                f"--target-shape got {','.join(config.target_shape)}; no stock class of the {family} family "
                "takes these widths. Try a hidden size that the heads divide, keep all heads, or prune by --sparsity."
            )
        return
    for kind in config.prune:
        if stock_config(dense, allowed.arch, allowed.uniform_counts(allowed.one_step_less(kind))) is None:
            raise ConfigError(
                f"--uniform got --prune {kind}; the {family} family's stock class cannot have fewer of these. "
                "Prune other units, or leave --uniform out."
            )


def compared_text(blocks: Blocks) -> torch.Tensor:
    """Token ids [blocks, tokens] on which a compact model is compared: of the held-out text, or the training text."""
    most = min(4, max(1, COMPARED // blocks.seq_len))
    return blocks.sample(most, "held_out" if blocks.held_out else "train")[:, :COMPARED]


def pick_save_dtype(name: str, dense: PretrainedConfig) -> torch.dtype:
    """The precision of `--save-dtype`; auto is that of the input checkpoint."""
    own = str(getattr(dense, "dtype", None)).removeprefix("torch.")
    return DTYPES.get(own, torch.float32) if name == "auto" else DTYPES[name]


@contextmanager
def _memory_errors(config: PruneConfig) -> Iterator[None]:
    """Says what to do when the device's memory is full."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            "the device's memory is full; give --gradient-checkpointing (in config.yaml of a run that has checkpoints, which "
            f"then goes on with nuteprune resume), or start anew with a lower --batch-size (now {config.batch_size}) or "
            f"--seq-len (now {config.seq_len}), or, if it was full in the {STAGE}, with fewer --repair-batches."
        ) from error


@contextmanager
def interruptible(reporter: Reporter) -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C (and SIGTERM) into a request to stop after the step; a second Ctrl-C ends at once.

    SIGTERM is never the second one: where a launcher passes on a Ctrl-C, processes in its terminal have heard it already.

    Yields:
        A function that says whether a stop was asked for.
    """
    asked = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        reporter.say("stopping after this step; a checkpoint will be written (Ctrl-C again to stop at once)")

    before: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread: signals stay with the caller
        pass
    try:
        yield lambda: asked
    finally:
        for caught, old in before.items():
            signal.signal(caught, old)


@dataclass(frozen=True)
class _Job:
    """A checked job: everything known before the weights are read."""

    config: PruneConfig
    source: Source
    dense: PretrainedConfig
    arch: Arch
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    processes: Processes

    @classmethod
    def check(cls, config: PruneConfig, processes: Processes, data: bool = True) -> _Job:
        """Every check that needs no weights."""
        processes.check(config)
        device = pick_device(processes.place(config.device))
        check_trackers(config.track)
        check_available(config.load_in)
        if data:
            check_sources(config.data, config.text_key)
        source = Source.find(config.model)
        config, dense, arch = check_model(config, source)
        return cls(config, source, dense, arch, source.tokenizer(arch.dims.vocab), device, processes)

    @property
    def save_dtype(self) -> torch.dtype:
        """Precision of the exported weights."""
        return pick_save_dtype(self.config.save_dtype, self.dense)

    def load(self, reporter: Reporter) -> PreTrainedModel:
        """The intact model."""
        dtype, bits = pick_dtype(self.config.dtype, self.device), self.config.load_in
        reporter.say(f"loading {self.source.name} on {self.device}" + (f" in {bits}" if bits in BITS else ""))
        if bits in BITS:
            return quantise(self.source.model(torch.device("cpu"), dtype), self.arch, bits, self.device)
        return self.source.model(torch.device("cpu") if self.processes.sharded else self.device, dtype)

    def fold_into_whole_weights(self, trainer: Trainer) -> None:
        """Gives a trainer of a quantised or parted base the whole weights, read again, under the same masks and LoRA weights.

        They lie on the CPU, since the GPU may have no room for them.
        """
        assert trainer.masks is not None
        lora = trainer.masked.lora_copy()
        if not self.processes.sharded:
            trainer.masked.release()
        model = self.source.model(torch.device("cpu"), pick_dtype(self.config.dtype, self.device))
        trainer.masked = MaskedModel(model, self.arch, self.config.prune, trainer.lora_options)
        trainer.masked.load_lora(lora)
        trainer.masked.set_masks(trainer.masks)

    def prepare(self, folder: Path, reporter: Reporter) -> PreTrainedModel | None:
        """Writes config.yaml, env.json and the token blocks; returns the model if it was needed to sample text."""
        config = self.config
        model: PreTrainedModel | None = None

        def sample(wanted: int) -> Iterator[list[int]]:
            nonlocal model
            model = self.load(reporter)
            yield from model_sampler(model, self.tokenizer, folder / "data/self.jsonl", config.seed, progress)(wanted)

        save_text(folder / CONFIG, config.to_yaml())
        about = environment(self.device) | {"options": config.to_dict()}
        about |= {"processes": self.processes.count, "fingerprint": self.source.fingerprint()}
        save_json(folder / ENVIRONMENT, about | origin(self.source, config.data))
        with reporter.counter("sampling text from the model" if SELF in config.data else "tokenising") as progress:
            build_blocks(
                folder / BLOCKS,
                config.data,
                self.tokenizer,
                seq_len=config.seq_len,
                blocks=config.blocks,
                held_out=HELD_OUT,
                least=config.batch_size,
                seed=config.seed,
                text_key=config.text_key,
                sample=sample,
            )
        return model

    def train_and_finish(self, run: Path, model: PreTrainedModel, reporter: Reporter) -> PruneResult:
        """Trains from where the run stands, then exports and evaluates."""
        shared = self.processes
        blocks = shared.together(lambda: Blocks.open(run / BLOCKS))
        trainer = shared.together(
            lambda: Trainer(
                self.config, model, self.arch, blocks, run, reporter.warn, counter=reporter.counter, processes=shared
            )
        )
        try:
            if shared.any(shared.main and bool(checkpoints(run / "checkpoints"))):
                trainer.load()
                reporter.say(f"going on from step {trainer.state.step} of {trainer.total}")
            else:
                trainer.start()
            if self.train(run, trainer, reporter):
                figures = self.processes.on_main(lambda: self.finish(run, trainer, reporter))
                return PruneResult(run, True, figures)
        except KeyboardInterrupt:  # before or after the steps, or the second Ctrl-C: the last checkpoint stands
            pass
        reporter.say(f"stopped at step {trainer.state.step}; go on with: nuteprune resume {run}")
        return PruneResult(run, complete=False)

    def train(self, run: Path, trainer: Trainer, reporter: Reporter) -> bool:
        """The steps; whether they are complete."""
        writers = self.processes.on_main(
            lambda: (MetricsFile(run / METRICS, trainer.state.step), Trackers(self.config, run, reporter.warn))
        )

        def log(line: dict[str, Any]) -> None:
            if writers is not None:
                metrics, trackers = writers
                metrics.add(line)
                trackers.log(line)
            reporter.step(line, trainer.total)

        try:
            with interruptible(reporter) as stop:
                return trainer.run(log, stop)
        finally:
            if writers is not None:
                writers[1].close()
            reporter.close()

    def finish(self, run: Path, trainer: Trainer, reporter: Reporter) -> Figures:
        """Compacts, compares, evaluates, writes model/ and result.json."""
        if trainer.masked.rigid:
            self.fold_into_whole_weights(trainer)
        masked, masks, blocks = trainer.masked, trainer.masks, trainer.blocks
        assert masks is not None
        apart = blocks.read(list(range(blocks.held_out)), "held_out").to(masked.device) if blocks.held_out else None
        dense = None
        if apart is not None:
            with reporter.counter("perplexity of the dense model") as progress, masked.role(None, None):
                dense = blocks_perplexity(masked.logits, apart, HELD_OUT_NAME, progress)
        compared = compared_text(blocks).to(masked.device)
        with reporter.counter("comparing compact with masked"):
            equality = check_equal(masked, masks, self.dense, compared)
        reporter.say(
            f"compact equals masked: largest logit difference {equality.exact:.2e} in float64 over {equality.exact_tokens:,} "
            f"tokens, {equality.largest:.2e} in float32 over {equality.tokens:,}"
        )
        facts = RunFacts.read(run)  # a file of the run that cannot be read is found before the export
        compactor = Compactor(masked, masks, self.save_dtype)
        generation = masked.model.generation_config
        if self.config.uniform and not is_stock(compact_config(self.dense, self.arch, compactor.counts)):
            reporter.warn(
                f"no stock class of the {self.arch.spec.model_type} family takes these widths (hidden size and heads do not "
                "divide), so the model carries its own code; --target-shape with a hidden size that divides avoids it"
            )
        with write_folder(run / MODEL, compactor, self.dense, self.tokenizer, generation) as folder:
            masked.release()  # from here on the written files speak for themselves
            trainer.lora_optimizer.state.clear()
            compact = Source.find(str(folder)).model(masked.device, self.save_dtype)
            reporter.say(
                f"the result is a {type(compact).__name__}" + ("" if is_stock(compact.config) else ", with its own code")
            )
            pruned: Perplexity | None = None
            if apart is not None:
                with reporter.counter("perplexity of the pruned model") as progress:
                    pruned = blocks_perplexity(
                        lambda x: compact(input_ids=x, use_cache=False).logits, apart, HELD_OUT_NAME, progress
                    )
            figures = Figures(
                blocks_before=trainer.size.full,
                blocks_after=trainer.size.of_masks(masks),
                total_before=self.arch.total,
                total_after=sum(p.numel() for p in compact.parameters()),
                file_bytes=sum(p.stat().st_size for p in folder.glob("*.safetensors")),
                dtype=str(self.save_dtype).removeprefix("torch."),
                model_class=type(compact).__name__,
                own_code=not is_stock(compact.config),
                equality=equality,
                dense=dense,
                pruned=pruned,
                tokens=trainer.state.tokens,
                seconds=trainer.state.seconds,
                head_bias=trainer.state.head_bias,
                gradient_jumps=trainer.state.jumps,
                recovery_losses=trainer.state.recovery_losses,
            )
            facts = dataclasses.replace(facts, figures=figures, masks=masks, masks_of="the pruned model")
            save_text(folder / "README.md", model_card(facts))
        save_tensors(run / MASKS, masks.tensors())
        save_json(run / RESULT, figures.to_dict())
        return figures

"""Turning what a run holds into files that other programs load: Hugging Face folders, GGUF files, peft adapters.

Everything that can be refused is refused before the base model is read. Each model but an adapter is compared with the masked
model that it was trained as before its file takes the place of an older one.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nuteprune.arch import Arch
from nuteprune.compact import Compactor, checked_counts
from nuteprune.config import PruneConfig
from nuteprune.data import Blocks
from nuteprune.errors import ConfigError, ExportError, reason
from nuteprune.export import llama_program, llamacpp
from nuteprune.export.adapter import adapter_options, is_adapter, write_adapter
from nuteprune.export.beside import check_reading, run_beside
from nuteprune.export.equality import Equality, check_equal
from nuteprune.export.hf import compact_shapes, stock_config, write_folder
from nuteprune.export.options import K_TYPES, PLAIN, SHARD, ExportOptions, parse_size
from nuteprune.export.provenance import may_replace, write_provenance
from nuteprune.files import atomic_file, atomic_folder, save_text, unwritable_parent
from nuteprune.job import BLOCKS, check_model, compared_text, pick_save_dtype
from nuteprune.masking import MaskedModel
from nuteprune.masks import Counts, Masks
from nuteprune.models import Source, pick_device, run_dtype
from nuteprune.passage import PASSAGE
from nuteprune.progress import Reporter
from nuteprune.report.card import model_card
from nuteprune.report.exported import exported_facts
from nuteprune.report.facts import CONFIG, RunFacts
from nuteprune.roles import LoraOptions
from nuteprune.snapshots import SAME, Run, Stored
from nuteprune.teachers import INTACT

LOOKED_AT = 64  # tokens on which a GGUF file is compared by llama.cpp


@dataclass(frozen=True)
class Exported:
    """A model that was written.

    Attributes:
        path: its folder or file.
        stored: what it was made from.
        sparsity: share of block parameters that its masks remove.
        parameters: of the whole model as written; of an adapter its LoRA weights.
        file_bytes: size of the file, or of the safetensors files.
        equality: comparison with the masked model; None for an adapter.
        notes: what the user should know.
    """

    path: Path
    stored: Stored
    sparsity: float
    parameters: int
    file_bytes: int
    equality: Equality | None
    notes: tuple[str, ...]


def export_run(run: str | Path, options: ExportOptions | None = None, reporter: Reporter | None = None) -> list[Exported]:
    """Writes models of a run in a format.

    Args:
        run: a run folder, or an adapter folder that an earlier call wrote.
        options: what to write and where.
        reporter: shows progress; a console on stderr by default.

    Returns:
        What was written, in the order asked for. Stopping it leaves what was there before, whole.

    Raises:
        ConfigError, ArchitectureError: bad input, found before the base model is read.
        ExportError: a model that the format cannot hold, or that does not equal the masked one.
    """
    options, reporter = options or ExportOptions(), reporter or Reporter()
    options.check()
    try:
        return _checked(Path(run), options, reporter).write_all()
    except (OSError, SafetensorError) as error:
        where = options.out or Path(run) / "export"
        raise ExportError(f"--out {where} cannot be written: {reason(error)}; older exports are as they were.") from error
    except torch.OutOfMemoryError as error:
        raise ExportError("the device's memory is full; give --device cpu. Older exports are as they were.") from error


@dataclass(frozen=True)
class _Plan:
    """A model to write, checked.

    Attributes:
        stored: what it is made from.
        path: where it goes.
        masks: its masks.
        counts: widths of the model written; more than are left where zeros fill layers up.
        architecture: llama.cpp's, for a GGUF file.
        notes: what the user should know.
    """

    stored: Stored
    path: Path
    masks: Masks
    counts: Counts
    architecture: llamacpp.Architecture | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Job:
    """A checked export: everything known before the weights are read."""

    run: Run
    facts: RunFacts
    options: ExportOptions
    source: Source
    dense: PretrainedConfig
    arch: Arch
    tokenizer: PreTrainedTokenizerBase
    fields: list[Any]  # the tokenizer's keys of a GGUF file
    plans: list[_Plan]
    reporter: Reporter

    @property
    def config(self) -> PruneConfig:
        """The run's options."""
        return self.run.config

    def write_all(self) -> list[Exported]:
        """Reads the base model once and writes one model after the other."""
        if self.options.format == "adapter":
            return [self.said(self.write_adapter(plan)) for plan in self.plans]
        device = pick_device(self.options.device)
        self.reporter.say(f"loading {self.source.name} on {device}")
        model = self.source.model(device, run_dtype(self.config, self.facts.environment))
        lora = LoraOptions(self.config.lora_rank, self.config.alpha, self.config.lora_targets, self.config.seed)
        masked = MaskedModel(model, self.arch, self.config.prune, lora)
        text = self.text()
        write = self.write_gguf if self.options.format == "gguf" else self.write_folder
        written = []
        for plan in self.plans:
            snapshot = self.run.read(plan.stored)
            masked.load_lora({n: torch.zeros_like(p) for n, p in masked.lora.items()} if snapshot is None else snapshot.lora)
            masked.forget_repair()
            masked.repair({} if snapshot is None else snapshot.repaired)
            written.append(self.said(write(plan, masked, text)))
        return written

    def said(self, made: Exported) -> Exported:
        """Tells the user of a model that was written."""
        for note in made.notes:
            self.reporter.say(f"note: {note}")
        self.reporter.say(f"wrote {made.path} ({made.file_bytes / 1e6:.1f} MB)")
        return made

    def text(self) -> Tensor:
        """Token ids [blocks, tokens] on which models are compared: the run's text, or a passage where it is not there."""
        if not (self.run.folder / BLOCKS).is_file():
            ids = list(self.tokenizer(PASSAGE * 4, add_special_tokens=False)["input_ids"])
            return torch.tensor([ids[: min(256, self.dense.max_position_embeddings)]])
        blocks = Blocks.open(self.run.folder / BLOCKS)
        return compared_text(blocks)

    def compared(self, plan: _Plan, masked: MaskedModel, text: Tensor) -> Equality:
        """Compares the model to be written with the masked one."""
        with self.reporter.counter(f"comparing {plan.stored.name} with the masked model"):
            return check_equal(masked, plan.masks, self.dense, text, fill=plan.counts)

    def exported(self, plan: _Plan, size: int, equality: Equality | None, notes: tuple[str, ...]) -> Exported:
        """The result of a plan."""
        parameters = elements(self.arch, plan.counts)
        return Exported(plan.path, plan.stored, plan.stored.sparsity, parameters, size, equality, notes)

    def write_folder(self, plan: _Plan, masked: MaskedModel, text: Tensor) -> Exported:
        """A Hugging Face folder with its card."""
        options, equality = self.options, self.compared(plan, masked, text)
        dtype = pick_save_dtype(options.dtype or self.config.save_dtype, self.dense)
        compactor = Compactor(masked, plan.masks, dtype, plan.counts)
        most = parse_size(options.max_shard_size or SHARD)
        generation = masked.model.generation_config
        with (
            self.reporter.counter(f"writing {plan.path.name}") as progress,
            write_folder(plan.path, compactor, self.dense, self.tokenizer, generation, most, progress) as folder,
        ):
            size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
            facts = exported_facts(
                self.facts, plan.stored, plan.masks, plan.counts, self.arch, self.dense, equality, dtype, size, plan.notes
            )
            save_text(folder / "README.md", model_card(facts))
            about = plan.stored
            write_provenance(folder, format=options.format, record=about.record, sparsity=about.sparsity, step=about.step)
        return self.exported(plan, size, equality, plan.notes)

    def write_gguf(self, plan: _Plan, masked: MaskedModel, text: Tensor) -> Exported:
        """A GGUF file, quantised and looked at by llama.cpp where it is there."""
        from nuteprune.export.gguf import other_types, write_gguf

        assert plan.architecture is not None
        outtype, equality = self.options.outtype or "f16", self.compared(plan, masked, text)
        by_llama = outtype not in PLAIN and llama_program.installed()
        compactor = Compactor(masked, plan.masks, torch.float32, plan.counts)
        name = f"{Path(self.source.name).name}, {100 * plan.stored.sparsity:.1f} % of its blocks pruned"
        notes = list(plan.notes)
        with atomic_file(plan.path) as temporary:
            floats = temporary.with_name(f"{temporary.name}.f32")
            into, first = (floats, "f32") if by_llama else (temporary, outtype)
            with self.reporter.counter(f"writing {plan.path.name}") as progress:
                write_gguf(into, compactor, self.dense, plan.architecture, self.fields, first, name, progress)
            if by_llama:
                with self.reporter.counter(f"llama.cpp quantises to {outtype}"):
                    llama_program.quantise(floats, temporary, outtype)
            elif outtype not in PLAIN:
                notes.append(
                    f"llama.cpp's package is not installed, so the gguf package quantised all weights to {outtype} alike; "
                    "llama.cpp keeps the head in a better type (pip install 'nuteprune[gguf]')"
                )
            if left := other_types(temporary, outtype):
                notes.append(_rows_note(left, outtype))
            if llama_program.installed():
                notes.append(self.looked_at(temporary, floats if by_llama else None, plan, masked, text, outtype))
            size = temporary.stat().st_size
        return self.exported(plan, size, equality, tuple(notes))

    def looked_at(self, path: Path, floats: Path | None, plan: _Plan, masked: MaskedModel, text: Tensor, outtype: str) -> str:
        """Runs a file in llama.cpp, and the float32 file that it was quantised from, if it was; says how near it is.

        Raises:
            ExportError: see `beside.run_beside` and `beside.check_reading`.
        """
        from nuteprune.export.gguf_tokenizer import is_pieces

        ids = text.flatten()[:LOOKED_AT].tolist()
        with self.reporter.counter("llama.cpp runs the file"):
            if self.source.gguf_file is None:  # else the tokenizer was copied
                check_reading(path, self.tokenizer, is_pieces(self.fields))
            if floats is not None:
                run_beside(floats, masked, plan.masks, ids, "f32")
            largest, same = run_beside(path, masked, plan.masks, ids, outtype)
        return (
            f"llama.cpp's logits differ from the masked model's by up to {largest:.2e} over {len(ids)} tokens; the likeliest "
            f"token is the same after {100 * same:.0f} % of them"
        )

    def write_adapter(self, plan: _Plan) -> Exported:
        """Masks and LoRA weights."""
        snapshot = self.run.read(plan.stored)
        assert snapshot is not None
        with atomic_folder(plan.path) as folder:
            write_adapter(folder, self.run.folder, snapshot, self.config, self.arch)
            size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        parameters = sum(t.numel() for t in snapshot.lora.values())
        return Exported(plan.path, plan.stored, plan.stored.sparsity, parameters, size, None, plan.notes)


def _checked(folder: Path, options: ExportOptions, reporter: Reporter) -> _Job:
    """Every check that needs no weights, and what is to be written."""
    if not (folder / CONFIG).is_file():
        raise ConfigError(
            f"run {folder} has no {CONFIG}; give the folder that nuteprune prune --out (or export --format adapter) wrote."
        )
    pick_device(options.device)
    config = PruneConfig.of_run(folder / CONFIG)
    source = Source.find(config.model)
    config, dense, arch = check_model(config, source)
    if is_adapter(folder):
        config = adapter_options(folder, config, arch)
    run = Run.open(folder, config, arch)
    asked: dict[Stored, float | None] = {}
    for share in options.sparsity or (None,):
        asked.setdefault(run.pick(share), share)  # of two that come to one model, the first
    tokenizer = source.tokenizer(arch.dims.vocab)
    paths = _paths(run, options, source, list(asked))
    fields: list[Any] = []
    if options.format == "gguf":
        from nuteprune.export.gguf_tokenizer import tokenizer_fields

        fields = tokenizer_fields(source, tokenizer, dense, options.tokenizer_pre)
    plans = []
    for (stored, share), path in zip(asked.items(), paths, strict=True):
        masks = run.masks(stored, arch)
        counts, architecture, notes = _layout(options, arch, dense, stored, masks)
        if share is not None and abs(stored.wanted - share) > SAME:
            notes = (
                f"--sparsity {share:g}: the nearest denser model of this run is {stored.name}, {stored.sparsity:.4f}",
                *notes,
            )
        if is_adapter(folder):
            notes = (*notes, "made from an adapter, which may have been trained on; what is said of training is the run's")
        plans.append(_Plan(stored, path, masks, counts, architecture, notes))
    facts = dataclasses.replace(RunFacts.read(folder), config=config)
    return _Job(run, facts, options, source, dense, arch, tokenizer, fields, plans, reporter)


def _paths(run: Run, options: ExportOptions, source: Source, wanted: list[Stored]) -> list[Path]:
    """Where the models go.

    Raises:
        ConfigError: a place that cannot be written to, or that holds something else.
    """
    gguf = options.format == "gguf"
    kind = (options.outtype or "f16") if gguf else "-".join(filter(None, (options.format, options.dtype)))
    every = [s.label for s in run.stored]  # a name is one model's, whichever are written at once
    labels = [s.label if every.count(s.label) == 1 or s.record < 1 else f"{s.label}-record-{s.record}" for s in wanted]
    parent = options.out or run.folder / "export"
    paths = [parent / f"sparsity-{label}-{kind}{'.gguf' if gguf else ''}" for label in labels]
    if options.out is not None and len(options.sparsity) < 2:
        paths = [options.out]
    own = [(Path(source.where) / (source.gguf_file or "")).resolve()] if source.local else []
    for path in paths:
        if gguf and path.suffix != ".gguf":
            raise ConfigError(f"--out {path}: the name of a GGUF file ends with .gguf.")
        if gguf and path.is_dir():
            raise ConfigError(f"--out {path} is a folder; give a file name.")
        if path.resolve() in (run.folder.resolve(), Path.cwd(), *own):
            raise ConfigError(f"--out {path} is the run, the base model or the current folder; give another place.")
        if not may_replace(path) or (not gguf and path.is_file()):
            raise ConfigError(f"--out {path} holds something that nuteprune export did not write; give another place.")
        if (above := unwritable_parent(path)) is not None:
            raise ConfigError(f"--out {path} cannot be made: {above} is not a folder that can be written to.")
    return [path.resolve() if path.is_symlink() else path for path in paths]


def _layout(
    options: ExportOptions, arch: Arch, dense: PretrainedConfig, stored: Stored, masks: Masks
) -> tuple[Counts, llamacpp.Architecture | None, tuple[str, ...]]:
    """Widths of a model in its format, llama.cpp's architecture for a GGUF file, and what the user should know.

    Raises:
        ConfigError: there is nothing to write.
        ExportError: the format cannot hold it.
    """
    left = checked_counts(arch, masks)
    if options.format == "gguf":
        choice = llamacpp.choose(arch, dense, left)
        cost = () if choice.counts == left else (f"the zeros are {_more(arch, left, choice.counts)} than --format hf",)
        return choice.counts, choice.architecture, (*choice.notes, *cost)
    if options.format == "adapter" and stored.record == INTACT:
        raise ConfigError("--sparsity 0 is the intact model, which has no masks and LoRA weights; leave it out of an adapter.")
    if options.format != "hf-uniform":
        return left, None, ()
    widths = left if left.uniform else left.widest
    if stock_config(dense, arch, widths) is None:
        raise ExportError(
            f"no stock class of the {arch.spec.model_type} family takes these widths (hidden size {widths.hidden}); write "
            "--format hf, or prune with --uniform and other roundings."
        )
    if widths == left:
        return widths, None, ()
    if widths.is_dense(arch.dims):
        raise ExportError(
            "the layers of this model differ so much that a stock class, which has one width for all, would be as large as the "
            "dense model; prune with --uniform, or write --format hf."
        )
    note = (
        f"zeros fill all layers up to the widest, so that a stock class holds them: {_more(arch, left, widths)} than --format "
        "hf. A run with --uniform has no such cost"
    )
    return widths, None, (note,)


def _more(arch: Arch, left: Counts, widths: Counts) -> str:
    """What filling up costs, in words."""
    more = elements(arch, widths) - elements(arch, left)
    return f"{more:,} parameters more ({100 * more / elements(arch, left):.2f} %)"


def _rows_note(left: list[Any], outtype: str) -> str:
    """What is said of weights that could not be quantised as asked for."""
    rows, types = sorted({u.row for u in left}), sorted({u.type for u in left})
    places: dict[str, list[str]] = {}
    for weight in left:
        _, layer, what = weight.name.split(".", 2) if weight.name.startswith("blk.") else ("", "", weight.name)
        places.setdefault(what.removesuffix(".weight"), []).append(layer)
    names = "; ".join(what + (f" of layers {', '.join(layers)}" if layers != [""] else "") for what, layers in places.items())
    return (
        f"{len(left)} weights are {', '.join(types)} instead: their rows (of {', '.join(map(str, rows))}) do not divide "
        f"into the blocks of {outtype}: {names}. Rows have the hidden size, the intermediate size, or heads x head_dim; "
        f"--round-hidden, --round-intermediate and --round-heads in multiples of {256 if outtype in K_TYPES else 32} avoid it"
    )


def elements(arch: Arch, counts: Counts) -> int:
    """Parameters of a compact model of these widths."""
    return sum(math.prod(shape) for shape in compact_shapes(arch, counts).values())

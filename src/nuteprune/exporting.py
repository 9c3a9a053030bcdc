"""Turning what a run holds into files that other programs load: Hugging Face folders, GGUF files, peft adapters.

Everything that can be refused is refused before the base model is read. Each model is compared with the masked model that
it was trained as before its file takes the place of an older one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nuteprune.arch import Arch
from nuteprune.compact import Compactor, checked_counts
from nuteprune.config import PruneConfig
from nuteprune.data import Blocks
from nuteprune.errors import ConfigError, ExportError
from nuteprune.export import llama_program, llamacpp
from nuteprune.export.adapter import is_adapter, read_adapter, write_adapter
from nuteprune.export.beside import check_reading, run_beside
from nuteprune.export.hf import Equality, check_equal, compact_config, compact_shapes, is_stock, stock_config, write_folder
from nuteprune.export.options import K_TYPES, PLAIN, SHARD, ExportOptions, parse_size
from nuteprune.files import atomic_file, atomic_folder, save_text, unwritable_parent
from nuteprune.job import BLOCKS, COMPARED, check_model, pick_save_dtype
from nuteprune.masking import LoraOptions, MaskedModel
from nuteprune.masks import Counts, Masks
from nuteprune.models import Source, pick_device, pick_dtype
from nuteprune.progress import Reporter
from nuteprune.report.card import model_card
from nuteprune.report.facts import CONFIG, Figures, RunFacts
from nuteprune.size import BlockSize
from nuteprune.snapshots import FINAL, Run, Stored
from nuteprune.teachers import Snapshot

LOOKED_AT = 64  # tokens on which a GGUF file is compared by llama.cpp


@dataclass(frozen=True)
class Exported:
    """A model that was written.

    Attributes:
        path: its folder or file.
        stored: what it was made from.
        sparsity: share of block parameters that its masks remove.
        parameters: of the whole model as written.
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
    job = _Export.check(Path(run), options, reporter)
    return job.write_all()


@dataclass(frozen=True)
class _Plan:
    """A model to write, checked.

    Attributes:
        stored: what it is made from.
        path: where it goes.
        masks: its masks.
        step: the step of the run that it was taken at.
        counts: widths of the model written; more than are left where zeros fill layers up.
        architecture: llama.cpp's, for a GGUF file.
        notes: what the user should know.
    """

    stored: Stored
    path: Path
    masks: Masks
    step: int
    counts: Counts
    architecture: llamacpp.Architecture | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Export:
    """A checked export: everything known before the weights are read."""

    folder: Path
    run: Run
    options: ExportOptions
    config: PruneConfig
    source: Source
    dense: PretrainedConfig
    arch: Arch
    tokenizer: PreTrainedTokenizerBase
    fields: list[Any]  # the tokenizer's keys of a GGUF file
    plans: list[_Plan]
    reporter: Reporter

    @classmethod
    def check(cls, folder: Path, options: ExportOptions, reporter: Reporter) -> _Export:
        """Every check that needs no weights."""
        if not (folder / CONFIG).is_file():
            raise ConfigError(
                f"run {folder} has no {CONFIG}; give the folder that nuteprune prune --out (or export --format adapter) wrote."
            )
        pick_device(options.device)
        config = PruneConfig.of_run(folder / CONFIG)
        source = Source.find(config.model)
        config, dense, arch = check_model(config, source)
        run = Run(folder, config, (Stored(FINAL, config.sparsity),)) if is_adapter(folder) else Run.open(folder, config)
        wanted = list(dict.fromkeys(run.pick(s) for s in options.sparsity or (None,)))
        for asked in options.sparsity:
            if abs((found := run.pick(asked)).sparsity - asked) > 1e-6:
                reporter.say(f"--sparsity {asked:g}: the nearest denser model of this run is {found.name}, {found.sparsity:g}")
        tokenizer = source.tokenizer(arch.dims.vocab)
        made = cls(folder, run, options, config, source, dense, arch, tokenizer, [], [], reporter)
        paths = made.paths(wanted)
        if options.format == "gguf":
            from nuteprune.export.gguf_tokenizer import tokenizer_fields

            made.fields.extend(tokenizer_fields(source, tokenizer, dense, options.tokenizer_pre))
        made.plans.extend(made.plan(stored, path) for stored, path in zip(wanted, paths, strict=True))
        return made

    def paths(self, wanted: list[Stored]) -> list[Path]:
        """Where the models go.

        Raises:
            ConfigError: a place that cannot be written to, or that holds something else.
        """
        options, gguf = self.options, self.options.format == "gguf"
        kind = (options.outtype or "f16") if gguf else options.format
        names = [f"sparsity-{100 * stored.sparsity:g}-{kind}{'.gguf' if gguf else ''}" for stored in wanted]
        if options.out is None or len(wanted) > 1:
            parent = options.out or self.folder / "export"
            paths = [parent / name for name in names]
        else:
            paths = [options.out]
        for path in paths:
            if gguf and path.suffix != ".gguf":
                raise ConfigError(f"--out {path}: the name of a GGUF file ends with .gguf.")
            if gguf and path.is_dir():
                raise ConfigError(f"--out {path} is a folder; give a file name.")
            if not gguf and _is_foreign(path):
                raise ConfigError(f"--out {path} holds something that is not an exported model; give another folder.")
            if path.resolve() == self.folder.resolve() or path.resolve() == Path.cwd():
                raise ConfigError(f"--out {path} is the run itself or the current folder; give another folder.")
            if (above := unwritable_parent(path)) is not None:
                raise ConfigError(f"--out {path} cannot be made: {above} is not a folder that can be written to.")
        return paths

    def read(self, stored: Stored) -> Snapshot | None:
        """Masks and LoRA weights of a stored model; None for the intact one."""
        if not is_adapter(self.folder):
            return self.run.read(stored)
        return Snapshot(FINAL, stored.sparsity, 0, *read_adapter(self.folder))

    def plan(self, stored: Stored, path: Path) -> _Plan:
        """A model to write: which widths, and whether the format can hold it.

        Raises:
            ConfigError: there is nothing to write.
            ExportError: the format cannot hold it.
        """
        snapshot = self.read(stored)
        if snapshot is None and self.options.format == "adapter":
            raise ConfigError(
                "--sparsity 0 is the intact model, which has no masks and LoRA weights; leave it out of an adapter."
            )
        masks = Masks.ones(self.arch.dims, torch.device("cpu")) if snapshot is None else snapshot.masks
        step = 0 if snapshot is None else snapshot.step
        left = checked_counts(self.arch, masks)
        if self.options.format == "gguf":
            choice = llamacpp.choose(self.arch, self.dense, left)
            return _Plan(stored, path, masks, step, choice.counts, choice.architecture, choice.notes)
        if self.options.format == "hf-uniform":
            widths, notes = self._uniform(left)
            return _Plan(stored, path, masks, step, widths, None, notes)
        return _Plan(stored, path, masks, step, left, None, ())

    def _uniform(self, left: Counts) -> tuple[Counts, tuple[str, ...]]:
        """Widths of a stock class that can hold what is left, and what they cost."""
        widths = left if left.uniform else left.widest
        if stock_config(self.dense, self.arch, widths) is None:
            raise ExportError(
                f"no stock class of the {self.arch.spec.model_type} family takes these widths (hidden size {widths.hidden}); "
                "write --format hf, or prune with --uniform and other roundings."
            )
        more = _elements(self.arch, widths) - _elements(self.arch, left)
        if widths.is_dense(self.arch.dims) and more:
            raise ExportError(
                "the layers of this model differ so much that a stock class, which has one width for all, would be as large as "
                "the dense model; prune with --uniform, or write --format hf."
            )
        if not more:
            return widths, ()
        share = 100 * more / _elements(self.arch, left)
        return widths, (
            f"zeros fill all layers up to the widest, so that a stock class holds them: {more:,} parameters more than "
            f"--format hf ({share:.1f} %). A run with --uniform has no such cost",
        )

    def write_all(self) -> list[Exported]:
        """Reads the base model once and writes one model after the other."""
        config, device = self.config, pick_device(self.options.device)
        if self.options.format == "adapter":
            return [self._write_adapter(plan) for plan in self.plans]
        self.reporter.say(f"loading {self.source.name} on {device}")
        model = self.source.model(device, pick_dtype(config.dtype, device))
        lora = LoraOptions(config.lora_rank, config.alpha, config.lora_targets, config.seed)
        masked = MaskedModel(model, self.arch, config.prune, lora)
        nothing = {name: torch.zeros_like(p) for name, p in masked.lora.items()}
        text = self._text()
        written = []
        for plan in self.plans:
            snapshot = self.read(plan.stored)
            masked.load_lora(nothing if snapshot is None else snapshot.lora)
            write = self._write_gguf if self.options.format == "gguf" else self._write_hf
            written.append(write(plan, masked, text))
            for note in written[-1].notes:
                self.reporter.say(f"note: {note}")
            self.reporter.say(f"wrote {plan.path} ({written[-1].file_bytes / 1e6:.1f} MB)")
        return written

    def _text(self) -> Tensor:
        """Token ids on which models are compared: held-out text of the run, or random tokens where there is none."""
        if not (self.folder / BLOCKS).is_file():
            generator = torch.Generator().manual_seed(0)
            return torch.randint(0, self.arch.dims.vocab, (2, 64), generator=generator)
        blocks = Blocks.open(self.folder / BLOCKS)
        part, count = ("held_out", blocks.held_out) if blocks.held_out else ("train", blocks.count)
        some = blocks.read(list(range(min(4, count))), part)
        return some[: max(1, COMPARED // some.shape[1]), :COMPARED]

    def _compared(self, plan: _Plan, masked: MaskedModel, text: Tensor) -> Equality:
        with self.reporter.counter(f"comparing {plan.stored.name} with the masked model"):
            return check_equal(masked, plan.masks, self.dense, text, fill=lambda _: plan.counts)

    def _write_hf(self, plan: _Plan, masked: MaskedModel, text: Tensor) -> Exported:
        options, equality = self.options, self._compared(plan, masked, text)
        dtype = pick_save_dtype(options.dtype or self.config.save_dtype, self.dense)
        compactor = Compactor(masked, plan.masks, dtype, lambda _: plan.counts)
        parameters = _elements(self.arch, plan.counts)
        with (
            self.reporter.counter(f"writing {plan.path.name}") as progress,
            write_folder(
                plan.path,
                compactor,
                self.dense,
                self.tokenizer,
                masked.model.generation_config,
                parse_size(options.max_shard_size or SHARD),
                progress,
            ) as folder,
        ):
            size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
            save_text(folder / "README.md", model_card(self._facts(plan, equality, dtype, parameters, size)))
        sparsity = BlockSize.of(self.arch).sparsity(plan.masks)
        return Exported(plan.path, plan.stored, sparsity, parameters, size, equality, plan.notes)

    def _facts(self, plan: _Plan, equality: Equality, dtype: torch.dtype, parameters: int, size: int) -> RunFacts:
        """The facts for the model card."""
        facts, blocks = RunFacts.read(self.folder), BlockSize.of(self.arch)
        final = plan.stored.record == FINAL and facts.figures is not None
        made = compact_config(self.dense, self.arch, plan.counts)
        own_code = not is_stock(made)
        line = facts.steps[min(plan.step, len(facts.steps) - 1)] if facts.steps else {}
        notes = plan.notes
        if plan.stored.record > 0:
            notes += (
                f"This is record {plan.stored.record} of a run to {100 * self.config.sparsity:g} %, taken at step "
                f"{plan.step}: a teacher on the way, without recovery.",
            )
        figures = Figures(
            blocks_before=blocks.full,
            blocks_after=sum(math.prod(s) for n, s in self._shapes(plan).items() if n.startswith(f"{self.arch.spec.layers}.")),
            total_before=self.arch.total,
            total_after=parameters,
            file_bytes=size,
            dtype=str(dtype).removeprefix("torch."),
            model_class=str((made.architectures or [""])[0]),
            own_code=own_code,
            equality=equality,
            exact=facts.figures.exact if final and facts.figures is not None else None,
            dense=facts.figures.dense if final and facts.figures is not None else None,
            pruned=facts.figures.pruned if final and facts.figures is not None else None,
            tokens=int(line.get("tokens", 0)),
            seconds=float(line.get("seconds", 0.0)),
        )
        return dataclasses.replace(
            facts,
            figures=figures,
            masks=plan.masks,
            masks_of=plan.stored.name,
            comparison=facts.comparison if final else None,
            left_out=notes,
        )

    def _shapes(self, plan: _Plan) -> dict[str, tuple[int, ...]]:
        return compact_shapes(self.arch, plan.counts)

    def _write_gguf(self, plan: _Plan, masked: MaskedModel, text: Tensor) -> Exported:
        from nuteprune.export.gguf import other_types, write_gguf

        assert plan.architecture is not None
        outtype, equality = self.options.outtype or "f16", self._compared(plan, masked, text)
        by_llama = outtype not in PLAIN and llama_program.installed()
        compactor = Compactor(masked, plan.masks, torch.float32, lambda _: plan.counts)
        name = f"{Path(self.source.name).name} pruned by {100 * plan.stored.sparsity:g} %"
        notes = list(plan.notes)
        with atomic_file(plan.path) as temporary, _scratch(temporary) as floats:
            with self.reporter.counter(f"writing {plan.path.name}") as progress:
                write_gguf(
                    floats if by_llama else temporary,
                    compactor,
                    self.dense,
                    plan.architecture,
                    self.fields,
                    "f32" if by_llama else outtype,
                    name,
                    progress,
                )
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
                notes.append(self._looked_at(temporary, floats if by_llama else None, plan, masked, text, outtype))
            size = temporary.stat().st_size
        sparsity = BlockSize.of(self.arch).sparsity(plan.masks)
        return Exported(plan.path, plan.stored, sparsity, _elements(self.arch, plan.counts), size, equality, tuple(notes))

    def _looked_at(self, path: Path, floats: Path | None, plan: _Plan, masked: MaskedModel, text: Tensor, outtype: str) -> str:
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

    def _write_adapter(self, plan: _Plan) -> Exported:
        snapshot = self.read(plan.stored)
        assert snapshot is not None
        sparsity = BlockSize.of(self.arch).sparsity(plan.masks)
        with atomic_folder(plan.path) as folder:
            write_adapter(folder, snapshot, self.config, self.arch, sparsity)
            size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        self.reporter.say(f"wrote {plan.path} ({size / 1e6:.1f} MB)")
        parameters = sum(t.numel() for t in snapshot.lora.values())
        return Exported(plan.path, plan.stored, sparsity, parameters, size, None, plan.notes)


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A file beside another that is gone afterwards."""
    beside = path.with_name(f"{path.name}.f32")
    try:
        yield beside
    finally:
        beside.unlink(missing_ok=True)


def _is_foreign(path: Path) -> bool:
    """Whether a path holds something that no export wrote."""
    if not path.is_dir():
        return path.exists()
    known = ("config.json", "adapter_config.json")
    return any(path.iterdir()) and not any((path / name).exists() for name in known)


def _rows_note(left: list[Any], outtype: str) -> str:
    """What is said of weights that could not be quantised as asked for."""
    rows, types = sorted({u.row for u in left}), sorted({u.type for u in left})
    names = ", ".join(u.name for u in left[:4]) + (", ..." if len(left) > 4 else "")
    return (
        f"{len(left)} weights are {', '.join(types)} instead: their rows (of {', '.join(map(str, rows))}) do not divide "
        f"into the blocks of {outtype}: {names}. Rows have the hidden size, the intermediate size, or heads x head_dim; "
        f"--round-hidden, --round-intermediate and --round-heads in multiples of {256 if outtype in K_TYPES else 32} avoid it"
    )


def _elements(arch: Arch, counts: Counts) -> int:
    """Parameters of a compact model of these widths."""
    return sum(math.prod(shape) for shape in compact_shapes(arch, counts).values())

"""Structured pruning of causal language models with numerous teachers (NutePrune, arXiv 2402.09773).

from nuteprune import PruneConfig, load, prune

result = prune(PruneConfig.create(model="smollm2-135m", sparsity=0.25, data=("corpus.jsonl.gz",), out="runs/a"))
model, tokenizer = load(result.model)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nuteprune.bench.run import Bench, BenchOptions, run_bench
    from nuteprune.config import PruneConfig
    from nuteprune.errors import NutePruneError
    from nuteprune.estimation.estimate import Estimate, estimate
    from nuteprune.evaluation.record import Evaluation
    from nuteprune.evaluation.run import EvalOptions, evaluate
    from nuteprune.export.adapter import load_adapter
    from nuteprune.export.options import ExportOptions
    from nuteprune.exporting import Exported, export_run
    from nuteprune.finetuning.options import FinetuneOptions
    from nuteprune.finetuning.run import FinetuneResult, finetune, resume_finetune
    from nuteprune.job import PruneResult, prune, resume
    from nuteprune.models import load
    from nuteprune.report.page import write_report

_HOME = {
    "Bench": "nuteprune.bench.run",
    "BenchOptions": "nuteprune.bench.run",
    "run_bench": "nuteprune.bench.run",
    "PruneConfig": "nuteprune.config",
    "NutePruneError": "nuteprune.errors",
    "Estimate": "nuteprune.estimation.estimate",
    "estimate": "nuteprune.estimation.estimate",
    "EvalOptions": "nuteprune.evaluation.run",
    "Evaluation": "nuteprune.evaluation.record",
    "evaluate": "nuteprune.evaluation.run",
    "ExportOptions": "nuteprune.export.options",
    "Exported": "nuteprune.exporting",
    "export_run": "nuteprune.exporting",
    "load_adapter": "nuteprune.export.adapter",
    "FinetuneOptions": "nuteprune.finetuning.options",
    "FinetuneResult": "nuteprune.finetuning.run",
    "finetune": "nuteprune.finetuning.run",
    "resume_finetune": "nuteprune.finetuning.run",
    "write_report": "nuteprune.report.page",
    "PruneResult": "nuteprune.job",
    "prune": "nuteprune.job",
    "resume": "nuteprune.job",
    "load": "nuteprune.models",
}

__all__ = [
    "Bench",
    "BenchOptions",
    "Estimate",
    "EvalOptions",
    "Evaluation",
    "ExportOptions",
    "Exported",
    "FinetuneOptions",
    "FinetuneResult",
    "NutePruneError",
    "PruneConfig",
    "PruneResult",
    "__version__",
    "estimate",
    "evaluate",
    "export_run",
    "finetune",
    "load",
    "load_adapter",
    "prune",
    "resume",
    "resume_finetune",
    "run_bench",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Imports the public names on first use: the command line's help should not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'nuteprune' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)

"""`nuteprune demo`: the main job on a real model, then dense and pruned side by side on text not trained on."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from nuteprune.config import PruneConfig
from nuteprune.data import PYDOC, SELF
from nuteprune.evaluation.run import EvalOptions, evaluate
from nuteprune.job import prune, resume
from nuteprune.models import DEMO_MODEL
from nuteprune.progress import Reporter
from nuteprune.report.facts import CONFIG, MODEL, RESULT, RunFacts
from nuteprune.report.page import write_report

WINDOWS = 16


def run_demo(out: Path, tokens: int, reporter: Reporter) -> int:
    """Prunes SmolLM2-135M by 25 % on text it writes itself and on help pages, prints a table and writes the report.

    A demo that was stopped goes on; one that is complete is evaluated again.

    Args:
        out: run folder.
        tokens: training tokens.
        reporter: shows progress.

    Returns:
        Exit code: 0, or 130 if it was stopped.
    """
    if not ((out / RESULT).is_file() and (out / MODEL).is_dir()):
        if (out / CONFIG).is_file():
            result = resume(out, reporter)
        else:
            config = PruneConfig.create(model=DEMO_MODEL, sparsity=0.25, data=(SELF, PYDOC), tokens=tokens, out=str(out))
            result = prune(config, reporter)
        if not result.complete:
            return 130
    evaluate(str(out), EvalOptions(ppl=(PYDOC,), windows=WINDOWS, speed=True), reporter, dense=True)
    page = write_report(out, reporter)
    table = Table("", "dense", "pruned", "", title=f"{DEMO_MODEL}: {out / MODEL}", title_justify="left")
    lines = RunFacts.read(out).lines()
    for line in lines:
        table.add_row(line.name, line.dense, line.pruned, line.change)
    console = Console()
    console.print(table)
    for line in lines:
        if line.note:
            console.print(f"{line.name}: {line.note}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    return 0

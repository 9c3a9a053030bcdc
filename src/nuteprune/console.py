"""What commands print: tables, and the last lines of a job."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_comparison(comparison: Any) -> None:
    """Prints the table of `nuteprune compare` and its notes."""
    console = Console()
    header, body = comparison.table()
    print_tables(console, [("", tuple(header), [tuple(row) for row in body])], right=True)
    for note in comparison.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)


def print_tables(
    console: Console, tables: list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]], right: bool = False
) -> None:
    """Prints titled tables; the columns but the first to the right, if asked."""
    for title, columns, rows in tables:
        table = Table(*map(escape, columns), title=escape(title) or None, title_justify="left")
        for column in table.columns[1:] if right else ():
            column.justify = "right"
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)


def reporter(quiet: bool) -> Any:
    """What tells progress, on standard error; nothing if quiet."""
    from nuteprune.progress import Reporter

    return Reporter(Console(stderr=True, quiet=quiet))


def finish_tuning(result: Any) -> None:
    """Prints what a fine-tuning left; exit code 130 if it was stopped."""
    if not result.complete:
        raise typer.Exit(130)
    from nuteprune.finetuning.run import summary

    for line in summary(result):
        print(line)


def finish(result: Any) -> None:
    """Prints what a job left; exit code 130 if it was stopped."""
    if not result.complete:
        raise typer.Exit(130)
    if (f := result.figures) is None:  # the main process prints them
        return
    print(f"model: {result.model}")
    print(f"blocks: {f.blocks_before:,} -> {f.blocks_after:,} parameters (-{100 * f.block_sparsity:.2f} %)")
    removed = f"-{100 * f.total_sparsity:.2f} %"
    print(f"all: {f.total_before:,} -> {f.total_after:,} parameters ({removed}), {f.file_bytes / 1e6:.1f} MB")
    if f.dense is not None and f.pruned is not None:
        ratio = f.pruned.perplexity / f.dense.perplexity
        print(f"perplexity: {f.dense.perplexity:.2f} -> {f.pruned.perplexity:.2f} (x {ratio:.3f}); {f.pruned.protocol}")
    print(
        f"largest logit difference to the masked model: {f.equality.exact:.2e} in float64, {f.equality.largest:.2e} in float32"
    )

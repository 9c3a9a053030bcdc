"""`nuteprune demo`: the main job on a real model, then dense and pruned side by side on text not trained on."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from nuteprune.config import PruneConfig
from nuteprune.data import PYDOC, SELF
from nuteprune.evaluate import Perplexity, generation_speed, perplexity, read_set
from nuteprune.files import save_json
from nuteprune.job import CONFIG, MODEL, RESULT, prune, resume
from nuteprune.models import DEMO_MODEL, Source, load
from nuteprune.progress import Reporter

WINDOWS = 16


def run_demo(out: Path, tokens: int, reporter: Reporter) -> int:
    """Prunes SmolLM2-135M by 25 % on text it writes itself and on help pages, and prints a table.

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
    compare(out, reporter)
    return 0


def compare(run: Path, reporter: Reporter) -> None:
    """Prints the table: parameters, size, perplexity on held-out help pages, tokens a second."""
    source = Source.find(DEMO_MODEL)
    dense = source.model(torch.device("cpu"), torch.float32)
    pruned, tokenizer = load(run / MODEL, dtype=torch.float32)
    name, text, joined = read_set(PYDOC, None)
    perplexities = []
    for label, model in (("dense", dense), ("pruned", pruned)):
        with reporter.counter(f"perplexity of the {label} model") as progress:
            perplexities.append(
                perplexity(model, tokenizer, text, name=name, joined=joined, windows=WINDOWS, progress=progress)
            )
    reporter.say("speed of generation")
    speed = generation_speed({"dense": dense, "pruned": pruned}, tokenizer)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (dense, pruned)]
    blocks = [sum(p.numel() for n, p in m.named_parameters() if ".layers." in n) for m in (dense, pruned)]
    # The dense model came as a 4-bit GGUF; its size as the same kind of file is that of its weights.
    files = [4 * sizes[0], sum(p.stat().st_size for p in (run / MODEL).glob("*.safetensors"))]
    rows = [
        ("block parameters", *(f"{n / 1e6:.2f} M" for n in blocks), f"-{100 * (1 - blocks[1] / blocks[0]):.2f} %"),
        ("all parameters", *(f"{n / 1e6:.2f} M" for n in sizes), f"-{100 * (1 - sizes[1] / sizes[0]):.2f} %"),
        ("file size (float32 safetensors)", *(f"{n / 1e6:.1f} MB" for n in files), f"-{100 * (1 - files[1] / files[0]):.2f} %"),
        ("perplexity", *(f"{p.perplexity:.2f}" for p in perplexities), f"x {ratio(perplexities):.3f}"),
        (
            "tokens/s of generation",
            *(f"{speed[k]:.1f}" for k in ("dense", "pruned")),
            f"x {speed['pruned'] / speed['dense']:.2f}",
        ),
    ]
    table = Table("", "dense", "pruned", "", title=f"{DEMO_MODEL}: {run / MODEL}", title_justify="left")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(f"perplexity: {perplexities[0].protocol}", highlight=False)
    console.print("generation: greedy, batch 1, 64 tokens, medians of 5 rounds in turns", highlight=False)
    save_json(run / "demo.json", {"rows": rows, "perplexity": [p.to_dict() for p in perplexities], "tokens_per_s": speed})


def ratio(perplexities: list[Perplexity]) -> float:
    """Pruned over dense."""
    return float(perplexities[1].perplexity / perplexities[0].perplexity)

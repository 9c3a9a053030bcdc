"""The command line. Everything it does is one call into the library."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from nuteprune.config import PruneConfig, read_yaml
from nuteprune.errors import NutePruneError
from nuteprune.options import COST_OPTIONS, config_options

app = typer.Typer(
    name="nuteprune",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Makes large language models smaller: structured pruning with numerous teachers (arXiv 2402.09773).",
)

Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N or auto.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print results only.")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id, .gguf file, or smollm2-135m.")]
OptionalModel = Annotated[str | None, typer.Argument(metavar="MODEL", help="Folder, hub id, .gguf file, or smollm2-135m.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file with options by name; options given here override it.")
]


@app.command(
    name="prune",
    epilog="Example: nuteprune prune smollm2-135m --sparsity 0.25 --data corpus.jsonl.gz --out runs/a",
)
@config_options()
def prune_command(
    model: OptionalModel = None,
    config: ConfigFile = None,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Prunes MODEL to an exact size and writes a smaller checkpoint that stock tools load."""
    checked = _merged(model, config, options)

    from nuteprune.job import prune

    _finish(prune(checked, _reporter(quiet)))


@app.command(
    name="estimate",
    epilog="Example: nuteprune estimate smollm2-135m --sparsity 0.25 --batch-size 4 --seq-len 256 --gpu all",
)
@config_options(COST_OPTIONS)
def estimate_command(
    model: OptionalModel = None,
    config: ConfigFile = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option("--gpu", help="Compute the run on this GPU too (repeatable or comma separated): a name, or all."),
    ] = None,
    no_measure: Annotated[
        bool, typer.Option("--no-measure", help="Measure nothing on this machine; no weights are needed.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the estimate to this file too.")] = None,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Says before a run what it will take: size of the result, peak memory and time here, and on GPUs by name."""
    checked = _merged(model, config, options)

    from nuteprune.estimation import estimate
    from nuteprune.files import save_json
    from nuteprune.gpus import assumptions

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as after Ctrl-C, nothing is left behind
    found = estimate(checked, gpu or (), not no_measure, _reporter(quiet))
    if json_file is not None:
        save_json(json_file, found.to_dict())
    console = Console()
    for line in found.lines():
        print(line)
    _print_tables(console, found.tables())
    if found.gpus:
        print(assumptions())


@app.command(name="resume")
def resume_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder of nuteprune prune.")], quiet: Quiet = False
) -> None:
    """Goes on with a stopped run from its last checkpoint."""
    from nuteprune.job import resume

    _finish(resume(run, _reporter(quiet)))


@app.command(name="eval")
def eval_command(
    model: ModelArgument,
    ppl: Annotated[str, typer.Option("--ppl", help="wikitext2, ptb, pydoc (held-out help pages), or a file.")] = "wikitext2",
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", help="Folder with wikitext2/wiki.test.raw and ptb/ptb.valid.txt; the hub without it."),
    ] = None,
    window: Annotated[int, typer.Option("--window", help="Tokens a window; windows do not overlap.")] = 1024,
    windows: Annotated[int | None, typer.Option("--windows", help="Score the first so many windows only.")] = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result to this file too.")] = None,
    quiet: Quiet = False,
) -> None:
    """Measures the perplexity of MODEL and states the protocol."""
    if window < 2 or (windows is not None and windows < 1):
        raise NutePruneError(f"--window {window} and --windows {windows}: allowed are at least 2 and at least 1.")
    from nuteprune.evaluate import perplexity, read_set
    from nuteprune.files import save_json
    from nuteprune.job import environment
    from nuteprune.models import DTYPES, Source, pick_device

    if dtype not in DTYPES:
        raise NutePruneError(f"--dtype got {dtype!r}; allowed are {', '.join(DTYPES)}.")
    where = pick_device(device)
    name, text, joined = read_set(ppl, data_dir)
    source = Source.find(model)
    tokenizer = source.tokenizer(source.config().vocab_size)
    loaded = source.model(where, DTYPES[dtype])
    with _reporter(quiet).counter(f"perplexity on {name}") as progress:
        result = perplexity(
            loaded, tokenizer, text, name=name, joined=joined, window=window, windows=windows, progress=progress
        )
    if json_file is not None:
        save_json(json_file, {"model": model, **result.to_dict(), "dtype": dtype, "environment": environment(where)})
    bits = f", {result.bits_per_byte:.4f} bits a byte" if result.bits_per_byte is not None else ""
    print(f"{model}: perplexity {result.perplexity:.4f}{bits}\n{result.protocol}, {dtype} on {where}")


@app.command(name="inspect")
def inspect_command(
    model: ModelArgument, as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False
) -> None:
    """Shows the family of MODEL, what can be pruned, and where its parameters are; no weights are read."""
    from nuteprune.inspection import inspect_model

    found = inspect_model(model)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    console = Console()
    console.print(found.headline, highlight=False, soft_wrap=True)
    _print_tables(console, found.tables())


@app.command(name="demo")
def demo_command(
    out: Annotated[Path, typer.Option("--out", help="Run folder.")] = Path("runs/demo"),
    tokens: Annotated[
        int, typer.Option("--tokens", help="Training tokens; the default ends within about 15 minutes on 2 cores.")
    ] = 40_960,
) -> None:
    """Prunes SmolLM2-135M by 25 % and compares dense and pruned on text not trained on."""
    from nuteprune.demo import run_demo

    code = run_demo(out, tokens, _reporter(False))
    raise typer.Exit(code)


def _merged(model: str | None, config: Path | None, options: dict[str, Any]) -> PruneConfig:
    """Options of a file and of the command line, checked."""
    from_file = read_yaml(config) if config is not None else {}
    if model is not None:
        options["model"] = model
    if options.get("steps") is not None or options.get("tokens") is not None:  # the other way of giving the budget yields
        from_file.pop("steps", None), from_file.pop("tokens", None)
    merged = {**from_file, **options}
    if "model" not in merged:
        raise NutePruneError("MODEL is missing; give a folder, a hub id, a .gguf file or smollm2-135m.")
    return PruneConfig.create(**merged)


def _print_tables(console: Console, tables: list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]) -> None:
    for title, columns, rows in tables:
        table = Table(*columns, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def _reporter(quiet: bool) -> Any:
    from nuteprune.progress import Reporter

    return Reporter(Console(stderr=True, quiet=quiet))


def _finish(result: Any) -> None:
    """Prints what a job left; exit code 130 if it was stopped."""
    if not result.complete:
        raise typer.Exit(130)
    f = result.figures
    print(f"model: {result.model}")
    print(f"blocks: {f.blocks_before:,} -> {f.blocks_after:,} parameters (-{100 * f.block_sparsity:.2f} %)")
    removed = f"-{100 * f.total_sparsity:.2f} %"
    print(f"all: {f.total_before:,} -> {f.total_after:,} parameters ({removed}), {f.file_bytes / 1e6:.1f} MB")
    if f.dense is not None and f.pruned is not None:
        ratio = f.pruned.perplexity / f.dense.perplexity
        print(f"perplexity: {f.dense.perplexity:.2f} -> {f.pruned.perplexity:.2f} (x {ratio:.3f}); {f.pruned.protocol}")
    exact = f" ({f.exact.largest:.2e} in float64)" if f.exact is not None else ""
    print(f"largest logit difference to the masked model: {f.equality.largest:.2e}{exact}")


def main() -> None:
    """Entry point: bad input becomes one sentence and exit code 2."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars; ours are rich's
    try:
        app()
    except NutePruneError as error:
        print(f"nuteprune: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

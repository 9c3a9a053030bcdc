"""The command line. Everything it does is one call into the library."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from nuteprune.config import PruneConfig
from nuteprune.console import finish, finish_tuning, print_comparison, print_tables, reporter
from nuteprune.errors import ConfigError, NutePruneError
from nuteprune.finetuning.options import FinetuneOptions
from nuteprune.launcher import is_first, launched
from nuteprune.option_values import read_yaml
from nuteprune.options import COST_OPTIONS, config_options
from nuteprune.quiet import quiet_libraries
from nuteprune.recipes import METHOD_DECIDES, RECIPES, SHAPE_DECIDES

app = typer.Typer(
    name="nuteprune",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Makes large language models smaller: structured pruning with numerous teachers (arXiv 2402.09773).",
)

# typer's own class for wrong arguments, which it does not name itself
_UsageError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "UsageError")

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

    finish(prune(checked, reporter(quiet)))


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

    from nuteprune.estimation.estimate import estimate
    from nuteprune.estimation.gpus import assumptions
    from nuteprune.files import check_output, save_json

    check_output("--json", json_file)
    _clean_end()
    found = estimate(checked, gpu or (), not no_measure, reporter(quiet))
    if json_file is not None:
        save_json(json_file, found.to_dict())
    console = Console()
    for line in found.lines():
        print(line)
    print_tables(console, found.tables())
    if found.gpus:
        print(assumptions())


@app.command(name="export", epilog="Example: nuteprune export runs/a --format gguf --outtype q8_0 --sparsity 0.10,0.25")
def export_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or an adapter that was exported from one.")],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="hf (a width for each layer, its own code), hf-uniform (a stock class), gguf (llama.cpp, Ollama), or adapter "
            "(masks and LoRA weights for peft).",
        ),
    ] = "hf",
    sparsity: Annotated[
        str | None,
        typer.Option(
            "--sparsity",
            help="Sparsities, comma separated: a record of the run each, or the nearest denser one; 0 is the intact model. "
            "The pruned model without it.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="File or folder; a folder for several models. RUN/export without it.")
    ] = None,
    outtype: Annotated[
        str | None,
        typer.Option(
            "--outtype", help="Weights in a GGUF file: f32, f16, bf16, q8_0, q4_0, q4_k_m, q5_k_m or q6_k; f16 without it."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="Weights in a folder: auto, float32, bfloat16 or float16; the run's own without it."),
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option("--max-shard-size", help="Largest safetensors file, such as 500MB; 5GB without it.")
    ] = None,
    tokenizer_pre: Annotated[
        str | None,
        typer.Option("--tokenizer-pre", help="llama.cpp's name of how the tokenizer splits text, where it is not recognised."),
    ] = None,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Writes models that a run holds for other programs: transformers, vLLM, llama.cpp, peft."""
    from nuteprune.export.options import ExportOptions
    from nuteprune.exporting import export_run

    _clean_end()
    options = ExportOptions(format_, _shares(sparsity), out, outtype, dtype, max_shard_size, tokenizer_pre, device)
    try:
        written = export_run(run, options, reporter(quiet))
    except KeyboardInterrupt:
        print("stopped; what was not written whole is not there, and older exports are as they were", file=sys.stderr)
        raise typer.Exit(130) from None
    for each in written:
        for note in each.notes if quiet else ():  # else the reporter has said them
            print(f"note: {note}", file=sys.stderr)
        print(
            f"{each.path}: {100 * each.sparsity:.2f} % of the blocks removed, {each.parameters:,} parameters, "
            f"{each.file_bytes / 1e6:.1f} MB"
        )


@app.command(name="resume")
def resume_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of nuteprune prune or finetune.")], quiet: Quiet = False
) -> None:
    """Goes on with a stopped run or fine-tuning from its last checkpoint."""
    from nuteprune.finetuning.run import is_finetuning, resume_finetune
    from nuteprune.job import resume

    if is_finetuning(run):
        if launched() > 1:
            raise ConfigError(f"fine-tuning {run} works in one process, got {launched()}; start it without the launcher.")
        finish_tuning(resume_finetune(run, reporter(quiet)))
    else:
        finish(resume(run, reporter(quiet)))


@app.command(
    name="finetune",
    epilog="Example: nuteprune finetune runs/a --data alpaca_data.json --epochs 2 --distill 0.5",
)
@config_options(of=FinetuneOptions)
def finetune_command(
    model: Annotated[str, typer.Argument(metavar="RUN", help="Run folder of nuteprune prune, or a model folder.")],
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Fine-tunes a pruned model on instructions: LoRA, loss on answers only, merged into a model of the same shape."""
    checked = FinetuneOptions(model=model, **options)

    from nuteprune.finetuning.run import finetune

    finish_tuning(finetune(checked, reporter(quiet)))


@app.command(
    name="eval",
    epilog="Example: nuteprune eval runs/a --dense --ppl wikitext2 --data-dir DATA --tasks paper --task-data DATA/zeroshot",
)
def eval_command(
    model: ModelArgument,
    ppl: Annotated[
        list[str] | None,
        typer.Option(
            "--ppl", help="wikitext2, ptb, pydoc (held-out help pages), or a file; repeatable.", show_default="wikitext2"
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", help="Folder with wikitext2/wiki.test.raw and ptb/ptb.valid.txt; the hub without it."),
    ] = None,
    text_key: Annotated[
        str | None, typer.Option("--text-key", help="Field that holds the text in jsonl and parquet files; text without it.")
    ] = None,
    window: Annotated[
        int | None, typer.Option("--window", help="Tokens a window; windows do not overlap. 1024 without it.")
    ] = None,
    windows: Annotated[int | None, typer.Option("--windows", help="Score the first so many windows only.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            help="Tasks of the lm-evaluation-harness, comma separated; paper stands for the seven of the paper "
            "(pip install 'nuteprune\\[eval]').",
        ),
    ] = None,
    task_data: Annotated[
        Path | None,
        typer.Option(
            "--task-data", help="Folder with the tasks' rows, TASK_SPLIT.jsonl each (also .sample, .gz); the hub without it."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="The first so many rows of each task only.")] = None,
    fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", help="Worked examples in each prompt; the tasks' own number without it.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Sequences a forward pass of the tasks; 8 without it.")
    ] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Measure speed and memory of generation.")] = False,
    dense: Annotated[
        bool, typer.Option("--dense", help="MODEL is a run: measure the model it was pruned from too, and compare.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep tasks that the record already has, measured alike.")] = False,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the record to this file too.")] = None,
    quiet: Quiet = False,
) -> None:
    """Measures MODEL: perplexity, tasks, speed. The record of a run is kept in RUN/eval."""
    from nuteprune.evaluation.compare import compare
    from nuteprune.evaluation.record import run_folder
    from nuteprune.evaluation.run import EvalOptions, evaluate

    names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
    if tasks is not None and not names:
        raise ConfigError("--tasks got no task; give names such as piqa,arc_easy, or paper for the paper's seven.")
    options = EvalOptions(
        ppl=tuple(ppl or (() if names or speed else ("wikitext2",))),
        data_dir=data_dir,
        text_key=text_key,
        window=window,
        windows=windows,
        tasks=names,
        task_data=task_data,
        limit=limit,
        fewshot=fewshot,
        batch_size=batch_size,
        speed=speed,
        device=device,
        dtype=dtype,
        resume=resume,
    )
    try:
        records = evaluate(model, options, reporter(quiet), dense=dense, json_file=json_file)
    except KeyboardInterrupt:
        kept = "the tasks that were done are kept; go on with the same command and --resume"
        print(f"stopped; {kept if run_folder(model) or json_file else 'nothing is kept without --json'}", file=sys.stderr)
        raise typer.Exit(130) from None
    if len(records) > 1:
        print_comparison(compare(records))
    else:
        print("\n".join(records[0].lines()))


@app.command(name="compare", epilog="Example: nuteprune compare runs/a runs/b --markdown")
def compare_command(
    records: Annotated[
        list[str],
        typer.Argument(
            metavar="A B ...",
            help="Files of nuteprune eval --json, the dense model's first, or run folders, whose dense model goes before them.",
        ),
    ],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table to this file too.")] = None,
) -> None:
    """Puts evaluated models side by side: what each retains of the first one's quality, by task and on average.

    Where the models answered the same rows, differences have the standard error of a comparison row by row.
    """
    from nuteprune.evaluation.compare import compare, find_records
    from nuteprune.files import check_output, save_json

    check_output("--json", json_file)
    found = compare(find_records(records))
    if json_file is not None:
        save_json(json_file, found.to_dict())
    if markdown:
        print(found.markdown(), end="")
    else:
        print_comparison(found)


@app.command(
    name="bench", epilog="Example: nuteprune bench runs/a/export/a.gguf --against runs/a/export/dense.gguf --threads 1"
)
def bench_command(
    model: Annotated[
        str, typer.Argument(metavar="A", help="Run or model folder, hub id, or a .gguf file, which llama.cpp runs.")
    ],
    against: Annotated[str, typer.Option("--against", metavar="B", help="The model that A is compared with.")],
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens generated after it.")] = 64,
    rounds: Annotated[int, typer.Option("--rounds", help="Rounds in which the models take turns.")] = 7,
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads; all cores without it.")] = None,
    device: Device = "auto",
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="Precision of Hugging Face models: float32, bfloat16 or float16; float32 without it."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file too.")] = None,
    quiet: Quiet = False,
) -> None:
    """Measures two models side by side: size, peak memory, prompt and decode speed, time to first token."""
    from nuteprune.bench.run import BenchOptions, run_bench
    from nuteprune.files import check_output, save_json

    check_output("--json", json_file)
    _clean_end()
    options = BenchOptions(prompt_tokens, new_tokens, rounds, threads, device, dtype)
    found = run_bench(model, against, options, reporter(quiet))
    if json_file is not None:
        save_json(json_file, found.to_dict())
    console = Console()
    print_tables(console, [("", *found.table())], right=True)
    for note in found.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)


@app.command(name="report")
def report_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, finished or not.")],
    watch: Annotated[
        int | None,
        typer.Option("--watch", metavar="SECONDS", help="Write the page every so many seconds until the run is complete."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Writes RUN/report: one page with pictures that needs no network, and PNG files; renews the model card."""
    from nuteprune.report.page import watch_report, write_report

    if watch is not None and watch < 1:
        raise ConfigError(f"--watch got {watch}; allowed is a whole number of seconds from 1.")
    page = write_report(run, reporter(quiet)) if watch is None else watch_report(run, reporter(quiet), watch)
    print(page)


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
    print_tables(console, found.tables())


@app.command(name="demo")
def demo_command(
    out: Annotated[Path, typer.Option("--out", help="Run folder.")] = Path("runs/demo"),
    tokens: Annotated[
        int, typer.Option("--tokens", help="Training tokens; the default ends within about 15 minutes on 2 cores.")
    ] = 40_960,
) -> None:
    """Prunes SmolLM2-135M by 25 % and compares dense and pruned on text not trained on."""
    from nuteprune.demo import run_demo

    code = run_demo(out, tokens, reporter(False))
    raise typer.Exit(code)


def _merged(model: str | None, config: Path | None, options: dict[str, Any]) -> PruneConfig:
    """Options of a file and of the command line, checked."""
    from_file = read_yaml(config) if config is not None else {}
    if model is not None:
        options["model"] = model
    if options.get("steps") is not None or options.get("tokens") is not None:  # the other way of giving the budget yields
        from_file.pop("steps", None), from_file.pop("tokens", None)
    if from_file.get("target_shape") or options.get("target_shape"):  # what another shape decided
        for name in SHAPE_DECIDES:
            from_file.pop(name, None)
    for name, decided in (
        ("method", (*METHOD_DECIDES, "gate_init", "teachers", "repair", "repair_batches", "repair_damping")),
        ("recipe", (*METHOD_DECIDES, *RECIPES["paper"])),
    ):
        if name in options and options[name] != from_file.get(name):  # what the file's value decided
            for other in decided:
                from_file.pop(other, None)
    if options.get("repair") is False:
        from_file.pop("repair_batches", None), from_file.pop("repair_damping", None)
    merged = {**from_file, **options}
    if "model" not in merged:
        raise NutePruneError("MODEL is missing; give a folder, a hub id, a .gguf file or smollm2-135m.")
    return PruneConfig.create(**merged)


def _clean_end() -> None:
    """Ends as after Ctrl-C, leaving nothing behind, when the system asks for it."""
    for number in (signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, lambda got, _: sys.exit(128 + got))


def _shares(text: str | None) -> tuple[float, ...]:
    """The numbers of `--sparsity`."""
    try:
        return tuple(float(part) for part in text.split(",")) if text is not None else ()
    except ValueError:
        raise ConfigError(f"--sparsity got {text!r}; give shares such as 0.25, or several: 0.10,0.15,0.20.") from None


def main() -> None:
    """Entry point: bad input becomes one sentence and exit code 2."""
    quiet_libraries()
    try:
        _check_launcher(sys.argv[1:])
        sys.exit(app(prog_name="nuteprune", standalone_mode=False))
    except _UsageError as error:  # type: ignore[misc]
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            path = error.ctx.command_path if error.ctx is not None else "nuteprune"
            print(f"nuteprune: {error.format_message().rstrip('.')}; see {path} --help.", file=sys.stderr)
        sys.exit(2)
    except NutePruneError as error:
        met = getattr(sys.modules.get("nuteprune.processes"), "met", False)  # then they have agreed on who speaks
        if type(error).__name__ != "OtherProcessError" if met else is_first():
            print(f"nuteprune: {error}", file=sys.stderr)
        sys.exit(2)


def _check_launcher(arguments: list[str]) -> None:
    """Refuses to do several times at once what one process does.

    Raises:
        ConfigError: a launcher started several of a command that is for one.
    """
    command = next(iter(arguments), "")
    if launched() > 1 and command not in ("prune", "resume"):
        raise ConfigError(
            f"{command or 'nuteprune'} works in one process, got {launched()} of a launcher; only prune and resume share their "
            "work. Start it without the launcher."
        )


if __name__ == "__main__":
    main()

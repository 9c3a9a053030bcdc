"""Runs a list of experiments one after another and keeps their figures: one folder below results/ each.

    python benchmarks/quality/run.py --data DATA --work FOLDER [--only 'ablation/*'] [--list FILE] [--keep] [--in-process]

An experiment is `nuteprune prune` with the options of experiments.yaml, then `nuteprune eval`. What has a result is left
alone; a run that was stopped goes on from its checkpoint, an evaluation from its last task. Several of these processes can
share a list and a work folder: each takes what no other is at. Runs are deleted once their figures are kept, but with --keep.
With --in-process the commands run in this process, which reads libraries and tasks once; that saves half a minute an experiment
where a run takes minutes, as on a GPU.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import yaml
from experiments import LIST, RESULTS, Experiment, read
from plain import plain

from nuteprune import files
from nuteprune.errors import NutePruneError
from nuteprune.files import save_json, save_text

KEPT = (
    "blocks",
    "model",
    "model_class",
    "largest_logit_difference",
    "largest_logit_difference_float64",
    "training_tokens",
    "training_seconds",
    "head_bias",
    "perplexity_after",
    "gradient_jumps",
    "recovery_losses",
)
MODEL = "smollm2-135m"
STOPPED = 130  # exit code of a run that Ctrl-C stopped


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets (README.md says which files)")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--list", type=Path, default=LIST, help="the experiments")
    parser.add_argument(
        "--only", default="*", help="patterns of the experiments to run, separated by commas, the first ones first"
    )
    parser.add_argument("--keep", action="store_true", help="keep the runs")
    parser.add_argument("--in-process", action="store_true", help="start no process for each command")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    failed = []
    for experiment in read(args.list, args.only):
        with claimed(args.work / f"{experiment.key.replace('/', '_')}.lock") as lock:
            if lock is None or experiment.result.is_file():
                continue
            print(f"== {experiment.key}", flush=True)
            try:
                run(experiment, args.data, args.work, args.keep, here if args.in_process else partial(started, lock))
            except (RuntimeError, OSError, ValueError, KeyError) as error:
                print(f"== {experiment.key} failed: {error}", flush=True)
                failed.append(experiment.key)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


@contextmanager
def claimed(path: Path) -> Iterator[int | None]:
    """A lock on a file, or None where another process has it; it lasts as long as this process or one that has its number."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file.fileno()


def run(experiment: Experiment, data: Path, work: Path, keep: bool, nuteprune: Callable[..., None]) -> None:
    """One experiment from where it stands to its result; `nuteprune` runs a command of it.

    Raises:
        RuntimeError: a command failed, and what it left is gone on with the next time; or the run in the work folder was begun
            with other options or another version of the code.
    """
    folder = work / experiment.key.replace("/", "_")
    record, settings = work / f"{folder.name}.json", work / f"{folder.name}.yaml"
    subject, began = MODEL, code()
    asked = yaml.safe_dump({"options": experiment.options, "evaluate": experiment.evaluate, "code": began})
    if (folder.is_dir() or record.is_file()) and not (settings.is_file() and settings.read_text(encoding="utf-8") == asked):
        raise RuntimeError(f"{folder} was begun with other options or other code; remove it and {record.name} to start anew")
    save_text(settings, asked)
    if experiment.options:
        subject = str(folder)
        options = experiment.options | {"seed": experiment.seed, "out": str(folder)}
        options["data"] = [str(data / name) if "." in name else name for name in options["data"]]
        if not (folder / "result.json").is_file():
            given = work / f"{folder.name}.options.yaml"
            save_text(given, yaml.safe_dump(options))
            nuteprune(*(["resume", str(folder)] if folder.is_dir() else ["prune", "--config", str(given)]))
    first, last = experiment.evaluate.get("leave_out", (0, 0))
    rows = rows_without(first, last, data / "zeroshot", work)
    texts = [
        str(plain(data, work / "plain.txt") if text == "plain" else data / text if "." in text else text)
        for text in experiment.evaluate["ppl"]
    ]
    nuteprune("eval", subject, "--json", str(record), *protocol(experiment.evaluate, texts, data, rows, record.is_file()))

    figures: dict[str, Any] = {}
    if experiment.options:
        ended = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        figures = {name: ended[name] for name in KEPT}
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        config |= {"data": experiment.options["data"], "out": experiment.key}
        save_text(RESULTS / experiment.key / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    measured = json.loads(record.read_text(encoding="utf-8"))
    if code() != began:
        raise RuntimeError("the library's source changed meanwhile, so these figures belong to no one version")
    result = {
        "experiment": experiment.key,
        "seed": experiment.seed,
        "code": began,
        "options": experiment.options,
        "figures": figures,
        "parameters": measured["parameters"],
        "perplexity": measured["perplexity"],
        "tasks": measured["tasks"],
        "environment": measured["environment"],
        "evaluate": experiment.evaluate,
    }
    save_json(experiment.result, result)
    record.unlink()
    if not keep and folder.is_dir():
        shutil.rmtree(folder)


def rows_without(first: int, last: int, rows: Path, work: Path) -> Path:
    """Folder of the tasks' files without rows `first` to `last - 1`, made once: all but those that chose a recipe, or those."""
    if first == last:
        return rows
    made = work / f"{rows.name}-without-{first}-{last}"
    for path in sorted(rows.glob("*.jsonl*")):
        if (target := made / path.name.removesuffix(".gz")).is_file():
            continue
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            lines = list(file)
        if kept := lines[:first] + lines[last:]:  # some sets have no more rows
            target.parent.mkdir(exist_ok=True)
            save_text(target, "".join(kept))
    return made


def protocol(evaluate: dict[str, Any], texts: list[str], data: Path, rows: Path, begun: bool) -> list[str]:
    """Arguments of `nuteprune eval` for these texts; `rows` is the folder of the tasks' files."""
    found = ["--data-dir", str(data)]
    for text in texts:
        found += ["--ppl", text]
    for name in ("windows", "dtype"):
        found += [f"--{name}", str(evaluate[name])] if name in evaluate else []
    if "tasks" in evaluate:
        found += ["--tasks", evaluate["tasks"], "--task-data", str(rows)]
        for name in ("limit", "batch_size"):
            found += [f"--{name.replace('_', '-')}", str(evaluate[name])] if name in evaluate else []
        found += ["--resume"] if begun else []
    return found


def here(*args: str) -> None:
    """Runs a command of nuteprune in this process, quietly.

    Raises:
        RuntimeError: it failed.
        KeyboardInterrupt: it was stopped, and has written its checkpoint.
    """
    from nuteprune.cli import app

    if "--tasks" in args:
        from nuteprune.evaluation import harness

        if not hasattr(harness.load_tasks, "cache_info"):  # rows are read once for all models
            harness.load_tasks = lru_cache(harness.load_tasks)
    try:
        ended = app([*args, "--quiet"], standalone_mode=False)
    except NutePruneError as error:
        raise RuntimeError(f"nuteprune {args[0]}: {error}") from error
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if ended == STOPPED:
        raise KeyboardInterrupt


def started(lock: int, *args: str) -> None:
    """Runs a command of nuteprune in a process of its own, quietly. It holds the lock too; Ctrl-C lets it write its checkpoint.

    Raises:
        RuntimeError: it failed or was stopped.
    """
    command = subprocess.Popen([sys.executable, "-m", "nuteprune", *args, "--quiet"], pass_fds=(lock,))
    stopped = False
    while True:
        try:
            ended = command.wait()
            break
        except KeyboardInterrupt:  # the terminal sent it to the command as well
            stopped = True
    if stopped:
        raise KeyboardInterrupt
    if ended:
        raise RuntimeError(f"nuteprune {args[0]} ended with exit code {ended}")


def code() -> str:
    """A fingerprint of the library's source, so that results of different code are told apart."""
    digest = sha256()
    package = Path(files.__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    main()

"""Runs a list of experiments one after another and keeps their figures: one folder below results/ each.

    python benchmarks/quality/run.py --data DATA --work FOLDER [--only 'ablation/*'] [--list FILE] [--keep]

An experiment is `nuteprune prune` with the options of experiments.yaml, then `nuteprune eval`. What has a result is left
alone; a run that was stopped goes on from its checkpoint, an evaluation from its last task. Several of these processes can
share a list and a work folder: each takes what no other is at. Runs are deleted once their figures are kept, but with --keep.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from experiments import LIST, RESULTS, Experiment, read

from nuteprune.files import save_json, save_text

KEPT = ("blocks", "model", "model_class", "largest_logit_difference", "training_tokens", "training_seconds")
MODEL = "smollm2-135m"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets (README.md says which files)")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--list", type=Path, default=LIST, help="the experiments")
    parser.add_argument("--only", default="*", help="patterns of the experiments to run, separated by commas")
    parser.add_argument("--keep", action="store_true", help="keep the runs")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    failed = []
    for experiment in read(args.list, args.only):
        with claimed(args.work / f"{experiment.key.replace('/', '_')}.lock") as mine:
            if not mine or experiment.result.is_file():
                continue
            print(f"== {experiment.key}", flush=True)
            try:
                run(experiment, args.data, args.work, args.keep)
            except subprocess.CalledProcessError as error:
                print(f"== {experiment.key} failed: {error}", flush=True)
                failed.append(experiment.key)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process has the lock of a file; a process that dies lets go of it."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def run(experiment: Experiment, data: Path, work: Path, keep: bool) -> None:
    """One experiment from where it stands to its result.

    Raises:
        subprocess.CalledProcessError: a command failed; what it left is gone on with the next time.
    """
    folder = work / experiment.key.replace("/", "_")
    record = work / f"{folder.name}.json"
    subject = MODEL
    if experiment.options:
        subject = str(folder)
        options = experiment.options | {"seed": experiment.seed, "out": str(folder)}
        options["data"] = [str(data / name) if "." in name else name for name in options["data"]]
        settings = work / f"{folder.name}.yaml"
        save_text(settings, yaml.safe_dump(options))
        if not (folder / "result.json").is_file():
            nuteprune(*(["resume", str(folder)] if folder.is_dir() else ["prune", "--config", str(settings)]))
    nuteprune("eval", subject, "--json", str(record), *protocol(experiment.evaluate, data, record.is_file()))

    figures: dict[str, Any] = {}
    if experiment.options:
        ended = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        figures = {name: ended[name] for name in KEPT}
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        config |= {"data": experiment.options["data"], "out": experiment.key}
        save_text(RESULTS / experiment.key / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    measured = json.loads(record.read_text(encoding="utf-8"))
    result = {
        "experiment": experiment.key,
        "seed": experiment.seed,
        "options": experiment.options,
        "figures": figures,
        "parameters": measured["parameters"],
        "perplexity": measured["perplexity"],
        "tasks": measured["tasks"],
        "environment": measured["environment"],
    }
    save_json(experiment.result, result)
    if not keep and folder.is_dir():
        shutil.rmtree(folder)


def protocol(evaluate: dict[str, Any], data: Path, begun: bool) -> list[str]:
    """Arguments of `nuteprune eval`."""
    found = ["--data-dir", str(data)]
    for text in evaluate["ppl"]:
        found += ["--ppl", str(data / text) if "." in text else text]
    if "windows" in evaluate:
        found += ["--windows", str(evaluate["windows"])]
    if "tasks" in evaluate:
        found += ["--tasks", evaluate["tasks"], "--task-data", str(data / "zeroshot")]
        found += ["--limit", str(evaluate["limit"])] if "limit" in evaluate else []
        found += ["--resume"] if begun else []
    return found


def nuteprune(*args: str) -> None:
    """Runs a command of nuteprune, quietly."""
    subprocess.run([sys.executable, "-m", "nuteprune", *args, "--quiet"], check=True)


if __name__ == "__main__":
    main()

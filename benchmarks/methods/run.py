"""Runs every contender of an experiment on the same work, side by side, and writes each one's figures.

    python benchmarks/methods/run.py benchmarks/methods/experiments/small.json [--model PATH_OR_HUB_ID] [--tokens FILE]

An experiment is a JSON file: settings (arguments of `DLQATConfig`), contenders, how to train, learning rates and
seeds. A contender that trains first tries each learning rate for a part of the steps, on the first seed, and while the
best is the lowest or the highest, half or twice that; the best is used for all seeds, and so is one that whole runs
have shown to be better. "dlqat" is the default recipe,
and takes its learning rate. Results are one JSON file a setting and contender, under benchmarks/results/methods/MODEL;
runs that are there already are not repeated, so an interrupted benchmark goes on where it stopped. A contender whose
library is not installed is left out, and said so.

`--tokens` is a safetensors file with integer tensors `train` [n, length] and `heldout` [m, length], and of another
domain `other` [k, length], for settings that calibrate on it. Without it, an experiment's `text` says what is made:
"generated" by the model itself, as by default, or "python" for the docstrings of Python's standard library, with its
language reference as the other domain; 2048 and 256 sequences, or as many as its `sequences` says.

An experiment's `tasks`, or `--tasks`, are measured on what each run has made: names of the lm-evaluation-harness, or
"mmlu" and "commonsense" for those usual in papers, whose data come from the Hub.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor, wait
from importlib.metadata import version
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
EMBEDDED = HERE.parents[1] / "examples" / "embedded" / "model"
RESULTS = HERE.parent / "results" / "methods"
sys.path.insert(0, str(HERE))

from runs import Results  # noqa: E402

# Large buffers are kept for the next step rather than given back to the system and zeroed again: a third of the time.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
QUICK = {"steps": 3, "warmup_steps": 1, "batch_size": 2, "calibration_steps": 0}
_ROWS, _QUICK_ROWS = (2048, 256, 256), (8, 8, 64)  # of training and held-out text, and the tokens of each


def work(
    model: str,
    tokens: Path,
    contender: str,
    setting: dict[str, Any],
    training: dict[str, Any],
    seed: int,
    lr: float | None,
    tasks: dict[str, Any] | None,
) -> dict[str, Any]:
    """One run, in a process that keeps the task for the next."""
    import transformers
    from training import load_task, run

    transformers.utils.logging.disable_progress_bar()
    return run(load_task(model, tokens), contender, setting, training, seed, lr, tasks)


def plan(experiment: dict[str, Any], only: list[str], results: Path) -> list[tuple[str, str, Results]]:
    """(setting, contender, results) of everything to be run."""
    from contenders import is_trained

    settings = experiment["settings"]
    offered = {name: setting.get("contenders", experiment["contenders"]) for name, setting in settings.items()}
    contenders = {contender for names in offered.values() for contender in names}
    if unknown := [name for name in only if name not in settings and name not in contenders]:
        raise SystemExit(f"--only {' '.join(unknown)}: neither a setting nor a contender of this experiment.")
    only_settings, only_contenders = settings.keys() & only or settings.keys(), contenders & {*only} or contenders
    jobs = []
    for setting_name, setting in settings.items():
        for contender in offered[setting_name]:
            if setting_name not in only_settings or contender not in only_contenders:
                continue
            path = results / setting_name / f"{contender}.json"
            training = {**experiment["training"], **setting.get("training", {})} if is_trained(contender) else {}
            training.update(QUICK if experiment.get("quick") else {})  # AutoRound has steps, too
            head = {
                "setting": setting["config"],
                "contender": contender,
                "training": training,
                "model": experiment["model_name"],
                **({"search_share": experiment["search_share"]} if is_trained(contender) else {}),
                **{key: experiment[key] for key in ("text", "tasks", "work") if key in experiment},
                "versions": {
                    **{name: version(name) for name in ("torch", "transformers", "peft")},
                    "python": platform.python_version(),
                },
            }
            jobs.append((setting_name, contender, Results(path, head)))
    return jobs


def rates_of(experiment: dict[str, Any], contender: str) -> list[float]:
    """The learning rates that a contender tries: as many for each, in the range that its parameters' unit asks for."""
    rates = experiment["learning_rates"]
    return rates if isinstance(rates, list) else rates.get(contender, rates["others"])


def processes() -> BaseContext:
    """New processes, none of which has threads of this one's, with the libraries imported once where that is safe.

    With a torch for GPUs it is not: a library may ask for one as it is imported, and then no fork can use it.
    """
    import torch

    if sys.platform != "linux" or torch.backends.cuda.is_built():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peft_dlqat"])
    return context


def run_all(experiment: dict[str, Any], args: argparse.Namespace) -> None:
    """Run what is missing, `args.jobs` at a time."""
    import torch
    from contenders import BY_RECIPE, is_trained
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    from peft_dlqat import RECIPE

    seeds = experiment["seeds"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model))
    with safe_open(args.tokens, "pt") as tokens:
        length = tokens.get_slice("train").get_shape()[1]
    with ProcessPoolExecutor(args.jobs, mp_context=processes()) as pool:
        futures: dict[Future[dict[str, Any]], tuple[str, str, Results, str]] = {}

        def submit(kind: str, job: tuple[str, str, Results], seed: int, lr: float | None) -> None:
            name, contender, results = job
            if results.has(kind, seed, lr):
                return
            setting, training = results.data["setting"], results.data["training"]
            if kind == "search":
                training = {**training, "steps": int(training["steps"] * experiment["search_share"])}
            tasks = experiment.get("tasks") if kind == "runs" else None
            future = pool.submit(work, args.model, args.tokens, contender, setting, training, seed, lr, tasks)
            futures[future] = (name, contender, results, kind)

        def go_on(job: tuple[str, str, Results]) -> None:
            """Submit what comes next: more of the search, or the runs."""
            contender, results = job[1], job[2]
            lrs: list[float | None] = [None]
            rates = rates_of(experiment, contender)
            if contender in BY_RECIPE:
                lrs = [RECIPE.lr(model, results.data["training"]["batch_size"] * length)]
            elif is_trained(contender) and len(rates) == 1:
                lrs = [rates[0]]
            elif is_trained(contender):
                left = results.next_rates(rates, seeds[0])
                for rate in left:
                    submit("search", job, seeds[0], rate)
                if left:
                    return
                lrs = [*results.best_lrs(seeds[0])]
            for lr in lrs:
                for seed in seeds:
                    submit("runs", job, seed, lr)

        for job in plan(experiment, args.only, args.results):
            go_on(job)
        failure: Exception | None = None
        while futures:
            for future in wait(futures, return_when="FIRST_COMPLETED").done:
                name, contender, results, kind = futures.pop(future)
                try:
                    figures = future.result()
                except ImportError as error:
                    print(f"{name} {contender} left out: {error}", flush=True)
                    continue
                except CancelledError:
                    continue
                except Exception as error:  # what runs beside it is still kept
                    failure = failure or error
                    for waiting in futures:
                        waiting.cancel()
                    continue
                results.add(kind, figures)
                if kind == "runs":
                    results.keep(figures["lr"] if contender in BY_RECIPE else None)
                lr = f" lr {figures['lr']}" if figures.get("lr") else ""
                print(
                    f"{name} {contender} {kind} seed {figures['seed']}{lr}: KL {figures['kl']:.4f} "
                    f"({figures['seconds']:.0f} s, {len(futures)} to go)",
                    flush=True,
                )
                job = (name, contender, results)
                if kind == "search" and not failure and all(left[:3] != job for left in futures.values()):
                    go_on(job)
        if failure:
            raise failure


def parse(description: str | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, help="JSON file")
    parser.add_argument("--model", default=str(EMBEDDED), help="folder or hub id; default: the embedded model")
    parser.add_argument("--tokens", type=Path, help="safetensors file; default: what the experiment says")
    parser.add_argument("--only", nargs="+", default=[], help="settings, contenders, or some of each; all by default")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the experiment")
    parser.add_argument("--tasks", nargs="+", help="of the lm-evaluation-harness, such as mmlu or commonsense")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)), help="runs at a time, a core each")
    parser.add_argument("--quick", action="store_true", help="one seed and few steps, to see that everything runs")
    parser.add_argument("--results", type=Path, help="default: a folder of the model's name beside the others")
    return parser.parse_args()


def load(args: argparse.Namespace) -> dict[str, Any]:
    """The experiment as the command line changes it; `args` gets the tokens and results that it leaves open."""
    experiment: dict[str, Any] = json.loads(args.experiment.read_text())
    experiment["model_name"] = "embedded" if Path(args.model).resolve() == EMBEDDED else Path(args.model).name
    experiment["seeds"] = args.seeds or experiment["seeds"]
    if args.tasks:
        experiment["tasks"] = {"names": args.tasks}
    if "tasks" in experiment:
        from training import check_tasks

        try:
            check_tasks(experiment["tasks"])
        except (ImportError, ValueError) as error:
            raise SystemExit(f"tasks: {error}") from error
    if args.quick:
        experiment.update(seeds=[0], learning_rates=[1e-3], quick=True)
        args.results = args.results or Path("outputs", "quick", experiment["model_name"])
    args.results = args.results or RESULTS / experiment["model_name"]
    from tokens import fingerprint, make_tokens, python_tokens

    if args.tokens is None:
        make = {"generated": make_tokens, "python": python_tokens}[experiment.get("text", "generated")]
        sequences = _QUICK_ROWS if args.quick else experiment.get("sequences", _ROWS)
        args.tokens = make(args.model, experiment["model_name"], *sequences)
    experiment["work"] = fingerprint(args.model, args.tokens)
    return experiment


def main() -> None:
    """Run an experiment, then write its table and plots."""
    args = parse(__doc__)
    for name, value in (("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs))), *ALLOCATOR.items()):
        os.environ.setdefault(name, value)  # read when a process starts: for the workers
    run_all(load(args), args)
    from tables import write_tables

    print(write_tables(args.results))


if __name__ == "__main__":
    main()

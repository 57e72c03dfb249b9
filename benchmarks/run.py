"""Runs every contender of an experiment on the same work, side by side, and keeps each one's figures.

    python benchmarks/run.py benchmarks/experiments/small.json [--model PATH_OR_HUB_ID] [--tokens FILE] [--quick]

An experiment is a JSON file: settings (arguments of `DLQATConfig`), contenders, how to train, learning rates, seeds. A
contender that trains first tries each learning rate for a part of the steps, on the first seed. While the best is the
lowest or the highest, it tries half or twice that. The best is used for all seeds, and so is one that whole runs have
shown to be better. "dlqat" takes LoRA's usual learning rate, `contenders.DEFAULT_LR`.

Results are one file an experiment, benchmarks/results/EXPERIMENT.json, whatever the models. Runs that are there are
not repeated, so an interrupted benchmark goes on where it stopped. A contender whose library is not installed is left
out, and said so. `report.py` makes the tables and pictures of docs/ from the results.

`--tokens` is a safetensors file with integer tensors `train` [n, length] and `heldout` [m, length], and of another
domain `other` [k, length], for settings that calibrate on it. Without it, an experiment's `text` says what is made:
"generated" by the model itself, as by default, or "python" for the docstrings of Python's standard library, with its
language reference as the other domain; 2048 and 256 sequences, or as many as its `sequences` says.

An experiment's `tasks` are measured on what each run has made: `names` of the lm-evaluation-harness, or "mmlu" and
"commonsense" for those usual in papers, whose data come from the Hub.

`--step_times` times a training step of every contender instead, in turns in one process: the runs themselves end at
different times of a shared machine, and theirs can't be compared.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from runs import BY_DEFAULT, Results, best_rates, next_rates

HERE = Path(__file__).resolve().parent
EMBEDDED = HERE.parent / "examples" / "embedded" / "model"
# Large buffers are kept for the next step rather than given back to the system and zeroed again: a third of the time.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
QUICK = {"steps": 3, "warmup_steps": 1, "batch_size": 2, "calibration_steps": 0}
_ROWS, _QUICK_ROWS = (2048, 256, 256), (8, 8, 64)  # of training and held-out text, and the tokens of each
_ROUNDS = 20  # of step times


class Job(NamedTuple):
    """A contender in a setting, and what is to be run of it."""

    setting: str
    contender: str
    what: dict[str, Any]

    def training(self, share: float = 1) -> dict[str, Any]:
        """With a share of the steps."""
        training = self.what["training"]
        return {**training, "steps": int(training["steps"] * share)} if "steps" in training else training


def work(model: str, tokens: Path, *arguments: Any) -> dict[str, Any]:
    """One run, in a process that keeps the task for the next."""
    import transformers
    from training import load_task, run

    transformers.utils.logging.disable_progress_bar()
    return run(load_task(model, tokens), *arguments)


def plan(experiment: dict[str, Any], only: list[str]) -> list[Job]:
    """What an experiment asks for, or of it the settings and contenders that are named."""
    jobs = []
    for name, setting in experiment["settings"].items():
        what = {"config": setting["config"], "training": {**experiment["training"], **setting.get("training", {})}}
        if experiment.get("quick"):
            what["training"].update(QUICK)
        what |= {key: experiment[key] for key in ("text", "sequences", "tasks") if key in experiment}
        jobs += [Job(name, contender, what) for contender in setting.get("contenders", experiment["contenders"])]
    names = {name for job in jobs for name in job[:2]}
    if unknown := [name for name in only if name not in names]:
        raise SystemExit(f"--only {' '.join(unknown)}: neither a setting nor a contender of this experiment.")
    for kind in (0, 1):  # settings, contenders
        wanted = {job[kind] for job in jobs} & {*only}
        jobs = [job for job in jobs if not wanted or job[kind] in wanted]
    return jobs


def rates_of(experiment: dict[str, Any], contender: str) -> list[float]:
    """The learning rates that a contender tries: as many for each, in the range that its parameters' unit asks for."""
    rates = experiment["learning_rates"]
    return rates if isinstance(rates, list) else rates.get(contender, rates["others"])


def pool(jobs: int) -> Executor:
    """New processes, none of which has threads of this one's; for one job at a time this process."""
    if jobs == 1:
        return ThreadPoolExecutor(1)
    for name, value in (("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs))), *ALLOCATOR.items()):
        os.environ.setdefault(name, value)  # read when a process starts
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))


def run_all(experiment: dict[str, Any], args: argparse.Namespace, results: Results) -> None:
    """Run what is missing, `args.jobs` at a time."""
    from contenders import DEFAULT_LR, is_trained

    seeds, model = experiment["seeds"], args.name
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    which = results.version({**versions, "python": platform.python_version()})
    with pool(args.jobs) as executor:
        futures: dict[Future[dict[str, Any]], tuple[Job, dict[str, Any]]] = {}

        def submit(job: Job, seed: int, share: float, lr: float | None) -> None:
            key = {"model": model, "setting": job.setting, "contender": job.contender, "seed": seed, "share": share}
            key |= {} if lr is None else {"lr": lr}
            if results.of(**key):
                return
            tasks = job.what.get("tasks") if share == 1 else None
            arguments = (job.contender, job.what["config"], job.training(share), seed, lr, tasks)
            future = executor.submit(work, args.model, args.tokens, *arguments)
            futures[future] = job, {**key, "versions": which}

        def go_on(job: Job) -> None:
            """Submit what comes next: more of the search, or the whole runs."""
            runs = results.of(model=model, setting=job.setting, contender=job.contender)
            rates: list[Any] = [None]
            if job.contender == BY_DEFAULT:
                rates = [DEFAULT_LR]
            elif is_trained(job.contender):
                rates = rates_of(experiment, job.contender)
                if len(rates) > 1 and (left := next_rates(runs, rates, seeds[0])):
                    for rate in left:
                        submit(job, seeds[0], experiment["search_share"], rate)
                    return
                rates = best_rates(runs, seeds[0]) if len(rates) > 1 else rates
            for lr in rates:
                for seed in seeds:
                    submit(job, seed, 1, lr)

        for job in plan(experiment, args.only):
            results.expect(model, experiment["work"], job.setting, job.what)
            go_on(job)
        failure: Exception | None = None
        while futures:
            for future in wait(futures, return_when="FIRST_COMPLETED").done:
                job, key = futures.pop(future)
                try:
                    figures = future.result()
                except ImportError as error:
                    print(f"{job.setting} {job.contender} left out: {error}", flush=True)
                    continue
                except CancelledError:
                    continue
                except Exception as error:  # what runs beside it is still kept
                    failure = failure or error
                    for waiting in futures:
                        waiting.cancel()
                    continue
                results.add("runs", {**key, **figures})
                done = " ".join(f"{name} {value}" for name, value in key.items() if name in ("seed", "share", "lr"))
                print(
                    f"{job.setting} {job.contender} {done}: KL {figures['kl']:.4f} "
                    f"({figures['seconds']:.0f} s, {len(futures)} to go)",
                    flush=True,
                )
                if key["share"] < 1 and not failure and all(other[0] != job for other in futures.values()):
                    go_on(job)
        if failure:
            raise failure


def time_steps(experiment: dict[str, Any], args: argparse.Namespace, results: Results) -> None:
    """Time what an experiment trains, setting by setting, against DL-QAT's step."""
    if not ALLOCATOR.keys() <= os.environ.keys():  # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**ALLOCATOR, **os.environ})
    import contenders
    import torch
    import training
    from speed import paired

    torch.set_num_threads(1)
    task, rounds = training.load_task(args.model, args.tokens), 2 if args.quick else _ROUNDS
    jobs = [job for job in plan(experiment, args.only) if contenders.is_trained(job.contender)]
    jobs.sort(key=lambda job: job.contender != BY_DEFAULT)  # the unit comes first
    for setting in dict.fromkeys(job.setting for job in jobs):
        steps: dict[str, Callable[[], object]] = {}
        for _, contender, what in (job for job in jobs if job.setting == setting):
            how = {**what["training"], "calibration_steps": 0, "steps": 2 * rounds}
            batches = task.calibration(how["batch_size"], 0, 0, "train")
            try:
                prepared = contenders.prepare(contender, task.load_model(), what["config"], batches, 0)
            except ImportError as error:
                print(f"{setting} {contender} left out: {error}", flush=True)
                continue
            steps[contender] = training.steps(task, contender, prepared, how, 0, 1e-4).__next__
        row = {"model": args.name, "setting": setting, "rounds": rounds, "machine": paired.machine()}
        results.add("step_times", {**row, "ratios": paired.ratios(steps, rounds)})
        print(setting, {who: times["median"] for who, times in results.data["step_times"][-1]["ratios"].items()})


def main() -> None:
    """Run an experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, help="JSON file")
    parser.add_argument("--model", default=str(EMBEDDED), help="folder or hub id; default: the embedded model")
    parser.add_argument("--name", help="the model's name in the results; default: embedded, or the folder's name")
    parser.add_argument("--tokens", type=Path, help="safetensors file; default: what the experiment says")
    parser.add_argument("--only", nargs="+", default=[], help="settings, contenders, or some of each; all by default")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the experiment")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)), help="runs at a time, a core each")
    parser.add_argument("--quick", action="store_true", help="one seed and few steps, to see that everything runs")
    parser.add_argument("--step_times", action="store_true", help="time training steps, in turns, and nothing else")
    parser.add_argument("--results", type=Path, help="default: the committed file, or with --quick one in outputs/")
    args = parser.parse_args()
    experiment: dict[str, Any] = json.loads(args.experiment.read_text())
    experiment["seeds"] = args.seeds or experiment["seeds"]
    args.name = args.name or ("embedded" if Path(args.model).resolve() == EMBEDDED else Path(args.model).name)
    folder = HERE / "results"
    if args.quick:
        experiment.update(seeds=[0], learning_rates=[1e-3], quick=True)
        folder = Path("outputs", "quick")
    results = Results(args.results or folder / args.experiment.name)
    from tokens import fingerprint, make_tokens, python_tokens

    if args.tokens is None:
        make = {"generated": make_tokens, "python": python_tokens}[experiment.get("text", "generated")]
        args.tokens = make(args.model, args.name, *(_QUICK_ROWS if args.quick else experiment.get("sequences", _ROWS)))
    experiment["work"] = fingerprint(args.model, args.tokens)
    (time_steps if args.step_times else run_all)(experiment, args, results)


if __name__ == "__main__":
    main()

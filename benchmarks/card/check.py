"""The card's check: what a GPU says of the kernels, of single layers and of a 7B model, in under six minutes, offline.

    benchmarks/card/prepare.sh FOLDER                        # here, with a network: the project and wheels
    FOLDER/benchmarks/card/check.sh --results results.jsonl  # there, without one
    python benchmarks/card/check.py --short                  # tiny sizes, in seconds, also on a CPU

Parts, each in a process and a time limit of its own, so that one that fails does not cost the others:

    tests    the kernels' tests, on the card
    layers   forward and backward of one layer in bfloat16 (4096 x 4096, 4096 x 11008, 11008 x 4096; 1, 2048 and 8192
             tokens) against PEFT's LoRA and a plain linear layer that trains; one token shows what the host costs
    models   a LLaMA of 7B random weights with gradient checkpointing and AdamW: a step of 1 and of 8 sequences of 1024
             tokens against LoRA's, peak memory, whether int4 storage trains within 7 GiB, time of a generated token

The layers' contenders take turns, and a ratio is the median of the rounds' ratios to LoRA. Each figure is written as
it comes, one JSON object a line: first what it was measured on, then {"part", "contender", ...} with "ms" and "ratio",
or "error". From a copy in benchmarks/results/card.jsonl `report.py` makes the tables of docs/speed.md.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from peft_dlqat import DLQATConfig, pack_weights

ROOT = Path(__file__).resolve().parents[2]
KERNEL_TESTS = ROOT / "tests" / "quant" / "test_triton_kernels.py"
LIMITS = {"tests": 115, "layers": 75, "models": 130}  # seconds; beside them it starts and installs
CARD = torch.cuda.is_available()
DEVICE = "cuda" if CARD else "cpu"
GIB = 2**30
ROOM = 7 * GIB  # what int4 storage is to train in
R = 16
GRID: dict[str, Any] = {"bits": 3, "group_size": 128, "r": R, "init": "minmax"}  # minmax: found soonest
LOWRANK = {"gradient": "lowrank", "magnitude": "row"}
OURS: dict[str, dict[str, Any]] = {
    "DL-QAT": {},
    "DL-QAT, int8 storage": {"storage": "int8"},
    "DL-QAT, int4 storage": {"storage": "int4"},
    "DL-QAT, lowrank gradient": LOWRANK,
    "DL-QAT, lowrank gradient, int4 storage": {**LOWRANK, "storage": "int4"},
}
IN_MODELS = ("LoRA", "DL-QAT", "DL-QAT, int4 storage", "DL-QAT, lowrank gradient, int4 storage")


@dataclass(frozen=True)
class Sizes:
    """What is measured; `LONG` is the check, `SHORT` shows that it runs."""

    tests: str  # pytest's -k
    shapes: tuple[tuple[int, int], ...]  # inputs, outputs
    tokens: tuple[int, ...]
    rounds: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    batches: tuple[int, ...]
    length: int
    generated: int


LONG = Sizes(
    "", ((4096, 4096), (4096, 11008), (11008, 4096)), (1, 2048, 8192), 9, 4096, 11008, 32, 32, 32000, (1, 8), 1024, 16
)
SHORT = Sizes("test_without_a_low_rank_update", ((64, 96),), (1, 16), 2, 64, 128, 2, 4, 128, (1,), 32, 2)


class Record:
    """Writes the figures, a line each, as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, part: str, **figures: Any) -> None:
        line = json.dumps({"part": part, **figures})
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")

    @contextmanager
    def failing(self, part: str, **key: Any) -> Iterator[None]:
        """What fails here is a line, and no more."""
        try:
            yield
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            message = f"{type(error).__name__}: {str(error)[:300]} ({Path(where.filename).name}:{where.lineno})"
            self(part, **key, error=message)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "peft"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    found: dict[str, Any] = {"device": DEVICE, "versions": versions, "threads": torch.get_num_threads()}
    if CARD:
        card = torch.cuda.get_device_properties(0)
        found |= {"card": card.name, "memory": card.total_memory, "cuda": torch.version.cuda}
    return found


def free() -> None:
    """Give memory back that nothing uses."""
    gc.collect()
    if CARD:
        torch.cuda.empty_cache()


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Of one run, from the first one's start to the last one's end on the device."""
    if CARD:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / repeats
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    return 1e3 * (time.perf_counter() - started) / repeats


def adapted(name: str, base: nn.Module, targets: Any, task_type: str | None = None) -> nn.Module:
    """The base with a contender's adapter, whose update is not zero."""
    common: dict[str, Any] = {"target_modules": targets, "task_type": task_type}
    if name == "LoRA":  # at its fastest: adapters in the base's own dtype
        return get_peft_model(base, LoraConfig(r=R, **common), autocast_adapter_dtype=False)
    model = get_peft_model(base, DLQATConfig(**GRID, **OURS[name], **common))
    pack_weights(model)
    for key, parameter in model.named_parameters():
        if "dlqat_B" in key:
            nn.init.normal_(parameter, std=1e-3)
    return model


class OneLayer(nn.Module):
    """A model of one linear layer."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.lin = nn.Linear(n_in, n_out, bias=False, device=DEVICE, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)


def check_layers(sizes: Sizes, record: Record) -> None:
    """Milliseconds of forward and backward, the gradient of the input with them, as inside a model."""

    def layer_step(model: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> Callable[[], None]:
        trained = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]

        def run() -> None:
            for tensor in trained:
                tensor.grad = None
            model(x).backward(grad)

        return run

    for n_in, n_out in sizes.shapes:
        shape, models = f"{n_in} x {n_out}", {}
        for name in ("LoRA", "trained linear layer", *OURS):
            with record.failing("layer", shape=shape, contender=name):
                torch.manual_seed(0)
                base = OneLayer(n_in, n_out)
                models[name] = base if name == "trained linear layer" else adapted(name, base, ["lin"])
        for tokens in sizes.tokens:
            x = torch.randn(tokens, n_in, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
            grad = torch.randn(tokens, n_out, device=DEVICE, dtype=torch.bfloat16)
            repeats = max(1, min(20, 2**14 // tokens)) if sizes is LONG else 1
            steps = {}
            for name, model in models.items():
                with record.failing("layer", shape=shape, tokens=tokens, contender=name):
                    step = layer_step(model, x, grad)
                    step()  # compiles and allocates
                    steps[name] = step
            times: dict[str, list[float]] = {name: [] for name in steps}
            for i in range(sizes.rounds):
                for name in list(steps) if i % 2 == 0 else reversed(list(steps)):
                    times[name].append(milliseconds(steps[name], repeats))
            for name, found in times.items():
                ratios = [own / unit for own, unit in zip(found, times.get("LoRA", []), strict=False)]
                ratio = round(statistics.median(ratios), 3) if ratios else None
                ms = round(statistics.median(found), 4)
                record("layer", shape=shape, tokens=tokens, contender=name, ms=ms, ratio=ratio)
        del models, steps
        free()


def check_models(sizes: Sizes, record: Record) -> None:
    """A training step, its peak memory, and generation; one contender after the other, each alone on the card."""
    config = LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        vocab_size=sizes.vocabulary,
        max_position_embeddings=sizes.length,
    )
    unit: dict[str, float] = {}  # LoRA's milliseconds by step

    def measure(name: str, step: str, ms: float, peak: int | None) -> None:
        if name == "LoRA":
            unit[step] = ms
        ratio = round(ms / unit[step], 3) if step in unit else None
        gib = None if peak is None else round(peak / GIB, 3)
        record("model", contender=name, step=step, ms=round(ms, 2), ratio=ratio, peak_gib=gib)

    for name in IN_MODELS:
        with record.failing("model", contender=name):
            check_model(name, config, sizes, measure, record)
        free()


def check_model(
    name: str,
    config: LlamaConfig,
    sizes: Sizes,
    measure: Callable[[str, str, float, int | None], None],
    record: Record,
) -> None:
    """All of one contender."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = adapted(name, base, "all-linear", "CAUSAL_LM").train()
    del base
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def train(batch: int) -> None:
        ids = torch.randint(3, sizes.vocabulary, (batch, sizes.length), device=DEVICE)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for batch in sizes.batches:
        step = f"{batch} x {sizes.length}"
        with record.failing("model", contender=name, step=step):
            train(batch)
            free()
            if CARD:
                torch.cuda.reset_peak_memory_stats()
            ms = statistics.median(milliseconds(lambda b=batch: train(b), 1) for _ in range(3))
            measure(name, step, ms, torch.cuda.max_memory_allocated() if CARD else None)
    optimizer.zero_grad()
    if name == "DL-QAT, int4 storage":
        record("room", contender=name, step=f"1 x {sizes.length}", gib=ROOM / GIB, trains=trains_within(train))
        optimizer.zero_grad()

    model.gradient_checkpointing_disable()
    model.eval()
    prompt = torch.randint(3, sizes.vocabulary, (1, 8), device=DEVICE)
    length = {"max_new_tokens": sizes.generated, "min_new_tokens": sizes.generated, "do_sample": False}

    def generate() -> None:
        with torch.no_grad():
            model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **length)

    with record.failing("model", contender=name, step="a generated token"):
        generate()
        measure(name, "a generated token", milliseconds(generate, 1) / sizes.generated, None)


def trains_within(train: Callable[[int], None]) -> bool | None:
    """Whether a step of one sequence fits into `ROOM`, all that is reserved counted; None without a card."""
    if not CARD:
        train(1)
        return None
    free()
    torch.cuda.set_per_process_memory_fraction(ROOM / torch.cuda.get_device_properties(0).total_memory)
    try:
        train(1)
        torch.cuda.synchronize()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def check_tests(sizes: Sizes, record: Record, limit: float) -> None:
    """The kernels' tests: how many passed, and the names of those that didn't."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "--tb=line"]
        command += ["-W", "default", f"--junitxml={report}", str(KERNEL_TESTS), "-k", sizes.tests]
        if sizes is LONG and importlib.util.find_spec("xdist"):  # hundreds of variants are to be compiled
            command += ["-n", str(os.cpu_count() or 1)]
        started = time.perf_counter()
        run(command, limit, record, "tests")
        seconds = round(time.perf_counter() - started, 1)
        if report.exists():
            cases = list(ElementTree.parse(report).iter("testcase"))
            bad = [case.get("name") for case in cases if {child.tag for child in case} & {"failure", "error"}]
            skipped = sum(any(child.tag == "skipped" for child in case) for case in cases)
            passed = len(cases) - len(bad) - skipped
            record("tests", passed=passed, failed=len(bad), skipped=skipped, names=bad[:20], seconds=seconds)


def run(command: list[str], limit: float, record: Record, part: str) -> None:
    """Run a process; what it says where it ends badly, or not in time, is a line."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if part == "tests" else None
    with tempfile.TemporaryFile() as output:
        said = {"stdout": output, "stderr": subprocess.STDOUT} if part == "tests" else {"stderr": output}
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, timeout=limit, check=False, **said)
            problem = f"ended with {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            problem = f"not done in {limit:.0f} s"
        output.seek(0)
        if problem:
            said = output.read().decode(errors="replace")[-2000:]
            record(part, error=problem, tail=said.replace(f"{ROOT}/", ""))


def main() -> None:
    """Run the parts, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="tiny sizes, all in one process")
    parser.add_argument("--parts", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--results", type=Path, default=Path("outputs", "card.jsonl"))
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # a part, in the process of its own
    args = parser.parse_args()
    args.results.parent.mkdir(parents=True, exist_ok=True)
    sizes, record = (SHORT if args.short else LONG), Record(args.results.resolve())
    if not args.here:
        if not CARD and not args.short:
            raise SystemExit("there is no CUDA device; --short shows on a CPU that the check runs.")
        record.path.unlink(missing_ok=True)
        record("machine", short=args.short, **machine())
    started = time.perf_counter()
    for part in args.parts:
        if part == "tests":
            check_tests(sizes, record, LIMITS[part])
        elif args.short or args.here:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # nothing is calibrated, and groups of tiny layers are smaller
                {"layers": check_layers, "models": check_models}[part](sizes, record)
        else:
            command = [sys.executable, __file__, "--here", "--parts", part, "--results", str(record.path)]
            run(command, LIMITS[part], record, part)
    if not args.here:
        record("done", seconds=round(time.perf_counter() - started, 1))


if __name__ == "__main__":
    main()

"""One layer, and a whole model, on an NVIDIA GPU in bfloat16, against PEFT's LoRA on the same base.

    python benchmarks/speed/gpu.py layer [--tokens 512 2048 8192]   forward and backward, shapes of a LLaMA of 7 B
    python benchmarks/speed/gpu.py model [--size 7B 13B] [--batch 1 8]  steps of so many times 1024 tokens, gradient
                                                                    checkpointing, AdamW

`layer`: contenders take turns in one process (A B C, C B A, ...), and each is set against LoRA in its round. `model`:
they take turns as processes, each with the whole card, so that tokens a second and peak memory are its own.
An op that is not what the reference says is not timed. Weights are random: nothing depends on what is learnt.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from paired import machine, ratios
from peers import PEERS, replace_layers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from peft_dlqat import DLQATConfig, pack_weights
from peft_dlqat.layer import DLQATLayer
from peft_dlqat.quant import dispatch, reference
from peft_dlqat.quant.quantizer import unrounded_codes

RESULTS = Path(__file__).parents[1] / "results" / "speed"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
R = 16
GRID: dict[str, Any] = {"bits": 3, "group_size": 128, "r": R, "init": "minmax"}
LOWRANK = {"gradient": "lowrank", "magnitude": "row"}
CONTENDERS: dict[str, dict[str, Any] | None] = {
    "LoRA": None,
    "LoRA, 4-bit base": None,
    "DL-QAT": {},
    "DL-QAT, int8 storage": {"storage": "int8"},
    "DL-QAT, int4 storage": {"storage": "int4"},
    "DL-QAT, lowrank gradient": LOWRANK,
    "DL-QAT, lowrank gradient, int8 storage": {**LOWRANK, "storage": "int8"},
    "DL-QAT, lowrank gradient, int4 storage": {**LOWRANK, "storage": "int4"},
}
LAYERS = {"4096 x 4096": (4096, 4096), "4096 x 11008": (4096, 11008), "11008 x 4096": (11008, 4096)}  # in, out
MODELS = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "quick": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4},
}
LENGTH = 1024


class OneLayer(nn.Module):
    """A model of one linear layer."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.lin = nn.Linear(n_in, n_out, bias=False, device=DEVICE, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)


def available() -> list[str]:
    """Contenders that this machine can run."""
    four_bits = DEVICE == "cuda" and find_spec("bitsandbytes") is not None
    return [name for name in (*CONTENDERS, *PEERS) if "4-bit" not in name or four_bits]


def adapted(name: str, base: nn.Module, targets: Any) -> nn.Module:
    """The base model with the contender's adapter, on the GPU; the update is not zero."""
    if name in PEERS:
        return replace_layers(base.to(DEVICE), PEERS[name], GRID["bits"], GRID["group_size"], R)
    kwargs = CONTENDERS[name]
    if kwargs is None:
        base.requires_grad_(False)
        if "4-bit" in name:
            in_four_bits(base)
        # LoRA at its fastest: adapters in the base's own dtype.
        config = LoraConfig(r=R, target_modules=targets)
        return get_peft_model(base.to(DEVICE), config, autocast_adapter_dtype=False)
    model = get_peft_model(base, DLQATConfig(**GRID, **kwargs, target_modules=targets))
    pack_weights(model)
    for parameter_name, parameter in model.named_parameters():
        if "dlqat_B" in parameter_name:
            nn.init.normal_(parameter, std=0.1)
    return model.to(DEVICE)


def in_four_bits(model: nn.Module) -> None:
    """Linear layers but the head in bitsandbytes' NF4, as QLoRA has them."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            small = bnb.nn.Linear4bit(
                module.in_features, module.out_features, False, torch.bfloat16, quant_type="nf4", device="meta"
            )
            small.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            model.set_submodule(name, small.to(DEVICE))  # quantizes
    model.is_loaded_in_4bit = True  # by which PEFT knows that its own layer for these is wanted


def step(model: nn.Module, x: torch.Tensor, grad: torch.Tensor, repeats: int) -> Callable[[], None]:
    """Forward and backward, so often that launching and waiting do not count, with the gradient of x as in a model."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def run() -> None:
        for _ in range(repeats):
            for tensor in (x, *parameters):
                tensor.grad = None
            model(x).backward(grad)
        synchronize()

    return run


def synchronize() -> None:
    """Wait for the GPU."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def check(name: str, model: nn.Module) -> None:
    """Refuse an op whose codes, output or gradients are not the reference's.

    Raises:
        SystemExit: naming what is off, and by how much.
    """
    layer = next(module for module in model.modules() if isinstance(module, DLQATLayer))
    grid, scaling, quantizer = layer.dlqat_grid["default"], layer.dlqat_scaling["default"], layer.quantizer("default")
    with torch.no_grad():
        weight = layer.frozen_weight()
        unrounded = unrounded_codes(weight, quantizer, grid, scaling).flatten(-2)
        edge = ((unrounded - unrounded.floor()) - 0.5).abs() < 1e-4
        differ = layer.quantized_weight().codes != reference.codes(weight, quantizer, grid, scaling)
    if (differ & ~edge).any() or edge.float().mean() > 0.01:
        raise SystemExit(f"{name} is not timed: {int((differ & ~edge).sum())} codes are not the reference's")

    x = torch.randn(256, layer.in_features, device=DEVICE, dtype=torch.bfloat16)
    grad = torch.randn(256, layer.out_features, device=DEVICE, dtype=torch.bfloat16)
    trained = {key: parameter for key, parameter in layer.named_parameters() if parameter.requires_grad}

    def outcome() -> dict[str, torch.Tensor]:
        own = x.clone().requires_grad_(True)
        y = layer(own)
        grads = torch.autograd.grad(y, [own, *trained.values()], grad)
        return {"output": y.detach(), **dict(zip(["x", *trained], grads, strict=True))}

    found = outcome()
    with mock.patch.object(dispatch, "_on_nvidia", lambda _: False):
        expected = outcome()
    for what, true in expected.items():
        error = ((found[what].float() - true.float()).norm() / true.float().norm()).item()
        if not error <= 1e-2:  # bfloat16
            raise SystemExit(f"{name} is not timed: {what} is off by {error:.1e}")


def time_layer(n_in: int, n_out: int, tokens: list[int], rounds: int, work: int) -> dict[str, dict[str, Any]]:
    """By number of tokens and contender: time over LoRA's, milliseconds, bytes of the layer and of a step beside it.

    A timed run is of `work` tokens in all.
    """
    models = {}
    for name in available():
        torch.manual_seed(0)
        models[name] = adapted(name, OneLayer(n_in, n_out), ["lin"])
        if CONTENDERS.get(name) is not None:
            check(name, models[name])
    found: dict[str, dict[str, Any]] = {}
    for count in tokens:
        x = torch.randn(count, n_in, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn(count, n_out, device=DEVICE, dtype=torch.bfloat16)
        repeats = max(1, work // count)
        steps = {name: step(model, x, grad, repeats) for name, model in models.items()}
        times = ratios(steps, rounds)
        rows = found[f"{count} tokens"] = {}
        for name, model in models.items():
            tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
            own = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            rows[name] = {"time_ratio": times[name], "bytes_of_layer": own, **alone(step(model, x, grad, repeats))}
            rows[name]["ms"] = round(rows[name]["ms"] / repeats, 4)
            print(f"  {count} tokens, {name}: {rows[name]}", flush=True)
    return found


def alone(run: Callable[[], None]) -> dict[str, Any]:
    """Milliseconds and the peak of memory above what is there already, of one run of several steps."""
    before = 0
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    started = time.perf_counter()
    run()
    elapsed = 1e3 * (time.perf_counter() - started)
    return {"ms": elapsed, "bytes_of_step": torch.cuda.max_memory_allocated() - before if DEVICE == "cuda" else None}


def measure_model(name: str, size: str, batch: int, steps: int) -> dict[str, float | None]:
    """In this process, which has the card to itself: tokens a second, and peak memory in GB while training."""
    torch.manual_seed(0)
    config = LlamaConfig(**MODELS[size], vocab_size=32000, max_position_embeddings=LENGTH)
    # A base that is packed must not be on the GPU whole first, so that it may be larger than that.
    packs = bool((CONTENDERS.get(name) or {}).get("storage")) or "4-bit" in name
    with torch.device("cpu" if packs else DEVICE):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = adapted(name, base, "all-linear").train()
    if CONTENDERS.get(name) is not None:
        check(name, model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, config.vocab_size, (batch, LENGTH), device=DEVICE)

    def run() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        run()
    synchronize()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for _ in range(steps):
        run()
    synchronize()
    return {
        "tokens_per_second": round(steps * batch * LENGTH / (time.perf_counter() - started), 1),
        "peak_GB": round(torch.cuda.max_memory_allocated() / 1e9, 3) if DEVICE == "cuda" else None,
    }


def time_model(size: str, batch: int, rounds: int, steps: int) -> dict[str, Any]:
    """By contender: each process's figures, and the ratio of step times to LoRA's of the same round."""
    names = available()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names if i % 2 == 0 else reversed(names):
            command = [sys.executable, __file__, "model", "--size", size, "--batch", str(batch), "--only", name]
            command += ["--steps", str(steps)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:  # too large for the card, or refused: the others go on
                found[name].append({"error": result.stderr.strip().splitlines()[-1]})
            else:
                found[name].append(json.loads(result.stdout.splitlines()[-1]))
            print(f"  {size}, {batch} x {LENGTH} tokens, {name}: {found[name][-1]}", flush=True)
    rows = {}
    for name, runs in found.items():
        pairs = [
            unit["tokens_per_second"] / run["tokens_per_second"]
            for unit, run in zip(found["LoRA"], runs, strict=True)
            if "tokens_per_second" in unit and "tokens_per_second" in run
        ]
        rows[name] = {"time_ratios": [round(ratio, 3) for ratio in pairs], "runs": runs}
    return rows


def card() -> dict[str, Any]:
    """What the figures depend on."""
    versions = {}
    for package in ("triton", "bitsandbytes"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    if DEVICE == "cpu":
        return {**machine(), **versions}
    properties = torch.cuda.get_device_properties(0)
    own = {"gpu": properties.name, "gpu_memory": properties.total_memory, "cuda": torch.version.cuda}
    return {**machine(), **versions, **own}


def main() -> None:
    """Measure, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["layer", "model"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--size", nargs="+", choices=MODELS, default=["7B", "13B"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="sequences of 1024 tokens a step")
    parser.add_argument("--rounds", type=int, help="default: 11 of a layer, 2 of a model")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a model in each process")
    parser.add_argument("--quick", action="store_true", help="a small layer, to see that it runs, without a GPU too")
    parser.add_argument("--only", choices=[*CONTENDERS, *PEERS], help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help="default: gpu-layer.json or gpu-model.json beside the others")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*never calibrated.*")
    if args.only:
        print(json.dumps(measure_model(args.only, args.size[0], args.batch[0], args.steps)))
        return
    if DEVICE == "cpu" and not args.quick:
        raise SystemExit("there is no CUDA device; --quick shows on a CPU that the script runs.")
    rows = {}
    if args.mode == "layer":
        shapes = {"256 x 512": (256, 512)} if args.quick else LAYERS
        for name, (n_in, n_out) in shapes.items():
            print(name, flush=True)
            tokens, work = ([64], 64) if args.quick else (args.tokens, 2**16)
            rows[name] = time_layer(n_in, n_out, tokens, args.rounds or 11, work)
    else:
        for size in ["quick"] if args.quick else args.size:
            for batch in args.batch:
                name = f"{size}, {batch} x {LENGTH} tokens"
                rows[name] = time_model(size, batch, args.rounds or 2, args.steps)
    path = args.results or RESULTS / f"gpu-{args.mode}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "benchmarks/speed/gpu.py", *sys.argv[1:]])
    path.write_text(json.dumps({"command": command, "machine": card(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

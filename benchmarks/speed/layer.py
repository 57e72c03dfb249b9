"""Forward and backward of one linear layer on a CPU, against PEFT's LoRA on the same weight.

    python benchmarks/speed/layer.py [--quick]

Each row changes one thing in the first: 2048 tokens, a layer of 2048 x 2048, r = 16, 3 bits, groups of 128, float32.
A layer that doesn't compute with the weight that it is merged to is not timed.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from eager import PEERS
from paired import machine, ratios
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_dlqat import DLQATConfig, pack_weights

RESULTS = Path(__file__).parents[1] / "results" / "layer.json"


@dataclass(frozen=True)
class Work:
    """What is timed."""

    tokens: int = 2048
    n_in: int = 2048
    n_out: int = 2048
    r: int = 16
    bits: int = 3
    group_size: int = 128


# DL-QAT as it comes, and with what makes it faster or smaller.
OURS: dict[str, dict[str, Any]] = {
    "DL-QAT": {},
    "DL-QAT, int8 storage": {"storage": "int8"},
    "DL-QAT, int4 storage": {"storage": "int4"},
    "DL-QAT, bf16 gradient": {"gradient": "bf16"},
    "DL-QAT, lowrank gradient": {"gradient": "lowrank", "magnitude": "row"},
    "DL-QAT, lowrank gradient, int8 storage": {"gradient": "lowrank", "magnitude": "row", "storage": "int8"},
}
# Not in every row.
ALSO_OURS: dict[str, dict[str, Any]] = {
    "DL-QAT, bf16 gradient, int8 storage": {"gradient": "bf16", "storage": "int8"},
}
WORK = {
    "2048 x 2048": Work(),
    "512 tokens": Work(tokens=512),
    "8192 tokens": Work(tokens=8192),
    "4096 x 4096": Work(n_in=4096, n_out=4096),
    "4096 x 11008": Work(n_in=4096, n_out=11008),
    "11008 x 4096": Work(n_in=11008, n_out=4096),
    "2 bits": Work(bits=2),
    "4 bits": Work(bits=4),
    "groups of 32": Work(group_size=32),
    "one group a row": Work(group_size=-1),
    "r = 64": Work(r=64),
}


class OneLayer(nn.Module):
    """A model of one linear layer."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.lin = nn.Linear(work.n_in, work.n_out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)


def fresh(work: Work) -> OneLayer:
    """The same weight for everybody."""
    torch.manual_seed(0)
    return OneLayer(work).requires_grad_(False)


def ours(work: Work, **kwargs: Any) -> nn.Module:
    """DL-QAT on a fresh layer, with an update that is not zero."""
    config = DLQATConfig(
        bits=work.bits, group_size=work.group_size, r=work.r, target_modules=["lin"], init="minmax", **kwargs
    )
    model = get_peft_model(fresh(work), config)
    pack_weights(model)
    for name, parameter in model.named_parameters():
        if "dlqat_B" in name:
            nn.init.normal_(parameter, std=1e-3)
    return model


def lora(work: Work) -> nn.Module:
    """PEFT's LoRA on a fresh layer."""
    return get_peft_model(fresh(work), LoraConfig(r=work.r, target_modules=["lin"]))


def step(model: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> Callable[[], None]:
    """Forward and backward, with the gradient of x as inside a model."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def run() -> None:
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        model(x).backward(grad)

    return run


def kept_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """What autograd keeps of one forward pass until backward, beside the model and x themselves."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), x)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(kept.values())


def check(name: str, model: nn.Module, work: Work) -> None:
    """Refuse a layer that computes something else than it is merged to.

    Raises:
        SystemExit: if its output, or the gradient of its input, is off.
    """
    x, grad = torch.randn(64, work.n_in, requires_grad=True), torch.randn(64, work.n_out)
    y = model(x)
    y.backward(grad)
    model.zero_grad()
    weight = copy.deepcopy(model).merge_and_unload().lin.weight.detach().double()
    for what, found, true in (("output", y, x.double() @ weight.T), ("gradient of x", x.grad, grad.double() @ weight)):
        error = ((found.double() - true).norm() / true.norm()).item()
        if not error <= 1e-5:
            raise SystemExit(f"{name} is not timed: its {what} is off by {error:.1e}")


def contenders(work: Work, more: bool, everybody: bool) -> dict[str, nn.Module]:
    """LoRA first: the unit."""
    models: dict[str, nn.Module] = {"LoRA": lora(work)}
    for name, kwargs in ({**OURS, **ALSO_OURS} if more else OURS).items():
        models[name] = ours(work, **kwargs)
        check(name, models[name], work)
    models["trained linear layer"] = fresh(work).requires_grad_(True)
    if everybody:
        arguments = (fresh(work).lin.weight, work.bits, work.group_size, work.r)
        models.update({name: kind(*arguments) for name, kind in PEERS.items()})
    return models


def main() -> None:
    """Time all work, and keep the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small layer and two rounds, to see that it runs")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", nargs="+", default=list(WORK), help="rows to run")
    parser.add_argument("--results", type=Path, help="default: the committed file, or with --quick one in outputs/")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*never calibrated.*")
    args.results = args.results or (Path("outputs", "quick", RESULTS.name) if args.quick else RESULTS)
    found = json.loads(args.results.read_text())["rows"] if args.results.exists() else {}
    for name in args.only:
        work = WORK[name]
        if args.quick:
            work = replace(work, tokens=64, n_in=256, n_out=256)
        torch.manual_seed(0)
        x, grad = torch.randn(work.tokens, work.n_in, requires_grad=True), torch.randn(work.tokens, work.n_out)
        models = contenders(work, name in ("2048 x 2048", "512 tokens"), everybody=name == "2048 x 2048")
        rounds = 2 if args.quick else args.rounds
        found[name] = {
            "work": asdict(work),
            "rounds": rounds,
            "machine": machine(),
            "kept_bytes": {key: kept_bytes(model, x) for key, model in models.items()},
            "time_ratio": ratios({key: step(model, x, grad) for key, model in models.items()}, rounds),
        }
        print(name, {key: value["median"] for key, value in found[name]["time_ratio"].items()}, flush=True)
        args.results.parent.mkdir(parents=True, exist_ok=True)
        command = "python benchmarks/speed/layer.py"
        args.results.write_text(
            json.dumps({"command": command, "rows": {key: found[key] for key in WORK if key in found}}, indent=1)
            + "\n"
        )


if __name__ == "__main__":
    main()

"""Trains a small model partitioned by DeepSpeed's ZeRO-3, on the CPU.

    torchrun --nproc_per_node 2 zero3_training.py FOLDER

With full storage the base model is partitioned as it is loaded, before the adapter is made; a packed one by
`deepspeed.initialize`. Every process writes what it ended with to FOLDER, `STORAGE-RANK.pt`; a single one, without
torchrun, `STORAGE-single.pt`.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from conftest import lm_batches, say_calibrated
from peft import get_peft_model
from scripts.sharded_training import BATCH, STEPS, rank, world_size
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from peft_dlqat import DLQATConfig, load_packed
from peft_dlqat.layer import CALIBRATED

STORAGES = ("full", "int8")

DEEPSPEED = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "train_micro_batch_size_per_gpu": BATCH // 2,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def make_model(folder: Path, storage: str) -> nn.Module:
    config = DLQATConfig(
        bits=3, group_size=16, r=4, scale_dtype="float32", storage=storage, task_type="CAUSAL_LM", init="minmax"
    )
    torch.manual_seed(0)
    if storage == "full":
        # While it lives, from_pretrained partitions the model.
        keep = HfDeepSpeedConfig(DEEPSPEED) if world_size() > 1 else None
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        torch.manual_seed(0)
        model = get_peft_model(base, config)
        del keep
    else:
        model = load_packed(folder / "base", config)
    say_calibrated(model)
    return model.train()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def train(folder: Path, storage: str) -> dict[str, Any]:
    model = make_model(folder, storage)
    optimizer = torch.optim.SGD(trained(model).values(), lr=1e-5)
    run: Any = model
    if world_size() > 1:
        run, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=DEEPSPEED)
    local = sum(getattr(parameter, "ds_tensor", parameter).numel() for parameter in model.parameters())
    losses = []
    for ids in lm_batches(STEPS, batch=BATCH):
        loss = run(**{name: tensor.chunk(world_size())[rank()] for name, tensor in ids.items()}).loss
        losses.append(loss.item())
        if world_size() > 1:
            run.backward(loss)
            run.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    names = trained(model)
    calibrated = {
        name: parameter
        for name, parameter in model.named_parameters()
        if any(f".{kind}." in name for kind in CALIBRATED)
    }
    whole = deepspeed.zero.GatheredParameters([*names.values(), *calibrated.values()])
    with whole if world_size() > 1 else nullcontext():
        adapter, grid = (
            {name: parameter.detach().clone() for name, parameter in tensors.items()}
            for tensors in (names, calibrated)
        )
    return {"losses": losses, "adapter": adapter, "grid": grid, "numbers": local}


def main(folder: Path) -> None:
    if world_size() == 1:
        for storage in STORAGES:
            torch.save(train(folder, storage), folder / f"{storage}-single.pt")
        return
    # Its own collectives by shared memory would have to be compiled first; gloo will do.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed("gloo")
    for storage in STORAGES:
        torch.save(train(folder, storage), folder / f"{storage}-{rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

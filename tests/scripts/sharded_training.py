"""Trains a small model sharded by FSDP2 as accelerate does it, or in one process.

    torchrun --nproc_per_node 2 sharded_training.py FOLDER

Every process writes what it ended with to FOLDER, `CASE-RANK.pt`; the first one saves the adapter in `CASE`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from conftest import lm_batches, say_calibrated, tiny_model
from peft import get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from peft_dlqat import DLQATConfig, TeacherCache, calibrate, pack_weights
from peft_dlqat.layer import adapter_layers

STEPS = 4
BATCH = 4
# storage, dtype of the base, gradient checkpointing, and the rest of the config
CASES: dict[str, tuple[str, torch.dtype, bool, dict[str, Any]]] = {
    "full": ("full", torch.float32, False, {}),
    "int8": ("int8", torch.float32, True, {"zero_point": "none"}),
    "int4-bfloat16": ("int4", torch.bfloat16, False, {"zero_point": "float"}),
    "int2-lowrank": ("int2", torch.float32, True, {"bits": 2, "gradient": "lowrank", "magnitude": "row"}),
}


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def make_model(case: str) -> nn.Module:
    """The adapter is on its grid, and packed, before the model is sharded."""
    storage, dtype, checkpointing, changes = CASES[case]
    model = tiny_model(dtype=dtype)
    torch.manual_seed(0)
    config = DLQATConfig(
        **{"bits": 3, "group_size": 16, "r": 4, "storage": storage, "scale_dtype": "float32", **changes},
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    pack_weights(model)
    say_calibrated(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def shard(model: nn.Module, policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    """By accelerate's own function; its Accelerator uses it on accelerators only."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
        mixed_precision_policy=policy,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=rank() == 0
    )
    return fsdp2_prepare_model(accelerator, model)


def train(case: str, folder: Path) -> dict[str, Any]:
    """Losses, the first step's gradients, the adapter at the end, and how much of the parameters this process had."""
    model = make_model(case).train()
    whole_bytes = sum(parameter.nbytes for parameter in model.parameters())
    if world_size() > 1:
        model = shard(model)
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    # As in distributed_training.py: a step of SGD keeps last bits last bits.
    optimizer = torch.optim.SGD(trained.values(), lr=1e-5)
    losses, gradients = [], {}
    for ids in lm_batches(STEPS, batch=BATCH):
        own = {name: tensor.chunk(world_size())[rank()] for name, tensor in ids.items()}
        loss = model(**own).loss
        loss.backward()
        losses.append(loss.item())
        if not gradients:
            gradients = {name: whole(parameter.grad) for name, parameter in trained.items()}
        optimizer.step()
        optimizer.zero_grad()
    result = {"losses": losses, "gradients": gradients, "bytes": sum(t.nbytes for t in local), "whole": whole_bytes}
    if world_size() == 1:
        return {**result, "adapter": get_peft_model_state_dict(model)}
    # As accelerate's get_state_dict, and the Trainer by it.
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if rank() == 0:
        model.save_pretrained(folder / case, state_dict=state)
    return {**result, "adapter": {name: whole(tensor) for name, tensor in get_peft_model_state_dict(model).items()}}


def refusals() -> dict[str, str]:
    """What a sharded model is told it cannot do."""
    model = shard(make_model("full"))
    layer = next(iter(adapter_layers(model)[1].values()))
    batches = lm_batches(1)
    attempts = {
        "calibrate": lambda: calibrate(model, batches, progress=False),
        "merge": model.merge_adapter,
        "codes": layer.quantized_weight,
        "cache": lambda: TeacherCache().claim(model),
    }
    half = shard(make_model("full"), MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    attempts["half"] = lambda: half(**batches[0])
    messages = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except ValueError as error:
            messages[name] = str(error)
    return messages


def cached_teacher() -> torch.Tensor:
    """The teacher's logits of batch `rank()`, from a cache that has the first process's and not the second's."""
    model, cache = make_model("full"), TeacherCache()
    cache.claim(model)
    model = shard(model)
    batches = [{"input_ids": batch["input_ids"]} for batch in lm_batches(2, batch=BATCH)]
    cache.teacher(model, batches[0])
    return cache.teacher(model, batches[rank()])


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    torch.save(cached_teacher(), folder / f"teacher-{rank()}.pt")
    dist.barrier()  # where one process still runs the teacher
    for case in CASES:
        torch.save(train(case, folder), folder / f"{case}-{rank()}.pt")
    torch.save(refusals(), folder / f"refusals-{rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

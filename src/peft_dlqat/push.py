"""Keeps the package's section in the model card that `push_to_hub` writes."""

from __future__ import annotations

import json
import os
from functools import wraps
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftModel
from transformers.utils.hub import PushToHubMixin

from .adapter_card import write_section
from .config import DLQATConfig


def keep_section_on_push() -> None:
    """Let `push_to_hub` keep the section. Idempotent.

    transformers' `PushToHubMixin.push_to_hub`, which PEFT's models inherit, writes a card of its own (or the
    repository's) over the one that `save_pretrained` has just written, and uploads the folder.
    """
    upload = PushToHubMixin._upload_modified_files
    if hasattr(upload, "_keeps_dlqat_section"):
        return

    @wraps(upload)
    def upload_with_section(self: Any, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        _restore_card(self, working_dir)
        return upload(self, working_dir, *args, **kwargs)

    upload_with_section._keeps_dlqat_section = True  # type: ignore[attr-defined]
    PushToHubMixin._upload_modified_files = upload_with_section  # type: ignore[method-assign]


def _restore_card(model: Any, directory: str | os.PathLike[str]) -> None:
    """Bring back PEFT's metadata and this package's section, where the adapter saved in `directory` is one of ours."""
    config, card = Path(directory) / "adapter_config.json", Path(directory) / "README.md"
    if not config.is_file() or json.loads(config.read_text(encoding="utf-8")).get("peft_type") != "DLQAT":
        return
    if isinstance(model, PeftModel) and card.is_file():
        tags = ModelCard.load(card).data.tags or []
        model.create_or_update_model_card(str(directory))
        updated = ModelCard.load(card)
        updated.data.tags = sorted({*tags, *(updated.data.tags or [])})  # PEFT drops the user's
        updated.save(card)
    write_section(directory, DLQATConfig.from_pretrained(str(directory)))

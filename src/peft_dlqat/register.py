"""Registers the method with PEFT, on `import peft_dlqat`.

PEFT's `PeftType` is a closed enum and `register_peft_method` refuses names outside it. So the member is added to the
enum first, exactly as the class statement would have made it; everything after is PEFT's own.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from peft.utils import PeftType, register_peft_method

if TYPE_CHECKING:
    from peft.config import PeftConfig

NAME = "dlqat"


def extend_peft_type() -> None:
    """Add `PeftType.DLQAT`, unless it is there: PEFT's own member, or one of an earlier import."""
    member_name = NAME.upper()
    if member_name in PeftType.__members__:
        return
    enum: Any = PeftType
    member = str.__new__(enum, member_name)
    member._name_ = member._value_ = member_name
    member._sort_order_ = len(enum._member_names_)
    enum._member_names_.append(member_name)
    enum._member_map_[member_name] = member
    enum._value2member_map_[member_name] = member
    type.__setattr__(enum, member_name, member)


def register(config_cls: type[PeftConfig], model_cls: type) -> None:
    """Make the method known to `get_peft_model`, `PeftModel.from_pretrained` and all the rest.

    Idempotent. Where PEFT already has a method of this name that is not ours, PEFT's stays and a warning says so.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType.DLQAT)  # type: ignore[attr-defined]
    if known is None:
        register_peft_method(name=NAME, config_cls=config_cls, model_cls=model_cls)
    elif known is not config_cls:
        warnings.warn(
            f"PEFT already has a method named {NAME!r} ({known.__module__}.{known.__qualname__}), which stays in "
            "place: use `from peft import DLQATConfig`, and uninstall peft-dlqat.",
            stacklevel=3,
        )

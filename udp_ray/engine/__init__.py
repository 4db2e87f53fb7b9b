"""Private training in torch, without Ray: `Trainer` for any module, DeepSpeed for language models.

    from udp_ray.engine import Trainer

Names are imported on first use, so that importing this package loads neither torch nor DeepSpeed.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from udp_ray.engine.trainer import InMemoryAccountant, Trainer, TrainerResult, group_by_user

__all__ = ["InMemoryAccountant", "Trainer", "TrainerResult", "group_by_user"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from udp_ray.engine import trainer

    return getattr(trainer, name)

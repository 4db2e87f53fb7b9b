"""Imports of heavy libraries, without the work of the garbage collector.

    with quick_imports():
        import torch

An import makes hundreds of thousands of objects that live until the process ends. The collector
visits them again and again and finds nothing: a quarter of the time that torch, transformers and
DeepSpeed take to load.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Switches the garbage collector off for a block of imports, and then leaves their objects out.

    `gc.freeze` moves all objects that exist out of the collector's sight, so later collections do
    not visit them either. Where nothing was imported, it moves none: a later call in a notebook
    would keep models that are no longer used. A collector that was off stays off.
    """
    was_enabled = gc.isenabled()
    num_modules = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            if len(sys.modules) > num_modules:
                gc.freeze()
            gc.enable()

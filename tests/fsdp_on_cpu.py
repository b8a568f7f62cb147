"""
The command line with FSDP2 over gloo: `python fsdp_on_cpu.py align ...`. accelerate turns FSDP on beside accelerators
alone; here it takes the processes for such.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from accelerate.state import DistributedType, PartialState

prepare = PartialState.__init__


def on_accelerators(self: PartialState, *args: Any, **kwargs: Any) -> None:
    prepare(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = on_accelerators

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from cli import main

    sys.exit(main())

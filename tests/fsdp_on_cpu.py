"""
The command line with FSDP2 over gloo: `python fsdp_on_cpu.py align ...`. accelerate turns FSDP on beside accelerators
alone; here it takes the processes for such.
"""

from __future__ import annotations

import sys
from typing import Any

from accelerate.state import DistributedType, PartialState

prepare = PartialState.__init__


def on_accelerators(self: PartialState, *args: Any, **kwargs: Any) -> None:
    prepare(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = on_accelerators

if __name__ == "__main__":
    from fpo.cli import main

    sys.exit(main())

"""
The command line with DeepSpeed over gloo: `python deepspeed_on_cpu.py align ...`. accelerate prepares DeepSpeed's
processes beside accelerators alone, and ZeRO-3 must know them when a model is loaded.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    import deepspeed

    from fpo.cli import main

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    sys.exit(main())

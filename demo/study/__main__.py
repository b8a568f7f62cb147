"""
Run the study of docs/study.md: `python -m fpo.demo.study [--world demo-world] [--output runs/study] [--processes 2]`.

Started again it goes on with what is missing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fpo.demo.build import build_world
from fpo.demo.study.plan import Place
from fpo.demo.study.run import study
from fpo.errors import FpoError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fpo.demo.study", description="Run the study of docs/study.md.")
    parser.add_argument("--world", type=Path, default=Path("demo-world"), help="default: demo-world")
    parser.add_argument("--output", type=Path, default=Path("runs/study"), help="default: runs/study")
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time (default: 2)")
    options = parser.parse_args(arguments)
    try:
        build_world(options.world)
        study(Place(options.world.resolve(), options.output.resolve()), options.processes)
    except FpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`fpo merge`: an adapter and its base to one model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from fpo.commands.libraries import quiet_libraries
from fpo.commands.options import AsJson
from fpo.commands.wording import size


def merge_command(
    run: Annotated[Path, typer.Argument(help="Run folder of fpo align, trained with policy.lora.", metavar="RUN")],
    output: Annotated[
        Path | None, typer.Option("--output", help="New folder; else RUN/merged, or RUN/merged-N.", metavar="FOLDER")
    ] = None,
    checkpoint: Annotated[
        int | None, typer.Option("--checkpoint", help="Merge RUN/checkpoint-N, finished or not.", metavar="N")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the weights that are written.")
    ] = "float32",
    as_json: AsJson = False,
) -> None:
    """Write the policy of a LoRA run as one model with its tokenizer, which opens without PEFT and without its base."""
    quiet_libraries()
    from fpo.stage2_align import merge_run

    report = merge_run(run, None if output is None else output.expanduser(), checkpoint, dtype)
    if as_json:
        print(json.dumps({**vars(report), "folder": str(report.folder)}, indent=2))
        return
    print(f"merged      {report.folder}, {report.dtype}, {size(report.n_bytes)}")
    print(f"check       {report.difference:.2g} nats per token between it and the adapter on its base")

"""`fpo generate`: what a model writes to a prompt set, in the files that judges read."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from fpo.commands.libraries import quiet_libraries
from fpo.commands.options import AsJson
from fpo.errors import RunError


def generate_command(
    model: Annotated[str, typer.Argument(help="Run folder, or any model (folder, hub id).", metavar="RUN")],
    prompts: Annotated[str, typer.Option("--prompts", help="File, folder or hub id of prompts.", metavar="SOURCE")],
    output: Annotated[Path, typer.Option("--output", help="Where the completions go.", metavar="FILE")],
    format: Annotated[
        str, typer.Option("--format", help="jsonl, alpaca-eval, arena-hard or mt-bench.", metavar="FORMAT")
    ] = "jsonl",
    split: Annotated[str, typer.Option("--split", help="Of the prompts; may slice: train[:100].")] = "train",
    as_text: Annotated[
        bool, typer.Option("--text", help="Prompts are the text that they are, no user's message.")
    ] = False,
    name: Annotated[str | None, typer.Option("--name", help="What leaderboards call the model.")] = None,
    checkpoint: Annotated[
        int | None, typer.Option("--checkpoint", help="The run's policy after step N.", metavar="N")
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0: the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Nucleus to sample from.")] = 1.0,
    top_k: Annotated[int | None, typer.Option("--top-k", min=1, help="Sample from so many tokens.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest completion.")] = 1024,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Completions of each prompt.")] = 1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="What chance depends on.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts at a time.")] = 16,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of the weights: else the run's, or float32 for a model.")
    ] = None,
    engine: Annotated[str, typer.Option("--engine", help="transformers or vllm.")] = "transformers",
    as_json: AsJson = False,
) -> None:
    """Completions of a prompt set, resumable, for AlpacaEval, Arena-Hard, MT-Bench and `fpo judge`."""
    formats = ("jsonl", "alpaca-eval", "arena-hard", "mt-bench")
    for option, value, known in (("--format", format, formats), ("--engine", engine, ("transformers", "vllm"))):
        if value not in known:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(known)}", param_hint=option)
    if output.exists():
        raise RunError(f"{output} is there already; remove it, or name another --output")
    quiet_libraries()
    from fpo.evaluation.formats import check_format, file_of, token_counter
    from fpo.evaluation.generate import generate
    from fpo.evaluation.prompts import read_prompts
    from fpo.evaluation.sampling import Sampling
    from fpo.evaluation.speakers import speaker_of
    from fpo.progress import say
    from fpo.stage2_align.run import write_whole

    asked = read_prompts(prompts, split, as_text=as_text)
    check_format(format, asked, samples)
    count = token_counter(format)
    say("loading the model ...")
    speaker = speaker_of(model, checkpoint, dtype, engine)
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    part = output.with_name(output.name + ".part")
    facts = {**speaker.facts, "source": prompts, "split": split, "as_text": as_text}
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = generate(
        asked,
        speaker.engine,
        speaker.tokenizer,
        sampling,
        part,
        samples=samples,
        batch_size=batch_size,
        room=speaker.room,
        facts=facts,
        today=speaker.today,
    )
    text = file_of(format, asked, rows, name or speaker.name, time.time(), count)
    write_whole(output, text)
    part.unlink()
    tokens = [count for row in rows for count in row.tokens]
    ended = sum(end for row in rows for end in row.ended)
    if as_json:
        result = {
            "output": str(output),
            "prompts": len(asked),
            "completions": len(rows),
            "mean_tokens": sum(tokens) / len(tokens),
            "ended": ended / len(tokens),
        }
        print(json.dumps(result, indent=2))
        return
    print(f"completions  {len(rows):,} to {len(asked):,} prompts, {output}")
    print(f"tokens       {sum(tokens) / len(tokens):.1f} in the mean, {ended / len(tokens):.1%} of completions end")

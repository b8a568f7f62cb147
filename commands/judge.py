"""`fpo judge`: what a reward model says of generations, and win rates of two models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fpo.commands.libraries import quiet_libraries
from fpo.commands.options import AsJson


def judge_command(
    files: Annotated[
        list[Path], typer.Argument(help="One or two files of fpo generate --format jsonl.", metavar="FILE [OTHER]")
    ],
    reward_model: Annotated[
        str, typer.Option("--reward-model", help="Sequence classifier with one label: folder or hub id.")
    ],
    as_text: Annotated[
        bool, typer.Option("--text", help="Prompts are the text that they are, no user's message.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="A line with every completion's reward.", metavar="FILE")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Completions at a time.")] = 16,
    dtype: Annotated[str, typer.Option("--dtype", help="Of the reward model's weights.")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Mean rewards with their intervals and, of two files, how often the first wins, by length too."""
    if len(files) > 2:
        raise typer.BadParameter("one file is judged, or two are compared", param_hint="FILE")
    quiet_libraries()
    from fpo.evaluation.judge import Judged, RewardModel, read_generations, win_rates

    read = [(file, read_generations(file)) for file in files]
    judge = RewardModel.of(reward_model, dtype, batch_size)
    names = [str(rows[0].get("generator", file.stem)) for file, rows in read]
    if len(set(names)) < len(names):
        names = [str(file) for file in files]
    judged = [
        Judged(name, rows, judge.rewards(rows, as_text=as_text)) for name, (_, rows) in zip(names, read, strict=True)
    ]
    rates = win_rates(*judged) if len(judged) == 2 else []
    if output is not None:
        lines = [
            json.dumps({**row, "reward": float(reward)}, ensure_ascii=False) + "\n"
            for one in judged
            for row, reward in zip(one.rows, one.rewards, strict=True)
        ]
        output.write_text("".join(lines), encoding="utf-8")
    models = [
        {"model": one.name, "n": len(one.rows), "reward": one.reward._asdict(), "tokens": one.length._asdict()}
        for one in judged
    ]
    wins = [{"where": rate.where, "n": rate.n, "win_rate": rate.rate._asdict()} for rate in rates]
    if as_json:
        print(json.dumps({"models": models, "wins": wins}, indent=2))
        return
    _print(models, wins)


def _print(models: list[dict[str, Any]], wins: list[dict[str, Any]]) -> None:
    from fpo.report import Column, Table

    def flat(row: dict[str, Any], *names: str) -> dict[str, Any]:
        ends = {f"{name}_{end}": row[name][end] for name in names for end in ("low", "high")}
        return {**row, **{name: row[name]["value"] for name in names}, **ends}

    columns = [
        Column("model"),
        Column("n", "completions"),
        Column("reward", format=".3f", interval=("reward_low", "reward_high")),
        Column("tokens", format=".1f", interval=("tokens_low", "tokens_high")),
    ]
    print(Table("rewards", columns, [flat(row, "reward", "tokens") for row in models]).text())
    if wins:
        first, second = (row["model"] for row in models)
        print(f"\n{first} against {second} (a tie is half a win)")
        columns = [
            Column("where", "where it is"),
            Column("n", "completions"),
            Column("win_rate", "win rate", format=".1%", interval=("win_rate_low", "win_rate_high")),
        ]
        print(Table("wins", columns, [flat(row, "win_rate") for row in wins]).text())

"""Reading pairs: sources, splits, formats, and what is refused with its file, row and column."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, Image

from fpo.errors import DataError
from fpo.stage1_cache.read import data_fingerprint, read_groups, sources

REAL = Path(__file__).parents[2] / "shared/data/pairs"
TEXT = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.fixture(autouse=True)
def _cache_in_a_temporary_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def lines(*rows: Any) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def texts(count: int) -> list[dict[str, str]]:
    return [{**TEXT, "chosen": f"a{number}"} for number in range(count)]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def refusal(path: Path, split: str = "train") -> str:
    with pytest.raises(DataError) as caught:
        read_groups(str(path), split)
    return str(caught.value)


def refused_rows(tmp_path: Path, *rows: Any) -> str:
    (tmp_path / "pairs.jsonl").write_text(lines(*rows))
    message = refusal(tmp_path / "pairs.jsonl")
    assert str(tmp_path / "pairs.jsonl") in message
    return message


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".parquet", ".csv"])
def test_every_file_format_reads_the_same_pairs(tmp_path, suffix):
    path = tmp_path / f"pairs{suffix}"
    rows = Dataset.from_list(texts(3))
    match suffix:
        case ".jsonl":
            path.write_text(lines(*texts(3)))
        case ".json":
            path.write_text(json.dumps(texts(3), indent=1))
        case ".jsonl.gz":
            path.write_bytes(gzip.compress(lines(*texts(3)).encode()))
        case ".parquet":
            rows.to_parquet(path)
        case ".csv":
            rows.to_csv(path)
    assert read_groups(str(path), "train").dataset.to_list() == texts(3)


def test_a_split_may_be_sliced(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(lines(*texts(10)))
    assert read_groups(str(tmp_path / "pairs.jsonl"), "train[:90%]").dataset.to_list() == texts(9)
    assert read_groups(str(tmp_path / "pairs.jsonl"), "train[8:]").dataset.to_list() == texts(10)[8:]


def test_the_files_of_a_folder_are_its_splits(tmp_path):
    (tmp_path / "train_prefs.jsonl").write_text(lines(*texts(4)))
    (tmp_path / "test_prefs-00000-of-00002.jsonl").write_text(lines(*texts(1)))
    (tmp_path / "test_prefs-00001-of-00002.jsonl").write_text(lines(*texts(2)))
    (tmp_path / "train_prefs-old.jsonl").write_text(lines(*texts(9)))  # the name of no split
    (tmp_path / "README.md").write_text("not data")
    assert len(read_groups(str(tmp_path), "train_prefs[:50%]").dataset) == 2
    assert len(read_groups(str(tmp_path), "test_prefs").dataset) == 3
    assert len(read_groups(str(tmp_path), "train_prefs+test_prefs").dataset) == 7
    assert refusal(tmp_path, "tran_prefs") == (
        f"{tmp_path}: no split 'tran_prefs' (did you mean 'train_prefs'?); its splits: test_prefs, train_prefs"
    )
    (tmp_path / "latin.jsonl").write_text(lines(*texts(1)))
    assert "no split 'train'; its splits: latin" in refusal(tmp_path, "train")


@pytest.mark.parametrize("single", [True, False])
def test_a_folder_of_save_to_disk_reads_with_slices(tmp_path, single):
    rows = Dataset.from_list(texts(10))
    (rows if single else DatasetDict(train=rows, test=rows.select(range(2)))).save_to_disk(tmp_path / "saved")
    assert read_groups(str(tmp_path / "saved"), "train[:30%]").dataset.to_list() == texts(3)
    assert "no split 'dev'" in refusal(tmp_path / "saved", "dev")
    if not single:
        assert len(read_groups(str(tmp_path / "saved"), "train+test").dataset) == 12


def test_columns_that_pairs_do_not_have_are_left_out_and_tools_pass(tmp_path):
    row = {
        "prompt": [turn("user", "p")],
        "chosen": [turn("assistant", "a")],
        "rejected": [turn("assistant", "b")],
    }
    extras = {"tools": "[]", "chat_template_kwargs": {"enable_thinking": False}}
    (tmp_path / "pairs.jsonl").write_text(lines({**row, **extras, "score_chosen": 1.0, "messages": []}))
    assert read_groups(str(tmp_path / "pairs.jsonl"), "train").dataset.to_list() == [{**row, **extras}]


def test_ultrafeedback_takes_the_prompt_from_the_conversations(tmp_path):
    sides = {side: [turn("user", "p"), turn("assistant", side)] for side in ("chosen", "rejected")}
    row = {"prompt": "p", "prompt_id": "0", **sides, "messages": sides["chosen"], "score_chosen": 8.0}
    (tmp_path / "train_prefs.jsonl").write_text(lines(row))
    assert read_groups(str(tmp_path), "train_prefs").dataset.to_list() == [sides]


def test_a_text_prompt_beside_answers_in_messages_is_refused(tmp_path):
    row = {"prompt": "p", "chosen": [turn("assistant", "a")], "rejected": [turn("assistant", "b")]}
    assert "row 0: column 'prompt' is text" in refused_rows(tmp_path, row)


def test_a_missing_column_is_named_with_the_nearest(tmp_path):
    message = refused_rows(tmp_path, {"prompt": "p", "choosen": "a", "rejected": "b"})
    assert "no column 'chosen' (did you mean 'choosen'?)" in message
    assert "prompt, choosen, rejected" in message


def prompted(**columns: Any) -> list[dict[str, Any]]:
    """Three rows of text with these columns; {n} in a text is the row's number."""
    shown = [{name: v.format(n=n) if isinstance(v, str) else v for name, v in columns.items()} for n in range(3)]
    return [{**row, "chosen": f"a{n}", "rejected": f"b{n}"} for n, row in enumerate(shown)]


@pytest.mark.parametrize(
    ("row", "lost", "advice"),
    [
        ({"promt": "p"}, "'promt'", "{prompt: promt}"),
        ({"question": "Why{n}?"}, "'question'", "{prompt: question}"),
        ({"frage": "Warum ist {n} so?", "id": "a{n}"}, "'frage'", "{prompt: frage}"),
        ({"wenti": "\u4e3a\u4ec0\u4e48{n}"}, "'wenti'", "{prompt: wenti}"),
        ({"turns": [turn("user", "Why?")]}, "'turns'", "{prompt: turns}"),
    ],
)
def test_a_prompt_under_another_name_is_never_silently_lost(tmp_path, row, lost, advice):
    message = refused_rows(tmp_path, *prompted(**row))
    assert f"does not hold the text of {lost}, which would be lost" in message
    assert f"write data.columns: {advice} to name the prompt, or {{prompt: null}}" in message


@pytest.mark.parametrize(
    "row",
    [
        {"source": "helpful base", "id": "a{n}", "prompt_id": "0f{n}", "score": 0.5, "label": "good one"},
        {"model": "some model", "timestamp": "2024-01-01 10:00:0{n}", "url": "https://a.b/{n}", "turns": 3},
        {"question": "", "system": None},
        {"ratings": [{"model": "a b c", "stars": 4}]},
    ],
)
def test_columns_that_can_be_no_prompt_stop_nobody(tmp_path, row):
    (tmp_path / "pairs.jsonl").write_text(lines(*prompted(**row)))
    dataset, columns, _ = read_groups(str(tmp_path / "pairs.jsonl"), "train")
    assert dataset.column_names == ["chosen", "rejected"]
    assert columns.prompt is None
    assert set(columns.unused) == set(row)


def test_pictures_beside_the_pairs_are_left_alone(tmp_path):
    """Under another name than image they are no input of the pairs; these would not even open."""
    rows = Dataset.from_list([{**TEXT, "scan": {"bytes": b"no picture", "path": None}}] * 2)
    rows.cast_column("scan", Image()).to_parquet(tmp_path / "pairs.parquet")
    assert read_groups(str(tmp_path / "pairs.parquet"), "train").columns == ("prompt", ("scan",))


def test_a_question_that_both_sides_repeat_is_not_lost(tmp_path):
    rows = [{"question": f"Why {n}?", "chosen": f"Why {n}? So.", "rejected": f"Why {n}? No."} for n in range(3)]
    (tmp_path / "pairs.jsonl").write_text(lines(*rows))
    assert read_groups(str(tmp_path / "pairs.jsonl"), "train").columns == (None, ("question",))


def test_columns_are_mapped_to_ours_and_null_leaves_one_out(tmp_path):
    rows = prompted(system="Be kind.", question="Why {n}?", source="x")
    (tmp_path / "pairs.jsonl").write_text(lines(*rows))

    def read(columns):
        return read_groups(str(tmp_path / "pairs.jsonl"), "train", columns=columns)

    with pytest.raises(DataError) as caught:
        read({"prompt": "question"})
    assert "the prompt does not hold the text of column 'system', which would be lost" in str(caught.value)
    assert "leave it out with data.columns: {prompt: question, system: null}" in str(caught.value)
    mapped = read({"prompt": "question", "system": None})
    assert mapped.dataset[1] == {"prompt": "Why 1?", "chosen": "a1", "rejected": "b1"}
    assert mapped.columns == ("question", ("system", "source"))
    assert read({"prompt": None, "system": None}).dataset.column_names == ["chosen", "rejected"]
    swapped = read({"prompt": "question", "system": None, "chosen": "rejected", "rejected": "chosen"})
    assert swapped.dataset[1] == {"prompt": "Why 1?", "chosen": "b1", "rejected": "a1"}
    with pytest.raises(DataError, match=r"no column 'questoin' \(did you mean 'question'\?\); its columns are system"):
        read({"prompt": "questoin"})
    with pytest.raises(DataError, match=r"\{sytem: null\}: no column 'sytem' \(did you mean 'system'\?\)"):
        read({"prompt": "question", "sytem": None})


def test_a_system_column_beside_messages_is_lost_only_where_they_lack_it(tmp_path):
    def row(*opening):
        return {side: [*opening, turn("user", "p"), turn("assistant", side)] for side in ("chosen", "rejected")}

    held = {**row(turn("system", "Be kind.")), "system": "Be kind.", "rationale": "Because it is kinder."}
    (tmp_path / "pairs.jsonl").write_text(lines(held))
    assert read_groups(str(tmp_path / "pairs.jsonl"), "train").columns == (None, ("system", "rationale"))
    (tmp_path / "pairs.jsonl").write_text(lines({**row(), "system": "Be kind."}))
    assert read_groups(str(tmp_path / "pairs.jsonl"), "train").dataset.column_names == ["chosen", "rejected", "system"]


def test_answers_in_messages_without_a_prompt_are_refused_where_another_column_asks(tmp_path):
    answers = {side: [turn("assistant", side)] for side in ("chosen", "rejected")}
    assert "data.columns: {prompt: query}" in refused_rows(tmp_path, {**answers, "query": "Why?"})


def test_a_missing_column_may_be_named_in_the_recipe(tmp_path):
    message = refused_rows(tmp_path, {"prompt": "p", "response_a": "a", "response_b": "b"})
    assert "no column 'chosen'; its columns are prompt, response_a, response_b; name yours in the recipe" in message


def test_rows_nested_in_one_object_are_named(tmp_path):
    (tmp_path / "pairs.json").write_text(json.dumps({"data": texts(3)}))
    assert "its rows stand inside 'data': write them at the top" in refusal(tmp_path / "pairs.json")


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("chosen", 3, "row 1, column 'chosen': 3, where chosen of row 0 holds text"),
        ("rejected", None, "row 1, column 'rejected': missing or null"),
        ("prompt", [turn("user", "p")], "row 1, column 'prompt': a list, where chosen of row 0 holds text"),
    ],
)
def test_mixed_types_of_text_are_refused_by_row_and_column(tmp_path, column, value, expected):
    assert expected in refused_rows(tmp_path, TEXT, {**TEXT, column: value})


def test_a_bad_row_far_down_has_its_own_number(tmp_path):
    rows = [*texts(5000), {**TEXT, "rejected": None}]
    assert "row 5000, column 'rejected': missing or null" in refused_rows(tmp_path, *rows)


def test_what_is_neither_text_nor_messages_is_refused_as_what_it_is(tmp_path):
    message = refused_rows(tmp_path, {**TEXT, "chosen": 3})
    assert "row 0, column 'chosen': the value 3, not text; write it in quotes" in message
    message = refused_rows(tmp_path, {**TEXT, "chosen": {"text": "a", "by": "b"}})
    assert "row 0, column 'chosen': an object (text, by), not text or a list of messages" in message


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("text", "row 1, column 'rejected': text, where chosen of row 0 holds messages"),
        (["text"], "row 1, column 'rejected': a list of text"),
        ([{"from": "human", "value": "x"}], "rename from and value to role and content"),
        ([{"content": "x"}], "row 1, column 'rejected': a message without a role (its keys: content)"),
        (None, "row 1, column 'rejected': missing or null"),
    ],
)
def test_what_is_no_list_of_messages_is_refused(tmp_path, value, expected):
    good = {"chosen": [turn("user", "p"), turn("assistant", "a")], "rejected": [turn("user", "p")]}
    assert expected in refused_rows(tmp_path, good, {**good, "rejected": value})


def test_a_message_of_tool_calls_needs_no_content(tmp_path):
    call = {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }
    row = {"prompt": [turn("user", "p")], "chosen": [call], "rejected": [turn("assistant", "b")]}
    (tmp_path / "pairs.jsonl").write_text(lines(row))
    assert len(read_groups(str(tmp_path / "pairs.jsonl"), "train").dataset) == 1


def test_images_are_refused(tmp_path):
    assert "column 'images'" in refused_rows(tmp_path, {**TEXT, "images": ["x.png"]})


def test_unreadable_json_is_named_by_line(tmp_path):
    assert "line 3: not JSON" in refused_rows(tmp_path, TEXT, TEXT, '{"prompt": "p", "cho')
    assert "line 2: not a JSON object" in refused_rows(tmp_path, TEXT, "[1, 2]")


def test_a_damaged_gzip_file_is_refused(tmp_path):
    whole = gzip.compress(lines(*texts(500)).encode())
    (tmp_path / "pairs.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert "cannot be decompressed" in refusal(tmp_path / "pairs.jsonl.gz")


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "pairs.jsonl").write_bytes(
        lines(TEXT).encode() + b'{"prompt": "p", "chosen": "\xe9", "rejected": "b"}\n'
    )
    assert "not UTF-8" in refusal(tmp_path / "pairs.jsonl")


def test_other_columns_that_are_not_utf8_are_refused_by_name(tmp_path):
    (tmp_path / "pairs.jsonl").write_bytes(b'{"chosen": "a", "rejected": "b", "note": "\xe9"}\n')
    assert refusal(tmp_path / "pairs.jsonl").endswith(
        "column 'note': not UTF-8 (unexpected end of data); convert the file"
    )


def test_empty_files_and_empty_slices_are_refused(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("")
    assert "the file is empty" in refusal(tmp_path / "pairs.jsonl")
    (tmp_path / "pairs.jsonl").write_text(lines(TEXT))
    assert "split 'train[:0]' has no rows" in refusal(tmp_path / "pairs.jsonl", "train[:0]")
    (tmp_path / "blank.jsonl").write_text("\n\n\n")
    assert "the file holds no rows, only 3 blank lines" in refusal(tmp_path / "blank.jsonl")
    (tmp_path / "blank.json").write_text("[]")
    assert "the file holds no rows, only an empty list" in refusal(tmp_path / "blank.json")


def test_a_file_that_is_not_there_names_the_nearest(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(lines(TEXT))
    assert refusal(tmp_path / "pears.jsonl").endswith("no such file or folder (did you mean 'pairs.jsonl'?)")


def test_a_file_of_another_format_is_refused(tmp_path):
    (tmp_path / "pairs.txt").write_text("p")
    assert "not one of the formats .jsonl" in refusal(tmp_path / "pairs.txt")


def test_a_single_file_has_the_split_train(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(lines(TEXT))
    assert "a single file is the split 'train', not 'test'" in refusal(tmp_path / "pairs.jsonl", "test")


def test_subset_and_revision_are_for_the_hub(tmp_path):
    with pytest.raises(DataError, match="subset and revision are for hub datasets"):
        read_groups(str(tmp_path), "train", subset="default")


def test_a_hub_id_goes_to_the_hub_and_its_failure_is_one_line(monkeypatch):
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        if kwargs["split"] == "train":
            return Dataset.from_list(texts(1))
        raise ValueError("Unknown split \"dev\".\nShould be one of ['train'].")

    monkeypatch.setattr(sources, "load_dataset", load)
    assert len(read_groups("someone/pairs", "train", "small", "v1").dataset) == 1
    assert asked == [(("someone/pairs", "small"), {"split": "train", "revision": "v1"})]
    with pytest.raises(DataError, match=r"^hub dataset 'someone/pairs': Unknown split \"dev\". Should be one of"):
        read_groups("someone/pairs", "dev")


def test_the_fingerprint_of_files_moves_with_the_files_of_the_split(tmp_path):
    (tmp_path / "train.jsonl").write_text(lines(TEXT))
    (tmp_path / "test.jsonl").write_text(lines(TEXT))
    before = data_fingerprint(str(tmp_path), "train")
    assert json.loads(json.dumps(before)) == before
    assert [Path(file["path"]).name for file in before["files"]] == ["train.jsonl"]
    (tmp_path / "test.jsonl").write_text(lines(TEXT, TEXT))
    assert data_fingerprint(str(tmp_path), "train") == before
    (tmp_path / "train.jsonl").write_text(lines(TEXT, TEXT))
    assert data_fingerprint(str(tmp_path), "train") != before
    assert data_fingerprint(str(tmp_path / "train.jsonl"), "train")["files"][0]["size"] == len(lines(TEXT, TEXT))


def test_a_file_that_changed_under_a_kept_mtime_is_read_anew(tmp_path):
    """In the middle of many bytes, where no sample is taken."""
    path = tmp_path / "train.jsonl"
    path.write_text(lines(*[TEXT] * 20_000))
    stat = path.stat()
    before, fingerprint = read_groups(str(path), "train").dataset[7_000], data_fingerprint(str(path), "train")
    content = path.read_bytes()
    row = content.index(b"\n") + 1
    changed = json.dumps({**TEXT, "chosen": "X" * len(TEXT["chosen"])}).encode()
    assert len(changed) + 1 == row
    with open(path, "r+b") as file:
        file.seek(7_000 * row)
        file.write(changed)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert data_fingerprint(str(path), "train") != fingerprint
    assert read_groups(str(path), "train").dataset[7_000] != before


def test_the_fingerprint_of_a_hub_dataset_is_its_commit(monkeypatch):
    builder = SimpleNamespace(config=SimpleNamespace(name="small"), hash="abc")
    monkeypatch.setattr(sources, "load_dataset_builder", lambda *args, **kwargs: builder)
    assert data_fingerprint("someone/pairs", "train")["hub"] == {
        "repo": "someone/pairs",
        "subset": "small",
        "commit": "abc",
    }


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llms_from_scratch.str.jsonl", 1094),
        ("hh_harmless_raw_test.jsonl.gz", 2312),
        ("lf_dpo_en_demo.messages.jsonl", 300),
        ("orca_dpo_val.implicit.jsonl", 284),
    ],
)
def test_real_files_are_read_whole(name, count):
    if not (REAL / name).exists():
        pytest.skip(f"{name} is absent")
    assert len(read_groups(str(REAL / name), "train").dataset) == count

"""Lines and tables: each item in its place, or refused with the line that is wrong."""

import json
from pathlib import Path

import pytest

from vlmo_fast.data.tables import TableError, read_lines, read_table

CAPTIONS = ["a cat\u2028on a mat", 'a "dog", asleep', "ein Mädchen", "two\x0clines", "猫"]


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("closed", [True, False])
def test_lines_end_at_line_feeds_alone(end: str, encoding: str, closed: bool, tmp_path: Path) -> None:
    text = end.join(CAPTIONS) + (end if closed else "")
    assert read_lines(written(tmp_path / "captions.txt", text.encode(encoding))) == CAPTIONS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must hold a line, got none"),
        (b"\xef\xbb\xbf", "must hold a line, got none"),
        (b"a cat\n\na dog\n", "line 2 is empty"),
        (b"a cat\n  \t\n", "line 2 is empty"),
        (b"a cat\n\n", "line 2 is empty"),
        (b"a cat\nM\xe4dchen\n", "line 2 is not UTF-8"),
        (b"\xff\xfea\x00\x00", "line 1 is not UTF-16-LE"),
        ("a cat".encode("utf-16-le"), "line 1 holds a zero byte"),
    ],
)
def test_lines_that_are_wrong(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(TableError, match=f"captions.txt: {message}"):
        read_lines(written(tmp_path / "captions.txt", content))


def test_names_of_files_need_not_be_utf8(tmp_path: Path) -> None:
    names = [b"M\xe4dchen.jpg", b" two  blanks .jpg", b"a\r.jpg"]
    paths = read_lines(written(tmp_path / "paths.txt", b"\n".join(names)), paths=True)
    assert [path.encode("utf-8", "surrogateescape") for path in paths] == names


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet", ".CSV"])
def test_tables_are_not_lines(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(TableError, match="is a table, not lines; name the column to read"):
        read_lines(written(tmp_path / f"captions{suffix}", "caption\na cat\n"))


def table(path: Path, rows: list[dict[str, str]]) -> Path:
    if path.suffix == ".jsonl":
        return written(path, "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows))
    if path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(rows), path)
        return path
    if path.suffix == ".csv":
        quoted = [[f'"{field.replace(chr(34), 2 * chr(34))}"' for field in row.values()] for row in rows]
        return written(path, "\ufeff" + "\r\n".join([",".join(rows[0]), *(",".join(row) for row in quoted)]))
    return written(path, "\n".join(["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]) + "\n")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_columns_of_a_table(suffix: str, tmp_path: Path) -> None:
    captions = CAPTIONS if suffix == ".tsv" else [*CAPTIONS, "two\nlines", "tab\there"]
    rows = [{"id": str(index), "image": f"{index}.jpg", "caption": text} for index, text in enumerate(captions)]
    path = table(tmp_path / f"captions{suffix}", rows)
    assert read_table(path, ["caption"]) == {"caption": captions}
    both = read_table(path, ["image", "caption"])
    assert list(both) == ["image", "caption"]
    assert both["image"] == [row["image"] for row in rows]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_missing_column_names_those_that_are_there(suffix: str, tmp_path: Path) -> None:
    path = table(tmp_path / f"captions{suffix}", [{"id": "1", "text": "a cat"}])
    with pytest.raises(TableError, match=r"caption.*'id'.*'text'"):
        read_table(path, ["caption"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.csv", "", r"must have the columns \['caption'\], got \[\]"),
        ("c.csv", "caption\n", "must hold a row, got none"),
        ("c.csv", "caption,caption\na,b\n", "must name each column once"),
        ("c.csv", "id,caption\n1,a\n2\n", "line 3 must have 2 fields, got 1"),
        ("c.csv", 'id,caption\n1,"a\nb"\n2,a,b\n', "line 4 must have 2 fields, got 3"),
        ("c.csv", 'id,caption\n1,"a\n', "line 2 cannot be read"),
        ("c.csv", "id,caption\n1,a\n2,\n", "'caption' of line 3 is empty"),
        ("c.csv", 'id,caption\n1,"a\nb"\n2," "\n', "'caption' of line 4 is empty"),
        ("c.csv", "id,caption\n1,a\n\n", "line 3 is empty"),
        ("c.tsv", "id\tcaption\n1\t\n", "'caption' of line 2 is empty"),
        ("c.jsonl", '{"caption": "a"}\n\n{"caption": "b"}\n', "line 2 is empty"),
        ("c.jsonl", '{"caption": "a"\n', "line 1 must be JSON"),
        ("c.jsonl", '["a"]\n', "line 1 must be an object of JSON"),
        ("c.jsonl", '{"caption": null}\n', "'caption' of line 1 must be text, got None"),
        ("c.jsonl", '{"caption": ""}\n', "'caption' of line 1 is empty"),
        ("c.parquet", "no table", "cannot be read"),
        ("c.txt", "a\n", r"must be a table \(\.csv, "),
    ],
)
def test_tables_that_are_wrong(name: str, content: str, message: str, tmp_path: Path) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(TableError, match=message):
        read_table(written(tmp_path / name, content), ["caption"])


def test_an_empty_field_of_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"caption": ["a", None]}), tmp_path / "c.parquet")
    with pytest.raises(TableError, match="'caption' of row 2 must be text, got None"):
        read_table(tmp_path / "c.parquet", ["caption"])


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_whoever_judges_the_rows_gets_them_all(suffix: str, tmp_path: Path) -> None:
    rows = [{"id": "1", "caption": "a"}, {"id": "2", "caption": ""}, {"id": "", "caption": " "}]
    path = table(tmp_path / f"captions{suffix}", rows)
    assert read_table(path, ["id", "caption"], strict=False) == {"id": ["1", "2", ""], "caption": ["a", "", " "]}


def test_fields_that_are_no_text(tmp_path: Path) -> None:
    path = written(tmp_path / "c.jsonl", '{"caption": null}\n{"caption": 12}\n')
    assert read_table(path, ["caption"], strict=False) == {"caption": ["", "12"]}
    for field in ("true", "1.5", '["a"]'):
        with pytest.raises(TableError, match="'caption' of line 1 must be text"):
            read_table(written(tmp_path / "c.jsonl", f'{{"caption": {field}}}'), ["caption"], strict=False)


@pytest.mark.parametrize("name", ["c.txt", "c.csv", "c.jsonl", "c.parquet"])
def test_a_missing_file_is_that(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=name):
        read_lines(tmp_path / name) if name == "c.txt" else read_table(tmp_path / name, ["caption"])

"""prepare.py: what people's files hold becomes tokens, and a dataset is complete or not there."""

import gzip
import json
import lzma
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest

import prepare
from model import UsageError

ROWS = [{"text": f"row {i} é", "other": i} for i in range(5)]
LINES = "\n".join(map(json.dumps, ROWS)).encode() + b"\n\n"
LLAMA3 = np.array([20240801, 7, 100] + [0] * 353, np.int32).tobytes()  # a file of llm.c with 100 uint32 tokens


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make(files):
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def run(*sources, **options):
    prepare.main(prepare.PrepareConfig(sources, **options))


def start(*args):
    return subprocess.Popen([sys.executable, prepare.__file__, *args], stderr=subprocess.DEVNULL)


def tokens(name):
    return np.concatenate([np.fromfile(file, np.uint16)[512:] for file in sorted(Path("data", name).glob("*.bin"))])


def documents(name):
    return "".join("\0" if t == 256 else chr(t) for t in tokens(name)).encode("latin-1").decode().split("\0")[:-1]


def test_files_of_all_kinds_become_tokens_and_prompts_are_read_by_the_same_rules(capsys):
    make({
        "in/a.txt": "\ufeffa BOM\r\nand CRLF", "in/sub/b [1].md": "brackets", "in/.c.txt": "hidden", "in/i.docx": "",
        "in/empty.py": "", "in/d.jsonl": LINES, "in/e.jsonl.gz": gzip.compress(LINES) + gzip.compress(LINES),
        "in/f.jsonl.xz": lzma.compress(LINES), "in/g.jsonl.zst": pyarrow.compress(LINES, "zstd", asbytes=True),
    })  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), "in/h.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS).slice(0, 0), "in/no rows.parquet")
    run("in")
    assert sorted(documents("in")) == sorted(["a BOM\r\nand CRLF", "brackets"] + 6 * [row["text"] for row in ROWS])
    assert "left out 1 files not ending in .txt" in capsys.readouterr().err
    with pytest.raises(UsageError, match="in/h.parquet.*--field=content. The fields .*'text', 'other'"):
        run("in/h.parquet", field="content")
    assert prepare.read_text("in/a.txt") == "a BOM\r\nand CRLF" and prepare.read_text("in/d.jsonl") == LINES.decode()


def test_thousands_of_files_are_read_in_linear_time_and_in_random_but_fixed_order(monkeypatch):
    texts = [f"{i:04d}" for i in range(8000)]
    make({f"in/{text}.txt": text for text in texts})
    t0 = time.process_time()
    run("in", name="one")
    assert time.process_time() - t0 < 3, "seconds"
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 10_000)
    monkeypatch.setattr(prepare, "VAL_TOKENS", 2500)
    run("in", name="two")
    order = documents("one")
    assert order == documents("two") and order != texts and sorted(order) == texts
    sizes = [file.stat().st_size // 2 - 512 for file in sorted(Path("data").glob("*/*.bin"))]
    assert sizes == [36_000, 4000, 10_000, 10_000, 10_000, 7500, 2500], "the last tokens are for validation"


def test_links_are_followed_and_each_file_is_read_once():
    make({"real/sub/a.txt": "one text", "real/b.txt": "in a linked folder", "cache/0f3a": "no suffix", "in/c.txt": "c"})
    for target, link in [
        ("../real", "in/folder"), ("../real", "in/too"), ("../real/sub/a.txt", "in/d.txt"), ("..", "real/sub/loop"),
        ("loop.txt", "in/loop.txt"), ("nowhere", "in/e.txt"), ("../cache/0f3a", "in/f.txt"), ("../cache/0f3a", "in/g"),
    ]:  # fmt: skip
        os.symlink(target, link)
    run("in", "in/c.txt")
    assert sorted(documents("in")) == ["c", "in a linked folder", "no suffix", "one text"]


def test_rows_of_any_kind_are_read_and_those_without_text_counted(capsys):
    rows = ['{"text": "one"}', '{"text": 5}', '{"other": 1}', '{"text": "\\ud800 lone"}', "[1]", '{"text": ""}']
    make({"rows.jsonl": "\n".join([*rows, '{"text": "2020-01-01", "text": "twice"}'])})
    run("rows.jsonl")
    assert documents("rows") == ["one", "? lone", "twice"]
    assert "rows.jsonl: 4 of 7 rows have no text in the field 'text'" in capsys.readouterr().err


def test_long_documents_are_read_in_short_pieces_and_stay_whole(monkeypatch):
    monkeypatch.setattr(prepare, "PIECE", 10)
    text = "".join(f"line {i}\r\n" for i in range(50)) + 350 * "x"
    make({"long.txt": text, "rows.jsonl": json.dumps({"text": text})})
    pieces = list(prepare.read_documents([Path("long.txt"), Path("rows.jsonl")]))
    assert max(len(text) for text, _ in pieces) <= 20 and [end for _, end in pieces].count(True) == 2
    run("long.txt", "rows.jsonl")
    assert documents("long") == [text, text]


def test_control_tokens_in_text_stay_text(monkeypatch):
    ranks = {bytes([i]): i for i in range(256)}
    gpt2 = prepare.tiktoken.Encoding("gpt2", pat_str=".", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})
    monkeypatch.setattr(prepare.tiktoken, "get_encoding", lambda name: gpt2)
    make({"a.txt": "A <|endoftext|> B"})
    run("a.txt", tokenizer="gpt2")
    assert documents("a") == ["A <|endoftext|> B"]


def test_openwebtext_is_read_row_by_row(monkeypatch):
    disk = prepare.shutil.disk_usage(".")._replace(free=1e12)
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: disk)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), "rows.parquet")
    local = datasets.Dataset.from_parquet("rows.parquet", cache_dir="cache")
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split, revision: local)
    run("openwebtext", tokenizer="byte")
    assert documents("openwebtext") == [row["text"] for row in ROWS]


@pytest.mark.parametrize("file, source, name", [
    ("corpus.en.txt", "corpus.en.txt", "corpus.en"), ("dump.jsonl.gz", "dump.jsonl.gz", "dump"),
    ("v1.2/a.md", "v1.2/", "v1.2"), (".src/a.md", ".src", ".src"), ("a/b.md", "a/.", "a"),
])  # fmt: skip
def test_the_default_name_is_the_name_of_the_source_without_its_suffix(file, source, name):
    make({file: gzip.compress(LINES) if file.endswith(".gz") else LINES})
    run(source)
    assert len(tokens(name)) >= 45


def test_a_dataset_is_replaced_by_the_same_source_only():
    make({"a/text.txt": "the text of a", "b/text.txt": "the text of b", "data/notes/todo": ""})
    run("a", name="mine")
    make({"a/text.txt": "another text of a"})
    run("a", name="mine")
    with pytest.raises(UsageError, match="data/mine was made from .*/a, not from .*/b: choose another --name, or del"):
        run("b", name="mine")
    assert documents("mine") == ["another text of a"]
    with pytest.raises(UsageError, match="data/notes was made from something else"):
        run("a", name="notes")


def test_a_killed_process_and_two_at_the_same_time_leave_a_complete_dataset():
    make({"a.txt": "short text\n", "b.txt": "the other text\n" * 100})
    run("a.txt", name="mine")
    make({"a.txt": "some longer text\n" * 2_000_000})
    process = start("a.txt", "--name=mine")
    while process.poll() is None and not list(Path("data").glob(".mine.*/new/")):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9
    assert documents("mine") == ["short text\n"]
    make({"a.txt": "A new text!\n"})
    run("a.txt", name="mine")
    assert documents("mine") == ["A new text!\n"]
    assert 0 in [process.wait() for process in [start("a.txt", "--name=two"), start("b.txt", "--name=two")]]
    assert documents("two") == [Path(json.loads(Path("data/two/meta.json").read_text())["source"]).read_text()]


def test_windows_cover_the_text_and_batches_are_functions_of_seed_and_step():
    make({"a.txt": "".join(chr(33 + i % 90) for i in range(1000))})
    run("a.txt")
    train, val, meta = prepare.open_dataset("a", 16)
    text = tokens("a")[: meta["train_tokens"]]
    idx, targets = train.windows(np.array([0, 5, int(train.ends[-1]) - 1]))
    assert idx[1].tolist() == text[5:21].tolist() and targets[1].tolist() == text[6:22].tolist()
    assert targets[2].tolist() == text[-16:].tolist(), "the last token of the file is a target"
    whole, part = train.batch(1, 2, 0, 8), train.batch(1, 2, 5, 3)
    assert part[0].equal(whole[0][5:]) and part[1].equal(whole[1][5:])
    batches = [idx.tolist() for idx, _ in val.eval_batches(64, 3)]
    assert [len(rows) for rows in batches] == [3, 1] and len({tuple(row) for rows in batches for row in rows}) == 4


def test_shards_of_other_programs_are_read_by_their_names():
    Path("shards").mkdir()
    for name in ("fineweb_train_000001.bin", "train_2.bin", "constrained_val_0.bin", "train-to-val.bin", "test_0.bin"):
        prepare.write_shard(Path("shards", name), np.full(40, 50257 if name == "train_2.bin" else 1, np.uint16))
    train, val, meta = prepare.open_dataset("shards", 8)
    assert meta == dict(tokenizer="gpt2", vocab_size=50257)
    assert [file.name for file in train.files] == ["fineweb_train_000001.bin", "train_2.bin"]
    assert [file.name for file in val.files] == ["constrained_val_0.bin", "train-to-val.bin"]
    with pytest.raises(UsageError, match="shards: token 50257 is not in a vocabulary of 50257"):
        train.windows(np.array([40]))


@pytest.mark.parametrize("files, call, message", [
    ({}, lambda: run("a.txt"), "'a.txt' is neither a folder nor a file that ends in .txt"),
    ({"a.txt": "some text"}, lambda: run("a.txt", ""), "'' is neither a folder nor"),
    ({"in/a.bin": "x"}, lambda: run("in"), "/in has 0 tokens, but at least 10 are needed"),
    ({"a.txt": b"caf\xe9 and more"}, lambda: run("a.txt"), "a.txt: 'utf-8' codec can't decode .* Repair this file or"),
    ({"a.jsonl": b'{"text": "one"}\n{"te'}, lambda: run("a.jsonl"), "a.jsonl, after row 1: "),
    ({"a.jsonl.gz": gzip.compress(LINES)[:-9]}, lambda: run("a.jsonl.gz"), "a.jsonl.gz.*: Truncated"),
    ({"a.jsonl.xz": lzma.compress(LINES)[:-9]}, lambda: run("a.jsonl.xz"), "a.jsonl.xz.*: Compressed file ended"),
    ({}, lambda: prepare.open_dataset("nothing", 8), "no dataset 'nothing' in data/: write it with prepare.py"),
    ({"d/train.bin": b"ab" * 3000}, lambda: prepare.open_dataset("d", 8), "d/train.bin is not a complete file of uint"),
    ({"d/train.bin": LLAMA3}, lambda: prepare.open_dataset("d", 8), "d/train.bin is not a complete file of uint16 tok"),
])  # fmt: skip
def test_mistakes_are_refused_in_one_line_and_leave_nothing(files, call, message):
    make(files)
    with pytest.raises(UsageError, match=message) as error:
        call()
    assert "\n" not in str(error.value) and not list(Path().glob("data/*"))


def test_without_a_network_a_missing_vocabulary_is_one_line(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(Path("empty").absolute()))
    monkeypatch.setenv("HTTPS_PROXY", "http://localhost:1")  # nobody answers there
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    with pytest.raises(UsageError, match="no vocabulary of gpt2. Offline, set TIKTOKEN_CACHE_DIR"):
        prepare.get_tokenizer("gpt2")

"""prepare.py: what people's files hold becomes tokens, and a dataset is whole or not there."""

import gzip
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import prepare
from model import UsageError

SCRIPT = Path(prepare.__file__)
EOT = 256


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*sources, **options):
    prepare.main(prepare.PrepareConfig(tuple(map(str, sources)), **options))


def tokens(name):
    """All tokens of a dataset, in order, from its files."""
    files = sorted(Path("data", name).glob("train*.bin")) + [Path("data", name, "val_000000.bin")]
    return np.concatenate([np.fromfile(file, np.uint16)[512:] for file in files])


def documents(name):
    """The texts of a dataset of bytes."""
    return "".join("\0" if t == EOT else chr(t) for t in tokens(name)).encode("latin-1").decode().split("\0")[:-1]


def make(files):
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)


def test_documents_of_all_kinds_of_files_become_tokens():
    rows = [{"text": f"row {i} é", "other": i} for i in range(5)]
    lines = "\n".join(map(json.dumps, rows)).encode() + b"\n\n"
    make({
        "in/a.txt": "\ufeffa BOM\r\nand CRLF".encode(), "in/sub/b [1].md": b"brackets", "in/empty.py": b"",
        "in/.hidden.txt": b"hidden", "in/c.jsonl": lines, "in/d.jsonl.gz": gzip.compress(lines),
        "in/e.jsonl.xz": lzma.compress(lines),
    })  # fmt: skip
    with pyarrow.CompressedOutputStream("in/f.jsonl.zst", "zstd") as f:
        f.write(lines)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "in/g.parquet")
    run("in")
    assert sorted(documents("in")) == sorted(["a BOM\r\nand CRLF", "brackets"] + 5 * [row["text"] for row in rows])
    meta = json.loads(Path("data/in/meta.json").read_text())
    n = len(tokens("in"))
    assert meta["val_tokens"] == n // 10 and meta["train_tokens"] == n - n // 10 and meta["vocab_size"] == 257


def test_the_last_tenth_of_the_tokens_is_for_validation_and_order_is_random_but_fixed(monkeypatch):
    Path("in").mkdir()
    for i in range(100):
        Path(f"in/{i:03d}.txt").write_text(f"{i:03d}")
    run("in", name="one")
    run("in", name="two")
    order = documents("one")
    assert order == documents("two") and order != sorted(order) and sorted(order) == [f"{i:03d}" for i in range(100)]
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 70)
    monkeypatch.setattr(prepare, "VAL_TOKENS", 25)
    run("in", name="three")
    sizes = [Path(f).stat().st_size // 2 - 512 for f in sorted(Path("data/three").glob("*.bin"))]
    assert sizes == [70, 70, 70, 70, 70, 25, 25] and documents("three") == order


def test_links_are_followed_and_each_file_is_read_once():
    Path("real/sub").mkdir(parents=True)
    Path("real/sub/a.txt").write_text("a text to read")
    Path("links").mkdir()
    os.symlink("../real", "links/folder")
    os.symlink("../real", "links/again")
    os.symlink("../real/sub/a.txt", "links/b.txt")
    os.symlink("..", "real/sub/loop")
    os.symlink("nowhere", "links/dangling.txt")
    run("links", "real")
    assert documents("links") == ["a text to read"]


def test_what_rows_hold_does_not_stop_it(capsys):
    rows = ['{"text": "one"}', '{"text": 5}', '{"other": 1}', '{"text": "\\ud800 lone"}', "[1]"]
    Path("rows.jsonl").write_text("\n".join([*rows, '{"text": "2020-01-01"}']))
    run("rows.jsonl")
    assert documents("rows") == ["one", "? lone", "2020-01-01"]
    assert "3 of 6 rows have no text in the field 'text'" in capsys.readouterr().out


def test_long_documents_are_read_in_pieces_and_stay_whole(monkeypatch):
    monkeypatch.setattr(prepare, "PIECE", 10)
    text = "".join(f"line {i}\n" for i in range(50)) + 35 * "x"
    Path("long.txt").write_text(text)
    Path("rows.jsonl").write_text(json.dumps({"text": text}))
    run("long.txt", "rows.jsonl", name="both")
    assert documents("both") == [text, text]


def test_control_tokens_in_text_stay_text(monkeypatch):
    assert prepare.ByteTokenizer().encode_ordinary("<|endoftext|>") == list(b"<|endoftext|>")
    seen = []

    class Encoding:
        n_vocab, eot_token = 50257, 50256

        def encode_ordinary_batch(self, texts):
            seen.extend(texts)
            return [[1] * len(text) for text in texts]

    monkeypatch.setattr(prepare.tiktoken, "get_encoding", lambda name: Encoding())
    Path("a.txt").write_text("<|endoftext|>")
    run("a.txt", tokenizer="gpt2")
    assert seen == ["<|endoftext|>"] and tokens("a").tolist() == [1] * 13 + [50256]


def test_openwebtext_is_read_row_by_row(monkeypatch):
    import datasets

    def load_dataset(name, split, revision):
        assert (name, split) == ("Skylion007/openwebtext", "train")
        return datasets.Dataset.from_list([{"text": f"document {i}"} for i in range(20)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    run("openwebtext", tokenizer="byte")
    assert documents("openwebtext") == [f"document {i}" for i in range(20)]


@pytest.mark.parametrize("source, name", [
    ("corpus.en.txt", "corpus.en"), ("dump.jsonl.gz", "dump"), ("v1.2/a.md", "v1.2"), (".src/a.md", ".src"),
])  # fmt: skip
def test_the_default_name_is_that_of_the_source_without_its_suffix(source, name):
    text = gzip.compress(b'{"text": "some text to read"}') if source.endswith(".gz") else b"some text to read"
    make({source: text})
    run(source.partition("/")[0])
    assert documents(name) == ["some text to read"]


def test_a_dataset_is_replaced_only_by_the_same_source():
    for name in ("a", "b"):
        Path(name).mkdir()
        Path(name, "text.txt").write_text(f"the text of {name}")
    run("a", name="mine")
    Path("a/text.txt").write_text("another text of a")
    run("a", name="mine")
    assert documents("mine") == ["another text of a"]
    with pytest.raises(UsageError, match="data/mine was made from .*/a: choose another --name, or delete it"):
        run("b", name="mine")
    Path("data/notes").mkdir()
    with pytest.raises(UsageError, match="data/notes was made from something else"):
        run("a", name="notes")


def test_a_killed_process_and_two_at_the_same_time_leave_a_whole_dataset():
    Path("a.txt").write_text("short text\n" * 100)
    Path("big.txt").write_text("some longer text\n" * 2_000_000)
    run("a.txt", name="mine")
    Path("a.txt").write_text("other text!\n" * 100)
    command = [sys.executable, SCRIPT, "big.txt", "--name=big"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not list(Path("data").glob(".big.*")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path("data/big").exists()
    both = [subprocess.Popen([sys.executable, SCRIPT, "a.txt", "--name=two"]) for _ in range(2)]
    assert [process.wait() for process in both].count(0) >= 1
    assert documents("two") == ["other text!\n" * 100] and documents("mine") == ["short text\n" * 100]


def test_windows_cover_the_text_and_batches_are_functions_of_seed_and_step():
    Path("a.txt").write_text("".join(chr(33 + i % 90) for i in range(1000)))
    run("a.txt")
    train, val, meta = prepare.open_dataset("a", 16)
    text = tokens("a")
    idx, targets = train.windows(np.array([0, 5, int(train.ends[-1]) - 1]))
    assert idx[1].tolist() == text[5:21].tolist() and targets[1].tolist() == text[6:22].tolist()
    assert targets[2][-1] == text[meta["train_tokens"] - 1], "the last token of the file is a target"
    whole = train.batch(1, 2, 0, 8)
    assert all((a == b).all() for a, b in zip(train.batch(1, 2, 5, 3), (whole[0][5:], whole[1][5:])))
    assert not (train.batch(1, 3, 0, 8)[0] == whole[0]).all()
    batches = val.eval_batches(64, 3)
    assert [len(idx) for idx, _ in batches] == [3, 1] and len(batches[0][0].unique(dim=0)) == 3


def test_shards_of_other_programs_are_read_by_their_names():
    Path("shards").mkdir()
    for name, first in (("fineweb_train_000001.bin", 1), ("constrained_val_0.bin", 2)):
        prepare.write_shard(Path("shards", name), np.full(40, first, np.uint16))
    train, val, meta = prepare.open_dataset("shards", 8)
    assert meta == dict(tokenizer="gpt2", vocab_size=50257)
    assert [f.name for f in train.files + val.files] == ["fineweb_train_000001.bin", "constrained_val_0.bin"]


@pytest.mark.parametrize("files, call, message", [
    ({}, lambda: run("nothing.txt"), "nothing.txt: no such file or folder"),
    ({"in/a.bin": b"x"}, lambda: run("in"), "there are no .txt .*files in in"),
    ({"a.txt": b"abc"}, lambda: run("a.txt"), "4 tokens are too little text"),
    ({"a.txt": b"caf\xe9 and more"}, lambda: run("a.txt"), "a.txt: 'utf-8' codec can't decode"),
    ({"a.jsonl": b'{"text": "one"}\n{"te'}, lambda: run("a.jsonl"), "a.jsonl, after row 1: "),
    ({"a.jsonl": b'{"content": "one", "id": 1}'}, lambda: run("a.jsonl"), "--field=text. Its last row .* content, id"),
    ({}, lambda: prepare.open_dataset("nothing", 8), "no dataset 'nothing' in data/, write it with prepare.py"),
    ({"d/train.bin": b"ab" * 3000}, lambda: prepare.open_dataset("d", 8), "d/train.bin is not a complete file"),
    ({"d/train.bin": np.array([20240801, 7, 100] + [0] * 253, np.int32).tobytes() + b"abcd" * 100},
     lambda: prepare.open_dataset("d", 8), "is not a complete file of uint16 tokens in llm.c's format"),
])  # fmt: skip
def test_mistakes_are_refused_in_one_line_and_leave_nothing(files, call, message):
    make(files)
    with pytest.raises(UsageError, match=message) as error:
        call()
    assert "\n" not in str(error.value) and not list(Path().glob("data/*"))


def test_without_a_network_the_missing_vocabulary_is_one_line(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(Path("empty").absolute()))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setattr("tiktoken.load.read_file", lambda path: (_ for _ in ()).throw(ConnectionError("no network")))
    Path("a.txt").write_text("some text to read")
    with pytest.raises(UsageError, match="cannot download gpt2's vocabulary: .*TIKTOKEN_CACHE_DIR"):
        run("a.txt", tokenizer="gpt2")


def test_thousands_of_files_take_linear_time():
    Path("in").mkdir()
    for i in range(4000):
        Path(f"in/{i}.txt").write_text("x")
    start = time.perf_counter()
    assert len(prepare.find_files(["in"])) == 4000
    assert time.perf_counter() - start < 2

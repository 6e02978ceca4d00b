"""prepare.py: real files in, the right tokens out; and the reader of its shards."""

import gzip
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import ENVIRONMENT, HERE, call, corpus, dataset_text, read_shard, write_shard

import prepare
from model import UsageError

END = "<|endoftext|>"


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_lines(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def documents(folder):
    """The set of all documents of a dataset, whichever split they are in."""
    both = dataset_text(folder, "train") + dataset_text(folder, "val")
    return set(both.split(END)[:-1])


def split_shares(folder):
    meta = json.loads((Path(folder) / "meta.json").read_text())
    return meta["val_tokens"] / (meta["val_tokens"] + meta["train_tokens"])


TEXTS = [f"document {i}: äöü\r\n" + "x" * i for i in range(30)]


class TestSources:
    def test_stdlib_is_the_same_every_time_and_holds_no_tests(self):
        call(prepare, "stdlib")
        first = {f.name: f.read_bytes() for f in Path("data/stdlib").iterdir()}
        call(prepare, "stdlib")
        assert first == {f.name: f.read_bytes() for f in Path("data/stdlib").iterdir()}
        assert not any("test" in f.parts or "site-packages" in f.parts for f in prepare.stdlib_files())
        meta = json.loads(first["meta.json"])
        train, val = read_shard("data/stdlib/train_000000.bin"), read_shard("data/stdlib/val_000000.bin")
        assert (len(train), len(val), 257) == (meta["train_tokens"], meta["val_tokens"], meta["vocab_size"])
        assert (train == 256).sum() + (val == 256).sum() == meta["documents"] > 100
        assert 0.05 < split_shares("data/stdlib") < 0.15 and sorted(os.listdir("data")) == ["stdlib"]

    def test_files_of_all_kinds_arrive_whole_and_what_is_left_out_is_named(self, capsys):
        os.makedirs("d/.hidden")
        os.mkdir("d/x.txt")  # a folder may be called anything
        Path("d/a.txt").write_text(TEXTS[0], newline="")
        Path("d/b.md").write_text(TEXTS[1], newline="")
        for name in ("c.bin", "d.json", "e.TXT", "f.csv"):
            Path("d", name).write_bytes(b"not read")
        Path("d/empty.jsonl").write_text("")
        Path("d/.hidden/no.txt").write_text("not read")
        write_lines("e.jsonl", [dict(text=t, id=3) for t in TEXTS[2:15]])
        pyarrow.parquet.write_table(pyarrow.table(dict(text=TEXTS[15:])), "f.parquet")
        call(prepare, "d", "e.jsonl", "f.parquet", "--name=all")
        assert dataset_text("data/all", "val") == "".join(t + END for t in TEXTS[9::10])
        assert dataset_text("data/all", "train") == "".join(t + END for i, t in enumerate(TEXTS) if i % 10 != 9)
        out = capsys.readouterr().out
        assert all(f"d/{name}" in out for name in ("c.bin", "d.json", "e.TXT", "f.csv", "empty.jsonl"))
        assert ".hidden" not in out

    @pytest.mark.parametrize("name", ["part[12].jsonl", "a*b.parquet", "p[0].parquet", "q?.jsonl", "{x}.jsonl.gz"])
    def test_a_path_is_a_path(self, name, monkeypatch):
        os.mkdir("[proj] x")
        monkeypatch.chdir("[proj] x")
        others = ["part1.jsonl", "part2.jsonl", "axb.parquet", "p0.parquet", "qz.jsonl", "x.jsonl.gz"]
        for path, text in [(other, "other") for other in others] + [(name, "mine")]:
            rows = [dict(text=f"{text} {i}") for i in range(20)]
            if path.endswith("parquet"):
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
            else:
                body = "".join(json.dumps(row) + "\n" for row in rows).encode()
                Path(path).write_bytes(gzip.compress(body) if path.endswith("gz") else body)
        call(prepare, name, "--name=d")
        assert documents("data/d") == {f"mine {i}" for i in range(20)}

    def test_only_the_text_matters(self, capsys):
        rows = [dict(text=f"{i} " + "y" * 2000, url=None) for i in range(6000)]  # datasets fixes types after 10 MB
        rows += [dict(text="last", url="a string", more=1), dict(text="nested", url=dict(a=[1, dict(b=2)]))]
        write_lines("a.jsonl", rows)
        with open("a.jsonl", "a") as f:
            f.write('{"text": "long number", "n": ' + "1" * 10000 + ', "x": NaN, "text": "the last of two"}\r\n')
        call(prepare, "a.jsonl")
        assert {"last", "nested", "the last of two"} < documents("data/a") and len(documents("data/a")) == 6003

    def test_the_field_can_be_chosen(self):
        write_lines("a.jsonl", [dict(content=f"text {i}", text=3) for i in range(20)])
        table = pyarrow.table(
            dict(content=pyarrow.array([f"row {i}" for i in range(20)]).dictionary_encode(), n=range(20))
        )
        pyarrow.parquet.write_table(table, "b.parquet")
        pyarrow.parquet.write_table(
            pyarrow.table(dict(content=[f"bytes {i}".encode() for i in range(20)])), "c.parquet"
        )
        call(prepare, "a.jsonl", "b.parquet", "c.parquet", "--name=d", "--field=content")
        assert documents("data/d") == {f"{kind} {i}" for kind in ("text", "row", "bytes") for i in range(20)}
        for path in ("a.jsonl", "b.parquet"):
            with pytest.raises(UsageError, match=r"'txt'; its fields: content, .*--field"):
                call(prepare, path, "--field=txt")

    def test_rows_without_text_are_counted_and_skipped(self, capsys):
        rows = [dict(text=t) for t in ["good", None, "", 3, ["x"], "half \ud83d a character"]] + [dict(other=1)]
        rows += [dict(text=f"text {i}") for i in range(20)]
        write_lines("a.jsonl", rows)
        with open("a.jsonl", "a") as f:
            f.write('\n"a string"\n[1]\n\n')
        column = pyarrow.array(["row", None, ""] + [f"row {i}" for i in range(9)], pyarrow.large_string())
        pyarrow.parquet.write_table(pyarrow.table(dict(text=column)), "b.parquet")
        call(prepare, "a.jsonl", "b.parquet", "--name=d")
        texts = {
            "good",
            "half � a character",
            "row",
            *(f"text {i}" for i in range(20)),
            *(f"row {i}" for i in range(9)),
        }
        assert documents("data/d") == texts
        assert json.loads(Path("data/d/meta.json").read_text())["skipped_rows"] == 9
        out = capsys.readouterr().out
        assert "7 rows without text of a.jsonl" in out and "2 rows without text of b.parquet" in out

    @pytest.mark.parametrize("suffix, packed", [
        (".gz", lambda b: gzip.compress(b[: len(b) // 2]) + gzip.compress(b[len(b) // 2 :])),  # two members
        (".xz", lzma.compress), (".zst", lambda b: compress_zst(b)), ("", lambda b: b"\xef\xbb\xbf" + b),
    ], ids=["gz", "xz", "zst", "byte order mark"])  # fmt: skip
    def test_compressed_lines_are_read_and_damaged_ones_named(self, suffix, packed):
        rng = np.random.default_rng(0)
        texts = ["".join(map(chr, rng.integers(97, 123, 500))) for _ in range(200)]
        body = packed("".join(json.dumps(dict(text=text)) + "\r\n" for text in texts).encode())
        Path(f"a.jsonl{suffix}").write_bytes(body)
        call(prepare, f"a.jsonl{suffix}", "--name=d")
        assert documents("data/d") == set(texts)
        Path(f"a.jsonl{suffix}").write_bytes(body[: len(body) * 2 // 3])
        with pytest.raises(UsageError, match=rf"^a.jsonl{suffix}: .*line"):
            call(prepare, f"a.jsonl{suffix}", "--name=e")
        assert os.listdir("data") == ["d"]

    def test_encodings_of_this_world(self):
        os.mkdir("d")
        Path("d/a.py").write_bytes("# -*- coding: latin-1 -*-\nname = 'é'\n".encode("latin-1"))
        Path("d/b.txt").write_bytes(b"\xef\xbb\xbf" + b"marked\n" * 20)
        Path("d/c.py").write_bytes(b"\xef\xbb\xbf" + b"x = 1\n" * 20)
        call(prepare, "d")
        text = dataset_text("data/d", "train") + dataset_text("data/d", "val")
        assert "'é'" in text and "\ufeff" not in text and text.count("marked") == 20
        for name, body in (
            ("u.txt", "text".encode("utf-16")),
            ("v.py", b"# coding: klingon\n"),
            ("w.py", b"x = '\xe9'"),
            ("rot13.py", b"# coding: rot13\n"),  # of Python's own, but not one of texts
            ("w.jsonl", '{"text": "x"}\n{"text": "y"}'.encode("utf-16")),
        ):
            Path(name).write_bytes(body)
            with pytest.raises(UsageError, match=name):
                call(prepare, name)

    def test_openwebtext_checks_the_disk_then_takes_the_hubs_table(self, tmp_path, monkeypatch):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        table = datasets.Dataset.from_dict(dict(text=[f"web page {i}" for i in range(40)]))
        asked = []

        def load_dataset(name, split, revision=None):
            asked.append((name, revision))
            if revision is None:
                raise RuntimeError("Dataset scripts are no longer supported, but found openwebtext.py")
            return table

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 60e9))
        with pytest.raises(UsageError, match="72 GB are needed but 60 GB are free"):
            call(prepare, "openwebtext", "--tokenizer=byte")
        assert not asked and os.listdir("data") == []
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 80e9))
        call(prepare, "openwebtext", "--tokenizer=byte")
        assert asked == [("Skylion007/openwebtext", None), ("Skylion007/openwebtext", "refs/convert/parquet")]
        assert dataset_text("data/openwebtext", "val").split(END)[:2] == ["web page 9", "web page 19"]


def compress_zst(body):
    stream = io.BytesIO()
    for half in (body[: len(body) // 2], body[len(body) // 2 :]):  # two frames
        with pyarrow.CompressedOutputStream(keep := pyarrow.BufferOutputStream(), "zstd") as f:
            f.write(half)
        stream.write(keep.getvalue())
    return stream.getvalue()


class TestSplit:
    def test_a_single_line_has_a_tail_too(self):
        Path("one.txt").write_text("x" * 5000 + "\n")
        call(prepare, "one.txt")
        assert split_shares("data/one") == pytest.approx(0.1, abs=0.01)

    def test_a_single_file_is_split_at_its_tail(self):
        text = "".join(f"line {i}\n" for i in range(1000))
        Path("one.txt").write_text(text)
        call(prepare, "one.txt")
        a, b = dataset_text("data/one", "train"), dataset_text("data/one", "val")
        assert a + b == text + END and a.endswith("\n") and 0.05 < len(b) / len(text) < 0.15

    @pytest.mark.parametrize("place", [0, 4, 9])
    def test_nine_notes_and_a_novel(self, place):
        os.mkdir("d")
        for i in range(10):
            Path(f"d/{i}.txt").write_text("a line of text\n" * (90_000 if i == place else 70))
        call(prepare, "d")
        assert split_shares("data/d") == pytest.approx(0.1, abs=0.01)

    @pytest.mark.parametrize("seed", range(8))
    def test_the_split_follows_size_whatever_the_lengths(self, seed, monkeypatch):
        monkeypatch.setattr(prepare, "PIECE", 5000)
        rng = np.random.default_rng(seed)
        sizes = (rng.pareto(0.7, int(rng.integers(10, 300))) * 100 + 20).clip(max=100_000).astype(int)
        write_lines("a.jsonl", [dict(text="line\n" * int(n // 5)) for n in sizes])
        call(prepare, "a.jsonl")
        assert 0.02 < split_shares("data/a") < 0.3
        assert sum(len(read_shard(f)) for f in Path("data/a").glob("*.bin")) == sum(n // 5 * 5 + 1 for n in sizes)

    def test_where_documents_are_many_none_is_torn(self):
        write_lines("a.jsonl", [dict(text=document) for document in corpus()])
        call(prepare, "a.jsonl")
        assert documents("data/a") == set(corpus()) and split_shares("data/a") == pytest.approx(0.1, abs=0.02)

    def test_validation_holds_so_many_tokens_at_most(self, monkeypatch):
        monkeypatch.setattr(prepare, "VAL_TOKENS", 10_000)
        write_lines("a.jsonl", [dict(text=document) for document in corpus()])
        write_lines("long.jsonl", [dict(text="词" * 5000) for _ in range(40)])  # each longer than validation may be
        for name in ("a", "long"):
            call(prepare, f"{name}.jsonl")
            assert 5_000 < len(read_shard(f"data/{name}/val_000000.bin")) <= 10_000


class TestWriting:
    def test_long_texts_and_many_shards_lose_nothing(self, monkeypatch):
        monkeypatch.setattr(prepare, "PIECE", 100)
        monkeypatch.setattr(prepare, "SHARD_TOKENS", 1000)
        text = "".join(f"line {i}\n\n  indented\n" for i in range(500)) + "y" * 1000
        Path("long.txt").write_text(text)
        pieces = list(prepare.read_text(Path("long.txt")))
        assert "".join(p for p, _ in pieces) == text and [e for _, e in pieces] == [False] * (len(pieces) - 1) + [True]
        call(prepare, "long.txt")
        shards = sorted(Path("data/long").glob("*.bin"))
        assert [len(read_shard(f)) for f in shards].count(1000) >= 9
        assert sum(len(read_shard(f)) for f in shards) == len(text) + 1

    def test_a_long_row_comes_in_pieces_and_none_is_longer(self, monkeypatch):
        monkeypatch.setattr(prepare, "PIECE", 100)
        text = "".join("word " * (i % 7) + "\n" + "\n" * (i % 3) for i in range(500)) + "y" * 250
        write_lines("a.jsonl", [dict(text="short"), dict(text=text)])
        pieces = list(prepare.read_table(Path("a.jsonl"), "text", {}))
        assert pieces[0] == ("short", True) and max(len(piece) for piece, _ in pieces) == 100
        assert "".join(piece for piece, _ in pieces[1:]) == text
        assert [ends for _, ends in pieces[1:]] == [False] * (len(pieces) - 2) + [True]

    def test_a_killed_run_leaves_nothing_under_a_final_name_and_the_old_data_intact(self):
        def killed():
            for _ in range(50):
                yield "text " * 100, True
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            prepare.write_dataset("d", killed(), "byte", "a test")
        assert not Path("data/d").exists()
        prepare.write_dataset("d", ((f"text {i}\n", True) for i in range(50)), "byte", "a test")
        before = Path("data/d/train_000000.bin").read_bytes()
        with pytest.raises(KeyboardInterrupt):
            prepare.write_dataset("d", killed(), "byte", "a test")
        assert Path("data/d/train_000000.bin").read_bytes() == before

    def test_gpt2_tokens_do_not_depend_on_how_a_text_is_cut(self, tmp_path, monkeypatch):
        try:
            tokenizer = prepare.get_tokenizer("gpt2")
        except UsageError as e:
            pytest.skip(str(e))
        monkeypatch.setattr(prepare, "PIECE", 500)  # every 500 characters of prose have a place to cut
        text = (HERE / "README.md").read_text(encoding="utf-8")
        (tmp_path / "t.txt").write_text(text, encoding="utf-8")
        pieces = [piece for piece, _ in prepare.read_text(tmp_path / "t.txt")]
        cut = [token for piece in pieces for token in tokenizer.encode_ordinary(piece)]
        assert len(pieces) > 10 and cut == tokenizer.encode_ordinary(text)
        monkeypatch.setattr(prepare, "PIECE", len(text))
        call(prepare, "t.txt", "--tokenizer=gpt2")
        ids = np.concatenate([read_shard("data/t/train_000000.bin"), read_shard("data/t/val_000000.bin")])
        assert ids[-1] == 50256 and tokenizer.decode(ids[:-1].tolist()) == text


class TestShards:
    def test_windows_cover_every_shard_and_never_cross_one(self, tmp_path):
        for i, (length, first) in enumerate(zip((10, 3, 8), (0, 100, 200))):
            write_shard(tmp_path / f"x_train_{i:06d}.bin", np.arange(first, first + length))
        shards = prepare.Shards(tmp_path, "train", block_size=4, vocab_size=1000)
        idx, targets = shards.windows(range(shards.ends[-1]))
        assert idx[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 200, 201, 202, 203] and torch.equal(targets, idx + 1)

    def test_a_batch_is_the_same_in_parts(self, tmp_path):
        write_shard(tmp_path / "train_0.bin", np.random.default_rng(0).integers(0, 256, 5000))
        data = prepare.Shards(tmp_path, "train", 32, 257)
        idx, targets = data.random_batch(7, 3, 0, 16)
        parts = [data.random_batch(7, 3, first, 4) for first in (0, 4, 8, 12)]
        assert torch.equal(idx, torch.cat([p[0] for p in parts])) and torch.equal(
            targets, torch.cat([p[1] for p in parts])
        )
        assert torch.equal(idx[:, 1:], targets[:, :-1])
        assert not any(torch.equal(idx, data.random_batch(*other, 0, 16)[0]) for other in ((7, 4), (8, 3)))

    @pytest.mark.parametrize("wanted", [1, 32, 500, 2000, 10**6])
    def test_evaluation_windows_stand_for_the_whole_split(self, tmp_path, wanted):
        for i, first in enumerate((0, 3000)):
            write_shard(tmp_path / f"val_{i}.bin", np.arange(first, first + 3000 - i))
        data = prepare.Shards(tmp_path, "val", 32, 10_000)
        windows = torch.cat([idx for idx, _ in data.fixed_batches(wanted, 7)])
        assert torch.equal(windows, torch.cat([idx for idx, _ in data.fixed_batches(wanted, 64)]))
        starts = windows[:, 0]
        assert len(windows) == max(1, min(wanted // 32, len(windows))) and starts[0] == 0
        assert (windows.diff(dim=1) == 1).all(), "a window crosses shards"
        if wanted >= 500:
            gaps = starts.diff()
            assert gaps.min() >= 32 and gaps.max() < 6000 / len(starts) + 40 and starts[-1] > 6000 - 2 * gaps.max()
        assert len(windows) > 180 or wanted < 6000

    def test_a_shard_belongs_to_one_split(self, tmp_path):
        for name, first in (
            ("medieval_train_0", 0),
            ("medieval_val_0", 100),
            ("train-set.validation", 200),
            (".x_val", 300),
        ):
            write_shard(tmp_path / f"{name}.bin", np.arange(first, first + 20))
        files = {split: prepare.Shards(tmp_path, split, 8, 1000).files for split in ("train", "val")}
        names = {split: [Path(f).name for f in found] for split, found in files.items()}
        assert names == dict(train=["medieval_train_0.bin"], val=["medieval_val_0.bin", "train-set.validation.bin"])

    def test_nanogpts_bare_tokens_are_refused_with_a_command_that_converts_them(self, tmp_path):
        tokens, folder = np.arange(5000, dtype=np.uint16), tmp_path / "it's my $HOME"
        folder.mkdir()
        for split in ("train", "val"):
            tokens.tofile(folder / f"{split}.bin")
            with pytest.raises(UsageError, match="python -c") as e:
                prepare.Shards(folder, split, 32, 50257)
            line = str(e.value).split("convert it: python ")[1]
            subprocess.run(f"{sys.executable} {line}", shell=True, check=True, env=ENVIRONMENT)
            assert (read_shard(folder / f"{split}_000000.bin") == tokens).all()
        assert prepare.open_dataset(folder, 32)[0].n_tokens == 5000

    @pytest.mark.parametrize("meta", [
        "", "[]", "{", '{"tokenizer": "byte"}', '{"tokenizer": "byte", "vocab_size": Infinity}', "\udcff",
        '{"tokenizer": "byte", "vocab_size": -1}', '{"tokenizer": "byte", "vocab_size": 1000000000000}',
    ])  # fmt: skip
    def test_damaged_meta(self, tmp_path, meta):
        for split in ("train", "val"):
            write_shard(tmp_path / f"{split}_0.bin", np.arange(100))
        (tmp_path / "meta.json").write_bytes(meta.encode(errors="surrogateescape"))
        with pytest.raises(UsageError, match=r"meta\.json is damaged .*: prepare the dataset again"):
            prepare.open_dataset(tmp_path, 32)


class TestRun:
    """How a command line ends, for all programs: prepare.run."""

    def shell(self, line):
        line = line.replace("PREPARE", f"{sys.executable} {HERE / 'prepare.py'}")
        p = subprocess.run(["bash", "-c", line], capture_output=True, env=ENVIRONMENT)
        return p.returncode, p.stdout, p.stderr

    def test_a_closed_pipe_ends_it_quietly(self):
        for i in range(20):
            Path(f"{i}.txt").write_text("some text\n" * 20)
        assert self.shell("PREPARE *.txt --name=d | true; exit ${PIPESTATUS[0]}") == (141, b"", b"")
        assert self.shell("PREPARE --help | true") == (0, b"", b"")
        assert self.shell("PREPARE *.txt --name=e >&-") == (0, b"", b"")
        assert sorted(os.listdir("data")) == ["d", "e"]

    def test_ctrl_c_is_status_130_and_leaves_nothing(self):
        code = (
            "import os, signal, prepare; "
            "texts = ((os.kill(os.getpid(), signal.SIGINT), ('x', True))[1] for _ in range(99)); "
            "prepare.run(lambda: prepare.write_dataset('d', texts, 'byte', 'a test'), 'prepare.py')"
        )
        p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
        assert (p.returncode, p.stdout) == (130, "") and "Traceback" not in p.stderr and os.listdir("data") == []

    def test_what_a_terminal_cannot_show_is_replaced_and_an_error_is_one_line(self):
        for i in range(20):
            Path(f"naïve ☃{i}.txt").write_text("some text\n" * 20)
        os.mkdir("d")
        Path("d/☃.csv").touch()
        Path("d/a.txt").write_text("text\n" * 100)
        status, out, _ = self.shell("PYTHONIOENCODING=latin-1 PREPARE d")
        assert status == 0 and b"left out" in out and b"d/?.csv" in out
        assert self.shell("PYTHONIOENCODING=ascii PREPARE $'two\\nlines.txt' --name=x")[2].count(b"\n") == 1

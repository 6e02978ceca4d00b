"""Bad input: one clear line that names it, status 2, at once, and nothing is written."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, call, command, write_shard

import bench
import prepare
import sample
import train

PROGRAMS = dict(train=train, sample=sample, bench=bench, prepare=prepare)
NEW = ["demo", *TINY, "--out_dir=x"]
MOSE = "--checkpoint=out/mose/ckpt.pt"

BAD = [  # program, arguments, what the line must name
    ("train", ["dmeo"], "dmeo"),
    ("train", ["demo", "--lerning_rate=1"], "did you mean --learning_rate"),
    ("train", ["demo", "--steps=many"], "many"),
    ("train", ["demo", "--recipe=mouse"], "mouse"),
    ("train", ["demo", "--dataset=nowhere"], "nowhere"),
    ("train", [*NEW, "--top_k=5"], "top_k 5"),
    ("train", [*NEW, "--expert_hidden=100"], "expert_hidden"),
    ("train", [*NEW, "--tokens_per_step=100"], "multiple"),
    ("train", [*NEW, "--block_size=100000000", "--tokens_per_step=800000000"], "eval_tokens"),
    ("train", [*NEW, "--n_expert=1"], "needs experts"),
    ("train", [*NEW, "--device=tpu"], "tpu"),
    ("train", [*NEW, "--steps=0"], "steps"),
    ("train", ["demo", *TINY, "--out_dir=out/mose"], "already holds a run"),
    ("train", ["demo", "--resume", "--out_dir=out/mose", "--n_layer=5"], "n_layer=5 contradicts"),
    ("train", ["55m", "--resume", "--out_dir=out/mose"], "preset demo"),
    ("train", ["demo", "--resume", "--out_dir=x"], "no checkpoint"),
    *[("train", [*NEW, f"--dataset=bad/{kind}"], word) for kind, word in (
        ("empty", "not a shard"), ("short header", "not a shard"), ("magic", "20240520"),
        ("count", "header says 100"), ("ids", "60099"),
    )],
    ("sample", ["--checkpoint=nowhere.pt"], "nowhere.pt"),
    ("sample", ["--checkpoint=foreign.pt"], "lacks"),
    ("sample", ["--checkpoint=garbage.pt"], "damaged"),
    ("sample", [MOSE, "--width=1.5"], "1.5"),
    ("sample", [MOSE, "--budget=0"], "budget"),
    ("sample", [MOSE, "--width=0.5", "--budget=0.5"], "exclude each other"),
    ("sample", [MOSE, "--experts=1", "--budget=0.5"], "exclude each other"),
    ("sample", [MOSE, "--experts=1,0.01"], "0.01"),
    ("sample", [MOSE, "--experts=3"], "--experts 3"),
    ("sample", [MOSE, "--experts=one"], "--experts must be numbers"),
    ("sample", [MOSE, "--gamma=2"], "--budget too"),
    ("sample", [MOSE, "--width=1,two"], "1,two"),
    ("sample", [MOSE, "--prompt=" + "a" * 40], "40 tokens"),
    ("sample", [MOSE, "--prompt=FILE:nowhere.txt"], "nowhere.txt"),
    ("sample", [MOSE, "--temperature=nan"], "temperature"),
    ("sample", ["--checkpoint=out/dense/ckpt.pt", "--width=0.5"], "dense"),
    ("bench", ["frontier", "nowhere.pt"], "nowhere.pt"),
    ("bench", ["frontier", "out/mose/ckpt.pt", "--dataset=nowhere"], "nowhere"),
    ("bench", ["frontyear"], "frontyear"),
    ("prepare", ["nowhere.txt"], "nowhere.txt"),
    ("prepare", ["bad/blank.txt"], "too little text"),
    ("prepare", ["bad/binary.txt"], "NUL"),
    ("prepare", ["bad/latin.txt"], "UTF-8"),
    ("prepare", ["bad/picture.png"], "picture.png"),
    ("prepare", ["bad/nothing"], "bad/nothing"),
    ("prepare", ["bad/other.jsonl"], "field 'text'"),
    ("prepare", ["bad/broken.jsonl"], "broken.jsonl"),
    ("prepare", ["bad/broken.parquet"], "broken.parquet"),
    ("prepare", ["stdlib", "--tokenizer=gpt5"], "gpt5"),
    ("prepare", ["stdlib", "--name=../up"], "../up"),
    ("prepare", ["stdlib", "notes.txt"], "alone"),
    ("prepare", ["bad/latin.txt", "--name=precious"], "not written by prepare.py"),
    # options that cannot work together, or at all
    ("train", [], "preset"),
    ("train", ["demo", "--resume=maybe"], "maybe"),
    ("train", [*NEW, "--seed=-1"], "seed"),
    ("train", [*NEW, "--seed=99999999999999999999"], "9223372036854775807"),
    ("sample", [MOSE, "--seed=99999999999999999999"], "9223372036854775807"),
    ("sample", [MOSE, "--seed=-1"], "seed"),
    ("bench", ["frontier", "out/mose/ckpt.pt", "--seed=99999999999999999999"], "9223372036854775807"),
    ("bench", ["speed", "--seed=99999999999999999999", "--seconds=0"], "9223372036854775807"),
    ("train", [*NEW, "--device=cpu:x"], "cpu:x"),
    ("sample", [MOSE, "--budget=0.5", "--gamma=1e39"], "1e6"),
    ("train", [*NEW, "--learning_rate=nan"], "learning_rate"),
    ("train", [*NEW, "--learning_rate=0"], "learning_rate"),
    ("train", [*NEW, "--weight_decay=inf"], "weight_decay"),
    ("train", [*NEW, "--dropout=1"], "dropout"),
    ("train", [*NEW, "--train_width=1.5"], "--train_width"),
    ("train", [*NEW, "--n_shared=-1"], "n_shared"),
    ("train", [*NEW, "--n_head=3"], "n_head 3"),
    ("train", [*NEW, "--dtype=float16"], "float16"),
    ("train", [*NEW, "--eval_tokens=8"], "eval_tokens"),
    ("train", ["demo", *TINY, "--out_dir=garbage.pt"], "garbage.pt"),
    ("train", ["demo", *TINY, "--out_dir=bad/model"], "already holds a run"),
    ("sample", ["--checkpoint=bad/flipped.pt"], "does not match its checksum"),
    ("bench", ["frontier", "out/mose/ckpt.pt", "--eval_tokens=10"], "eval_tokens"),
    ("bench", ["frontier", "out/mose/ckpt.pt", "--batch_size=0"], "batch_size"),
    ("prepare", ["bad/two words.txt"], "--name"),
    ("train", ["demo", "--out_dir=out/mose", "--replay=3"], "unknown option --replay"),
    ("train", ["demo", "--resume", "--out_dir=out/mose", "--seed=2"], "seed=2 contradicts"),
    ("train", ["demo", "--resume", "--out_dir=out/mose", "--recipe=moe"], "recipe=moe contradicts"),
    ("train", ["demo", "--resume", "--out_dir=out/mose", "--dataset=other"], "no dataset 'other'"),
    ("train", ["demo", "--resume", "--out_dir=bad/half"], "damaged"),
    ("train", ["demo", "--resume", "--out_dir=bad/bomb"], "damaged"),
    ("train", ["demo", "--resume", "--out_dir=bad/best"], "lacks optimizer"),
    # shards
    ("train", [*NEW, "--dataset=bad/directory"], "train_000000.bin"),
    ("train", [*NEW, "--dataset=bad/loop"], "train_000000.bin"),
    ("train", [*NEW, "--dataset=bad/nothing"], "no *train*.bin"),
    ("train", [*NEW, "--dataset=bad/short"], "block_size 32"),
    ("train", [*NEW, "--dataset=bad/meta"], "meta.json is damaged"),
    # checkpoints
    ("sample", ["--checkpoint=bad/empty.pt"], "damaged"),
    ("sample", ["--checkpoint=bad/half/last.pt"], "damaged"),
    ("sample", ["--checkpoint=bad/bomb/last.pt"], "damaged"),
    ("sample", ["--checkpoint=bad"], "no checkpoint"),
    ("sample", ["--checkpoint=bad/other.pt"], "does not fit"),
    ("sample", ["--checkpoint=bad/newer.pt"], "does not fit"),
    ("sample", ["--checkpoint=bad/keys.pt"], "does not fit"),
    ("bench", ["frontier", "bad/bomb/last.pt"], "damaged"),
    ("bench", ["frontier", "out/mose/ckpt.pt", "--eval_tokens=-1"], "eval_tokens"),
    ("bench", ["speed", "--preset=2b"], "2b"),
    ("bench", ["speed", "--checkpoint=out/dense/ckpt.pt"], "dense"),
    ("bench", ["study"], "study"),
    ("sample", ["--checkpoint=bad/nans.pt"], "not finite, first in transformer.h.1.mlp.w_in"),
    # widths
    ("sample", [MOSE, "--width="], "--width"),
    ("sample", [MOSE, "--width=0.5,0"], "above 0"),
    ("sample", [MOSE, "--width=nan"], "nan"),
    ("sample", [MOSE, "--compare=1.0,0.5"], "unknown option --compare"),
    ("sample", [MOSE, "--calibrated"], "--budget too"),
    ("sample", [MOSE, "--budget=0.5", "--calibrated", "--gamma=1"], "leave out --gamma"),
    ("sample", ["--checkpoint=out/moe/ckpt.pt", "--budget=0.5", "--calibrated"], "not calibrated"),
    ("sample", ["--checkpoint=nowhere.pt", "--budget=0.5", "--calibrated"], "nowhere.pt"),
    ("sample", ["--checkpoint=out/dense/ckpt.pt", "--width=1,0.5"], "dense"),
    # prompts
    ("sample", [MOSE, "--prompt=FILE:bad/latin.txt"], "UTF-8"),
    ("sample", [MOSE, "--prompt=FILE:bad"], "bad"),
    ("sample", [MOSE, "--num_tokens=0"], "num_tokens"),
    ("sample", [MOSE, "--top_k=-3"], "top_k"),
    ("sample", [MOSE, "--budget=0.01"], "budget"),
    ("sample", [MOSE, "--budget=0.5", "--gamma=-1"], "gamma"),
    ("sample", ["--checkpoint=bad/tokenizer.pt"], "tokenizer"),
    # text
    ("prepare", [], "source"),
    ("prepare", ["bad/loop/train_000000.bin"], "no such file"),
    ("prepare", ["bad/numbers.jsonl"], "field 'text'"),
    ("prepare", ["bad/lines.jsonl"], "lines.jsonl"),
    ("prepare", ["bad/one.txt"], "too little text"),
]  # fmt: skip


class Bomb:
    """A pickle that runs code."""

    def __reduce__(self):
        return open, ("bomb_went_off", "w")


@pytest.fixture(scope="module")
def scene(workshop):
    """The workshop, with a folder bad/ of everything that can be wrong with a file."""
    bad = workshop / "bad"
    for name, body in {
        "blank.txt": b"", "binary.txt": b"a\0b" * 100, "latin.txt": "é".encode("latin-1") * 10, "one.txt": b"x",
        "two words.txt": b"text\n" * 100, "picture.png": b"\x89PNG", "nothing/x.png": b"",
        "other.jsonl": b'{"body": "a"}\n', "broken.jsonl": b'{"text": "a"', "numbers.jsonl": b'{"text": 3}\n',
        "lines.jsonl": b"no json\n" * 3, "broken.parquet": b"PAR1 no", "meta/meta.json": b"{", "empty.pt": b"",
        "../garbage.pt": os.urandom(1000), "../data/precious/diary": b"x",
    }.items():  # fmt: skip
        (bad / name).parent.mkdir(parents=True, exist_ok=True)
        (bad / name).write_bytes(body)
    # shards
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, 100
    for split in ("train", "val"):
        shard = f"{split}_000000.bin"
        for folder in ("empty", "short header", "magic", "loop"):
            (bad / folder).mkdir(exist_ok=True)
        (bad / "empty" / shard).write_bytes(b"")
        (bad / "short header" / shard).write_bytes(header.tobytes()[:100])
        (bad / "magic" / shard).write_bytes(bytes(1224))
        os.symlink(shard, bad / "loop" / shard)
        (bad / "directory" / shard).mkdir(parents=True)
        write_shard(bad / "count" / shard, np.arange(50), header=100)
        write_shard(bad / "ids" / shard, np.arange(60000, 60100))
        write_shard(bad / "short" / shard, np.arange(20))
    # checkpoints
    torch.save({"weights": torch.zeros(3)}, workshop / "foreign.pt")
    for folder in ("half", "bomb", "best", "model"):
        (bad / folder).mkdir()
    whole = (workshop / "out/mose/last.pt").read_bytes()
    (bad / "half/last.pt").write_bytes(whole[: len(whole) // 2])
    (bad / "model/ckpt.pt").write_bytes(whole)
    (bad / "flipped.pt").write_bytes(whole[:20000] + bytes([whole[20000] ^ 64]) + whole[20001:])
    torch.save(Bomb(), bad / "bomb/last.pt")
    shutil.copy(workshop / "out/mose/ckpt.pt", bad / "best/last.pt")
    for name, change in {
        "other": lambda c: c["config"].update(n_embd=64), "newer": lambda c: c["config"].update(n_moons=2),
        "keys": lambda c: c["model"].pop("transformer.wpe.weight"),
        "tokenizer": lambda c: c.update(tokenizer="llama"),
        "nans": lambda c: c["model"]["transformer.h.1.mlp.w_in"][2, 5].fill_(torch.nan),
    }.items():  # fmt: skip
        c = torch.load(workshop / "out/mose/ckpt.pt", weights_only=True)
        change(c)
        torch.save(c, bad / f"{name}.pt")
    return workshop


def files(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


@pytest.mark.parametrize(
    "program, args, word", BAD, ids=[f"{p} {' '.join(x for x in a if x not in TINY)[:50]}" for p, a, _ in BAD]
)
def test_it_is_one_clear_line(scene, monkeypatch, capsys, program, args, word):
    monkeypatch.chdir(scene)
    before, started = files(scene), time.process_time()
    with pytest.raises(SystemExit) as e:
        prepare.run(lambda: call(PROGRAMS[program], *args), program)
    err = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and len(err) == 1 and err[0].startswith(f"{program}: ") and word in err[0], err
    assert files(scene) == before and not Path("bomb_went_off").exists()
    assert time.process_time() - started < 2


@pytest.mark.parametrize("program, args", [
    ("train", ["demo", "--stepps=1"]), ("sample", ["--checkpoint=garbage.pt"]), ("prepare", ["nowhere"]), ("bench", []),
])  # fmt: skip
def test_it_ends_with_status_2_from_the_shell(scene, program, args):
    status, _, err = command(program, *args, cwd=scene)
    assert status == 2 and err.startswith(f"{program}.py: ") and err.count("\n") == 1

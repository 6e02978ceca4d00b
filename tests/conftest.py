"""
What the tests of the command lines share: a corpus, a folder with data and trained models, ways to call a program.

    from conftest import TINY, call, command, ...
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare
import train

torch.set_num_threads(1)  # the models are tiny
HERE = Path(__file__).parent.parent
TINY = [
    "--dataset=tiny", "--n_layer=2", "--n_head=2", "--n_embd=32", "--n_expert=4", "--moe_every=1", "--block_size=32",
    "--batch_size=8", "--tokens_per_step=512", "--steps=40", "--eval_interval=20", "--eval_tokens=512",
    "--log_interval=5", "--warmup_steps=5", "--learning_rate=1e-2", "--device=cpu", "--dtype=float32",
]  # fmt: skip
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}


def corpus():
    """The text of the tests, 50 documents of 4 kB: code and prose of invented words, the same on every machine.

    There is something to learn at every range: letters, words of which few are frequent, sentences, nesting, and the
    names that a document keeps coming back to.
    """
    rng = random.Random(0)  # of which only random() is promised to stay the same
    pick = lambda items: items[int(len(items) * rng.random() ** 2)]  # the first ones most often
    syllables = "ka lo mi ne ru ta si vo be du fa go hi ju we xy zö pla stre qua".split()
    words = ["".join(pick(syllables) for _ in range(1 + int(3 * rng.random()))) for _ in range(300)]
    documents = []
    for _ in range(50):
        names, text = [pick(words) for _ in range(6)], ""
        noun = lambda names=names: pick(names) if rng.random() < 0.7 else pick(words)
        while len(text) < 4000:
            depth = 1 + int(3 * rng.random())
            if rng.random() < 0.5:
                text += f"def {noun()}_{noun()}({noun()}, {noun()}):\n"
                for d in range(1, depth + 1):
                    text += "    " * d + f"for {noun()} in {noun()}({noun()}):\n"
                text += "    " * (depth + 1) + f"return {noun()}[{noun()}] + {int(100 * rng.random())}\n\n"
            else:
                parts = [f"the {noun()} of {noun()} {pick(words)}s a {noun()}" for _ in range(depth)]
                text += ", and ".join(parts).capitalize() + ".\n\n"
        documents.append(text)
    return documents


def call(program, *args):
    """Run a command line in this process: quick. Raises what the command line would print."""
    argv, sys.argv = sys.argv, [f"{program.__name__}.py", *map(str, args)]
    try:
        program.main()
    finally:
        sys.argv = argv


def command(program, *args, cwd):
    """Run a command line as a user would; returns (status, stdout, stderr)."""
    line = [sys.executable, HERE / f"{program}.py", *map(str, args)]
    p = subprocess.run(line, cwd=cwd, capture_output=True, text=True, env=ENVIRONMENT)
    return p.returncode, p.stdout, p.stderr


def train_tiny(out, *args):
    """Train a tiny model into the folder out; returns its log, see `read_log`."""
    call(train, "demo", *TINY, f"--out_dir={out}", *args)
    return read_log(out)


def read_log(out):
    return [json.loads(line) for line in open(Path(out) / "log.jsonl")]


def read_shard(path):
    header = np.fromfile(path, np.int32, 256)
    assert header[0] == 20240520 and header[1] == 1
    tokens = np.fromfile(path, np.uint16, offset=1024)
    assert len(tokens) == header[2]
    return tokens


def write_shard(path, tokens, header=None):
    """Write a shard, whose header may say another number of tokens."""
    first = np.zeros(256, np.int32)
    first[:3] = 20240520, 1, len(tokens) if header is None else header
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(first.tobytes() + np.asarray(tokens, np.uint16).tobytes())


def dataset_text(folder, split):
    ids = np.concatenate([read_shard(f) for f in sorted(Path(folder).glob(f"{split}_*.bin"))])
    return prepare.ByteTokenizer().decode_bytes(ids.tolist()).decode()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """A folder with text/, data/tiny and trained models in out/mose, out/moe and out/dense."""
    folder = tmp_path_factory.mktemp("workshop")
    (folder / "text").mkdir()
    for i, document in enumerate(corpus()):
        (folder / f"text/{i:02d}.txt").write_text(document, encoding="utf-8")
    before = os.getcwd()
    os.chdir(folder)
    try:
        call(prepare, "text", "--name=tiny")
        train_tiny("out/mose", "--recipe=mose")
        train_tiny("out/moe", "--recipe=moe")
        train_tiny("out/dense", "--recipe=moe", "--n_expert=1", "--top_k=1")
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def inside(workshop, monkeypatch):
    """The same, as the working directory."""
    monkeypatch.chdir(workshop)
    return workshop

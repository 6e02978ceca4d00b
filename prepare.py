"""
Turn text into shards of tokens that train.py reads.

    python prepare.py stdlib                          # Python's own library: real text, no download, seconds
    python prepare.py openwebtext                     # 9 billion GPT-2 tokens; needs a network and 72 GB of disk
    python prepare.py notes.txt papers/ dump.jsonl    # your own .txt .md .py .jsonl .parquet files or folders
        [--tokenizer=byte|gpt2] [--name=NAME]

Writes data/NAME/{train,val}_NNNNNN.bin, in llm.c's format (a header of 256 int32: 20240520, 1, the number of
tokens; then the tokens as uint16), and data/NAME/meta.json. Every tenth document is for validation, until that
holds 10 million tokens; of fewer than ten documents, the last tenth of each.
"""

import argparse
import difflib
import itertools
import json
import os
import re
import shutil
import sys
import sysconfig
import tokenize
from pathlib import Path

import numpy as np
from tqdm import tqdm

from model import UsageError

SHARD_TOKENS = 100_000_000
VAL_EVERY, VAL_TOKENS = 10, 10_000_000
PIECE = 4_000_000  # characters of a long text that are held at once
MAGIC, VERSION = 20240520, 1  # of llm.c's shards

# -----------------------------------------------------------------------------
# Tokenizers


class ByteTokenizer:
    """UTF-8 bytes are the tokens 0 to 255; 256 ends a text."""

    n_vocab, eot_token = 257, 256

    def encode_ordinary(self, text):
        return list(text.encode("utf-8", errors="replace"))

    def encode_ordinary_batch(self, texts, num_threads=None):
        return [np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8) for text in texts]

    def decode_bytes(self, ids):
        return b"".join(b"<|endoftext|>" if i == self.eot_token else bytes([i]) for i in ids)


def get_tokenizer(name):
    """The tokenizer called "byte" or "gpt2": n_vocab, eot_token, encode_ordinary[_batch], decode_bytes."""
    if name == "byte":
        return ByteTokenizer()
    if name != "gpt2":
        raise UsageError(f"tokenizer must be byte or gpt2, not {name!r}")
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as e:  # requests' errors are OSErrors
        raise UsageError(
            f"GPT-2's vocabulary could not be loaded ({type(e).__name__}): tiktoken downloads it once; "
            "without a network, point TIKTOKEN_CACHE_DIR at a copy of its cache, or use --tokenizer=byte"
        ) from e


# -----------------------------------------------------------------------------
# Sources: iterators of (text, whether the document ends here)


def stdlib_files():
    """The running Python's library sources, without its tests and without what was installed into it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    if not files:
        raise UsageError(f"no library sources under {root}: this Python comes without them")
    return files


def read_source(path):
    with tokenize.open(path) as f:  # honours PEP 263 coding lines
        yield f.read(), True


TEXT, TABLE = (".txt", ".md", ".py"), (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst")


def find_files(paths):
    """The supported files among paths and below those that are folders, in sorted order, hidden ones left out."""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.name.endswith(TEXT + TABLE) and p.is_file())
            found = [p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)]
            if not found:
                raise UsageError(f"no {' '.join(TEXT + TABLE)} files below {path}")
            files += found
        elif not path.exists():
            raise UsageError(f"{path}: no such file or folder (other sources: stdlib, openwebtext)")
        elif not path.name.endswith(TEXT + TABLE):
            raise UsageError(f"{path}: cannot read this kind of file; supported: {' '.join(TEXT + TABLE)}")
        else:
            files.append(path)
    return files


def read_text(path):
    """A plain text file is one document. A long one comes in pieces, cut where GPT-2's tokens cannot notice."""
    text = ""
    try:
        with open(path, encoding="utf-8", newline="") as f:
            while more := f.read(PIECE):
                if "\0" in more:
                    raise UsageError(f"{path}: not a text file (it holds NUL bytes)")
                text += more
                if len(text) > PIECE:
                    # a line end between two visible characters is a token of its own
                    cuts = [m.start() + 2 for m in re.finditer(r"\S\n(?=\S)", text)]
                    cut = cuts[-1] if cuts else PIECE
                    yield text[:cut], False
                    text = text[cut:]
    except UnicodeDecodeError as e:
        raise UsageError(f"{path}: not UTF-8 text (byte {e.object[e.start]:#04x}): convert it first") from e
    if text:
        yield text, True


def read_table(path):
    """The documents in the column or field `text` of a .parquet or .jsonl file."""
    import datasets
    import pyarrow

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error raised below says it all
    kind = "parquet" if path.name.endswith(".parquet") else "json"
    try:
        for i, row in enumerate(datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)):
            if not isinstance(row.get("text"), str):
                raise UsageError(f"{path}: row {i} has no string in a field 'text'; its fields: {', '.join(row)}")
            if row["text"]:
                yield row["text"], True
    except (pyarrow.ArrowException, datasets.exceptions.DatasetsError, UnicodeDecodeError) as e:
        raise UsageError(f"{path}: not a readable {kind} file: {str(e).splitlines()[0]}") from e


def read_openwebtext():
    """The hub's OpenWebText: 8,013,769 documents, 9.04 billion GPT-2 tokens."""
    import datasets

    cache, gb = Path(datasets.config.HF_DATASETS_CACHE), 1e9
    needs = {cache: 54 * gb, Path("data"): 18.1 * gb}  # measured: the downloaded archive and its table; the shards
    print("openwebtext needs " + " and ".join(f"{n / gb:.0f} GB in {p.absolute()}" for p, n in needs.items()))
    disks = {}
    for path, need in needs.items():
        path.mkdir(parents=True, exist_ok=True)
        disks.setdefault(path.stat().st_dev, [0, path])[0] += need
    for need, path in disks.values():
        if (free := shutil.disk_usage(path).free) < need:
            raise UsageError(
                f"{need / gb:.0f} GB are needed but {free / gb:.0f} GB are free on the disk of {path.absolute()}"
            )
    hub = "Skylion007/openwebtext"
    try:
        table = datasets.load_dataset(hub, split="train")
    except RuntimeError:  # datasets 4 and later refuse the hub's loading script; this is the hub's own conversion
        table = datasets.load_dataset(hub, split="train", revision="refs/convert/parquet")
    except (OSError, datasets.exceptions.DatasetsError) as e:
        raise UsageError(f"{hub} could not be loaded from the hub: {str(e).splitlines()[0]}") from e
    for row in tqdm(table, unit=" documents", desc="openwebtext", disable=None):
        yield row["text"], True


# -----------------------------------------------------------------------------
# Shards


class ShardWriter:
    """Writes the tokens of one split to folder/split_NNNNNN.bin, SHARD_TOKENS a file."""

    def __init__(self, folder, split):
        self.folder, self.split, self.file, self.in_file, self.total, self.n_files = folder, split, None, 0, 0, 0

    def add(self, tokens):
        while len(tokens):
            if self.file is None:
                self.file = open(self.folder / f"{self.split}_{self.n_files:06d}.bin", "wb")
                self.file.write(bytes(256 * 4))  # the header, filled in when the number of tokens is known
            part, tokens = np.split(tokens, [SHARD_TOKENS - self.in_file])
            self.file.write(part.tobytes())
            self.in_file += len(part)
            self.total += len(part)
            if self.in_file == SHARD_TOKENS:
                self.close()

    def close(self):
        if self.file is not None:
            self.file.seek(0)
            self.file.write(np.array([MAGIC, VERSION, self.in_file], dtype=np.int32).tobytes())
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.file, self.in_file, self.n_files = None, 0, self.n_files + 1


def split_tail(text, ends):
    """For few documents: (text, ends, is_val) of the first nine tenths and the rest, cut at a line end if possible."""
    at = len(text) * (VAL_EVERY - 1) // VAL_EVERY
    at = text.find("\n", at) + 1 or at
    return [(text[:at], False, False), (text[at:], ends, True)]


def split_documents(texts):
    """Yield (text, ends, is_val), in the order of texts. Long texts that come in pieces are split piece by piece."""
    texts = iter(texts)
    head = list(itertools.islice(texts, VAL_EVERY))
    if len(head) < VAL_EVERY:
        yield from itertools.chain.from_iterable(split_tail(*item) for item in head)
    else:
        for i, (text, ends) in enumerate(itertools.chain(head, texts)):
            yield text, ends, i % VAL_EVERY == VAL_EVERY - 1


def batches(items, max_items=1024, max_chars=2 * PIECE):
    batch, chars = [], 0
    for item in items:
        batch.append(item)
        chars += len(item[0])
        if len(batch) == max_items or chars > max_chars:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def write_dataset(name, texts, tokenizer_name, source, root=Path("data")):
    """Tokenize texts, an iterator of (text, document ends), on all cores, and write the dataset root/name.

    Memory is bounded by a few batches. Everything is written in a folder beside and renamed when it is complete.
    """
    tokenizer = get_tokenizer(tokenizer_name)
    final, partial, old = root / name, root / f".{name}.partial", root / f".{name}.old"
    if final.exists() and not (final / "meta.json").exists():
        raise UsageError(f"{final} exists and was not written by prepare.py: choose another --name")
    if old.exists() and not final.exists():  # an earlier call was killed between the two renames below
        old.rename(final)
    for folder in (partial, old):
        shutil.rmtree(folder, ignore_errors=True)
    partial.mkdir(parents=True)
    train, val, eot = (
        ShardWriter(partial, "train"),
        ShardWriter(partial, "val"),
        np.array([tokenizer.eot_token], np.uint16),
    )
    documents = 0
    try:
        with tqdm(unit=" tokens", unit_scale=True, desc=name, disable=None) as progress:
            for batch in batches(split_documents(texts)):
                ids = tokenizer.encode_ordinary_batch([text for text, _, _ in batch], num_threads=os.cpu_count())
                for tokens, (_, ends, is_val) in zip(ids, batch):
                    writer = val if is_val and val.total < VAL_TOKENS else train
                    writer.add(np.asarray(tokens, dtype=np.uint16))
                    if ends:
                        writer.add(eot)
                    documents += ends
                    progress.update(len(tokens) + ends)
        train.close()
        val.close()
        if not train.total or not val.total:
            raise UsageError(f"too little text in {source}: {train.total} training and {val.total} validation tokens")
        meta = dict(
            tokenizer=tokenizer_name, vocab_size=tokenizer.n_vocab, train_tokens=train.total, val_tokens=val.total,
            documents=documents, source=source,
        )  # fmt: skip
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        if final.exists():
            final.rename(old)
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    print(
        f"{final}: {train.total:,} training and {val.total:,} validation tokens ({tokenizer_name}), "
        f"{documents:,} text{'s' if documents != 1 else ''}"
    )


# -----------------------------------------------------------------------------
# The command line


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line that names the nearest option."""

    def __init__(self, description, **kwargs):
        kwargs.update(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        super().__init__(description=description, **kwargs)

    def error(self, message):
        if message.startswith("unrecognized arguments"):
            unknown = message.split(": ", 1)[1].split("=")[0].split()[0]
            near = difflib.get_close_matches(unknown, self._option_string_actions, n=1)
            message = f"unknown option {unknown}" + (f"; did you mean {near[0]}?" if near else "; see --help")
        raise UsageError(message)


def run(main, name):
    """Run a command line: bad input and a failing disk end it with one line on stderr and status 2."""
    try:
        main()
    except (UsageError, OSError) as e:
        print(f"{name}: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("source", nargs="+", help="stdlib, openwebtext, or files and folders of your own")
    parser.add_argument("--tokenizer", help="byte or gpt2; default gpt2 for openwebtext, byte for the others")
    parser.add_argument("--name", help="the dataset is written to data/NAME; default: the source's own name")
    args = parser.parse_args(argv)

    first = args.source[0]
    name = args.name or Path(first).absolute().name.split(".")[0]
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UsageError(
            f"a dataset's name is of letters, digits, '.', '_' and '-', not {name!r}: choose one with --name"
        )
    if len(args.source) > 1 and {"stdlib", "openwebtext"} & set(args.source):
        raise UsageError("stdlib and openwebtext stand alone: give one source, or files and folders of your own")
    tokenizer, source = args.tokenizer or "byte", " ".join(args.source)
    if first == "stdlib":
        texts = itertools.chain.from_iterable(map(read_source, stdlib_files()))
        source = f"the standard library of Python {sys.version.split()[0]}"
    elif first == "openwebtext":
        texts, tokenizer = read_openwebtext(), args.tokenizer or "gpt2"
    else:
        files = find_files(args.source)
        texts = itertools.chain.from_iterable(read_table(f) if f.name.endswith(TABLE) else read_text(f) for f in files)
    write_dataset(name, texts, tokenizer, source)


if __name__ == "__main__":
    run(main, "prepare.py")

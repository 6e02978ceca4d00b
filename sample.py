"""
Sample text from a checkpoint, at any width of its experts.

    python sample.py                                      # out/demo/ckpt.pt at full width
    python sample.py --width=0.25 --prompt="def main("    # every expert at a quarter of its neurons
    python sample.py --budget=0.5 --gamma=2               # half on average, wider where the router is confident
    python sample.py --compare=1.0,0.5,0.25               # the same prompt and seed at several widths
    python sample.py --checkpoint=out/55m/ckpt.pt --prompt=FILE:prompt.txt --num_samples=3
"""

import codecs
import math
import time

import torch

from model import RouterWidth, UsageError, check_width
from prepare import Parser, get_tokenizer, run
from train import choose_device, load_model, to_inference


def parse_options(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", default="out/demo/ckpt.pt", help="default %(default)s")
    parser.add_argument("--width", type=float, help="width of every expert, in (0, 1]; default 1")
    parser.add_argument(
        "--budget", type=float, help="mean width, in (0, 1], split by the router's confidence token by token"
    )
    parser.add_argument(
        "--gamma", type=float, help="how much confidence counts under --budget; 0: not at all; default 1"
    )
    parser.add_argument("--compare", help="widths to show one after another, for example 1.0,0.5,0.25")
    parser.add_argument("--prompt", default="", help="text to continue, or FILE:path; default: the beginning of a text")
    parser.add_argument("--num_samples", type=int, default=1, help="default 1")
    parser.add_argument("--num_tokens", type=int, default=500, help="tokens to generate; default 500")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token; default 0.8")
    parser.add_argument(
        "--top_k", type=int, default=200, help="sample from the likeliest top_k tokens only; default 200"
    )
    parser.add_argument("--seed", type=int, default=1337, help="the same seed gives the same text; default 1337")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu; default: the first there is")
    o = parser.parse_args(argv)
    if sum(x is not None for x in (o.width, o.budget, o.compare)) > 1:
        raise UsageError("--width, --budget and --compare exclude each other: give one")
    for name, least in (("num_samples", 1), ("num_tokens", 1), ("top_k", 1), ("seed", 0)):
        if getattr(o, name) < least:
            raise UsageError(f"--{name} must be at least {least}, not {getattr(o, name)}")
    if o.gamma is not None and o.budget is None:
        raise UsageError("--gamma says how --budget is split: give --budget too")
    if not 0 <= o.temperature < math.inf:
        raise UsageError(f"--temperature must be a finite number of at least 0, not {o.temperature}")
    return o


def chosen_widths(o):
    """The options -> [(what to print, width or policy), ...]."""
    if o.compare is not None:
        try:
            widths = [float(w) for w in o.compare.split(",")]
        except ValueError:
            raise UsageError(
                f"--compare must be widths with commas between, like 1.0,0.5,0.25, not {o.compare!r}"
            ) from None
        for width in widths:
            check_width(width, "every width of --compare")
        return [(f"width {w:g}", w) for w in widths]
    if o.budget is not None:
        gamma = 1.0 if o.gamma is None else o.gamma
        return [(f"budget {o.budget:g}, gamma {gamma:g}", RouterWidth(o.budget, gamma))]
    width = 1.0 if o.width is None else o.width
    check_width(width, "--width")
    return [(f"width {width:g}", width)]


def read_prompt(prompt):
    if not prompt.startswith("FILE:"):
        return prompt
    try:
        with open(prompt[5:], encoding="utf-8") as f:
            return f.read()
    except UnicodeDecodeError:
        raise UsageError(f"{prompt[5:]} is not UTF-8 text") from None


def main():
    o = parse_options()
    widths = chosen_widths(o)
    prompt = read_prompt(o.prompt)
    model, checkpoint = load_model(o.checkpoint)
    device, dtype, _ = choose_device(o.device, "auto", model.config.n_embd)
    to_inference(model, device, dtype)
    tokenizer = get_tokenizer(checkpoint["tokenizer"])
    if any(width != 1 for _, width in widths) and model.config.n_expert == 1:
        raise UsageError(
            f"{o.checkpoint} is a dense model, without experts to slim: leave out --width, --budget and --compare"
        )
    # a prompt continues a text that has just begun; end-of-text is what separates texts in training
    ids = [tokenizer.eot_token] + tokenizer.encode_ordinary(prompt)
    if len(ids) > model.config.block_size:
        raise UsageError(
            f"the prompt has {len(ids) - 1} tokens, the model's context is {model.config.block_size}: shorten it"
        )
    idx = torch.tensor([ids], device=device)

    for sample in range(o.num_samples):
        for label, width in widths:
            print(f"--- {label}" + (f", sample {sample + 1}" if o.num_samples > 1 else ""))
            print(prompt, end="", flush=True)
            generator = torch.Generator(device).manual_seed(o.seed + sample)
            text = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a token may end inside a character
            model.read_stats()
            started = time.perf_counter()
            stream = model.stream(
                idx, o.num_tokens, temperature=o.temperature, top_k=o.top_k, width=width,
                n_vocab=checkpoint["vocab_size"], generator=generator,
            )  # fmt: skip
            for token in stream:
                print(text.decode(tokenizer.decode_bytes([token.item()])), end="", flush=True)
            seconds = time.perf_counter() - started
            mean_width = model.read_stats()[0]
            ran = "" if mean_width is None else f", mean width {mean_width:.3f}"
            print(f"\n--- {o.num_tokens / seconds:.1f} tokens/s{ran}\n")


if __name__ == "__main__":
    run(main, "sample.py")

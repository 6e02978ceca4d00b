"""
Sample text from a checkpoint, at any width of its experts.

    python sample.py                                      # out/demo/ckpt.pt at full width
    python sample.py --experts=1 --prompt="def main("     # the likeliest expert of each token only
    python sample.py --experts=2,1,0.5                    # the same prompt and seed with two, one, half of one
    python sample.py --width=0.25                         # every expert at a quarter of its neurons
    python sample.py --budget=0.5 --gamma=2               # half on average, wider where the router is confident
    python sample.py --budget=0.5 --calibrated            # half, spent as `bench.py frontier` learned
    python sample.py --checkpoint=out/55m/ckpt.pt --prompt=FILE:prompt.txt --num_samples=3
"""

import codecs
import time
from dataclasses import dataclass

import torch

from bench import fewer_experts, load_calibrated
from model import RouterWidth, Stats, UsageError, check_width
from prepare import get_tokenizer, option, parse, run
from train import choose_device, load_model, to_inference


@dataclass
class SampleConfig:
    checkpoint: str = option("out/demo/ckpt.pt", "a checkpoint of train.py")
    width: str = option("1", "width of every expert, in (0, 1]; several with commas between run one after another")
    experts: str = option(
        "", "instead: how many experts, likeliest first; 1.5 is one and half of another; or several, as above"
    )
    budget: float = option(1.0, "instead: mean width, in (0, 1], split by the router's confidence token by token")
    gamma: float = option(1.0, "how much confidence counts under --budget; 0: not at all", least=0)
    calibrated: bool = option(False, "split --budget as `bench.py frontier` learned it, instead of by --gamma")
    prompt: str = option("", "text to continue, or FILE:path; nothing is the beginning of a text")
    num_samples: int = option(1, "how many texts", least=1)
    num_tokens: int = option(500, "tokens to generate", least=1)
    temperature: float = option(0.8, "0 takes the likeliest token", least=0)
    top_k: int = option(200, "sample from the likeliest top_k tokens only", least=1)
    seed: int = option(1337, "the same seed gives the same text", least=0, most=2**63 - 1)
    device: str = option("auto", "cuda, mps or cpu; auto takes the first there is")


def numbers(name, text):
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise UsageError(f"{name} must be numbers with commas between, like 1,0.5, not {text!r}") from None


def chosen_widths(o, given, config):
    """The options -> {what to print: width or policy}."""
    if len(given & {"width", "experts", "budget"}) > 1:
        raise UsageError("--width, --experts and --budget exclude each other: give one")
    if given & {"gamma", "calibrated"} and "budget" not in given:
        raise UsageError("--gamma and --calibrated say how --budget is split: give --budget too")
    if o.calibrated and "gamma" in given:
        raise UsageError("--calibrated has a gamma of its own for every layer: leave out --gamma")
    if o.calibrated:
        return {f"budget {o.budget:g}, calibrated": load_calibrated(o.checkpoint, o.budget)}
    if "budget" in given:
        return {f"budget {o.budget:g}, gamma {o.gamma:g}": RouterWidth(o.budget, o.gamma)}
    if "experts" in given:
        return {f"experts {n:g}": fewer_experts(n, config) for n in numbers("--experts", o.experts)}
    widths = numbers("--width", o.width)
    for width in widths:
        check_width(width, "--width")
    return {f"width {width:g}": width for width in widths}


def read_prompt(prompt):
    if not prompt.startswith("FILE:"):
        return prompt
    try:
        with open(prompt[5:], encoding="utf-8") as f:
            return f.read()
    except UnicodeDecodeError:
        raise UsageError(f"{prompt[5:]} is not UTF-8 text") from None


def main():
    _, o, given = parse(SampleConfig, __doc__)
    prompt = read_prompt(o.prompt)
    model, checkpoint = load_model(o.checkpoint)
    widths = chosen_widths(o, given, model.config)
    if model.config.n_expert == 1 and set(widths.values()) != {1.0}:
        raise UsageError(f"{o.checkpoint} is a dense model, without experts: leave out --width, --experts and --budget")
    device, dtype, _ = choose_device(o.device, "auto", model.config.n_embd)
    to_inference(model, device, dtype)
    tokenizer = get_tokenizer(checkpoint["tokenizer"])
    # a prompt continues a text that has just begun; end-of-text is what separates texts in training
    ids = [tokenizer.eot_token, *tokenizer.encode_ordinary(prompt)]
    if len(ids) > model.config.block_size:
        raise UsageError(f"the prompt has {len(ids) - 1} tokens, the context {model.config.block_size}: shorten it")
    idx = torch.tensor([ids], device=device)

    for sample in range(o.num_samples):
        for label, width in widths.items():
            print(f"--- {label}" + (f", sample {sample + 1}" if o.num_samples > 1 else ""))
            print(prompt, end="", flush=True)
            generator = torch.Generator(device).manual_seed(o.seed + sample)
            text = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a token may end inside a character
            stats, started = Stats(model.config, device), time.perf_counter()
            for token in model.stream(
                idx, o.num_tokens, temperature=o.temperature, top_k=o.top_k, width=width,
                n_vocab=checkpoint["vocab_size"], generator=generator, stats=stats,
            ):  # fmt: skip
                print(text.decode(tokenizer.decode_bytes([token.item()])), end="", flush=True)
            print(text.decode(b"", final=True), end="")
            speed = o.num_tokens / (time.perf_counter() - started)
            ran = f", mean width {stats.mean_width(stats.used).item():.3f}" if model.config.n_expert > 1 else ""
            print(f"\n--- {speed:.1f} tokens/s{ran}\n")


if __name__ == "__main__":
    run(main, "sample.py")

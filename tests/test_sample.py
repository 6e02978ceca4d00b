import re
from pathlib import Path

import pytest
import torch
from conftest import call

import sample


@pytest.fixture
def text(inside, capsys):
    """A function that samples and returns what was printed, without the speed, and the mean widths that ran."""

    def draw(*args):
        call(sample, "--checkpoint=out/mose/ckpt.pt", "--num_tokens=40", "--prompt=the ", "--device=cpu", *args)
        out = capsys.readouterr().out
        return re.sub(r"[\d.]+ tokens/s", "", out), [float(w) for w in re.findall(r"mean width ([\d.]+)", out)]

    return draw


class TestSample:
    def test_a_seed_gives_the_same_text_at_a_width_and_reports_it(self, text):
        out, widths = text("--width=0.5")
        assert (out, widths) == text("--width=0.5") and widths == [0.5] and out.splitlines()[1].startswith("the ")
        assert text("--seed=1") != text("--seed=2")
        assert text("--budget=0.25", "--gamma=2")[1] == [pytest.approx(0.25, abs=0.025)]

    def test_several_widths_give_what_each_gives_alone(self, text):
        out, widths = text("--width=1.0,0.25", "--num_samples=2")
        assert widths == [1.0, 0.25, 1.0, 0.25]
        bodies = lambda out: re.findall(r"--- width.*?\n(.*?)\n---", out, re.DOTALL)
        one, quarter = (bodies(text(f"--width={w}", "--num_samples=2")[0]) for w in (1, 0.25))
        assert bodies(out) == [one[0], quarter[0], one[1], quarter[1]] and one[0] != one[1]

    def test_a_prompt_can_come_from_a_file_and_fill_the_context(self, text):
        Path("prompt.txt").write_text("x" * 31)
        assert "x" * 31 in text("--prompt=FILE:prompt.txt")[0]

    def test_the_likeliest_tokens_are_the_models_own(self, text):
        model, _ = sample.load_model("out/mose/ckpt.pt")
        ids = torch.tensor([[256, *b"the "]])
        for _ in range(20):
            ids = torch.cat([ids, model(ids, width=0.5)[0][:, -1, :257].argmax(-1, keepdim=True)], 1)
        expected = bytes(ids[0, 1:].tolist()).decode(errors="replace")
        assert expected in text("--width=0.5", "--temperature=0", "--num_tokens=20")[0]

    def test_a_tiny_temperature_is_none(self, text):
        assert text("--temperature=1e-40") == text("--temperature=0")

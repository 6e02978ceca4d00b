# make demo: text, training, loss against compute and samples, in minutes on a CPU
# make test: the tests
# make study: the runs behind the README's numbers, many hours
PYTHON ?= python3
RUN = .venv/bin/python
# OpenMP's threads wait by spinning, which slows them down on a busy machine: let them spin less
export GOMP_SPINCOUNT ?= 1000

.PHONY: demo test study clean

demo: .venv/installed data/stdlib/meta.json
	$(RUN) train.py demo $(if $(wildcard out/demo/last.pt),--resume)
	$(RUN) bench.py frontier out/demo/ckpt.pt --budgets 0.5 0.25 --train_batches=25 --eval_tokens=65536
	$(RUN) sample.py --prompt="def main(" --width 1 0.5 0.25 --max_new_tokens=200

test: .venv/installed
	$(RUN) -m pytest -q

study: .venv/installed data/stdlib/meta.json
	$(RUN) study/run.py
	$(RUN) study/report.py

data/stdlib/meta.json: | .venv/installed
	$(RUN) prepare.py stdlib

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11)' 2>/dev/null || \
		(echo "$(PYTHON) is not Python 3.11 or later: choose another one, for example: make PYTHON=python3.12"; exit 1)
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@

# data/ and out/ stay
clean:
	rm -rf .venv .pytest_cache .ruff_cache __pycache__ */__pycache__

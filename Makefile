# make demo: data, training, the quality-compute frontier and samples, on a CPU in minutes
# make test: the proof that it is correct
PYTHON ?= python3
RUN = .venv/bin/python

.PHONY: demo test clean

demo: .venv/installed data/stdlib/meta.json
	$(RUN) train.py demo $(if $(wildcard out/demo/last.pt),--resume)
	$(RUN) bench.py frontier out/demo/ckpt.pt
	$(RUN) sample.py --prompt=class --seed=1 --num_tokens=300 --compare=1.0,0.5,0.25

test: .venv/installed
	$(RUN) -m pytest -q -W ignore::DeprecationWarning test_model.py

data/stdlib/meta.json: | .venv/installed
	$(RUN) prepare.py stdlib

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	touch $@

# keeps data/ and out/: they are yours
clean:
	rm -rf .venv __pycache__ .pytest_cache

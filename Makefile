# make demo: data, training, the quality-compute frontier and samples, on a CPU in minutes
# make test: the proof that it is correct (make test-long: what takes longer)
# make study: the numbers of the README, hours of training
PYTHON ?= python3
RUN = .venv/bin/python

.PHONY: demo test test-long study clean

demo: .venv/installed data/stdlib/meta.json
	$(RUN) train.py demo $(if $(wildcard out/demo/last.pt),--resume)
	$(RUN) bench.py frontier out/demo/ckpt.pt
	$(RUN) sample.py --prompt=class --seed=1 --num_tokens=300 --compare=1.0,0.5,0.25

test: .venv/installed
	$(RUN) -m pytest -q -W ignore::DeprecationWarning test_model.py

test-long: .venv/installed
	LONG=1 $(RUN) -m pytest -q -W ignore::DeprecationWarning test_model.py

study: .venv/installed data/stdlib/meta.json
	$(RUN) bench.py study

data/stdlib/meta.json: | .venv/installed
	$(RUN) prepare.py stdlib

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	touch $@

# keeps data/ and out/: they are yours
clean:
	rm -rf .venv __pycache__ .pytest_cache

# make demo: data, training, the quality-compute frontier and samples, on a CPU in minutes
# make test: the proof that it is correct (make test-long: what takes longer, too)
# make study, make study-adapt: the numbers of study/, hours of training
PYTHON ?= python3
RUN = .venv/bin/python
# OpenMP's threads spin at barriers, also while the one they wait for is not running because others use its core. So let
# them spin less. The demo's tokens/s on two cores, idle / beside two busy processes: 13,500 / 2,600 by default, 12,100 /
# 5,400 so, 9,200 / 7,000 with OMP_WAIT_POLICY=passive
export GOMP_SPINCOUNT ?= 1000
# the interpreter behind PYTHON, also from inside a virtual environment; nothing if it is too old
INTERPRETER := $(shell $(PYTHON) -c 'import sys; print(sys.base_prefix, sys.version.split()[0]) if sys.version_info >= (3, 11) else 0' 2>/dev/null)
PIP = $(RUN) -m pip install -q --disable-pip-version-check

.PHONY: demo test test-long study study-adapt clean anew

demo: .venv/installed data/stdlib/meta.json
	$(RUN) train.py demo $(if $(wildcard out/demo/last.pt),--resume)
	$(RUN) bench.py frontier out/demo/ckpt.pt
	$(RUN) sample.py --prompt=class --seed=1 --num_tokens=300 --experts=2,1,0.5

test: .venv/installed
	$(RUN) -m pytest -q

test-long: .venv/extras
	$(RUN) -m pytest -q -m ''

study: .venv/installed data/stdlib/meta.json
	$(RUN) study/study.py

study-adapt: .venv/extras data/stdlib/meta.json
	$(RUN) study/adapt.py

data/stdlib/meta.json: | .venv/installed
	$(RUN) prepare.py stdlib

.venv/installed: requirements.txt $(if $(filter-out $(INTERPRETER),$(shell cat .venv/installed 2>/dev/null)),anew)
	@$(if $(INTERPRETER),,$(error $(PYTHON) is not Python 3.11 or later: name one, as in make PYTHON=python3.12))
	@$(if $(filter anew,$^),rm -rf .venv)
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	@echo $(INTERPRETER) > $@

# for adapt.py and bench.py tasks
.venv/extras: requirements-extras.txt .venv/installed
	$(PIP) -r requirements-extras.txt
	@touch $@

# keeps data/ and out/: they are yours
clean:
	rm -rf .venv __pycache__ .pytest_cache

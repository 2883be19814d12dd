# `make demo` runs the demo on real data, and `make test` runs the tests. Both create .venv first.
PYTHON ?= python3
BIN := .venv/bin
DEMO := build/demo
RECIPES := $(addprefix examples/demo/, task_arithmetic.yaml uniform.yaml phatgoose.yaml)

# Tests run in up to four processes, and each takes the next test when it is idle.
PARALLEL := -n logical --maxprocesses=4 --dist worksteal

PEERS := $(patsubst tests/peers/%.txt, build/peers/%/.installed, $(wildcard tests/peers/*.txt))

.PHONY: demo demo-controls demo-skills demo-near demo-learned suite-encoder suite-vision routers-encoder routers-smollm2 skills-encoder suggest-judge peers test test-all attack docs experts clean

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/.installed
	$(BIN)/hub pull smollm2-135m-instruct $$(cat examples/demo/experts.txt)
	$(BIN)/hub tasks import bigbench $$(sed 's/^bigbench://' examples/demo/unseen.txt)
	mkdir -p $(DEMO)
	$(BIN)/hub eval $(RECIPES) --tasks @examples/demo/unseen.txt \
		--split all --limit 64 --out $(DEMO)/results.json --plots $(DEMO)

# Add the controls to the demo's table: the accuracy that a choice among the experts could reach.
# The command reuses the demo's scores.
demo-controls: demo
	$(BIN)/hub eval $(RECIPES) --tasks @examples/demo/unseen.txt \
		--split all --limit 64 --controls --out $(DEMO)/controls.json

# Evaluate the composed models on the test split of the training tasks. The scores show how much of
# the experts' own skills the models keep.
demo-skills: .venv/.installed
	$(BIN)/hub pull smollm2-135m-instruct $$(cat examples/demo/experts.txt)
	$(BIN)/hub tasks import bigbench $$(sed 's/^bigbench://' examples/demo/trained.txt)
	mkdir -p $(DEMO)
	$(BIN)/hub eval $(RECIPES) --tasks @examples/demo/trained.txt \
		--split test --limit 64 --out $(DEMO)/skills.json

# Evaluate merges that learn their coefficients, on the training tasks of six experts.
demo-learned: .venv/.installed
	$(BIN)/hub pull smollm2-135m-instruct $$(cat examples/demo/experts.txt)
	$(BIN)/hub tasks import bigbench $$(sed 's/^bigbench://' examples/learned/tasks.txt)
	mkdir -p $(DEMO)
	$(BIN)/hub eval examples/learned/*.yaml --tasks @examples/learned/tasks.txt \
		--split test --limit 64 --out $(DEMO)/learned.json

# Evaluate the recipes on tasks that are similar to the training tasks: the same kind of task from
# another source or in another language.
demo-near: .venv/.installed
	$(BIN)/hub pull smollm2-135m-instruct $$(cat examples/demo/experts.txt)
	$(BIN)/hub tasks import bigbench $$(sed 's/^bigbench://' examples/demo/near.txt)
	mkdir -p $(DEMO)
	$(BIN)/hub eval $(RECIPES) --tasks @examples/demo/near.txt \
		--split all --limit 64 --out $(DEMO)/near.json

# Evaluate eight merges on real tasks with three seeds, for full fine-tunes and LoRAs. The command
# takes many hours. An interrupted run resumes where it stopped.
suite-encoder: .venv/.installed
	$(BIN)/hub pull all-minilm-l6-v2
	$(BIN)/hub tasks import bigbench $$(sed -n 's/^  - bigbench://p' examples/suite/encoder.yaml)
	$(BIN)/python examples/suite/run.py examples/suite/encoder.yaml
	$(BIN)/python examples/suite/table.py

suite-vision: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[suite]'
	$(BIN)/python examples/suite/vision.py build/suite/vit
	$(BIN)/python examples/suite/run.py examples/suite/vision.yaml
	$(BIN)/python examples/suite/table.py

# Evaluate seven routers on tasks that no expert was trained on, with three seeds. The command takes
# many hours. An interrupted run resumes where it stopped.
routers-encoder: .venv/.installed
	$(BIN)/hub pull all-minilm-l6-v2
	$(BIN)/hub tasks import bigbench $$(sed -n 's/^ *- bigbench:\([^ ]*\).*/\1/p' examples/routers/encoder.yaml)
	$(BIN)/python examples/routers/run.py examples/routers/encoder.yaml
	$(BIN)/python examples/suite/table.py

# Evaluate the same on the language model, with the starter experts. The command takes some hours.
routers-smollm2: .venv/.installed
	$(BIN)/hub pull smollm2-135m-instruct all-minilm-l6-v2 $$(cat examples/demo/experts.txt)
	$(BIN)/hub tasks import bigbench $$(sed -n 's/^ *- bigbench:\([^ ]*\).*/\1/p' examples/routers/smollm2.yaml)
	$(BIN)/python examples/routers/run.py examples/routers/smollm2.yaml
	$(BIN)/python examples/suite/table.py

# Evaluate inventories of skills that are adapted from few examples, with three seeds. The command
# takes some hours. An interrupted run resumes where it stopped.
skills-encoder: .venv/.installed
	$(BIN)/hub pull all-minilm-l6-v2
	$(BIN)/hub tasks import bigbench $$(sed -n 's/^ *- bigbench://p' examples/skills/encoder.yaml)
	$(BIN)/python examples/skills/run.py examples/skills/encoder.yaml
	$(BIN)/python examples/suite/table.py

# Measure how well `hub suggest` ranks experts on real tasks. The ranking is compared with the score
# of each expert alone. The command takes hours and reuses stored scores.
suggest-judge: .venv/.installed
	$(BIN)/hub pull all-minilm-l6-v2 $$(sed -n 's/^- name: \(.*-minilm\)$$/\1/p' registry.yaml)
	$(BIN)/hub pull smollm2-135m-instruct $$(cat examples/demo/experts.txt)
	$(BIN)/hub tasks import bigbench $$(sed 's/^bigbench://' examples/selection/tasks.txt)
	$(BIN)/python examples/selection/judge.py all-minilm-l6-v2 --out examples/selection/encoder.json
	$(BIN)/python examples/selection/judge.py smollm2-135m-instruct --limit 32 \
		--tasks examples/selection/first.txt --out examples/selection/smollm2.json

# Install third-party programs that the tests run against, each in its own environment.
peers: $(PEERS)

build/peers/%/.installed: tests/peers/%.txt | .venv/.installed
	rm -rf $(@D)
	$(PYTHON) -m venv --without-pip $(@D)
	$(BIN)/python -m pip --python $(@D) install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

# One thread of torch in each process: more of them would compete for the same cores.
test test-all attack: export OMP_NUM_THREADS = 1

# If a peer cannot be installed, its tests are skipped. With HUB_PEERS=required, this is an error.
test: .venv/.installed
	$(MAKE) peers || test "$$HUB_PEERS" != required
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest $(PARALLEL) -m "not slow"

test-all: test
	$(BIN)/pytest $(PARALLEL) -m slow

# Run every attack among the tests against the built wheel, in an environment without the checkout,
# and print how many there were.
ATTACK := build/attack
attack: .venv/.installed
	rm -rf $(ATTACK) build/lib
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir $(ATTACK) .
	$(PYTHON) -m venv --without-pip $(ATTACK)/venv
	$(BIN)/python -m pip --python $(ATTACK)/venv install --quiet --disable-pip-version-check \
		--no-deps --no-index $(ATTACK)/*.whl
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> "$$($(ATTACK)/venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/tests.pth"
	$(ATTACK)/venv/bin/python -m pytest -q $(PARALLEL) -m attack

docs: .venv/.installed
	$(BIN)/python docs/generate.py

experts: .venv/.installed
	$(BIN)/hub tasks import bigbench $$(cat examples/experts/tasks.txt)
	$(BIN)/python examples/experts/build.py

clean:
	rm -rf .venv build *.egg-info

# train and test make the environment first, as far as they need it; nothing is done when nothing changed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
ARGS ?=
# Processes that the tests are shared out over: one more than two cores, for a fifth of the time a test waits for others.
JOBS ?= 3
VENV := .venv
BIN := $(VENV)/bin
# Written by recipes/install.py, which says what it does: what training needs, and what tests, linters and docs need, too.
RUNTIME := $(VENV)/.runtime-stamp
STAMP := $(VENV)/.setup-stamp
SETUP_INPUTS := setup.py pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/csrc/*)

# Idle OpenMP threads that spin slow every other process of the machine down.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0
export TOKENIZERS_PARALLELISM ?= false
# Whatever is set outside: else each of the many processes that tests start compiles every module anew, and each of the
# suite's rewrites every assert (7 s of a core).
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup train corl test test-triton test-versions test-oldest test-gpu-image test-newest test-faults soak \
	test-multinode test-processors coverage mutants fuzz check pyright package docs bench gpu clean

setup: $(STAMP)

$(RUNTIME): $(SETUP_INPUTS)
	@$(PYTHON) recipes/install.py --venv $(VENV)

$(STAMP): $(SETUP_INPUTS)
	@$(PYTHON) recipes/install.py --venv $(VENV) --dev

train: $(RUNTIME)
	$(BIN)/python recipes/sync_r1.py $(ARGS)

corl: $(RUNTIME)
	$(BIN)/python recipes/corl.py $(ARGS)

# What CUDA builds of torch 2.10 to 2.15 bring; the tests compile for the first and the last. Before the rules: make
# expands a rule's prerequisites where it reads them.
TRITONS := 3.6.0 3.7.1 3.8.0 3.9.0
# Triton has wheels for Linux alone.
TRITONS_IN_CI := $(if $(filter Linux,$(shell uname -s)),$(firstword $(TRITONS)) $(lastword $(TRITONS)))

test: setup $(TRITONS_IN_CI:%=build/triton/%)
	$(BIN)/python -m pytest tests -n $(JOBS) --dist worksteal $(ARGS)

build/triton/%: | setup
	@$(PYTHON) recipes/install.py --venv $(VENV) --triton $* $@

# Every launch at the sizes of real models, on every Triton, for sm_80, sm_90 and sm_100: 17 minutes beside
# other work, 5 where most is compiled already. A fault on one Triton leaves the others; what does not compile on one
# leaves no page.
test-triton: $(TRITONS:%=build/triton/%)
	rm -f $(TRITONS:%=build/triton/%.json)
	for version in $(TRITONS); do \
		PYTHONPATH=build/triton/$$version:. TRITON_CACHE_DIR=build/triton-cache $(BIN)/python -W ignore \
			-m syncr1.kernels.triton_ops.aot --processes $(JOBS) --json build/triton/$$version.json > /dev/null; done
	$(BIN)/python -m syncr1.kernels.triton_ops.aot --merge $(TRITONS:%=build/triton/%.json) > build/triton/page.md; \
		code=$$?; test ! -s build/triton/page.md || cp build/triton/page.md bench/results/triton.md; exit $$code

# What other versions of torch, transformers and Triton can change: values of the ops on every backend and in Triton's
# interpreter, compiled kernels, policies, rollout and its replay, checkpoints, adapters, Liger, TRL, data, and runs from
# end to end under DeepSpeed. For each set of versions in constraints/, in an environment of its own: on Linux 3 GB to
# download, 6 to 8 GB on disk.
ACROSS_VERSIONS := policies forward learn/test_learner.py methods/test_preflight.py methods/test_run.py \
	show/test_display.py repo/test_versions.py \
	$(patsubst %,kernels/%.py,test_token_loss test_sample test_linear test_linear_logp test_shared_prefix_attention \
		test_prefix_decode_attention test_launches test_attention_provider test_native_trunk test_ops test_all_ops \
		test_triton_interpreted test_liger test_trl) \
	$(patsubst %,rollout/%.py,test_rollout test_guided_replay test_emu3_rollout test_stepping test_drawing_turn \
		test_few_rows) \
	$(patsubst %,checkpoints/%.py,test_checkpoint test_hub test_safetensors_stream) \
	$(patsubst %,data/%.py,test_cells test_table test_samples test_pictures) \
	$(patsubst %,rewards/%.py,test_clip test_captioner test_perceptual) \
	corl/test_corl_run.py::test_the_whole_recipe_from_a_users_checkpoints_and_photographs \
	corl/test_corl_run.py::test_emu3_goes_through_the_same_recipe
SET ?= oldest
# The one that its file names; pyenv has commands for those that it does not run at the moment, too.
SET_PYTHON ?= $(or $(shell version=$$(sed -n 's/^\# python //p' constraints/$(SET).txt); \
	for python in python$$version ~/.pyenv/versions/$$version.*/bin/python$$version; do \
	$$python -c '' 2> /dev/null && echo $$python && break; done),$(PYTHON))
test-versions: build/versions/$(SET)/.setup-stamp
	TRITON_CACHE_DIR=build/versions/$(SET)/triton-cache build/versions/$(SET)/bin/python -m pytest \
		$(addprefix tests/,$(ACROSS_VERSIONS)) \
		"tests/kernels/test_triton_aot.py::test_the_hot_path_compiles[$$(sed -n 's/^triton==//p' constraints/$(SET).txt)]" \
		-q -n $(JOBS) --dist worksteal $(ARGS)

test-oldest test-gpu-image test-newest: test-%:
	$(MAKE) test-versions SET=$(subst -,_,$*)

build/versions/%/.setup-stamp: constraints/%.txt $(SETUP_INPUTS)
	@$(SET_PYTHON) recipes/install.py --versions $*

# What takes faults by the dozen: ranks killed, stopped and failed, runs cut off anywhere, nodes lost.
test-faults: setup
	$(BIN)/python -m pytest tests/campaigns -n $(JOBS) --dist worksteal $(ARGS)

# Three long nights, under ZeRO 0, 2 and 3: 3,000 steps each, undisturbed and with ranks killed every minute, full disks
# and slow rewards; the same weights at the end, or it fails. Half an hour each where nothing else runs. Then 30 ranks
# killed one after the other under each: how long until the next step.
soak: setup
	for stage in 0 2 3; do $(BIN)/python tests/support/soak.py build/soak/night_$$stage --zero_stage $$stage $(ARGS) || exit 1; done
	for stage in 0 2 3; do $(BIN)/python tests/support/soak.py build/soak/kills_$$stage --zero_stage $$stage \
		--steps 1000000 --kills 30 --kinds killed --every 20 || exit 1; done

# Four machines made of network namespaces, one of which is killed; needs root and iproute2.
test-multinode: setup
	SYNCR1_FOUR_NODES=1 $(BIN)/python -m pytest tests/campaigns/test_multinode.py -q $(ARGS)

# What computes, as on another processor: PyTorch's and our own narrowest instructions, and two threads. `make test` is
# the fourth case, this processor's widest on one thread.
NUMERIC := $(addprefix tests/,kernels learn rollout policies forward)
NARROW := ATEN_CPU_CAPABILITY=default SYNCR1_ISA=generic
test-processors: setup
	$(NARROW) $(BIN)/python -m pytest $(NUMERIC) -q -n $(JOBS) --dist worksteal $(ARGS)
	$(NARROW) SYNCR1_TEST_THREADS=2 $(BIN)/python -m pytest $(NUMERIC) -q -n $(JOBS) --dist worksteal $(ARGS)
	SYNCR1_TEST_THREADS=2 $(BIN)/python -m pytest $(NUMERIC) -q -n $(JOBS) --dist worksteal $(ARGS)

# The share of lines that the suite runs when nothing is made already, and, for `mutants`, which test runs which line.
coverage: setup
	rm -rf build/made
	COVERAGE_FILE=build/coverage $(BIN)/python -m pytest tests -q -n $(JOBS) --dist worksteal \
		--cov=kernels --cov=engine --cov-context=test --cov-report= $(ARGS)
	@for folder in kernels engine; do echo "$$folder: $$(COVERAGE_FILE=build/coverage $(BIN)/coverage report \
		--include="$$folder/*" --format=total) % of its lines"; done

build/coverage:
	$(MAKE) coverage

# Breaks 30 lines at random, one at a time, in a copy: how many does the suite notice? Up to ten minutes a line.
mutants: setup build/coverage
	$(BIN)/python tests/campaigns/mutants.py --coverage_file build/coverage --json build/mutants.json $(ARGS)

# 1,000,000 inputs, new ones every time: about ten minutes of one core. Then every case of the grids of which `make test`
# takes the pairs, and what it runs smaller: some minutes more.
GRIDS := $(patsubst %,tests/kernels/%.py,test_token_loss test_liger test_liger_shapes test_ops test_ops_around)
fuzz: setup
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest tests/repo/test_fuzz.py tests/repo/test_fuzz_files.py -q -rP -n $(JOBS)
	SYNCR1_NIGHTLY=1 $(BIN)/python -m pytest $(GRIDS) -q -n $(JOBS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy syncr1/kernels syncr1/engine $(wildcard recipes/*.py)
	$(BIN)/python -m pytest tests -m "not slow" -q -n $(JOBS) --dist worksteal --durations=10 --durations-min=2

# Every import as editors resolve it, through the links syncr1/{kernels,engine}.
pyright: setup
	@test -x build/pyright/bin/pyright || ($(PYTHON) -m venv build/pyright && \
		build/pyright/bin/pip install --quiet --disable-pip-version-check "pyright[nodejs]")
	build/pyright/bin/pyright

# The wheel, built, installed into an empty folder and used from there.
package: setup
	$(BIN)/python -m pytest tests/campaigns/test_wheel.py -q $(ARGS)

# The docs site, without a network, into build/site; pages link to each other, or it fails. For the search in it:
# python -m http.server -d build/site
docs: setup
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# On a machine with a GPU, with or without a network: checks, benchmarks, tests and profiles in nine minutes, one page
# under $(OUT). Nothing is installed: .venv serves where there is one, else the machine's python3, or PYTHON=...
# ARGS="--wheels FOLDER" brings what the machine lacks; see bench/gpu.py.
OUT ?= bench/results
GPU_PYTHON = $(if $(filter command environment,$(origin PYTHON)),$(PYTHON),$(if $(wildcard $(BIN)/python),$(BIN)/python,python3))
gpu:
	PYTHONPATH=. $(GPU_PYTHON) bench/gpu.py --out $(OUT) $(ARGS)

# All providers of an op side by side, then one table with the goals; bench/results/<device>.json holds it.
bench: setup
	$(BIN)/python -m pytest tests/bench -q
	$(BIN)/python -m pytest bench -q --benchmark-columns=median,iqr,rounds --benchmark-sort=name $(ARGS)
	$(BIN)/python bench/table.py
	$(BIN)/python bench/rollout.py
	$(BIN)/python bench/step.py
	$(BIN)/python bench/rewards.py
	$(BIN)/python bench/checkpoint.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find kernels engine recipes bench tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
	rm -f kernels/*.so $(RUNTIME) $(STAMP)

# make setup | hle | tau2 | test | test-long | check | bench | chaos | soak. Another interpreter: make setup PYTHON=python3.12.
# On a GPU machine: make setup EXTRA=gpu.
PYTHON ?= python3
VENV ?= .venv
EXTRA ?= cpu
BIN := $(VENV)/bin
BENCHES := analysis baseline chat concurrency engine retriever scheduling sharing tau2

.PHONY: setup hle tau2 test test-long check bench chaos soak clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$(EXTRA),dev]'
	@# Beside a CPU build of torch, a CUDA build of these breaks `import ray.serve.llm`; nothing here needs them.
	@$(BIN)/python -W ignore -c 'import torchvision, torchaudio' 2>/dev/null || \
		$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@# A cluster that `serve run` or a job starts asks for Ray's token; `ray job submit` sends one only in this mode.
	@echo 'import os; os.environ.setdefault("RAY_AUTH_MODE", "token")' > \
		$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/toolorch_ray_auth.pth
	@test -s $(HOME)/.ray/auth_token || $(BIN)/ray get-auth-token --generate > /dev/null
	@touch $@

hle: setup
	$(BIN)/python jobs/hle.py

tau2: setup
	$(BIN)/python jobs/tau2.py

# Two processes: what starts Ray waits a lot (tests/conftest.py says who gets what).
test: setup
	$(BIN)/pytest -n 2

test-long: setup
	$(BIN)/pytest -m long

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# benchmarks.retriever_cuda is left out: it needs a GPU.
bench: setup
	@failed=0; for name in $(BENCHES); do $(BIN)/python -m benchmarks.$$name || failed=1; done; exit $$failed

# 200 seeded faults, 75 minutes at most; one that is interrupted goes on. SEEDS=17..17 AGAIN=--again plays one again.
SEEDS ?= 1..54
chaos: setup
	$(BIN)/python -m benchmarks.chaos --seeds $(SEEDS) $(AGAIN)

# 100,000 tasks with faults: 15 minutes or so on two idle cores. SOAK="--out FOLDER" keeps the pictures and the run.
soak: setup
	$(BIN)/python -m benchmarks.soak $(SOAK)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build *.egg-info

# Two commands do everything: `make pretrain` and `make test`. Both set up .venv when it is missing
# or older than pyproject.toml.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# PyTorch's own index of CPU builds. Elsewhere the Linux default brings gigabytes of CUDA packages.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH := torch>=2.11,<2.14

.PHONY: pretrain test ladder soak lint clean

pretrain: $(VENV)/installed
	$(BIN)/accelerate launch --quiet --config_file accelerate_configs/single_gpu.yaml pipeline/pretrain.py

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -m "not slow and not gpu and not browser" -n logical --maxprocesses 8 --dist loadfile

# Fourteen small runs, and the law that they follow; what is finished is not run again.
ladder: $(VENV)/installed
	for recipe in recipes/ladder/*.yaml; do \
		$(BIN)/accelerate launch --quiet --config_file accelerate_configs/single_gpu.yaml \
			pipeline/pretrain.py --config $$recipe || exit; \
	done
	$(BIN)/python pipeline/plan.py --fit outputs/ladder/*/metrics.json \
		--leave_out outputs/ladder/4x128_10/metrics.json \
		--config recipes/quickstart.yaml --picture outputs/ladder/law.png

soak: $(VENV)/installed-test
	$(BIN)/python tests/soak.py --kills 1000

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) outputs

$(VENV)/torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; run: make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
		echo "no GPU here: looking for a CPU build of PyTorch"; \
		$(BIN)/python -m pip install --quiet --no-deps --retries 0 --timeout 15 \
			--index-url $(TORCH_CPU_INDEX) "$(TORCH)" 2>/dev/null \
		|| echo "none at $(TORCH_CPU_INDEX); taking the one that pip finds"; \
	fi
	@touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[fast]'
	@touch $@

$(VENV)/installed-test: $(VENV)/torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@ $(VENV)/installed

# Two commands on a fresh machine: `make demo` and `make test`. Each does all of its own set-up.
# TORCH_INDEX: where pip finds another PyTorch than its default one, such as the build without CUDA for a laptop.
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --disable-pip-version-check

.PHONY: demo test test-slow test-all lint clean

$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV); on Linux PyTorch brings CUDA, 5 GB; docs/install.md has a smaller one"
	$(if $(TORCH_INDEX),$(PIP) --index-url $(TORCH_INDEX) $$(grep '^torch==' requirements.txt))
	$(PIP) -r requirements.txt
	$(PIP) --no-deps --no-build-isolation --editable .  # so that `python -m wan.doctor` and the like run from any folder
	touch $@

# The small trained checkpoint (examples/shapes) in four steps: a video from a prompt, then one from a prompt and a picture.
demo: $(VENV)/.installed
	$(BIN)/python generate.py --task t2v-A14B --ckpt_dir examples/shapes/Wan2.2-T2V-A14B --lora_dir examples/shapes/lora-t2v \
		--size 64*64 --frame_num 9 --base_seed 1 --prompt "a yellow circle moves right on a blue background" \
		--save_dir demo --preview --overwrite
	$(BIN)/python -m generate --task i2v-A14B --ckpt_dir examples/shapes/Wan2.2-I2V-A14B --lora_dir examples/shapes/lora-i2v \
		--size 64*64 --frame_num 9 --base_seed 1 --prompt "a purple triangle moves up on a green background" \
		--image examples/shapes/first_frame.png --save_dir demo --preview --overwrite
	@echo; echo "two videos of 64x64 pixels and, as pictures, all of their frames:"
	@ls demo/*.mp4 demo/*.png

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Those that take long: processes killed, torchrun, a browser, thousands of damaged files.
test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not gpu and not gpu_rehearsal"

test-all: test test-slow

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What was made here, but for the videos in outputs: those may have taken days.
clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

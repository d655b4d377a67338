# Everything a user or a contributor runs. `make` alone lists it.
#
# There is one build profile, release: the C++ half of torch-sys takes minutes to compile, and a
# second profile (or other RUSTFLAGS) would compile it again.

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup build demo clean-demo test torture check oracle peers bench bench-lengths \
	bench-peers bench-overlap bench-save cuda-check gpu-bundle docs

CARGO_FLAGS := --release --locked
have = $(shell command -v $(1) 2>/dev/null)

help: ## this list
	@awk -F ': .*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

setup: ## what a build needs: Debian packages and libtorch (CUDA=1: for a GPU machine)
	@launch/scripts/setup.sh

build: setup ## the binary, target/release/oxitron
	cargo build $(CARGO_FLAGS)

demo: build ## train a model on real text, 4k to 32k, and export it; results in runs/demo
	@launch/scripts/demo.sh

clean-demo: ## remove runs/demo
	rm -rf runs/demo

# Tests run a binary in which they can make things go wrong (the feature `faults`).
test: setup ## all tests (cargo-nextest where installed)
ifneq ($(call have,cargo-nextest),)
	cargo nextest run $(CARGO_FLAGS) --workspace --features oxitron/faults
	cargo test $(CARGO_FLAGS) --workspace --features oxitron/faults --doc
else
	cargo test $(CARGO_FLAGS) --workspace --features oxitron/faults
endif
	tests/setup_test.sh
	tests/demo_test.sh
	tests/docs_test.sh
	tests/gpu_bundle_test.sh
	python3 -B tests/bench/outcome_test.py
	python3 -B tests/cuda/check_test.py

torture: setup ## a run killed 200 times, mostly while it saves, and 500 changes of a checkpoint's bytes
	OXITRON_FLIPS=500 cargo test $(CARGO_FLAGS) --workspace --features oxitron/faults \
		--lib -- --nocapture every_changed_byte_is_detected_by_a_resume
	OXITRON_KILLS=200 cargo test $(CARGO_FLAGS) --workspace --features oxitron/faults \
		--test torture -- --nocapture

check: setup ## formatting, lints, documentation links, licences
	cargo fmt --all --check
	cargo clippy $(CARGO_FLAGS) --workspace --all-targets --features oxitron/faults -- -D warnings
	cargo clippy $(CARGO_FLAGS) -p oxitron -p oxitron-trainer --no-default-features -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc $(CARGO_FLAGS) --workspace --no-deps
ifneq ($(call have,cargo-deny),)
	cargo deny --locked check licenses bans sources
else
	@echo 'check: cargo-deny is not installed: licences, bans and sources were not checked'
endif
	@launch/scripts/check-tree.sh

# The second line compiles as a run does. Tests of the kernels on emulated threads are in `make test`.
cuda-check: setup ## kernels for GPUs compile without one, within limits of registers and spills
	python3 -B tests/cuda/check.py
	nvrtc=$$(python3 -B tests/cuda/nvrtc.py) && OXITRON_NVRTC=$$nvrtc cargo test $(CARGO_FLAGS) \
		--workspace --features oxitron/faults --lib -- cuda::compiler

gpu-bundle: setup ## a folder that tests and measures all of it on a GPU machine with PyTorch alone
	python3 -B tests/gpu/make_bundle.py

oracle: build ## golden files made again and exports loaded by transformers (5 GB the first time)
	folder=$$(tests/oracle/setup.sh) && "$$folder/venv/bin/python" tests/oracle/run_all.py && \
		"$$folder/venv/bin/python" tests/oracle/exports.py

peers: ## PyTorch for bench-peers (5 GB, unless make oracle has brought it)
	@tests/peers/setup.sh

bench: build ## where a step spends its time, and every kernel beside its floor
	python3 -B tests/bench/kernels.py
	python3 -B tests/bench/breakdown.py

bench-lengths: build ## speed and memory of samples of 4k to 32k tokens
	python3 -B tests/bench/lengths.py

bench-peers: build peers ## a step beside eager and compiled PyTorch, two ranks beside DDP and FSDP2
	folder=$$(tests/peers/setup.sh) && python="$$folder/venv/bin/python -B" && \
		{ $$python tests/peers/steps.py; steps=$$?; } && \
		$$python tests/peers/compare.py --scaling && exit $$steps

bench-overlap: build ## how much communication hides behind backward, over a slow link (as root)
	python3 -B tests/bench/overlap.py

bench-save: build ## how long a save holds up the steps, beside one copy of the same bytes
	python3 -B tests/bench/saving.py

docs: setup ## the book, docs/book (mdBook), and the API pages, target/doc
	cargo doc $(CARGO_FLAGS) --workspace --no-deps
ifneq ($(call have,mdbook),)
	mdbook build docs
else
	@echo 'docs: mdbook is not installed (cargo install mdbook): read docs/src/SUMMARY.md as it is'
endif

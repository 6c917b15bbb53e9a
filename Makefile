# Isthmus: the commands of the project. `make demo` and `make test` are the two that matter.
SHELL := /bin/bash
CARGO ?= cargo
PYTHON ?= python3
RELEASE := target/release

.PHONY: demo test lint bench train setup build photos fuzz clean help

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

setup: tools ## fetch libtorch, backbones and demo photos (pinned, cached), import the backbones
	@if [ -n "$$LIBTORCH" ]; then echo "setup: using LIBTORCH=$$LIBTORCH"; else $(PYTHON) setup/fetch.py libtorch; fi
	@$(PYTHON) setup/fetch.py weights demo-photos
	@$(CARGO) build --release -p isthmus-trainer
	@[ -f data/backbones/labels.json ] || $(RELEASE)/trainer import

.PHONY: tools
tools:
	@for t in $(CARGO) $(PYTHON) c++; do command -v $$t >/dev/null || { \
	  echo "setup: '$$t' was not found. Needed: Rust (rustup.rs), a C++ compiler, Python 3 with pip." >&2; exit 1; }; done

build: setup ## build everything in release mode
	@$(CARGO) build --release --workspace

photos: setup ## fetch the training and evaluation photos (needs Debian's apt-get) and cut the evaluation crops
	@[ -f data/eval/held-out/.complete ] || { $(RELEASE)/trainer fetch && touch data/eval/held-out/.complete; }

# the demo's own photos need no Debian packages
data/eval/demo/labels.json: | setup
	@$(RELEASE)/trainer fetch --offline --only-demo

demo: build data/eval/demo/labels.json ## 20 ImageNet photos through the real client and server, then the comparison with WebP and JPEG
	@[ -f data/eval/held-out/.complete ] || ! command -v apt-get >/dev/null || $(MAKE) --no-print-directory photos
	@$(PYTHON) setup/demo.py

test: build photos ## all tests
	$(CARGO) test --release --workspace

lint: ## formatting, clippy, dependency policy
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --workspace --all-targets -- -D warnings
	$(PYTHON) -m py_compile setup/fetch.py setup/demo.py bench/*.py
	@if command -v cargo-deny >/dev/null; then $(CARGO) deny check; else echo "lint: cargo-deny is not installed (cargo install cargo-deny); skipped"; fi

bench: build photos ## encode time, server throughput, rate (docs/benchmarks says how to read them)
	$(PYTHON) bench/encode.py
	$(PYTHON) bench/server.py
	$(RELEASE)/trainer evaluate data/eval/held-out data/eval/labelled data/eval/demo

train: photos ## train the default bundle anew (hours), then export it
	$(RELEASE)/trainer distill --recipe crates/trainer/recipes/patch-stem.toml --run runs/patch-stem --resume
	$(RELEASE)/trainer distill --recipe crates/trainer/recipes/patch-stem-stage2.toml --run runs/patch-stem-stage2 --warm-start runs/patch-stem --resume
	$(RELEASE)/trainer export --run runs/patch-stem-stage2 --out runs/bundle

fuzz: ## run every fuzz target for a minute (needs nightly and cargo-fuzz)
	cd fuzz && for t in $$($(CARGO) fuzz list); do $(CARGO) +nightly fuzz run $$t -- -max_total_time=60 || exit 1; done

clean: ## remove what was built (downloads stay in the cache)
	$(CARGO) clean
	rm -rf data/eval data/backbones data/train.pack data/evaluation third_party

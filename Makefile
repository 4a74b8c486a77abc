# Lazurite's tasks. `make demo` shows it, `make test` checks everything; both install what they need first.

SHELL := /bin/bash
export PATH := $(PATH):$(HOME)/.cargo/bin
CARGO := nice cargo

.PHONY: help demo test build lint bench clean-demo

help:
	@echo 'make demo        pull and run one image eagerly and lazily, and compare (needs root or sudo)'
	@echo 'make test        lint, then every test; the system tests run as root only'
	@echo 'make build       target/release/lazurite'
	@echo 'make lint        formatting and clippy'
	@echo 'make bench       measure beside peers; writes bench/results.md (needs root or sudo)'
	@echo 'make clean-demo  remove the cached images of tests and demonstration'

demo:
	scripts/setup.sh build demo
	$(CARGO) build --locked --release
	scripts/demo.sh target/release/lazurite

test:
	scripts/setup.sh build test
	$(MAKE) --no-print-directory lint
	if [ "$$(id -u)" = 0 ]; then tests/images/build.sh busybox torture python && tests/support/podman5.sh; fi
	$(CARGO) test --locked --workspace

bench:
	scripts/setup.sh build test bench
	$(CARGO) build --locked --release
	scripts/bench.sh target/release/lazurite

build:
	scripts/setup.sh build
	$(CARGO) build --locked --release

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings

clean-demo:
	rm -rf "$${LAZURITE_CACHE:-$${XDG_CACHE_HOME:-$$HOME/.cache}/lazurite}"

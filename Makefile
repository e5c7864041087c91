# The project's two commands, and what they are made of.
#   make demo    build, serve the demonstration model on 127.0.0.1:11434, show a streamed answer
#   make test    every test
.PHONY: demo build test bench docs

demo:
	@scripts/demo

build:
	cargo build --release

test:
	cargo test --workspace
	tests/run --debug

bench: build
	tests/bench/run

docs:
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps

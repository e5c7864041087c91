# The project's two commands, and what they are made of.
#   make demo    build, serve the demonstration model on 127.0.0.1:11434, show a streamed answer
#   make test    every test
# More:
#   make bench         the demonstration model beside mlx_lm.server
#   make bench-proxy   what swapd adds to a request
#   make soak          ten minutes of everything at once
#   make memory        an hour's worth of random traffic in ten minutes: does a worker's memory stay flat?
#   make fuzz          every fuzz target for three minutes (needs cargo-fuzz)
.PHONY: demo build test bench bench-proxy soak memory fuzz docs

demo:
	@scripts/demo

build:
	cargo build --release

test:
	cargo test --workspace
	tests/run --debug

bench: build
	tests/bench/run

bench-proxy:
	cargo build --profile dist -p swapd --bins --examples
	target/dist/examples/proxybench

soak:
	SOAK_SECONDS=600 cargo test -p swapd --test soak -- --nocapture

memory: build
	tests/bench/run memory

fuzz:
	scripts/fuzz 180

docs:
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps

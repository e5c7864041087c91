//! Pure core of the proxy: step(state, event) -> effects.

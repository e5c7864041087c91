//! The YAML model registry: text to checked, resolved registry; the difference of two registries.

//! Every tuning knob once: flag, YAML key, default, range, reason.

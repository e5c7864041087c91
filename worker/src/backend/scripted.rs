//! A backend that plays back a script, for tests.

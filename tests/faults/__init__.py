"""Test what happens when processes die, stop and are crowded; with real processes."""

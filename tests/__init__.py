"""Test persipubsub; a package, so that tests and their processes import each other's helpers."""

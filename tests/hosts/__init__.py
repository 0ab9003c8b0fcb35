"""Tests that run real hosts. `make test-hosts` runs them; each installs the host that it needs."""

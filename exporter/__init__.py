"""PyTorch → bundle: runs on a workstation, needs the `export` extra."""

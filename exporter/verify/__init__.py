"""The proof of an export: graphs and weights compared with PyTorch."""

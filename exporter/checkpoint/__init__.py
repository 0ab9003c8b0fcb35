"""A Hugging Face checkpoint on disk: configs, shards, side files, and models without weights."""

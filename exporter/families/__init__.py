"""The model families that can be exported, one file each."""

"""The bundle on disk: its manifest and its files, checked before anything is used."""

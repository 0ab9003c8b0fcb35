"""Folders that look like a checkpoint of transformers and are something else: what each is, and the way out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resprune.exporter.checkpoint.files import read_json
from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.table import FAMILIES

ADAPTER = "adapter_config.json"


def check_adapter(root: Path) -> None:
    """`ResPruneError` for a folder with a PEFT adapter, alone or beside the weights that it changes."""
    if not (root / ADAPTER).is_file():
        return
    base = read_json(root / ADAPTER).get("base_model_name_or_path")
    of = f" of {base:.100}" if isinstance(base, str) and base else ""
    raise ResPruneError(
        f"{root} holds an adapter{of} ({ADAPTER}), which is not in the model's weights; merge it into them with "
        "peft's merge_and_unload, save that with save_pretrained, and give its directory"
    )


def check_layout(root: Path, config: Mapping[str, Any]) -> None:
    """`ResPruneError` for a config of research code, or of a model that transformers has no code for."""
    kind = str(config.get("model_type"))
    said = [row for row in FAMILIES.values() if row.research and _has(config, row.research)]
    if said:
        row = max(said, key=lambda row: len(row.research))
        raise ResPruneError(
            f"{root} is in the layout of {row.title}'s research code ({kind:.80}), which transformers does not read; "
            f"take a converted checkpoint such as {next(iter(row.aliases.values()))}, or convert yours with "
            f"convert_{row.name}_weights_to_hf.py of transformers 4"
        )
    if "auto_map" in config and kind not in FAMILIES:
        raise ResPruneError(
            f"{root} holds a model of type {kind:.80} with code of its own (auto_map), which is never run; take the "
            "checkpoint that was converted for transformers, whose name often ends in -hf"
        )


def _has(config: Mapping[str, Any], research: Mapping[str, str]) -> bool:
    return all(key in config and re.fullmatch(pattern, str(config[key])) for key, pattern in research.items())

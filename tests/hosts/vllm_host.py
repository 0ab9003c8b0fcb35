"""vLLM on the CPU, and checkpoints in the layout that it knows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.hosts.host import HERE, Running, free_port, python_of

MAX_MODEL_LEN = 512
SETTINGS = {
    "PYTHONPATH": str(HERE / "vllm_path"),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "2",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


def vllm(
    checkpoint: Path, log: Path, *options: str, dtype: str = "float32", context: int = MAX_MODEL_LEN
) -> Running:
    """A server that answers with the checkpoint, in the precision of the bundles of these tests."""
    port = free_port()
    command = [str(python_of("vllm")), "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "model"]
    command += [
        "--enable-mm-embeds",
        "--dtype",
        dtype,
        "--max-model-len",
        str(context),
        "--enforce-eager",
    ]
    return Running([*command, *options], SETTINGS, port, "/health", log)


def published(checkpoint: Path, out: Path) -> Path:
    """A copy whose vision tower goes by the names that LLaVA is published with: vLLM does not know transformers 5's."""
    shutil.copytree(checkpoint, out)
    index = out / "model.safetensors.index.json"
    for shard in out.glob("*.safetensors"):
        save_file(
            {_published(name): value for name, value in load_file(shard).items()}, shard, {"format": "pt"}
        )
    if index.exists():
        table = json.loads(index.read_text())
        table["weight_map"] = {_published(name): file for name, file in table["weight_map"].items()}
        index.write_text(json.dumps(table))
    return out


def _published(name: str) -> str:
    before, tower, after = name.partition("vision_tower.")
    known = not tower or after.startswith("vision_model.")
    return name if known else f"{before}{tower}vision_model.{after}"

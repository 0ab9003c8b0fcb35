"""Compile for every architecture and assemble the PTX, in a process that does not interpret: `… compile_all OUT`."""

import json
import re
import subprocess
import sys
from pathlib import Path

from triton import knobs

from resprune.graphs.kernels.compiled import CAPABILITIES, compile_residual_select

VARIANTS = [(capability, "float32") for capability in CAPABILITIES] + [
    (87, "float16"),
    (90, "float16"),
    (90, "bfloat16"),
]


def assemble(ptx: str, out: Path) -> str:
    """What ptxas says of the PTX: registers, spills, memory. It fails on PTX that is not valid."""
    source = out / "kernel.ptx"
    source.write_text(ptx)
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    command = [knobs.nvidia.ptxas.path, "-v", f"-arch={target}", str(source), "-o", str(out / "kernel.cubin")]
    return subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True).stderr


def main(out: Path) -> None:
    records = []
    for capability, dtype in VARIANTS:
        compiled = compile_residual_select(capability, hidden_size=4096, k=64, dtype=dtype)
        records.append(
            {
                "capability": capability,
                "dtype": dtype,
                "name": compiled.name,
                "ptx": compiled.ptx,
                "ttgir": compiled.ttgir,
                "elf": compiled.cubin[:4].hex(),
                "threads": compiled.threads,
                "shared_memory": compiled.shared_memory,
                "ptxas": assemble(compiled.ptx, out),
            }
        )
    (out / "compiled.json").write_text(json.dumps(records))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""The kernel compiled for each architecture, without a GPU."""

import json
import re

import pytest

from resprune.graphs.kernels.compiled import (
    CAPABILITIES,
    SHARED_MEMORY,
    compile_residual_select,
    own_parameters,
)
from tests.graphs.kernels.compile_all import VARIANTS

PARAMETERS = ["u64", "u64", "u64", "u32", "u32", "u32", "u64", "u64"]
"""visual, gain, token_mask, num_tokens, first_step, last_step, pick_order, scratch."""


@pytest.fixture(scope="session")
def compiled(without_interpreter):
    records = json.loads((without_interpreter("compile_all") / "compiled.json").read_text())
    return {(record["capability"], record["dtype"]): record for record in records}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"sm_{v[0]}-{v[1]}")
def test_each_architecture(compiled, variant):
    kernel = compiled[variant]
    assert kernel["name"] == "residual_select"
    assert kernel["elf"] == b"\x7fELF".hex()
    assert re.search(r"^\.version 8\.7$", kernel["ptx"], re.MULTILINE)
    assert re.search(rf"^\.target sm_{variant[0]}a?$", kernel["ptx"], re.MULTILINE)
    entry = re.search(r"\.visible \.entry residual_select\((.*?)\)", kernel["ptx"], re.DOTALL)[1]
    assert re.findall(r"\.param \.(\w+)", entry) == PARAMETERS
    assert f".reqntid {kernel['threads']}" in kernel["ptx"]
    assert kernel["shared_memory"] <= SHARED_MEMORY


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"sm_{v[0]}-{v[1]}")
def test_nothing_spills_and_two_programs_fit_on_a_multiprocessor(compiled, variant):
    """Two, so that two engines that run beside each other do not wait for each other's programs for ever."""
    kernel = compiled[variant]
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in kernel["ptxas"]
    registers = int(re.search(r"Used (\d+) registers", kernel["ptxas"])[1])
    assert 2 * kernel["threads"] * (-(-registers // 8) * 8) <= 65_536
    assert (
        2 * (kernel["shared_memory"] + 1024) <= 100 * 1024
    )  # of the smallest, 8.6, 8.9 and 12.0; 1 kB is CUDA's


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"sm_{v[0]}-{v[1]}")
def test_slices_are_added_outside_of_the_tensor_cores(compiled, variant):
    """Every product starts at zero, and its sum is added to what the loop carries."""
    ttgir = compiled[variant]["ttgir"]
    dots = re.findall(r"(?:tt\.dot|ttng\.warp_group_dot) %\w+(?:#\d)?, %\w+(?:#\d)?, (%\w+)", ttgir)
    assert dots[0].startswith("%cst"), "the first product of a slice has something to add to"
    assert not any(accumulator.startswith("%arg") for accumulator in dots), (
        "the loop's sum enters a tensor core"
    )
    assert re.search(r"arith\.addf %arg\d+, %product\w*(?:#\d)? : tensor<64x64xf32, #mma>", ttgir)
    if variant[1] == "float32":
        assert len(dots) >= 3, "float32 takes three products of TF32 parts"


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"sm_{v[0]}-{v[1]}")
def test_waiting_is_done_with_acquire_and_release(compiled, variant):
    ptx = compiled[variant]["ptx"]
    assert "ld.global.gpu.acquire.b32" in ptx
    assert "atom.global.gpu.acq_rel.add.u32" in ptx
    assert "atom.global.gpu.release.exch.b32" in ptx


def test_every_architecture_is_compiled():
    assert {capability for capability, _ in VARIANTS} == set(CAPABILITIES)


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="float32, float16, bfloat16"):
        compile_residual_select(90, hidden_size=8, k=2, dtype="int8")


PTX = """.visible .entry f(
\t.param .u64 f_param_0,
\t.param .u32 f_param_1,
\t.param .u64 f_param_2
)
{
\tld.param.b64 %rd1, [f_param_0];
}
"""


def test_parameters_of_tritons_launcher_are_taken_away():
    short = own_parameters(PTX, 2)
    assert "f_param_1\n)" in short
    assert "f_param_2" not in short
    assert own_parameters(PTX, 3) == PTX
    with pytest.raises(RuntimeError, match="another form"):
        own_parameters(PTX.replace("[f_param_0]", "[f_param_2]"), 2)
    with pytest.raises(RuntimeError, match="another form"):
        own_parameters(PTX, 4)

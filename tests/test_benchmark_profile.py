"""What `python -m benchmarks.profile` derives from a compiled kernel."""

import pytest

from benchmarks import profile
from vlmo_fast import build, extensions

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0020*/              @P0  FFMA R4, R5, R6, R7 ;
        /*0030*/             @!UP0 MUFU.EX2 R4, R4 ;
        /*0040*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0050*/                   STL [R1], R4 ;
        /*0060*/                   NOP ;
        /*0070*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [
        (128, 0, 4, (4, "registers")),  # 65536 / (128 x 32 x 4)
        (129, 0, 4, (3, "registers")),  # handed out in 256s: 4352 a warp
        (32, 60 * 1024, 4, (3, "shared memory")),  # 228 / 61
        (32, 0, 8, (8, "registers")),
        (24, 0, 8, (8, "warps")),
        (16, 0, 1, (32, "blocks")),
    ],
)
def test_occupancy(registers, shared, warps, expected):
    blocks, bound = profile.occupancy(90, registers, shared, warps)
    assert blocks == expected[0]
    if expected[1] != "registers" or blocks != 8:  # 32 registers and 8 warps meet two limits at once
        assert bound == expected[1]


def test_instructions_are_counted_by_class():
    mix, total = profile.instruction_mix(SASS)
    assert total == 7
    assert mix == {
        kind: pytest.approx(1 / 7)
        for kind in (
            *("tensor cores", "exp, rsqrt and the like", "float arithmetic", "global memory", "local memory"),
            *("control", "integers and moves"),
        )
    }


def test_the_command_names_what_it_knows(capsys):
    assert profile.main([]) == 0
    assert capsys.readouterr().out.split() == list(profile.OPS)
    with pytest.raises(SystemExit):
        profile.main(["nonsense"])
    assert "got nonsense" in capsys.readouterr().err


def test_the_roofline_is_the_larger_of_two_times():
    item = profile.Profile("k", 90, 4, 100, 0, 0, 4, "registers", 0.25, {"control": 1.0}, 1, "p", 2e-6, 1e-6)
    assert "not below 2 µs (arithmetic)" in profile.show(item)


def test_a_library_that_is_not_built_is_named_with_its_command(capsys, monkeypatch):
    monkeypatch.setattr(extensions, "is_built", lambda name: False)
    assert profile.main(["contrastive_loss", "--capability", "90"]) == 1
    assert extensions.build_command("cuda") in capsys.readouterr().err


def test_a_generation_without_code_is_named(capsys, monkeypatch):
    monkeypatch.setattr(profile, "from_library", lambda capability: {})
    assert profile.main(["contrastive_loss", "--capability", "100"]) == 0
    assert capsys.readouterr().out == "contrastive_loss: no code for sm_100\n"


@pytest.mark.slow
@pytest.mark.parametrize("op", list(profile.OPS))
def test_the_kernels_of_an_op(op, require_tool):
    """The jobs of the kernels' own tests, and the CUDA library, built for sm_90."""
    if op == "contrastive_loss" and not extensions.is_built("cuda"):
        require_tool("nvcc")
        build.build("cuda", jobs=1)
    profiles = profile.profile(op, 90, 790e12, 4.3e12)
    assert any(item.mix.get("tensor cores", 0) > 0 for item in profiles)
    for item in profiles:
        assert item.spills == 0
        assert item.blocks >= 1
        assert item.memory_seconds > 0

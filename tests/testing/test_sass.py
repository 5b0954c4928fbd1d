"""Instructions between the tiles of a product, on assembly small enough to count by hand."""

from __future__ import annotations

from cosup_fast.testing.sass import instruction_counts

KERNEL = """
kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_tile:
        /*0010*/                   S2R R2, SR_TID.X ;
.L_x_loop:
        /*0020*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24 ;
        /*0030*/              @!P1 BRA `(.L_x_wait) ;
.L_x_on:
        /*0040*/               @P0 BRA `(.L_x_loop) ;
        /*0050*/                   FMUL R24, R24, R3 ;
        /*0060*/                   BRA.U !UP2, `(.L_x_whole) ;
        /*0070*/                   FSEL R24, R24, -INF , !P3 ;
        /*0080*/                   FSEL R25, R25, -INF , !P3 ;
.L_x_whole:
        /*0090*/               @P4 FADD R24, R24, R4 ;
        /*00a0*/                   MUFU.EX2 R24, R24 ;
        /*00b0*/               @P5 BRA `(.L_x_tile) ;
        /*00c0*/                   NOP ;
        /*00d0*/                   NOP ;
        /*00e0*/                   EXIT ;
.L_x_wait:
        /*00f0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR6], R3 ;
        /*0100*/                   BRA `(.L_x_on) ;
"""


def test_the_shortest_way_to_the_next_tile_is_counted():
    """FMUL, BRA, FADD, MUFU, BRA, S2R: neither what only edges need nor what waits nor what ends the kernel."""
    renamed = KERNEL
    for number, name in enumerate(("tile", "loop", "on", "whole", "wait")):
        renamed = renamed.replace(f".L_x_{name}", f".L_x_{number}")
    assert instruction_counts(renamed, r"\bHGMMA\b") == (17, 6)
    assert instruction_counts(renamed, r"\bHMMA\b") == (17, None)


def test_without_a_next_tile_it_ends_with_the_kernel():
    lines = (
        "/*0010*/ HMMA.16816.F32 R4, R4 ;",
        "/*0020*/ @P0 BRA `(.L_x_0) ;",
        "/*0030*/ FADD R1, R1, R2 ;",
        "/*0040*/ EXIT ;",
    )
    text = "\n".join([".L_x_0:", *(f"        {line}" for line in lines)])
    assert instruction_counts(text, r"\bHMMA\b") == (4, 1)

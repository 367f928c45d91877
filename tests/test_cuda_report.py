"""How the report counts instructions, on a loop written by hand."""

from __future__ import annotations

import json

import pytest

from benchmarks import cuda_report, roofline
from benchmarks.cuda_report import Instruction, Kernel, read_instruction

SASS = """
        /*0000*/                   S2R R0, SR_TID.X ;                      /* 0x0000000000007919 */
        /*0010*/              @!P0 BRA 0x40 ;                              /* 0x0000000000007919 */
        /*0020*/                   LDGSTS.E.BYPASS.128 [R4], [R2.64] ;     /* 0x0000000000007919 */
        /*0030*/              @!P1 BRA 0x20 ;                              /* 0x0000000000007919 */
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;   /* 0x0000000000007919 */
        /*0050*/               @P1 BRA P0, 0x90 ;                          /* 0x0000000000007919 */
        /*0060*/                   FADD R1, R1, R1 ;                       /* 0x0000000000007919 */
        /*0070*/                   FADD R1, R1, R1 ;                       /* 0x0000000000007919 */
        /*0080*/                   BRA 0xa0 ;                              /* 0x0000000000007919 */
        /*0090*/                   FADD R1, R1, R1 ;                       /* 0x0000000000007919 */
        /*00a0*/               @P2 BRA 0x10 ;                              /* 0x0000000000007919 */
        /*00b0*/                   EXIT ;                                  /* 0x0000000000007919 */
"""


def read(text: str) -> list[Instruction]:
    return [x for line in text.splitlines() if (x := read_instruction(line))]


def test_uniform_branches_make_loops() -> None:
    sass = read(SASS.replace("@P2 BRA 0x10", "    BRA.U UP0, 0x10"))
    assert cuda_report.loops(sass) == [(2, 3), (1, 10)]
    assert sass[10].predicated


def test_instructions_and_loops_are_read() -> None:
    sass = read(SASS)
    assert [x.operation for x in sass][:3] == ["S2R", "BRA", "LDGSTS.E.BYPASS.128"]
    assert [(x.target, x.predicated) for x in sass if x.operation == "BRA"] == [
        (0x40, True),
        (0x20, True),
        (0x90, True),
        (0xA0, False),
        (0x10, True),
    ]
    assert cuda_report.loops(sass) == [(2, 3), (1, 10)]


def test_the_shorter_alternative_counts_and_copies_repeat() -> None:
    kernel = Kernel("contrast_forward_mma<BFloat16, 128, rule>", 80, 100, 0, 0, sass=read(SASS))
    # A thread copies 64 x 256 bytes / 128 threads, 8 times 16, and has 32 pairs. Once around the loop are 7
    # instructions, 10 less the three of the longer alternative; the copy's two run 7 more times.
    assert cuda_report.usual_length(kernel.sass, 1, 10) == 7
    ((what, count, most),) = kernel.counted()
    assert (what, count, most) == (cuda_report.PAIRS, (7 + 7 * 2) / 32, 60)


def test_the_loop_with_most_ffma_is_the_one_that_counts() -> None:
    lines = [f"        /*{16 * i:04x}*/      FFMA R1, R2, R3, R1 ;" for i in range(8)]
    lines += ["        /*0080*/      @P0 BRA 0x0 ;", "        /*0090*/      FFMA R1, R2, R3, R1 ;"]
    lines += ["        /*00a0*/      @P0 BRA 0x90 ;"]
    kernel = Kernel("gaussian_contrast_rows<float, float, 8>", 80, 100, 0, 0, sass=read("\n".join(lines)))
    assert kernel.counted() == [(cuda_report.EIGHTS, 9, 30)]


def test_predictions_are_those_of_the_counts() -> None:
    """The committed table follows from the committed counts; twice the pairs take twice the time."""
    counts = json.loads(roofline.COUNTS.read_text(encoding="utf-8"))["kernels"]
    committed = (roofline.COUNTS.parent / "cuda_roofline.md").read_text(encoding="utf-8")
    assert roofline.table(counts) + "\n" == committed
    gpu = roofline.GPUS[0]
    small, large = (roofline.gaussian(counts, n, 4, gpu)["issue"] for n in (8 * 4 * 108 * 4, 8 * 4 * 108 * 8))
    assert large == pytest.approx(2 * small)
    assert roofline.disparity(8192, gpu, backward=False)["memory"] == pytest.approx(4 * 8192**2 / 2.04e12)

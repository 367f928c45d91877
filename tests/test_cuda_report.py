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


def listing(*lines: str) -> list[Instruction]:
    """One instruction a line, at 0x0, 0x10 and so on."""
    return read("\n".join(f"        /*{16 * i:04x}*/      {line} ;" for i, line in enumerate(lines)))


# A loop over pairs (0x30 to 0xd0). In it are a loop over channels, what remains of them, and a call.
PAIR_LOOP = (
    "S2R R0, SR_TID.X",
    "@P0 EXIT",
    "MOV R1, R2",
    "@!P1 BRA 0x70",
    "LDG.E R4, [R2.64]",
    "LDG.E R5, [R2.64]",
    "@P2 BRA 0x40",
    "@!P0 BRA 0xa0",  # nothing is left
    "LDG.E R4, [R2.64]",
    "LDG.E R5, [R2.64]",
    "@!P0 BRA 0xc0",
    "CALL.REL.NOINC 0xf0",
    "STG.E [R6.64], R9",
    "@!P0 BRA 0x30",
    "EXIT",
    "RET.REL.NODEC R8 0x0",
)


def test_the_fewest_instructions_meet_all_that_are_needed() -> None:
    sass = listing(*PAIR_LOOP)
    last = len(sass) - 1
    assert cuda_report.fewest(sass, 0, last) == 3 + 1 + 1 + 1 + 3
    assert cuda_report.fewest(sass, 0, last, ["LDG", "LDG", "STG"]) == 3 + 1 + 4 + 3
    assert cuda_report.fewest(sass, 0, last, ["LDG"] * 4) == 3 + 4 + 4 + 3
    assert cuda_report.fewest(sass, 3, 13, ["LDG"] * 2) == 1 + 4 + 2
    for never in (["STG", "LDG"], ["LDG"] * 5, ["CALL"]):  # in this order, this often, behind the call
        with pytest.raises(ValueError, match="no way from 0x0 to 0xf0"):
            cuda_report.fewest(sass, 0, last, never)


def test_a_call_with_a_predicate_leaves_the_loop() -> None:
    sass = listing("MOV R1, R2", "FADD R1, R1, R1", "@P0 CALL.REL.NOINC 0x40", "BRA 0x10", "EXIT")
    assert cuda_report.loops(sass) == [(1, 3)]
    assert cuda_report.fewest(sass, 1, 3) == 3
    assert cuda_report.fewest(sass, 0, 4) == 4


def test_a_disparity_counts_its_loop_over_rows() -> None:
    general = ["LDG.E R4, [R2.64]", "LDG.E R5, [R2.64]", "@P2 BRA 0x0", "STG.E [R6.64], R9", "@P0 BRA 0x0"]
    rows = ["LDG.E R4, [R2.64]", "FADD R1, R1, R1", "STG.E [R6.64], R9"] * 2
    sass = listing(*general, *rows, "@!P0 BRA 0x50", "EXIT")
    kernel = Kernel("semantic_disparity_forward<float>", 80, 29, 0, 0, sass=sass)
    assert kernel.counted() == [(cuda_report.ENTRIES, 7 / 2, 22)]


def test_a_term_of_a_gradient_has_two_loads() -> None:
    sass = listing("LDG.E R4, [R2.64]", *["LDG.E R4, [R2.64]", "FADD R1, R1, R1"] * 4, "@!P0 BRA 0x10", "EXIT")
    kernel = Kernel("semantic_disparity_backward<float>", 80, 39, 0, 0, sass=sass)
    assert kernel.counted() == [(cuda_report.TERMS, 9 / 2, 27)]


def test_a_pixel_counts_its_two_loops_over_classes_and_the_rest() -> None:
    load, exponential = ["LDG.E R4, [R2.64]"], ["MUFU.EX2 R4, R4"]
    sass = listing(
        *[*load, "@!P5 BRA 0x50", *load, *exponential, "@P0 BRA 0x20"],  # 0x00: four classes at once, in the sources
        *[*(load + exponential) * 3, "MUFU.RCP R4, R4", *load],  # 0x50: three at the end, and the patch
        *[*load * 8, *exponential * 2, "@P0 CALL.REL.NOINC 0x190", "BRA 0xd0"],  # 0xd0: sums over two classes at once
        "MOV R1, R2",  # 0x190
        *[*load * 4, *exponential, "@!P3 BRA 0x210", "FADD R1, R1, R1", "STG.E [R6.64], R9"],  # 0x1a0: stores
        *["@P0 CALL.REL.NOINC 0x240", "BRA 0x1a0", "EXIT"],
    )
    kernel = Kernel("patch_statistics_backward<float, apart>", 80, 96, 0, 0, sass=sass)
    counted = {what: count for what, count, _ in kernel.counted()}
    assert counted == {cuda_report.CLASSES: 12 / 2 + 10, cuda_report.PIXEL: 2 + 6 + 2 + 1 + 1}


def test_a_count_that_cannot_be_made_names_its_kernel() -> None:
    kernel = Kernel("patch_statistics_forward<float, 4, 4>", 90, 96, 0, 0, sass=listing("EXIT"))
    with pytest.raises(ValueError, match="sm_90 patch_statistics_forward<float, 4, 4>, instructions a logit: "):
        kernel.counted()


@pytest.mark.parametrize("way", ["forward", "coefficients"])
def test_a_patch_counts_what_is_not_in_the_loop_over_pixels(way: str) -> None:
    shuffles, stores, branch = ["SHFL.BFLY PT, R2, R1, 0x1"], ["STG.E [R6.64], R9"], "@P0 BRA {:#x}"
    lines = ["S2R R0, SR_TID.X", "MOV R1, R2", "LDG.E.128 R4, [R2.64]", "FADD R1, R1, R1", "@P0 BRA 0x20"]
    for k in range(4 + (way == "forward")):  # only the first lane stores
        lines += shuffles * (10 if k < 4 else 5)
        numbers = (["LDG.E R4, [R2.64]"] if way == "coefficients" else []) + stores * (2 if k < 4 else 1)
        lines += [branch.format(16 * (len(lines) + 1 + len(numbers))), *numbers]
    kernel = Kernel(f"patch_statistics_{way}<float, 4, 4>", 80, 56, 0, 0, sass=listing(*lines, "EXIT"))
    counted = {what: count for what, count, _ in kernel.counted()}
    assert counted == {cuda_report.LOGITS: 3 / 4, cuda_report.PATCH: len(lines) - 3 + 1}


def test_predictions_are_those_of_the_counts() -> None:
    """The committed table follows from the committed counts; twice the pairs take twice the time."""
    counts = json.loads(roofline.COUNTS.read_text(encoding="utf-8"))["kernels"]
    committed = (roofline.COUNTS.parent / "cuda_roofline.md").read_text(encoding="utf-8")
    assert roofline.table(counts) + "\n" == committed
    gpu = roofline.GPUS[0]
    small, large = (roofline.gaussian(counts, n, 4, gpu)["issue"] for n in (8 * 4 * 108 * 4, 8 * 4 * 108 * 8))
    assert large == pytest.approx(2 * small)


def test_a_prediction_counts_every_instruction_and_every_kernel() -> None:
    counts = json.loads(roofline.COUNTS.read_text(encoding="utf-8"))["kernels"]
    gpu = roofline.GPUS[0]
    # Each multiprocessor gets the same number of blocks, and has warps enough.
    n = 108 * 128
    forward = roofline.disparity(counts, n, gpu, backward=False)
    each = counts["semantic_disparity_forward<float>"][cuda_report.ENTRIES]
    assert forward["issue"] == pytest.approx(n**2 * each / (128 * gpu.cycles))
    assert forward["memory"] == pytest.approx(4 * n**2 / 2.04e12)
    more = dict(counts)
    for kernel in ("patch_statistics_backward<float, apart>", "patch_statistics_coefficients<float, 4, 4>"):
        for what in more[kernel]:
            if what == "registers":
                continue
            more[kernel] = {**counts[kernel], what: counts[kernel][what] + 100}
            slow, fast = (roofline.statistics(c, 108, 512, gpu, backward=True) for c in (more, counts))
            assert slow["issue"] > fast["issue"]
            assert slow["memory"] == fast["memory"]
            more[kernel] = counts[kernel]


@pytest.mark.parametrize("backward", [False, True])
def test_few_rows_share_their_columns(backward: bool) -> None:
    """64 blocks become 192. They take as long as 216, which an A100 runs at once."""
    counts = json.loads(roofline.COUNTS.read_text(encoding="utf-8"))["kernels"]
    few, full = (roofline.tiles(counts, n, roofline.GPUS[0], backward=backward) for n in (64 * 64, 64 * 216))
    pairs = (64 / 216) ** 2
    for resource in ("issue", "shared memory", "exponentials"):
        assert few[resource] == pytest.approx(full[resource] * pairs * 216 / 192)
    # Without parts, 109 blocks take as long as the 216 that run at once.
    more, most = (roofline.tiles(counts, 64 * n, roofline.GPUS[0], backward=backward) for n in (109, 216))
    assert more["shared memory"] / 109 == pytest.approx(most["shared memory"] / 216)

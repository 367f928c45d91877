"""The benchmarks measure what they claim to measure, and README has their results."""

from __future__ import annotations

import json
import math
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.benchmark.utils.timer import timer

pytest.importorskip("psutil")
pytest.importorskip("matplotlib")

from pglcl.config import TrainConfig

from benchmarks import gaussian, limits, pages, pairs, peers, runner, scaling, segmentation
from benchmarks.__main__ import recorded
from pglcl_ext import gaussian_contrast_loss


def allocate(mebibytes: int, seconds: float = 0.0) -> runner.Calls:
    def touch() -> None:
        bytes_ = torch.ones(mebibytes * 2**20, dtype=torch.uint8)
        assert bytes_[-1] == 1
        end = timer() + seconds
        while timer() < end:
            pass

    return {"some": {"forward": touch, "forward+backward": touch}}


def test_limits_are_shares_of_the_larger_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product has 2 N^2 D operations. If the anchors are the keys, the forward pass has half a product, both two."""
    monkeypatch.setattr(limits, "SQUARE", 64)
    monkeypatch.setattr(limits, "ROUNDS", 1000)
    monkeypatch.setattr(limits, "IMAGES", (((1, 2, 32, 32), 8, 8),))
    results, table = limits.run(threads=1, sizes=(64,))
    work = {
        (row["keys"], row["passes"]): row["operations"]
        for row in results
        if row.get("dtype") == "bfloat16" and "N" in row
    }
    product = 2 * 64 * 64 * 128
    assert work == {
        (False, "forward"): product / 2,
        (False, "forward+backward"): 2 * product,
        (True, "forward"): product,
        (True, "forward+backward"): 3 * product,
    }
    for row in results:  # as if 1 us each; the registers' loop at 2000 GFLOP/s, torch.mm at 1000
        rate = {"torch.mm": 1e12, "multiply-adds in registers": 2e12}.get(row.get("contender", ""))
        row["seconds"] = [row["operations"] / rate if rate else 1e-6]
    text = limits.table(results)
    assert "| float32, anchors = keys | 0.001 (0.001-0.001) | 524 (26 %) | 1.00 |" in text
    assert "GFLOP/s: torch.mm 1000, multiply-adds in registers 2000." in text
    assert "| 1x2x32x32, patch 8, stride 8, float16 |" in table


def test_compare_takes_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    samples = runner.compare(calls, repetitions=3)
    assert {name: len(s) for name, s in samples.items()} == {"a": 3, "b": 3}
    turns = "".join(x for i, x in enumerate(order) if i == 0 or x != order[i - 1])
    assert turns == "abababab"  # the warm-up, and one turn per repetition


def test_compare_takes_fewer_samples_if_time_is_short() -> None:
    calls = allocate(1, seconds=0.05)["some"]
    assert len(runner.compare(calls, repetitions=9, seconds=0.3)["forward"]) in (2, 3)


def test_a_long_call_has_no_warm_up_but_that_of_timer() -> None:
    called: list[str] = []
    calls = {"long": lambda: (called.append("long"), time.sleep(0.2)), "short": lambda: called.append("short")}
    samples = runner.compare(calls, repetitions=2, long=0.1)
    assert {name: len(s) for name, s in samples.items()} == {"long": 2, "short": 2}
    assert called.count("long") == 2 * 3
    assert called.count("short") > 2 * 3


@pytest.mark.slow  # it waits for processes that torch starts
def test_measure_finds_memory_and_what_runs_out_of_it() -> None:
    rows = runner.measure(
        allocate, {"mebibytes": 100, "seconds": 0.05}, ["some"], threads=1, warm={"mebibytes": 1}, repetitions=2
    )
    assert [row["passes"] for row in rows] == ["forward", "forward+backward"]
    for row in rows:
        assert 95 < row["bytes"] / 2**20 < 115
        assert len(row["seconds"]) == 2
    too_much = 2 * runner.LIMIT_BYTES // 2**20
    rows = runner.measure(allocate, {"mebibytes": too_much}, ["some"], threads=1, warm={"mebibytes": 1})
    assert [row["problem"] for row in rows] == ["out of memory"] * 2
    assert runner.cell(rows[0], "seconds") == runner.cell(rows[0], "bytes") == "out of memory"


def wrong() -> None:
    raise RuntimeError("not a shortage")


def test_other_errors_are_not_taken_for_a_shortage() -> None:
    with pytest.raises(RuntimeError, match="not a shortage"):
        runner.in_child(wrong)


def test_a_crash_is_not_taken_for_a_shortage() -> None:
    with pytest.raises(RuntimeError, match="ended with -11"):
        runner.in_child(signal.raise_signal, signal.SIGSEGV)
    assert runner.in_child(signal.raise_signal, signal.SIGKILL) == "out of memory"


def test_ratio_is_that_of_the_medians() -> None:
    rows = [
        {"contender": c, "passes": "forward", "N": 8, "seconds": s} for c, s in (("a", [1.0, 3.0, 2.0]), ("b", [4.0]))
    ]
    assert runner.ratio(rows, "b", "a", "forward", N=8) == 2.0
    assert runner.ratio(rows, "b", "a", "forward", N=9) is None
    assert runner.find(rows, contender="b") is rows[1]


@pytest.mark.parametrize(("value", "text"), [(0.12345, "0.123"), (99.4, "99.4"), (1234.5, "1234")])
def test_figures_have_no_exponent(value: float, text: str) -> None:
    assert runner.significant(value) == text


def test_peers_compute_the_same_loss() -> None:
    pytest.importorskip("pytorch_metric_learning")
    pytest.importorskip("monai")
    calls = peers.make(96, 16, "float32")
    ours = calls["pglcl_ext"]["forward"]()
    for name in ("eager reference", "pytorch-metric-learning", "plain SupCon"):
        torch.testing.assert_close(calls[name]["forward"](), ours, rtol=1e-5, atol=1e-5)
        mine, theirs = (calls[c]["forward+backward"]()[0] for c in ("pglcl_ext", name))
        if name == "pytorch-metric-learning":  # normalises again, so there is no gradient along the embedding
            z = F.normalize(torch.randn(96, 16, generator=torch.Generator().manual_seed(0)), dim=1)
            mine = mine - (mine * z).sum(dim=1, keepdim=True) * z
        torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-6)


def test_one_positive_a_row_is_a_cross_entropy() -> None:
    inputs = pairs.problem(48, torch.float64)
    want = torch.autograd.grad(pairs.ours(*inputs), inputs[:2])
    for function in (pairs.plain, pairs.chunked):
        torch.testing.assert_close(function(*inputs), pairs.ours(*inputs))
        for mine, theirs in zip(want, torch.autograd.grad(function(*inputs), inputs[:2]), strict=True):
            torch.testing.assert_close(theirs, mine)


@pytest.mark.parametrize("with_keys", [False, True])
def test_products_are_those_of_the_loss(with_keys: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pair is computed: with the similarities as weights, the gradients are S K and S' A."""
    monkeypatch.setattr(peers, "BLOCK", 7)
    monkeypatch.setattr(torch, "zeros_like", lambda x: made.append(x.new_zeros(x.shape)) or made[-1])
    made: list[torch.Tensor] = []
    anchors, keys = torch.randn(20, 4), torch.randn(17, 4)
    peers.products(anchors, keys if with_keys else None)["forward+backward"]()
    if with_keys:
        torch.testing.assert_close(made[0], anchors @ keys.t() @ keys)
        torch.testing.assert_close(made[1], (anchors @ keys.t()).t() @ anchors)
    else:
        torch.testing.assert_close(made[0], anchors @ anchors.t() @ anchors)


def test_the_authors_formulas_match_where_they_are_defined() -> None:
    inputs = gaussian.problem(64, 32, "float32", "cpu")
    for temperature in (0.5, gaussian.TEMPERATURE):
        torch.testing.assert_close(
            gaussian_contrast_loss(*inputs, temperature=temperature),
            gaussian.authors(*inputs, temperature),
            rtol=1e-4,
            atol=0,
        )
    assert not torch.isfinite(gaussian.authors(*inputs, 0.005))
    assert torch.isfinite(gaussian_contrast_loss(*inputs, temperature=0.005))


def test_slope_is_the_exponent_on_a_log_log_plot() -> None:
    assert scaling.slope([1.0, 2.0, 4.0], [3.0, 12.0, 48.0]) == pytest.approx(2.0)
    assert math.isnan(scaling.slope([1.0], [3.0]))
    assert math.isnan(scaling.slope([], []))


def test_every_run_has_a_place_of_its_own() -> None:
    runs = list(segmentation.matrix())
    every = [(run.dataset, run.method, run.seed) for run in runs]
    assert len(set(every)) == len(every) == len({run.folder(Path("runs")) for run in runs})
    assert len(every) == sum(
        len(d.seeds) * len(segmentation.methods(name)) for name, d in segmentation.DATASETS.items()
    )
    first = [run for run in runs[: 4 * len(segmentation.DATASETS)] if run.dataset == "acdc"]
    assert {run.method for run in first} == {
        "supervised",
        "copy-paste",
        "copy-paste + patchcl",
        "fully supervised",
    }
    assert [run.seed for run in segmentation.matrix("acdc/supervised/")] == [0, 1, 2, 3]
    for run in runs:  # options that TrainConfig takes
        TrainConfig(**run.options())
    assert next(segmentation.matrix("hippocampus/fully supervised/0")).options()["labelled"] == 110


def test_the_paired_interval_contains_the_mean_difference() -> None:
    rng = np.random.default_rng(0)
    patients = [f"p{i}" for i in range(12)]
    base = [{p: float(rng.normal(0.7, 0.1)) for p in patients} for _ in range(3)]
    ahead = [{p: v + 0.02 for p, v in seed.items()} for seed in base]
    assert segmentation.paired_interval(ahead, base) == pytest.approx((0.02, 0.02, 0.02))
    noisy = [{p: v + 0.01 + float(rng.normal(0, 0.02)) for p, v in seed.items()} for seed in base]
    mean, low, high = segmentation.paired_interval(noisy, base)
    assert low < mean < high
    assert high - low < 0.04


def ended(runs: Path, run: segmentation.Run, dice: float) -> None:
    """Writes the files that a finished run leaves in its folder."""
    folder = run.folder(runs)
    folder.mkdir(parents=True)
    summary = [{"class": "mean", "dice": dice, "hd95": 3.0, "missed": 0, "stray": 2}]
    scores = [{"patient": p, "dice": dice + d, "hd95": 3.0} for p, d in (("a", 0.01), ("a", 0.03), ("b", -0.02))]
    (folder / "scores_test.json").write_text(json.dumps({"scores": scores, "summary": summary}))
    (folder / "config.json").write_text(json.dumps(run.options()))
    (folder / "environment.json").write_text(json.dumps({"git": None, "processor": "a CPU"}))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 5, "validation_dice": 0.7}) + "\n")


def test_runs_are_collected_from_folder_and_results(tmp_path: Path) -> None:
    ours, theirs = (segmentation.Run("acdc", method, 0) for method in ("copy-paste + patchcl", "copy-paste"))
    ended(tmp_path / "here", ours, 0.8)
    ended(tmp_path / "elsewhere", theirs, 0.7)
    committed = segmentation.Records(tmp_path / "elsewhere").all()
    assert [(r["method"], r["processor"], r["validation_dice"]) for r in committed] == [("copy-paste", "a CPU", 0.7)]
    assert committed[0]["patients"]["dice"] == pytest.approx({"a": 0.72, "b": 0.68})
    records = segmentation.Records(tmp_path / "here", committed)
    assert records.of(theirs) == committed[0]
    gain = segmentation.summarise(records.all())[1]["minus_base"]["dice"]
    assert gain == pytest.approx((0.1, 0.1, 0.1))
    assert "| copy-paste + patchcl | 0 |" in segmentation.table(records.all())
    # Results of other options than the present ones do not count.
    committed[0]["options"]["steps"] += 1
    assert segmentation.Records(tmp_path / "here", committed).of(theirs) is None
    config = ours.folder(tmp_path / "here") / "config.json"
    config.write_text(json.dumps({**ours.options(), "slices": "whole"}))
    assert segmentation.Records(tmp_path / "here").of(ours) is None


def test_goals_are_judged() -> None:
    def record(dataset: str, method: str, dice: float, hd95: float = 5.0, gain: Any = None) -> dict[str, Any]:
        return {"dataset": dataset, "method": method, "dice": [dice], "hd95": [hd95], "minus_base": gain}

    results = [record("acdc-6000", "supervised", 60.0), record("acdc-6000", "fully supervised", 90.0)]
    lines = segmentation.verdicts(results)
    assert len(lines) == 3
    assert all("not measured" in line for line in lines)
    ahead, behind = (
        {"dice": (0.015, low, 0.03), "hd95": (worse, -1, 1)} for low, worse in ((0.001, -0.5), (-0.001, 0.5))
    )
    results += [
        record("acdc-6000", "copy-paste + patchcl", 83.5, 3.9, ahead),
        record("hippocampus", "weak-to-strong + patchcl", 80.0, 2.0, ahead),
        record("histology", "copy-paste + patchcl", 80.0, 2.0, ahead),
    ]
    assert all(": met" in line for line in segmentation.verdicts(results))
    results[2:] = [record(r["dataset"], r["method"], 80.9, 4.1, behind) for r in results[2:]]
    assert all(": missed" in line for line in segmentation.verdicts(results))
    few = segmentation.verdicts([record("histology", "copy-paste + patchcl", 80.0, 2.0, ahead)])
    assert few[1].endswith("not decided yet (ahead on Histology, measured on Histology)")
    assert few[2].endswith("not decided yet (behind on none, measured on Histology)")
    assert segmentation.base_of("copy-paste, warm-up without pasting") == "copy-paste"
    assert segmentation.base_of("copy-paste + patchcl, unguided") == "copy-paste"


def test_pages_have_the_figures_of_the_results() -> None:
    texts = [page.read_text(encoding="utf-8") for page in pages.PAGES]
    assert sum(text.count("<!-- benchmarks: ") for text in texts) == len(pages.SECTIONS)
    for text in texts:
        assert pages.rendered(text) == text, "python -m benchmarks.pages brings the pages up to date"


RECORDS = [(f, question) for question in (*pages.MEASURED, *pages.ASKED) for f in pages.records(question)]


@pytest.mark.parametrize(("folder", "question"), RECORDS, ids=[f"{f.name}-{q}" for f, q in RECORDS])
def test_tables_are_those_of_the_results(folder: Path, question: str) -> None:
    """They are also found only under the name of the processor that they were measured on."""
    content = pages.records(question)[folder]
    assert {"processor", "commit", "torch_running"} <= set(content["machine"])
    assert runner.folder_of(content["machine"]) == folder
    table = (folder / f"{question}.md").read_text(encoding="utf-8")
    assert table == pages.table_of(question, content) + "\n"
    assert table.startswith(runner.name_of(content["machine"]))


def test_every_question_is_answered() -> None:
    assert {question for _, question in RECORDS} == {*pages.MEASURED, *pages.ASKED}
    assert not [path.name for path in runner.RESULTS.iterdir() if path.stem in (*pages.MEASURED, *pages.ASKED)]


@pytest.mark.skipif(not pages.results("segmentation"), reason="no run of the segmentation has ended")
def test_the_table_of_the_segmentation_is_that_of_its_results() -> None:
    table = (runner.RESULTS / "segmentation.md").read_text(encoding="utf-8")
    assert segmentation.table(pages.results("segmentation")) + "\n" == table


def on_one_line(text: str) -> str:
    return " ".join(text.split())


def test_the_verdict_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(dataset: str, seeds: list[int], dice: tuple[float, float, float]) -> dict[str, Any]:
        change = {"dice": dice, "hd95": (-2.5, -3.0, -2.0)}
        return {"dataset": dataset, "method": "copy-paste + patchcl", "seeds": seeds, "minus_base": change}

    found = [record("histology", [0], (0.003, -0.001, 0.008))]
    monkeypatch.setattr(segmentation, "summarise", lambda _: found)
    start = "On patients never used in training, the contrast changed the Dice of its base method by "
    end = " each ([all methods, data sets and intervals](docs/segmentation.md))."
    assert on_one_line(pages.verdict()) == f"{start}+0.3 points, with 1 seed{end}"
    found.append(record("hippocampus", [0, 1], (-0.01, -0.02, -0.001)))
    assert on_one_line(pages.verdict()) == f"{start}between -1.0 and +0.3 points, with 1 to 2 seeds{end}"
    assert max(len(line) for line in pages.verdict().splitlines()) <= 120
    # What rounds to 0 has no minus; variants of the contrast say nothing of the contrast at its defaults.
    found[1] = record("hippocampus", [0, 1], (-0.0004, -0.02, 0.001))
    found.append(record("acdc", [0], (0.02, 0.01, 0.03)) | {"method": "copy-paste + patchcl, unguided"})
    assert on_one_line(pages.verdict()) == f"{start}between +0.0 and +0.3 points, with 1 to 2 seeds{end}"
    found.clear()
    assert "not measured yet" in pages.verdict()


def save_results(folder: Path, question: str, content: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{question}.json").write_text(json.dumps(content))


def test_pages_quote_the_least_favourable_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the second processor the other contenders take half the time, and ours takes twice the memory."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    for question in pages.MEASURED:
        content = next(iter(pages.records(question).values()))
        content["machine"].update({"processor": "One", "cpu_instruction_set": "avx512"})
        for results in (alone, both):
            save_results(results / "one-avx512", question, content)
        for row in content["results"]:
            if row.get("contender") == "pglcl_ext":
                row["bytes"] = row.get("bytes", 0) * 2
            elif "seconds" in row:
                row["seconds"] = [s / 2 for s in row["seconds"]]
        content["machine"].update({"processor": "Another", "cpu_instruction_set": "avx2"})
        save_results(both / "another-avx2", question, content)
    monkeypatch.setattr(pages, "RESULTS", alone)
    one, peers = pages.figures(), pages.peers()
    monkeypatch.setattr(pages, "RESULTS", both)
    two = pages.figures()

    def ratios(text: str) -> list[float]:
        return [float(value) for value in re.findall(r"([0-9.]+)x(?=[ ,])", text.split("authors")[0])]

    assert len(ratios(one)) == 6
    assert ratios(two) == pytest.approx([value / 2 for value in ratios(one)], rel=0.01)
    assert "[Another, avx2](../benchmarks/results/another-avx2/loss.md)" in two
    assert pages.peers().count("| N |") == 2 * peers.count("| N |")
    assert "Another, avx2, 2 threads" in pages.peers()
    case = {"N": 65536, "D": 128, "dtype": "float32", "passes": pages.BOTH, "contender": "pglcl_ext"}
    ours = max(runner.find(own, **case)["bytes"] for own in pages.measured("peers"))
    assert f"the fused loss takes {runner.mebibytes(ours)} MiB" in on_one_line(pages.memory())


def test_results_name_no_folder_of_a_machine() -> None:
    folders = {"/home/me/data": "DATA", "/home/me/runs": "RUNS"}
    words = ["segmentation", "--data", "/home/me/data", "--runs=/home/me/runs", "--threads", "1"]
    assert recorded(words, folders) == "python -m benchmarks segmentation --data DATA --runs=RUNS --threads 1"
    assert recorded([], {}) == "python -m benchmarks"
    for path in pages.RESULTS.rglob("*.json"):
        assert not re.search(r'"command": "[^"]*[ =]/', path.read_text()), path

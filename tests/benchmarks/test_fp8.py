"""The FP8 benchmark runs to its end without a GPU, and its report says what the figures say."""

import json

import pytest

from tests.benchmarks import fp8


def test_the_benchmark_runs_on_tiny_sizes_and_writes_what_it_prints(tmp_path, capsys):
    fp8.main(["--smoke", "--json", str(tmp_path / "results.json")])
    printed, results = capsys.readouterr().out, json.loads((tmp_path / "results.json").read_text())
    assert printed.strip() == fp8.report(results)
    assert {row["what"] for row in results["gemms"]} >= {"linear", "linear_dgrad", "grouped_wgrad", "whole linear"}
    assert all(time > 0 for row in [*results["gemms"], *results["casts"]] for time in row["times"].values())


def test_without_a_gpu_full_sizes_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        fp8.main([])
    assert ended.value.code == 2 and "--smoke" in capsys.readouterr().err


def gemm_row(what: str, K: int, bf16: float, **times: float) -> dict:
    return {"what": what, "M": 4096, "N": 2112, "K": K, "flops": 2 * 4096 * 2112 * K, "bf16": bf16, "times": times}


def test_ratios_and_goals_are_those_of_the_figures():
    results = {
        "device": "an H200",
        "date": "2026-01-02",
        "versions": {"torch": "2.11"},
        "auto": "auto",
        "gemms": [
            gemm_row("linear", 7168, 4e-4, cublas=2.2e-4, triton=2e-4, auto=2e-4),
            gemm_row("linear", 1536, 9e-4, cublas=3e-4, triton=4e-4, auto=4e-4),
            gemm_row("linear", 512, 1e-4, cublas=1e-4, auto=1e-4),
        ],
        "casts": [
            {"what": "copy", "bytes": 100, "copy": 10.0, "times": {"torch": 10.0}},
            {"what": "1x128", "bytes": 150, "copy": 10.0, "times": {"triton": 20.0, "auto": 25.0}},
        ],
    }
    lines = fp8.report(results).splitlines()
    assert lines[:3] == ["FP8 on an H200, 2026-01-02", "", "torch 2.11"]
    assert (
        "| M | N | K | BF16 | cublas | triton | auto | auto / BF16 | / cublas | / transformer_engine | / best |"
        in lines
    )
    assert "| 4096 | 2112 | 7168 | 310 | 564 | 620 | 620 | 2.00 | 1.10 |  | 1.00 |" in lines
    assert "| linear / BF16, geometric mean | 1.6 | 2.12 | 1.00 |" in lines  # sqrt(2 x 2.25)
    assert "| auto / best backend, worst shape | 0.97 | 0.75 |  |" in lines
    assert "| cast / copy bandwidth, worst cast | 0.75 | 0.75 |  |" in lines

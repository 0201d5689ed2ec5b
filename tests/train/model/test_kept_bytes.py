"""What a MoE layer keeps of a token at DeepSeek-V3's shapes, counted on fake tensors, against what the formats take."""

from tests.benchmarks.activation_memory import REST, kept

D, ROWS, INNER, OUT = 7168, 8, 2048, 128 * 128


def fp8(width: int) -> int:
    return width + 4 * width // 128


def test_fp8_keeps_what_the_report_says_and_no_more():
    recomputing_less, bf16, found = kept("bf16", ("norms", "mla_up")), kept("bf16"), kept("fp8")
    assert found == kept("fp8", ("norms", "mla_up")), "SwiGLU's output is never kept"
    assert found["routed experts' input"] == ROWS * fp8(D)
    assert found["routed experts' gate and up"] == ROWS * fp8(2 * INNER)
    assert found["shared expert's gate, up and SwiGLU output"] == fp8(2 * INNER)
    assert found["attention output"] == OUT * 3 // 2 + 4 * OUT // 128, "E5M6, once for both of its readers"
    assert found["routed experts' SwiGLU output"] == 0 < recomputing_less["routed experts' SwiGLU output"]
    for part in ("residual stream, before and after attention", "latents", REST):
        assert found[part] == bf16[part]
    assert found[REST] < 0.01 * sum(found.values())
    assert sum(found.values()) <= 0.6 * sum(recomputing_less.values())
    assert sum(found.values()) <= 0.615 * sum(bf16.values()), "0.6 is beyond these formats: see the measurements"

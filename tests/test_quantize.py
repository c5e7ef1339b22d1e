import copy
import gc
import pickle
import weakref

import pytest
import torch
import transformers
from accelerate import dispatch_model
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from tinyfuse.quantize import Int8Embedding, Int8Experts, Int8Linear, quantize_

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 131}
LLAMA = {**SMALL, "intermediate_size": 96, "num_key_value_heads": 2}
MOE = {**LLAMA, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
CONFIGS = {
    "llama-tied": lambda: transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "llama": lambda: transformers.LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True),
    "gpt2": lambda: transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=131),
    "opt": lambda: transformers.OPTConfig(**SMALL, ffn_dim=96, word_embed_proj_dim=64, tie_word_embeddings=True),
    "neox": lambda: transformers.GPTNeoXConfig(**SMALL, intermediate_size=96),
    "mixtral": lambda: transformers.MixtralConfig(**LLAMA, num_local_experts=4),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(**MOE, num_experts=4, head_dim=16),
    "gpt-oss": lambda: transformers.GptOssConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2, head_dim=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(**LLAMA, head_dim=16, tie_word_embeddings=True),
}


def build(name: str, dtype=torch.float32) -> nn.Module:
    """A randomly initialised causal LM with biases and norms that are not 0 and 1."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config._experts_implementation = "eager"  # the grouped kernel has no fp64
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model.to(dtype).eval()


IDS = torch.randint(0, 131, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


def float_copy(quantized: nn.Module, original: nn.Module) -> nn.Module:
    """``original`` with the weights that ``quantized`` stands for."""
    model = copy.deepcopy(original)
    for name, module in quantized.named_modules():
        if isinstance(module, (Int8Linear, Int8Embedding)):
            weight = module.weight.double() * module.weight_scale.double()[:, None]
            target = model.get_submodule(name)
            transposed = type(target).__name__ == "Conv1D"
            target.weight.data = (weight.t() if transposed else weight).to(target.weight.dtype)
        elif isinstance(module, Int8Experts):
            weight = module.weight.double() * module.weight_scale.double()[..., None]
            target = model.get_parameter(name)
            target.data = (weight.mT if module.by_columns else weight).to(target.dtype)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_output_is_that_of_the_dequantised_weights(name):
    original = build(name)
    quantized = copy.deepcopy(original)
    report = quantize_(quantized, tied_heads=True)
    assert report.modules
    exact = logits(float_copy(quantized, original.double()))
    eager_error = (logits(float_copy(quantized, build(name))) - exact).abs().max()
    assert (logits(quantized) - exact).abs().max() <= 4 * eager_error


@pytest.mark.parametrize("name", CONFIGS)
def test_every_linear_is_converted_or_reported(name):
    model = build(name, torch.bfloat16)
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    report = quantize_(model, tied_heads=True)
    converted = {m.name for m in report.modules if m.kind not in ("Embedding", "Experts")}
    assert converted == {n for n, m in model.named_modules() if isinstance(m, Int8Linear)}
    assert converted | {n for n, _ in report.skipped} >= linears
    attention = ("q_proj", "c_attn", "query_key_value")
    assert converted >= {n for n in linears if n.endswith((*attention, "lm_head", "embed_out"))}
    saved = sum(m.bytes_before - m.bytes_after for m in report.modules)
    assert report.bytes_before - report.bytes_after == pytest.approx(saved, abs=2)  # Gemma's embed_scale buffer goes


def test_per_channel_scale_and_round_half_to_even():
    linear = nn.Linear(64, 64, bias=False)
    weight = torch.zeros(64, 64)
    weight[0, :6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5])
    weight[1, :2] = torch.tensor([-254.0, 3.0])
    weight[3, 0] = 1e-44
    linear.weight.data = weight.clone()
    quantize_(linear)
    assert linear.weight[0, :6].tolist() == [127, 0, 2, 2, 0, -2]
    assert linear.weight[1, :2].tolist() == [-127, 2]
    assert linear.weight_scale[:2].tolist() == [1.0, 2.0]
    dequantized = linear.weight * linear.weight_scale[:, None]
    assert torch.equal(dequantized[2], weight[2])
    assert dequantized.isfinite().all() and linear(torch.ones(1, 64)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_error_is_at_most_half_a_step(dtype):
    linear = nn.Linear(97, 61).to(dtype)
    before = linear.weight.detach().double()
    quantize_(linear)
    step = linear.weight_scale.double()[:, None]
    assert ((linear.weight * step - before).abs() <= step * (0.5 + 1e-4)).all()
    assert linear.weight.abs().amax(1).eq(127).all()


def test_bytes_depend_on_the_weights_alone(monkeypatch):
    weight = torch.randn(96, 64)
    results = []
    for chunk, strided in [(1 << 18, False), (100, False), (1, True)]:
        monkeypatch.setattr("tinyfuse.quantize.CHUNK", chunk)
        linear = nn.Linear(64, 96, bias=False)
        linear.weight = nn.Parameter(weight.t().contiguous().t() if strided else weight.clone())
        quantize_(linear)
        results.append((linear.weight.numpy().tobytes(), linear.weight_scale.numpy().tobytes()))
    assert results[0] == results[1] == results[2]


def test_conv1d_equals_its_transposed_linear():
    conv = transformers.pytorch_utils.Conv1D(96, 64)
    linear = nn.Linear(64, 96)
    linear.weight.data, linear.bias.data = conv.weight.detach().t().clone(), conv.bias.detach().clone()
    quantize_(conv)
    quantize_(linear)
    assert isinstance(conv, Int8Linear) and (conv.in_features, conv.out_features) == (64, 96)
    assert torch.equal(conv.weight, linear.weight) and torch.equal(conv.weight_scale, linear.weight_scale)
    x = torch.randn(3, 64)
    assert torch.equal(conv(x), linear(x))


def test_dtype_conversions_leave_int8_and_scale():
    model = quantized = build("llama-tied", torch.bfloat16)
    quantize_(quantized, tied_heads=True)
    scale = model.lm_head.weight_scale.clone()
    for convert in (nn.Module.half, nn.Module.double, lambda m: m.type(torch.float32), nn.Module.bfloat16):
        convert(model)
        assert model.lm_head.weight.dtype == torch.int8
        assert torch.equal(model.lm_head.weight_scale, scale) and model.lm_head.weight_scale.dtype == torch.float32
        assert model.model.embed_tokens(IDS).dtype == model.dtype == model.model.norm.weight.dtype
    assert logits(model.float()).dtype == torch.float32


def test_moves_to_another_device():
    model = build("llama-tied")
    quantize_(model, tied_heads=True)
    model.to("meta")
    assert all(tensor.device.type == "meta" for tensor in [*model.parameters(), *model.buffers()])
    assert model.model.embed_tokens(IDS.to("meta")).shape == (2, 9, 64)


def assert_tied(model):
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, Int8Linear) and isinstance(table, Int8Embedding)
    assert head.weight is table.weight and head.weight_scale is table.weight_scale


def test_tied_head_stays_tied():
    model = build("llama-tied", torch.bfloat16)
    report = quantize_(model, tied_heads=True)
    assert_tied(model)
    before = logits(model)
    model.tie_weights()
    assert_tied(model)
    assert torch.equal(logits(model), before)
    assert [m.kind for m in report.modules].count("Embedding") == 1
    assert report.modules[-1] == ("lm_head", "Linear", 131, 64, 0, 0)


def test_tie_weights_restores_a_broken_tie():
    model = build("llama-tied")
    quantize_(model, tied_heads=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    model.lm_head.weight_scale = model.lm_head.weight_scale.clone()
    model.tie_weights()
    assert_tied(model)


def test_save_pretrained_writes_a_tied_table_once(tmp_path):
    model = build("llama-tied", torch.bfloat16)
    quantize_(model, tied_heads=True)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"model.embed_tokens.weight", "model.embed_tokens.weight_scale"} <= names
    assert not any(name.startswith("lm_head") for name in names)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "opt", "gemma3"])
def test_tied_heads_are_left_alone_by_default_and_converted_later(name):
    model = build(name)
    report = quantize_(model)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is table.weight and head.weight.dtype == torch.float32
    assert "tied_heads=True converts both" in dict(report.skipped)["lm_head"]
    assert quantize_(model).modules == []
    assert [m.name for m in quantize_(model, tied_heads=True).modules][-1] == "lm_head"
    assert_tied(model)


def test_tied_head_left_out_keeps_its_embedding():
    model = build("llama-tied")
    report = quantize_(model, tied_heads=True, filter_fn=lambda module, name: name != "lm_head")
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.is_floating_point()
    assert ("lm_head", "filter_fn leaves it out") in report.skipped


def test_head_tied_to_an_unknown_embedding_is_left_alone():
    class Shifted(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) + 1

    model = build("llama-tied")
    table = Shifted(131, 64)
    model.set_input_embeddings(table)
    model.tie_weights()
    for tied_heads in (False, True):  # neither promises what it cannot do
        report = quantize_(model, tied_heads=tied_heads)
        assert type(model.model.embed_tokens) is Shifted and model.lm_head.weight is table.weight
        assert "Shifted, which does more than look up rows" in dict(report.skipped)["lm_head"]


def test_linears_that_share_a_weight_still_share_it():
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64, bias=False)})
    model["b"].weight = model["a"].weight
    report = quantize_(model)
    assert model["a"].weight is model["b"].weight and model["a"].weight_scale is model["b"].weight_scale
    assert [m.bytes_after for m in report.modules] == [64 * 64 + 64 * 4, 0]


def test_resizing_a_quantised_table_is_refused():
    model = build("llama-tied")
    quantize_(model, tied_heads=True)
    with pytest.raises(TypeError, match="Int8Embedding"):
        model.resize_token_embeddings(256)


EXPERTS = ["mixtral", "qwen3-moe", "gpt-oss"]


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_converted_and_routers_stay(name):
    model = build(name, torch.bfloat16)
    routers = {n: p.clone() for n, p in model.named_parameters() if "gate.weight" in n or "router" in n}
    experts = {n: p.nbytes for n, p in model.named_parameters() if p.ndim == 3}
    report = quantize_(model)
    converted = {m.name: m for m in report.modules if m.kind == "Experts"}
    assert routers and converted.keys() == experts.keys()
    for n, module in converted.items():
        assert module.bytes_before == experts[n] and module.bytes_after < 0.6 * experts[n]
        assert model.get_submodule(n).weight.shape[1:] == (module.N, module.K)
    assert all(torch.equal(model.get_parameter(n), weight) for n, weight in routers.items())
    assert quantize_(model).modules == [] and not model.training


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("name", EXPERTS)
def test_every_experts_implementation_reads_int8(name, implementation):
    original = build(name)
    quantized = copy.deepcopy(original)
    quantize_(quantized)
    plain = float_copy(quantized, original)
    for model in (plain, quantized):
        model.set_experts_implementation(implementation)
    expected = logits(plain)
    torch.testing.assert_close(logits(pickle.loads(pickle.dumps(quantized))), expected, rtol=0, atol=1e-5)
    if name == "gpt-oss" and implementation != "eager":  # whose loop over tokens' experts no graph holds
        torch._dynamo.reset()
        compiled = torch.compile(quantized, backend="eager", fullgraph=True)
        torch.testing.assert_close(logits(compiled), expected, rtol=0, atol=1e-5)
        torch._dynamo.reset()


def test_experts_are_saved_as_in_the_state_dict(tmp_path):
    model = build("mixtral", torch.bfloat16)
    checkpoint = {name: weight for name, weight in model.state_dict().items() if "experts" in name}
    quantize_(model)
    model.save_pretrained(tmp_path)
    fresh = build("mixtral").bfloat16()
    quantize_(fresh)
    load_model(fresh, tmp_path / "model.safetensors")
    assert torch.equal(logits(fresh), logits(model))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*experts\.gate_up_proj"):
        model.load_state_dict(model.state_dict() | checkpoint)
    assert model.double().model.layers[0].mlp.experts.down_proj[0].dtype == torch.float64


def test_experts_that_cannot_be_converted_stay():
    model = build("mixtral")
    experts = model.model.layers[0].mlp.experts
    for key in ("down_proj", "gate_up_proj"):
        weight = vars(experts)["_parameters"][key]
        before, weight.data[2, 3, 5] = weight[2, 3, 5].item(), float("nan")
        with pytest.raises(ValueError, match=rf"layers\.0\.mlp\.experts\.{key} contains NaN"):
            quantize_(model)
        weight.data[2, 3, 5] = before
    assert all(p.is_floating_point() for p in model.parameters())
    model.model.layers[1].mlp.experts.forward = lambda *args: args[0]
    report = quantize_(model, filter_fn=lambda module, name: name != "model.layers.0.mlp.experts")
    reasons = {name: reason for name, reason in report.skipped if "experts" in name}
    assert len(reasons) == 4 and not any(isinstance(module, Int8Experts) for module in model.modules())
    assert reasons["model.layers.0.mlp.experts.down_proj"] == "filter_fn leaves it out"
    assert "replaced" in reasons["model.layers.1.mlp.experts.down_proj"]
    stack = nn.Module()
    stack.weight = nn.Parameter(torch.randn(4, 64, 64))
    assert "experts interface" in dict(quantize_(stack).skipped)["weight"]


def test_experts_are_converted_together_or_not_at_all(monkeypatch):
    experts = build("gpt-oss").model.layers[0].mlp.experts
    before, calls = dict(experts.named_parameters()), iter(range(5))

    def fails_in_the_second_weight(weight, scale):
        if next(calls) == 4:
            raise MemoryError
        return torch.zeros_like(weight, dtype=torch.int8)

    monkeypatch.setattr("tinyfuse.quantize._quantize_weight", fails_in_the_second_weight)
    with pytest.raises(MemoryError):
        quantize_(experts)
    assert experts.is_transposed and all(p is before[name] for name, p in experts.named_parameters())


def test_router_linears_stay():
    model = nn.ModuleDict(
        {"gate": nn.Linear(64, 40), "router": nn.Sequential(nn.Linear(64, 64)), "gate_proj": nn.Linear(64, 64)}
    )
    report = quantize_(model)
    assert [m.name for m in report.modules] == ["gate_proj"]
    assert dict(report.skipped) == {n: "routers stay in high precision" for n in ("gate", "router.0")}


def test_weights_that_the_model_reads_itself_stay():
    # Mamba casts the head's input to `lm_head.weight.dtype` and multiplies by `dt_proj.weight`.
    config = transformers.MambaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=131, time_step_rank=32)
    model = transformers.MambaForCausalLM(config).eval()
    before = logits(model)
    report = quantize_(model)
    reasons = dict(report.skipped)
    assert "reads its weight directly" in reasons["lm_head"]
    assert "reads its weight directly" in reasons["backbone.layers.0.mixer.dt_proj"]
    assert [m.name.rpartition(".")[2] for m in report.modules] == ["in_proj"]
    assert (logits(model) - before).abs().max() < 0.05 * before.abs().max()


@torch.no_grad()
def test_weights_that_a_module_of_torch_reads_itself_stay():
    """In evaluation an encoder's layer of torch hands its weights to one fused operation."""
    model = nn.Sequential(nn.Linear(64, 64), nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)).eval()
    report = quantize_(model)
    assert [m.name for m in report.modules] == ["0"]
    assert "TransformerEncoderLayer reads its weight directly" in dict(report.skipped)["1.linear1"]
    assert model(torch.randn(2, 5, 64)).isfinite().all()


def test_what_is_not_a_plain_linear_stays():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.ModuleDict(
        {
            "tiny": nn.Linear(64, 31),
            "doubled": Doubled(64, 64),
            "parametrised": nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)),
            "spectral": nn.utils.spectral_norm(nn.Linear(64, 64)),
            "attention": nn.MultiheadAttention(64, 4),
            "patched": nn.Linear(64, 64),
        }
    )
    model["patched"].forward = lambda x: x
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = quantize_(model)
    assert not report.modules
    assert {n for n, _ in report.skipped} == {*model} - {"attention"} | {"attention.out_proj"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_filter_fn_selects():
    model = build("llama")
    report = quantize_(model, filter_fn=lambda module, name: isinstance(module, nn.Linear) and ".mlp." in name)
    assert {m.name for m in report.modules} == {n for n, _ in model.named_modules() if ".mlp." in n and "proj" in n}
    assert type(model.lm_head) is nn.Linear


def test_second_call_changes_nothing_and_says_so():
    model = build("llama-tied")
    first = quantize_(model, tied_heads=True)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    second = quantize_(model, tied_heads=True)
    assert not second.modules and second.bytes_before == second.bytes_after == first.bytes_after
    assert "nothing to quantise" in str(second) and "it is int8 already" in str(second)
    assert before == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


def test_report_reads_and_serialises():
    model = build("llama-tied", torch.bfloat16)
    report = quantize_(model, tied_heads=True, filter_fn=lambda module, name: "q_proj" not in name)
    text = str(report)
    assert text.startswith("int8: 13 Linear, 1 Embedding; 0.1 MB -> ")
    assert "left alone: model.layers.0.self_attn.q_proj and 1 more: filter_fn leaves it out" in text
    record = report.to_dict()
    assert record["modules"][0]["name"] == "model.layers.0.self_attn.k_proj" and record["modules"][0]["K"] == 64
    assert record["bytes_after"] == report.bytes_after and len(record["skipped"]) == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_refusal_of_nan_and_inf_leaves_the_model_as_it_was(bad):
    model = build("llama-tied")
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = bad
    modules = {name: type(module) for name, module in model.named_modules()}
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj\.weight contains NaN or Inf"):
        quantize_(model, tied_heads=True)
    assert modules == {name: type(module) for name, module in model.named_modules()}
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[name][0]
        assert tensor.numpy().tobytes() == before[name][1].numpy().tobytes()


def test_refusal_of_meta_weights():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with pytest.raises(ValueError, match="meta device"):
        quantize_(model)
    assert type(model[0]) is nn.Linear


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="not str"):
        quantize_("gpt2")
    with pytest.raises(ValueError, match="'int4'; valid schemes: int8"):
        quantize_(nn.Linear(64, 64), "int4")


def test_each_float_weight_is_freed_before_the_next_layer(monkeypatch):
    import tinyfuse.quantize as module

    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
    weights = [weakref.ref(layer.weight) for layer in model]
    alive = []
    convert = module._convert

    def counting(group, scale):
        gc.collect()
        alive.append(sum(ref() is not None for ref in weights))
        return convert(group, scale)

    monkeypatch.setattr(module, "_convert", counting)
    quantize_(model)
    assert alive == [4, 3, 2, 1]


def test_no_float_copy_of_a_whole_weight(monkeypatch):
    monkeypatch.setattr("tinyfuse.quantize.CHUNK", 4096)
    linear = nn.Linear(512, 512, bias=False).bfloat16()
    with torch.profiler.profile(profile_memory=True) as profile:
        quantize_(linear)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest == 512 * 512  # the int8 weight itself; a chunk in fp32 is 16 KiB


def test_state_dict_round_trip_through_safetensors(tmp_path):
    model = build("gpt2", torch.bfloat16)
    quantize_(model, tied_heads=True)
    save_model(model, tmp_path / "model.safetensors")
    torch.manual_seed(5)
    fresh = transformers.AutoModelForCausalLM.from_config(CONFIGS["gpt2"]()).bfloat16().eval()
    quantize_(fresh, tied_heads=True)
    load_model(fresh, tmp_path / "model.safetensors")
    assert torch.equal(logits(fresh), logits(model))
    assert_tied(fresh)


def test_float_checkpoint_does_not_load_into_int8():
    model = nn.Sequential(nn.Linear(64, 64))
    checkpoint = copy.deepcopy(model.state_dict())
    quantize_(model)
    with pytest.raises(RuntimeError, match=r"0\.weight is torch\.float32, the module is int8"):
        model.load_state_dict(checkpoint, strict=False)


def test_empty_modules_take_a_saved_state():
    linear = nn.Linear(64, 48)
    quantize_(linear)
    fresh = Int8Linear(64, 48)
    fresh.load_state_dict(linear.state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(fresh(x), linear(x)) and "weight=int8" in repr(fresh)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_equal_and_tied(clone):
    model = build("llama-tied", torch.bfloat16)
    quantize_(model, tied_heads=True)
    twin = clone(model)
    assert_tied(twin)
    assert twin.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()
    assert torch.equal(logits(twin), logits(model))


def test_hooks_and_training_flag_survive():
    linear = nn.Linear(64, 64)
    calls = []
    handle = linear.register_forward_hook(lambda module, args, out: calls.append(type(module)))
    quantize_(linear)
    linear(torch.randn(1, 64))
    handle.remove()
    linear(torch.randn(1, 64))
    assert calls == [Int8Linear] and linear.training and linear.bias.requires_grad


def test_accelerate_hooks_survive():
    model = build("llama")
    model = dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, force_hooks=True)
    assert hasattr(model.lm_head, "_hf_hook")
    quantize_(model)
    assert isinstance(model.lm_head, Int8Linear) and hasattr(model.lm_head, "_hf_hook")
    plain = build("llama")
    quantize_(plain)
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("order", ["lora first", "int8 first"])
def test_lora_trains_over_an_int8_base(order):
    model = build("llama-tied")
    config = LoraConfig(target_modules=["q_proj", "down_proj"], r=40, init_lora_weights=False)
    if order == "int8 first":
        quantize_(model)
    adapted = get_peft_model(model, config)
    if order == "lora first":
        names = [m.name for m in quantize_(adapted).modules]
        assert any(name.endswith("q_proj.base_layer") for name in names)
    adapters = [p for n, p in adapted.named_parameters() if "lora_" in n]
    assert adapters and all(p.is_floating_point() for p in adapters)
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 64)
    delta = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
    torch.testing.assert_close(layer(x), layer.base_layer(x) + delta)
    adapted.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_activations_and_bias(dtype):
    linear = nn.Linear(64, 48).to(dtype)
    quantize_(linear)
    x = torch.randn(2, 5, 64, dtype=dtype, requires_grad=True)
    out_grad = torch.randn(2, 5, 48, dtype=dtype)
    linear(x).backward(out_grad)
    weight = (linear.weight * linear.weight_scale[:, None]).to(dtype)
    torch.testing.assert_close(x.grad, out_grad @ weight)
    torch.testing.assert_close(linear.bias.grad, out_grad.sum((0, 1)))


def test_float_linear_op_has_all_gradients():
    inputs = [torch.randn(5, 7), torch.randn(3, 7), torch.randn(3), torch.randn(5, 3)]
    x, weight, bias, residual = (t.double().requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(
        lambda x, w, b, r: torch.ops.tinyfuse.linear(x, w, None, b, r), (x, weight, bias, residual)
    )


def test_compiles_without_a_break():
    model = build("llama-tied")
    quantize_(model, tied_heads=True)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(logits(compiled), logits(model))


def test_a_compiled_model_notices():
    model = build("llama-tied")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    before = logits(compiled)
    quantize_(model)
    assert torch.equal(logits(compiled), logits(model)) and not torch.equal(logits(model), before)


def test_autocast_computes_in_its_dtype():
    linear = nn.Linear(64, 48)
    quantize_(linear)
    x = torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, linear(x.bfloat16()))


@pytest.mark.gpu
def test_cuda_gives_the_same_bytes():
    on_cpu, on_gpu = build("llama-tied", torch.bfloat16), build("llama-tied", torch.bfloat16).cuda()
    quantize_(on_cpu, tied_heads=True)
    quantize_(on_gpu, tied_heads=True)
    for name, tensor in on_cpu.state_dict().items():
        assert torch.equal(tensor, on_gpu.state_dict()[name].cpu()), name
    assert_tied(on_gpu)

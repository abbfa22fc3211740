"""Swapping LayerNorms in a user's own module: the class stays, the norms are nn.RMSNorm."""

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import transformers as hf
from torch import nn
from torch.utils import _pytree as pytree

import normtool
from normtool.errors import UsageError
from normtool.formats.torch import swap_trial
from normtool.formats.torch.export import Example, export
from tests.formats.torch import architectures
from tests.formats.torch.checks import codes, randn, snapshot

#: Largest relative difference of a swap in float64.
LIMIT = 1e-12

_SPECIAL, _DECODER, _VIT = architectures._SPECIAL, architectures._DECODER, architectures._VIT
_tokens, _image = architectures._tokens(), architectures._image(32)
_GPT2 = {**_SPECIAL, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "use_cache": False}
_OPT = {"word_embed_proj_dim": 32, "ffn_dim": 64, "max_position_embeddings": 32, "hidden_size": 32}
_SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "use_cache": False}
_BLOOM = {**_SPECIAL, "hidden_size": 32, "n_layer": 2, "n_head": 4, "use_cache": False}
_WHISPER = {
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "max_source_positions": 16,
}


def perturbed(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and buffer away from its initial value: γ from 1, β from 0, means from 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in {id(t): t for t in (*module.parameters(), *module.buffers())}.values():
            if tensor.is_floating_point():
                tensor += 0.2 * torch.randn(tensor.shape, generator=generator) + 0.05
    return module.eval()


def wide(module: nn.Module, inputs):
    """The same in float64."""
    lift = lambda leaf: leaf.double() if leaf.is_floating_point() else leaf  # noqa: E731
    return copy.deepcopy(module).double(), pytree.tree_map(lift, inputs)


def outputs(module: nn.Module, inputs) -> list[torch.Tensor]:
    with torch.no_grad():
        result = module(**inputs) if isinstance(inputs, dict) else module(inputs)
    return [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]


def error(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    pairs = [(a.detach(), b.detach()) for a, b in zip(got, expected, strict=True)]
    return max(float((a.double() - b.double()).abs().max() / b.double().abs().max()) for a, b in pairs)


def count(module: nn.Module, kind: type | str) -> int:
    return sum(
        type(m).__name__ == kind if isinstance(kind, str) else isinstance(m, kind) for m in module.modules()
    )


def assert_perturbed(module: nn.Module) -> None:
    """Where γ is 1 and β is 0 a wrong swap may look right."""
    for part in module.modules():
        if isinstance(part, nn.LayerNorm) and part.weight is not None:
            assert float((part.weight.detach() - 1).abs().max()) > 0.1
            assert part.bias is None or float(part.bias.detach().abs().max()) > 0.1


def swap(module: nn.Module, inputs, **options) -> normtool.Rewrite:
    """Swap in float64; the original stays what it was, the result is of its class and computes the same."""
    assert_perturbed(module)
    module, inputs = wide(module, inputs)
    before = snapshot(module)
    result = normtool.swap(module, inputs, validate=False, **options)
    assert snapshot(module) == before
    assert type(result.model) is type(module)
    assert error(outputs(result.model, inputs), outputs(module, inputs)) <= LIMIT
    assert_state_dict(module, result)
    return result


def assert_state_dict(module: nn.Module, result: normtool.Rewrite) -> None:
    """Every key that is gone is mapped to keys that are there; and it can be loaded again."""
    old, new = module.state_dict(), result.model.state_dict()
    assert set(result.key_map) == old.keys() - new.keys()
    assert {key for keys in result.key_map.values() for key in keys} <= new.keys()
    copy.deepcopy(result.model).load_state_dict(new)


def verdicts(result: normtool.Rewrite) -> list[str]:
    return [site.verdict for site in result.sites if site.norm.kind == "layer_norm"]


class Through(nn.Module):
    """A module whose forward is a function of itself and x; children and parameters by name."""

    def __init__(self, function, **members):
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *inputs, **options):
        return self.function(self, *inputs, **options)


# ---- architectures ------------------------------------------------------------------------------------

#: id → (how to make it, inputs, LayerNorms, of these swapped, Centres, shifts that stay behind)
MODELS = {
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2, tie_word_embeddings=False)),
        *(_tokens, 5, 5, 0, 0),
    ),
    # the tied table stays as it is: one Centre behind the dropout that follows, and β cannot go into the head
    "gpt2-tied": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2)), _tokens, 5, 5, 1, 1),
    "opt": (
        lambda: hf.OPTForCausalLM(hf.OPTConfig(**_SPECIAL, **_OPT, **_SMALL, tie_word_embeddings=False)),
        *(_tokens, 5, 5, 0, 0),
    ),
    "vit": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**_VIT, num_labels=5)),
        *(_image, 5, 5, 0, 0),
    ),
    "dinov2": (
        lambda: hf.Dinov2ForImageClassification(
            hf.Dinov2Config(**{**_VIT, "intermediate_size": 64}, use_swiglu_ffn=True, num_labels=5)
        ),
        *(_image, 5, 5, 0, 0),
    ),
    "gpt_neox": (lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_DECODER)), _tokens, 5, 5, 0, 0),
    # per-head norms in front of the rotation, which is no Linear
    "phi": (
        lambda: hf.PhiForCausalLM(hf.PhiConfig(**_DECODER, qk_layernorm=True)),
        *(_tokens, 7, 7, 0, 4),
    ),
    # its Linear has a forward of its own, without a bias
    "falcon": (
        lambda: hf.FalconForCausalLM(
            hf.FalconConfig(**_SPECIAL, hidden_size=32, **_SMALL, tie_word_embeddings=False)
        ),
        *(_tokens, 3, 3, 0, 2),
    ),
    "stablelm": (
        lambda: hf.StableLmForCausalLM(hf.StableLmConfig(**_DECODER, num_key_value_heads=4, qk_layernorm=True)),
        *(_tokens, 21, 21, 0, 0),
    ),
    # the norm of the embedding goes into the table, the others become RMSNorms
    "bloom": (
        lambda: hf.BloomForCausalLM(hf.BloomConfig(**_BLOOM, tie_word_embeddings=False)),
        *(_tokens, 6, 6, 0, 0),
    ),
    # what the norm in its head reads is an output too
    "siglip": (lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**_VIT)), _image, 6, 5, 0, 1),
    "transformer-encoder": (
        lambda: nn.Sequential(
            nn.Linear(16, 16),
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True),
                num_layers=2,
                enable_nested_tensor=False,
            ),
            nn.LayerNorm(16),
            nn.Linear(16, 3),
        ),
        *(lambda: randn(2, 5, 16).float(), 5, 5, 0, 0),
    ),
    # a Centre in front of the first layer: what is read there has gone through a GELU
    "whisper-encoder": (
        lambda: hf.models.whisper.modeling_whisper.WhisperEncoder(
            hf.WhisperConfig(**_SPECIAL, num_mel_bins=16, d_model=32, **_WHISPER)
        ),
        *(lambda: {"input_features": architectures._normal(2, 16, 32)}, 5, 5, 1, 1),
    ),
    "bert": (lambda: hf.BertForMaskedLM(hf.BertConfig(**architectures._ENCODER)), _tokens, 6, 0, 0, 0),
}


def made(name: str):
    make, inputs, *_ = MODELS[name]
    torch.manual_seed(0)
    return perturbed(make()), inputs()


@pytest.mark.parametrize("name", MODELS)
def test_architecture(name):
    norms, swapped, centres, shifts = MODELS[name][2:]
    result = swap(*made(name))
    assert len(verdicts(result)) == norms
    assert sum(verdict != "kept" for verdict in verdicts(result)) == swapped
    model = result.model
    assert count(model, nn.RMSNorm) == sum(verdict == "swapped" for verdict in verdicts(result))
    assert count(model, nn.LayerNorm) == norms - swapped
    assert count(model, "CentredOutput") + count(model, "CentredInput") == centres
    assert sum(hasattr(m, "shift") for m in model.modules() if isinstance(m, nn.Sequential)) == shifts


@pytest.mark.parametrize("name", ["gpt2-tied", "vit", "transformer-encoder"])
def test_validation_says_equal(name):
    module, inputs = made(name)
    result = normtool.swap(module, inputs)
    assert result.validation.verdict == "equal"
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}


def test_float32_is_as_exact_as_before():
    module, inputs = made("gpt2")
    exact = outputs(*wide(module, inputs))
    swapped = normtool.swap(module, inputs, validate=False).model
    assert error(outputs(swapped, inputs), exact) <= 2 * error(outputs(module, inputs), exact)


def test_other_lengths_than_the_example_are_right_too():
    """The positions that the example does not reach are centred with the rest of their table."""
    module, inputs = wide(*made("gpt2"))
    swapped = normtool.swap(module, inputs, validate=False).model
    longer = {"input_ids": torch.randint(5, 60, (3, 29), generator=torch.Generator().manual_seed(3))}
    assert error(outputs(swapped, longer), outputs(module, longer)) <= LIMIT


def test_tied_table_stays_tied_and_as_it_was():
    module, inputs = made("gpt2-tied")
    swapped = normtool.swap(module, inputs, validate=False).model
    assert swapped.lm_head.weight is swapped.transformer.wte.weight
    assert torch.equal(swapped.lm_head.weight, module.lm_head.weight)
    swapped.tie_weights()
    assert error(outputs(swapped, inputs), outputs(module, inputs)) < 1e-5


def test_in_place():
    module, inputs = wide(*made("vit"))
    expected, head = outputs(module, inputs), module.classifier.weight
    result = normtool.swap(module, inputs, inplace=True)
    assert result.model is module
    assert count(module, nn.RMSNorm) == 5
    assert module.classifier.weight is head
    assert error(outputs(module, inputs), expected) <= LIMIT


def test_swapped_again_it_has_no_layer_norm_left():
    module, inputs = made("vit")
    once = normtool.swap(module, inputs, validate=False).model
    twice = normtool.swap(once, inputs, validate=False)
    assert verdicts(twice) == []
    assert not twice.changed


# ---- the norm -----------------------------------------------------------------------------------------


def block(norm, **members):
    """Linear → norm → Linear."""
    return perturbed(
        Through(lambda m, x: m.b(m.norm(m.a(x))), a=nn.Linear(4, 6), norm=norm, b=nn.Linear(6, 3), **members)
    )


def test_what_is_kept_of_the_norm():
    norm = nn.LayerNorm(6, eps=0.25)
    result = swap(block(norm), randn(2, 4).float())
    swapped = result.model.norm
    assert type(swapped) is nn.RMSNorm
    assert swapped.eps == 0.25
    assert swapped.normalized_shape == (6,)
    assert swapped.weight is None  # it has gone into `b`
    assert not swapped.elementwise_affine


def test_affine_stays_where_that_is_asked_for():
    module = block(nn.LayerNorm(6))
    result = swap(module, randn(2, 4).float(), keep_affine=True)
    norm, shift = result.model.norm
    assert torch.equal(norm.weight, module.norm.weight.double())
    assert torch.equal(shift.bias, module.norm.bias.double())
    assert result.key_map == {"norm.weight": ["norm.norm.weight"], "norm.bias": ["norm.shift.bias"]}


def test_norm_without_affine():
    result = swap(block(nn.LayerNorm(6, elementwise_affine=False)), randn(2, 4).float())
    assert type(result.model.norm) is nn.RMSNorm


def test_own_norm_of_any_name():
    def normalise(m, x):
        mean = x.mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + 1e-3) * m.g + m.b

    own = Through(normalise, g=nn.Parameter(torch.ones(6)), b=nn.Parameter(torch.zeros(6)))
    result = swap(block(own), randn(2, 4).float())
    assert type(result.model.norm) is nn.RMSNorm
    assert result.model.norm.eps == 1e-3


def test_norm_that_is_called_twice():
    layers = {"a": nn.Linear(4, 6), "b": nn.Linear(6, 6), "c": nn.Linear(6, 3), "norm": nn.LayerNorm(6)}
    module = perturbed(Through(lambda m, x: m.c(m.norm(m.b(m.norm(m.a(x))))), **layers))
    result = swap(module, randn(2, 4).float())
    assert verdicts(result) == ["swapped", "swapped"]
    assert count(result.model, nn.RMSNorm) == 1


def test_norm_of_which_one_call_has_to_stay():
    layers = {"a": nn.Linear(4, 6), "b": nn.Linear(6, 3), "norm": nn.LayerNorm(6)}
    module = perturbed(Through(lambda m, x: m.b(m.norm(m.norm(m.a(x)).relu())), **layers))
    result = swap(module, randn(2, 4).float())
    assert verdicts(result) == ["kept", "kept"]
    assert "shared_parameter" in codes(result)


# ---- refused ------------------------------------------------------------------------------------------


def functional(m, x):
    return m.b(F.layer_norm(m.a(x), (6,), m.norm.weight, m.norm.bias))


def looks_at_the_bias(m, x):
    return m.b(m.norm(m.a(x))) + m.norm.bias.sum()


def looks_at_the_class(m, x):
    return m.b(m.norm(m.a(x))) + (0 if isinstance(m.norm, nn.LayerNorm) else 1)


@pytest.mark.parametrize(
    ("function", "code"),
    [
        pytest.param(functional, "no_module", id="F.layer_norm in the user's code"),
        pytest.param(looks_at_the_bias, "", id="the code reads its bias"),
        pytest.param(looks_at_the_class, "no_module", id="the code looks at its class"),
    ],
)
def test_code_that_does_not_agree(function, code):
    layers = {"a": nn.Linear(4, 6), "b": nn.Linear(6, 3), "norm": nn.LayerNorm(6)}
    result = swap(perturbed(Through(function, **layers)), randn(2, 4).float())
    assert count(result.model, nn.LayerNorm) == 1
    assert not code or code in codes(result)


def test_hook_that_would_see_the_mean():
    module = block(nn.LayerNorm(6))
    module.a.register_forward_hook(lambda m, args, output: None)
    result = swap(module, randn(2, 4).float())
    assert verdicts(result) == ["kept"]
    assert codes(result) == {"hook"}


def test_hook_on_the_norm_itself_goes_on_seeing_what_it_puts_out():
    module = block(nn.LayerNorm(6))
    seen = []
    module.norm.register_forward_hook(lambda m, args, output: seen.append(output))
    result = swap(module, randn(2, 4).float(), keep_affine=True)
    assert verdicts(result) == ["swapped"]
    seen.clear()
    x = randn(2, 4)
    outputs(module.double(), x)
    outputs(result.model, x)
    assert error([seen[1]], [seen[0]]) <= LIMIT


def large(**layers):
    """Beside which a copy of a small weight would cost little."""
    rest = {"b": nn.Linear(6, 3), "norm": nn.LayerNorm(6), "large": nn.Linear(64, 64)}
    return {"a": nn.Linear(6, 6), **rest, **layers}


def test_writer_that_another_reader_wants_as_it_is():
    module = perturbed(Through(lambda m, x: m.b(m.norm(m.a(x))) + (x @ m.a.weight).sum(), **large()))
    result = swap(module, randn(2, 6).float())
    assert verdicts(result) == ["kept"]
    assert "shared_parameter" in codes(result)


def test_weight_that_also_belongs_to_a_module_that_is_not_called():
    module = Through(lambda m, x: m.b(m.norm(m.a(x))), **large(other=nn.Linear(6, 6)))
    module.other.weight = module.a.weight
    result = swap(perturbed(module), randn(2, 6).float())
    assert verdicts(result) == ["kept"]
    assert "shared_parameter" in codes(result)


# ---- where constants are ------------------------------------------------------------------------------

WRITERS = {
    "parameter that is expanded": lambda m, x: m.a(x) + m.p.expand(2, 3, 6),
    "slice of a table of positions": lambda m, x: m.a(x) + m.table[:, :3],
    "buffer": lambda m, x: m.a(x) + m.buffer,
    "weight read transposed": lambda m, x: x @ m.a.weight.T + m.a.bias,
    "layer scale in the user's code": lambda m, x: m.a(x) * m.scale,
    "layer scale in a module": lambda m, x: m.scaled(m.a(x)),
    "embedding": lambda m, x: m.a(x) + m.embedding(torch.arange(3)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_writer(name):
    members = {
        "a": nn.Linear(4, 6),
        "p": nn.Parameter(torch.zeros(1, 1, 6)),
        "table": nn.Parameter(torch.zeros(1, 9, 6)),
        "scale": nn.Parameter(torch.ones(6)),
        "scaled": Through(lambda m, x: x * m.gamma, gamma=nn.Parameter(torch.ones(6))),
        "embedding": nn.Embedding(3, 6),
        **{"b": nn.Linear(6, 3), "norm": nn.LayerNorm(6)},
    }
    module = Through(lambda m, x: m.b(m.norm(WRITERS[name](m, x))), **members)
    module.register_buffer("buffer", torch.zeros(3, 6))
    result = swap(perturbed(module), randn(2, 3, 4).float())
    assert verdicts(result) == ["swapped"]
    assert count(result.model, nn.Identity) == (name == "layer scale in a module")


# ---- Centres ------------------------------------------------------------------------------------------


def two_norms(function):
    layers = {"b": nn.Linear(6, 3), "c": nn.Linear(6, 3), "n": nn.LayerNorm(6), "o": nn.LayerNorm(6)}
    act = Through(lambda m, x: m.lin(x).relu(), lin=nn.Linear(4, 6))
    pair = Through(lambda m, x, scale=1: m.b(m.n(x)) + scale * m.c(m.o(x)), **layers)
    return perturbed(Through(function, act=act, pair=pair))


def test_centre_behind_the_module_that_puts_it_out():
    result = swap(two_norms(lambda m, x: m.pair(m.act(x), scale=2)), randn(2, 4).float())
    assert verdicts(result) == ["swapped", "swapped"]
    assert type(result.model.act).__name__ == "CentredOutput"
    assert result.model.act.lin is result.model.act.layer.lin  # its attributes are there as before
    assert result.key_map["act.lin.weight"] == ["act.layer.lin.weight"]


def test_centre_in_front_of_the_module_that_takes_it_in():
    def also_returned(m, x):
        h = m.act(x)
        return m.pair(h, scale=2), h

    result = swap(two_norms(also_returned), randn(2, 4).float())
    assert verdicts(result) == ["swapped", "swapped"]
    assert type(result.model.pair).__name__ == "CentredInput"


def test_centre_without_a_place():
    def own_code(m, x):
        h = m.act(x)
        return m.pair.b(m.pair.n(h)) + m.pair.c(m.pair.o(h)), h

    result = swap(two_norms(own_code), randn(2, 4).float())
    assert verdicts(result) == ["kept", "kept"]
    assert "no_module" in codes(result)


def test_trial_notices_a_centre_that_is_missing(monkeypatch):
    give_way = swap_trial.give_way
    monkeypatch.setattr(swap_trial, "give_way", lambda root, heirs, centres: give_way(root, heirs, {}))
    result = swap(two_norms(lambda m, x: m.pair(m.act(x))), randn(2, 4).float())
    assert verdicts(result) == ["kept", "kept"]


def test_whole_module_can_be_saved():
    module, inputs = made("gpt2-tied")
    swapped = normtool.swap(module, inputs, validate=False).model
    file = io.BytesIO()
    torch.save(swapped, file)
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = torch.load(file, weights_only=False)
    assert error(outputs(again, inputs), outputs(swapped, inputs)) == 0


# ---- outputs of a program -----------------------------------------------------------------------------


def clip():
    torch.manual_seed(0)
    module = perturbed(hf.CLIPVisionModel(hf.CLIPVisionConfig(**_VIT)))
    return module, _image()


def test_outputs_decide_what_is_observed(tmp_path):
    module, inputs = clip()
    program = export(module, Example(kwargs=inputs))
    assert verdicts(normtool.swap(program, validate=False)).count("swapped") == 1
    result = normtool.swap(program, outputs=["pooler_output"])
    assert verdicts(result) == ["swapped"] * 6
    assert result.validation.verdict == "equal"
    result.save(tmp_path / "pooled.pt2")
    again = torch.export.load(tmp_path / "pooled.pt2").module()(**inputs)
    assert list(again) == ["pooler_output"]
    assert error([again.pooler_output], [module(**inputs).pooler_output]) < 1e-5


@pytest.mark.parametrize("name", ["output.1.0", "node"])
def test_output_of_a_tuple(name):
    layers = {"a": nn.Linear(4, 6), "b": nn.Linear(6, 3), "norm": nn.LayerNorm(6)}
    module = perturbed(Through(lambda m, x: (m.a(x).sum(-1), (m.b(m.norm(m.a(x))), x)), **layers))
    x = randn(2, 4).float()
    program = export(module, Example((x,)))
    names = {"node": str(program.graph_signature.user_outputs[1])}
    result = normtool.swap(program, outputs=[names.get(name, name)])
    assert verdicts(result) == ["swapped"]
    (got,) = result.model.module()(x)
    assert error([got], [module(x)[1][0]]) < 1e-5


def test_names_of_outputs_are_listed():
    module, inputs = clip()
    with pytest.raises(UsageError, match=r"no output is called 'nope'.*last_hidden_state"):
        normtool.swap(export(module, Example(kwargs=inputs)), outputs=["nope"])
    with pytest.raises(UsageError, match="wrap it"):
        normtool.swap(module, inputs, outputs=["pooler_output"])

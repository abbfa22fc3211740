"""Published architectures with LayerNorms, and what `swap` has to say of each.

The structure is the true one; layers are few and widths small. Default initialisation (γ = 1, β = 0, embeddings
without a mean) would hide a wrong swap: at γ = 1 and β = 0 even a post-norm transformer seems to swap, to 3e-6.
So every number is drawn, and `refuse_default_initialisation` looks at what was forgotten.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Expected:
    """Of so many LayerNorms, so many are swapped, with so many Centres; `folded` of them into a table.

    `kept`: (reason code, part of the message), one for every kind of reason that speaks against the others.
    """

    norms: int
    swapped: int
    centres: int = 0
    folded: int = 0
    kept: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class SwapModel:
    """A model to build, the keyword arguments to call it with, and what swap makes of it."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    expected: Expected
    #: options of swap
    options: Mapping[str, Any] = field(default_factory=dict)
    #: takes a second or two where the others take ten
    quick: bool = False
    #: of an exported program, where that is another answer: there a head is tied to the table still (the ONNX
    #: exporter stores it once more, transposed), which so small a model does not copy; or a norm is left whose
    #: output nobody reads
    program: Expected | None = None

    def __str__(self) -> str:
        return self.name

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        module = self.build().eval()
        perturb(module, self.name)
        refuse_default_initialisation(module)
        return module


# ---- perturbation -------------------------------------------------------------------------------------


def perturb(module: nn.Module, name: str) -> None:
    """Draw every parameter anew, in place, none with a mean of 0, seeded by `name`."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def normal(tensor: Tensor, std: float, mean: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)

    with torch.no_grad():
        for part in module.modules():
            for key, tensor in part.named_parameters(recurse=False):
                if is_norm(part):
                    normal(tensor, 0.3, 1.0 if key == "weight" else 0.2)
                elif isinstance(part, nn.Embedding):
                    normal(tensor, 0.7, 0.3)  # padding too: a row of zeros has no mean to lose
                elif tensor.dim() >= 2 and "weight" in key:
                    fan_in = tensor.shape[0] if type(part).__name__ == "Conv1D" else tensor[0].numel()
                    normal(tensor, 0.8 / fan_in**0.5, 0.2 / fan_in)
                elif "bias" in key:
                    normal(tensor, 0.3, 0.1)
                else:  # class tokens, position parameters, layer scales, gates
                    normal(tensor, 0.4, 0.5)


def is_norm(module: nn.Module) -> bool:
    return "LayerNorm" in type(module).__name__


def refuse_default_initialisation(module: nn.Module) -> None:
    """Raises ValueError where a LayerNorm has γ = 1 or β = 0, or a bias or an embedding has no mean."""
    for name, part in module.named_modules():
        gamma, beta = (getattr(part, key, None) for key in ("weight", "bias"))
        if is_norm(part) and gamma is not None and bool((gamma - 1).abs().median() < 1e-2):
            raise ValueError(f"{name}: γ = 1")
        if beta is not None and bool(beta.abs().max() < 1e-2):
            raise ValueError(f"{name}: its bias is 0")
        if isinstance(part, nn.Embedding) and bool(part.weight.mean(-1).abs().max() < 1e-2):
            raise ValueError(f"{name}: an embedding without a mean")


# ---- inputs -------------------------------------------------------------------------------------------

_VOCABULARY = 64


def _normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _tokens(*names: str, length: int = 10) -> Callable[[], Inputs]:
    def inputs() -> Inputs:
        generator = torch.Generator().manual_seed(1)
        return {
            name: torch.randint(5, _VOCABULARY, (2, length), generator=generator)
            for name in ("input_ids", *names)
        }

    return inputs


def _image(size: int) -> Callable[[], Inputs]:
    return lambda: {"pixel_values": _normal(2, 3, size, size)}


# ---- pieces of configurations -------------------------------------------------------------------------

_SPECIAL = {"vocab_size": _VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ENCODER = {
    **_SPECIAL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
_DECODER = {**_ENCODER, "use_cache": False}
_VIT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_SEQ2SEQ = {
    **_SPECIAL,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 32,
    "decoder_start_token_id": 2,
    "use_cache": False,
}
_EAGER = {"attn_implementation": "eager"}
_SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 8, "num_labels": 5}
_WHISPER = {
    **_SPECIAL,
    "num_mel_bins": 8,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_source_positions": 12,
    "max_target_positions": 8,
    "decoder_start_token_id": 2,
}


class _WhisperEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = hf.WhisperModel(hf.WhisperConfig(**_WHISPER)).encoder

    def forward(self, input_features: Tensor) -> Tensor:
        return self.encoder(input_features).last_hidden_state  # type: ignore[no-any-return]


class _NormFirst(nn.Module):
    """torch's own encoder, with and without a final norm it is the reader's choice; here it has one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 48, norm_first=True, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32), enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)))  # type: ignore[no-any-return]


def _gpt2(layers: int = 2) -> nn.Module:
    config = hf.GPT2Config(**_SPECIAL, n_positions=32, n_embd=32, n_layer=layers, n_head=4, use_cache=False)
    return hf.GPT2LMHeadModel(config)


def _clip() -> nn.Module:
    return hf.CLIPVisionModel(hf.CLIPVisionConfig(**_VIT))


#: A stream that a LayerNorm with a γ of its own begins: what it writes has a mean, and nothing can take it out.
_POST_NORM = ("not_centrable", "scales every number of the block by another γ")

# ---- the models ---------------------------------------------------------------------------------------

MODELS: tuple[SwapModel, ...] = (
    # ---- all of them, for free
    SwapModel("gpt2", _gpt2, _tokens(), Expected(5, 5), quick=True, program=Expected(5, 5, centres=1)),
    SwapModel(
        "opt",
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                **_SPECIAL,
                hidden_size=32,
                word_embed_proj_dim=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=32,
                use_cache=False,
            )
        ),
        _tokens(),
        Expected(5, 5),
        program=Expected(5, 5, centres=1),
    ),
    SwapModel(
        "vit",
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**_VIT, num_labels=5)),
        _image(32),
        Expected(5, 5),
        quick=True,
    ),
    SwapModel(
        "dinov2",
        lambda: hf.Dinov2ForImageClassification(
            hf.Dinov2Config(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=32,
                patch_size=8,
                num_labels=5,
            )
        ),
        _image(32),
        Expected(5, 5),
    ),
    SwapModel(
        "gpt_neox",
        lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_DECODER)),
        _tokens(),
        Expected(5, 5),
    ),
    SwapModel("phi", lambda: hf.PhiForCausalLM(hf.PhiConfig(**_DECODER)), _tokens(), Expected(3, 3)),
    SwapModel(
        "phi_heads",
        lambda: hf.PhiForCausalLM(hf.PhiConfig(**_DECODER, qk_layernorm=True)),
        _tokens(),
        Expected(7, 7),
    ),
    SwapModel(
        "falcon",
        lambda: hf.FalconForCausalLM(
            hf.FalconConfig(
                **_SPECIAL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, use_cache=False
            )
        ),
        _tokens(),
        Expected(3, 3),
        program=Expected(3, 3, centres=1),
    ),
    SwapModel(
        "bloom",
        lambda: hf.BloomForCausalLM(
            hf.BloomConfig(**_SPECIAL, hidden_size=32, n_layer=2, n_head=4, use_cache=False)
        ),
        _tokens(),
        Expected(6, 6, folded=1),
        program=Expected(6, 5, centres=1),
    ),
    SwapModel(
        "stablelm_heads",
        lambda: hf.StableLmForCausalLM(hf.StableLmConfig(**_DECODER, num_key_value_heads=4, qk_layernorm=True)),
        _tokens(),
        Expected(21, 21),
    ),
    SwapModel(
        "stablelm",
        lambda: hf.StableLmForCausalLM(hf.StableLmConfig(**_DECODER, num_key_value_heads=2)),
        _tokens(),
        Expected(5, 5),
    ),
    SwapModel(
        "siglip",
        lambda: hf.SiglipForImageClassification(hf.SiglipConfig(vision_config=_VIT, num_labels=5)),
        _image(32),
        Expected(5, 5),
        program=Expected(6, 6),
    ),
    SwapModel(
        "m2m_100",
        lambda: hf.M2M100ForConditionalGeneration(hf.M2M100Config(**_SEQ2SEQ)),
        _tokens("decoder_input_ids"),
        Expected(12, 12),
    ),
    SwapModel(
        "transformer_encoder",
        _NormFirst,
        lambda: {"x": _normal(2, 6, 12)},
        Expected(5, 5),
        quick=True,
    ),
    # ---- nearly all, or with a Centre or two
    SwapModel(
        "swinv2",
        lambda: hf.Swinv2ForImageClassification(
            hf.Swinv2Config(
                **_SWIN,
                depths=[2, 2, 6, 2],
                num_heads=[1, 2, 4, 8],
                window_size=4,
                pretrained_window_sizes=[0, 0, 0, 0],
            )
        ),
        _image(64),
        Expected(29, 28, kept=(_POST_NORM, ("observed_mean", "(MatMul) sees the mean"))),
    ),
    SwapModel(
        "whisper_encoder",
        _WhisperEncoder,
        lambda: {"input_features": _normal(2, 8, 24)},
        Expected(5, 5, centres=1),
        quick=True,
    ),
    SwapModel(
        "clip_pooled",
        _clip,
        _image(32),
        Expected(6, 6, centres=1),
        {"outputs": ("pooler_output",)},
        quick=True,
    ),
    SwapModel(
        "mbart",
        lambda: hf.MBartForConditionalGeneration(
            hf.MBartConfig(**{**_SEQ2SEQ, "encoder_layers": 4, "decoder_layers": 4})
        ),
        _tokens("decoder_input_ids"),
        Expected(24, 24, centres=2),
    ),
    SwapModel(
        "segformer",
        lambda: hf.SegformerForSemanticSegmentation(
            hf.SegformerConfig(
                hidden_sizes=[8, 16, 24, 32],
                num_attention_heads=[1, 2, 4, 8],
                decoder_hidden_size=16,
                num_labels=5,
            )
        ),
        _image(64),
        Expected(30, 30, centres=4),
    ),
    # ---- kept, with whoever observes the mean
    SwapModel(
        "clip",
        _clip,
        _image(32),
        Expected(6, 1, kept=(_POST_NORM, ("observed_mean", "'last_hidden_state' is an output"))),
    ),
    SwapModel(
        "bert",
        lambda: hf.BertModel(hf.BertConfig(**{**_ENCODER, "num_hidden_layers": 12})),
        _tokens(),
        Expected(25, 1, kept=(_POST_NORM,)),
    ),
    SwapModel(
        "roberta",
        lambda: hf.RobertaModel(hf.RobertaConfig(**_ENCODER)),
        _tokens(),
        Expected(5, 1, kept=(_POST_NORM,)),
        quick=True,
    ),
    SwapModel(
        "swin",
        lambda: hf.SwinForImageClassification(
            hf.SwinConfig(**_SWIN, depths=[2, 2, 6, 2], num_heads=[1, 2, 4, 8], window_size=2, **_EAGER)
        ),
        _image(64),
        Expected(
            29,
            6,
            kept=(
                _POST_NORM,
                ("observed_mean", "(Concat) sees the mean"),
                ("axis_mismatch", "(Concat) joins parts along that axis"),
            ),
        ),
    ),
    SwapModel(
        "convnext",
        lambda: hf.ConvNextForImageClassification(
            hf.ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[3, 3, 9, 3], num_labels=5)
        ),
        _image(64),
        Expected(
            23,
            1,
            kept=(
                ("not_centrable", "groups of channels, and the mean is over all"),
                ("observed_mean", "(Conv) sees the mean"),
            ),
        ),
    ),
    SwapModel(
        "beit",
        lambda: hf.BeitModel(hf.BeitConfig(**_VIT, **_EAGER), add_pooling_layer=False),
        _image(32),
        Expected(4, 0, kept=(("observed_mean", "'last_hidden_state' is an output"),)),
    ),
)

"""Published architectures from transformers: few layers, small widths, true structure, nothing downloaded.

Each is built from its configuration and then perturbed. Default initialisation hides nearly every folding bug
(γ = 1, β = 0, μ = 0, σ² = 1), and weights of standard deviation 0.02 let a deep model forget its input, so that
a wrong fold early in it would not show in the output.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """A model to build, the keyword arguments to call it with, and how many BatchNorms it holds."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    batch_norms: int

    def __str__(self) -> str:
        return self.name


# ---- perturbation -----------------------------------------------------------------------------


def is_batch_norm(module: nn.Module) -> bool:
    """Holds running statistics: torch's BatchNorms and the frozen ones that detection models define."""
    return {"running_mean", "running_var"} <= dict(module.named_buffers(recurse=False)).keys()


def perturb(module: nn.Module, name: str) -> None:
    """Take every weight, bias and statistic away from its initial value, in place, seeded by `name`."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    with torch.no_grad():
        for part in module.modules():
            if is_batch_norm(part):
                _perturb_batch_norm(part, generator)
            elif "Norm" in type(part).__name__:
                # added rather than set: some norms multiply by 1 + weight, and start from weight = 0
                for tensor in part.parameters(recurse=False):
                    tensor += 0.2 * torch.randn(tensor.shape, generator=generator)
            else:
                _perturb_layer(part, generator)


def _perturb_batch_norm(norm: Any, generator: torch.Generator) -> None:
    size = norm.running_mean.shape
    norm.running_mean.copy_(0.5 * torch.randn(size, generator=generator))
    norm.running_var.copy_(0.5 + 1.5 * torch.rand(size, generator=generator))
    if norm.weight is not None:
        sign = 1 - 2 * (torch.rand(size, generator=generator) < 0.3).float()
        norm.weight.copy_(sign * (0.5 + torch.rand(size, generator=generator)))
        norm.bias.copy_(0.5 * torch.randn(size, generator=generator))


def _perturb_layer(layer: nn.Module, generator: torch.Generator) -> None:
    for key, tensor in layer.named_parameters(recurse=False):
        if key == "weight" and isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
            # He's size where a ReLU is likely to follow: the signal neither dies nor saturates with depth
            output_axis = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
            fan_in = tensor.numel() // tensor.shape[output_axis]
            gain = 1 if isinstance(layer, nn.Linear) else 2**0.5
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * gain / fan_in**0.5)
        elif "bias" in key and tensor.dim() == 1:
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)


# ---- inputs -----------------------------------------------------------------------------------


def _normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _image(size: int, channels: int = 3) -> Callable[[], Inputs]:
    # an image differs from the next in its mean too, or little of it would be left after global pooling
    return lambda: {"pixel_values": _normal(2, channels, size, size) + _normal(2, channels, 1, 1, seed=2)}


def _sound(samples: int) -> Callable[[], Inputs]:
    return lambda: {"input_values": _normal(2, samples)}


def _frames(count: int, width: int) -> Callable[[], Inputs]:
    return lambda: {"input_features": _normal(2, count, width)}


def _series(length: int, channels: int) -> Callable[[], Inputs]:
    return lambda: {"past_values": _normal(2, length, channels)}


def _tokens(length: int = 12, *names: str) -> Callable[[], Inputs]:
    """Token ids for `input_ids` and for each of `names`; none of them is a special token."""

    def inputs() -> Inputs:
        generator = torch.Generator().manual_seed(1)
        return {
            name: torch.randint(5, _VOCABULARY, (2, length), generator=generator)
            for name in ("input_ids", *names)
        }

    return inputs


def _whisper_inputs() -> Inputs:
    return {"input_features": _normal(2, 16, 32), "decoder_input_ids": _tokens(6)()["input_ids"]}


def _speecht5_inputs() -> Inputs:
    return {
        **_tokens(10)(),
        "decoder_input_values": _normal(2, 6, 12),
        "speaker_embeddings": _normal(2, 8),
    }


# ---- pieces of configurations -----------------------------------------------------------------

_VOCABULARY = 64
# for attention with a bias of floats: its fused form exports, but torch.onnx.export cannot take that apart
_EAGER = {"attn_implementation": "eager"}
# ids inside the small vocabulary, for the families whose defaults lie outside it
_SPECIAL = {"vocab_size": _VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {
    **_SPECIAL,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "use_cache": False,
}
_ENCODER = {key: value for key, value in _DECODER.items() if key != "use_cache"}
_VIT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_PYRAMID = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
_SPEECH = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": [16, 16, 16],
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 2],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
}
_DETECTION = {
    "d_model": 32,
    "num_queries": 6,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_labels": 5,
}
_REAL_TIME_DETECTION = {
    **_DETECTION,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [24, 32, 40],
    "decoder_in_channels": [32, 32, 32],
    "decoder_n_points": 2,
    "num_denoising": 0,
}


def _resnet(**options: Any) -> hf.ResNetConfig:
    return hf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 24, 32, 40], depths=[1, 2, 1, 1], **options)


def _hgnet(**options: Any) -> hf.HGNetV2Config:
    return hf.HGNetV2Config(
        stem_channels=[3, 8, 12],
        stage_in_channels=[12, 16, 24, 32],
        stage_mid_channels=[8, 12, 12, 16],
        stage_out_channels=[16, 24, 32, 40],
        stage_num_blocks=[1, 1, 2, 1],
        stage_numb_of_layers=[2, 2, 2, 2],
        hidden_sizes=[16, 24, 32, 40],
        **options,
    )


def _detr_backbone() -> hf.ResNetConfig:
    return _resnet(out_features=["stage4"])


def _beit_segmentation() -> hf.BeitConfig:
    return hf.BeitConfig(
        **{**_VIT, **_EAGER, "num_hidden_layers": 4},
        out_features=["stage1", "stage2", "stage3", "stage4"],
        layer_scale_init_value=1.0,
        use_relative_position_bias=True,
        pool_scales=[1, 2],
        auxiliary_channels=16,
        num_labels=5,
        reshape_hidden_states=True,
    )


# ---- the architectures ------------------------------------------------------------------------


def _row(
    name: str, build: Callable[[], nn.Module], inputs: Callable[[], Inputs], batch_norms: int
) -> Architecture:
    def make() -> nn.Module:
        torch.manual_seed(0)
        module = build().eval()
        perturb(module, name)
        return module

    return Architecture(name, make, inputs, batch_norms)


# The last column is the number of BatchNorms. A layer scale that starts near 0 is set to 1: it would hide the
# branch it scales.
ARCHITECTURES: tuple[Architecture, ...] = (
    # ---- convolutional, with BatchNorm --------------------------------------------------------
    _row("resnet", lambda: hf.ResNetForImageClassification(_resnet(num_labels=5)), _image(64), 20),
    _row(
        "resnet_basic",
        lambda: hf.ResNetForImageClassification(
            _resnet(layer_type="basic", downsample_in_first_stage=True, num_labels=5)
        ),
        _image(64),
        15,
    ),
    _row(
        "regnet_y",
        lambda: hf.RegNetForImageClassification(
            hf.RegNetConfig(**_PYRAMID, embedding_size=8, groups_width=8, num_labels=5)
        ),
        _image(64),
        20,
    ),
    _row(
        "regnet_x",
        lambda: hf.RegNetForImageClassification(
            hf.RegNetConfig(**_PYRAMID, embedding_size=8, groups_width=8, layer_type="x", num_labels=5)
        ),
        _image(64),
        20,
    ),
    _row(
        "mobilenet_v1",
        lambda: hf.MobileNetV1ForImageClassification(hf.MobileNetV1Config(depth_multiplier=0.25, num_labels=5)),
        _image(64),
        27,
    ),
    _row(
        "mobilenet_v2",
        lambda: hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config(depth_multiplier=0.25, num_labels=5)),
        _image(64),
        52,
    ),
    _row(
        "mobilenet_v2_deeplab",
        lambda: hf.MobileNetV2ForSemanticSegmentation(
            hf.MobileNetV2Config(depth_multiplier=0.25, output_stride=8, num_labels=5)
        ),
        _image(64),
        55,
    ),
    _row(
        "efficientnet",
        lambda: hf.EfficientNetForImageClassification(
            hf.EfficientNetConfig(
                width_coefficient=0.25,
                depth_coefficient=1.0,
                kernel_sizes=[3, 3, 5, 3],
                in_channels=[32, 16, 24, 40],
                out_channels=[16, 24, 40, 80],
                strides=[1, 2, 2, 2],
                expand_ratios=[1, 6, 6, 6],
                num_block_repeats=[1, 2, 1, 1],
                hidden_dim=320,
                image_size=64,
                num_labels=5,
            )
        ),
        _image(64),
        16,
    ),
    _row("hgnet_v2", lambda: hf.HGNetV2ForImageClassification(_hgnet(num_labels=5)), _image(64), 34),
    _row(
        "hgnet_v2_learnable_affine",
        lambda: hf.HGNetV2ForImageClassification(_hgnet(use_learnable_affine_block=True, num_labels=5)),
        _image(64),
        34,
    ),
    _row(
        "textnet",
        lambda: hf.TextNetForImageClassification(
            hf.TextNetConfig(
                stem_out_channels=8,
                hidden_sizes=[8, 8, 16, 24, 32],
                conv_layer_kernel_sizes=[[[3, 3], [3, 3]], [[3, 3], [1, 3]], [[3, 3], [3, 1]], [[3, 3]]],
                conv_layer_strides=[[1, 2], [2, 1], [2, 1], [2]],
                num_labels=5,
            )
        ),
        _image(64),
        23,
    ),
    _row(
        "pp_lcnet",
        lambda: hf.PPLCNetForImageClassification(
            hf.PPLCNetConfig(
                scale=0.5,
                block_configs=[
                    [[3, 16, 32, 1, False]],
                    [[3, 32, 64, 2, False]],
                    [[3, 64, 128, 2, False], [3, 128, 128, 1, False]],
                    [[5, 128, 128, 2, False]],
                    [[5, 128, 128, 2, True]],
                ],
                class_expand=64,
                num_labels=5,
            )
        ),
        _image(64),
        13,
    ),
    _row(
        "uvdoc",
        lambda: hf.UVDocModel(
            hf.UVDocConfig(
                backbone_config=hf.UVDocBackboneConfig(
                    resnet_head=[[3, 8], [8, 8]],
                    resnet_configs=[
                        [[8, 8, 1, False], [8, 8, 3, False]],
                        [[8, 16, 1, True], [16, 16, 3, False]],
                    ],
                    stage_configs=[[[16, 1]], [[16, 2]], [[16, 5]], [[16, 3], [16, 2]]],
                    out_features=["stage1", "stage2", "stage3", "stage4"],
                ),
                bridge_connector=[16, 16],
                out_point_positions2D=[[16, 8], [8, 2]],
            )
        ),
        _image(64),
        18,
    ),
    # ---- convolutional, with other norms ------------------------------------------------------
    _row(
        "bit",
        lambda: hf.BitForImageClassification(
            hf.BitConfig(
                embedding_size=8, hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1], num_groups=4, num_labels=5
            )
        ),
        _image(64),
        0,
    ),
    _row(
        "convnext",
        lambda: hf.ConvNextForImageClassification(
            hf.ConvNextConfig(**_PYRAMID, layer_scale_init_value=1.0, num_labels=5)
        ),
        _image(64),
        0,
    ),
    _row(
        "convnextv2",
        lambda: hf.ConvNextV2ForImageClassification(hf.ConvNextV2Config(**_PYRAMID, num_labels=5)),
        _image(64),
        0,
    ),
    _row(
        "poolformer",
        lambda: hf.PoolFormerForImageClassification(
            hf.PoolFormerConfig(**_PYRAMID, layer_scale_init_value=1.0, num_labels=5)
        ),
        _image(64),
        0,
    ),
    _row(
        "focalnet",
        lambda: hf.FocalNetForImageClassification(
            hf.FocalNetConfig(image_size=64, embed_dim=16, num_labels=5, **_PYRAMID, use_conv_embed=True)
        ),
        _image(64),
        0,
    ),
    # ---- hybrids of convolution and attention -------------------------------------------------
    _row(
        "levit",
        lambda: hf.LevitForImageClassificationWithTeacher(
            hf.LevitConfig(
                image_size=64,
                hidden_sizes=[32, 48, 64],
                num_attention_heads=[2, 3, 4],
                depths=[1, 1, 1],
                key_dim=[8, 8, 8],
                num_labels=5,
            )
        ),
        _image(64),
        28,
    ),
    _row(
        "mobilevit",
        lambda: hf.MobileViTForImageClassification(
            hf.MobileViTConfig(
                image_size=64,
                hidden_sizes=[16, 24, 32],
                neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 64],
                num_labels=5,
            )
        ),
        _image(64),
        32,
    ),
    _row(
        "mobilevit_deeplab",
        lambda: hf.MobileViTForSemanticSegmentation(
            hf.MobileViTConfig(
                image_size=64,
                hidden_sizes=[16, 24, 32],
                neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 64],
                aspp_out_channels=16,
                output_stride=16,
                num_labels=5,
            )
        ),
        _image(64),
        37,
    ),
    _row(
        "mobilevitv2",
        lambda: hf.MobileViTV2ForImageClassification(
            hf.MobileViTV2Config(
                image_size=64,
                width_multiplier=0.25,
                base_attn_unit_dims=[64, 64, 64],
                n_attn_blocks=[1, 1, 1],
                num_labels=5,
            )
        ),
        _image(64),
        25,
    ),
    _row(
        "swiftformer",
        lambda: hf.SwiftFormerForImageClassification(
            hf.SwiftFormerConfig(
                image_size=64,
                depths=[1, 1, 1, 1],
                embed_dims=[8, 16, 24, 32],
                layer_scale_init_value=1.0,
                num_labels=5,
            )
        ),
        _image(64),
        14,
    ),
    _row(
        "cvt",
        lambda: hf.CvtForImageClassification(
            hf.CvtConfig(embed_dim=[16, 24, 32], num_heads=[1, 2, 4], depth=[1, 2, 3], num_labels=5)
        ),
        _image(64),
        18,
    ),
    # ---- segmentation, depth, matting, poses: dense heads -------------------------------------
    _row(
        "segformer",
        lambda: hf.SegformerForSemanticSegmentation(
            hf.SegformerConfig(
                **{**_PYRAMID, "depths": [1, 1, 1, 1]},
                num_attention_heads=[1, 2, 2, 4],
                decoder_hidden_size=16,
                num_labels=5,
            )
        ),
        _image(64),
        1,
    ),
    _row(
        "upernet_convnext",
        lambda: hf.UperNetForSemanticSegmentation(
            hf.UperNetConfig(
                backbone_config=hf.ConvNextConfig(
                    **_PYRAMID,
                    layer_scale_init_value=1.0,
                    out_features=["stage1", "stage2", "stage3", "stage4"],
                ),
                hidden_size=16,
                pool_scales=[1, 2],
                auxiliary_in_channels=24,
                auxiliary_channels=8,
                num_labels=5,
            )
        ),
        _image(64),
        11,
    ),
    _row(
        "upernet_resnet",
        lambda: hf.UperNetForSemanticSegmentation(
            hf.UperNetConfig(
                backbone_config=_resnet(out_features=["stage1", "stage2", "stage3", "stage4"]),
                hidden_size=16,
                pool_scales=[1, 2],
                auxiliary_in_channels=32,
                auxiliary_channels=8,
                num_labels=5,
            )
        ),
        _image(64),
        31,
    ),
    _row("beit_upernet", lambda: hf.BeitForSemanticSegmentation(_beit_segmentation()), _image(32), 12),
    _row(
        "dpt",
        lambda: hf.DPTForDepthEstimation(
            hf.DPTConfig(
                **{**_VIT, "num_hidden_layers": 4},
                backbone_out_indices=[0, 1, 2, 3],
                neck_hidden_sizes=[8, 16, 24, 32],
                fusion_hidden_size=16,
                use_batch_norm_in_fusion_residual=True,
            )
        ),
        _image(32),
        16,
    ),
    _row(
        "vitmatte",
        lambda: hf.VitMatteForImageMatting(
            hf.VitMatteConfig(
                backbone_config=hf.VitDetConfig(
                    hidden_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    image_size=64,
                    pretrain_image_size=64,
                    num_channels=4,
                    window_block_indices=[0],
                    residual_block_indices=[1],
                    use_relative_position_embeddings=True,
                    window_size=2,
                    out_features=["stage2"],
                ),
                hidden_size=32,
                convstream_hidden_sizes=[8, 12, 16],
                fusion_hidden_sizes=[24, 16, 12, 8],
            )
        ),
        _image(64, channels=4),
        8,
    ),
    _row(
        "vitpose",
        lambda: hf.VitPoseForPoseEstimation(
            hf.VitPoseConfig(
                backbone_config=hf.VitPoseBackboneConfig(
                    hidden_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    image_size=[32, 32],
                    patch_size=[8, 8],
                    out_features=["stage2"],
                ),
                use_simple_decoder=False,
                num_labels=5,
            )
        ),
        _image(32),
        2,
    ),
    # ---- detection ----------------------------------------------------------------------------
    _row(
        "detr",
        lambda: hf.DetrForObjectDetection(hf.DetrConfig(backbone_config=_detr_backbone(), **_DETECTION)),
        _image(64),
        20,
    ),
    _row(
        "conditional_detr",
        lambda: hf.ConditionalDetrForObjectDetection(
            hf.ConditionalDetrConfig(backbone_config=_detr_backbone(), **_DETECTION)
        ),
        _image(64),
        20,
    ),
    _row(
        "rt_detr",
        lambda: hf.RTDetrForObjectDetection(
            hf.RTDetrConfig(
                backbone_config=hf.RTDetrResNetConfig(
                    embedding_size=8,
                    hidden_sizes=[16, 24, 32, 40],
                    depths=[1, 1, 1, 1],
                    out_features=["stage2", "stage3", "stage4"],
                ),
                **_REAL_TIME_DETECTION,
            )
        ),
        _image(64),
        61,
    ),
    _row(
        "d_fine",
        lambda: hf.DFineForObjectDetection(
            hf.DFineConfig(
                backbone_config=_hgnet(out_features=["stage2", "stage3", "stage4"]),
                freeze_backbone_batch_norms=False,
                **_REAL_TIME_DETECTION,
            )
        ),
        _image(64),
        123,
    ),
    # ---- speech and sound ---------------------------------------------------------------------
    _row(
        "wav2vec2_conformer",
        lambda: hf.Wav2Vec2ConformerForCTC(
            hf.Wav2Vec2ConformerConfig(
                **_SPEECH, **_EAGER, conv_depthwise_kernel_size=7, max_source_positions=64
            )
        ),
        _sound(640),
        2,
    ),
    _row(
        "hubert_batch_norm",
        lambda: hf.HubertForCTC(hf.HubertConfig(**_SPEECH, conv_pos_batch_norm=True)),
        _sound(640),
        1,
    ),
    _row(
        "parakeet",
        lambda: hf.ParakeetForCTC(
            hf.ParakeetCTCConfig(
                vocab_size=16,
                pad_token_id=15,
                encoder_config={
                    "hidden_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "intermediate_size": 64,
                    "subsampling_conv_channels": 8,
                    "num_mel_bins": 16,
                    "max_position_embeddings": 64,
                },
                **_EAGER,
            )
        ),
        _frames(64, 16),
        2,
    ),
    _row(
        "seamless_m4t_speech",
        lambda: hf.SeamlessM4TForSpeechToText(
            hf.SeamlessM4TConfig(
                **_SPECIAL,
                **_EAGER,
                hidden_size=32,
                decoder_layers=1,
                decoder_ffn_dim=48,
                decoder_attention_heads=4,
                encoder_layers=1,
                encoder_ffn_dim=48,
                encoder_attention_heads=4,
                speech_encoder_layers=2,
                speech_encoder_attention_heads=4,
                speech_encoder_intermediate_size=48,
                feature_projection_input_dim=16,
                adaptor_kernel_size=4,
                adaptor_stride=4,
                conv_depthwise_kernel_size=7,
                max_source_positions=64,
                use_cache=False,
            )
        ),
        lambda: {"input_features": _normal(2, 32, 16), "decoder_input_ids": _tokens(6)()["input_ids"]},
        2,
    ),
    _row(
        "speecht5",
        lambda: hf.SpeechT5ForTextToSpeech(
            hf.SpeechT5Config(
                **_SPECIAL,
                hidden_size=32,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                num_mel_bins=12,
                speech_decoder_prenet_units=16,
                # this dropout works in eval mode too: 0 makes the outputs a function of the inputs
                speech_decoder_prenet_dropout=0.0,
                speaker_embedding_dim=8,
                speech_decoder_postnet_units=16,
                max_speech_positions=32,
                max_text_positions=32,
                use_cache=False,
            )
        ),
        _speecht5_inputs,
        5,
    ),
    _row(
        "clap_audio",
        lambda: hf.ClapAudioModelWithProjection(
            hf.ClapAudioConfig(
                window_size=4,
                num_mel_bins=16,
                spec_size=64,
                hidden_size=32,
                projection_dim=16,
                depths=[1, 1],
                num_attention_heads=[2, 4],
                num_hidden_layers=2,
                patch_embeds_hidden_size=16,
            )
        ),
        lambda: {"input_features": _normal(2, 1, 256, 16)},
        1,
    ),
    _row("wav2vec2", lambda: hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**_SPEECH)), _sound(640), 0),
    _row(
        "sew",
        lambda: hf.SEWForCTC(hf.SEWConfig(**_SPEECH)),
        _sound(640),
        0,
    ),
    _row(
        "whisper",
        lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(
                **_SPECIAL,
                num_mel_bins=16,
                d_model=32,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                max_source_positions=16,
                max_target_positions=16,
                decoder_start_token_id=3,
                use_cache=False,
            )
        ),
        _whisper_inputs,
        0,
    ),
    # ---- time series --------------------------------------------------------------------------
    _row(
        "patchtst",
        lambda: hf.PatchTSTForPrediction(
            hf.PatchTSTConfig(
                num_input_channels=3,
                context_length=32,
                patch_length=4,
                patch_stride=4,
                num_hidden_layers=2,
                d_model=16,
                ffn_dim=32,
                prediction_length=8,
            )
        ),
        _series(32, 3),
        4,
    ),
    _row(
        "patchtsmixer",
        lambda: hf.PatchTSMixerForPrediction(
            hf.PatchTSMixerConfig(
                num_input_channels=3, context_length=32, d_model=16, norm_mlp="BatchNorm", loss="mse"
            )
        ),
        _series(32, 3),
        6,
    ),
    # ---- vision transformers ------------------------------------------------------------------
    _row("vit", lambda: hf.ViTForImageClassification(hf.ViTConfig(**_VIT, num_labels=5)), _image(32), 0),
    _row("deit", lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**_VIT, num_labels=5)), _image(32), 0),
    _row(
        "beit",
        lambda: hf.BeitForImageClassification(
            hf.BeitConfig(
                **_VIT, **_EAGER, layer_scale_init_value=1.0, use_relative_position_bias=True, num_labels=5
            )
        ),
        _image(32),
        0,
    ),
    _row(
        "dinov2",
        lambda: hf.Dinov2ForImageClassification(
            hf.Dinov2Config(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=32,
                patch_size=8,
                use_swiglu_ffn=True,
                num_labels=5,
            )
        ),
        _image(32),
        0,
    ),
    _row(
        "swin",
        lambda: hf.SwinForImageClassification(
            hf.SwinConfig(
                **_EAGER,
                image_size=32,
                embed_dim=16,
                depths=[2, 2],
                num_heads=[2, 4],
                window_size=4,
                num_labels=5,
            )
        ),
        _image(32),
        0,
    ),
    _row(
        "swinv2",
        lambda: hf.Swinv2ForImageClassification(
            hf.Swinv2Config(
                image_size=32,
                embed_dim=16,
                depths=[2, 2],
                num_heads=[2, 4],
                window_size=4,
                pretrained_window_sizes=[0, 0],
                num_labels=5,
            )
        ),
        _image(32),
        0,
    ),
    # ---- text ---------------------------------------------------------------------------------
    _row("bert", lambda: hf.BertForMaskedLM(hf.BertConfig(**_ENCODER)), _tokens(), 0),
    _row("roberta", lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**_ENCODER)), _tokens(), 0),
    _row(
        "gpt2",
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(**_SPECIAL, n_positions=32, n_embd=32, n_layer=2, n_head=4, use_cache=False)
        ),
        _tokens(),
        0,
    ),
    _row("gpt_neox", lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_DECODER)), _tokens(), 0),
    _row(
        "opt",
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                **_SPECIAL,
                hidden_size=32,
                word_embed_proj_dim=32,
                ffn_dim=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=32,
                use_cache=False,
            )
        ),
        _tokens(),
        0,
    ),
    _row(
        "llama",
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER, num_key_value_heads=2)),
        _tokens(),
        0,
    ),
    _row(
        "gemma",
        lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**_DECODER, num_key_value_heads=1, head_dim=8)),
        _tokens(),
        0,
    ),
    _row(
        "phi",
        lambda: hf.PhiForCausalLM(hf.PhiConfig(**_DECODER, qk_layernorm=True)),
        _tokens(),
        0,
    ),
    _row(
        "falcon",
        lambda: hf.FalconForCausalLM(
            hf.FalconConfig(
                **_SPECIAL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, use_cache=False
            )
        ),
        _tokens(),
        0,
    ),
    _row(
        "t5",
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                **_EAGER,
                vocab_size=_VOCABULARY,
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                use_cache=False,
            )
        ),
        _tokens(12, "decoder_input_ids"),
        0,
    ),
    _row(
        "bart",
        lambda: hf.BartForConditionalGeneration(
            hf.BartConfig(
                **_SPECIAL,
                d_model=32,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                max_position_embeddings=32,
                decoder_start_token_id=3,
                use_cache=False,
            )
        ),
        _tokens(12, "decoder_input_ids"),
        0,
    ),
)

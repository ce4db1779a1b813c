"""Networks of transformers, of few layers: vision, text, speech, mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from networks.registry import Network, token_ids

BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 50,
    "num_labels": 4,
}
LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 50,
    "pad_token_id": 0,
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
SEQUENCES = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "vocab_size": 50,
}
SOUND = dict(
    BERT,
    conv_dim=(16, 16),
    conv_kernel=(10, 3),
    conv_stride=(5, 2),
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
    mask_time_prob=0.0,
)
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "num_labels": 4,
}


def images_of(size: int) -> Callable[[], Any]:
    return lambda: {"pixel_values": torch.randn(2, 3, size, size)}


def text() -> Any:
    ids = token_ids()
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def causal_text() -> Any:
    return {**text(), "use_cache": False}


def two_texts() -> Any:
    return {"input_ids": token_ids(), "decoder_input_ids": token_ids(6), "use_cache": False}


def sound() -> Any:
    return {"input_values": torch.randn(2, 1600)}


def spectrogram() -> Any:
    return {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": token_ids(6), "use_cache": False}


def text_and_images() -> Any:
    return {**text(), "pixel_values": torch.randn(2, 3, 32, 32)}


# family -> name -> (class, arguments of its configuration, sample)
NETWORKS: Mapping[str, Mapping[str, tuple[str, dict[str, Any], Callable[[], Any]]]] = {
    "vision": {
        "vit": ("ViTForImageClassification", dict(VIT, patch_size=8), images_of(32)),
        "beit": ("BeitForImageClassification", dict(VIT, patch_size=8), images_of(32)),
        "deit": ("DeiTForImageClassificationWithTeacher", dict(VIT, patch_size=8), images_of(32)),
        "dinov2": ("Dinov2ForImageClassification", dict(VIT, patch_size=8), images_of(32)),
        "swin": (
            "SwinForImageClassification",
            {
                "image_size": 32,
                "patch_size": 2,
                "embed_dim": 16,
                "depths": [1, 2],
                "num_heads": [2, 4],
                "window_size": 4,
                "num_labels": 4,
            },
            images_of(32),
        ),
        "convnext": (
            "ConvNextForImageClassification",
            {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "num_labels": 4},
            images_of(32),
        ),
        "mobilevit": (
            "MobileViTForImageClassification",
            {"image_size": 64, "num_labels": 4},
            images_of(64),
        ),
        "segformer": (
            "SegformerForSemanticSegmentation",
            {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 32, 64], "decoder_hidden_size": 32, "num_labels": 4},
            images_of(64),
        ),
        "bit": (
            "BitForImageClassification",
            {"embedding_size": 32, "hidden_sizes": [64, 128], "depths": [1, 1], "num_groups": 8, "num_labels": 4},
            images_of(32),
        ),
        "resnet": (
            "ResNetForImageClassification",
            {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic", "num_labels": 4},
            images_of(64),
        ),
        "levit": ("LevitForImageClassification", {"depths": [1, 1, 1], "num_labels": 4}, images_of(224)),
        "detr": ("DetrForObjectDetection", {}, images_of(64)),
        "yolos": (
            "YolosForObjectDetection",
            dict(VIT, patch_size=8, image_size=[32, 32]),
            images_of(32),
        ),
    },
    "text encoders": {
        "bert": ("BertForSequenceClassification", BERT, text),
        "bert_mlm": ("BertForMaskedLM", BERT, text),
        "roberta": ("RobertaForSequenceClassification", BERT, text),
        "distilbert": (
            "DistilBertForSequenceClassification",
            {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": 50},
            text,
        ),
        "albert": ("AlbertForSequenceClassification", dict(BERT, embedding_size=16), text),
        "electra": ("ElectraForSequenceClassification", dict(BERT, embedding_size=16), text),
        "deberta": (
            "DebertaV2ForSequenceClassification",
            dict(BERT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8),
            text,
        ),
        "mpnet": ("MPNetForSequenceClassification", BERT, text),
    },
    "text decoders": {
        "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50}, causal_text),
        "gpt_neo": (
            "GPTNeoForCausalLM",
            {
                "hidden_size": 32,
                "num_layers": 2,
                "num_heads": 2,
                "vocab_size": 50,
                "attention_types": [[["global", "local"], 1]],
            },
            causal_text,
        ),
        "opt": (
            "OPTForCausalLM",
            dict(BERT, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64),
            causal_text,
        ),
        "llama": ("LlamaForCausalLM", LLAMA, causal_text),
        "qwen2": ("Qwen2ForCausalLM", LLAMA, causal_text),
        "mistral": ("MistralForCausalLM", LLAMA, causal_text),
        "gemma2": ("Gemma2ForCausalLM", dict(LLAMA, head_dim=16), causal_text),
        "phi": ("PhiForCausalLM", LLAMA, causal_text),
        "bloom": (
            "BloomForCausalLM",
            {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50},
            causal_text,
        ),
        "mamba": (
            "MambaForCausalLM",
            {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 50},
            causal_text,
        ),
    },
    "encoder and decoder": {
        "t5": (
            "T5ForConditionalGeneration",
            {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 50},
            two_texts,
        ),
        "bart": (
            "BartForConditionalGeneration",
            dict(
                **SEQUENCES,
                max_position_embeddings=64,
                scale_embedding=True,
            ),
            two_texts,
        ),
    },
    "mixture of experts": {
        "mixtral": ("MixtralForCausalLM", dict(LLAMA, num_local_experts=4), causal_text),
        "qwen2_moe": (
            "Qwen2MoeForCausalLM",
            dict(LLAMA, **EXPERTS, shared_expert_intermediate_size=32),
            causal_text,
        ),
        "switch": (
            "SwitchTransformersForConditionalGeneration",
            {
                "d_model": 32,
                "d_kv": 16,
                "d_ff": 64,
                "num_layers": 2,
                "num_decoder_layers": 2,
                "num_heads": 2,
                "vocab_size": 50,
                "num_experts": 4,
            },
            two_texts,
        ),
    },
    "speech": {
        "wav2vec2": ("Wav2Vec2ForCTC", SOUND, sound),
        "hubert": ("HubertForCTC", SOUND, sound),
        "whisper": (
            "WhisperForConditionalGeneration",
            dict(
                **SEQUENCES,
                num_mel_bins=8,
                max_source_positions=16,
                max_target_positions=16,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
                suppress_tokens=None,
                begin_suppress_tokens=None,
            ),
            spectrogram,
        ),
        "ast": (
            "ASTForAudioClassification",
            dict(VIT, patch_size=8, max_length=32, num_mel_bins=16),
            lambda: {"input_values": torch.randn(2, 32, 16)},
        ),
    },
    "text and images": {
        "clip": (
            "CLIPModel",
            {
                "text_config": dict(BERT, eos_token_id=2, max_position_embeddings=16),
                "vision_config": dict(VIT, patch_size=8),
                "projection_dim": 16,
            },
            text_and_images,
        ),
    },
}
CONVOLUTIONAL = {"convnext", "bit", "resnet"}
SMALL = {"resnet", "bert", "gpt2", "t5", "mixtral"}
EXPORTED = SMALL | {"vit", "convnext", "bit", "distilbert", "llama", "bart", "wav2vec2", "clip"}


def networks() -> Iterator[Network]:
    for family, of_family in NETWORKS.items():
        for name, (kind, arguments, sample) in of_family.items():
            build = _detr if name == "detr" else partial(_model, kind, arguments)
            kinds = (name in CONVOLUTIONAL, name in SMALL, name in EXPORTED)
            yield Network(f"transformers/{name}", f"transformers: {family}", build, sample, *kinds)


def _model(kind: str, arguments: Mapping[str, Any]) -> nn.Module:
    import transformers

    architecture = getattr(transformers, kind)
    model: nn.Module = architecture(architecture.config_class(**arguments))
    return model


def _detr() -> nn.Module:
    import transformers

    backbone = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=5,
        num_labels=4,
    )
    return transformers.DetrForObjectDetection(config)

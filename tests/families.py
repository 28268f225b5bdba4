"""Tiny random models of every family with their processors, as their own libraries save them."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as hf
from conftest import WORDS
from transformers.models.chinese_clip.image_processing_pil_chinese_clip import ChineseCLIPImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from hpt_hf.lab.pretrain import train_tokenizer

SIDE = 32
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT = {**TOWER, "image_size": SIDE, "patch_size": 8}
SHORTEST = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
SQUARE = {"height": SIDE, "width": SIDE}
STUDENTS = ("clip", "metaclip_2", "siglip", "siglip2")
FAMILIES = (*STUDENTS, "align", "altclip", "chinese_clip", "vision-text-dual-encoder")


def _text(tokenizer, length: int = 24, **more) -> dict:
    ids = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    return {**TOWER, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": length, **more}


def _model(family: str, tokenizer):
    text, dim = _text(tokenizer), {"projection_dim": 24}
    if family == "clip":
        return hf.CLIPModel(hf.CLIPConfig(text_config=text | dim, vision_config=VIT | dim, **dim))
    if family == "metaclip_2":
        return hf.MetaClip2Model(hf.MetaClip2Config(text_config=text | dim, vision_config=VIT | dim, **dim))
    long = _text(tokenizer, 64, projection_size=32)
    if family == "siglip":
        return hf.SiglipModel(hf.SiglipConfig(text_config=long, vision_config=VIT))
    if family == "siglip2":
        vision = {**TOWER, "patch_size": 8, "num_patches": 16}
        return hf.Siglip2Model(hf.Siglip2Config(text_config=long, vision_config=vision))
    if family == "align":
        vision = {"image_size": SIDE, "width_coefficient": 0.5, "depth_coefficient": 0.1, "hidden_dim": 64}
        return hf.AlignModel(hf.AlignConfig(text_config=text, vision_config=vision, projection_dim=160))
    if family == "altclip":
        text |= {"project_dim": 24, "max_position_embeddings": 30, "pad_token_id": 1}
        return hf.AltCLIPModel(hf.AltCLIPConfig(text_config=text, vision_config=VIT | dim, **dim))
    if family == "chinese_clip":
        return hf.ChineseCLIPModel(hf.ChineseCLIPConfig(text_config=text, vision_config=VIT | dim, **dim))
    tower = hf.ConvNextConfig(num_stages=2, hidden_sizes=[16, 32], depths=[1, 1], patch_size=4, hidden_size=32)
    both = hf.VisionTextDualEncoderConfig.from_vision_text_configs(tower, hf.CLIPTextConfig(**text), projection_dim=24)
    return hf.VisionTextDualEncoderModel(both)


def _processor(family: str, tokenizer):
    if family == "siglip":
        image = SiglipImageProcessorPil(size=SQUARE, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        return hf.SiglipProcessor(image, tokenizer)
    if family == "siglip2":
        return hf.Siglip2Processor(Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16), tokenizer)
    if family == "align":
        image = EfficientNetImageProcessorPil(
            size={"height": 40, "width": 40}, crop_size=SQUARE, do_center_crop=True, resample=2,
            rescale_factor=1 / 127.5, rescale_offset=True, do_normalize=False, include_top=False,
        )  # fmt: skip
        return hf.AlignProcessor(image, tokenizer)
    if family == "chinese_clip":
        return hf.ChineseCLIPProcessor(ChineseCLIPImageProcessorPil(size=SQUARE, do_center_crop=False), tokenizer)
    made = hf.AltCLIPProcessor if family == "altclip" else hf.CLIPProcessor
    return made(CLIPImageProcessorPil(**SHORTEST), tokenizer)


def save_family(family: str, folder: Path, seed: int = 0) -> str:
    """A random model whose logits differ from class to class and image to image."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(WORDS, vocab_size=600)
    model = _model(family, tokenizer).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim == 4:  # or nothing would come through a deep convolution
                torch.nn.init.kaiming_normal_(tensor)
            elif tensor.ndim > 1:
                tensor.add_(0.05 * torch.randn_like(tensor))
    model.save_pretrained(folder)
    _processor(family, tokenizer).save_pretrained(folder)
    return str(folder)

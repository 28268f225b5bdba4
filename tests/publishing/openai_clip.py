"""What OpenAI's code computes of its own tensors, written out in plain torch, and models to try it on."""

import copy

import torch
import torch.nn.functional as F
from conftest import CLASSES
from transformers import CLIPModel

from hpt_hf.models.zero_shot import ZeroShotClassifier

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
PROMPTS = [f"a {c}, this is a photo" for c in CLASSES]


def images(model):
    return torch.rand(4, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(5))


def ids(model):
    settings = {"padding": "max_length", "max_length": model.config.text_config.max_position_embeddings}
    return model.processor.tokenizer(PROMPTS, return_tensors="pt", **settings)["input_ids"]


@torch.no_grad()
def embeds(model):
    return model.embed_images(images(model)), model.model.get_text_features(ids(model)).pooler_output


@torch.no_grad()
def reference_embeds(sd, model, *, quick=False, mean=MEAN, std=STD):
    """What OpenAI's code computes of the same images and prompts, from the tensors of its own names."""

    def linear(x, name):
        return F.linear(x, sd[f"{name}weight"], sd[f"{name}bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], sd[f"{name}.weight"], sd[f"{name}.bias"])

    def transformer(x, tower, causal):
        for layer in range(2):
            at = f"{tower}transformer.resblocks.{layer}."
            qkv = linear(norm(x, f"{at}ln_1"), f"{at}attn.in_proj_").unflatten(-1, (3, 2, -1))  # of two heads
            attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=causal)
            x = x + linear(attended.transpose(1, 2).flatten(2), f"{at}attn.out_proj.")
            y = linear(norm(x, f"{at}ln_2"), f"{at}mlp.c_fc.")
            x = x + linear(y * torch.sigmoid(1.702 * y) if quick else F.gelu(y), f"{at}mlp.c_proj.")
        return x

    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (mean, std))
    x = F.conv2d((images(model) - mean) / std, sd["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([sd["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + sd["visual.positional_embedding"]
    x = transformer(norm(x, "visual.ln_pre"), "visual.", causal=False)
    image, tokens = norm(x[:, 0], "visual.ln_post") @ sd["visual.proj"], ids(model)
    x = transformer(sd["token_embedding.weight"][tokens] + sd["positional_embedding"], "", causal=True)
    return image, norm(x, "ln_final")[torch.arange(len(x)), tokens.argmax(-1)] @ sd["text_projection"]


def assert_close(ours, theirs):
    """(image, text) embeddings within 1e-4, where they differ among themselves by far more."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and (b[0] - b[1]).abs().max() > 0.05 and float((a - b).abs().max()) < 1e-4


@torch.no_grad()
def random_clip(path):
    """A stock CLIPModel with no weight at 0 or 1, which could stand for another."""
    model, rng = CLIPModel.from_pretrained(path).eval(), torch.Generator().manual_seed(0)
    for name, tensor in model.named_parameters():
        tensor.normal_(std=0.2, generator=rng).add_("norm" in name and name.endswith("weight"))
    return model


def pooled_elsewhere(base):
    """End of text is an id in the middle: transformers reads the embedding there, and OpenAI's argmax would not."""
    model = copy.deepcopy(base)
    word = model.processor.tokenizer(PROMPTS[0])["input_ids"][-2]
    model.config.text_config.eos_token_id = model.model.text_model.eos_token_id = word
    return model


def changed(base):
    """The same weights under quick_gelu, another epsilon and another normalisation."""
    config, processor = copy.deepcopy(base.config), copy.deepcopy(base.processor)
    for part in (config.vision_config, config.text_config):
        part.hidden_act, part.layer_norm_eps = "quick_gelu", 1e-3
    processor.image_processor.image_mean, processor.image_processor.image_std = IMAGENET["mean"], IMAGENET["std"]
    model = CLIPModel(config)
    model.load_state_dict(base.model.state_dict())
    return ZeroShotClassifier(model, processor).eval()

"""A tiny CLIP whose weights are a formula; its features by open_clip and transformers; its files in every format."""

import json
import math
import types

import torch
import torch.nn.functional as F
from safetensors.torch import save_file


def openai_tiny():
    """Tensors with OpenAI's names: image 24x24 in patches of 8, widths 128 and 64, 2 + 2 layers, 100 tokens."""
    shapes = {
        "logit_scale": (), "positional_embedding": (77, 64), "text_projection": (64, 32),
        "token_embedding.weight": (100, 64), "ln_final.weight": (64,), "ln_final.bias": (64,),
        "visual.class_embedding": (128,), "visual.conv1.weight": (128, 3, 8, 8),
        "visual.positional_embedding": (10, 128), "visual.proj": (128, 32),
        "visual.ln_pre.weight": (128,), "visual.ln_pre.bias": (128,),
        "visual.ln_post.weight": (128,), "visual.ln_post.bias": (128,),
    }
    for tower, c in (("visual.", 128), ("", 64)):
        for i in range(2):
            block = {
                "attn.in_proj_weight": (3 * c, c), "attn.in_proj_bias": (3 * c,), "attn.out_proj.weight": (c, c),
                "attn.out_proj.bias": (c,), "ln_1.weight": (c,), "ln_1.bias": (c,), "mlp.c_fc.weight": (4 * c, c),
                "mlp.c_fc.bias": (4 * c,), "mlp.c_proj.weight": (c, 4 * c), "mlp.c_proj.bias": (c,),
                "ln_2.weight": (c,), "ln_2.bias": (c,),
            }
            shapes |= {f"{tower}transformer.resblocks.{i}.{name}": shape for name, shape in block.items()}
    weights = {}
    for j, name in enumerate(sorted(shapes)):
        n = torch.arange(math.prod(shapes[name]), dtype=torch.float64)
        v = torch.sin(0.7 * n ** 2 + j).reshape(shapes[name])
        if name == "logit_scale":
            v = torch.tensor(math.log(50))
        elif v.ndim == 1:                                               # not 0 and 1: swapped norms and biases show
            v = 1 + 0.3 * v if "ln_" in name and name.endswith("weight") else 0.3 * v
        else:
            v = 0.2 * v
        weights[name] = v.float()
    return weights


PIXELS = torch.sin(0.37 * torch.arange(2 * 3 * 24 * 24, dtype=torch.float64) ** 2).reshape(2, 3, 24, 24).float()
TOKENS = torch.tensor([[98, 5, 17, 3, 99] + [0] * 72, [98, 42, 7, 61, 12, 9, 99] + [0] * 70])
# The first 6 numbers of the normalised features by open_clip 3.3.0 and transformers 5.23.0, which agree to 5e-7
IMAGE = [[-0.072438, 0.270198, -0.176082, 0.021714, 0.227601, 0.019013],
         [-0.076739, -0.010217, 0.045138, -0.061305, 0.286021, 0.018479]]
TEXT = [[0.244224, 0.018627, -0.036235, 0.414016, -0.024884, -0.048382],
        [0.309104, -0.078431, -0.066777, 0.190527, -0.288913, 0.069183]]

# The same weights with settings that only a config tells: heads of 32 (image) and 16 (text), exact GELU, and a picture
# with mean and std 0.5. By open_clip 3.3.0 and transformers 5.24.0 with their own preprocessing, which agree to 3e-7
PICTURE = torch.sin(0.37 * torch.arange(24 * 24 * 3, dtype=torch.float64) ** 2)
PICTURE = (127.5 + 127 * PICTURE).round().byte().reshape(24, 24, 3).numpy()
OTHER_IMAGE = [[-0.123847, 0.190612, -0.12962, 0.233238, 0.264619, 0.021202]]
OTHER_TEXT = [[0.312493, 0.019167, -0.106784, 0.396573, 0.003587, -0.120324],
              [0.153496, -0.137949, 0.003803, 0.346581, -0.229429, 0.012003]]
OTHER_HF_CONFIG = dict(
    vision_config=dict(hidden_size=128, num_attention_heads=4, hidden_act="gelu", image_size=24),
    text_config=dict(hidden_size=64, num_attention_heads=4, hidden_act="gelu"))
OTHER_HF_VIEWS = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3, crop_size=dict(height=24, width=24))
OTHER_OPEN_CLIP_CONFIG = dict(
    model_cfg=dict(vision_cfg=dict(image_size=24, head_width=32), text_cfg=dict(width=64, heads=4)),
    preprocess_cfg=dict(mean=[0.5] * 3, std=[0.5] * 3, interpolation="bicubic", size=24))


def hugging_face(weights):
    """OpenAI's names -> those of transformers' CLIPModel, written down independently of tbps.py."""
    in_block = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2",
                "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    outside = {
        "class_embedding": "vision_model.embeddings.class_embedding",
        "conv1.weight": "vision_model.embeddings.patch_embedding.weight", "proj": "visual_projection.weight",
        "ln_pre.weight": "vision_model.pre_layrnorm.weight", "ln_pre.bias": "vision_model.pre_layrnorm.bias",
        "ln_post.weight": "vision_model.post_layernorm.weight", "ln_post.bias": "vision_model.post_layernorm.bias",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight", "logit_scale": "logit_scale",
        "text_projection": "text_projection.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight", "ln_final.bias": "text_model.final_layer_norm.bias",
    }
    out = {}
    for name, w in weights.items():
        is_image = name.startswith("visual.")
        tower, rest = ("vision_model", name.removeprefix("visual.")) if is_image else ("text_model", name)
        if rest == "positional_embedding":
            out[f"{tower}.embeddings.position_embedding.weight"] = w
        elif rest in outside:
            out[outside[rest]] = w.T.contiguous() if "proj" in rest else w
        else:
            _, _, i, part = rest.split(".", 3)
            base = f"{tower}.encoder.layers.{i}."
            if part.startswith("attn.in_proj_"):
                for letter, third in zip("qkv", w.chunk(3)):
                    out[f"{base}self_attn.{letter}_proj.{part.removeprefix('attn.in_proj_')}"] = third.clone()
            else:
                module, kind = part.rsplit(".", 1)
                out[f"{base}{in_block[module]}.{kind}"] = w
    return out


def torchscript(weights):
    """An archive as OpenAI's: a scripted module with these tensors, and three integers."""
    root = torch.nn.Module()
    integers = dict(input_resolution=24, context_length=77, vocab_size=100)
    for name, w in (weights | {n: torch.tensor(i) for n, i in integers.items()}).items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_buffer(leaf, w)
    root.forward = types.MethodType(lambda self: torch.zeros(1), root)
    return torch.jit.trace_module(root, {"forward": ()}, check_trace=False)


FORMATS = ["torchscript", "state dict", "open_clip checkpoint", "open_clip safetensors", "open_clip bin",
           "Hugging Face safetensors", "Hugging Face bin"]


def write(kind, folder):
    """Save the tiny CLIP in one of the formats -> what to give to load_clip."""
    w = openai_tiny()
    if kind == "torchscript":
        torchscript(w).save(str(folder / "ViT.pt"))
        return folder / "ViT.pt"
    if kind == "torchscript in half precision":
        torchscript({n: t.half() for n, t in w.items()}).save(str(folder / "ViT.pt"))
        return folder / "ViT.pt"
    if kind == "state dict":
        torch.save(w, folder / "clip.pt")
        return folder / "clip.pt"
    if kind == "open_clip checkpoint":
        torch.save(dict(epoch=3, state_dict={f"module.{n}": t for n, t in w.items()}), folder / "epoch_3.pt")
        return folder / "epoch_3.pt"
    if kind == "open_clip safetensors":
        save_file(w, folder / "open_clip_model.safetensors")
        write_json(folder / "open_clip_config.json", dict(model_cfg=dict(quick_gelu=True)))
    if kind == "open_clip bin":
        torch.save(w, folder / "open_clip_pytorch_model.bin")
    if kind == "Hugging Face safetensors":
        save_file(hugging_face(w), folder / "model.safetensors")
        write_json(folder / "config.json", dict(vision_config=dict(hidden_act="quick_gelu")))
    if kind == "Hugging Face bin":
        position_ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
        torch.save(hugging_face(w) | position_ids, folder / "pytorch_model.bin")
    return folder


def write_json(path, content):
    path.write_text(json.dumps(content))


@torch.no_grad()
def features(model, pixels=PIXELS):
    """Normalised features of PIXELS and TOKENS."""
    model.eval()
    return F.normalize(model.encode_image(pixels), dim=1), F.normalize(model.encode_text(TOKENS), dim=1)


def assert_features(model, image=IMAGE, text=TEXT, pixels=PIXELS):
    """The model gives these stored numbers."""
    for found, stored in zip(features(model, pixels), (image, text)):
        torch.testing.assert_close(found[:, :6], torch.tensor(stored), atol=2e-6, rtol=0)

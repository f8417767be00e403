"""Few-shot learners around encoders that stay as they are: CoOp (arXiv 2109.01134) and CLIP-Adapter (arXiv 2110.04544).

    python lab/few_shot.py --method coop    --clip BEST.pt --share 0.05 ...      learn the words before every caption
    python lab/few_shot.py --method adapter --clip BEST.pt --share 0.05 ...      learn two layers after the image tower

All other options are those of tbps.py. TBPS-CLIP's few-shot probe (arXiv 2308.10045) compares both with full
fine-tuning on 5 and 10 % of the persons, which is far better. A run scores its checkpoints itself; eval.py does not
read them."""

import sys
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import data                                                             # noqa: E402
import tbps                                                             # noqa: E402

RECIPE = tbps.BASELINE | dict(prompt="", adapter=0.0, epochs=20, lr=1e-3)
METHODS = {
    "coop": (RECIPE | dict(prompt="a pedestrian photo of"), tbps.tbps_clip_heads, tbps.tbps_clip_losses),
    "adapter": (RECIPE | dict(adapter=0.4), tbps.tbps_clip_heads, tbps.tbps_clip_losses),
}
KEYS = dict(prompt=("", "CoOp: words before every caption, whose embeddings learn"),
            adapter=(0.0, "CLIP-Adapter: fraction of an image feature that the adapter makes"))


class PromptedEmbedding(nn.Embedding):
    """Token embeddings, with M learned vectors in place of tokens 1 to M: ids (B, T) -> (B, T, C)."""

    def __init__(self, embedding, prompt):
        super().__init__(*embedding.weight.shape, _weight=embedding.weight)
        self.prompt = nn.Parameter(prompt)                              # (M, C)

    def forward(self, tokens):
        x, M = super().forward(tokens), len(self.prompt)
        return torch.cat([x[:, :1], self.prompt.to(x.dtype).expand(len(x), -1, -1), x[:, 1 + M:]], dim=1)


class FewShotEncoder(tbps.DualEncoder):
    """A dual encoder with a prompt of `prompt` learned vectors, or with an adapter.

    The adapter makes the fraction `adapter` of an image feature, the image tower the rest."""

    def __init__(self, prompt=0, adapter=0.0, **arch):
        super().__init__(**arch)
        self.adapter = None
        if prompt:
            self.add_prompt(torch.zeros(prompt, self.arch["text_width"]))
        if adapter:
            self.add_adapter(adapter)

    def add_prompt(self, prompt):
        self.text.tok, self.arch["prompt"] = PromptedEmbedding(self.text.tok, prompt), len(prompt)

    def add_adapter(self, ratio):
        D = self.arch["embed"]
        self.arch["adapter"] = ratio
        self.adapter = nn.Sequential(nn.Linear(D, D // 4, bias=False), nn.ReLU(), nn.Linear(D // 4, D, bias=False))

    def trim_padding(self, tokens):
        """Makes room for the prompt after SOT. A caption that is too long then loses its last words, not its EOT."""
        if M := self.arch.get("prompt", 0):
            last = min(tokens.shape[1], self.arch["context"] - M) - 1
            is_cut = tokens.argmax(dim=1) > last
            end = torch.where(is_cut, tokens.amax(dim=1), tokens[:, last])[:, None]
            tokens = torch.cat([tokens[:, :1], tokens[:, :1].expand(-1, M), tokens[:, 1:last], end], dim=1)
        return super().trim_padding(tokens)

    def encode_image(self, pixels, mixup=None):
        image = super().encode_image(pixels, mixup)
        if self.adapter is None:
            return image
        ratio = self.arch["adapter"]
        return ratio * self.adapter(image) + (1 - ratio) * image


def add_learned_parts(model, recipe, tokenizer):
    """Add the prompt and the adapter of the recipe, if the weights have none, and freeze all else."""
    model.requires_grad_(False)
    if recipe["prompt"]:
        if not model.arch.get("prompt"):
            ids = torch.tensor(tokenizer.bpe.encode(recipe["prompt"]).ids)
            if not 1 <= len(ids) <= 40:
                raise ValueError(f"prompt={recipe['prompt']!r} makes {len(ids)} tokens; it may have 1 to 40")
            model.add_prompt(model.text.tok(ids).detach().clone())
        model.text.tok.prompt.requires_grad_(True)
        model.text.tok.weight.requires_grad_(False)
    if recipe["adapter"]:
        if model.adapter is None:
            model.add_adapter(recipe["adapter"])
        model.arch["adapter"] = recipe["adapter"]
        model.adapter.requires_grad_(True)


def encoder_from_arch(arch, source, **options):
    return FewShotEncoder(**arch | options)


def parse_args(argv=None, parse=tbps.parse_args):
    fractions = mock.patch.object(tbps, "FRACTIONS", [*tbps.FRACTIONS, "adapter"])
    with mock.patch.dict(tbps.METHODS, METHODS), mock.patch.dict(tbps.KEYS, KEYS), fractions:
        args, recipe = parse(argv)
    if args.method not in METHODS:
        raise ValueError(f"--method is {' or '.join(METHODS)} here; tbps.py has all others")
    if args.clip == "none":
        raise ValueError("a prompt and an adapter learn around trained encoders: name them with --clip")
    return args, recipe


def build_model(args, recipe, tokenizer, persons, make_heads, build=tbps.build_model):
    model = build(args, recipe, tokenizer, persons, make_heads)
    add_learned_parts(model, recipe, tokenizer)
    return model


def main():
    """tbps.main with two more methods and another model."""
    names = dict(parse_args=parse_args, build_model=build_model, encoder_from_arch=encoder_from_arch)
    with mock.patch.dict(tbps.METHODS, METHODS), mock.patch.multiple(tbps, **names):
        tbps.main()


if __name__ == "__main__":
    data.command(main)

"""Which parts of the two encoders matter (the compression probe of TBPS-CLIP), and what training is without some of them.

    python lab/probes.py modules --checkpoint runs/X/best.pt --before runs/ablations/generic/best.pt     C1, C2 of every module
    python lab/probes.py freeze 0,1 --dataset toy --method baseline ...      as tbps.py, but these text layers do not learn
    python lab/probes.py drop 1 --dataset toy --method baseline ...          as tbps.py, but these text layers are left out

C1: how much R@1 (validation split) falls when a module's output is left out of the residual stream, over the largest such fall. C2: how much
of what fine-tuning did to a module is needed: the smallest share a of it, in tenths, such that weights (1 - a) before + a after cost less
than 3 points of R@1. Modules are the self-attention, the feed-forward part, and both, of each layer, numbered from 0, with their norms."""

import argparse
import html
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import data                                                             # noqa: E402
import eval as evaluation                                               # noqa: E402
import tbps                                                             # noqa: E402

PARTS = {"attention": ("ln1.", "attn."), "feed-forward": ("ln2.", "fc1.", "fc2."), "layer": ("",)}
LAST = {"attention": ("attn.proj",), "feed-forward": ("fc2",), "layer": ("attn.proj", "fc2")}           # what a part adds comes out of these


def modules(model):
    """(tower, layer, part) of all."""
    return [(tower, n, part) for tower in ("image", "text") for n in range(model.arch[f"{tower}_layers"]) for part in PARTS]


def removed(weights, module):
    """The weights without what the module adds."""
    tower, n, part = module
    names = tuple(f"{tower}.blocks.{n}.{name}." for name in LAST[part])
    return {name: torch.zeros_like(w) if name.startswith(names) else w for name, w in weights.items()}


def rewound(weights, before, module, share):
    """The weights, in the module only `share` of the way from those before."""
    tower, n, part = module
    names = tuple(f"{tower}.blocks.{n}.{name}" for name in PARTS[part])
    return {name: torch.lerp(before[name], w, share) if name.startswith(names) else w for name, w in weights.items()}


def contributions(score, weights, before, todo, least=3.0):
    """{module: (fall of R@1 without it, C1, C2)}. score: weights -> R@1."""
    whole, falls, needed = score(weights), {}, {}
    for module in tqdm(todo, unit=" modules"):
        falls[module] = whole - score(removed(weights, module))
        needed[module] = next(a / 10 for a in range(11) if a == 10 or whole - score(rewound(weights, before, module, a / 10)) < least)
    most = max(falls.values())
    return {module: (falls[module], falls[module] / most if most > 0 else 0.0, needed[module]) for module in todo}


def without(layers, how):
    """tbps.parse_args and tbps.build for training with these text layers frozen or dropped; a checkpoint says so, and is resumed as such only."""
    parse, build = tbps.parse_args, tbps.build

    def parse_args():
        args, recipe = parse()
        args.layers = f"{how} {layers}"
        return args, recipe

    def other(*args):
        model = build(*args)
        if unknown := [n for n in layers if n not in range(len(model.text.blocks))]:
            raise ValueError(f"the text tower has layers 0 to {len(model.text.blocks) - 1}, not {unknown[0]}")
        if how == "freeze":
            for n in layers:
                model.text.blocks[n].requires_grad_(False)
        else:
            model.text.blocks = torch.nn.ModuleList(block for n, block in enumerate(model.text.blocks) if n not in layers)
            model.arch["text_layers"] = len(model.text.blocks)
            if not model.text.blocks:
                raise ValueError("no text layer is left")
        return model
    return parse_args, other


def show(found, page):
    """Prints a table, and writes it as a heat map."""
    rows, towers = [], dict.fromkeys(tower for tower, *_ in found)
    for tower in towers:
        for n in dict.fromkeys(n for t, n, _ in found if t == tower):
            cells = [value for part in PARTS for value in found[tower, n, part]]
            print(f"{tower:6}{n:3}" + "".join(f"   {part}: {-fall:+.1f} R@1, C1 {c1:.2f}, C2 {c2:.1f}" for part in PARTS for fall, c1, c2 in [found[tower, n, part]]))
            shaded = "".join(f'<td style="background:rgba(215,48,31,{min(1, max(0, value)) if k % 3 else 0:.2f})">{value:.{1 if k % 3 == 0 else 2}f}</td>' for k, value in enumerate(cells))
            rows.append(f"<tr><td>{tower} {n}</td>{shaded}</tr>")
    head = "".join(f"<th>{html.escape(part)}: fall of R@1</th><th>C1</th><th>C2</th>" for part in PARTS)
    evaluation.write_page(page, "What each module contributes", [("C1: lost without it; C2: of what it learned, needed", f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>")])
    print(f"page: {page}")


def numbers(text):
    """0,3 -> [0, 3], for argparse."""
    return sorted({int(n) for n in text.split(",")})


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = p.add_subparsers(dest="how", required=True)
    m = how.add_parser("modules")
    m.add_argument("--checkpoint", required=True, help="the fine-tuned model")
    m.add_argument("--before", required=True, help="the one it started from")
    m.add_argument("--page", default="probes.html", help="the page to write (default: probes.html)")
    for name in ("freeze", "drop"):
        t = how.add_parser(name)
        t.add_argument("layers", type=numbers, help="numbers of text layers, from 0, like 0,3")
    args, rest = p.parse_known_args()
    if args.how != "modules":
        sys.argv = ["tbps.py", *rest]
        tbps.parse_args, tbps.build = without(args.layers, args.how)
        return tbps.main()
    if rest:
        p.error(f"unknown: {' '.join(rest)}")
    evaluation.check_page(args.page)
    model, tokenizer, info = tbps.load_checkpoint(args.checkpoint)
    before, _, _ = tbps.load_checkpoint(args.before)
    if before.arch != model.arch:
        raise ValueError(f"{args.before} is another architecture than {args.checkpoint}: it cannot have started from there")
    records = data.read(info["args"]["dataset"], info["args"]["data_root"], "val")

    def score(weights):
        model.load_state_dict(weights)
        return tbps.evaluate(model, tokenizer, info, records, "cpu", sheet=False, progress=False)[0]["text to image"]["R@1"]
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    show(contributions(score, weights, before.state_dict(), modules(model)), args.page)


if __name__ == "__main__":
    data.command(main)

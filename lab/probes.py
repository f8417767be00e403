"""Which modules of the two encoders matter (the compression probe of TBPS-CLIP), and training without some of them.

    python lab/probes.py modules --checkpoint runs/X/best.pt --before runs/ablations/generic/best.pt      C1 and C2
    python lab/probes.py freeze 0,1 --dataset toy --method baseline ...      as tbps.py, with these text layers frozen
    python lab/probes.py drop 1 --dataset toy --method baseline ...          as tbps.py, without these text layers

C1   the fall of R@1 (validation split) when the module's output is removed from the residual stream, relative to the
     largest such fall
C2   the part of its fine-tuning that a module needs: the smallest a (in tenths) such that its weights
     (1 - a) before + a after cost less than 3 points of R@1

Modules: the self-attention, the feed-forward part, and both, of each layer, with their norms. Layers count from 0."""

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

# part: prefixes of its weights, and the layers whose output it adds to the residual stream
PARTS = {"attention": ("ln1.", "attn."), "feed-forward": ("ln2.", "fc1.", "fc2."), "layer": ("",)}
OUTPUTS = {"attention": ("attn.proj",), "feed-forward": ("fc2",), "layer": ("attn.proj", "fc2")}

# ---- what each module contributes ------------------------------------------------------------------------------------


def modules(model):
    """[(tower, layer, part)]"""
    return [(tower, n, part)
            for tower in ("image", "text") for n in range(model.arch[f"{tower}_layers"]) for part in PARTS]


def removed(weights, module):
    """The weights with the module's output set to zero."""
    tower, n, part = module
    names = tuple(f"{tower}.blocks.{n}.{name}." for name in OUTPUTS[part])
    return {name: torch.zeros_like(w) if name.startswith(names) else w for name, w in weights.items()}


def rewound(weights, before, module, a):
    """The weights with the module at (1 - a) before + a after."""
    tower, n, part = module
    names = tuple(f"{tower}.blocks.{n}.{name}" for name in PARTS[part])
    return {name: torch.lerp(before[name], w, a) if name.startswith(names) else w for name, w in weights.items()}


def contributions(score, weights, before, todo, tolerance=3.0):
    """{module: (fall of R@1 without it, C1, C2)}. score: weights -> R@1."""
    whole, falls, needed = score(weights), {}, {}
    for module in tqdm(todo, unit=" modules"):
        falls[module] = whole - score(removed(weights, module))
        needed[module] = 1.0
        for tenths in range(10):
            if whole - score(rewound(weights, before, module, tenths / 10)) < tolerance:
                needed[module] = tenths / 10
                break
    largest = max(falls.values())
    return {module: (fall, fall / largest if largest > 0 else 0.0, needed[module]) for module, fall in falls.items()}


def write_contributions(found, page):
    """Print a line per layer; write a heat map."""
    rows = []
    for tower, n in dict.fromkeys((tower, n) for tower, n, _ in found):
        said, cells = [], []
        for part in PARTS:
            fall, c1, c2 = found[tower, n, part]
            said.append(f"   {part}: {-fall:+.1f} R@1, C1 {c1:.2f}, C2 {c2:.1f}")
            cells.append(f"<td>{fall:.1f}</td>")
            for value in (c1, c2):
                shade = 0.6 * min(1, max(0, value))                     # the number stays readable
                cells.append(f'<td style="background:rgba(215,48,31,{shade:.2f})">{value:.2f}</td>')
        print(f"{tower:6}{n:3}{''.join(said)}")
        rows.append(f"<tr><td>{tower} {n}</td>{''.join(cells)}</tr>")
    head = "".join(f"<th>{html.escape(part)}: fall of R@1</th><th>C1</th><th>C2</th>" for part in PARTS)
    table = f"<table><tr><td></td>{head}</tr>{''.join(rows)}</table>"
    legend = "C1: loss without the module; C2: the part of its fine-tuning that is needed"
    evaluation.write_page(page, "What each module contributes", [(legend, table)])
    print(f"page: {page}")


def probe(args):
    evaluation.check_page(args.page)
    model, tokenizer, preprocessing = tbps.load_checkpoint(args.checkpoint)
    before, _, _ = tbps.load_checkpoint(args.before)
    if before.arch != model.arch:
        raise ValueError(f"{args.before} is another architecture than {args.checkpoint}: not what it started from")
    trained = tbps.read_checkpoint(args.checkpoint)["args"]
    records = data.read(trained["dataset"], trained["data_root"], "val")
    inputs = evaluation.evaluation_set(records, preprocessing, tokenizer)

    def score(weights):
        model.load_state_dict(weights)
        result = evaluation.evaluate(model, *inputs, progress=False)[0]
        return result["text to image"]["R@1"]

    weights = {name: w.clone() for name, w in model.state_dict().items()}
    write_contributions(contributions(score, weights, before.state_dict(), modules(model)), args.page)


# ---- training without text layers ------------------------------------------------------------------------------------


def without(layers, how):
    """Replacements for tbps.parse_args and tbps.build_model: text layers are frozen ("freeze") or left out ("drop").

    The choice is stored in the checkpoint, so that only the same choice resumes it."""
    parse, build = tbps.parse_args, tbps.build_model

    def parse_args():
        args, recipe = parse()
        args.layers = f"{how} {layers}"
        return args, recipe

    def build_without(*args):
        model = build(*args)
        blocks = model.text.blocks
        if unknown := [n for n in layers if n not in range(len(blocks))]:
            raise ValueError(f"the text tower has layers 0 to {len(blocks) - 1}, not {unknown[0]}")
        if how == "freeze":
            for n in layers:
                blocks[n].requires_grad_(False)
            return model
        model.text.blocks = torch.nn.ModuleList(block for n, block in enumerate(blocks) if n not in layers)
        model.arch["text_layers"] = len(model.text.blocks)
        if not model.text.blocks:
            raise ValueError("no text layer is left")
        return model

    return parse_args, build_without


def layer_numbers(text):
    """0,3 -> [0, 3], for argparse."""
    return sorted({int(n) for n in text.split(",")})


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = p.add_subparsers(dest="how", required=True)
    m = how.add_parser("modules")
    m.add_argument("--checkpoint", required=True, help="the fine-tuned model")
    m.add_argument("--before", required=True, help="the model that it started from")
    m.add_argument("--page", default="probes.html", help="the page to write (default: probes.html)")
    for name in ("freeze", "drop"):
        t = how.add_parser(name)
        t.add_argument("layers", type=layer_numbers, help="numbers of text layers, from 0, like 0,3")
    args, rest = p.parse_known_args()
    if args.how == "modules":
        if rest:
            p.error(f"unknown: {' '.join(rest)}")
        probe(args)
        return
    sys.argv = ["tbps.py", *rest]
    tbps.parse_args, tbps.build_model = without(args.layers, args.how)
    tbps.main()


if __name__ == "__main__":
    data.command(main)

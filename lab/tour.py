"""Ten exercises: a few lines to change, a command, and what comes out. For the README and whoever teaches from it.

    python lab/tour.py            tries them all in copies of the scripts, about 25 minutes on 2 cores, and prints what the README's table holds
    python lab/tour.py 3 7        these alone
    python lab/tour.py 3 --apply  changes the scripts here, to be looked at with git diff; take it back with git checkout before the next

Exercises 1 to 5 only score a trained model, that of `python tbps.py`, which is trained first if it is not there; 6 to 10 train it again."""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import data                                                             # noqa: E402

MAIN = "runs/toy-tbps-clip-simplified-0"
SCORE, TRAIN = f"eval.py --checkpoint {ROOT / MAIN}/best.pt", "tbps.py"
EXERCISES = [  # what is asked, the command, [(file, old lines, new lines)]
    ("Sort the words of each test caption by the alphabet: how much does the model read, how much does it count?", SCORE, [
        ("tbps.py", "captions[rank::ranks]", '[" ".join(sorted(c.split())) for c in captions[rank::ranks]]')]),
    ("Exchange left and right in the test captions: what are they worth?", SCORE, [
        ("tbps.py", "captions[rank::ranks]", '[c.replace("left", "@").replace("right", "left").replace("@", "right") for c in captions[rank::ranks]]')]),
    ("Take the colour out of the test pictures.", SCORE, [
        ("data.py", "return self.normalize(self.scale(image if isinstance(image, Image.Image) else load_image(image)))",
         "return self.normalize(self.scale(image if isinstance(image, Image.Image) else load_image(image)).mean(dim=0, keepdim=True).expand(3, -1, -1))")]),
    ("Search with both captions of an image at once: the mean of their features.", SCORE, [
        ("tbps.py", "    image, text = embed(model, tokenizer, info, records, device, workers, progress)\n",
         "    image, text = embed(model, tokenizer, info, records, device, workers, progress)\n"
         "    text = text.view(-1, 2, text.shape[1]).mean(dim=1).repeat_interleave(2, dim=0)\n")]),
    ("Search with pictures instead of words: the image that the caption was written for is the query.", SCORE, [
        ("tbps.py", "    image, text = embed(model, tokenizer, info, records, device, workers, progress)\n",
         "    image, text = embed(model, tokenizer, info, records, device, workers, progress)\n    text = image[own]\n")]),
    ("Contrast without identities (CLIP's own): other captions of the person now count as wrong.", f"{TRAIN} --set nitc=0 itc=1", []),
    ("No augmentation, neither of images nor of captions.", f"{TRAIN} --set image_aug=none deletion=0", []),
    ("Start the positions of patches as CLIP does, from noise.", TRAIN, [
        ("tbps.py", "nn.Parameter(0.5 * sincos_grid(self.grid, width))", "nn.Parameter(0.02 * torch.randn(1 + self.grid[0] * self.grid[1], width))")]),
    ("Describe a picture by the mean of its tokens instead of the class token.", TRAIN, [
        ("tbps.py", "self.image.project(self.image(pixels, at=cls, mix=mix)[:, 0])", "self.image.project(self.image(pixels, mix=mix).mean(dim=1))")]),
    ("A loss of your own, the sigmoid of SigLIP (arXiv 2303.15343): each pair of the batch is right or wrong by itself.", f"{TRAIN} --set ritc=0", [
        ("losses.py", "# ---- contrastive losses: which text belongs to which image", '''@full_precision
def sigmoid(image, text, pid, scale, bias=-5.0):
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T + bias
    same = (pid[:, None] == pid[None, :]).float()
    return F.binary_cross_entropy_with_logits(logits, same, reduction="sum") / len(pid)


# ---- contrastive losses: which text belongs to which image'''),
        ("tbps.py", "losses.nitc(image[v], text[u], pid, scale, alpha, image[v].detach(), teacher_text[u])", "losses.sigmoid(image[v], text[u], pid, scale)")]),
]


def change(folder, changes):
    """Makes the changes in a folder of scripts."""
    for file, old, new in changes:
        source = (folder / file).read_text()
        if source.count(old) != 1:
            raise ValueError(f"{file} should hold this once, and does {source.count(old)} times; is an exercise applied already? git checkout \"*.py\" takes it back\n  {old.strip()}")
        (folder / file).write_text(source.replace(old, new))


def score(command, changes=()):
    """Text-to-image R@1 and mAP on the test split, of a command in a changed copy of the scripts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for script in (*ROOT.glob("*.py"), *ROOT.glob("lab/*.py")):
            (folder / script.relative_to(ROOT)).parent.mkdir(exist_ok=True)
            shutil.copy(script, folder / script.relative_to(ROOT))
        change(folder, changes)
        extra = ["--page", folder / "page.html"] if "eval.py" in command else ["--out", folder / "run"]
        done = subprocess.run([sys.executable, *command.split(), *extra], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(done.stdout)
    r1, ap = re.search(r"^(?:test|text to image) +R@1 ([\d.]+) .*mAP ([\d.]+)", done.stdout, re.M).groups()
    return float(r1), float(ap)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("numbers", nargs="*", type=int, metavar="N", help="exercises (default: all)")
    p.add_argument("--apply", action="store_true", help="make the changes here instead")
    args = p.parse_args()
    if unknown := [n for n in args.numbers if not 1 <= n <= len(EXERCISES)]:            # choices= would refuse no number at all before Python 3.12
        p.error(f"{unknown[0]} is no exercise; there are 1 to {len(EXERCISES)}")
    chosen = [(n, *EXERCISES[n - 1]) for n in args.numbers or range(1, len(EXERCISES) + 1)]
    if args.apply:
        if len(args.numbers) != 1:
            p.error("--apply takes one exercise: changes would add up")
        (n, _, command, changes), = chosen
        change(ROOT, changes)
        print(f"{n}: python {command}" + f" --out runs/tour-{n}" * command.startswith(TRAIN))
        return
    if not (ROOT / MAIN / "best.pt").exists():
        subprocess.run([sys.executable, "tbps.py"], cwd=ROOT, check=True)
    base = score(SCORE)
    print(f"| | exercise | change | R@1 | mAP |\n|---|---|---|---|---|\n| 0 | nothing | | {base[0]:.2f} | {base[1]:.2f} |", flush=True)
    for n, asked, command, changes in chosen:
        found = score(command, changes)
        lines = ", ".join(dict.fromkeys(file for file, *_ in changes)) or "`" + command.removeprefix(TRAIN).strip() + "`"
        print(f"| {n} | {asked} | {lines} | {found[0]:.2f} ({found[0] - base[0]:+.1f}) | {found[1]:.2f} ({found[1] - base[1]:+.1f}) |", flush=True)


if __name__ == "__main__":
    data.command(main)

"""Ten exercises (lab/TOUR.md): a few lines to change, a command, and the score that comes out.

    python lab/tour.py              try all in copies of the scripts, about 25 minutes on 2 cores; prints the table
    python lab/tour.py 3 7          only these
    python lab/tour.py 3 --apply    change the scripts here; look with `git diff`, undo with `git checkout "*.py"`

Exercises 1 to 5 score the model of `python tbps.py`, which is trained first if it is missing; 6 to 10 train another."""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import data                                                             # noqa: E402

MAIN = "runs/toy-tbps-clip-simplified-0"
SCORE = f"eval.py --checkpoint {shlex.quote(str(ROOT / MAIN / 'best.pt'))}"
TRAIN = "tbps.py"

# ---- lines that exercises change -------------------------------------------------------------------------------------

TOKENS = "tokenizer(captions)"
SORTED_WORDS = 'tokenizer([" ".join(sorted(c.split())) for c in captions])'
SWAPPED_SIDES = ('tokenizer([c.replace("left", "@").replace("right", "left").replace("@", "right") '
                 "for c in captions])")
SCALED = "self.resize(load_image(image))"
GREY = f"{SCALED}.mean(dim=0, keepdim=True).expand(3, -1, -1)"
EMBED = "    image, text = embed(model, images, tokens, device, workers, progress)\n"
MEAN_OF_CAPTIONS = "    text = text.view(-1, 2, text.shape[1]).mean(dim=1).repeat_interleave(2, dim=0)\n"
CLASS_TOKEN = "self.image.project(self.image(pixels, token_index=first, mixup=mixup)[:, 0])"
MEAN_TOKEN = "self.image.project(self.image(pixels, mixup=mixup).mean(dim=1))"
CHAPTER = "# ---- contrastive losses: which text belongs to which image"
SIGMOID = f'''@full_precision
def sigmoid(image, text, pid, scale, bias=-5.0):
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T + bias
    positives = (pid[:, None] == pid[None, :]).float()
    return F.binary_cross_entropy_with_logits(logits, positives, reduction="sum") / len(pid)


{CHAPTER}'''
NITC = "losses.nitc(image[v], text[u], pid, scale, alpha, image[v].detach(), teacher_text[u])"

# ---- exercises -------------------------------------------------------------------------------------------------------

EXERCISES = [  # (task, command, [(file, old lines, new lines)])
    ("Sort the words of each test caption alphabetically.", SCORE, [("eval.py", TOKENS, SORTED_WORDS)]),
    ("Swap left and right in the test captions.", SCORE, [("eval.py", TOKENS, SWAPPED_SIDES)]),
    ("Remove the colour from the test images.", SCORE, [
        ("data.py", f"self.normalize({SCALED})", f"self.normalize({GREY})"),
    ]),
    ("Query with both captions of an image: the mean of their features.", SCORE, [
        ("eval.py", EMBED, EMBED + MEAN_OF_CAPTIONS),
    ]),
    ("Query with the source image of the caption.", SCORE, [("eval.py", EMBED, EMBED + "    text = image[source]\n")]),
    ("CLIP's own contrast: other captions of the person are negatives.", f"{TRAIN} --set nitc=0 itc=1", []),
    ("No augmentation of images and captions.", f"{TRAIN} --set image_aug=none deletion=0", []),
    ("Train from scratch, without the toy CLIP.", f"{TRAIN} --clip none", []),
    ("Use the mean of the image tokens instead of the class token.", TRAIN, [("tbps.py", CLASS_TOKEN, MEAN_TOKEN)]),
    ("A loss of your own: SigLIP's sigmoid (arXiv 2303.15343).", f"{TRAIN} --set ritc=0", [
        ("losses.py", CHAPTER, SIGMOID),
        ("tbps.py", NITC, "losses.sigmoid(image[v], text[u], pid, scale)"),
    ]),
]


def change(folder, changes):
    """Make the changes in a folder of scripts. Raises ValueError if a line to change is missing or not unique."""
    for file, old, new in changes:
        source = (folder / file).read_text(encoding="utf-8")
        if source.count(old) != 1:
            raise ValueError(f"{file} should hold this once, and does {source.count(old)} times; is an exercise "
                             f'applied already? git checkout "*.py" undoes it\n  {old.strip()}')
        (folder / file).write_text(source.replace(old, new), encoding="utf-8")


def score(command, changes=()):
    """(R@1, mAP), text to image on the test split, of a command in a changed copy of the scripts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "lab").mkdir()
        for script in (*ROOT.glob("*.py"), *ROOT.glob("lab/*.py")):
            shutil.copy(script, folder / script.relative_to(ROOT))
        shutil.copytree(ROOT / "lab/toyclip", folder / "lab/toyclip")
        change(folder, changes)
        out = ["--page", folder / "page.html"] if "eval.py" in command else ["--out", folder / "run"]
        done = subprocess.run([sys.executable, *shlex.split(command), *out], cwd=folder, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(done.stdout)
    r1, mean_ap = re.search(r"^(?:test|text to image) +R@1 ([\d.]+) .*mAP ([\d.]+)", done.stdout, re.MULTILINE).groups()
    return float(r1), float(mean_ap)


def try_all(numbers):
    """Print the table, a row per exercise."""
    if not (ROOT / MAIN / "report.html").exists():                      # written at the end of a run
        resume = ["--resume"] if (ROOT / MAIN / "last.pt").exists() else []
        subprocess.run([sys.executable, "tbps.py", *resume], cwd=ROOT, check=True)
    r1, mean_ap = score(SCORE)
    print("| | exercise | change | R@1 | mAP |\n|---|---|---|---|---|")
    print(f"| 0 | nothing | | {r1:.2f} | {mean_ap:.2f} |", flush=True)
    for n in numbers:
        task, command, changes = EXERCISES[n - 1]
        found = score(command, changes)
        files = ", ".join(dict.fromkeys(file for file, *_ in changes))
        where = files or f"`{command.removeprefix(TRAIN).strip()}`"
        cells = [f"{value:.2f} ({value - base:+.1f})" for value, base in zip(found, (r1, mean_ap))]
        print(f"| {n} | {task} | {where} | {' | '.join(cells)} |", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("numbers", nargs="*", type=int, metavar="N", help="exercises (default: all)")
    p.add_argument("--apply", action="store_true", help="make the changes here instead")
    args = p.parse_args()
    unknown = [n for n in args.numbers if not 1 <= n <= len(EXERCISES)]     # choices= would refuse an empty list
    if unknown:
        p.error(f"{unknown[0]} is no exercise; there are 1 to {len(EXERCISES)}")
    if not args.apply:
        try_all(args.numbers or range(1, len(EXERCISES) + 1))
        return
    if len(args.numbers) != 1:
        p.error("--apply takes one exercise: changes would add up")
    n = args.numbers[0]
    _, command, changes = EXERCISES[n - 1]
    change(ROOT, changes)
    out = f" --out runs/tour-{n}" if command.startswith(TRAIN) else ""  # keeps the model of `python tbps.py`
    print(f"{n}: python {command}{out}")


if __name__ == "__main__":
    data.command(main)

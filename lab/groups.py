"""What is run. A group is one table of lab/RESULTS.md: {row: options}, added to the command line that its runs share.

A row "B < A" is compared with row A, a row "C < A < B" with both. Options that name a script are a whole command line.
{ROW} in a command is the folder of that row's run with the same seed, so that run is made first.

Runs fine-tune, as the papers do, from a model that was pre-trained on the generic domain. A command line is the key of
its scores in results.jsonl, so a renamed option must be renamed there, too."""

PRETRAINED = "runs/ablations/generic"   # made first, in 5 minutes


def fraction_of_persons(fraction, epochs):
    """Fine-tuning on this fraction of the persons, drawn by the seed."""
    return (f"tbps.py --dataset toy --share {fraction} --clip {PRETRAINED}/best.pt --epochs {epochs} "
            f"--set warmup={epochs / 6:g}")


FINE_TUNE = f"tbps.py --dataset toy --clip {PRETRAINED}/best.pt --epochs 3 --set warmup=0.5"
# With all persons most parts of TBPS-CLIP make no difference. With a quarter a model can overfit, so regularisation can
# help, as it does for the large models of the papers.
QUARTER = fraction_of_persons("0.25", 10)
TENTH = fraction_of_persons("0.1", 20)
TWENTIETH = fraction_of_persons("0.05", 40)

CLIP = "--method baseline"
SIMPLIFIED = "--method tbps-clip-simplified"
SHIFT = f"{SIMPLIFIED} --set image_aug=shift"                           # CTLG's augmentation instead of the pool
CLIP_STAR = f"{CLIP} --set text_dropout=0.05 lock_patch=1"
AUGMENTED = f"{CLIP_STAR} image_aug=pool deletion=0.05"
N_ITC = f"{AUGMENTED} itc=0 nitc=1"

GROUPS = {}                             # group: (the command line that its runs share, {row: options})
SEEDS = {"seeds": 10, "shift": 8}       # groups with more than three seeds

# ---- all methods -----------------------------------------------------------------------------------------------------

LCR2S = f"distill.py --dataset toy --clip {PRETRAINED}/best.pt --epochs 3 --set warmup=0.5 tau=0.05"

GROUPS["methods"] = FINE_TUNE, {
    "CLIP": CLIP,
    "tbps-clip-simplified < CLIP": SIMPLIFIED,
    "tbps-clip < CLIP": "--method tbps-clip",
    "irra < CLIP": "--method irra",
    "uit < CLIP": "--method uit",
    "ctlg < CLIP": "--method ctlg",
    "simplified, shift < CLIP < tbps-clip-simplified": SHIFT,
    "lcr2s < CLIP": LCR2S,
}
GROUPS["seeds"] = FINE_TUNE, {"TBPS-CLIP simplified": SIMPLIFIED}


def equal_time(method, epochs):
    """As many epochs as this method can train while simplified trains 10."""
    return fraction_of_persons("0.25", epochs).replace("tbps.py", f"tbps.py --method {method}")


GROUPS["equal-time"] = QUARTER, {
    "simplified, shift": SHIFT,
    "CLIP < simplified, shift": CLIP,
    "TBPS-CLIP simplified < simplified, shift": SIMPLIFIED,
    "tbps-clip, 3 epochs < simplified, shift": equal_time("tbps-clip", 3),
    "irra, 4 epochs < simplified, shift": equal_time("irra", 4),
    "uit, 4 epochs < simplified, shift": equal_time("uit", 4),
    "ctlg, 8 epochs < simplified, shift": equal_time("ctlg", 8),
    "lcr2s, twice 4 epochs < simplified, shift":
        fraction_of_persons("0.25", 4).replace("tbps.py", "distill.py") + " tau=0.05",
}

# ---- TBPS-CLIP -------------------------------------------------------------------------------------------------------

GROUPS["tricks"] = QUARTER, {
    "CLIP": CLIP,
    "dropout < CLIP": f"{CLIP} --set text_dropout=0.05",
    "locked patches < CLIP": f"{CLIP} --set lock_patch=1",
    "N-ITC < CLIP": f"{CLIP} --set itc=0 nitc=1",
    "soft labels < N-ITC": f"{CLIP} --set itc=0 nitc=1 soft=0.5",
    "all of these < CLIP < N-ITC": f"{CLIP_STAR} itc=0 nitc=1 soft=0.5",
}
GROUPS["losses"] = QUARTER, {
    "CLIP*, augmented": AUGMENTED,
    "N-ITC < CLIP*, augmented": N_ITC,
    "SS of images < CLIP*, augmented": f"{AUGMENTED} ss=0.4",
    "SS of texts < CLIP*, augmented": f"{AUGMENTED} ss_text=0.4",
    "MVS of images < N-ITC": f"{N_ITC} mvs=1",
    "MVS of texts < N-ITC": f"{N_ITC} mvs_text=1",
    "R-ITC < CLIP*, augmented": f"{AUGMENTED} ritc=1",
    "C-ITC < CLIP*, augmented": f"{AUGMENTED} citc=0.1",
    # the paper sums over the batch of 128 with weights of 1; the official code takes means, with weights of 0.25
    "C-ITC as printed < CLIP*, augmented": f"{AUGMENTED} citc=512",
    "simplified < CLIP*, augmented": f"{N_ITC} ritc=1",
    "TBPS-CLIP, all of it < CLIP*, augmented < simplified": f"{N_ITC} ritc=1 citc=0.1 ss=0.4 mvs=1",
    "all but SS < TBPS-CLIP, all of it < simplified": f"{N_ITC} ritc=1 citc=0.1 mvs=1",
}
AUGMENTATIONS = [
    "crop", "erase", "gray", "blur", "jitter", "hue", "flip", "vflip", "rotation", "stack", "autoaugment",
    "randaugment", "trivialaugment", "pool", "reid", "shift",
]
GROUPS["images"] = QUARTER, {"CLIP*": CLIP_STAR} | {
    f"{name} < CLIP*": f"{CLIP_STAR} image_aug={name}" for name in AUGMENTATIONS
}
TEXT_AUGMENTATIONS = {
    "synonym": "synonyms", "insertion": "insertions", "swap": "swaps", "deletion": "deletions", "eda": "EDA",
}
GROUPS["texts"] = QUARTER, {"CLIP*": CLIP_STAR} | {
    f"{name} {rate} < CLIP*": f"{CLIP_STAR} {key}={rate}"
    for key, name in TEXT_AUGMENTATIONS.items() for rate in (0.05, 0.1, 0.2)
}


def variant(changes):
    """Training on a quarter of the persons with a change of lab/train_variants.py."""
    return QUARTER.replace("tbps.py", f"lab/train_variants.py {changes}")


GROUPS["why-ss"] = QUARTER, {           # does self-supervision cost because its views hide what captions tell?
    "CLIP*, augmented": AUGMENTED,
    "SS of images < CLIP*, augmented": f"{AUGMENTED} ss=0.4",
    "views keep their colours < SS of images < CLIP*, augmented": f"{variant('colours')} {AUGMENTED} ss=0.4",
    "views show most of the person < SS of images < CLIP*, augmented": f"{variant('crops')} {AUGMENTED} ss=0.4",
    "both < SS of images < CLIP*, augmented": f"{variant('colours,crops')} {AUGMENTED} ss=0.4",
}
GROUPS["why-images"] = QUARTER, {       # do grey images and learned policies cost because they hide what captions tell?
    "CLIP*": CLIP_STAR,
    "gray < CLIP*": f"{CLIP_STAR} image_aug=gray",
    "gray, captions without colours then < gray < CLIP*": f"{variant('untold')} {CLIP_STAR} image_aug=gray",
    "trivialaugment < CLIP*": f"{CLIP_STAR} image_aug=trivialaugment",
    "trivialaugment, colours kept < trivialaugment < CLIP*": f"{variant('moves')} {CLIP_STAR} image_aug=trivialaugment",
    "trivialaugment, small moves < trivialaugment < CLIP*": f"{variant('small')} {CLIP_STAR} image_aug=trivialaugment",
    "autoaugment < CLIP*": f"{CLIP_STAR} image_aug=autoaugment",
    "autoaugment, colours kept < autoaugment < CLIP*": f"{variant('moves')} {CLIP_STAR} image_aug=autoaugment",
    "randaugment < CLIP*": f"{CLIP_STAR} image_aug=randaugment",
    "randaugment, colours kept < randaugment < CLIP*": f"{variant('moves')} {CLIP_STAR} image_aug=randaugment",
}
GROUPS["why-texts"] = QUARTER, {        # are synonyms harmless because the words of our table are right?
    "CLIP*": CLIP_STAR,
    "synonyms 0.1 < CLIP*": f"{CLIP_STAR} synonym=0.1",
    "synonyms 0.1, of another word < synonyms 0.1 < CLIP*": f"{variant('senses')} {CLIP_STAR} synonym=0.1",
    "insertions 0.1 < CLIP*": f"{CLIP_STAR} insertion=0.1",
    "insertions 0.1, of another word < insertions 0.1 < CLIP*": f"{variant('senses')} {CLIP_STAR} insertion=0.1",
}

# ---- what the other methods could lend to TBPS-CLIP simplified -------------------------------------------------------

LIKE_SIMPLIFIED = (
    "--set tau=0.05 image_aug=pool deletion=0.05 text_dropout=0.05 clean=1 norm=imagenet "
    "resize=bilinear eval_resize=bicubic"
)
GROUPS["ingredients"] = QUARTER, {
    "simplified": SIMPLIFIED,
    "overlapping patches < simplified": f"{SIMPLIFIED} --set stride=6",
    "random-count sampler < simplified": f"{SIMPLIFIED} --set sampler=random-count",
    "shift instead of the pool < simplified": SHIFT,
    "synonyms < simplified": f"{SIMPLIFIED} --set synonym=0.1",
    "batches of 64 < simplified": f"{SIMPLIFIED} --batch 64",
    "pruned captions < simplified": f"{SIMPLIFIED} --set prune=0.2",
    "approximate text < simplified": f"{SIMPLIFIED} --set approximate=0.5",
    "tau 0.02 < simplified": f"{SIMPLIFIED} --set tau=0.02",
    "SDM + ID + triplet instead, tau 0.05 < simplified": f"--method irra {LIKE_SIMPLIFIED} mlm=0 triplet=10",
    "ITC instead, tau 0.05 < simplified": f"--method ctlg {LIKE_SIMPLIFIED} mixup=0 approximate=0",
    "mixup of features < ITC instead, tau 0.05":
        f"--method ctlg {LIKE_SIMPLIFIED} mixup=0 approximate=0 feature_mixup=1",
}
GROUPS["combinations"] = QUARTER, {
    "shift instead of the pool": SHIFT,
    "no deletion < shift instead of the pool": f"{SHIFT} deletion=0",
    "no deletion, no dropout < shift instead of the pool": f"{SHIFT} deletion=0 text_dropout=0",
    "pruned < shift instead of the pool": f"{SHIFT} prune=0.2",
    "pruned, random-count < shift instead of the pool": f"{SHIFT} prune=0.2 sampler=random-count",
}
GROUPS["shift"] = QUARTER, {
    "simplified": SIMPLIFIED,
    "shift instead of the pool < simplified": SHIFT,
    "shift, pruned, random-count < simplified < shift instead of the pool": f"{SHIFT} prune=0.2 sampler=random-count",
}

# ---- modules, few persons, other domains -----------------------------------------------------------------------------


def text_layers(how, layers):
    return FINE_TUNE.replace("tbps.py", f"lab/probes.py {how} {layers}") + f" {CLIP}"


GROUPS["layers"] = FINE_TUNE, {
    "all text layers": CLIP,
    "layer 0 frozen < all text layers": text_layers("freeze", 0),
    "layer 1 frozen < all text layers": text_layers("freeze", 1),
    "layer 0 dropped < all text layers": text_layers("drop", 0),
    "layer 1 dropped < all text layers": text_layers("drop", 1),
}


def frozen_encoders(common):
    """Full fine-tuning, and learners around frozen encoders."""
    few_shot = common.replace("tbps.py", "lab/few_shot.py")
    return {
        "full fine-tuning": CLIP,
        "CoOp < full fine-tuning": f"{few_shot} --method coop",
        "CLIP-Adapter < full fine-tuning": f"{few_shot} --method adapter",
    }


FEW_PERSONS = {
    "TBPS-CLIP simplified < full fine-tuning": SIMPLIFIED,
    "simplified, shift < full fine-tuning": SHIFT,
}
GROUPS["share-0.05"] = TWENTIETH, frozen_encoders(TWENTIETH) | FEW_PERSONS
GROUPS["share-0.1"] = TENTH, frozen_encoders(TENTH) | FEW_PERSONS
GROUPS["share-0.25"] = QUARTER, frozen_encoders(QUARTER)
GROUPS["share-1"] = FINE_TUNE, frozen_encoders(FINE_TUNE)
GROUPS["why-few"] = TENTH, {            # do its losses or its augmentation cost TBPS-CLIP simplified, with few persons?
    "full fine-tuning": CLIP,
    "simplified < full fine-tuning": SIMPLIFIED,
    "its losses alone < full fine-tuning < simplified": f"{CLIP} --set itc=0 nitc=1 ritc=1",
    "its augmentation and dropout alone < full fine-tuning < simplified":
        f"{CLIP} --set image_aug=pool deletion=0.05 text_dropout=0.05",
}
FRONTS = FINE_TUNE.replace("tbps.py", "lab/domain_shift.py --only fronts --train").replace("--epochs 3", "--epochs 6")
GROUPS["domains"] = FINE_TUNE, {        # for lab/domain_shift.py, which scores them on other test sets
    "toy": SIMPLIFIED,
    "fronts": f"{FRONTS} {SIMPLIFIED}",
}

# ---- IRRA and UIT ----------------------------------------------------------------------------------------------------

SDM_ID = "--method irra --set mlm=0"
UIT_PARTS = {
    "ITC": f"{SDM_ID} sdm=0 id=0 itc=1",
    "SDM < ITC": f"{SDM_ID} id=0",
    "SDM + ID < SDM": SDM_ID,
    "SDM + ID + triplet < SDM + ID": f"{SDM_ID} triplet=10",
    "SDM + ID + restoration < SDM + ID": f"{SDM_ID} restoration=10",
    "SDM + ID + pruning < SDM + ID": f"{SDM_ID} prune=0.2",
    "SDM + ID + masking < SDM + ID": f"{SDM_ID} mask_content=0.3 mask_other=0.05 mask_all=1",
    "UIT, all of it < SDM + ID": "--method uit",
    "IRRA, with MLM < SDM + ID": "--method irra",
}
GROUPS["uit"] = FINE_TUNE, UIT_PARTS
GROUPS["uit-few"] = f"tbps.py --dataset toy-few --clip {PRETRAINED}/best.pt --epochs 20 --set warmup=2", UIT_PARTS
GROUPS["uit-long"] = f"tbps.py --dataset toy --clip {PRETRAINED}/best.pt --epochs 10 --set warmup=1", {
    "UIT, all of it < SDM + ID": "--method uit",
    "SDM + ID + restoration < SDM + ID": f"{SDM_ID} restoration=10",
    "ITC": f"{SDM_ID} sdm=0 id=0 itc=1",
    "SDM + ID": SDM_ID,
}
GROUPS["uit-temperature"] = FINE_TUNE, {
    "ITC": f"{SDM_ID} sdm=0 id=0 itc=1",
    "SDM < ITC": f"{SDM_ID} id=0",
    "ITC, tau 0.05 < ITC": f"{SDM_ID} sdm=0 id=0 itc=1 tau=0.05",
    "SDM, tau 0.05 < ITC, tau 0.05": f"{SDM_ID} id=0 tau=0.05",
    "SDM, random-count sampler < SDM": f"{SDM_ID} id=0 sampler=random-count",
}
GROUPS["uit-choices"] = FINE_TUNE, {
    "UIT, all of it": "--method uit",
    "UIT, new layers x5 < UIT, all of it": "--method uit --set lr_new=5 lr_bias=2",
    "UIT, clean captions < UIT, all of it": "--method uit --set mask_all=0",
    "IRRA, with MLM": "--method irra",
    "IRRA, masked captions in all losses < IRRA, with MLM": "--method irra --set mask_all=1",
}

# ---- LCR2S -----------------------------------------------------------------------------------------------------------

LCR2S_PARTS = {  # with the frozen encoders of the baseline; a student differs from the baseline in the losses that copy
    "baseline": "--stage student --set affinity=0",
    "teacher": "--baseline {baseline}/student/best.pt --stage teacher",
    "A-KD < baseline < SELF": "--teacher {teacher}/teacher/last.pt",
    "SELF < baseline": "--teacher {teacher}/teacher/last.pt --set target=self",
    "CENTROID < baseline < SELF": "--teacher {teacher}/teacher/last.pt --set target=centroid",
    "affinity without the pair < baseline < SELF": "--teacher {teacher}/teacher/last.pt --set pair=0",
    "features < baseline": "--teacher {teacher}/teacher/last.pt --set affinity=0 features=0.5",
    "relations < baseline": "--teacher {teacher}/teacher/last.pt --set affinity=0 relations=0.2",
    "P-KD < baseline < A-KD": "--teacher {teacher}/teacher/last.pt --set affinity=0 features=0.5 relations=0.2",
}
GROUPS["lcr2s"] = LCR2S, LCR2S_PARTS | {
    "baseline, warm < baseline": "--teacher {teacher}/teacher/last.pt --set warm=1 affinity=0",
    "A-KD, warm < baseline, warm < SELF, warm": "--teacher {teacher}/teacher/last.pt --set warm=1",
    "SELF, warm < baseline, warm": "--teacher {teacher}/teacher/last.pt --set warm=1 target=self",
    "teacher, mean": "--baseline {baseline}/student/best.pt --stage teacher --set fusion=mean",
    "A-KD from the mean < A-KD < SELF": "--teacher {teacher, mean}/teacher/last.pt",
    "teacher, support 1": "--baseline {baseline}/student/best.pt --stage teacher --set support=1",
    "A-KD, support 1 < A-KD": "--teacher {teacher, support 1}/teacher/last.pt --set support=1",
    "teacher, support 2": "--baseline {baseline}/student/best.pt --stage teacher --set support=2",
    "A-KD, support 2 < A-KD": "--teacher {teacher, support 2}/teacher/last.pt --set support=2",
    "teacher, end to end": "--method lcr2s-paper --stage teacher",
    "P-KD, end to end < baseline < P-KD":
        "--teacher {teacher, end to end}/teacher/last.pt --set affinity=0 features=0.5 relations=0.2",
}
GROUPS["lcr2s-small"] = LCR2S, {        # students of half the depth, or half the width
    "baseline": LCR2S_PARTS["baseline"],
    "teacher": LCR2S_PARTS["teacher"],
    "half": "--teacher {teacher}/teacher/last.pt --student half --set affinity=0",
    "half, A-KD < half < half, SELF": "--teacher {teacher}/teacher/last.pt --student half",
    "half, SELF < half": "--teacher {teacher}/teacher/last.pt --student half --set target=self",
    "narrow": "--teacher {teacher}/teacher/last.pt --student narrow --set affinity=0",
    "narrow, A-KD < narrow < narrow, SELF": "--teacher {teacher}/teacher/last.pt --student narrow",
    "narrow, SELF < narrow": "--teacher {teacher}/teacher/last.pt --student narrow --set target=self",
}
LCR2S_FEW = f"distill.py --dataset toy-few --clip {PRETRAINED}/best.pt --epochs 20 --set warmup=2 tau=0.05"
GROUPS["lcr2s-few"] = LCR2S_FEW, LCR2S_PARTS

# ---- CTLG and generated pairs ----------------------------------------------------------------------------------------

SHARP = "--method ctlg --set approximate=0 mixup=0"                     # contrast at a temperature of 0.005, no more
DIFFUSION = {"ctlg": ("toy", 14), "ctlg-few": ("toy-few", 100)}         # group: data set and epochs of its generator


def ctlg(dataset, epochs, longer, count, min_score):
    """The parts of CTLG. `longer`: epochs without generated pairs that take at least as many steps as with them."""
    common = f"tbps.py --dataset {dataset} --clip {PRETRAINED}/best.pt --epochs {epochs} --set warmup={epochs / 6:g}"
    generate = f"generate.py --dataset {dataset} --diffusion runs/{dataset}-diffusion-0 --count {count}"
    return common, {
        "baseline": f"{SHARP} tau=0.02",
        "pairs": f"{generate} --judge {{baseline}}/best.pt",
        "tau 0.005 < baseline": SHARP,
        "same number of steps < tau 0.005": f"{SHARP} epochs={longer}",
        "+ generated pairs < tau 0.005 < same number of steps": f"{SHARP} --extra {{pairs}}",
        "+ generated pairs, filtered < tau 0.005 < same number of steps < + generated pairs":
            f"{SHARP} --extra {{pairs}} --min-score {min_score}",
        "+ approximate text < tau 0.005": f"{SHARP} approximate=0.5",
        "+ mixup < tau 0.005": f"{SHARP} mixup=0.5",
        "+ mixup of features < tau 0.005": f"{SHARP} feature_mixup=1",
        "CTLG, all of it < tau 0.005 < same number of steps":
            f"--method ctlg --extra {{pairs}} --min-score {min_score}",
    }


GROUPS["ctlg"] = ctlg("toy", 3, 4, 1500, "direction=0.65")
GROUPS["ctlg-few"] = ctlg("toy-few", 20, 30, 600, "direction=0.45")
GROUPS["ctlg-few"][1].update({          # pairs of a diffusion model that saw all persons
    "pairs, all seen":
        "generate.py --dataset toy-few --diffusion runs/toy-diffusion-0 --count 600 --judge {baseline}/best.pt",
    "+ pairs of a model that saw all < tau 0.005 < same number of steps < + generated pairs":
        f"{SHARP} --extra {{pairs, all seen}}",
})
GROUPS["ctlg-choices"] = FINE_TUNE, {
    "tau 0.005": SHARP,
    "tau 0.05 < tau 0.005": f"{SHARP} tau=0.05",
    "all texts of the image are positives < tau 0.005": f"{SHARP} positives=image",
    "all texts of the person are positives < tau 0.005": f"{SHARP} positives=person",
    "rate 1e-4 < tau 0.005": f"{SHARP} lr=1e-4",
    "rate 1e-5 < tau 0.005": f"{SHARP} lr=1e-5",
}

# ---- published differences -------------------------------------------------------------------------------------------


def by_rate(name, *values):
    return {f"{name} {rate}": value for rate, value in zip((0.05, 0.1, 0.2), values)}


# Quoted: R@1 on CUHK-PEDES minus that of the first row a row is compared with (MVS: minus that of CLIP*, augmented).
PUBLISHED = {
    # TBPS-CLIP, arXiv 2308.10045, ViT-B/32
    "tricks": {"dropout": 0.39, "locked patches": 0.60, "soft labels": 0.86},
    "images": {
        "crop": 0.95, "erase": 0.30, "gray": 0.95, "blur": -9.04, "jitter": 0.52, "hue": -0.22, "flip": 1.14,
        "vflip": -0.11, "rotation": 1.16, "stack": 1.58, "autoaugment": 1.09, "randaugment": 1.24,
        "trivialaugment": 1.25, "pool": 1.79,
    },
    "texts": {
        **by_rate("synonyms", -0.39, -2.89, -4.64),
        **by_rate("insertions", -0.63, -1.51, -4.25),
        **by_rate("swaps", -7.93, -13.28, -14.83),
        **by_rate("deletions", 1.19, 0.65, -0.03),
        **by_rate("EDA", -0.91, -2.17, -3.68),
    },
    "losses": {
        "N-ITC": 0.13, "SS of images": 0.76, "SS of texts": -0.81, "MVS of images": 0.72, "MVS of texts": -0.32,
        "R-ITC": 1.41, "C-ITC": 0.37, "TBPS-CLIP, all of it": 2.76,
    },
    # TBPS-CLIP, few-shot probe
    "share-0.05": {"TBPS-CLIP simplified": 5.28, "CoOp": -27.00, "CLIP-Adapter": -26.41},
    "share-0.1": {"TBPS-CLIP simplified": 7.89, "CoOp": -30.27, "CLIP-Adapter": -29.76},
    # IRRA, arXiv 2303.12501
    "uit": {"SDM": 2.23, "SDM + ID": 0.10, "IRRA, with MLM": 2.86},
}


def row(name):
    """The row's own name: what comes before the first " < "."""
    return name.split(" < ")[0]


def bases(name):
    """Names of the rows that this one is compared with."""
    return name.split(" < ")[1:]


def command(group, name, seed):
    """The command line of a run, which is also the key of its scores."""
    common, rows = GROUPS[group]
    options = rows[name] if ".py " in rows[name] else f"{common} {rows[name]}"
    return f"{options} --seed {seed}"

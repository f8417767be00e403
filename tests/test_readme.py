"""Commands of the README and of lab/*.md exist, their links lead somewhere, and scripts behave in a shell."""

import re
import shlex

import pytest
import torch
from PIL import Image

import data
import distill
import generate
import tbps
from conftest import ROOT, run, start
from gallery import checkpoint                                          # noqa: F401

PAGES = ["README.md", *(p.relative_to(ROOT).as_posix() for p in sorted(ROOT.glob("lab/*.md")))]
PARSERS = {"tbps.py": tbps, "distill.py": distill, "generate.py": generate}
SCRIPTS = sorted(p.name for p in ROOT.glob("*.py"))


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def commands(page):
    """Lines of a page's shell blocks that run one of our scripts, without comment and interpreter."""
    found = []
    for block in re.findall(r"```(?:sh|bash)\n(.*?)```", read(page), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split("#")[0].split("&&"):
                if match := re.match(r"\s*(?:torchrun\s.*?|(?:\.venv/bin/)?python )(\S+\.py.*)", command):
                    found.append(match[1].strip())
    return found


COMMANDS = [(page, command) for page in PAGES for command in commands(page)]


def test_readme_has_commands():
    assert len(commands("README.md")) >= 8


@pytest.mark.parametrize("page, command", COMMANDS)
def test_commands_parse(page, command):
    """Each command names a script that exists and options that it has."""
    script, *options = shlex.split(command)
    assert (ROOT / script).exists(), script
    if "--help" in options:
        assert "usage:" in run(script, *options)
    elif script in PARSERS:
        PARSERS[script].parse_args(options)
    else:
        source = read(script)
        assert [o for o in options if o.startswith("--") and f'"{o}"' not in source] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Relative links and pictures exist; links within the page name one of its headings."""
    text = read(page)
    headings = [re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
                for line in text.splitlines() if line.startswith("#")]
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif "://" not in target:
            assert ((ROOT / page).parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "losses.py"])
def test_help(script):
    said = run(script, "--help")
    assert "usage:" in said and "--dataset" in said


def test_a_users_mistake_in_a_shell(tmp_path):
    """Exit code 2, a sentence, no traceback; most other tests run commands within their own process."""
    process = start("data.py", "--dataset", "cuhk", "--data-root", tmp_path)
    said = process.communicate()[0]
    assert process.returncode == 2 and said.startswith("error: the annotation of CUHK") and "Traceback" not in said


def test_out_of_memory_says_what_to_do(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has a total capacity of 8 GiB")
    with pytest.raises(SystemExit) as e:
        data.command(main)
    said = capsys.readouterr().err
    assert e.value.code == 2
    assert "CUDA out of memory\n" in said and "--micro-batch" in said and "--checkpoint-blocks" in said


@pytest.mark.parametrize("script", [p.name for p in sorted(ROOT.glob("lab/*.py")) if "ArgumentParser" in p.read_text()])
def test_help_of_experiments(script):
    said = run(f"lab/{script}", "--help")
    assert "usage:" in said and f"python lab/{script}" in said


def test_readme_is_short():
    text = read("README.md")
    assert len(text.splitlines()) <= 250 and len(text.split()) <= 2500


def test_python_in_the_readme(checkpoint, people, tmp_path):
    """The lines as they are written, on three images and captions."""
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    for path, record in zip(paths, people):
        Image.fromarray(record["image"]).save(path)
    (code,) = re.findall(r"```python\n(.*?)```", read("README.md"), re.DOTALL)
    names = dict(paths=paths, captions=["a man", "a woman in a red coat", "a person"])
    exec(code.replace("runs/toy-tbps-clip-simplified-0/best.pt", str(checkpoint)), names)
    alone = names["model"].encode_text(names["tokenizer"](["a man"]))
    image = names["model"].encode_image(names["preprocessing"].image(people[1]["image"])[None])
    expected = torch.nn.functional.cosine_similarity(alone, image)
    assert names["cosine"].shape == (3, 3) and names["cosine"][0, 1].item() == pytest.approx(expected.item(), abs=1e-5)

"""The documentation: its code runs and prints what it says, its links work, its reference is complete."""

import doctest
import inspect
import re
from collections import Counter
from pathlib import Path

import api_reference
import pytest
import torch
from checkpoints import write_gguf, write_mlx
from gguf import GGMLQuantizationType as Type
from tokens import small_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import torch_fused
from torch_fused.demo import demo_model_folder
from torch_fused.hf import apply_torch_fused, quantize_
from torch_fused.hf.cache import CACHE

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SIGNATURES = ROOT / "docs" / "api.md"  # its Python blocks are not programs

ENTRIES = [entry for _, entries in api_reference.public_api() for entry in entries]

FROM_PRETRAINED = AutoModelForCausalLM.from_pretrained
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def small_model(name="", *_, dtype=torch.float32, quantization_config=None, **options):
    """Two layers with random weights, for any name; a folder is loaded."""
    if name and Path(name).is_dir():
        return FROM_PRETRAINED(name, dtype=dtype, **options)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.15,
        pad_token_id=1,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Qwen2ForCausalLM(config).to({"bfloat16": torch.bfloat16}.get(dtype, dtype)).eval()
    if quantization_config is not None:
        quantize_(model, bits=quantization_config.bits, group_size=quantization_config.group_size)
    return model


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Replaces downloads by small models, and runs in a temporary folder."""
    demo_model_folder()  # converted before the loading functions are replaced
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", small_model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", small_tokenizer)
    monkeypatch.chdir(tmp_path)
    folder = Path("mlx-community", "Qwen2.5-0.5B-Instruct-4bit")
    dense = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]  # columns that groups do not divide
    write_mlx(folder, small_model(), {"group_size": 64, "bits": 4}, dense)
    small_tokenizer().save_pretrained(folder)
    write_gguf(Path("SmolLM2-135M-Instruct.Q4_1.gguf"), small_model(), {"token_embd.weight": Type.Q8_0})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster for models this small
    yield
    torch.set_num_threads(threads)


def for_this_transformers(text: str) -> str:
    """With the old name of the argument that transformers 5.24 renamed, if needed; the pages mention it."""
    return text.replace("cache=cache", f"{CACHE}=cache")


def check_output(actual: str, expected: str) -> None:
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.OutputChecker().check_output(expected, actual, options), f"printed\n{actual}\ninstead of\n{expected}"


# ---- pages ----------------------------------------------------------------------------------------------------------


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """(language, text, line) of each fenced block."""
    text = page.read_text()
    return [(match[1], match[2], text[: match.start(2)].count("\n")) for match in FENCED.finditer(text)]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != SIGNATURES and "```python" in page.read_text()], ids=lambda p: p.name
)
def test_the_code_of_pages_runs(page, offline, capsys):
    """A page's Python blocks form one program; a text block after one is its expected output."""
    namespace = {"__name__": page.stem}
    page_blocks = blocks(page)
    for i, (language, text, line) in enumerate(page_blocks):
        if language != "python":
            continue
        capsys.readouterr()
        exec(compile("\n" * line + for_this_transformers(text), str(page), "exec"), namespace)
        following = page_blocks[i + 1] if i + 1 < len(page_blocks) else ("", "", 0)
        if following[0] == "text":
            check_output(capsys.readouterr().out, following[1])


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    seen: Counter[str] = Counter()
    found = set()
    for title in re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE):
        name = api_reference.anchor(title)
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_work(page):
    """Files and headings exist; addresses are well-formed."""
    # Images too; the text may hold code.
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text())):
        if "://" in target:
            assert re.fullmatch(r"https://[\w.-]+\.\w+(/[\w./~%+-]*)?(#[\w.-]+)?", target), target
            continue
        file, _, heading = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name} links to {target}"
        assert path == ROOT or ROOT in path.parents, f"{page.name} links out of the tree, to {target}"
        if heading:
            assert heading in headings(path), f"{page.name} links to {target}; there are {sorted(headings(path))}"


def test_every_page_is_reached_from_the_readme():
    """Every page is linked from another."""
    reached, new = set(), [ROOT / "README.md"]
    while new:
        page = new.pop()
        reached.add(page)
        links = re.findall(r"\]\(([^)\s#]+\.md)[^)]*\)", page.read_text())
        paths = {(page.parent / link).resolve() for link in links}
        new += [path for path in paths - reached if path.exists()]
    assert reached >= set(PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_targets_named_in_code_exist(page):
    """`tests/test_x.py`, `make target`: the files and targets that a page names exist."""
    literals = re.findall(r"`([^`\n]+)`", FENCED.sub("", page.read_text()))
    commands = [*literals, *re.findall(r"^    (.*)$", page.read_text(), re.MULTILINE)]
    makefile = (ROOT / "Makefile").read_text()
    for command in commands:
        for target in re.findall(r"^make (?:\w+=\S+ )*([a-z-]+)", command):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: make {target}"
        if re.fullmatch(r"(benchmarks|csrc_mps|docs|examples|tests|tools|torch_fused|\.ci)/[\w./-]*", command):
            assert (ROOT / command).exists(), f"{page.name}: {command}"


# ---- the API reference ----------------------------------------------------------------------------------------------


def test_every_flag_of_a_patch_is_in_its_table():
    """In the order of the arguments."""
    _, table = (ROOT / "docs/generate.md").read_text().split("| flag | what it does |\n|---|---|\n")
    flags = re.findall(r"^\| `(\w+)` \|", table.split("\n\n")[0], re.MULTILINE)
    assert flags == list(inspect.signature(apply_torch_fused).parameters)[1:]


def test_api_reference_is_up_to_date():
    """docs/api.md is the output of `python tools/api_reference.py`."""
    assert SIGNATURES.read_text() == api_reference.render()


def test_public_api_is_the_packages():
    """Every public module of the package is in the reference."""
    modules = {module.removeprefix("torch_fused.") for module, _ in api_reference.public_api()}
    assert modules - {"torch_fused"} | {"status"} == set(torch_fused.__all__)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_docstring_is_complete(entry):
    """A summary; each parameter; results, errors and an example for functions; shapes and dtypes."""
    docstring = inspect.getdoc(entry.value) or ""
    assert re.match(r"\S.*[.:]", docstring), "no summary"
    sections = api_reference.sections(docstring)
    starts = [line.partition(": ")[0] for line in sections.get("Args", "").splitlines()]
    named = {name for start in starts for name in re.findall(r"\w+", start)}
    assert set(entry.parameters) <= named, set(entry.parameters) - named
    if "." in entry.name or entry.value in api_reference.returned_classes():
        return
    if inspect.isfunction(entry.value):
        assert "Returns" in sections or "Yields" in sections
    if not isinstance(entry.value, type) or not issubclass(entry.value, Exception):
        assert "Example" in sections
        assert "Raises" in sections or entry.name == "status"
    if entry.value.__module__.startswith(("torch_fused.ops", "torch_fused.nn", "torch_fused.optim")):
        assert re.search(r"``\(|any shape|any input|groups of them", docstring), "no shapes"
        assert "float32, float16 or bfloat16" in docstring, "no dtypes"


@pytest.mark.parametrize(
    "entry", [entry for entry in ENTRIES if ">>>" in (inspect.getdoc(entry.value) or "")], ids=lambda entry: entry.name
)
def test_docstring_example_runs(entry, offline):
    """And prints what it shows."""
    model = small_model()
    input_ids = torch.tensor([[2, 3, 4, 5]])
    names = {"torch": torch, "torch_fused": torch_fused, "model": model, "tokenizer": small_tokenizer()}
    names |= {"input_ids": input_ids, **vars(inspect.getmodule(entry.value))}
    docstring = for_this_transformers(inspect.getdoc(entry.value))
    test = doctest.DocTestParser().get_doctest(docstring, names, entry.name, None, 0)
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)

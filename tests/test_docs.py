"""What README and docs promise: their code runs, their links lead somewhere, and the first page stays short."""

import json
import re
from pathlib import Path

import conditions
import front_section
import pytest
from documents import DOCUMENTS, PAGES, README, ROOT
from tiny import tiny_llama, tiny_tokenizer

#: a fence of Python, and the comment before it that says why it does not run
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?```python\n(?P<code>.*?)```", re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")

#: what stands for names of a hub, GPUs and long trainings; the tokenizer of the test has a token a byte
STAND_INS = {
    '"HuggingFaceTB/SmolLM2-135M"': "MODEL",
    '"meta-llama/Meta-Llama-3-8B"': "MODEL",
    '"wikitext2"': "TEXTS",
    '"builtin"': "TEXTS",
    '"cuda"': '"cpu"',
    "max_steps=200": "max_steps=2, report_to='none'",
}


def blocks(page: Path) -> list[re.Match]:
    return list(BLOCK.finditer(page.read_text()))


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the code of a page finds in its namespace in place of a hub."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(max_position_embeddings=2048).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    texts = [f"{n} times {n} is {n * n}, and {n} more make {n * n + n}.\n" for n in range(140)]
    return {"MODEL": str(folder), "TEXTS": texts}


# PEFT asks transformers for it, not this project
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("page", [page for page in DOCUMENTS if blocks(page)], ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_in_order(page, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = dict(names)
    for block in blocks(page):
        if block["reason"]:
            continue
        code = block["code"]
        for written, used in STAND_INS.items():
            code = code.replace(written, used)
        exec(compile(code, page.name, "exec"), namespace)


def test_code_that_does_not_run_says_why_and_is_rare():
    reasons = [block["reason"] for page in DOCUMENTS for block in blocks(page) if block["reason"]]
    comments = sum(page.read_text().count("<!-- not run:") for page in DOCUMENTS)
    assert len(reasons) == comments, "a comment stands on the line before a fence"
    assert len(reasons) <= 5, reasons


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.stem)
def test_relative_links_lead_to_files(page):
    for target in LINK.findall(page.read_text()):
        file = target.partition("#")[0]
        if file and "://" not in file:
            assert (page.parent / file).exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    assert [page.name for page in PAGES if f": {page.name}" not in navigation] == []


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 140


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(conditions, "RESULTS", tmp_path)
    return tmp_path


def test_the_front_table_has_a_line_for_each_row_and_the_conditions(results):
    shared = {"speed_model": "Llama-3-8B", "prefill_ms": 24.0, "decode_ms": 6.0}
    rows = [
        {"row": "dense", "kept": 1.0, "mb": 269.03, "ppl": {"wikitext2": 17.62, "ptb": 41.6}, **shared},
        {"row": "pivoted", "kept": 0.5, "mb": 162.9, "ppl": {"wikitext2": 28.84, "ptb": 110.58}, **shared},
        {"row": "pivoted", "kept": 0.8, "mb": 226.9, "ppl": {"wikitext2": 18.84, "ptb": 48.7}, **shared},
    ]
    rows[1] |= {"prefill_ms": 16.0, "decode_ms": 4.0}
    where = {"device": "card", "torch": "2", "transformers": "5", "commit": "1234567890", "date": "2026-01-01"}
    (results / "front_h200.json").write_text(json.dumps({"environment": where, "protocol": "p", "rows": rows}))
    section = front_section.front_section()
    dense, pivoted = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith(("| dense", "| pivoted"))
    )
    assert dense[:4] == ["dense", "269", "17.6 / 41.6", "1.00x / 1.00x"] and not any(dense[4:])
    assert pivoted[1:4] == ["227", "18.8 / 48.7", "1.00x / 1.00x"]
    assert pivoted[4:] == ["163", "28.8 / 111", "1.50x / 1.50x"]
    assert "Llama-3-8B, dense 24.0 ms and 6.00 ms. card, torch 2, commit 1234567, 2026-01-01" in section
    assert "| 16.00       | 4.00       |" in front_section.protocol_section()

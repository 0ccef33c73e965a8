"""What README and docs name exists: commands, options, names, files and headings. Measured numbers are printed."""

import argparse
import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest
from documents import DOCUMENTS, ROOT

import hf_blr
from hf_blr.cli import build_parser

#: the changelog names what was there once
CURRENT = [*DOCUMENTS, ROOT / "DESIGN.md"]
LINKING = [*CURRENT, ROOT / "CHANGELOG.md"]

FENCE = re.compile(r"```.*?```", re.S)
#: what `benchmarks/readme.py` writes
PRINTED = re.compile(r"<!-- (\S+):begin -->.*?<!-- \1:end -->", re.S)
#: a line of a shell that runs the package's command, with what is continued on the next line
COMMAND = re.compile(r"^hf-blr (?:.*\\\n)*.*", re.M)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
#: options of other programs that the pages name
FOREIGN = {
    "--cases": "benchmarks/robustness.py",
    "--check": "benchmarks/readme.py",
    "--load-format": "vllm",
    "--model_args": "lm_eval",
    "--nproc-per-node": "torchrun",
    "--tensor-parallel-size": "vllm",
}
#: a time, a size of memory or a rate, as a measurement has it
MEASURED = re.compile(r"\d (?:us|ms|GB|MB|TB/s|GFLOP)\b|\d\.\d+x\b|\d\.\d\d of dense")
#: a page that keeps the numbers of single trials, of which there are no files
OF_TRIALS = {"log"}


def ids(page: Path) -> str:
    return page.stem


@pytest.mark.parametrize("page", DOCUMENTS, ids=ids)
def test_commands_of_a_page_are_understood(page):
    parser = build_parser()
    fences = "\n".join(FENCE.findall(page.read_text()))
    for command in COMMAND.findall(fences):
        words = shlex.split(command.replace("\\\n", " "), comments=True)[1:]
        # these look at files, or run another program
        if not {"--help", "--status", "run"} & set(words):
            parser.parse_args(words)


@pytest.mark.parametrize("page", DOCUMENTS, ids=ids)
def test_options_of_a_page_exist(page):
    named = set(OPTION.findall(PRINTED.sub("", page.read_text())))
    assert sorted(named - options_of(build_parser()) - set(FOREIGN)) == []


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """Those of a command and of the commands within it."""
    return {option for action in actions_of(parser) for option in action.option_strings}


def actions_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [each for command in action.choices.values() for each in actions_of(command)]
        else:
            found.append(action)
    return found


def test_every_option_says_what_it_is():
    assert [action.option_strings or action.dest for action in actions_of(build_parser()) if not action.help] == []


@pytest.mark.parametrize("page", CURRENT, ids=ids)
def test_names_of_the_package_exist(page):
    names = set(re.findall(r"`(hf_blr(?:\.\w+)+)[`(]", page.read_text()))
    assert [name for name in sorted(names) if not exists(name)] == []


def exists(dotted: str) -> bool:
    try:
        found(dotted)
    except (AttributeError, ImportError):
        return False
    return True


def found(dotted: str):
    """What stands under the last name; a module only where its package has nothing else of that name."""
    *parts, name = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        value = functools.reduce(getattr, parts[length:], value)
        return getattr(value, name) if hasattr(value, name) else importlib.import_module(dotted)
    return importlib.import_module(dotted)


@pytest.mark.parametrize("page", CURRENT, ids=ids)
def test_files_of_the_project_exist(page):
    named = re.findall(r"`((?:hf_blr|benchmarks|tests|examples|docs)/[\w/.-]+\.\w+)`", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", LINKING, ids=ids)
def test_headings_that_links_lead_to_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        file, _, anchor = target.partition("#")
        other = page.parent / file if file else page
        # headings of the API page are made of docstrings; mkdocs checks those
        if anchor and "://" not in target and not anchor.startswith("hf_blr"):
            assert anchor in anchors(other), f"{page.name} links to {target}"


def anchors(page: Path) -> list[str]:
    """What mkdocs makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.M)
    return [re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings]


def test_names_of_the_api_page_are_those_of_its_headings():
    for target, options in api_entries().items():
        assert exists(target), target
        heading = options.get("heading")
        if heading:
            assert exists(heading), heading
            assert found(heading) is found(target), f"{heading} is not {target}"


def test_every_public_name_has_a_place_on_the_api_page():
    shown = set()
    for target, options in api_entries().items():
        shown.add(options.get("heading", target))
        shown.update(f"{target}.{member}" for member in options.get("members", "").split(", "))
    objects = [found(name) for name in shown if exists(name)]
    public = [name for name in hf_blr.__all__ if not name.startswith("_")]
    assert [name for name in public if not any(getattr(hf_blr, name) is each for each in objects)] == []


def api_entries() -> dict[str, dict[str, str]]:
    """{what is shown: its options}."""
    entries: dict[str, dict[str, str]] = {}
    for line in (ROOT / "docs" / "api.md").read_text().splitlines():
        if line.startswith("::: "):
            entries[line[4:]] = options = {}
        elif line.startswith("      "):
            name, _, value = line.strip().partition(": ")
            options[name] = value.strip("[]")
    return entries


@pytest.mark.parametrize("page", CURRENT, ids=ids)
def test_nothing_stands_twice_on_a_page(page):
    """Merges of two rewritten pages leave both versions of a section."""
    text = FENCE.sub("", PRINTED.sub("", page.read_text()))
    lines = [line for line in text.splitlines() if line[:1] == "#" or len(line.split()) >= 12]
    assert sorted({line for line in lines if lines.count(line) > 1}) == []


@pytest.mark.parametrize("page", [page for page in DOCUMENTS if page.stem not in OF_TRIALS], ids=ids)
def test_measured_numbers_are_printed(page):
    text = FENCE.sub("", PRINTED.sub("", page.read_text()))
    lines = [line for line in text.splitlines() if MEASURED.search(re.sub(r"`[^`]*`", "", line))]
    assert lines == [], "numbers that were measured stand between the markers of benchmarks/readme.py"


def test_the_map_of_the_design_is_that_of_the_package():
    """A module that is missing, or there no more, belongs into the table under "Where things live"."""
    package = ROOT / "hf_blr"
    folders = [package, *(file.parent for file in package.rglob("__init__.py") if file.parent != package)]
    there = {
        str(file.relative_to(package).with_suffix(""))
        for folder in folders
        for file in folder.glob("*.py")
        if not file.stem.startswith("__")
    }
    section = (ROOT / "DESIGN.md").read_text().partition("## Where things live")[2].partition("\n## ")[0]
    mapped = set()
    for line in re.findall(r"^\| *\d* *\| `.*", section, re.M):
        _, _, rooms, _, modules, _ = line.split("|")
        for room in re.findall(r"`([\w/]+)`", rooms):
            inside = {f"{room}{module.strip()}" for module in modules.split(",")}
            mapped |= inside if room.endswith("/") else {room}
    assert sorted(mapped ^ there) == []

"""The house: imports point one way, packages are complete, nothing of one machine is in it."""

import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from setuptools import find_packages

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("data", "models", "pretrain", "launch")
# Who must not be imported by whom.
FORBIDDEN = {
    "data": {"models", "pretrain", "launch", "lightning", "pytorch_lightning", "hydra", "omegaconf"},
    "models": {"data", "pretrain", "launch", "lightning", "pytorch_lightning", "hydra", "omegaconf"},
    "pretrain": {"launch"},
    "launch": set(),
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]


def imported(source: str) -> set[str]:
    """Top-level names of every module that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add((node.module or "").partition(".")[0])
    return found


def test_the_check_itself_sees_an_import_inside_a_function() -> None:
    assert imported("def f():\n    from lightning.pytorch import Trainer\n    import os.path") == {"lightning", "os"}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    files = [file for file in SOURCES if file.relative_to(ROOT).parts[0] == package]
    assert files
    wrong = {
        str(file.relative_to(ROOT)): found
        for file in files
        if (found := imported(file.read_text()) & FORBIDDEN[package])
    }
    assert not wrong


def room(module: str) -> str:
    """The folder that a module of ours lies in; a package's own files are above its folders: ``data.slides.tiling`` →
    ``data.slides``."""
    parts = module.split(".")
    return ".".join(parts[:2]) if (ROOT / Path(*parts[:2])).is_dir() else parts[0]


def rooms_used(source: str) -> set[str]:
    """The folders of ours that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {room(name) for name in names if name.partition(".")[0] in PACKAGES}
    return found


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Rooms that lead back to the first of them, or none."""

    def walk(way: list[str]) -> list[str]:
        for further in sorted(arrows.get(way[-1], ())):
            if further == way[0]:
                return [*way, further]
            if further not in way and (found := walk([*way, further])):
                return found
        return []

    return next((found for start in arrows if (found := walk([start]))), [])


def test_the_check_itself_finds_a_circle() -> None:
    assert room("data.slides.tiling") == "data.slides" and room("data.fault.Fault") == "data"
    assert rooms_used("from pretrain.run import best\nimport data.files, os") == {"pretrain.run", "data"}
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


# What the rooms of `data` stand on; those of `pretrain` are in any order that has no circle.
ALLOWED = {
    "data": set(),
    "data.slides": {"data"},
    "data.shards": {"data", "data.slides"},
    "data.parquet": {"data"},
    "data.tiles": {"data", "data.slides", "data.shards", "data.parquet"},
    "data.embeddings": {"data", "data.slides", "data.shards"},
}


def test_imports_between_folders_form_no_circle() -> None:
    arrows: dict[str, set[str]] = {}
    for file in SOURCES:
        own = room(".".join(file.relative_to(ROOT).with_suffix("").parts))
        arrows.setdefault(own, set()).update(rooms_used(file.read_text()) - {own})
    assert len(arrows) > 15
    assert circle(arrows) == []
    assert {
        name: used - ALLOWED[name] for name, used in arrows.items() if name in ALLOWED and used - ALLOWED[name]
    } == {}


# What a command's module and a program's entry are asked for by name.
BY_CONTRACT = {"Config", "run", "main"}


def defined(source: str) -> list[str]:
    """The public classes, functions and constants of a file; type variables are none of these."""
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and not ast.unparse(node.value or node).startswith("TypeVar"):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    return [name for name in names if not name.startswith("_")]


def test_no_two_public_classes_functions_or_constants_share_a_name() -> None:
    assert defined("class A: ...\ndef b(): ...\nC = 1\nD: int = 2\nT = TypeVar('T')\n_e = 3") == ["A", "b", "C", "D"]
    places: dict[str, list[str]] = {}
    for file in SOURCES:
        for name in defined(file.read_text()):
            places.setdefault(name, []).append(str(file.relative_to(ROOT)))
    assert len(places) > 800
    assert {name: files for name, files in places.items() if len(files) > 1 and name not in BY_CONTRACT} == {}


def test_every_package_is_installed() -> None:
    patterns = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    there = {str(file.parent.relative_to(ROOT)).replace("/", ".") for file in SOURCES}
    assert there == set(find_packages(str(ROOT), include=patterns))  # which also asks each of them for an __init__.py


# Needed without being imported: timm imports torchvision, openslide-python loads openslide-bin's library, fsspec loads
# the two for URLs, and shards are in webdataset's format, which tests hold to the package itself.
NOT_IMPORTED = {"torchvision", "openslide-bin", "webdataset", "s3fs", "gcsfs"}
OPTIONAL = {"flash_attn", "faiss"}  # what is quicker than torch somewhere, and taken where somebody has it


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    lines = [*PROJECT["project"]["dependencies"], *(line for name in extras if name != "test" for line in extras[name])]
    declared = {Requirement(line).name.lower() for line in lines}
    names = {name for file in SOURCES for name in imported(file.read_text())} - set(PACKAGES) - OPTIONAL
    names -= set(sys.stdlib_module_names)
    distributions = packages_distributions()
    used = {distributions.get(name, [name])[0].lower() for name in names}
    assert used | NOT_IMPORTED == declared


def kept() -> list[Path]:
    """Files that are, or would be, in the repository."""
    try:
        answer = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        pytest.skip("git is not installed: what is tracked can't be told")
    if answer.returncode:
        pytest.skip("not a git checkout: what is tracked can't be told")
    return [ROOT / name for name in answer.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_git_keeps_every_source_file() -> None:
    assert set(SOURCES) <= set(kept())


def test_no_path_of_one_machine_is_in_the_repository() -> None:
    place = re.compile(r"(?<![\w./-])/(work|root|home/\w+)/[\w.-]+|(?<![\w./-])/tmp/[\w-]+")
    wrong = []
    for file in kept():
        if file.suffix in (".py", ".yaml", ".toml", ".md", ".sh", "") and file != Path(__file__):
            text = file.read_bytes().decode(errors="ignore")
            wrong += [f"{file.relative_to(ROOT)}: {found.group()}" for found in place.finditer(text)]
    assert not wrong


def test_no_source_file_swallows_errors_silently() -> None:
    wrong = []
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ExceptHandler):
                broad = isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException", "OSError")
                silent = all(isinstance(line, ast.Pass | ast.Continue) for line in node.body)
                if node.type is None or (broad and silent):
                    wrong.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert not wrong


def words_in_code(source: str) -> set[str]:
    """Every name that a file's code has: of modules, classes, functions, arguments, attributes, variables."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        for field in ("id", "attr", "name", "arg", "module"):
            if isinstance(value := getattr(node, field, None), str):
                found |= set(value.split("."))
    return found


def prose(file: Path) -> str:
    """A file's docstrings and comments."""
    source = file.read_text()
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, nodes)]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return "\n".join([*docstrings, *(token.string for token in tokens if token.type == tokenize.COMMENT)])


def test_what_prose_calls_by_name_is_there() -> None:
    """`name` in a docstring or a comment, or `data.shards.layout.SLIDE_FACTS`: a name of code and of nothing else."""
    known = {stem for file in SOURCES for stem in (file.stem, file.parent.name)}
    for file in SOURCES:
        known |= words_in_code(file.read_text())
    gone = {
        f"{file.relative_to(ROOT)}: {name}"
        for file in SOURCES
        for name in re.findall(r"(?<![`\w])`([A-Za-z_][\w.]*)`(?!`)", prose(file))
        if not set(name.strip(".").split(".")) <= known
    }
    assert gone == set()
    dotted = {
        name
        for file in SOURCES
        for name in re.findall(r"(?<![`\w])`((?:data|models|pretrain|launch)\.[\w.]+)`(?!`)", prose(file))
    }
    assert len(dotted) > 40
    assert {name for name in dotted if not _resolves(name)} == set()


def _resolves(name: str) -> bool:
    """Whether a dotted name is a file, a folder, or what such a file has."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:cut])
        if place.with_suffix(".py").is_file():
            return set(parts[cut:]) <= words_in_code(place.with_suffix(".py").read_text())
        if place.is_dir():
            return cut == len(parts)
    return False

"""Pages of the docs site that are made when it is built, so that they cannot be out of date.

ops.md, notes.md, contributing.md   kernels/README.md, NOTES.md, CONTRIBUTING.md
flags.md   every setting of every recipe, from its dataclass
api.md     docs/api.md with every public op in place of its mark
habits.md  docs/habits.md with every name from elsewhere in place of its mark
files.md   every file of engine/ and kernels/ with the first line of its docstring
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from syncr1.engine.corl.config import CorlConfig
from syncr1.engine.methods.check_data_config import CheckDataConfig
from syncr1.engine.methods.evaluation_config import EvaluateConfig
from syncr1.engine.methods.sample_config import SampleConfig
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.settings.renamed import DIFFUSERS, TRL, VERL
from syncr1.engine.settings.yaml_files import to_yaml

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
OPS = "<!-- every public op -->"
NAMES = "<!-- every name -->"
FLAGS_INTRO = """# Flags

Every setting, as the recipes' dataclasses explain it; the value shown is the default. On the command line it is
`--name value`, in a file for `--config` it is `name: value`. A flag goes before the file, the file before the default.
Whatever is wrong is said at once, in less than a second, with what was expected, what came and what to do.
"""
FILES_INTRO = """# Files

Every Python file of the two packages and what it is for; a room of `engine/` uses only those that stand before it in
`ROOMS` of `tests/repo/test_repo.py`.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that have no file of their own."""
    from mkdocs.structure.files import File

    for name, content in {
        "ops.md": included("kernels/README.md"),
        "notes.md": included("NOTES.md"),
        "contributing.md": included("CONTRIBUTING.md"),
        "flags.md": FLAGS_INTRO + "".join(flags()),
        "files.md": FILES_INTRO + "".join(listing()),
    }.items():
        files.append(File.generated(config, name, content=content))
    return files


IN_THE_REPOSITORY = {
    "../kernels/README.md": "ops.md",
    "../NOTES.md": "notes.md",
    "../CONTRIBUTING.md": "contributing.md",
    "../recipes/sync_r1.yaml": "flags.md",
    "../recipes/corl.yaml": "flags.md#corl-rewards",
}
"""What pages link to, which whoever reads them in the repository can open, and what the site has of it."""


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The public ops, and the names from elsewhere, in place of their marks; links to pages that the site has."""
    for there, here in IN_THE_REPOSITORY.items():
        markdown = markdown.replace(f"]({there})", f"]({here})")
    ops = "\n\n".join(f"::: syncr1.kernels.api.{name}" for name in public_ops())
    return markdown.replace(OPS, ops).replace(NAMES, "".join(names()))


def names() -> Iterator[str]:
    """Markdown of what is called otherwise elsewhere, by what to do here."""
    for title, table in (("TRL and transformers", TRL), ("diffusers", DIFFUSERS), ("verl", VERL)):
        yield f"\n### {title}\n\n| name there | here |\n|---|---|\n"
        for remedy in dict.fromkeys(table.values()):
            theirs = ", ".join(f"`{name}`" for name, told in table.items() if told == remedy)
            yield f"| {theirs} | {escaped(remedy)} |\n"


def included(name: str) -> str:
    """A page of the repository; its links to other files, which the site does not have, become their words."""
    return re.sub(r"\[([^\]\n]+)\]\((?!https?:|#)[^)\n]*\)", r"\1", (ROOT / name).read_text())


def public_ops() -> list[str]:
    """`__all__` of the ops' front door, read and not imported: torch takes seconds."""
    for node in ast.parse((ROOT / "kernels" / "api.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError("kernels/api.py: expected __all__, found none")


def recipes() -> Iterator[tuple[str, Any]]:
    """(recipe, its settings); what merge.py and convert.py cannot do without is given as an example."""
    yield "sync_r1.py", SyncR1Config()
    yield "corl.py", CorlConfig()
    yield "evaluate.py", EvaluateConfig()
    yield "sample.py", SampleConfig()
    yield "check_data.py", CheckDataConfig(data=Path("your/data"))
    yield "merge.py", script("merge").MergeConfig(base="your/base", models=("your/mcq", "your/oe"), output="merged")
    yield "convert.py", script("convert").ConvertConfig(model="your/janus", output="converted")


def script(name: str) -> Any:
    """A recipe that holds its own settings, as a module."""
    spec = importlib.util.spec_from_file_location(f"{name}_recipe", ROOT / "recipes" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flags() -> Iterator[str]:
    """Markdown of every recipe's settings, read from the YAML that explains them."""
    for recipe, settings in recipes():
        yield f"\n## recipes/{recipe}\n"
        said: list[str] = []
        for line in to_yaml(settings).splitlines():
            if title := re.fullmatch(r"# (.+?) -+", line):
                anchor = re.sub(r"\W+", "-", f"{recipe[:-3]} {title[1].lower()}")
                yield f"\n### {title[1]} {{ #{anchor} }}\n\n"
            elif line.startswith("# "):
                said.append(line[2:])
            elif line:
                name, _, value = line.partition(": ")
                yield f"- **`--{name}`** (`{value}`): {escaped(' '.join(said))}\n"
                said = []


def listing() -> Iterator[str]:
    """Markdown of every module with the first line of its docstring, folder by folder."""
    for package in ("engine", "kernels"):
        for folder in sorted({path.parent for path in (ROOT / package).rglob("*.py")}):
            yield f"\n## {folder.relative_to(ROOT)}/\n\n"
            for path in sorted(folder.glob("*.py"), key=lambda path: (path.name != "__init__.py", path.name)):
                said = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].replace("\n", " ")
                yield f"{escaped(said)}\n\n" if path.name == "__init__.py" else f"- `{path.name}`: {escaped(said)}\n"


def escaped(text: str) -> str:
    """Plain words as Markdown: what stands in backticks is code, all else means itself."""
    parts = text.split("`")
    return "`".join(re.sub(r"([\\*_<>\[\]])", r"\\\1", p) if i % 2 == 0 else p for i, p in enumerate(parts))

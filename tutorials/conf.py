"""The site: `python3 dev.py docs` builds it, offline, into runs/site/html. Every
tutorial and every page with code runs in the build.

API pages and the theory's tables are filled in as pages are read:
`<!-- fill: api core -->` becomes the public names of klrl_edu/core with their
docstrings, `<!-- fill: identities -->` and `<!-- fill: claims -->` what `klrl check`
finds now. The tables of bench.md, estimators.md and exact.md stand in the pages, where
`python3 dev.py bench` writes them.
"""

import ast
import os
import re
import tempfile
from importlib import import_module
from itertools import pairwise
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

import klrl_edu

HERE = Path(__file__).resolve().parent
PACKAGE = Path(klrl_edu.__file__).parent

project = "klrl_edu"
version = release = klrl_edu.__version__
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
include_patterns = [
    "*.md",
    "api/*.md",
    "t[0-9][0-9]_*.py",
]  # conf.py and other helpers are no pages
nitpicky = False

# Pages that run. "force": a cached page would hide a change of the library.
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "force"
nb_execution_timeout = 120  # seconds a cell
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True
nb_ipywidgets_js: dict[
    str, dict[str, str]
] = {}  # its default loads two scripts from the network
myst_enable_extensions = ["amsmath", "dollarmath", "colon_fence"]
myst_heading_anchors = 3

# API pages: docstrings here are plain text with Google sections, not reStructuredText;
# `plain_to_rst` quotes what rst would read as markup.
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
napoleon_use_rtype = False
napoleon_use_ivar = (
    True  # attributes as a list: a NamedTuple's fields would stand twice
)
python_maximum_signature_line_length = 100
default_role = "code"

html_theme = "furo"
html_title = "klrl_edu"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {"footer_icons": []}
mathjax_path = "mathjax/tex-svg.js"  # version 3.2.2, with its licence beside it
mathjax3_config = {
    "options": {"enableMenu": False}
}  # the menu could load more from the network

FILL = re.compile(r"^<!-- fill: (\w+) ?(\w*) -->$", re.M)
PUBLIC = re.compile(r"from klrl_edu\.?([\w.]*) import (\w+) as \w+")


def fill(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replaces the fill marks of a page."""
    tables = {"identities": identities, "claims": claims}
    source[0] = FILL.sub(
        lambda mark: api(mark[2]) if mark[1] == "api" else tables[mark[1]](), source[0]
    )


def identities() -> str:
    """Every statement of the theory with its largest error, computed now."""
    from klrl_edu.theory.identities import identities_markdown

    return identities_markdown()


def claims() -> str:
    """Every claim of the articles with the numbers that decide it, computed now."""
    from klrl_edu.theory.claims import claims_markdown

    return claims_markdown()


def public_names(room: str) -> dict[str, list[str]]:
    """The public names of one room of the package by module, as the stub lists them;
    room "reference" is that one file.
    """
    names: dict[str, list[str]] = {}
    for module, name in PUBLIC.findall(
        (PACKAGE / "__init__.pyi").read_text(encoding="utf-8")
    ):
        if (module or name).partition(".")[0] == room:
            names.setdefault(f"klrl_edu.{module}".rstrip("."), []).append(name)
    return names


def api(room: str) -> str:
    """One section a module: its docstring's first line, then each public name."""
    parts = []
    for module, names in public_names(room).items():
        whole = [name for name in names if is_module(module, name)]
        rest = [name for name in names if name not in whole]
        for name in whole:
            parts.append(f"## {name}\n\n{directive('automodule', f'{module}.{name}')}")
        if rest:
            summary = (
                (import_module(module).__doc__ or "")
                .partition("\n\n")[0]
                .replace("\n", " ")
            )
            parts.append(
                f"## {module.rpartition('.')[2].replace('_', ' ')}\n\n"
                f"{quoted(summary)}\n\n`{module}`\n"
            )
            parts += [directive(*documenter(module, name)) for name in rest]
    return "\n\n".join(parts)


def documenter(module: str, name: str) -> tuple[str, str, str]:
    """(directive, argument, content) of one public name."""
    thing = getattr(klrl_edu, name)
    if isinstance(thing, type):
        return "autoclass", f"klrl_edu.{name}", ""
    if hasattr(thing, "__code__"):
        return "autofunction", f"klrl_edu.{name}", ""
    return "py:data", f"klrl_edu.{name}", alias_docstring(module, name)


def alias_docstring(module: str, name: str) -> str:
    """The string below `Name = …` in a module, where Python keeps no docstring."""
    body = ast.parse(
        (PACKAGE.parent / Path(*module.split(".")))
        .with_suffix(".py")
        .read_text(encoding="utf-8")
    ).body
    for statement, below in pairwise(body):
        named = (
            isinstance(statement, ast.Assign)
            and ast.unparse(statement.targets[0]) == name
        )
        if (
            named
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            return f"``{ast.unparse(statement.value)}`` — " + "\n".join(
                plain_to_rst(str(below.value.value).splitlines())
            )
        if named:
            return f"``{ast.unparse(statement.value)}``"
    return ""


def directive(kind: str, argument: str, content: str = "") -> str:
    """A reStructuredText directive inside a Markdown page."""
    indented = "".join(f"\n   {line}" for line in content.splitlines())
    return f"```{{eval-rst}}\n.. {kind}:: {argument}\n{indented}\n```\n"


def is_module(module: str, name: str) -> bool:
    """Whether module.name is a file."""
    return (PACKAGE.parent / Path(*module.split(".")) / f"{name}.py").is_file()


def quoted(text: str) -> str:
    """Plain text in Markdown: * and _ are no markup outside `code`."""
    return "`".join(
        part if index % 2 else re.sub(r"([*_\[\]<])", r"\\\1", part)
        for index, part in enumerate(text.split("`"))
    )


def plain_to_rst(lines: list[str]) -> list[str]:
    """A plain docstring's lines -> reStructuredText: `*`, `|` and a final `_` are no
    markup outside `code`; an indented block stands as typed.
    """
    if not lines:
        return []
    text, out, verbatim = "\n".join(lines), [], False
    escaped = "`".join(
        part if index % 2 else re.sub(r"([*|\\]|_(?=\W|$))", r"\\\1", part)
        for index, part in enumerate(text.split("`"))
    )
    for plain, line in zip(lines, escaped.split("\n"), strict=True):
        indented = plain.startswith("    ")
        starts = indented and bool(out) and not out[-1].strip() and not verbatim
        if starts:
            out += ["::", ""]
        verbatim = starts or (verbatim and (indented or not plain.strip()))
        out.append(plain if verbatim else line)
    return out


def docstring_to_rst(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Every docstring on its way to the API pages, before napoleon reads its
    sections.
    """
    lines[:] = plain_to_rst(lines)


def label_solutions(app: Sphinx, doctree: nodes.document) -> None:
    """A folded solution says what it is."""
    for cell in doctree.findall(nodes.container):
        if "prompt_show" in cell and "tag_solution" in cell["classes"]:
            cell["prompt_show"], cell["prompt_hide"] = (
                "Show the solution",
                "Hide the solution",
            )


def require_execution(app: Sphinx, failure: Exception | None) -> None:
    """Fails the build where a page with code did not run, or ran in 0.000 s."""
    if failure is not None:
        return
    pages = {docname: Path(app.env.doc2path(docname)) for docname in app.env.found_docs}
    running = {
        docname
        for docname, path in pages.items()
        if path.suffix == ".py" or "{code-cell}" in path.read_text(encoding="utf-8")
    }
    missing = {path.stem for path in HERE.glob("t[0-9][0-9]_*.py")} - set(pages)
    complaints = [f"{name}.py is excluded from the site" for name in sorted(missing)]
    for docname in sorted(running):
        complaints += [
            f"{docname}: {why}"
            for why in not_run(
                app.env.nb_metadata[docname].get("exec_data"), pages[docname]
            )
        ]
    if complaints:
        raise ExtensionError("pages that did not run: " + "; ".join(complaints))
    seconds = {
        docname: app.env.nb_metadata[docname]["exec_data"]["runtime"]
        for docname in sorted(running)
    }
    print(
        "executed:",
        ", ".join(f"{docname} {runtime:.1f} s" for docname, runtime in seconds.items()),
    )


def not_run(statistics: dict[str, object] | None, path: Path) -> list[str]:
    """What is wrong with one page's execution."""
    if statistics is None:
        return ["it was not executed"]
    reasons = [] if statistics["succeeded"] else ["it failed"]
    if round(float(str(statistics["runtime"] or 0)), 3) == 0:
        reasons.append("it ran in 0.000 s")
    if re.search(r"skip-execution|raises-exception", path.read_text(encoding="utf-8")):
        reasons.append("a tag excludes a cell from execution")
    return reasons


def write_lambda_page(app: Sphinx, failure: Exception | None) -> None:
    """The λ page stands beside the others; it is a page of its own, not of the
    theme.
    """
    from klrl_edu.site.lambda_page import write_lambda_page

    if failure is None:
        write_lambda_page(Path(app.outdir) / "lambda.html")


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    # the kernels that run the pages inherit these: one thread each, and no answers of
    # exercises recorded beside the sources
    os.environ.update(
        OMP_NUM_THREADS="1",
        MKL_NUM_THREADS="1",
        KLRL_ANSWERS=str(Path(tempfile.mkdtemp()) / "answers.json"),
    )
    app.connect("source-read", fill)
    app.connect("autodoc-process-docstring", docstring_to_rst, priority=100)
    app.connect("doctree-read", label_solutions)
    app.connect("build-finished", write_lambda_page)
    app.connect("build-finished", require_execution, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

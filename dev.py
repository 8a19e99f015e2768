#!/usr/bin/env python3
"""Everything a developer or a newcomer runs, from nothing but Python 3.11 or newer.

    python3 dev.py demo      set up, then the demo (one to two minutes)
    python3 dev.py test      set up, then the tests; further words go to pytest
    python3 dev.py check     set up, then ruff and mypy
    python3 dev.py bench     set up, then the speed ratios, a few minutes: tutorials/bench.md;
                             --long: training runs too; --exact: sizes, tutorials/exact.md;
                             --estimators: tutorials/estimators.md
    python3 dev.py docs      set up, then the site, every page executed: runs/site/html/index.html
    python3 dev.py student   set up, then the tutorials without their solutions, in runs/student or
                             where you say
    python3 dev.py figures   set up, then every figure with its data again, in figures/; further
                             words: some numbers only

Each makes .venv if there is none, installs the package with what the target needs, and stamps what
it installed, so that a second call starts at once. Only the standard library is used here.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
MINIMUM = (3, 11)


def main(arguments: list[str]) -> int:
    """Runs one target; returns its exit code."""
    if sys.version_info < MINIMUM:
        print(
            f"dev.py: this is Python {sys.version.split()[0]}; Python {MINIMUM[0]}.{MINIMUM[1]} or"
            " newer is needed.",
            file=sys.stderr,
        )
        return 2
    targets = {
        "demo": demo,
        "test": test,
        "check": check,
        "bench": bench,
        "docs": docs,
        "student": student,
        "figures": figures,
    }
    if not arguments or arguments[0] not in targets:
        wrong = bool(arguments) and arguments[0] not in ("-h", "--help")
        complaint = f"no target {arguments[0]!r}. " if wrong else ""
        _, _, usage = (__doc__ or "").partition("\n\n")  # without the first line
        print(
            f"dev.py: {complaint}Usage:\n{usage.rstrip()}",
            file=sys.stderr if wrong else sys.stdout,
        )
        return 2 if wrong else 0
    try:
        return targets[arguments[0]](arguments[1:])
    except subprocess.CalledProcessError as error:
        print(
            f"dev.py: set-up failed (exit {error.returncode}): {' '.join(map(str, error.cmd))}",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130


def demo(arguments: list[str]) -> int:
    """The demo, into runs/demo."""
    set_up()
    return run("-m", "klrl_edu", "demo", *arguments)


def test(arguments: list[str]) -> int:
    """The tests, on all cores, one torch thread each."""
    set_up("test")
    parallel = ["-n", "auto", "--dist", "worksteal"]
    return run("-m", "pytest", *parallel, "--klrl-false-alarm", "1e-6", *arguments)


def check(arguments: list[str]) -> int:
    """Style and types."""
    set_up("dev")
    style = run("-m", "ruff", "check", ".")
    layout = run("-m", "ruff", "format", "--check", ".")
    types = run("-m", "mypy")
    return max(style, layout, types)  # all three run, whatever the first finds


def bench(arguments: list[str]) -> int:
    """Speed ratios against other libraries."""
    set_up("trl")
    return run("-m", "tests.benchmarks.bench", *arguments)


def docs(arguments: list[str]) -> int:
    """The site from scratch, offline; a warning, or a page that did not run, fails it. Further
    words go to sphinx-build.
    """
    set_up("docs")
    site = ROOT / "runs" / "site"
    shutil.rmtree(site, ignore_errors=True)
    words = ["-b", "html", "-W", "--keep-going", "-q", "-j", "auto", "-d", str(site / "doctrees")]
    code = run("-m", "sphinx", *words, *arguments, "tutorials", str(site / "html"))
    print(f"the site failed (exit {code})" if code else f"the site: {site / 'html' / 'index.html'}")
    return code


def student(arguments: list[str]) -> int:
    """The tutorials as a student gets them."""
    set_up("docs")
    return run("-m", "klrl_edu.site.student", *(arguments or ["runs/student"]))


def figures(arguments: list[str]) -> int:
    """Every figure again from its own computation, in place."""
    set_up()
    return run("-m", "klrl_edu.experiments.figures", *arguments)


def run(*arguments: str) -> int:
    """Runs the environment's Python from the root, one thread a process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    return subprocess.run([PYTHON, *arguments], cwd=ROOT, env=environment, check=False).returncode


def set_up(extra: str = "") -> None:
    """Makes the environment and installs the package with one extra, unless the stamp says that
    this was done.
    """
    stamp = VENV / f"klrl-{extra or 'core'}.stamp"
    wanted = fingerprint()
    if PYTHON.exists() and stamp.exists() and stamp.read_text() == wanted:
        return
    if not PYTHON.exists():
        print(f"making {VENV.name} with Python {sys.version.split()[0]} …", flush=True)
        venv.create(VENV, with_pip=True)
    chosen = f"[{extra}]" if extra else ""
    print(
        f"installing klrl_edu{chosen} (the first time takes a few minutes: torch is large) …",
        flush=True,
    )
    pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    package = ["-c", "constraints.txt", "-e", f".{chosen}"]
    subprocess.run([*pip, *package], cwd=ROOT, check=True)
    stamp.write_text(wanted)


def fingerprint() -> str:
    """What an installation depends on: pyproject.toml, constraints.txt and the Python in use."""
    content = b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
    return hashlib.sha256(content + sys.version.encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

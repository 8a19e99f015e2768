"""The house keeps its order: data flows one way, and what is public is documented."""

import ast
import importlib
import inspect
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import klrl_edu
from klrl_edu import testing

ROOT = Path(klrl_edu.__file__).parent
ORDER = [
    "reference",
    "core",
    "models",
    "problems",
    "closed_forms",
    "exact",
    "estimators",
    "decisions",
    "evaluation",
    "samplers",
    "learning",
    "audit",
    "theory",
    "experiments",
    "site",
]
LAST = ["testing", "pytest_plugin", "exercises", "__main__", "__init__"]
NEED_SHAPES = ("klrl_edu.models.", "klrl_edu.estimators.", "klrl_edu.learning.losses")
MODULES = sorted(path.relative_to(ROOT.parent) for path in ROOT.rglob("*.py"))


def room(module: str) -> str:
    """klrl_edu.core.draws -> core."""
    return module.split(".")[1] if "." in module else "__init__"


def imports_of(source: str) -> list[str]:
    """Every klrl_edu module that a source imports, at any depth of the code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("klrl_edu")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("klrl_edu"):
            found += [
                f"{node.module}.{alias.name}" if node.module == "klrl_edu" else node.module
                for alias in node.names
            ]
    return found


def breaches(name: str, source: str) -> list[str]:
    """The imports of a module that point to a room below its own."""
    here = room(name)
    if here in LAST:
        return []
    allowed = set(ORDER[: ORDER.index(here) + 1]) - (
        {"reference"} if here != "reference" else set()
    )
    if here == "reference":
        allowed = set()
    if here in ("closed_forms", "estimators"):  # functions of vectors: no model, no problem
        allowed = {"core", here}
    return [target for target in imports_of(source) if room(target) not in allowed]


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_module_imports_only_from_its_own_folder_and_those_above(path):
    name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    assert breaches(name, (ROOT.parent / path).read_text(encoding="utf-8")) == []


def test_an_import_against_the_order_is_noticed():
    assert breaches("klrl_edu.core.draws", "from klrl_edu.models.table import SequenceTable") == [
        "klrl_edu.models.table"
    ]
    assert breaches("klrl_edu.estimators.kl_values", "import klrl_edu.exact.posterior") == [
        "klrl_edu.exact.posterior"
    ]
    assert breaches("klrl_edu.closed_forms.tilt", "import klrl_edu.models.contract") == [
        "klrl_edu.models.contract"
    ]
    assert breaches("klrl_edu.reference", "def f():\n    from klrl_edu.core import logspace") == [
        "klrl_edu.core"
    ]


def test_importing_the_package_or_its_pytest_side_does_not_import_torch():
    code = (
        "import sys, klrl_edu, klrl_edu.testing, klrl_edu.pytest_plugin; dir(klrl_edu),"
        " dir(klrl_edu.testing); assert 'torch' not in sys.modules; klrl_edu.SequenceSpace; assert"
        " 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_resolves_and_an_unknown_one_is_an_attribute_error():
    for name in klrl_edu.__all__:
        assert getattr(klrl_edu, name) is not None
    with pytest.raises(AttributeError, match="no public name 'nonsense'"):
        klrl_edu.nonsense  # noqa: B018
    with pytest.raises(AttributeError, match=r"'klrl_edu\.testing' has no public name 'nonsense'"):
        testing.nonsense  # noqa: B018


PUBLIC = {name: getattr(klrl_edu, name) for name in klrl_edu.__all__} | {
    f"testing.{name}": getattr(testing, name) for name in testing.__all__
}
ALIASES = {
    "Loss",
    "Reward",
    "Source",
}  # types: their meaning stands below them in the source, where Python keeps no docstring


def members(name: str, thing: object) -> list[tuple[str, object]]:
    """A public thing and, for classes and modules of ours, its public members."""
    listed = [(name, thing)]
    if inspect.ismodule(thing):
        listed += [
            (f"{name}.{n}", m)
            for n, m in vars(thing).items()
            if inspect.isfunction(m) and m.__module__ == thing.__name__ and n[0] != "_"
        ]
    elif inspect.isclass(thing):
        own = {
            n: m
            for n, m in vars(thing).items()
            if n[0] != "_" and (inspect.isfunction(m) or isinstance(m, property | classmethod))
        }
        listed += [
            (f"{name}.{n}", m) for n, m in own.items() if n not in inherited_documentation(thing)
        ]
    return listed


def inherited_documentation(cls: type) -> set[str]:
    """Names that a parent documents; an override means the same."""
    return {
        name
        for parent in cls.__mro__[1:]
        for name, member in vars(parent).items()
        if inspect.getdoc(member)
    }


@pytest.mark.parametrize("name", sorted(set(PUBLIC) - ALIASES))
def test_a_public_name_is_documented(name):
    undocumented = [
        label
        for label, member in members(name, PUBLIC[name])
        if not (inspect.getdoc(member) or "").strip()
    ]
    assert undocumented == []


def test_an_undocumented_name_is_noticed():
    class Bare:
        def method(self):
            return 1

    assert [label for label, member in members("Bare", Bare) if not inspect.getdoc(member)] == [
        "Bare",
        "Bare.method",
    ]


SHAPE = re.compile(r"\[[^\]]*\]|\bscalar\b|shape")


def shapeless() -> list[str]:
    """Public functions of models, estimators and losses that take or give tensors and whose
    docstrings give no shape.
    """
    missing = []
    for path in MODULES:
        name = ".".join(path.with_suffix("").parts)
        if not name.startswith(NEED_SHAPES) or path.name.startswith("__"):
            continue
        module = importlib.import_module(name)
        for label, member in vars(module).items():
            ours = getattr(member, "__module__", None) == name and label[0] != "_"
            if (
                ours
                and inspect.isfunction(member)
                and takes_tensors(member)
                and not SHAPE.search(inspect.getdoc(member) or "")
            ):
                missing.append(f"{name}.{label}")
    return missing


def takes_tensors(function: object) -> bool:
    return "Tensor" in str(inspect.signature(function)) or "Batch" in str(
        inspect.signature(function)
    )


def test_docstrings_of_models_estimators_and_losses_give_shapes():
    assert shapeless() == []


def test_every_module_opens_with_what_it_is():
    bare = [
        str(path)
        for path in MODULES
        if (ROOT.parent / path).read_text(encoding="utf-8").strip()
        and not ast.get_docstring(ast.parse((ROOT.parent / path).read_text(encoding="utf-8")))
    ]
    assert bare == []


def test_no_global_seed_is_set_or_drawn_from():
    words = re.compile(
        r"torch\.manual_seed|np\.random\.|(?<!\.)\brandom\.(random|seed|choice)|set_default_dtype"
    )
    assert [
        str(path)
        for path in MODULES
        if words.search((ROOT.parent / path).read_text(encoding="utf-8"))
    ] == []


def rounded_choices(source: str) -> list[str]:
    """Calls of `torch.where` that choose between two Python numbers, which go through float32:
    both branches are numbers, and one of them is none that float32 holds (0.5, 1, ±inf).
    """
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.where"
        if len(node.args) == 3 and all(map(is_python_number, node.args[1:]))
        if not all(map(float32_holds, node.args[1:]))
    ]


def is_python_number(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp):
        return is_python_number(node.operand)
    if isinstance(node, ast.BinOp):
        return is_python_number(node.left) and is_python_number(node.right)
    if isinstance(node, ast.Call):
        node = node.func
    text = ast.unparse(node)
    return isinstance(node, ast.Constant) or text in ("float", "int") or text.startswith("math.")


def float32_holds(node: ast.expr) -> bool:
    if "math." in ast.unparse(node):
        return ast.unparse(node).lstrip("-+") in ("math.inf", "math.nan")
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return False
    return struct.unpack("f", struct.pack("f", value))[0] == value


def test_no_python_numbers_go_through_float32():
    assert {
        str(path): found
        for path in MODULES
        if (found := rounded_choices((ROOT.parent / path).read_text(encoding="utf-8")))
    } == {}


def test_python_numbers_that_go_through_float32_are_noticed():
    caught = [
        "torch.where(x, float(value), float(otherwise))",
        "torch.where(x, 0.1, 0)",
        "torch.where(x, -math.pi, 1)",
        "torch.where(x, 1, math.log(2))",
        "torch.where(x, 1 / 3, 0.0)",
    ]
    fine = [
        "torch.where(x, 0.0, -math.inf)",
        "torch.where(x, 1, 2.5)",
        "torch.where(x, y, 0.1)",
        "torch.where(x, 0.1, y.exp())",
        "torch.where(x)",
    ]
    assert [rounded_choices(one) for one in caught] == [[one] for one in caught]
    assert [rounded_choices(one) for one in fine] == [[]] * len(fine)


# --- one name a thing -----------------------------------------------------------------------------

MODULE_READ = "two things, each read through its module; a bare import means one of them everywhere"
STATEMENT = "a statement is named after what it states, by which `klrl check --name` finds it"
COMMAND = "the command line's word; the function behind it calls the library's of that name"
PROGRAM = "where a program starts"
IN_TWO_FILES = {  # the reason -> where -> the names; reference.py, which restates on purpose, apart
    MODULE_READ: {
        # the optimum under a divergence as penalty; its estimator from samples
        ("closed_forms.regularizers", "estimators.divergences"): (
            "alpha_divergence chi_squared forward_kl jensen_shannon squared_hellinger"
        ),
        # the moments of an estimator between two Gaussians; the estimator
        ("closed_forms.gaussian_kl", "estimators.kl_values"): (
            "best_coefficient control_variate k1 k2 k3"
        ),
        # an estimate of KL from another policy's samples; the surrogate of its gradient
        ("estimators.kl_gradients", "estimators.kl_values"): (
            "off_policy_prefix off_policy_sequence off_policy_token"
        ),
        # the prior as a proposal for the posterior; any weights
        ("closed_forms.acceptance", "core.logspace"): "effective_sample_size",
        # of a posterior along its chain; of a vector
        ("core.logspace", "exact.chain_moments"): "entropy",
    },
    STATEMENT: {
        ("closed_forms.acceptance", "theory.sampling"): "rejection_acceptance",
        ("closed_forms.soft_maximum", "theory.posteriors"): "soft_maximum",
        ("decisions.soft_control", "theory.gradients"): "policy_gradient",
        ("estimators.evidence", "theory.sampling"): "importance_sampling",
    },
    COMMAND: {
        ("evaluation.compare", "experiments.compare_command"): "compare",
        ("exact.posterior", "experiments.posterior_command"): "posterior",
        ("experiments.train_command", "learning.training"): "train",
    },
    PROGRAM: {("__main__", "experiments.cli", "experiments.figures", "site.student"): "main"},
}
ALLOWED = {
    name: where
    for places in IN_TWO_FILES.values()
    for where, names in places.items()
    for name in names.split()
}
SOURCES = {
    ".".join(path.with_suffix("").parts[1:]): (ROOT.parent / path).read_text(encoding="utf-8")
    for path in MODULES
    if path.parts[1] not in ("reference.py", "exercises")  # both say again what stands elsewhere
}


def public_names(source: str) -> set[str]:
    """The public functions, classes and types that a module defines; constants apart."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            targets = {target.id for target in node.targets if isinstance(target, ast.Name)}
            names |= {name for name in targets if not name.isupper() and name[0].isupper()}
    return {name for name in names if not name.startswith("_")}


def in_two_files(sources: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """Each public name that several modules define, with those modules."""
    where: dict[str, list[str]] = {}
    for module, source in sorted(sources.items()):
        for name in public_names(source):
            where.setdefault(name, []).append(module)
    return {name: tuple(modules) for name, modules in where.items() if len(modules) > 1}


def test_a_public_name_is_defined_in_one_file_but_for_those_listed_with_their_reason():
    assert in_two_files(SOURCES) == ALLOWED


def test_a_name_in_two_files_is_noticed():
    twice = {"a": "def f(): ...\nKind = int", "b": "class f: ...", "c": "Kind = str\ndef _g(): ..."}
    assert in_two_files(twice) == {"f": ("a", "b"), "Kind": ("a", "c")}


def test_a_bare_import_of_a_name_in_two_files_means_the_same_thing_everywhere():
    """Commands apart, which only the command line imports."""
    imported: dict[str, set[str]] = {}
    for source in SOURCES.values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and not (node.module or "").endswith("_command"):
                for alias in node.names:
                    if alias.name in ALLOWED and alias.asname is None:
                        imported.setdefault(alias.name, set()).add(str(node.module))
    assert {name: modules for name, modules in imported.items() if len(modules) > 1} == {}


def test_what_shares_its_name_in_the_theory_is_a_statement():
    from klrl_edu.theory.identities import IDENTITIES

    names = {statement.function.__name__ for statement in IDENTITIES.values()}
    assert {name for where in IN_TWO_FILES[STATEMENT].values() for name in where.split()} <= names

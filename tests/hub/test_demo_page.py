"""The demo page in a real browser, without the network: what people see, Stop, a closed page, two tabs, Ctrl-C."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from patience import PATIENCE_SECONDS, wait_until
from warm_python import ROOT

from modeling_gpt2repro.evaluation import talk
from modeling_gpt2repro.hub import demo
from modeling_gpt2repro.hub.export import save_hub_folder

gradio = pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium"),
]

PROMPT = "the cold sea <b>\n${prompt} {{value}}"
DONE = "[...document.querySelectorAll('.text')].every(text => /seed \\d+/.test(text.innerText))"
COLORS = "[...document.querySelectorAll('.text .{}')].map(token => getComputedStyle(token).backgroundColor)"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])  # which refuses root
        yield started
        started.close()


@pytest.fixture
def open_tab(browser):
    """open_tab(port, ...) -> the page there, whose requests (to other servers) and errors must be none at the end."""
    unwanted = []

    def opened(port, **options):
        tab = browser.new_context(**options).new_page()
        tab.set_default_timeout(1000 * PATIENCE_SECONDS)
        address = f"http://{demo.HOST}:{port}/"
        tab.on("request", lambda request: request.url.startswith((address, "data:")) or unwanted.append(request.url))
        tab.on("console", lambda message: message.type == "error" and unwanted.append(message.text))
        tab.on("pageerror", lambda error: unwanted.append(str(error)))
        tab.goto(address)
        tab.get_by_role("button", name="Generate").wait_for()
        return tab

    yield opened
    assert not unwanted


def free_port() -> int:
    with socket.socket() as free:
        free.bind((demo.HOST, 0))
        return free.getsockname()[1]


def set_field(tab, label: str, value: object):
    field = tab.get_by_label(label).first
    field.fill(str(value))
    field.press("Tab")


def generate(tab, prompt: str, **settings):
    for label, value in {"Prompt": prompt, **settings}.items():
        set_field(tab, label, value)
    tab.get_by_role("button", name="Generate").click()


@contextmanager
def command(*words, **environment) -> Iterator[subprocess.Popen]:
    """The command, as people start it; killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "modeling_gpt2repro.hub.demo", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_two_models_write_side_by_side_in_color_and_ctrl_c_ends_the_page(
    make_model, tiny_tokenizer, tmp_path, open_tab, capsys, terminal_signals
):
    for name, kind in (("first", "ours"), ("second", "stock")):
        model = make_model(kind, len(tiny_tokenizer))
        if name == "second":
            model.transformer.wte.weight.data.mul_(0.3)  # so that its probabilities are closer to each other
        save_hub_folder(model, tiny_tokenizer, tmp_path / name) if kind == "ours" else model.save_pretrained(name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    port = free_port()
    with socket.socket() as proxy:  # for the internet: whatever the server asked for would arrive here
        proxy.bind((demo.HOST, 0))
        proxy.listen()
        proxy.setblocking(False)
        address = f"http://{demo.HOST}:{proxy.getsockname()[1]}"
        proxies = {"HTTP_PROXY": address, "HTTPS_PROXY": address, "http_proxy": address, "https_proxy": address}
        with command("first", "second", "--port", port, "--device", "cpu", **proxies) as process:
            assert process.stdout.readline() == f"http://127.0.0.1:{port} is the page. Ctrl-C ends it.\n"
            tab = open_tab(port)
            tab.evaluate(
                """() => {
                    window.lengths = [];
                    const note = () => window.lengths.push(document.querySelector('.text').innerText.length);
                    new MutationObserver(note).observe(document.body, {subtree: true, childList: true});
                }"""
            )
            generate(tab, PROMPT, Seed=7, Length=60)
            tab.wait_for_function(DONE)
            texts = tab.locator(".text").all_inner_texts()
            assert len(texts) == 2
            for name, text in zip(("first", "second"), texts, strict=True):
                capsys.readouterr()
                talk.main([name, "--device=cpu", "--prompt", PROMPT, "--seed", "7", "--max_new_tokens", "60"])
                printed = capsys.readouterr()
                notes = re.findall(r"^\[(.+)\]$", printed.err, re.MULTILINE)
                assert text.split() == [*printed.out.split(), *" ".join(notes).split()]
            assert "first" in tab.locator(".card").first.inner_text()
            lengths = sorted(set(tab.evaluate("window.lengths")))
            assert len(lengths) > 3, "the text came at once"
            found = {color: set(tab.evaluate(COLORS.format(color))) for color in ("cyan", "yellow", "red")}
            assert all(len(colors) == 1 for colors in found.values())
            assert len(set.union(*found.values())) == 3
            left, right = (card.bounding_box() for card in tab.locator(".card").all())
            assert left["y"] == right["y"]
            assert left["x"] + left["width"] < right["x"]
            phone = open_tab(port, viewport={"width": 390, "height": 844})
            top, bottom = (card.bounding_box() for card in phone.locator(".card").all())
            assert top["y"] + top["height"] < bottom["y"]
            assert phone.evaluate("document.documentElement.scrollWidth") <= 390
            with pytest.raises(BlockingIOError):
                proxy.accept()
            os.kill(process.pid, signal.SIGINT)
            _, errors = process.communicate(timeout=PATIENCE_SECONDS)
            assert process.returncode == 0
            assert "Traceback" not in errors
    demo.check_port(port)


@pytest.fixture
def metered(make_model, tiny_tokenizer, monkeypatch):
    """A page whose model computes a token only when `allowance` has one for it, and counts them."""
    monkeypatch.setattr(demo, "REFRESH_SECONDS", -1)  # each token is shown before the next is computed
    model = make_model("ours", len(tiny_tokenizer))
    model.generation_config.eos_token_id = None
    allowance = threading.Semaphore(0)
    tokens = []

    def wait_for_permission(*_):
        assert allowance.acquire(timeout=PATIENCE_SECONDS)
        tokens.append(1)

    model.register_forward_hook(wait_for_permission)
    page = demo.build_page([("metered", (model, tiny_tokenizer))])
    port = free_port()
    demo.launch(page, port)
    yield port, allowance, tokens
    allowance.release(10_000)
    page.close(verbose=False)


def test_text_is_shown_while_it_is_written_until_stop(metered, open_tab):
    port, allowance, tokens = metered
    tab = open_tab(port)
    generate(tab, "the cold sea", Length=500, Seed=3)
    allowance.release(30)
    tab.wait_for_function("document.querySelectorAll('.text span').length > 15")
    assert "seed" not in tab.locator(".text").inner_text()
    assert "Seed 3" in tab.locator(".legend").inner_text()
    tab.get_by_role("button", name="Stop").click()
    wait_until(lambda: len(tokens) == 30)
    allowance.release(1)
    generate(tab, "the", Length=2, Seed=4)
    allowance.release(1000)
    tab.wait_for_function("/2 tokens, seed 4/.test(document.querySelector('.text').innerText)")
    assert len(tokens) < 40


def test_a_closed_page_ends_its_text_and_two_tabs_have_each_their_own(metered, open_tab):
    port, allowance, tokens = metered
    closed, first, second = open_tab(port), open_tab(port), open_tab(port)
    generate(closed, "the cold sea", Length=900, Seed=1)
    allowance.release(20)
    closed.wait_for_function("document.querySelectorAll('.text span').length > 9")
    closed.close()
    generate(first, "the cold sea", Length=20, Seed=1)
    generate(second, "the cold sea", Length=20, Seed=2)
    allowance.release(5000)
    for tab, seed in ((first, 1), (second, 2)):
        tab.wait_for_function(f"/seed {seed}/.test(document.querySelector('.text').innerText)")
    assert first.locator(".text").inner_text() != second.locator(".text").inner_text()
    assert len(tokens) < 20 + 2 * 21 + 300


def test_a_seed_that_is_none_is_refused_and_nothing_is_lost(metered, open_tab):
    port, allowance, _ = metered
    allowance.release(100)
    tab = open_tab(port)
    generate(tab, "the cold sea", Length=2, Seed="1.5")
    tab.get_by_text("The seed (1.5) must be a whole number below").wait_for()
    generate(tab, "the cold sea", Length=2, Seed="")
    tab.wait_for_function(DONE)
    assert re.search(r"2 tokens, seed \d+$", tab.locator(".text").inner_text())

"""A headless Chromium, where one is installed."""

import shutil

import pytest

FLAGS = (
    "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    " disable-component-update disable-sync"
)


@pytest.fixture(scope="module")
def browser():
    """Playwright's handle on the machine's own Chromium."""
    api = pytest.importorskip(
        "playwright.sync_api", reason="no Playwright: `python3 dev.py docs` installs it"
    )
    path = next(
        filter(
            None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))
        ),
        None,
    )
    if path is None:
        pytest.skip("no Chromium on this machine")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=[f"--{flag}" for flag in FLAGS.split()]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page that remembers what it asked for, `page.asked`, and what went wrong, `page.wrong`."""
    page = browser.new_page(viewport={"width": 400, "height": 900})
    page.set_default_timeout(15_000)
    page.asked, page.wrong = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("requestfailed", lambda request: page.wrong.append(f"failed: {request.url}"))
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on(
        "console",
        lambda message: page.wrong.append(message.text) if message.type == "error" else None,
    )
    yield page
    page.close()

"""A page in a real browser, where there is one: what its script finds is what it leaves as the page's title."""

import json
import re
import shutil
import subprocess

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync --window-size=900,700").split()


def titled(page, driver):
    """The JSON that a script, added to a page, leaves in its title"""
    driven = page.with_suffix(".driven.html")
    driven.write_text(f"{page.read_text(encoding='utf-8')}<script>{driver}</script>", encoding="utf-8")
    run = subprocess.run([CHROMIUM, *QUIET, f"--user-data-dir={page.parent}/user", "--dump-dom", f"file://{driven}"],
                         capture_output=True, text=True, timeout=60)
    title = re.search(r"<title>([\[{].*?[\]}])</title>", run.stdout, re.S)
    assert title, run.stderr[-2000:]
    return json.loads(title[1])

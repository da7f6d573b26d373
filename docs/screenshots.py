"""Renews the pictures of the site in docs/images from a run: `python docs/screenshots.py RUN` (needs chromium)."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent / "images"
PAGES = {"overview": ("index.html", "1200,1060")}
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
)


def main(run: Path) -> None:
    """One picture per page."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("no chromium here: install it, then run this again")
    HERE.mkdir(exist_ok=True)
    for name, (page, size) in PAGES.items():
        with tempfile.TemporaryDirectory() as profile:
            target = HERE / f"{name}.png"
            command = [browser, *FLAGS.split(), f"--user-data-dir={profile}", f"--window-size={size}"]
            url = (run / "site" / page).absolute().as_uri()
            subprocess.run([*command, f"--screenshot={target}", url], check=True, capture_output=True, timeout=120)
            print(target)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))

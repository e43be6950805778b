"""What tests of pages do in a headless browser; the fixture `browser` is in conftest.py."""

import os
import time
from pathlib import Path


def resize(browser, width=1280, height=900):
    """Gives the window a size; a narrow one is a phone's."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def wait(browser, script, seconds=20):
    end = time.monotonic() + seconds
    while not browser.execute_script(script):
        assert time.monotonic() < end, f"never true: {script}"
        time.sleep(0.02)


def picture(browser, name):
    folder = os.environ.get("PROXYTUNE_SCREENSHOTS")
    if folder:
        Path(folder, name).write_bytes(browser.get_screenshot_as_png())


def click(browser, selector):
    browser.execute_script(f"document.querySelector('{selector}').click()")

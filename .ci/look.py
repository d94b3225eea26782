"""Look at every page: ``python .ci/look.py [--axe axe.min.js] [DIRECTORY]``, with pytest, chromium and chromedriver.

Makes a screenshot of each page of an empty service and of one with 10,000 jobs, light and dark, 360 and 1280 pixels
wide, into DIRECTORY; with --axe, axe-core (npm) looks for what keeps people out. Exit code 1 if a page is wider than
the screen, complains in the console, or axe-core finds a violation.
"""

import argparse
import itertools
import json
import sys
import tempfile
import urllib.parse
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import test_csp  # noqa: E402 - from the repository, wherever this is run

JOBS = """
import base64, logging, time
import csp.job as job, csp.util as util

@job.asynchronous
def import_table(task_id, input):
    '''Download the table at data.url and import it.

    Progress and each step are in the log; the result is how many rows there were.
    '''
    log = logging.getLogger(task_id)
    log.setLevel(logging.DEBUG)
    log.addHandler(util.StoringHandler(task_id, input))
    for number, level in enumerate((10, 20, 20, 30, 20)):
        log.log(level, "Step %d: read %s rows from a place with quite a long name", number, f"{number * 12_345:,}")
    log.error("One row could not be read: 'not a number' in column 7\\nand that is the second line of this message")
    util.set_progress(task_id, 0.42, "42,000 of 100,000 rows")
    while input.get("data") == "wait":
        util.check_cancelled(task_id)
        time.sleep(0.05)
    if input.get("data") == "fail":
        raise ValueError("the table has no header, and this is a rather long sentence that says what to do about it")
    return {"rows": 100_000, "columns": ["name", "size", "colour"], "text": "x" * 9_000}

@job.synchronous(timeout=30)
def table(task_id, input):
    '''Return a small table as CSV.'''
    return "name,size,remark\\n" + "\\n".join(f"row {n},{n},a remark about row {n}" for n in range(80))

@job.synchronous
def picture(task_id, input):
    return base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
"""


def fill_service(client):
    """Submit a job of each kind; return the addresses of their pages."""
    metadata = {"resource": "3f2c9d1e-0000-4a7b-9c55-aa00bb11cc22", "rows": 100_000, "tags": ["a", "b"]}
    jobs = [
        client.submit("import_table", "wait", "running-job", metadata=metadata),
        client.submit("import_table", "fail", result_url="http://127.0.0.1:9/", metadata=metadata),
        client.submit("import_table", {"url": "https://example.org/" + "long/" * 60}, metadata=metadata),
        client.submit("table", metadata={"mimetype": "text/csv"}),
        client.submit("picture", metadata={"mimetype": "image/png"}),
        client.submit("table", None, "an-id-without-any-blank-" + "x" * 200),
    ]
    for job in jobs[1:]:
        client.finish(job)
    test_csp.eventually(lambda: client.show(jobs[0])["progress"])
    return ["/job/" + urllib.parse.quote(job["job_id"], safe="") for job in jobs]


def look(browser, url, axe):
    """Open a page; return what is wrong with it."""
    browser.open(url)
    for element in browser.elements("details:not([open]) > summary"):
        browser.script("arguments[0].parentNode.open = true", {browser.ELEMENT: element})
    width = browser.script("return document.documentElement.scrollWidth")
    wrong = [f"it is {width} pixels wide"] if width > browser.width else []
    wrong += [line for line in browser.complaints() if "(Not Found)" not in line and "(Forbidden)" not in line]
    if axe:
        browser.script(axe)
        found = json.loads(browser.script("return window.axe.run().then((found) => JSON.stringify(found.violations))"))
        wrong += [f"axe {rule['id']}: {rule['help']}: {node['html'][:200]}" for rule in found for node in rule["nodes"]]
    return wrong


def visit(driver, client, paths, name, directory, axe):
    """Look at all pages in every way; return how many things are wrong."""
    wrong = 0
    for dark, width in itertools.product((False, True), (360, 1280)):
        with tempfile.TemporaryDirectory() as profile:
            browser = test_csp.Browser(driver, profile, dark=dark, width=width)
            for number, path in enumerate(["/login", "/", "/job/running-job" if "/job/running-job" in paths else "/x"]):
                wrong += report(browser, client, path, f"{name}-stranger-{number}", dark, directory, axe)
            browser.open(client.url + "login").fill("#username", "admin")
            browser.fill("#password", test_csp.SETTINGS["PASSWORD"]).click("main button", "Sign in")
            browser.find("header button", "Sign out")
            for number, path in enumerate(paths):
                wrong += report(browser, client, path, f"{name}-{number}", dark, directory, axe)
            browser.close()
    return wrong


def report(browser, client, path, name, dark, directory, axe):
    """Look at one page, keep its picture, print what is wrong; return how much."""
    wrong = look(browser, client.url + path[1:], axe)
    file = directory / f"{name}-{'dark' if dark else 'light'}-{browser.width}.png"
    file.write_bytes(browser.screenshot())
    for line in wrong:
        print(f"{path} ({file.name}): {line}")
    return len(wrong)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--axe", type=Path, help="axe.min.js of axe-core")
    parser.add_argument("directory", type=Path, nargs="?")
    options = parser.parse_args()
    axe = options.axe.read_text(encoding="utf-8") if options.axe else ""
    wrong = 0
    with tempfile.TemporaryDirectory() as temporary, test_csp.chromedriver(test_csp.subprocess.DEVNULL) as driver:
        directory = options.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        for name, count in (("empty", 0), ("full", 10_000)):
            place = Path(temporary) / name
            place.mkdir()
            (place / "my_jobs.py").write_text(JOBS, encoding="utf-8")
            if count:
                test_csp.csp.Store(str(place / "jobs.db")).close()
                test_csp.fill(place / "jobs.db", count)
            process = test_csp.Process(place, "--jobs", "my_jobs", "--db", place / "jobs.db", "--workers", "4")
            try:
                paths = ["/", "/job", "/console/submit", "/nothing"]
                if count:
                    paths += fill_service(process.client)
                wrong += visit(driver, process.client, paths, name, directory, axe)
            finally:
                process.kill()
        print(f"{len(list(directory.glob('*.png')))} pictures, {wrong} things wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

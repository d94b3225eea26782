"""Check openapi.json against the running service: ``python .ci/api.py``, with pytest, openapi-spec-validator and
schemathesis. It fails if the document is not OpenAPI or the service does not keep what it says."""

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import test_csp  # noqa: E402 - from the repository, wherever this is run

CONFIG = """
[checks]
# by the interface's documentation, whatever a request says wrong is answered 409
negative_data_rejection.expected-statuses = ["400", "401", "403", "404", "405", "409", "414", "429", "431"]
positive_data_acceptance.expected-statuses = ["2xx", "302", "401", "403", "404", "409"]

# the one route that only the Authorization header opens: the tool wants 401, this service answers 403 to a wrong key
[[operations]]
include-path = "/job/{job_id}/report"
checks.missing_required_header.enabled = false
"""
# Each request comes, as through a proxy, from an address of its own: else the service defends itself against the
# guessing of passwords, as which it has to take what this tool does.
HOOKS = """
import itertools
import schemathesis

numbers = itertools.count(1)

@schemathesis.hook
def before_call(context, case, kwargs):
    number = next(numbers)
    case.headers["X-Forwarded-For"] = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
"""
RUNS = (
    ("--exclude-path", "/events", "--exclude-name", "DELETE /job/{job_id}"),  # /events never ends
    # ignored_auth repeats a successful request without credentials, and a job that has been deleted is 404 to all
    ("--exclude-path", "/events", "--exclude-checks", "ignored_auth"),
)
ENVIRON = {"CSP_TRUSTED_PROXIES": "127.0.0.1", "CSP_MAX_WAIT_SECONDS": "1"}


def main():
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        jobs = test_csp.REPOSITORY / "jobs_example.py"
        process = test_csp.Process(place, "--jobs", jobs, "--db", place / "jobs.db", environ=ENVIRON)
        try:
            document = place / "openapi.json"
            document.write_bytes(process.client.get("/openapi.json").body)
            (place / "schemathesis.toml").write_text(CONFIG, encoding="utf-8")
            (place / "csp_hooks.py").write_text(HOOKS, encoding="utf-8")
            subprocess.run([sys.executable, "-m", "openapi_spec_validator", str(document)], check=True)
            for run in RUNS:
                subprocess.run(
                    [
                        *(str(Path(sys.executable).with_name("schemathesis")), "--config-file", "schemathesis.toml"),
                        *("run", str(document), "--url", process.url, *run),
                        *("--header", f"Authorization: {test_csp.SECURE_KEY}", "--max-examples", "50", "--no-color"),
                        "--generation-deterministic",
                    ],
                    cwd=str(place),
                    env={**test_csp.os.environ, "SCHEMATHESIS_HOOKS": "csp_hooks", "PYTHONPATH": str(place)},
                    timeout=300,
                    check=True,
                )
        finally:
            process.kill()
        log = (place / "log").read_text(encoding="utf-8")
        assert "Traceback" not in log and "incident" not in log, log


if __name__ == "__main__":
    main()

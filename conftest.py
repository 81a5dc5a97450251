"""The suite's plugins: options, the engine booted once a session, the record and its verdicts, the reports."""

pytest_plugins = [
    "fixtures.options",
    "fixtures.suite",
    "fixtures.scopes",
    "fixtures.reporting",
]

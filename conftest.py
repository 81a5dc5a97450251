"""The suite's plugins: options, the engine booted once a session, the record, its verdicts, the reports, the end."""

pytest_plugins = [
    "fixtures.options",
    "fixtures.suite",
    "fixtures.hosts",
    "fixtures.scopes",
    "fixtures.reporting",
    "fixtures.ending",
    "fixtures.times",
]

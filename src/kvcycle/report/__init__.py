"""Draws records: the terminal's tables. Reads only records and verdicts."""

"""Statistics, tables and pictures of a run, read from its event log. Never imports ray."""

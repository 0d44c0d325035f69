"""The paper's language benchmark, TRACE, and its relatives: every method under one protocol."""

"""Which atoms of a finished run fire for which task: the command's tables and picture."""

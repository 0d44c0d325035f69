"""Which atoms of a finished run fire for which task: the command, its tables and its picture."""

"""The exit codes of ranks, node processes and commands. Imports no torch."""

FINISHED = 0
FAILED = 1
USER_ERROR = 2   # the user must fix something; a message on standard error says what
PREEMPTED = 75   # stopped, with a checkpoint if there was a step to save; can be resumed (EX_TEMPFAIL in sysexits.h)
KILLED = 130     # stopped at once, by a second Ctrl-C (128 + SIGINT)
